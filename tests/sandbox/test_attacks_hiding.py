# ruff: noqa: E501 - programs for the jail are strings, one statement a line
"""Memory of a job that the fork server's looks at it would miss. Numbers as in test_attacks_resources.py."""

from __future__ import annotations

import pytest

from fastgrpo_sandbox import Limits
from tests.sandbox.conftest import PRELUDE

pytestmark = [pytest.mark.jail, pytest.mark.usefixtures("steady")]

# Full sockets: 208 KB each that no page of the process shows.
FILL = """
import os, socket, time
def fill(pairs):
    kept = []
    for _ in range(pairs):
        for end in (pair := socket.socketpair()):
            end.setblocking(False)
            try:
                while True: end.send(b"x" * 65536)
            except BlockingIOError: pass
        kept.append(pair)
    return kept
"""


@pytest.mark.parametrize("end", ["libc.syscall(60, 0)", "time.sleep(9)"], ids=["leader exits", "leader lives"])
def test_08_descriptors_of_a_process_whose_leading_thread_has_exited_are_those_of_another(pool, end):
    code = f"""{PRELUDE}{FILL}
import threading
def hold():
    kept = fill(26)
    time.sleep(9)
for _ in range(14):
    if os.fork() == 0:
        threading.Thread(target=hold).start()
        {end}
time.sleep(9)
"""
    assert pool.run(code, limits=Limits(memory_mb=100, wall_s=30)).status == "memory"


# A thread that shares all but its descriptors keeps those that its maker had, and then closed.
THREADS = f"""{PRELUDE}{FILL}
libc.clone.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
stacks = []
for _ in range(20):
    kept = MADE
    stacks.append(ctypes.create_string_buffer(1 << 16))
    top = (ctypes.addressof(stacks[-1]) + (1 << 16)) & ~15
    made = libc.clone(ctypes.cast(libc.pause, ctypes.c_void_p), top, 0x10000 | 0x800 | 0x100, None)
    assert made > 0, made
    for pair in kept:
        for each in pair: each.close()
time.sleep(TIME)
os._exit(0)
"""


def test_08_descriptors_that_a_thread_has_for_itself_are_counted(pool):
    code = THREADS.replace("MADE", "fill(24)").replace("TIME", "9")
    assert pool.run(code, limits=Limits(memory_mb=100, wall_s=30)).status == "memory"


def test_08_descriptors_that_a_thread_has_made_its_own_are_counted(pool):
    """By close_range, of any thread of Python's."""
    code = f"""{PRELUDE}{FILL}
import threading
threading.stack_size(1 << 18)
def hold():
    libc.syscall(436, 1000, 1000, 2)
    kept = fill(24)
    time.sleep(9)
for _ in range(20): threading.Thread(target=hold).start()
"""
    assert pool.run(code, limits=Limits(memory_mb=100, wall_s=30)).status == "memory"


def test_08_descriptors_that_threads_share_count_once(pool):
    code = f"""{FILL}
import threading
threading.stack_size(1 << 18)
kept = fill(20)
for _ in range(20): threading.Thread(target=time.sleep, args=(0.5,)).start()
"""
    assert pool.run(code, limits=Limits(memory_mb=100, wall_s=30)).status == "ok"


# The interpreter's own file, which its user may run and not read: the kernel then keeps its descriptors from whoever looks.
UNREADABLE = f"""
import os, shutil, sys
shutil.copy(os.path.realpath(sys.executable), "p")
os.chmod("p", MODE)
os.environ["PYTHONHOME"] = "/python" if os.path.exists("/python/lib") else sys.base_prefix
os.execv("p", ["python", "-S", "-c", '''{FILL}
for _ in range(COUNT):
    if os.fork() == 0:
        kept = fill(PAIRS)
        time.sleep(TIME)
        os._exit(0)
time.sleep(TIME)
'''])
"""


@pytest.mark.parametrize("mode", ["0o111", "0o755"])
def test_08_descriptors_of_a_program_that_nobody_may_read_are_counted(pool, mode):
    code = UNREADABLE.replace("MODE", mode).replace("COUNT", "20").replace("PAIRS", "24").replace("TIME", "9")
    assert pool.run(code, limits=Limits(memory_mb=100, wall_s=30, tmp_mb=64)).status == "memory"


def test_08_a_program_that_nobody_may_read_may_run(pool):
    code = UNREADABLE.replace("MODE", "0o111").replace("COUNT", "9").replace("PAIRS", "1").replace("TIME", "0.3")
    outcome = pool.run(code, limits=Limits(memory_mb=100, wall_s=30, tmp_mb=64))
    assert "exit status 0" in outcome.error, outcome  # it is no script any more, and sends no result


# Writes to each page that the fork server's interpreter has, as it is: no child of the job's then shares it.
COPIED = """
import ctypes, os, time
libc = ctypes.CDLL(None)
for each in (libc.write, libc.read): each.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
libc.sbrk.restype = ctypes.c_void_p
def copy_pages():
    there = ctypes.c_ubyte()
    out, into = os.pipe()
    regions = {id(each) >> 25 for each in (os, libc, object(), "text" * 3, [], copy_pages)} | {(libc.sbrk(0) >> 25) - 1, libc.sbrk(0) >> 25}
    for page in (page for region in regions for page in range(region << 25, (region + 1) << 25, 4096)):
        if libc.mincore(page, 4096, ctypes.byref(there)) == 0 and libc.write(into, page, 1) == 1 and libc.read(out, page, 1) != 1:
            os.read(out, 1)
for _ in range(COUNT):
    if os.fork() == 0:
        if WRITES: copy_pages()
        time.sleep(TIME); os._exit(0)
time.sleep(TIME)
"""


def test_08_pages_of_the_interpreter_that_each_process_has_copied_are_counted(pool):
    code = COPIED.replace("COUNT", "28").replace("WRITES", "1").replace("TIME", "15")
    assert pool.run(code, limits=Limits(memory_mb=100, wall_s=30)).status == "memory"


def test_08_pages_of_the_interpreter_that_processes_share_are_not_the_jobs(pool):
    code = COPIED.replace("COUNT", "28").replace("WRITES", "0").replace("TIME", "0.5")
    assert pool.run(code, limits=Limits(memory_mb=100, wall_s=30)).status == "ok"


# Each file is watched under every number that a descriptor of it once had.
WATCHING = """
import os, select, time
epolls, files = [select.epoll() for _ in range(EPOLLS)], [os.eventfd(0) for _ in range(FILES)]
first = max([*files, *(epoll.fileno() for epoll in epolls)]) + 1
for file in files:
    for number in range(first, LAST):
        os.dup2(file, number)
        for epoll in epolls: epoll.register(number)
        os.close(number)
time.sleep(TIME)
"""


def watching(epolls: int, files: int, last: int, seconds: float) -> str:
    code = WATCHING
    for name, value in {"EPOLLS": epolls, "FILES": files, "LAST": last, "TIME": seconds}.items():
        code = code.replace(name, str(value))
    return code


def test_08_a_file_that_an_epoll_watches_many_times_is_counted_each_time(pool):
    """With 121 descriptors 450,000 times, which take the kernel 90 MB; and all jobs' together may be a few millions."""
    limits = Limits(memory_mb=64, wall_s=30, files=256)
    assert pool.run(watching(60, 60, 256, 15), limits=limits).status == "memory"
    assert pool.run(watching(20, 20, 64, 0.3), limits=limits).status == "ok"


def test_08_no_page_is_sent_to_the_machines_swap(lines):
    """Where it has some, such pages are none that a look at the job counts."""
    code = """
import mmap
area = mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.write(b"x" * (1 << 20))
for advice in (mmap.MADV_DONTNEED, mmap.MADV_FREE, 20, 21): print(raised(area.madvise, advice))
"""
    assert lines(code) == ["allowed None", "allowed None", "EINVAL", "EINVAL"]


# Reading maps the one page of zeros, which is nobody's, and takes a page of a page table for each 2 MB.
TABLES = """
import mmap, os, time
for _ in range(200):
    if os.fork() == 0:
        area = mmap.mmap(-1, SIZE << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ)
        for place in range(0, len(area), 2 << 20): area[place]
        time.sleep(TIME); os._exit(0)
held = bytearray(300 << 20)
time.sleep(TIME)
"""


def test_08_page_tables_are_counted(pool):
    limits = Limits(memory_mb=400, wall_s=60, cpu_s=30, processes=256)
    assert pool.run(TABLES.replace("SIZE", "380").replace("TIME", "20"), limits=limits).status == "memory"
    assert pool.run(TABLES.replace("SIZE", "2").replace("TIME", "1"), limits=limits).status == "ok"


def test_08_a_crash_starts_no_program_of_the_hosts(lines):
    """With a limit of 0 the kernel starts what core_pattern names; with 1 it dumps nothing, and that stays so."""
    code = """
import mmap, resource, struct
core, files = resource.RLIMIT_CORE, resource.RLIMIT_NOFILE
resource.setrlimit(core, (0, 0))
both = ctypes.create_string_buffer(struct.pack("QQ", 0, 0))
libc.mmap.restype = ctypes.c_void_p
low = libc.mmap(ctypes.c_void_p(6 << 32), 4096, 3, 0x32, -1, 0)  # the lower half of its address is 0
print(low == 6 << 32, sysno(160, core, both), sysno(302, 0, core, both, None), sysno(302, 0, core, ctypes.c_void_p(low), None))
print(resource.getrlimit(core))
resource.setrlimit(files, (20, 20))
print(resource.getrlimit(files))
"""
    assert lines(code) == ["True allowed allowed allowed", "(1, 1)", "(20, 20)"]


def test_36_the_pidfd_of_the_fork_server_sends_no_signal(lines):
    """A socket tells who made its other end (SO_PEERPIDFD, since Linux 6.5); that process is in no namespace of the job's."""
    code = """
import socket
try:
    server = socket.socket(fileno=os.dup(3)).getsockopt(socket.SOL_SOCKET, 77)
    print(sysno(424, server, 9, None, 0), sysno(438, server, 0, 0))
except OSError:
    print("EINVAL EPERM")
"""
    assert lines(code) == ["EINVAL EPERM"]
