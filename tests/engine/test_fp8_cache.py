"""`engine.kv_cache_dtype` fp8: what vLLM is told, how far it then is from the trainer, and what a run makes of that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from fastgrpo.config import Config
from fastgrpo.config_keys import resolve
from fastgrpo.engine import engine as in_process
from fastgrpo.engine import opening, weight_sync
from fastgrpo.engine.completion import Completion
from fastgrpo.engine.engine import Engine
from fastgrpo.engine.weight_sync import ParityError, WeightSync
from fastgrpo.errors import UserError
from fastgrpo.policy.demo_policy import policy_config
from fastgrpo.policy.loading import load_policy
from fastgrpo.policy.model import Policy
from fastgrpo.policy.placement import policy_device, policy_dtype
from fastgrpo.training import learner
from fastgrpo.training.workload import memory_plan
from tests.helpers.tiny_model import MIXTURES
from tests.test_train import metrics
from tests.training.test_lag import model, settings, train

__all__ = ["model"]

pytestmark = pytest.mark.engine

FP8 = {"engine.kv_cache_dtype": "fp8"}
has_fp8 = pytest.mark.skipif(
    not (torch.cuda.is_available() or torch.cpu._is_avx512_supported()), reason="vLLM's FP8 cache needs AVX-512"
)


@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_vllm_is_told(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr(in_process, "start_vllm", told.update)
    Engine(tiny_folder, max_model_len=64, kv_cache_dtype=dtype)
    assert told["kv_cache_dtype"] == dtype


@pytest.mark.parametrize(("keys", "dtype"), [({}, "auto"), (FP8, "fp8")])
@pytest.mark.parametrize("process", ["own", "shared"])
def test_the_engine_is_opened_with_it(
    monkeypatch: pytest.MonkeyPatch, keys: dict[str, str], dtype: str, process: str
) -> None:
    opened: list[dict[str, Any]] = []
    for name in ("Engine", "EngineProcess"):
        monkeypatch.setattr(opening, name, lambda _, **options: opened.append(options))
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    opening._open(resolve(keys | {"engine.process": process}), "folder", None, False)
    assert opened[0]["kv_cache_dtype"] == dtype


def test_latent_attention_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    kind, changes = MIXTURES["deepseek_v3"]
    with pytest.raises(UserError, match="fp8 is not made for latent attention: set it to auto"):
        memory_plan(resolve(FP8), kind(num_hidden_layers=2, **changes))


def test_a_cpu_without_it_refuses_it_at_the_start(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("_is_avx512_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    config = resolve(FP8)
    with pytest.raises(UserError, match="kv_cache_dtype fp8 needs a GPU, or a CPU with AVX-512: set it to auto"):
        memory_plan(config, policy_config())
    with pytest.raises(UserError, match="set it to auto"), opening.open_engine(config, tiny_folder):
        pass


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (("FP8 KV cache requires head_size divisible by 32 on CPU.",), "requires head_size divisible by 32"),
        ((), r"NotImplementedError$"),
    ],
    ids=["a reason", "none"],
)
def test_what_vllm_has_not_written_is_one_sentence(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, said: tuple[str, ...], sentence: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError(*said)

    monkeypatch.setattr(opening, "Engine", refuse)
    with (
        pytest.raises(UserError, match=rf"vLLM does not start with .* settings: .*{sentence}"),
        opening.open_engine(resolve({"engine.process": "shared"}), tiny_folder),
    ):
        pass


def with_fp8(config: Config) -> Config:
    return msgspec.structs.replace(config, engine=msgspec.structs.replace(config.engine, kv_cache_dtype="fp8"))


@pytest.fixture(scope="module")
def engine(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    config = with_fp8(settings(model, tmp_path_factory.mktemp("unused"), "fp8"))
    with opening.open_engine(config, model) as engine:
        assert isinstance(engine, Engine)
        yield engine


@has_fp8
def test_other_weights_are_told_from_a_coarse_cache_however_small_the_logits(engine: Engine, model: Path) -> None:
    policy: Policy = load_policy(model, device=policy_device(), dtype=policy_dtype(resolve({})))
    assert engine._llm.vllm_config.cache_config.cache_dtype == "fp8"
    report = engine.sync(policy)
    assert report.bytes_copied > 0 == engine.sync(policy).bytes_copied
    assert 1e-4 < report.parity_mean < 0.15
    # These weights' logprobs spread by 0.25 nats: any others are nearer than the bound of 0.6.
    attention = policy.model.base_model.layers[0].self_attn
    kept = attention.o_proj.weight.data
    attention.o_proj.weight.data = kept.flip(0)
    with pytest.raises(ParityError, match=r"on the canary \(limit 0\.1[12].*\): vLLM is not sampling"):
        engine.sync(policy)
    attention.o_proj.weight.data = kept
    assert engine.sync(policy).parity_mean == report.parity_mean


@has_fp8
def test_the_trainer_knows_what_the_cache_keeps(engine: Engine, model: Path) -> None:
    policy: Policy = load_policy(model, device=policy_device(), dtype=policy_dtype(resolve({})))
    engine.sync(policy)
    prompts = [[5, 9, 1, 300, 7, 7, 11, 250], [3, 2, 1, 200]]
    theirs = torch.tensor([each for scores in engine.score(prompts) for each in scores])
    exact, kept = (torch.cat(policy.logprobs(prompts, fp8_cache=fp8)).cpu() for fp8 in (False, True))
    # A GPU's kernels round the softmax too.
    assert (kept - theirs).abs().mean() < (1.0 if torch.cuda.is_available() else 1e-3) * (exact - theirs).abs().mean()


class Scripted:
    """A policy, what it says with an FP8 cache, and a vLLM that is off by so much in tokens that it read or decoded."""

    shares_weights, sharded_as, adapted = True, None, False

    def __init__(self, read: float, decoded: list[float], token: int = 5) -> None:
        exact_ST = torch.tensor([-1.0, -3.0] * 24)[:47].expand(4, 47)
        self.said = {False: exact_ST, True: exact_ST - 1.0}
        self.theirs, self.token = exact_ST + torch.tensor([read] * 44 + decoded), token

    def logprobs(self, sequences: list[list[int]], *, fp8_cache: bool = False) -> list[torch.Tensor]:
        assert [len(each) for each in sequences] == [48] * 4
        return list(self.said[fp8_cache])

    def score(self, prompts: list[list[int]]) -> list[list[float]]:
        return self.theirs[:, :43].tolist()

    def complete(self, prompts: list[list[int]], *, max_tokens: int, seed: int) -> list[Completion]:
        # A GPU's vLLM fails where it samples of others.
        assert self.theirs[:, :43].isfinite().all()
        return [Completion(0, [self.token] * max_tokens, row, "length", []) for row in self.theirs[:, 43:].tolist()]


NAN = float("nan")


@pytest.mark.parametrize(
    ("read", "decoded", "fp8_cache", "sentence"),
    [
        (0.0, [0.0] * 3, False, None),
        (0.14, [0.5] * 3, False, None),
        (0.2, [0.2] * 3, False, r"0\.2 nats a token on the canary \(limit 0\.15\): vLLM is not sampling"),
        (-1.0, [-1.0] * 3, True, r"1 nats .* \(limit 0\.6\): an FP8 KV cache is too coarse for this model's keys: set"),
        (-0.5, [-0.5] * 3, True, None),
        (0.0, [0.0] * 3, True, r"1 nats .* \(limit 0\.501\): vLLM is not sampling from the policy's weights$"),
        (NAN, [NAN] * 3, True, "vLLM's logprobs on the canary are not finite: vLLM is not"),
        # As it decodes.
        (0.0, [0.05] * 3, False, r"0\.05 nats a token while decoding on the canary \(limit 0\.015\): vLLM reads"),
        (0.02, [0.07] * 3, False, None),
        (0.02, [0.09] * 3, False, r"while decoding .* \(limit 0\.08\): .*: set engine\.enforce_eager to true, or"),
        (0.0, [0.0, 0.0, 9.0], False, None),
        (0.0, [0.0, NAN, 0.0], False, "nan nats a token while decoding"),
        (-0.6, [-0.5] * 3, True, None),
        (-0.6, [0.7] * 3, True, r"1\.7 nats a token while decoding .* \(limit 1\.6\)"),
    ],
)
def test_which_of_the_bounds_is_passed(
    monkeypatch: pytest.MonkeyPatch, read: float, decoded: list[float], fp8_cache: bool, sentence: str | None
) -> None:
    monkeypatch.setattr(weight_sync, "adopt_weights", lambda *_: 0)
    sync = WeightSync(None, 100, 64, 0.15, 0, fp8_cache=fp8_cache)
    both: Any = Scripted(read, decoded)
    with nullcontext() if sentence is None else pytest.raises(ParityError, match=sentence):
        sync(both, lambda: None, both)


def test_a_token_of_no_vocabulary_is_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_sync, "adopt_weights", lambda *_: 0)
    both: Any = Scripted(0.0, [0.0] * 3, token=100)
    with pytest.raises(ParityError, match="vLLM samples the token 100 on the canary, of a vocabulary of 100: vLLM is"):
        WeightSync(None, 100, 64, 0.15, 0, fp8_cache=False)(both, lambda: None, both)


@has_fp8
def test_a_run_keeps_the_samplers_logprobs_and_weighs_by_them(
    engine: Engine, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner, "open_engine", lambda *_, **__: nullcontext(engine))
    rows = metrics(train(with_fp8(settings(model, tmp_path, "fp8", steps=2))))
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert 1e-4 < row["sampler_parity"] < 0.15
        assert row["grad_norm"] > 0
        assert row["importance_capped"] == 0
