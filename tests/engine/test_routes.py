"""The experts that vLLM tells of each token are those that it had: the trainer, in fp32, chooses the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig

from fastgrpo.engine.completion import Completion, packed, unpacked
from fastgrpo.engine.engine import Engine
from fastgrpo.engine.routes import RouteKeeper, told_routes
from fastgrpo.policy.loading import load_policy
from fastgrpo.policy.model import Policy
from fastgrpo.training.loss import token_logprobs
from fastgrpo.training.packing import pack
from fastgrpo.types import Rollout, Sample
from tests.helpers.marks import exact
from tests.helpers.tiny_model import MIXTURES, save_tiny_model

QWEN3 = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 64, "mlp_only_layers": [1]}
OPTIONS: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 8, "routes": True}
ON_GPU = torch.cuda.is_available()
# Of two roundings of bfloat16 few choices are apart, of two tokens nearly all.
APART = 0.2 if ON_GPU else 0.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("mixture"), kind=Qwen3MoeConfig, **QWEN3 | {"num_hidden_layers": 3})


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    return loaded(folder)


def loaded(folder: Path) -> Policy:
    return load_policy(folder, device="cuda", dtype=torch.bfloat16) if ON_GPU else load_policy(folder)


@pytest.fixture(scope="module")
def engine(folder: Path, policy: Policy) -> Iterator[Engine]:
    # Blocks of 128 tokens (64 of half the size on a GPU), of which eight sequences of 400 have not all they need.
    with closing(Engine(folder, kv_cache_gib=0.001 if ON_GPU else 0.003, **OPTIONS)) as opened:
        opened.sync(policy)
        yield opened


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def finished(engine: Engine) -> list[Completion]:
    done: list[Completion] = []
    while engine.busy:
        done += engine.step()
    return sorted(done, key=lambda one: one.key)


def counts(policy: Policy, prompts: list[list[int]], done: list[Completion]) -> list[int]:
    """Tokens times layers with known experts, and those of them that the policy would have sent elsewhere."""
    samples = []
    for one in done:
        before = prompts[one.key]
        mask = [0] * len(before) + [1] * len(one.token_ids)
        samples.append(Sample(before + one.token_ids, mask, [0.0] * len(mask), routes=one.routes))
        assert one.routes is not None
        assert len(one.routes) == len(mask) - 1
    (batch,) = pack(samples, [1.0] * len(samples), 10**6, policy.device)
    token_logprobs(policy, batch, 1.0)
    assert batch.replay is not None
    return batch.replay.counts_2.tolist()


def alike(policy: Policy, prompts: list[list[int]], done: list[Completion]) -> None:
    known, elsewhere = counts(policy, prompts, done)
    assert known > 0
    assert elsewhere <= APART * known


@pytest.mark.engine
def test_cached_prompts_and_preempted_requests_have_their_experts(
    engine: Engine, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, preempted = engine._llm.engine_core.engine_core.scheduler, []
    preempt = scheduler._preempt_request

    def noted(*given: Any, **named: Any) -> Any:
        preempted.append(given)
        return preempt(*given, **named)

    monkeypatch.setattr(scheduler, "_preempt_request", noted)
    shared = prompt(300)
    prompts = [shared + prompt(key, key) for key in range(8)]
    for key, ids in enumerate(prompts):
        engine.submit(key, ids, max_tokens=150 - key, seed=key)
    # Dropped ones have nothing to tell.
    engine.submit(8, shared, max_tokens=100)
    engine.step()
    engine.abort([8])
    done = finished(engine)
    assert preempted
    alike(policy, prompts, done)
    # Random ones are elsewhere.
    for one in done:
        one.routes[...] = np.arange(3)  # type: ignore[index]
    known, elsewhere = counts(policy, prompts, done)
    assert elsewhere > known / 2


@pytest.mark.engine
@pytest.mark.parametrize("stop", [(), tuple("abcdefghijklmnopqrstuvwxyz")])
def test_a_request_preempted_with_its_last_token_in_flight_has_its_experts(
    engine: Engine, policy: Policy, monkeypatch: pytest.MonkeyPatch, stop: tuple[str, ...]
) -> None:
    """As where vLLM launches steps ahead: what is launched here is preempted before its token arrives."""
    scheduler = engine._llm.engine_core.engine_core.scheduler
    update = scheduler.update_from_output

    def preempting(scheduled: Any, sampled: Any) -> Any:
        for request in list(scheduler.running):
            scheduler.running.remove(request)
            scheduler._preempt_request(request, 0.0)
        return update(scheduled, sampled)

    prompts = [prompt(140, key) for key in range(2)]
    for key, ids in enumerate(prompts):
        engine.submit(key, ids, max_tokens=1 if not stop else 100, seed=key, stop=stop)
    monkeypatch.setattr(scheduler, "update_from_output", preempting)
    done = finished(engine)
    assert ("stop" in [one.finish_reason for one in done]) == bool(stop)
    alike(policy, prompts, done)


@pytest.mark.engine
def test_a_second_turn_tells_of_the_token_that_ended_the_first(engine: Engine, policy: Policy) -> None:
    rollout = Rollout(prompt(140), [0] * 140, [0.0] * 140, [])
    for turn in range(2):
        engine.submit(0, rollout.token_ids, max_tokens=20, seed=turn, stop=("e",) if turn else ())
        (one,) = finished(engine)
        rollout.extend(one.token_ids, 1, one.logprobs, one.versions)
        rollout.add_routes(one.routes)
        rollout.extend(prompt(5, turn), 0)
    assert rollout.routes is not None
    ended = len(rollout.routes)
    assert ended == len(rollout.token_ids) - 6
    whole = Completion(0, rollout.token_ids[1 : ended + 1], [], "", [], rollout.routes)
    alike(policy, [rollout.token_ids[:1]], [whole])


@pytest.mark.engine
@exact
@pytest.mark.parametrize("name", ["granitemoehybrid of experts", "glm4_moe", "gpt_oss"])
def test_hybrids_and_routers_with_a_bias_tell_theirs(name: str, tmp_path: Path) -> None:
    kind, changes = MIXTURES[name]
    policy = loaded(save_tiny_model(tmp_path, kind=kind, **changes))
    prompts = [prompt(30, key) for key in range(2)]
    with closing(Engine(tmp_path, kv_cache_gib=0.05, **OPTIONS)) as engine:
        engine.sync(policy)
        for key, ids in enumerate(prompts):
            engine.submit(key, ids, max_tokens=20, seed=key)
        alike(policy, prompts, finished(engine))


@pytest.mark.parametrize("routes", [None, np.zeros((3, 2, 1), np.int8), np.full((4, 2, 1), -1, np.int8)])
def test_a_vllm_that_does_not_tell_is_an_error(routes: np.ndarray | None) -> None:
    with pytest.raises(RuntimeError, match=r"has not told which experts its tokens had: set grpo\.routing_replay to"):
        told_routes(routes, 4)


@pytest.mark.engine
def test_a_token_of_which_nothing_came_is_not_taken_for_the_first_experts() -> None:
    """Of a request in blocks 2 and 0, whose last token but one no step told of."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    kind = FullAttentionSpec(block_size=4, num_kv_heads=1, head_size=8, dtype=torch.float32)
    blocks = SimpleNamespace(get_block_ids=lambda: ([2, 0],))
    manager = SimpleNamespace(free=lambda request: None, get_blocks=lambda name: blocks)
    scheduler: Any = SimpleNamespace(
        kv_cache_config=SimpleNamespace(num_blocks=3, kv_cache_groups=[SimpleNamespace(kv_cache_spec=kind)]),
        kv_cache_manager=manager,
        update_from_output=lambda scheduled, sampled: None,
    )
    ours = SimpleNamespace(routes=None)
    core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler))
    RouteKeeper(SimpleNamespace(engine_core=core), {"7": ours})  # type: ignore[dict-item]
    chosen_TLK = np.array([0, 5, 127, 1, 3], np.int8).reshape(5, 1, 1)
    scheduler.update_from_output(None, SimpleNamespace(routes=(chosen_TLK, np.array([8, 9, 10, 11, 0]))))
    manager.free(SimpleNamespace(request_id="7-abc", num_tokens=7, is_finished=lambda: True))
    assert ours.routes is not None
    assert ours.routes.ravel().tolist() == [0, 5, 127, 1, 3, -1]
    assert np.array_equal(told_routes(ours.routes, 5), chosen_TLK)
    with pytest.raises(RuntimeError, match="has not told which experts"):
        told_routes(ours.routes, 6)


def test_routes_travel_with_their_completions() -> None:
    sent = [Completion(key, [1] * key, [0.0] * key, "stop", [0] * key, np.full((key, 2, 1), key)) for key in (2, 1)]
    for one, other in zip(sent, unpacked(packed(sent)), strict=True):
        assert other.key == one.key
        assert np.array_equal(other.routes, one.routes)  # type: ignore[arg-type]
