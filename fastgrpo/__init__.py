"""fastgrpo: a small, fast reinforcement-learning engine for code. `fastgrpo.train(...)` trains from Python."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # to a reader of types `train` is the function, which the module of that name may be called as
    from fastgrpo.stopping import stop as stop
    from fastgrpo.train import train as train


def __getattr__(name: str) -> Any:
    """`fastgrpo.train` and `fastgrpo.stop`, imported on first use: the jails alone need none of its packages."""
    if name == "train":
        return import_module("fastgrpo.train")
    if name == "stop":
        return import_module("fastgrpo.stopping").stop
    raise AttributeError(f"module 'fastgrpo' has no attribute {name!r}")
