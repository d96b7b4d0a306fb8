"""Imported first by every program: one sentence where the engine's packages are missing or do not fit each other, or a
signal comes meanwhile."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from fastgrpo.doctor import media_packages, present_folder
from fastgrpo.signals import handle_signals

PROGRAM = getattr(sys.modules["__main__"], "__spec__", None)
OWN_PROGRAM = PROGRAM is not None and PROGRAM.name.startswith("fastgrpo.")
MISSING = [name for name in ("torch", "transformers", "openai", "matplotlib") if find_spec(name) is None]

SENTENCE = ""
if MISSING:
    SENTENCE = (
        f"fastgrpo's engine is not installed ({', '.join(MISSING)} missing): "
        "pip install 'fastgrpo[cpu]' or 'fastgrpo[gpu]' (the jails alone need nothing more)"
    )
elif broken := [found for found in (present_folder(), media_packages()) if not found.ok]:
    SENTENCE = broken[0].text

if SENTENCE:
    if OWN_PROGRAM:
        print(f"error: {SENTENCE}", file=sys.stderr)
        sys.exit(2)
    raise ImportError(SENTENCE)

if OWN_PROGRAM:
    handle_signals()
