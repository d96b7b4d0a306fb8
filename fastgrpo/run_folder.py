"""A run's folder: who may write there, and what its continuation may change."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import msgspec

from fastgrpo.config import Config
from fastgrpo.config_files import flat, read_saved, to_toml
from fastgrpo.config_keys import KEYS, resolve
from fastgrpo.errors import UserError, replace_file, say_on_stderr, writing

MODEL, TOKENIZER, DATA = "model.digest", "tokenizer.digest", "data.digest"
TASK = "task.txt"
# One that is made here.
DIGEST = re.compile(r"[0-9a-f]{32}")
Digest = Annotated[str, msgspec.Meta(pattern=f"^{DIGEST.pattern}$")]
# How long a program waits for another one that writes its results into the same folder.
WRITER_S = 60.0
# Of each file of weights: fine-tuned models differ in it, where names and sizes are alike.
SAMPLED_BYTES = 2**16

# What says which tokens a prompt is, and which of them end a completion.
TOKENIZER_FILES = re.compile(
    r"(tokenizer|vocab|merges|special_tokens|added_tokens|chat_template|generation_config).*|.*\.(model|tiktoken)"
)

# What may differ between a run and its continuation: none of it changes what a finished step computed. The model may
# have moved: it is compared by its content (`refuse_another_model`). A run that its parity check has stopped goes on
# without the FP8 cache, one that ran out of memory with smaller micro-batches or by recomputing.
FREE_TO_CHANGE = re.compile(
    r"name|runs|grpo\.(steps|micro_batch_tokens|execute_s|straggler_s|max_infrastructure)|(checkpoint|eval|record)\..*|sandbox\.(cells|hosts)"
    r"|sft\.(keep|min_pass_rate)|workers\.latency_scale"
    r"|workers\.(others\.\w+\.)?(base_url|api_key_env|concurrency|timeout_s|retries|cache_dir|\w+_price)"
    r"|model\.(path|source|revision|offload_optimizer|gradient_checkpointing|recompute_mlp)"
    r"|engine\.(process|gpu_memory_utilization|kv_cache_gib|kv_cache_dtype|max_num_seqs|enforce_eager|parity_threshold|step_timeout_s|completion_timeout_s)"
)


def open_folder(config: Config, *, resume: bool, data: Mapping[str, str] = MappingProxyType({})) -> Path:
    """Create the run's folder with its `config.toml`; without `resume` an earlier run of that name is set aside.

    `data`: a digest of each data set, by its name.
    Raises `UserError` where the folder cannot be written, or with `resume` where `config` would change the numbers.
    """
    folder = config.folder
    if resume:
        earlier = resolve(read_saved(folder))
        refuse_changes(flat(earlier), config, source=folder / "config.toml")
        refuse_another_model(folder, earlier.model.path, config.model.path)
        refuse_another_tokenizer(folder, config.model.path)
        refuse_other_data(folder, data)
    fix = "free space, then continue with --resume" if resume else "free space or set --runs"
    with writing(f"the run's folder {folder}", fix):
        if not resume and (folder / "config.toml").exists():
            places = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
            aside = folder.rename(next(path for path in places if not path.exists()))
            say_on_stderr(f"an earlier run of this name is kept as {aside}; this one begins anew, without --resume")
        folder.mkdir(parents=True, exist_ok=True)
    model, named = Path(config.model.path), bool(config.model.path)
    replace_file(folder / MODEL, (model_digest(model) if named else "").encode(), fix)
    replace_file(folder / TOKENIZER, json.dumps(tokenizer_digests(model) if named else {}).encode(), fix)
    replace_file(folder / DATA, json.dumps(dict(data)).encode(), fix)
    # The last: a folder that has it can be resumed.
    replace_file(folder / "config.toml", to_toml(config).encode(), fix)
    return folder


@contextmanager
def held_name(folder: Path) -> Iterator[None]:
    """The block in which no other process has the run of this folder; on a file system without locks nobody is told.

    A link to a run's folder is another name of that run.
    Raises UserError where one has it: each would write its steps and checkpoints among the other's.
    """
    names = {folder.parent.resolve() / folder.name: None, folder.resolve(): None}
    with ExitStack() as held:
        for name in names:
            held.enter_context(_locked(name))
        yield


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = folder.parent / f".{folder.name}.lock"
    with writing(f"the run's folder {folder}", "free space or set --runs"):
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(descriptor, 200).decode(errors="replace")
                raise UserError(
                    f"the run {folder} is under way ({owner}): wait for its end, or choose another --name"
                ) from None
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        os.close(descriptor)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """The block in which no other program changes the results in this folder, which is made; a moment's work.

    They are of several programs, each of which keeps what is the others': a checkpoint may be evaluated while the
    training goes on. Raises UserError where another one's moment does not end.
    """
    with writing(f"to {folder}", "free space or set --runs"):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        # A file system without locks has no such block.
        with suppress(OSError):
            _wait_for_lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _wait_for_lock(descriptor: int, folder: Path) -> None:
    given_up = time.monotonic() + WRITER_S
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > given_up:
                raise UserError(
                    f"another program has been writing its results into {folder} for {WRITER_S:g} s: end it, as where "
                    "it is stopped, and start this one again"
                ) from None
            time.sleep(0.02)


def refuse_changes(saved: dict[str, Any], config: Config, *, source: Path) -> None:
    """Raise `UserError` where `config` differs from the dotted values `saved` in something that changes the numbers.

    A key that is missing, because it is younger than `saved`, had its default.
    """
    saved, now = {name: key.default for name, key in KEYS.items()} | saved, flat(config)
    for name in sorted(saved.keys() | now.keys()):
        if _comparable(saved.get(name)) != _comparable(now.get(name)) and not FREE_TO_CHANGE.fullmatch(name):
            raise UserError(
                f"cannot resume {source}: {name} was {saved.get(name)!r} and is now {now.get(name)!r}; "
                "set it back, or start a new run under another --name"
            )


def _comparable(value: Any) -> Any:
    """A file's lists are a configuration's tuples."""
    return tuple(value) if isinstance(value, list) else value


def refuse_another_model(folder: Path, earlier: str, now: str) -> None:
    """Raise `UserError` where the model at `now` is not the one that the run in `folder` began with, then at `earlier`.

    A folder that an older version wrote holds no digest: its model must be where it was.
    """
    kept = folder / MODEL
    began = kept.read_bytes().decode(errors="replace") if kept.is_file() else ""
    if kept.exists() and not DIGEST.fullmatch(began) and (began or earlier):
        raise _damaged(kept)
    found = model_digest(Path(now)) if now else ""
    if (began != found) if began else (earlier != now):
        moved = (
            f"model.path was {earlier!r} and is now {now!r}" if earlier != now else f"the files in {now} have changed"
        )
        raise UserError(
            f"cannot resume {folder}: {moved}, which is another model; "
            "set it back, or start a new run under another --name"
        )


def refuse_another_tokenizer(folder: Path, model: str) -> None:
    """Raise `UserError` where a file of the `model`'s tokenizer is not what it was as the run in `folder` began.

    A folder that an older version wrote holds no digests of them.
    """
    if model and (changed := _changed(folder / TOKENIZER, tokenizer_digests(Path(model)))):
        raise UserError(
            f"cannot resume {folder}: {changed} in {model} changed since it began, so that prompts may "
            "be other tokens; set it back, or start a new run under another --name"
        )


def refuse_other_data(folder: Path, data: Mapping[str, str]) -> None:
    """Raise `UserError` where a data set is not what it was as the run in `folder` began, by its digests in `data`.

    Neither a folder that an older version wrote nor one from which they were removed holds digests.
    """
    if changed := _changed(folder / DATA, data):
        raise UserError(
            f"cannot resume {folder}: {changed} changed since it began, so that its steps would draw other problems; "
            f"set it back, or remove {folder / DATA} to go on with what is there now"
        )


def _changed(kept: Path, now: Mapping[str, str]) -> str:
    """The names whose digests are not those in the file `kept`; empty where there are none, or no such file."""
    if not kept.exists():
        return ""
    try:
        began = msgspec.json.decode(kept.read_bytes(), type=dict[str, Digest])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        raise _damaged(kept) from None
    return " and ".join(sorted(name for name in began.keys() | now.keys() if began.get(name) != now.get(name)))


def _damaged(kept: Path) -> UserError:
    what = "data are those" if kept.name == DATA else "model is the one"
    return UserError(
        f"{kept} is damaged: if the {what} that the run began with, remove that file and continue with "
        "--resume, else start a new run under another --name"
    )


def model_digest(model: Path) -> str:
    """A digest of a model's config.json and of its files of weights: names, sizes and the middle of each.

    Empty where there is no such model.
    """
    if not (model / "config.json").is_file():
        return ""
    digest = hashlib.blake2b((model / "config.json").read_bytes(), digest_size=16)
    for path in sorted(path for path in model.iterdir() if path.suffix in (".safetensors", ".bin")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            file.seek(max(0, size - SAMPLED_BYTES) // 2)
            digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()


def tokenizer_digests(model: Path) -> dict[str, str]:
    """A digest of each file of a model's tokenizer, its chat template and its end tokens, by the file's name."""
    files = [path for path in model.iterdir() if TOKENIZER_FILES.fullmatch(path.name)] if model.is_dir() else []
    return {path.name: file_digest(path) for path in files if path.is_file()}


def file_digest(path: Path) -> str:
    """A digest of all bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).hexdigest()


def note_task_from_python(folder: Path) -> None:
    """Leave word in a run's folder that no configuration names its task: it was an argument of `fastgrpo.train`."""
    with writing(folder / TASK):
        (folder / TASK).write_text("The task was given to fastgrpo.train in Python; config.toml does not name it.\n")


def refuse_task_from_python(folder: Path, fix: str) -> None:
    """Raise `UserError` where the run in `folder` trains on what was given from Python: another task would be taken."""
    if (folder / TASK).exists():
        raise UserError(f"the task of the run {folder} was given to fastgrpo.train in Python: {fix}")
