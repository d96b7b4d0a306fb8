from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed
from transformers import OlmoeConfig, PretrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig, modeling_utils

from fastgrpo.config import Grpo
from fastgrpo.errors import UserError
from fastgrpo.policy import model as models
from fastgrpo.policy import packed_attention
from fastgrpo.policy.chat import Chat
from fastgrpo.policy.folder import load_config, load_tokenizer
from fastgrpo.policy.loading import load_policy
from fastgrpo.policy.model import Policy
from fastgrpo.training.loss import policy_loss
from fastgrpo.training.packing import pack
from fastgrpo.types import Batch, Runs, Sample
from tests.helpers.tiny_model import MIXTURES, save_tiny_model

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LENGTHS = [1, 17, 64, 2, 33]


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1000, (length,), generator=generator) for length in LENGTHS]


def packed_hidden(policy: Policy, parts: list[torch.Tensor]) -> torch.Tensor:
    lengths = torch.tensor([0, *map(len, parts)])
    positions = torch.cat([torch.arange(len(part)) for part in parts])
    bounds = lengths.cumsum(0).int(), int(lengths.max())
    return policy.forward(torch.cat(parts), positions, Runs(*bounds, *bounds))


def gradients(policy: Policy, hidden: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of a loss that weighs every hidden state differently, through the head too."""
    policy.model.zero_grad()
    logprobs_TV = (torch.cat(hidden) @ policy.head_weight.T).log_softmax(-1)
    weights_TV = torch.linspace(-1, 1, logprobs_TV.numel()).reshape(logprobs_TV.shape)
    (logprobs_TV * weights_TV).mean().backward()
    return [parameter.grad.clone() for parameter in policy.model.parameters()]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_is_one_sequence_at_a_time(tiny_folder: Path, checkpointing: bool) -> None:
    policy = load_policy(tiny_folder, gradient_checkpointing=checkpointing)
    single = [packed_hidden(policy, [part]) for part in sequences()]
    packed = packed_hidden(policy, sequences())
    torch.testing.assert_close(packed, torch.cat(single), atol=2e-6, rtol=1e-5)
    for ours, theirs in zip(gradients(policy, [packed]), gradients(policy, single), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
def test_a_shared_prompt_changes_nothing(tiny_folder: Path, device: str) -> None:
    """Logprobs and gradients of groups whose prompts are computed once, beside one sequence at a time."""
    dtype, tolerance = (torch.float32, 2e-6) if device == "cpu" else (torch.bfloat16, 2e-2)
    policy = load_policy(tiny_folder, device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(1000, (n,), generator=generator).tolist() for n in (33, 1, 70)]
    lengths = [(0, 5), (1, 40), (1, 1), (0, 64), (2, 9), (0, 17), (1, 3)]
    items = []
    for prompt, length in lengths:
        completion = torch.randint(1000, (length,), generator=generator).tolist()
        mask = [0] * len(prompts[prompt]) + [1] * length
        items.append(Sample(prompts[prompt] + completion, mask, [0.0] * len(mask), advantage=0.5 - prompt))
    (together,) = pack(items, [1.0] * len(items), 400, device)
    assert len(together.input_ids_T) < sum(len(item.token_ids) for item in items)
    order = together.sequence_N.unique_consecutive().tolist()
    alone = [pack([items[i]], [1.0], 400, device)[0] for i in order]

    def measure(batches: list[Batch]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        policy.model.zero_grad()
        outputs = [policy_loss(policy, batch, Grpo(tis_cap=0.0)) for batch in batches]
        sum(output.loss for output in outputs).backward()
        return torch.cat([o.logprobs_N for o in outputs]), [p.grad.clone() for p in policy.model.parameters()]

    (ours, our_grads), (theirs, their_grads) = measure([together]), measure(alone)
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)
    for mine, other in zip(our_grads, their_grads, strict=True):
        assert (mine - other).norm() <= 10 * tolerance * other.norm().clamp(min=1e-3)


@pytest.mark.parametrize(
    ("three", "two", "capability", "chosen"),
    [("3", "2", 9, "3"), ("3", "2", 10, "2"), (None, "2", 9, "2"), ("3", None, 8, None), (None, None, 9, None)],
)
def test_flash_attn_3_is_taken_on_hopper_alone(monkeypatch, three, two, capability: int, chosen) -> None:
    monkeypatch.setattr(packed_attention, "flash_attn_3_varlen_func", three)
    monkeypatch.setattr(packed_attention, "flash_attn_varlen_func", two)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    assert packed_attention._flash_attention(torch.device("cuda")) == chosen


def test_no_function_of_attention_gets_values_narrower_than_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a GPU take them."""
    torch.manual_seed(0)
    query_BHTD, key_BHTD, value_BHTD = (torch.randn(1, 4, 7, width) for width in (24, 24, 16))
    bounds, widths = torch.tensor([0, 4, 7], dtype=torch.int32), []
    by_run = packed_attention._run_by_run

    def watched(*tensors: Any) -> torch.Tensor:
        widths.append([tensor.shape[-1] for tensor in tensors[:3]])
        return by_run(*tensors)

    monkeypatch.setattr(packed_attention, "_run_by_run", watched)
    packing = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 4, "max_length_k": 4}
    inputs = (query_BHTD, key_BHTD, value_BHTD)
    found_BTHD, _ = packed_attention.packed_attention(torch.nn.Module(), *inputs, None, scaling=0.3, **packing)
    assert widths == [[24, 24, 24]]
    runs = [[x.squeeze(0)[:, part] for x in inputs] for part in (slice(0, 4), slice(4, 7))]
    scores = packed_attention.Scores(0.3, None, None)
    expected_HTD = torch.cat([packed_attention._one_run(*run, scores) for run in runs], dim=1)
    torch.testing.assert_close(found_BTHD.squeeze(0).transpose(0, 1), expected_HTD)


def test_packed_is_transformers_own_forward(tiny_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    policy = load_policy(tiny_folder)
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    logprobs = policy.logprobs([part.tolist() for part in sequences()])
    for part, ours in zip(sequences(), logprobs, strict=True):
        with torch.no_grad():
            expected = plain(part[None]).logits[0, :-1].log_softmax(-1).gather(1, part[1:, None]).squeeze(1)
        torch.testing.assert_close(ours, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("changes", [{"num_key_value_heads": 4}, {"tie_word_embeddings": False}])
def test_saved_model_loads_back(tmp_path: Path, changes: dict[str, object]) -> None:
    policy = load_policy(save_tiny_model(tmp_path / "first", **changes))
    with torch.no_grad():
        policy.head_weight.add_(0.01)
    policy.save_hf(tmp_path / "second")
    again = load_policy(tmp_path / "second")
    assert again.tokenizer("def f(x):").input_ids == policy.tokenizer("def f(x):").input_ids
    for ours, theirs in zip(policy.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_hidden_layers": 3}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (Qwen3MoeConfig, MIXTURE | {"mlp_only_layers": [1]}),
        (Qwen2MoeConfig, MIXTURE | {"shared_expert_intermediate_size": 48}),
        (OlmoeConfig, MIXTURE | {"tie_word_embeddings": False}),
        *MIXTURES.values(),
    ],
)
def test_a_mixture_is_copied_in_the_parts_that_files_have_and_once_alone(
    kind: type[PretrainedConfig], changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(save_tiny_model(tmp_path / "first", kind=kind, **changes))
    copy, save, copies, written = models.host_copy, modeling_utils.safe_save_file, [], list[int]()

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        copies.append(copy(tensor))
        return copies[-1]

    def saved(tensors: dict[str, torch.Tensor], *arguments: Any, **options: Any) -> None:
        written.extend(tensor.data_ptr() for tensor in tensors.values())
        save(tensors, *arguments, **options)

    monkeypatch.setattr(models, "host_copy", copied)
    monkeypatch.setattr(modeling_utils, "safe_save_file", saved)
    policy.save_hf(tmp_path / "second")
    assert sorted(written) == sorted(held.data_ptr() for held in copies)
    assert sum(held.nbytes for held in copies) == policy.copied_bytes
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


@pytest.mark.parametrize(("missing", "fix"), [("config.json", "--model"), ("tokenizer_config.json", "save_pretrained")])
def test_folder_without_a_part_names_it(tiny_folder: Path, tmp_path: Path, missing: str, fix: str) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_folder, folder)
    (folder / missing).unlink()
    for load in (load_policy, load_config):
        with pytest.raises(UserError, match=rf"{folder} has no {missing}.*{fix}"):
            load(folder)


def test_folder_that_is_no_model(tiny_folder: Path, tmp_path: Path) -> None:
    for load in (load_policy, load_config):
        with pytest.raises(UserError, match="does not exist"):
            load(tmp_path / "nowhere")
    folder = tmp_path / "odd"
    shutil.copytree(tiny_folder, folder)
    (folder / "config.json").write_text('{"model_type": "no-such-model"}')
    for load in (load_policy, load_config):
        with pytest.raises(UserError, match=f"{folder} has no usable config.json"):
            load(folder)


def test_a_tokenizer_without_an_end_has_the_models_and_without_any_is_refused(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "endless"
    shutil.copytree(tiny_folder, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None, "pad_token": None}))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", None), "the end that config.json names"
    assert load_policy(folder).tokenizer.eos_token_id == 256 == Chat(tokenizer).turn_end_id
    for name in ("config.json", "generation_config.json"):
        ends = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(ends | {"eos_token_id": None}))
    for load in (load_policy, load_tokenizer):
        with pytest.raises(UserError, match=rf"the tokenizer in {folder} has no eos_token"):
            load(folder)


def test_a_tokenizer_that_is_broken_or_missing_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_folder, folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=rf"the tokenizer in {folder} does not load: [^\n]+; mend its files"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=rf"the tokenizer in {folder} (knows no text|does not load)"):
        load_tokenizer(folder)


def weights_without(folder: Path, name: str, value: torch.Tensor | None = None) -> None:
    weights = load_file(folder / "model.safetensors")
    found = weights.pop(name)
    if value is not None:
        weights[name] = value.expand_as(found).contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_a_missing_weight_is_named_and_not_drawn_at_random(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path)
    weights_without(folder, "model.layers.1.self_attn.q_proj.weight")
    with pytest.raises(UserError, match=r"has no weight model\.layers\.1\.self_attn\.q_proj\.weight: save it"):
        load_policy(folder)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_weight_of_another_shape_is_named(tmp_path: Path, sharded: bool) -> None:
    folder = save_tiny_model(tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"intermediate_size": 128}))
    if sharded:
        store = f"file://{tmp_path}/store"
        distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        with pytest.raises(UserError, match=r"model: model\.layers\.0\.mlp\.\w+\.weight.* has another shape than"):
            load_policy(folder, sharded=sharded)
    finally:
        if sharded:
            distributed.destroy_process_group()


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path)
    weights_without(folder, "model.norm.weight", torch.tensor(float("nan")))
    with pytest.raises(UserError, match=r"not finite in model\.norm\.weight: it is damaged"):
        load_policy(folder)


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n", b""])
def test_damaged_weights_are_a_user_error(tmp_path: Path, content: bytes) -> None:
    folder = save_tiny_model(tmp_path)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="does not load as a Hugging Face causal LM"):
        load_policy(folder)


def test_files_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny_model(tmp_path / "model")
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors may not be read by this user"):
        load_policy(folder)
    monkeypatch.undo()
    (folder / "model.safetensors").rename(tmp_path / "elsewhere")
    (folder / "model.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"model\.safetensors is a link to a file that does not exist"):
        load_config(folder)


def test_generation_settings_are_saved_as_they_came(tmp_path: Path) -> None:
    """transformers loads a temperature without sampling, and refuses to save it."""
    folder = save_tiny_model(tmp_path / "first")
    settings = {"do_sample": False, "temperature": 0.7, "top_p": 0.9, "eos_token_id": [256, 5]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    load_policy(folder).save_hf(tmp_path / "second")
    saved = json.loads((tmp_path / "second/generation_config.json").read_text())
    assert {name: saved[name] for name in ("temperature", "top_p", "eos_token_id")} == {
        name: settings[name] for name in ("temperature", "top_p", "eos_token_id")
    }
    load_policy(tmp_path / "second")


def test_an_end_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, vocab_size=200, pad_token_id=None)
    with pytest.raises(UserError, match="ends with token 256 and the model knows 200"):
        load_policy(folder)


def test_a_models_own_code_is_not_run(tmp_path: Path) -> None:
    """Nor is anybody asked whether it may be."""
    folder = save_tiny_model(tmp_path)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "odd", "auto_map": {"AutoConfig": "odd.Odd", "AutoModelForCausalLM": "odd.OddModel"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "odd.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UserError, match="custom code"):
        load_config(folder)
