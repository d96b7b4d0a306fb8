"""Imported first by every program: one sentence where the packages of the engine are missing."""

from __future__ import annotations

import sys
from importlib.util import find_spec

MISSING = [name for name in ("torch", "transformers", "openai", "matplotlib") if find_spec(name) is None]

if MISSING:
    SENTENCE = (
        f"fastgrpo's engine is not installed ({', '.join(MISSING)} missing): "
        "pip install 'fastgrpo[cpu]' or 'fastgrpo[gpu]' (the jails alone need nothing more)"
    )
    if (program := getattr(sys.modules["__main__"], "__spec__", None)) and program.name.startswith("fastgrpo."):
        print(f"error: {SENTENCE}", file=sys.stderr)
        sys.exit(2)
    raise ImportError(SENTENCE)
