"""A Hugging Face folder but for its weights: architecture, tokenizer, the tokens that end a completion."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from fastgrpo.errors import UserError, expanded, first_line
from fastgrpo.policy.architecture import check_architecture


def load_config(path: str | os.PathLike[str]) -> PretrainedConfig:
    """The architecture of a Hugging Face folder.

    Raises UserError if it is not a causal LM with its tokenizer, or one that cannot be trained.
    """
    _check_folder(Path(path))
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        check_architecture(Path(path), config)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"model folder {path} has no usable config.json: {first_line(error)}") from error
    return config


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder; where it names no end token, the first one of the model's.

    Raises UserError if the folder has none that loads, or no end token anywhere.
    """
    _check_folder(Path(path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # of whichever library reads the files
        raise UserError(f"the tokenizer in {path} does not load: {first_line(error)}; mend its files") from error
    if not tokenizer.encode("a", add_special_tokens=False):
        raise UserError(f"the tokenizer in {path} knows no text, as where tokenizer.json is missing: put it there")
    if tokenizer.eos_token_id is None and (ends := end_token_ids(Path(path))):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {path} has no eos_token, which ends a completion: set it and save it there")
    return tokenizer


def end_token_ids(path: Path) -> list[int]:
    """The end tokens that the folder's generation_config.json and config.json list: several in Llama 3 and Gemma 3.

    Raises UserError naming the file that lists none that can be read.
    """
    found: list[int] = []
    for file in (path / "generation_config.json", path / "config.json"):
        if file.exists():
            try:
                # As transformers reads them: with numbers such as Infinity, which msgspec refuses.
                ids = msgspec.convert(json.loads(file.read_text(encoding="utf-8")), _Ends).eos_token_id
            except (OSError, ValueError, msgspec.MsgspecError) as error:
                raise UserError(f"{file} cannot be read: {first_line(error)}; download or save it again") from error
            found += ids if isinstance(ids, list) else [] if ids is None else [ids]
    return found


class _Ends(msgspec.Struct):
    eos_token_id: int | list[int] | None = None


def no_folder(name: str) -> UserError:
    """What is said of a model's `name` where no folder is, nor anything else that becomes one."""
    wrong = "is a file" if expanded(name).exists() else "does not exist"
    return UserError(f"model folder {name} {wrong}; --model takes a folder, a name on the hub, a GGUF file")


def _check_folder(path: Path) -> None:
    needed = {
        "config.json": "a Hugging Face model has one; point --model at the folder that holds it",
        "tokenizer_config.json": "save the tokenizer into the same folder with tokenizer.save_pretrained",
    }
    if not path.is_dir():
        raise no_folder(str(path))
    _check_readable(path)
    for name, fix in needed.items():
        if not (path / name).is_file():
            raise UserError(f"model folder {path} has no {name}: {fix}")


def _check_readable(path: Path) -> None:
    """Raise UserError naming a file of the folder that is a broken link or may not be read."""
    for file in sorted(path.iterdir()):
        if not file.exists():
            raise UserError(f"{file} is a link to a file that does not exist: download the model again")
        if file.is_file() and not os.access(file, os.R_OK):
            raise UserError(f"{file} may not be read by this user: change its permissions")
