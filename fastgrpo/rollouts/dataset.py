"""Rows of a data set as examples: from Python, a file, a folder or the hub."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from fastgrpo.errors import UserError, described, expanded, first_line, shown
from fastgrpo.ranks.collectives import STAGE_WAIT_S
from fastgrpo.ranks.deadlines import within
from fastgrpo.rollouts.environment import as_text, is_message

# NAME or OWNER/NAME, then what it has of /CONFIGURATION, @REVISION and :SPLIT.
HUB_SET = re.compile(
    r"(?P<path>[\w.-]+(/[\w.-]+)?)(?:/(?P<name>[\w.-]+))?(?:@(?P<revision>[\w.-]+))?(?::(?P<split>\w[^/,]*))?"
)
T = TypeVar("T")
Message = dict[str, str]
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
IN_FOLDERS = {*FORMATS, ".ndjson", ".tsv", ".arrow", ".zip"}  # what may have a column `prompt`
MOST_ITEMS = 10_000_000  # of a data set that is iterated over
MOST_FILES = 20_000  # of a folder that is a data set; the library goes through all of them, several times


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a data set. `prompt`: text, or chat messages; `columns`: all that the row has besides."""

    id: str
    prompt: str | list[Message]
    columns: Mapping[str, Any] = field(default_factory=dict)


def read_examples(source: str | Path | Iterable[Mapping[str, Any]], split: str = "train") -> list[Example]:
    """The rows of `source` with a `prompt`: a list of dicts, a `datasets.Dataset`, a file or a name on the hub.

    `split` is what is taken of a name that says none (see `hub_rows`). `prompt` is text or a list of messages with
    `role` and `content`. A row without an `id` has its number as one, and after an `id` that an earlier row has, too,
    the number is added: statistics over problems, and the curriculum, would take both rows for one problem.
    Raises UserError naming the row that has no usable prompt, or why there are no rows.
    """
    rows = _listed(_rows(str(source), split) if isinstance(source, str | Path) else source)
    if not rows:
        raise UserError(f"{source if isinstance(source, str | Path) else 'the data set'} has no rows")
    examples, known = [], set[str]()
    for number, row in enumerate(rows):
        example = _example(number, row)
        while example.id in known:
            example = replace(example, id=f"{example.id}#{number}")
        examples.append(example)
        known.add(example.id)
    return examples


def _listed(rows: Any) -> list[Mapping[str, Any]]:
    whole = isinstance(rows, Mapping) or not isinstance(rows, Iterable)
    listed: list[Any] = [None] if whole else as_list(rows, "the data set")
    if not all(isinstance(row, Mapping) for row in listed):
        raise UserError(
            f"a data set is a list of rows, each a dict with a prompt, got {shown(rows)}: of a table pass its rows "
            "(to_dict('records')), of several splits one"
        )
    return listed


def as_list(items: Iterable[T], what: str) -> list[T]:
    """All of the `items`. Raises UserError, which names `what`, where their own code raises or they have no end.

    The process ends where it hangs.
    """
    try:
        with within(STAGE_WAIT_S, f"{what} has not been read to its end in {STAGE_WAIT_S:g} s: its own code hangs"):
            found = list(islice(items, MOST_ITEMS + 1))
        if len(found) > MOST_ITEMS:
            raise UserError(f"{what} has more than {MOST_ITEMS:,} items, or no end: pass a part of it")
        return found
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} cannot be read to its end: it raised {described(error)}") from error


def hold_out(examples: list[T], count: int, seed: int) -> tuple[list[T], list[T]]:
    """(training, held-out) examples; which `count` are held out follows `seed`. Raises UserError where none is left."""
    if count >= len(examples):
        raise UserError(f"data.held_out = {count} leaves nothing of {len(examples)} rows to train on: lower it")
    held = set(random.Random(f"{seed}/held-out").sample(range(len(examples)), count))
    return [e for n, e in enumerate(examples) if n not in held], [e for n, e in enumerate(examples) if n in held]


def with_all_columns(rows: Sequence[Example], names: Iterable[str]) -> list[Example]:
    """The rows, each with every column of the `names`: None where it has none, as where tables are put together."""
    none = dict.fromkeys(names)
    return [row if row.columns.keys() >= none.keys() else replace(row, columns={**none, **row.columns}) for row in rows]


def used(rows: list[T], count: int, seed: int) -> list[T]:
    """The `count` of the rows that `data.problems` leaves, drawn by `seed`; all where it is 0 or there are no more."""
    return hold_out(rows, count, seed)[1] if 0 < count < len(rows) else rows


def set_names(dataset: str | Sequence[str]) -> list[str]:
    """The data sets that a key names: none where it is empty, one, a list, or several separated by commas."""
    if not isinstance(dataset, str):
        return [name for name in dataset if name]
    if dataset and expanded(dataset).exists():
        return [dataset]
    return [name.strip() for name in dataset.split(",") if name.strip()]


def of_each(value: T | tuple[T, ...], sets: Sequence[object], key: str) -> tuple[T, ...]:
    """A key's value for each data set: one for all, or as many as there are. Raises UserError."""
    values = value if isinstance(value, tuple) else (value,) * len(sets)
    if len(values) != len(sets):
        raise UserError(f"{key} has {len(values)} values and data.dataset names {len(sets)}: give one, or one for each")
    return values


def mixed(sets: Sequence[Sequence[T]], weights: Sequence[float], seed: int) -> list[T]:
    """All `sets` in one: the items of the least weight once, others as often as their set's weight is larger.

    Where that is no whole number some of the set's items, drawn by `seed`, come once more.
    """
    whole: list[T] = []
    for items, weight in zip(sets, weights, strict=True):
        times, rest = divmod(weight / min(weights), 1)
        drawn = random.Random(f"{seed}/weights").sample(range(len(items)), round(rest * len(items)))
        whole += list(items) * int(times) + [items[index] for index in sorted(drawn)]
    return whole


def hub_rows(source: str, split: str = "train") -> Iterable[Mapping[str, Any]]:
    """The rows of a set on the hub, OWNER/NAME[/CONFIGURATION][@REVISION][:SPLIT], or of a folder of its files.

    Without a split of its own `split`, or the only one that there is. Raises UserError where the library is not
    installed, for a name that is unknown or gated or cannot be reached, and for a folder that is no data set.
    """
    named = HUB_SET.fullmatch(source)
    folder = expanded(source)
    parts = {"path": str(folder)} if folder.is_dir() else {"path": source} if named is None else named.groupdict()
    if Path(parts["path"]).is_dir():  # it comes before a name on the hub
        _check_folder(parts["path"])
    load_dataset = _library(source)
    wanted = parts.pop("split", None)
    found = _loaded(source, lambda: load_dataset(**{key: value for key, value in parts.items() if value}, split=wanted))
    if wanted or not isinstance(found, Mapping):
        return found
    if split not in found and len(found) > 1:
        raise UserError(f"the data set {source} has no split {split}: append one as {source}:{next(iter(found))}")
    return found.get(split) or next(iter(found.values()))


def _rows(source: str, split: str) -> Iterable[Mapping[str, Any]]:
    path = expanded(source)
    if path.suffix == ".jsonl" and path.is_file():
        return _json_lines(path)
    if path.is_file() and path.suffix in FORMATS:
        load_dataset, kind = _library(source), FORMATS[path.suffix]
        return _loaded(source, lambda: load_dataset(kind, data_files=str(path), split="train"), "check the file")
    if not path.exists() and (path.suffix in FORMATS or source.startswith(("/", "~", "."))):
        # A run's own configuration may name it from elsewhere.
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise UserError(f"the data set {source} does not exist{where}: give a file, or a name on the hub as OWNER/NAME")
    if path.is_file():
        raise UserError(f"the data set {source} is a file of another kind than {', '.join(FORMATS)}: write it as one")
    return hub_rows(source, split)


def _check_folder(folder: str) -> None:
    """Raises UserError for a folder that is plainly no data set, before the library looks for one in all of it."""
    if any((Path(folder) / file).is_file() for file in ("dataset_dict.json", "state.json")):
        raise UserError(
            f"the folder {folder} is one that save_to_disk wrote: pass dataset=datasets.load_from_disk(...) from "
            "Python, or write its rows as .jsonl or .parquet"
        )
    seen, found = 0, False
    for place, _, files in os.walk(folder, followlinks=True):
        seen += 1 + len(files)
        if seen > MOST_FILES:
            raise UserError(
                f"the folder {folder} holds more than {MOST_FILES} files, too many for a data set: name the folder of "
                "the data files alone, or a file"
            )
        hidden = any(part.startswith(".") for part in Path(place).relative_to(folder).parts)
        found = found or (not hidden and any(not IN_FOLDERS.isdisjoint(Path(file).suffixes) for file in files))
    if not found:
        known = ", ".join(sorted(IN_FOLDERS))
        raise UserError(f"the folder {folder} holds no data files ({known}): name the folder that does, or a file")


def _library(source: str) -> Callable[..., Any]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"{source} is no .jsonl file, and other data sets need: pip install 'fastgrpo[hub]'") from None
    return load_dataset


def _loaded(
    source: str, load: Callable[[], Any], fix: str = "check the name, and HF_TOKEN where it is private or gated"
) -> Any:
    try:
        return load()
    except Exception as error:
        # The library raises whatever its backends do, and of a file that it cannot read no more than that there is one.
        reason = first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error).rstrip(".")
        raise UserError(f"the data set {source} does not load: {reason}; {fix}") from error


def json_of(text: bytes, kind: type[T]) -> T:
    """JSON, also as Python writes it, with Infinity and NaN. Raises msgspec's errors, and UnicodeDecodeError."""
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        if not any(name in text for name in (b"Infinity", b"NaN")):
            raise
        try:
            found = json.loads(text)
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise msgspec.DecodeError("JSON is malformed: half a character (a lone surrogate)") from None
        except json.JSONDecodeError as error:
            raise msgspec.DecodeError(f"JSON is malformed: {error}") from None
        return msgspec.convert(found, kind)


def _json_lines(path: Path) -> Iterable[dict[str, Any]]:
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if line.strip():
            try:
                yield json_of(line, dict[str, Any])
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise UserError(f"{path}:{number} is no JSON object: {error}") from error


def _example(number: int, row: Mapping[str, Any]) -> Example:
    columns = dict(row)
    name, prompt = as_text(columns.get("id", number)), columns.pop("prompt", None)
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()  # pandas makes arrays of a parquet file's lists
    messages = isinstance(prompt, list) and prompt and all(is_message(message) for message in prompt)
    if not (isinstance(prompt, str) and prompt) and not messages:
        have = (
            f"its prompt is {shown(prompt)}" if "prompt" in row else f"it has {', '.join(map(str, row)) or 'nothing'}"
        )
        raise UserError(
            f"row {name} of the data set needs a prompt, as text or as a list of messages whose role and content are "
            f"texts; {have}"
        )
    if odd := [column for column in columns if not isinstance(column, str)]:
        raise UserError(f"row {name} of the data set has a column {shown(odd[0])}: a column's name is a text")
    return Example(name, prompt, columns)
