"""Models as they travel: a folder, a name on the hub, .bin files, MXFP4, a GGUF file, an adapter.

Each becomes a folder here.

`huggingface_hub` keeps its own cache and honours HF_TOKEN, HF_HOME and HF_HUB_OFFLINE. What is converted lies under
`~/.cache/fastgrpo/models` (`XDG_CACHE_HOME`).
"""

from __future__ import annotations

import atexit
import hashlib
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import torch
import transformers
from filelock import FileLock, Timeout
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils.quantization_config import Mxfp4Config

from fastgrpo.config import Config
from fastgrpo.errors import DISK_ERRORS, CannotWrite, UserError, cache_folder, expanded, first_line, last_line, writing
from fastgrpo.policy.architecture import check_weights, of_two_models
from fastgrpo.policy.folder import load_config, no_folder
from fastgrpo.policy.host_memory import host_memory_free
from fastgrpo.policy.lora import peft_module
from fastgrpo.policy.model import save_model, without_memory

# owner/name, and of a repository of GGUF files owner/name/file.gguf.
HUB_NAME = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:/(?P<file>[\w./-]+\.gguf))?")
# What a causal LM needs, of the repository's own level alone: others hold the same weights for other programs.
DESCRIPTION = ["*.json", "*.txt", "*.model", "*.jinja"]
ELSEWHERE = ["*/*", "consolidated*"]
# What the folder of an adapter has, and no other.
ADAPTER_CONFIG = "adapter_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
# Above this cosine of the two matrices a GGUF's head is its embedding, quantised once more finely.
TIED_COSINE = 0.98
# For another process that makes the same folder: what it reads and writes are the weights once.
MADE_WAIT_S = 7200.0


def with_local_model(config: Config, *, again: bool = False, weights: bool = True, adapters: bool = True) -> Config:
    """The configuration with a folder of this machine as `model.path`.

    `model.source` is then what was named, and `model.revision` the hub's commit. `again`: a resumed run, whose folder
    may be gone, finds its model by the source. Without `weights` there is all that describes the model. Without
    `adapters` one is refused.
    Raises UserError for a name that is unknown or gated, where the hub cannot be reached, and for a broken file.
    """
    model = config.model
    if not model.path:
        return config
    gone = again and model.source and not expanded(model.path).is_dir()
    name = model.source if gone else model.path
    if (path := expanded(name)).is_dir():
        folder = _loadable(config, path, weights, adapters)
        if not (weights or folder != path or any(path.glob("pytorch_model*.bin"))):
            _whole(path)  # nothing is fetched for it
        return config if folder == Path(model.path) else _with(config, folder, source=name)
    if expanded(name).is_file() and name.lower().endswith(".gguf"):
        return _with(config, _from_gguf(expanded(name), weights), source=name)
    found = HUB_NAME.fullmatch(name)
    if found is None:
        raise no_folder(name)
    if found["file"]:
        file = _fetched_file(found["repository"], found["file"], model.revision)
        return _with(config, _from_gguf(file, weights), source=name, revision=_commit(file, found["repository"]))
    folder = _fetched(name, model.revision, weights)
    return _with(config, _loadable(config, folder, weights, adapters), source=name, revision=folder.name)


def is_adapter(name: str) -> bool:
    """Whether a name on the hub is an adapter's; False too where neither hub nor cache says so.

    Raises UserError for a name that is unknown or gated.
    """
    with _asking(name, ""):
        try:
            hf_hub_download(name, ADAPTER_CONFIG)
        except EntryNotFoundError:
            return False
    return True


def _with(config: Config, folder: Path, **keys: str) -> Config:
    return msgspec.structs.replace(config, model=msgspec.structs.replace(config.model, path=str(folder), **keys))


def _loadable(config: Config, folder: Path, weights: bool, adapters: bool) -> Path:
    """The folder itself, or one made of it: of its .bin files, its text model, MXFP4, or an adapter and its base."""
    if (folder / ADAPTER_CONFIG).is_file():
        if not adapters:  # they might name one another
            raise UserError(f"{folder} is an adapter itself: name the model of both as base_model_name_or_path")
        return _merged(config, folder, weights)
    if weights:
        return _whole(_converted(folder))
    if (made := _made_config(folder)) is None:
        return folder
    described = _described(folder)
    made.save_pretrained(described)
    return described


class _Adapter(msgspec.Struct):
    base_model_name_or_path: str | None = None
    revision: str | None = None


def _merged(config: Config, folder: Path, weights: bool) -> Path:
    """A folder of the model with the adapter in `folder` merged into it; without `weights` one that describes it."""
    file = folder / ADAPTER_CONFIG
    try:
        adapter = msgspec.json.decode(file.read_bytes(), type=_Adapter)
    except (OSError, msgspec.MsgspecError) as error:
        raise UserError(f"{file} cannot be read: {first_line(error)}; download or save it again") from error
    name = adapter.base_model_name_or_path
    if not name:
        raise UserError(f"{file} names no model that the adapter is for: write its base_model_name_or_path there")
    try:
        named = _with(config, Path(name), source="", revision=adapter.revision or "")
        found = with_local_model(named, weights=weights, adapters=False)
        base, files = Path(found.model.path), sorted(folder.glob("adapter_model*"))
        load_config(base)
    except UserError as error:
        raise UserError(f"the adapter {folder} has no base to be merged into: {error}") from error
    if not weights:
        if not (folder / TOKENIZER_CONFIG).is_file():
            return base
        described = _described(base)
        with _readable(f"the tokenizer of the adapter {folder}"):
            AutoTokenizer.from_pretrained(folder, trust_remote_code=False).save_pretrained(described)
        return described
    if not files:
        raise UserError(f"the adapter {folder} has no weights: put its adapter_model.safetensors there")
    peft = peft_module(f"the adapter {folder}")
    with _made(folder.name, [*files, file, *sorted(base.glob("*.safetensors"))]) as (made, missing):
        if missing:
            _save(*_with_adapter(base, folder, peft), missing)
    return made


def _with_adapter(base: Path, folder: Path, peft: ModuleType) -> tuple[Any, Any]:
    """(model, tokenizer) of `base` with the adapter in `folder` merged. Raises UserError where it is of another one."""
    with _readable(f"the weights of {base}"):
        model = _read(base, base, dtype="auto")
    try:
        with warnings.catch_warnings():
            # What fits in part alone is loaded with no more than a warning.
            warnings.filterwarnings("error", "Found missing adapter keys")
            merged = peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
        described = folder if (folder / TOKENIZER_CONFIG).is_file() else base
        return merged, AutoTokenizer.from_pretrained(described, trust_remote_code=False)
    except Exception as error:  # peft raises of whatever kind
        reason = f"{type(error).__name__}: {last_line(error)}"[:200]
        raise UserError(f"the adapter {folder} cannot be merged into {base}, is it of that model? {reason}") from error


def _described(model: Path) -> Path:
    """A folder with what describes the model in a folder, for changes of that; gone at the exit."""
    folder = _until_the_exit()
    for file in model.glob("*.json"):
        shutil.copyfile(file, folder / file.name)
    return folder


def _until_the_exit() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fastgrpo-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _whole(folder: Path) -> Path:
    """The folder with whole files of weights. Raises UserError where one is shorter than it says, or there is none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files and (folder / "config.json").is_file():
        raise UserError(f"model folder {folder} has no weights: put its *.safetensors or pytorch_model*.bin there")
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            fix = "download or save it again"
            raise UserError(f"the weights {file} cannot be read ({first_line(error)}): {fix}") from error
    return folder


def _fetched(name: str, revision: str, weights: bool) -> Path:
    """The hub's folder of the model: safetensors, or where there are none .bin files."""
    wanted = [*DESCRIPTION, "*.safetensors"] if weights else DESCRIPTION
    with _asking(name, revision):
        options: dict[str, Any] = {"allow_patterns": wanted, "ignore_patterns": ELSEWHERE}
        folder = Path(snapshot_download(name, revision=revision or None, **options))
        if weights and not any(folder.glob("*.safetensors")):
            # The same commit: the branch may have moved meanwhile.
            snapshot_download(
                name, revision=folder.name, **options | {"allow_patterns": ["pytorch_model*", "adapter_model*"]}
            )
    return folder


def _fetched_file(name: str, file: str, revision: str) -> Path:
    with _asking(name, revision):
        return Path(hf_hub_download(name, file, revision=revision or None))


def _commit(file: Path, name: str) -> str:
    """The commit in the path of a file in the hub's cache, .../models--owner--name/snapshots/COMMIT/file."""
    folder = f"models--{name.replace('/', '--')}"
    parts = file.parts
    return parts[parts.index(folder) + 2] if folder in parts else ""


@contextmanager
def _asking(name: str, revision: str) -> Iterator[None]:
    """One sentence for whatever the hub answers, or does not."""
    try:
        yield
    except GatedRepoError:
        raise UserError(
            f"the model {name} is gated: ask for access on its page and set HF_TOKEN to your token"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{name} is neither a folder here nor a model on the hub that you may read: check the name, or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"the model {name} has no revision {revision!r} on the hub: check model.revision") from None
    except HfHubHTTPError as error:
        raise UserError(f"the hub does not give the model {name}: {first_line(error)}") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            fix = "free space, or set HF_HOME to another disk"
            raise CannotWrite(f"cannot write the model {name} into the hub's cache: {error.strerror}; {fix}") from None
        how = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else "the hub cannot be reached"
        raise UserError(
            f"{name} is neither a folder here nor in the hub's cache, and {how}: check the name, or download it first "
            f"({first_line(error)})"
        ) from error


def _converted(folder: Path) -> Path:
    """The folder itself, or one with safetensors: of .bin files, a text model of one that sees, or MXFP4."""
    weights, binary = sorted(folder.glob("*.safetensors")), sorted(folder.glob("pytorch_model*.bin"))
    if weights and _made_config(folder) is None:
        return folder
    weights = weights or binary
    if not weights or not (folder / "config.json").is_file():
        return folder
    with _made(folder.name, weights) as (made, missing):
        if missing:
            with _readable(f"the weights of {folder}"):
                model = _whole_model(folder)
                tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
                model = _with_names_of_its_own(folder, model)
            _save(model, tokenizer, missing)
    return made


def _read(what: Path, folder: Path, **options: Any) -> Any:
    """The model in the folder, of which `what` has the weights. Raises UserError where it lacks some."""
    told: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True, "trust_remote_code": False}
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **told, **options)
    model, found = loaded
    check_weights(what, model, found["missing_keys"], [name for name, *_ in found["mismatched_keys"]])
    return model


def _whole_model(folder: Path) -> Any:
    """The model in the folder, of MXFP4 dequantised to bfloat16. Raises UserError where memory has no room for that."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not _is_mxfp4(config):
        return _read(folder, folder, dtype="auto")
    with torch.device("meta"):
        size = 2 * AutoModelForCausalLM.from_config(config).num_parameters()
    if (free := host_memory_free()) < size:
        raise UserError(
            f"{folder} is in MXFP4, and as it becomes bfloat16 it takes {size / 1e9:.3g} GB of memory, of which "
            f"{free / 1e9:.3g} are free: name a copy in bfloat16 that was made on a larger machine"
        )
    quantised = Mxfp4Config(dequantize=True)
    return _unquantised(_read(folder, folder, dtype=torch.bfloat16, quantization_config=quantised))


def _with_names_of_its_own(folder: Path, model: PreTrainedModel) -> PreTrainedModel:
    """The model of `folder` as one never part of another: transformers saves weights under the names it read.

    Raises UserError where one has another shape than its configuration says, which nobody checks of MXFP4.
    """
    own, weights = without_memory(model, model.dtype), model.state_dict()
    if misshapen := [name for name, one in own.state_dict().items() if one.shape != weights[name].shape]:
        raise of_two_models(folder, misshapen)
    own.load_state_dict(weights, assign=True)
    own.tie_weights()
    return own


def _made_config(folder: Path) -> PretrainedConfig | None:
    """The configuration of what a folder of safetensors is made into; None where it stays as it is.

    Of a model that sees more its text model, where that is a causal LM of its own, as Qwen3.5's; of MXFP4, as gpt-oss
    comes, the same model without.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError):
        return None  # said where the configuration is read
    text = config.get_text_config()
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if text is not config and getattr(causal, "config_class", None) is type(text):
        return text
    if _is_mxfp4(config):
        del config.quantization_config
        return config
    return None


def _is_mxfp4(config: PretrainedConfig) -> bool:
    return (getattr(config, "quantization_config", None) or {}).get("quant_method") == "mxfp4"


def _from_gguf(file: Path, weights: bool) -> Path:
    """A folder with what the GGUF file holds, dequantised to bfloat16; without `weights` gone at the exit."""
    if not weights:
        folder = _until_the_exit()
        with _readable(f"the GGUF file {file}"):
            AutoConfig.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
        return folder
    with _made(file.stem, [file]) as (made, missing):
        if missing:
            with _readable(f"the GGUF file {file}"):
                tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
                model = _dequantised(file)
            _save(model, tokenizer, missing)
    return made


def _dequantised(file: Path) -> PreTrainedModel:
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):
        # Versions that have it keep the quantised blocks unless told otherwise.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = _read(file, file.parent, gguf_file=file.name, **options)
    _tie(_unquantised(model))
    return model


def _unquantised(model: Any) -> Any:
    """The model, whose weights are plain, as one that has never been quantised."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    return model


@torch.no_grad()
def _tie(model: Any) -> None:
    """Tie embedding and head again where they were one matrix; the head, kept in more bits, serves both."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if embedding is head or embedding.shape != head.shape:
        return
    one, other = (matrix[:: max(1, len(matrix) // 1024)].float().flatten() for matrix in (embedding, head))
    if torch.nn.functional.cosine_similarity(one, other, dim=0) > TIED_COSINE:
        embedding.copy_(head)
        model.config.tie_word_embeddings = True
        model.tie_weights()


def _save(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    with writing(f"the converted model {folder}", "free space, or set XDG_CACHE_HOME to another disk"):
        save_model(model, folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def _made(name: str, files: list[Path]) -> Iterator[tuple[Path, Path | None]]:
    """(the folder made of `files`, and where to write it if it is not made yet); one process makes it, others wait."""
    states = [(file.name, (found := file.stat()).st_size, found.st_mtime_ns) for file in files]
    digest = hashlib.blake2b(repr((str(files[0].resolve()), states)).encode(), digest_size=6).hexdigest()
    root = cache_folder("models")
    made, partial = root / f"{name}-{digest}", root / f".{name}-{digest}.partial"
    with writing(f"the converted model {made}", "free space, or set XDG_CACHE_HOME to another disk"):
        root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(partial.with_suffix(".lock"), timeout=MADE_WAIT_S)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another process has been making {made} for {MADE_WAIT_S:g} s: it may hang, or be stopped (Ctrl-Z); end "
            "it, and start this one again"
        ) from None
    try:
        yield made, None if made.exists() else partial
        if not made.exists():
            partial.rename(made)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        lock.release()


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """One sentence where transformers cannot read `what`."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{what} needs a package more ({first_line(error)}): pip install 'fastgrpo[gguf]'") from error
    except Exception as error:
        # Of a damaged file the readers raise whatever they stumble on.
        raise UserError(f"{what} cannot be read: {type(error).__name__}: {first_line(error)}") from error
