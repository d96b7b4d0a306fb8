"""Two hosts on one machine: of each the network, the name, /tmp and /dev/shm are its own, and a cable joins them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMES = ("host-a", "host-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29400
# Of host a; host b is the child, whose network's end of the cable host a makes.
SETUP = """
set -e
own() {
    hostname "$1"
    mount --bind "$folder/$1.names" /etc/hosts
    mount -t tmpfs none /dev/shm
    mount --bind "$folder" /mnt
    mount -t tmpfs none /tmp
    mkdir -p "$folder"
    mount --move /mnt "$folder"
    ip link set lo up
}
if [ "$1" = b ]; then
    own host-b
    echo ready
    read -r _
    ip address add 10.77.0.2/24 dev wire
    ip link set wire up
    echo up
    exec sleep 100000
fi
mkfifo "$folder/from-b" "$folder/to-b"
unshare --net --mount --uts sh -c "$0" "$0" b < "$folder/to-b" > "$folder/from-b" &
exec 3> "$folder/to-b" 4< "$folder/from-b"
rm "$folder/from-b" "$folder/to-b"
read -r _ <&4
own host-a
ip link add wire type veth peer name wire netns $!
ip address add 10.77.0.1/24 dev wire
ip link set wire up
echo >&3
read -r _ <&4
echo $$ $!
exec sleep 100000
"""


class Host:
    """One of two: `process` is in its namespaces as long as it lives."""

    def __init__(self, name: str, process: int, as_user: Sequence[str]) -> None:
        self.name = name
        self._enter = ["nsenter", f"--target={process}", *as_user, "--net"]

    def start(self, command: Sequence[str], output: Path, **variables: str) -> subprocess.Popen[bytes]:
        """Run a command there, in a session of its own; all that it prints goes to `output`."""
        enter = [*self._enter, "--mount", "--uts", "sh", "-c", 'cd "$0" && exec "$@"', str(ROOT)]
        with output.open("wb") as file:
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "sandbox")))} | variables
            return subprocess.Popen(
                [*enter, *command], stdout=file, stderr=file, env=environment, start_new_session=True
            )

    def cut(self) -> None:
        """The cable is out: nothing arrives any more, and nobody is told."""
        subprocess.run([*self._enter, "ip", "link", "set", "wire", "down"], check=True)


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Hosts a and b, which know each other by name; both see `folder`. What was started there is killed at the end."""
    for name, address in zip(NAMES, ADDRESSES, strict=True):
        lines = ["127.0.0.1 localhost", *(f"{a} {n}" for n, a in zip(NAMES, ADDRESSES, strict=True))]
        (folder / f"{name}.names").write_text("\n".join(lines) + "\n")
    # Jails drop root, for which a namespace of one user has no other: who is root needs none.
    as_user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    command = ["unshare", *as_user, "--net", "--mount", "--uts", "sh", "-c", SETUP, SETUP, "a"]
    with subprocess.Popen(
        command, env=os.environ | {"folder": str(folder)}, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            pids = [int(word) for word in process.stdout.readline().split()]
            enter = ["--user", "--preserve-credentials"] if as_user else []
            yield Host("host-a", pids[0], enter), Host("host-b", pids[1], enter)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
