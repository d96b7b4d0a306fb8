"""Models by hub name, in .bin files, behind links and in GGUF; the hub here is a folder of this machine."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from filelock import FileLock
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
)
from transformers.models.qwen3_5 import Qwen3_5Config
from transformers.models.qwen3_5_moe import Qwen3_5MoeConfig

from fastgrpo.config import Config
from fastgrpo.config_keys import resolve
from fastgrpo.errors import UserError
from fastgrpo.policy import hub
from fastgrpo.policy.folder import load_config, load_tokenizer
from fastgrpo.policy.hub import with_local_model
from fastgrpo.policy.loading import load_policy
from fastgrpo.run_folder import open_folder
from tests.helpers.tiny_model import DELTA_RULE, MIXTURES, save_tiny_model

COMMIT = "a" * 40


def configuration(path: object, **keys: str) -> Config:
    return resolve({"model.path": str(path)} | {f"model.{name}": value for name, value in keys.items()})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "fastgrpo" / "models"


@pytest.fixture
def fake_hub(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub with one model, org/tiny, into a cache of links as the real one; the calls it had."""
    calls: list[dict[str, Any]] = []
    shutil.copytree(tiny_folder, tmp_path / "blobs")

    def download(name: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        calls.append({"name": name, "revision": revision, "patterns": allow_patterns})
        folder = tmp_path / "hub" / "models--org--tiny" / "snapshots" / COMMIT
        folder.mkdir(parents=True, exist_ok=True)
        for blob in (tmp_path / "blobs").iterdir():
            if any(fnmatch(blob.name, pattern) for pattern in allow_patterns) and not (folder / blob.name).exists():
                (folder / blob.name).symlink_to(blob)
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    return calls


def as_bin(folder: Path) -> None:
    """Replace the folder's safetensors by what older models have."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("weights", [True, False])
def test_damaged_weights_are_said_at_once(tiny_folder: Path, tmp_path: Path, weights: bool) -> None:
    """By a dry run, too, of a folder that is here."""
    shutil.copytree(tiny_folder, tmp_path / "half")
    file = tmp_path / "half/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"the weights .*half/model.safetensors cannot be read .*: download or save"):
        with_local_model(configuration(tmp_path / "half"), weights=weights)
    file.unlink()
    with pytest.raises(UserError, match=r"model folder .*half has no weights"):
        with_local_model(configuration(tmp_path / "half"), weights=weights)
    torch.save({}, tmp_path / "half/pytorch_model.bin")
    if not weights:
        assert with_local_model(configuration(tmp_path / "half"), weights=False)


def same_weights(one: Path | str, other: Path | str) -> bool:
    ours, theirs = (dict(load_policy(path).model.named_parameters()) for path in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_name_on_the_hub_becomes_a_folder_and_its_commit_is_recorded(
    fake_hub: list[dict[str, Any]], tiny_folder: Path, tmp_path: Path
) -> None:
    config = with_local_model(configuration("org/tiny", revision="v1"))
    assert (config.model.source, config.model.revision) == ("org/tiny", COMMIT)
    assert same_weights(config.model.path, tiny_folder)
    assert [(call["name"], call["revision"]) for call in fake_hub] == [("org/tiny", "v1")]
    run = open_folder(config, resume=False)
    written = (run / "config.toml").read_text()
    assert f'revision = "{COMMIT}"' in written
    assert 'source = "org/tiny"' in written


def test_a_resumed_run_finds_its_model_again_by_the_commit(fake_hub: list[dict[str, Any]], tmp_path: Path) -> None:
    config = with_local_model(configuration("org/tiny"))
    shutil.rmtree(tmp_path / "hub")
    with pytest.raises(UserError, match="does not exist"):
        load_policy(with_local_model(config).model.path)
    assert with_local_model(config, again=True) == config
    assert fake_hub[-1]["revision"] == COMMIT


def test_a_plan_needs_no_weights(fake_hub: list[dict[str, Any]]) -> None:
    folder = Path(with_local_model(configuration("org/tiny"), weights=False).model.path)
    assert (folder / "config.json").exists()
    assert not list(folder.glob("*.safetensors"))


def test_a_model_of_bin_files_on_the_hub_is_converted_once(
    fake_hub: list[dict[str, Any]], tiny_folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_bin(tmp_path / "blobs")
    config = with_local_model(configuration("org/tiny"))
    assert Path(config.model.path).parent == cache
    assert same_weights(config.model.path, tiny_folder)
    assert fake_hub[-1]["revision"] == COMMIT
    monkeypatch.setattr(hub, "_save", lambda *_: pytest.fail("converted twice"))
    assert with_local_model(configuration("org/tiny")) == config


def test_another_process_that_makes_the_folder_is_not_waited_for_without_end(
    tiny_folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be stopped. Once it has ended, its lock is free and what it left half made is made anew."""
    old = Path(shutil.copytree(tiny_folder, tmp_path / "old"))
    as_bin(old)
    made = Path(with_local_model(configuration(old)).model.path)
    monkeypatch.setattr(hub, "MADE_WAIT_S", 0.1)
    with (
        FileLock(cache / f".{made.name}.lock"),
        pytest.raises(UserError, match=rf"another process has been making {made} for 0\.1 s: it may hang"),
    ):
        with_local_model(configuration(old))
    assert Path(with_local_model(configuration(old)).model.path) == made


def test_a_folder_of_bin_files_and_one_behind_links(tiny_folder: Path, tmp_path: Path) -> None:
    old = shutil.copytree(tiny_folder, tmp_path / "old")
    as_bin(old)
    config = with_local_model(configuration(old))
    assert config.model.source == str(old)
    assert same_weights(config.model.path, tiny_folder)
    (tmp_path / "link").symlink_to(tiny_folder)
    assert with_local_model(configuration(tmp_path / "link")).model.path == str(tmp_path / "link")
    assert same_weights(tmp_path / "link", tiny_folder)


@pytest.mark.parametrize("kind", [Qwen3_5Config, Qwen3_5MoeConfig])
def test_of_a_model_that_sees_images_the_text_model_is_taken(
    kind: type[PretrainedConfig], tiny_folder: Path, tmp_path: Path
) -> None:
    seeing = shutil.copytree(tiny_folder, tmp_path / "seeing")
    text = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "eos_token_id": 0}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    sizes = {"num_hidden_layers": 2, "num_key_value_heads": 1}
    if kind is Qwen3_5MoeConfig:
        sizes |= {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    model = AutoModelForImageTextToText.from_config(
        kind(text_config=DELTA_RULE | text | sizes, vision_config=vision), dtype=torch.float32
    )
    model.save_pretrained(seeing)
    folder = with_local_model(configuration(seeing)).model.path
    assert not any("language_model" in name for name in load_file(Path(folder, "model.safetensors")))
    taken = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    expected = {
        name.replace(".language_model.", "."): weight
        for name, weight in model.state_dict().items()
        if "visual" not in name
    }
    torch.testing.assert_close(taken, expected)
    described = with_local_model(configuration(seeing), weights=False).model.path
    for made in (folder, described):
        assert type(load_config(made)) is type(model.config.text_config)
        load_tokenizer(made)


FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def in_mxfp4(rows_EFG: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random experts [E, F, 32 G], as gpt-oss is published: two numbers a byte, the low half first; a scale for 32."""
    codes, scales = torch.randint(16, (*rows_EFG, 32)), torch.randint(118, 124, rows_EFG)
    value = torch.tensor(FP4)[codes] * 2.0 ** (scales - 127)[..., None]
    blocks = codes[..., ::2] + 16 * codes[..., 1::2]
    return value.flatten(2), blocks.to(torch.uint8), scales.to(torch.uint8)


def save_mxfp4(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A gpt-oss in MXFP4: its weights, and what its experts are."""
    kind, changes = MIXTURES["gpt_oss"]
    save_tiny_model(folder, kind=kind, **changes | {"hidden_size": 64})
    weights, expected = load_file(folder / "model.safetensors"), {}
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = weights.pop(name).shape
        value, weights[f"{name}_blocks"], weights[f"{name}_scales"] = in_mxfp4((experts, rows, columns // 32))
        expected[name] = value.mT
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    told = json.loads((folder / "config.json").read_text())
    told["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", "model.embed_tokens"]}
    (folder / "config.json").write_text(json.dumps(told))
    return weights, expected


def test_a_model_in_mxfp4_becomes_one_in_bfloat16(tmp_path: Path, cache: Path) -> None:
    weights, expected = save_mxfp4(folder := tmp_path / "quantised")
    made = Path(with_local_model(configuration(folder)).model.path)
    assert made.parent == cache
    found = load_file(made / "model.safetensors")
    assert found.keys() == {name for name in weights if "_blocks" not in name and "_scales" not in name} | set(expected)
    for name, value in found.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, expected.get(name, weights.get(name)).bfloat16()), name
    described = Path(with_local_model(configuration(folder), weights=False).model.path)
    for path in (made, described):
        assert load_config(path).model_type == "gpt_oss"
        assert load_tokenizer(path).eos_token_id is not None
    assert load_policy(made).model.config.model_type == "gpt_oss"


def test_mxfp4_that_memory_has_no_room_for_is_refused(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel would end the process without a word."""
    save_mxfp4(folder := tmp_path / "mxfp4")
    monkeypatch.setattr(hub, "host_memory_free", lambda: 1000)
    with pytest.raises(
        UserError, match=r"mxfp4 is in MXFP4, and as .* takes \S+ GB of memory, of which 1e-06 are free"
    ):
        with_local_model(configuration(folder))
    assert not list(cache.glob("*/config.json"))


def test_what_lacks_weights_is_not_converted(tmp_path: Path, cache: Path) -> None:
    """transformers would draw them at random, and the folder that is made would have them all."""
    weights, _ = save_mxfp4(folder := tmp_path / "mxfp4")
    of_one = [name for name in weights if "layers.0.mlp.experts.down_proj_" in name and "bias" not in name]
    cut = weights | {name: weights[name][:, :32].contiguous() for name in of_one}
    save_file(cut, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"mxfp4: \S+experts\.down_proj has another shape than config\.json says"):
        with_local_model(configuration(folder))
    for name in of_one:
        del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"mxfp4 has no weight model\.layers\.0\.mlp\.experts\.down_proj: save it"):
        with_local_model(configuration(folder))
    save_tiny_model(folder := tmp_path / "binary")
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"binary has no weight model\.norm\.weight: save it"):
        with_local_model(configuration(folder))
    assert not any(made for made in cache.iterdir() if made.is_dir())


def save_adapter(folder: Path, base: str, **told: object) -> Path:
    """An adapter of random weights as peft saves one, whose configuration names `base`, with what else is `told`."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return tell(folder, base_model_name_or_path=base, **told)


def tell(folder: Path, **told: object) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | told))
    return folder


def test_an_adapter_is_merged_into_its_base_once(
    tiny_folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that a run of its own begins from, and finds again where the cache is gone."""
    folder = save_adapter(tmp_path / "adapter", str(tiny_folder))
    config = with_local_model(configuration(folder))
    assert (Path(config.model.path).parent, config.model.source) == (cache, str(folder))
    ids = torch.tensor([[5, 6, 7]])
    wanted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), folder)(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(config.model.path)(ids).logits
    torch.testing.assert_close(merged, wanted, atol=1e-5, rtol=0)
    assert not same_weights(config.model.path, tiny_folder)
    assert with_local_model(config) == config
    shutil.rmtree(config.model.path)
    assert with_local_model(config, again=True) == config
    assert Path(config.model.path).is_dir()
    monkeypatch.setattr(hub, "_save", lambda *_: pytest.fail("merged twice"))
    assert with_local_model(configuration(folder)) == config
    assert with_local_model(configuration(folder), weights=False).model.path == str(tiny_folder)


def test_an_adapter_on_the_hub_whose_weights_are_a_bin_file(
    fake_hub: list[dict[str, Any]], tiny_folder: Path, tmp_path: Path, cache: Path
) -> None:
    shutil.rmtree(tmp_path / "blobs")
    blobs = save_adapter(tmp_path / "blobs", str(tiny_folder))
    expected = with_local_model(configuration(blobs)).model.path
    torch.save(load_file(blobs / "adapter_model.safetensors"), blobs / "adapter_model.bin")
    (blobs / "adapter_model.safetensors").unlink()
    model = with_local_model(configuration("org/tiny")).model
    assert (Path(model.path).parent, model.source, model.revision) == (cache, "org/tiny", COMMIT)
    assert same_weights(model.path, expected)


def test_generation_settings_that_transformers_refuses_to_save_stay_in_what_is_made(
    tiny_folder: Path, tmp_path: Path
) -> None:
    settings = {"do_sample": False, "temperature": 0.6, "eos_token_id": [1, 2]}
    folders = shutil.copytree(tiny_folder, tmp_path / "old"), shutil.copytree(tiny_folder, tmp_path / "base")
    for folder in folders:
        (folder / "generation_config.json").write_text(json.dumps(settings))
    as_bin(folders[0])
    for path in (folders[0], save_adapter(tmp_path / "adapter", str(folders[1]))):
        made = Path(with_local_model(configuration(path)).model.path)
        found = json.loads((made / "generation_config.json").read_text())
        assert made != path
        assert {name: found[name] for name in settings} == settings


def test_an_adapters_base_comes_from_the_hub_by_its_revision(
    fake_hub: list[dict[str, Any]], tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tell(
        save_adapter(tmp_path / "adapter", str(tiny_folder)), base_model_name_or_path="org/tiny", revision="v2"
    )
    config = with_local_model(configuration(folder))
    assert [(call["name"], call["revision"]) for call in fake_hub] == [("org/tiny", "v2")]
    assert (config.model.source, config.model.revision) == (str(folder), "")
    assert not same_weights(config.model.path, tiny_folder)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (
            {"base_model_name_or_path": None},
            "names no model that the adapter is for: write its base_model_name_or_path",
        ),
        ({"base_model_name_or_path": "nowhere"}, "has no base to be merged into: model folder nowhere does not exist"),
        ({"base_model_name_or_path": "adapter"}, "has no base to be merged into: adapter is an adapter itself"),
        ({"base_model_name_or_path": "another"}, "has no base to be merged into: another is an adapter itself"),
        ({"base_model_name_or_path": 3}, "adapter_config.json cannot be read: Expected `str | null`, got `int`"),
        (
            {"base_model_name_or_path": "other"},
            r"adapter cannot be merged into other, is it of that model\? .*size mismatch",
        ),
        ({"target_modules": ["q_proj", "v_proj"]}, r"is it of that model\? UserWarning: Found missing adapter keys"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_one_sentence(
    tiny_folder: Path, tmp_path: Path, told: dict[str, object], message: str
) -> None:
    save_tiny_model(tmp_path / "other", hidden_size=64)
    tell(save_adapter(tmp_path / "another", str(tiny_folder)), base_model_name_or_path="adapter")
    folder = tell(save_adapter(tmp_path / "adapter", str(tiny_folder)), **told)
    with pytest.raises(UserError, match=message) as caught:
        with_local_model(configuration(folder))
    assert "\n" not in str(caught.value)


def test_adapters_on_the_hub_that_name_one_another_are_one_sentence(
    fake_hub: list[dict[str, Any]], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(tmp_path / "blobs")
    tell(save_adapter(tmp_path / "blobs", str(tiny_folder)), base_model_name_or_path="org/tiny")
    for weights in (True, False):
        with pytest.raises(UserError, match=r"has no base to be merged into: .* is an adapter itself"):
            with_local_model(configuration("org/tiny"), weights=weights)


def test_a_dry_run_reads_the_adapters_own_tokenizer(tiny_folder: Path, tmp_path: Path) -> None:
    """It is the one that prompts are read by once the adapter is merged: with a chat template of its own, too."""
    folder = save_adapter(tmp_path / "adapter", str(tiny_folder))
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = "{{ messages[0].content }} of the adapter"
    tokenizer.save_pretrained(folder)
    for weights in (False, True):
        found = with_local_model(configuration(folder), weights=weights).model.path
        assert AutoTokenizer.from_pretrained(found).chat_template == tokenizer.chat_template
        assert AutoConfig.from_pretrained(found).hidden_size == AutoConfig.from_pretrained(tiny_folder).hidden_size


def test_an_adapter_without_weights_or_without_peft_is_one_sentence(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_adapter(tmp_path / "adapter", str(tiny_folder))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        with pytest.raises(UserError, match=r"the adapter .*adapter needs peft, .*pip install 'fastgrpo\[lora\]'"):
            with_local_model(configuration(folder))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"the adapter .*adapter has no weights: put its adapter_model.safetensors"):
        with_local_model(configuration(folder))


def test_sharded_weights(tiny_folder: Path, tmp_path: Path) -> None:
    load_policy(tiny_folder).model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder / name, tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert same_weights(with_local_model(configuration(tmp_path / "shards")).model.path, tiny_folder)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was run",))


def test_a_pickle_with_more_than_tensors_is_refused(tiny_folder: Path, tmp_path: Path, cache: Path) -> None:
    evil = shutil.copytree(tiny_folder, tmp_path / "evil")
    (evil / "model.safetensors").unlink()
    (evil / "pytorch_model.bin").write_bytes(pickle.dumps({"w": Evil()}))
    with pytest.raises(UserError, match=r"the weights of .*evil cannot be read") as caught:
        with_local_model(configuration(evil))
    assert "\n" not in str(caught.value)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def answer(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    return kind("no\nmore", response=httpx.Response(status, request=httpx.Request("GET", "https://hub")))


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (answer(GatedRepoError, 403), "org/tiny is gated: ask for access on its page and set HF_TOKEN"),
        (answer(RepositoryNotFoundError, 404), "neither a folder here nor a model on the hub that you may read"),
        (answer(RevisionNotFoundError, 404), "has no revision 'v9' on the hub: check model.revision"),
        (answer(HfHubHTTPError, 500), "the hub does not give the model org/tiny: no"),
        (OSError(errno.ENOSPC, "No space left on device"), "into the hub's cache: No space left on device; free space"),
        (LocalEntryNotFoundError("no\nmore"), "nor in the hub's cache, and the hub cannot be reached"),
        (OfflineModeIsEnabled("offline"), "nor in the hub's cache, and the hub cannot be reached"),
        (httpx.ConnectError("no route"), "nor in the hub's cache, and the hub cannot be reached"),
    ],
)
def test_whatever_the_hub_answers_is_one_sentence(
    error: Exception, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(UserError, match=sentence) as caught:
        with_local_model(configuration("org/tiny", revision="v9"))
    assert "\n" not in str(caught.value)


def test_what_is_neither_a_folder_nor_a_name_is_said_at_once() -> None:
    assert with_local_model(configuration("")) == configuration("")
    for path in ("nowhere", "/nowhere/at/all", "a/b/c"):
        with pytest.raises(UserError, match=rf"model folder {path} does not exist; --model takes"):
            with_local_model(configuration(path))


def save_gguf(path: Path, model: Path) -> None:
    """The tiny Qwen2 as a GGUF file in fp32, its vocabulary that of the tokenizer."""
    import gguf

    tensors = load_file(model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    tokenizer = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = sorted(tokenizer, key=tokenizer.__getitem__)
    tokens += ["ab", *(f"[{n}]" for n in range(len(tokens) + 1, config["vocab_size"]))]
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(256)
    names = {
        "model.embed_tokens.": "token_embd.",
        "model.norm.": "output_norm.",
        "model.layers.": "blk.",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for found, tensor in tensors.items():
        name = found
        for theirs, ours in sorted(names.items(), key=lambda pair: -len(pair[0])):
            name = name.replace(theirs, ours)
        writer.add_tensor(name, tensor.numpy())
        if name == "token_embd.weight":
            # As quantised files have it: the head once more, a little more exact.
            writer.add_tensor("output.weight", (tensor + 1e-4 * tensor.std()).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_a_folder(tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    save_gguf(tmp_path / "tiny.gguf", tiny_folder)
    config = with_local_model(configuration(tmp_path / "tiny.gguf"))
    assert config.model.source == str(tmp_path / "tiny.gguf")
    policy, original = load_policy(config.model.path), load_policy(tiny_folder)
    assert policy.model.config.tie_word_embeddings
    found = dict(policy.model.named_parameters())
    for name, expected in original.model.named_parameters():
        torch.testing.assert_close(found[name], expected, atol=2e-2, rtol=1e-2)
    described = Path(with_local_model(configuration(tmp_path / "tiny.gguf"), weights=False).model.path)
    assert (described / "tokenizer_config.json").exists()
    assert not list(described.glob("*.safetensors"))


def test_a_broken_gguf_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "torn.gguf").write_bytes(b"GGUF" + bytes(10))
    with pytest.raises(UserError, match=r"the GGUF file .*torn\.gguf") as caught:
        with_local_model(configuration(tmp_path / "torn.gguf"))
    assert "\n" not in str(caught.value)
