"""Limits are checked where they are made: a wrong one never reaches a jail."""

from __future__ import annotations

import math

import msgspec
import pytest

from fastgrpo_sandbox import Limits

WRONG = {
    "wall_s": (0, -1, 86401, math.nan, math.inf, True, "1", None),
    "cpu_s": (0.0, -0.5, 1e9, math.nan, False, "1"),
    "memory_mb": (0, -1, 256.5, 256.0, (1 << 20) + 1, True, "256", None),
    "processes": (0, 257, 1.5, True),
    "output_bytes": (-1, (4 << 20) + 1, 0.5),
    "tmp_mb": (0, 4097, 16.0),
    "files": (15, 4097, 64.0),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_limit_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^Limits\.{name} is {value!r}: give .*\.$"):
        Limits(**{name: value})
    with pytest.raises(ValueError, match=name):
        msgspec.structs.replace(Limits(), **{name: value})
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({name: value}, Limits)


def test_the_outermost_right_limits():
    assert (
        Limits(wall_s=86400, cpu_s=1e-3, memory_mb=1, processes=1, output_bytes=0, tmp_mb=1, files=16).wall_s == 86400
    )
    Limits(memory_mb=1 << 20, processes=256, output_bytes=4 << 20, tmp_mb=4096, files=4096)
