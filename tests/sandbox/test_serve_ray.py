"""Jails on a Ray cluster of two nodes of this machine: both work, and one that dies costs no job and comes back."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from fastgrpo_sandbox import RemotePool, SandboxUnavailable, SpreadPool, StdioTests
from fastgrpo_sandbox.ray_servers import ray_servers

pytestmark = pytest.mark.jail
MODULE = importlib.import_module("fastgrpo_sandbox.ray_servers")
DEADLINE_S = 120


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)

    async def enter() -> None:
        async with SpreadPool(["ray"]):
            pass

    with pytest.raises(ImportError, match=r"fastgrpo\[ray\]"):
        asyncio.run(enter())


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU each."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'fastgrpo[ray]'")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()


def test_both_nodes_run_jobs_and_one_that_dies_comes_back(cluster, monkeypatch):
    monkeypatch.setattr(MODULE, "LOOK_S", 0.3)
    actors: list[Any] = []
    made = MODULE._actor
    monkeypatch.setattr(MODULE, "_actor", lambda *each: actors.append(made(*each)) or actors[-1])

    async def main() -> None:
        import ray

        async with ray_servers(cluster.address) as (urls, key), RemotePool(urls, key=key) as pool:
            assert len(urls) == 2
            tests = StdioTests((("1", "2"), ("2", "2")))
            assert (await pool.run("print(int(input()) + 1)", tests=tests)).tests == (True, False)
            jobs = [asyncio.ensure_future(pool.run(f"import time; time.sleep(0.3); print({i})")) for i in range(24)]
            while min(host.in_flight for host in pool._hosts) < 2:
                await asyncio.sleep(0.02)
            ray.kill(actors[0], no_restart=False)
            assert [outcome.stdout for outcome in await asyncio.gather(*jobs)] == [f"{i}\n" for i in range(24)]
            while pool.stats()["hosts_failed"]:  # until it answers at its old port
                assert (await pool.run("print(1)")).status == "ok"
                await asyncio.sleep(0.1)

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


def test_no_cluster_is_one_sentence(monkeypatch):
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'fastgrpo[ray]'")

    def nowhere(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nPlease")

    async def enter() -> None:
        async with ray_servers():
            pass

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", nowhere)
    with pytest.raises(SandboxUnavailable, match=r"no Ray cluster at 'auto': .* \(Could not find .* instance\.\)$"):
        asyncio.run(enter())
