"""What a user sees when something is wrong: one sentence, never a traceback. And files, written whole or not at all."""

from __future__ import annotations

import errno
import io
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from sysconfig import get_path
from traceback import walk_tb

USER_ERROR = 2
STDLIB = get_path("stdlib")
DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.EACCES,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
}
CONTROLS = re.compile(r"[^\n\t\x20-\x7e\xa0-\U0010ffff]")
# What torch and safetensors say, whose errors are no OSError.
DISK_FULL = re.compile(r"No space left|File too large|Disk quota|I/O error|file write failed|unexpected pos", re.I)

# What safetensors, as all in Rust, says of the system's errors.
OS_ERROR = re.compile(r"\(os error (\d+)\)")


class UserError(Exception):
    """What ends a run and a user can mend (configuration, model folder, endpoint, disk, a lost rank): one sentence
    naming the culprit and the fix."""


class CannotWrite(UserError):
    """A file could not be written, as where the disk is full: what was whole before is as it was."""


@contextmanager
def writing(what: object, fix: str = "free space, then continue with --resume") -> Iterator[None]:
    """Raise `CannotWrite` naming `what` and the `fix` where the block, by whatever library, cannot write a file."""
    try:
        yield
    except BaseException as error:
        # Errors of torch's checkpoints are no `Exception`.
        if isinstance(error, UserError) or not (isinstance(error, OSError) or DISK_FULL.search(str(error))):
            raise
        number = OS_ERROR.search(str(error))
        reason = os.strerror(int(number[1])) if number else "no space left on the disk"
        reason = getattr(error, "strerror", None) or reason
        raise CannotWrite(f"cannot write {what}: {reason}; {fix}") from None


def replace_file(path: Path, data: bytes, fix: str = "free space, then continue with --resume") -> None:
    """Write `data` as the file at `path`, which after a full disk, a kill or a power cut has either it or what it had.

    Makes the folder. Raises `CannotWrite`.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with writing(path, fix):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with the home of `~` or `~NAME` in it. Raises `UserError` where there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        home = Path(path).parts[0]
        fix = "set HOME, or write" if home == "~" else "write"
        raise UserError(f"there is no home folder for the {home} of {os.fspath(path)}: {fix} the whole path") from None


def cache_folder(name: str) -> Path:
    """Where what is called `name` is kept for later runs, in XDG_CACHE_HOME or ~/.cache. Raises as `expanded` does."""
    return Path(os.environ.get("XDG_CACHE_HOME") or expanded("~/.cache")) / "fastgrpo" / name


def first_line(error: Exception) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return _lines(error)[0]


def last_line(error: BaseException) -> str:
    """As `first_line`, of errors that tell their cause last, as torch's do after a traceback of their own."""
    return _lines(error)[-1]


def _lines(error: BaseException) -> list[str]:
    return (str(error).strip() or type(error).__name__).splitlines()


def said_by(error: BaseException) -> str:
    """What an error says, on one line of at most 500 characters, whatever its own methods do."""
    try:
        return " ".join(str(error).split())[:500]
    except Exception:
        return "it cannot be told"


def described(error: BaseException) -> str:
    """An error's kind, what it says and where it came from, on one line."""
    said, kind = said_by(error), type(error).__name__
    return (f"{kind}: {said}" if said else kind) + place_of(error)


def place_of(error: BaseException) -> str:
    """` (FILE:LINE)`, the innermost one in code of a user's own; empty where none of that is under way."""
    places = [(Path(frame.f_code.co_filename), line) for frame, line in walk_tb(error.__traceback__)]
    own = [f" ({file.name}:{line})" for file, line in places if not _is_a_packages(file)]
    return own[-1] if own else ""


def _is_a_packages(file: Path) -> bool:
    installed = not {"site-packages", "dist-packages"}.isdisjoint(file.parts) or file.is_relative_to(STDLIB)
    return installed or file.is_relative_to(Path(__file__).parent) or file.name.startswith("<frozen")


def brief(said: object, chars: int = 400) -> str:
    """What was said, on one line of about so many characters."""
    text = " ".join(str(said).split())
    return text if len(text) <= chars else f"{text[:chars]} ..."


def shown(value: object) -> str:
    """The beginning of a value's repr, on one line, for a sentence about it; its type's name where it has none."""
    try:
        return " ".join(f"{value!r:.200}".split())[:60]
    except Exception:
        return type(value).__name__


def printable(text: str) -> str:
    """Text of a policy's, a worker's or a jail's for a terminal, which would obey the control characters in it: they
    are shown as their escapes, but for line ends and tabs."""
    return CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)


def this_rank() -> str:
    """`rank 3`, of several hosts `rank 3 on NAME`; empty outside of torchrun."""
    if "RANK" not in os.environ:
        return ""
    # Not LOCAL_WORLD_SIZE, which vLLM sets to a number of its own.
    host = f" on {socket.gethostname()}" if os.environ.get("GROUP_WORLD_SIZE", "1") != "1" else ""
    return f"rank {os.environ['RANK']}{host}"


def say_error(sentence: str) -> None:
    """Print an error, with the rank that it came from under torchrun."""
    rank = this_rank()
    say_on_stderr(f"error: {rank}: {sentence}" if rank else f"error: {sentence}")


def say_on_stderr(line: str) -> None:
    """Print a line on standard error, if there is still somebody who reads it: how a process ends is not theirs."""
    with suppress(OSError):
        print(printable(line), file=sys.stderr, flush=True)


def show_any_text() -> None:
    """From now on standard output escapes what its encoding lacks: a line that is shown ends no run."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def without_reader() -> None:
    """Send standard output nowhere, also what Python still holds of it: who read it is gone."""
    if sys.__stdout__ is not None:
        with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.__stdout__.fileno())
