# ruff: noqa: E501 - programs for the jail are strings, one statement a line
"""Each part of the jail carries weight: with it switched off, the attack that it holds succeeds.

The switches exist only in a module compiled here with -DJAIL_TEST_SWITCHES; the installed one has none.
"""

from __future__ import annotations

import socket
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastgrpo_sandbox import BlockingSandboxPool, Limits, bwrap, cell, cgroup
from fastgrpo_sandbox import cells as cells_module
from tests.sandbox.conftest import PRELUDE, QUICK, REPOSITORY
from tests.sandbox.test_attacks_hiding import watching

pytestmark = pytest.mark.jail

Opened = Callable[..., BlockingSandboxPool]


@pytest.fixture(scope="module")
def switchable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The native module with test switches. The compiler is the one that built the installed module."""
    folder = tmp_path_factory.mktemp("native")
    module = folder / f"_jail{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = sorted(map(str, (REPOSITORY / "csrc").glob("*.c")))
    include = f"-I{sysconfig.get_path('include')}"
    command = ["cc", "-shared", "-fPIC", "-O1", "-DJAIL_TEST_SWITCHES", include, "-o", str(module), *sources]
    subprocess.run(command, check=True)
    return module


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, switchable: Path) -> Iterator[Opened]:
    """Opens a pool of one cell whose jail lacks the named inner parts and bubblewrap arguments."""
    pools: list[BlockingSandboxPool] = []
    whole = cell.bwrap_spec

    def open_pool(without: str = "", drop: str = "", extra: tuple[str, ...] = ()) -> BlockingSandboxPool:
        def spec(kind: bwrap.Kind, preload: tuple[str, ...], armed: int) -> dict[str, object]:
            made = whole(kind, preload, armed)
            arguments = "\n".join(made["arguments"]).replace(drop, "").split("\n")
            program = arguments.index("--")
            arguments[program:program] = [*extra, "--setenv", "JAIL_WITHOUT", without]
            return made | {"arguments": arguments}

        monkeypatch.setattr(cell, "bwrap_spec", spec)
        monkeypatch.setattr(bwrap, "native_module", lambda: switchable)
        # A cgroup would hold processes as well.
        monkeypatch.setattr(cells_module, "open_base", lambda: cgroup.Base(None))
        pools.append(BlockingSandboxPool(cells=1, limits=QUICK).__enter__())
        return pools[-1]

    yield open_pool
    for pool in pools:
        pool.__exit__(None, None, None)


def out(pool: BlockingSandboxPool, code: str, **options: object) -> str:
    outcome = pool.run(PRELUDE + code, **options)
    assert outcome.status == "ok", outcome
    return outcome.stdout.strip()


def test_nothing_is_switched_off_without_the_switch(opened):
    pool = opened("")
    assert out(pool, "import socket; print(raised(socket.socket), os.getpid(), os.listdir('/tmp'))") == "EPERM 1 []"


def test_the_installed_module_has_no_switch():
    assert b"JAIL_WITHOUT" not in bwrap.native_module().read_bytes()


def test_seccomp_holds_sockets_and_user_namespaces(opened):
    pool = opened("seccomp")
    assert out(pool, "import socket; print(raised(socket.socket, socket.AF_UNIX))").startswith("allowed")
    assert out(pool, "print(sysno(272, 0x10000000))") == "allowed"


def test_tmpfs_hides_the_cells_processes(opened):
    pool = opened("tmpfs")
    assert out(pool, "print(os.listdir('/tmp'), os.path.exists('/tmp/proc/1'))") == "['proc'] True"


def test_descriptors_must_be_closed(opened):
    pool = opened("descriptors")
    assert (
        out(pool, "print(len([fd for fd in range(256) if raised(os.fstat, fd).startswith('allowed')]) > 4)") == "True"
    )


def test_pid_namespace_ends_daemons(opened):
    pool = opened("pid")
    daemon = "import time\nif os.fork() == 0:\n    os.setsid(); time.sleep(0.4); open('/tmp/late', 'w').close(); os._exit(0)\nprint(os.getpid())"
    assert out(pool, daemon) != "1"
    seen = "import time\npids = []\nfor pid in range(2, 400):\n    if raised(os.kill, pid, 0).startswith('allowed'): pids.append(pid)\nprint(len(pids) > 1)"
    assert out(pool, seen) == "True"  # other jobs' processes and the server can be signalled


def test_rlimits_hold_processes_and_descriptors(opened):
    pool = opened("rlimits")
    code = "import time\npids = []\nfor _ in range(8):\n    pid = os.fork()\n    if pid == 0: os._exit(0)\n    pids.append(pid)\nprint(len(pids))"
    assert out(pool, code, limits=Limits(processes=3)) == "8"


def test_polling_holds_memory_and_always_what_epolls_watch(opened):
    """As where a cgroup counts the memory: the watches of all jobs are together bounded for their one user."""
    code = "import time\nfor _ in range(6):\n    if os.fork() == 0: held = bytearray(60 << 20); time.sleep(1); os._exit(0)\nfor _ in range(6): os.wait()\nprint(1)"
    limits = Limits(memory_mb=100, wall_s=20, files=256)
    assert opened("").run(PRELUDE + code, limits=limits).status == "memory"
    pool = opened("polling")
    assert pool.run(PRELUDE + code, limits=limits).status == "ok"
    assert pool.run(watching(20, 20, 64, 0.3), limits=limits).status == "ok"
    assert pool.run(watching(60, 30, 256, 9), limits=limits).status == "memory"


def test_dropped_capabilities_hold_mounts_behind_seccomp(opened):
    mount = "print(sysno(165, b'none', b'/tmp', b'tmpfs', 0, b''))"
    assert out(opened("seccomp"), mount) == "EPERM"
    assert out(opened("seccomp,capabilities"), mount) == "allowed"


def test_ipc_namespace_holds_shared_memory_behind_seccomp(opened):
    create = "print(sysno(29, 4242, 4096, 0o1666))"
    find = "print(sysno(29, 4242, 4096, 0o666))"
    for without, found in (("seccomp", "ENOENT"), ("seccomp,ipc", "allowed")):
        pool = opened(without)
        assert out(pool, create) == "allowed"
        assert out(pool, find) == found


def test_network_namespace_holds_the_hosts_ports_behind_seccomp(opened):
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = (
            f"import socket; print(raised(socket.create_connection, ('127.0.0.1', {server.getsockname()[1]}), 2)[:7])"
        )
        assert out(opened("seccomp"), connect) in ("ECONNRE", "ENETUNR")
        assert out(opened("seccomp", extra=("--share-net",)), connect) == "allowed"


def test_read_only_root_holds_what_a_later_job_sees(opened):
    """Bubblewrap makes it so for the cell, and each child for itself."""
    make = "print(raised(os.mkdir, '/left'))"
    assert out(opened("", drop="--remount-ro\n/\n"), make) == "EROFS"
    pool = opened("mounts", drop="--remount-ro\n/\n")
    assert out(pool, make).startswith("allowed")
    assert out(pool, "print(os.path.exists('/left'))") == "True"


def test_read_only_devices_hold_what_a_later_job_sees(opened):
    touch = "print(raised(os.utime, '/dev/null'))"
    assert out(opened(""), touch) == "EROFS"
    assert out(opened("mounts"), touch) == "allowed None"
