"""A small soak: every outcome right and nothing left, also while cells and fork servers are killed."""

from __future__ import annotations

import asyncio
import sys

import pytest

from tests.sandbox.conftest import REPOSITORY

sys.path.append(str(REPOSITORY / "bench"))

from sandbox_soak import Soak


@pytest.mark.jail
@pytest.mark.parametrize(("kills_every", "malformed"), [(0.0, 0.0), (0.0, 0.5), (0.1, 0.1)])
def test_soak(kills_every, malformed):
    soak = Soak(kills_every, malformed)
    asyncio.run(soak.run(400))
    assert soak.wrong == {}
    assert soak.seen.total() == 800
    assert soak.left.pop("MB") < 8
    assert set(soak.left.values()) == {0}
    assert (soak.kills > 0) == (kills_every > 0)
    # A kill may find its cell idle.
    assert soak.kills or not soak.seen["infrastructure"]
    assert (sum(count for end, count in soak.seen.items() if "malformed" in end) > 0) == (malformed > 0)
