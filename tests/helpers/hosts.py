"""Two hosts on one machine: of each the network, the name, /tmp and /dev/shm are its own; a cable joins them."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

NAMES = ("host-a", "host-b")
KINDS = ("net", "mnt", "uts")
# Of host a, whose child host b is. Both see `folder`, wherever it lies. Each knows the other by its name.
SETUP = """
set -e
own() {
    hostname "$1"
    printf '127.0.0.1 localhost\\n10.77.0.1 host-a\\n10.77.0.2 host-b\\n' > "$folder/$1.names"
    mount --bind "$folder/$1.names" /etc/hosts
    mount -t tmpfs none /dev/shm
    if [ -n "$own_tmp" ]; then
        mount --bind "$folder" /mnt
        mount -t tmpfs none /tmp
        mkdir -p "$folder"
        mount --move /mnt "$folder"
    fi
    ip link set lo up
}
cable() {
    ip address add "$1/24" dev cable
    ip link set cable up
}
if [ "$1" = b ]; then
    own host-b
    echo ready
    read -r _
    cable 10.77.0.2
    echo joined
    exec sleep 100000
fi
mkfifo "$folder/to-b" "$folder/from-b"
unshare --net --mount --uts sh -c "$0" "$0" b < "$folder/to-b" > "$folder/from-b" &
exec 3> "$folder/to-b" 4< "$folder/from-b"
rm "$folder/to-b" "$folder/from-b"
read -r _ <&4
own host-a
ip link add cable type veth peer name cable netns $!
cable 10.77.0.1
echo >&3
read -r _ <&4
echo $$ $!
exec sleep 100000
"""


class Host:
    """One of two: `process` is there as long as it lives."""

    def __init__(self, process: int, *, as_user: bool) -> None:
        self._process, self._kinds = process, (("user",) if as_user else ()) + KINDS

    def enter(self) -> None:
        """The calling process, which must have one thread, is on this host from now on, and so is what it starts."""
        for kind in self._kinds:
            descriptor = os.open(f"/proc/{self._process}/ns/{kind}", os.O_RDONLY)
            if ctypes.CDLL(None, use_errno=True).setns(descriptor, 0) != 0:
                raise OSError(ctypes.get_errno(), f"setns {kind}")
            os.close(descriptor)

    def cut(self) -> None:
        """The cable is out: nothing arrives any more, and nobody is told."""
        user = ["--user", "--preserve-credentials"] if "user" in self._kinds else []
        enter = ["nsenter", f"--target={self._process}", "--net", *user]
        subprocess.run([*enter, "ip", "link", "set", "cable", "down"], check=True)


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """host-a and host-b, which end with the block. Skips the test where this machine forbids them."""
    for tool in ("unshare", "nsenter", "ip"):
        if shutil.which(tool) is None:
            pytest.skip(f"two hosts need {tool} (util-linux, iproute2)")
    # Jails drop root, for which a namespace of one user has no other: who is root needs none.
    as_user = os.geteuid() != 0
    # A checkout or an interpreter that is in /tmp has to stay there.
    used = any(Path(place).resolve().is_relative_to("/tmp") for place in (__file__, sys.prefix, sys.base_prefix))
    command = ["unshare", *(["--user", "--map-root-user"] if as_user else []), "--net", "--mount", "--uts"]
    with subprocess.Popen(
        [*command, "sh", "-c", SETUP, SETUP, "a"],
        env=os.environ | {"folder": str(folder), "own_tmp": "" if used else "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            found = process.stdout.readline().split()
            if not found:
                pytest.skip(f"two hosts need namespaces: {process.stderr.readline().strip()}")
            yield Host(int(found[0]), as_user=as_user), Host(int(found[1]), as_user=as_user)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
