from __future__ import annotations

import itertools
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from fastgrpo.config import Config
from fastgrpo.engine.completion import Completion
from fastgrpo.engine.engine import Engine
from fastgrpo.engine.opening import AnyEngine
from fastgrpo.engine.weight_sync import ParityError
from fastgrpo.policy.loading import load_policy
from fastgrpo.policy.model import Policy
from fastgrpo.policy.placement import policy_device, policy_dtype
from fastgrpo.types import Runs
from tests.helpers.marks import exact

pytestmark = pytest.mark.engine

PROMPTS = [[(31 * i + 7 * j) % 1000 for j in range(20 + 11 * i)] for i in range(6)]


@pytest.fixture(scope="module")
def policy(tiny_folder: Path) -> Policy:
    return load_policy(tiny_folder, device=policy_device(), dtype=policy_dtype(Config()))


@pytest.fixture
def synced(engine: Engine, policy: Policy) -> Iterator[Engine]:
    engine.sync(policy)
    yield engine
    engine.abort_all()


def generate(engine: AnyEngine, **options: object) -> list[Completion]:
    for key, prompt in enumerate(PROMPTS):
        engine.submit(key, prompt, **({"max_tokens": 24, "seed": 100 + key} | options))
    return finish(engine)


def finish(engine: AnyEngine) -> list[Completion]:
    finished = []
    while engine.busy:
        finished += engine.step()
    return sorted(finished, key=key_of)


def key_of(completion: Completion) -> int:
    return completion.key


def one_sequence(policy: Policy, token_ids: torch.Tensor) -> torch.Tensor:
    bounds = torch.tensor([0, len(token_ids)]).int(), len(token_ids)
    return policy.forward(token_ids, torch.arange(len(token_ids)), Runs(*bounds, *bounds))


def trainer_logprobs(policy: Policy, completion: Completion, temperature: float = 1.0) -> torch.Tensor:
    token_ids = torch.tensor(PROMPTS[completion.key] + completion.token_ids)
    with torch.no_grad():
        hidden_TH = one_sequence(policy, token_ids)
        logprobs_TV = (hidden_TH @ policy.head_weight.T / temperature).log_softmax(-1)
    first = len(PROMPTS[completion.key])
    return logprobs_TV[first - 1 : -1].gather(1, token_ids[first:, None]).squeeze(1)


def optimizer_steps(policy: Policy, count: int, learning_rate: float = 3e-3) -> None:
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=learning_rate)
    for _ in range(count):
        hidden_TH = one_sequence(policy, torch.arange(40) * 3)
        (hidden_TH @ policy.head_weight.T).log_softmax(-1)[:, 11].mean().neg().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_parity(policy: Policy, completions: list[Completion], temperature: float = 1.0) -> None:
    for completion in completions:
        expected = trainer_logprobs(policy, completion, temperature)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)


@exact
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_logprobs_are_the_trainers(synced: Engine, policy: Policy, temperature: float) -> None:
    completions = generate(synced, temperature=temperature)
    assert [completion.key for completion in completions] == list(range(len(PROMPTS)))
    assert all(len(completion.token_ids) == 24 == len(completion.logprobs) for completion in completions)
    assert_parity(policy, completions, temperature)


@exact
def test_weights_are_shared_and_steps_reach_vllm(synced: Engine, policy: Policy) -> None:
    before = generate(synced, temperature=0.0)
    for _ in range(3):
        optimizer_steps(policy, 2)
        report = synced.sync(policy)
        assert report.bytes_copied == 0
        assert report.parity_max < 1e-4
        assert_parity(policy, generate(synced))
    after = generate(synced, temperature=0.0)
    assert [c.token_ids for c in after] != [c.token_ids for c in before]


@exact
def test_prefixes_cached_before_a_step_are_forgotten(synced: Engine, policy: Policy) -> None:
    long_prompt = [(13 * j) % 1000 for j in range(200)]
    synced.submit(0, long_prompt, max_tokens=2)
    while synced.busy:
        synced.step()
    optimizer_steps(policy, 2)
    synced.sync(policy)
    synced.submit(0, long_prompt, max_tokens=2, seed=0)
    finished: list[Completion] = []
    while synced.busy:
        finished += synced.step()
    token_ids = torch.tensor(long_prompt + finished[0].token_ids)
    expected = policy.logprobs([token_ids.tolist()])[0][-2:]
    torch.testing.assert_close(torch.tensor(finished[0].logprobs), expected, atol=1e-4, rtol=0)


@exact
def test_a_seeded_request_does_not_depend_on_its_company(synced: Engine) -> None:
    together = generate(synced)
    synced.submit(3, PROMPTS[3], max_tokens=24, seed=103)
    alone: list[Completion] = []
    while synced.busy:
        alone += synced.step()
    assert alone[0].token_ids == together[3].token_ids


def test_nor_on_what_others_ask_of_their_logits(synced: Engine) -> None:
    """On a GPU vLLM samples a batch where one does, in its own way."""
    together = generate(synced)
    synced.submit(3, PROMPTS[3], max_tokens=24, seed=103)
    synced.submit(9, PROMPTS[4], max_tokens=30, seed=9, top_p=0.5)
    beside = finish(synced)
    assert beside[0].token_ids == together[3].token_ids


def test_finished_completions_leave_at_once(synced: Engine) -> None:
    for key, budget in enumerate([2, 30, 9]):
        synced.submit(key, PROMPTS[key], max_tokens=budget)
    left_at = {}
    steps = 0
    while synced.busy:
        steps += 1
        left_at |= {completion.key: steps for completion in synced.step()}
    assert left_at[0] < left_at[2] < left_at[1] == steps


@exact
def test_stops_at_the_stop_token_and_keeps_it(synced: Engine) -> None:
    free = generate(synced, temperature=0.0)[0]
    stop = free.token_ids[5]
    stopped = generate(synced, temperature=0.0, stop_token_ids=[stop])[0]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]
    assert free.finish_reason == "length"


@exact
def test_score_is_the_trainers_logprob(synced: Engine, policy: Policy) -> None:
    scores = synced.score(PROMPTS)
    for ours, theirs in zip(policy.logprobs(PROMPTS), scores, strict=True):
        torch.testing.assert_close(torch.tensor(theirs), ours, atol=1e-4, rtol=0)
    # As a `Sample` has them.
    assert synced.score([np.array(prompt, np.int32) for prompt in PROMPTS]) == scores


@exact
def test_complete_samples_as_rollouts_do(synced: Engine) -> None:
    expected = [(one.key, one.token_ids, one.logprobs) for one in generate(synced, max_tokens=5)]
    found = synced.complete(PROMPTS, max_tokens=5, seed=100)
    assert [(one.key, one.token_ids, one.logprobs) for one in found] == expected


@exact
def test_interrupt_during_a_step_leaves_the_engine_usable(synced: Engine) -> None:
    expected = generate(synced)
    inner = synced._llm.step

    def interrupted_step() -> list[object]:
        os.kill(os.getpid(), signal.SIGINT)
        return inner()

    for key, prompt in enumerate(PROMPTS):
        synced.submit(key, prompt, max_tokens=24)
    synced.step()
    synced._llm.step = interrupted_step
    try:
        with pytest.raises(KeyboardInterrupt):
            synced.step()
    finally:
        synced._llm.step = inner
    synced.abort_all()
    assert not synced.busy
    assert [c.token_ids for c in generate(synced)] == [c.token_ids for c in expected]


def test_a_busy_engine_refuses_sync_score_and_a_second_key(synced: Engine, policy: Policy) -> None:
    synced.submit(1, PROMPTS[1], max_tokens=4)
    with pytest.raises(RuntimeError, match="idle"):
        synced.sync(policy)
    with pytest.raises(RuntimeError, match="idle"):
        synced.score(PROMPTS)
    with pytest.raises(RuntimeError, match=r"Engine\.complete needs an idle"):
        synced.complete(PROMPTS, max_tokens=1, seed=0)
    with pytest.raises(ValueError, match="already"):
        synced.submit(1, PROMPTS[1], max_tokens=4)


@exact
def test_unknown_architecture_is_copied_at_each_sync(
    synced: Engine, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fastgrpo.engine.shared_weights.SHARED_ARCHITECTURES", frozenset())
    other = load_policy(tiny_folder)
    for _ in range(2):
        optimizer_steps(other, 1)
        report = synced.sync(other)
        assert report.bytes_copied == sum(p.nbytes for p in other.model.parameters())
        assert report.parity_max < 1e-4
        assert_parity(other, generate(synced))
    assert [record.message for record in caplog.records if "copied into vLLM" in record.message] == [
        "weights are copied into vLLM at each sync: sharing them is not made for Qwen2ForCausalLM"
    ]


@exact
def test_a_second_policy_does_not_overwrite_the_first(synced: Engine, policy: Policy, tiny_folder: Path) -> None:
    expected = [parameter.detach().clone() for parameter in policy.model.parameters()]
    other = load_policy(tiny_folder)
    optimizer_steps(other, 1)
    synced.sync(other)
    assert not policy.shares_weights
    optimizer_steps(other, 1)
    for parameter, value in zip(policy.model.parameters(), expected, strict=True):
        assert torch.equal(parameter, value)
    assert synced.sync(policy).parity_max < 1e-4
    assert_parity(policy, generate(synced))


@exact
def test_sync_raises_when_vllm_has_other_weights(
    synced: Engine, policy: Policy, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = load_policy(tiny_folder)
    optimizer_steps(other, 3, learning_rate=1e-2)
    monkeypatch.setattr("fastgrpo.engine.weight_sync.adopt_weights", lambda *_: 0)
    with pytest.raises(ParityError, match="differ by"):
        synced.sync(other)
    monkeypatch.undo()
    synced.sync(policy)


def test_the_process_is_as_before(engine: Engine) -> None:
    assert "libgomp" not in os.environ.get("LD_PRELOAD", "")
    assert "distributed" not in sys.excepthook.__qualname__
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)


def cached_logprobs(folder: Path, states: list[dict[str, torch.Tensor]], completion: Completion) -> list[float]:
    """The completion's logprobs by transformers' own cache: each token by its version's weights, over older keys."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    cache, unread, found = DynamicCache(config=model.config), list(PROMPTS[completion.key]), []
    for token, version in zip(completion.token_ids, completion.versions, strict=True):
        model.load_state_dict(states[version])
        with torch.no_grad():
            logits_V = model(torch.tensor([unread]), past_key_values=cache).logits[0, -1]
        found.append(float(logits_V.log_softmax(-1)[token]))
        unread = [token]
    return found


def state(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in policy.model.state_dict().items()}


@pytest.fixture
def three_in_flight(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> deque[object]:
    """vLLM's queue of three steps, which it has on a GPU alone."""
    core, queue = engine._llm.engine_core.engine_core, deque[object](maxlen=3)
    monkeypatch.setattr(core, "batch_queue", queue)
    monkeypatch.setattr(core, "batch_queue_size", 3, raising=False)
    monkeypatch.setattr(core, "step_fn", core.step_with_batch_queue)
    return queue


@exact
def test_steps_in_flight_end_with_settle_and_with_the_last_abort(
    synced: Engine, three_in_flight: deque[object]
) -> None:
    for key, prompt in enumerate(PROMPTS):
        synced.submit(key, prompt, max_tokens=60, seed=key)
    for _ in range(10):
        synced.step()
    assert len(three_in_flight) == 2
    synced.settle()
    assert not three_in_flight
    for _ in range(10):
        synced.step()
    synced.abort(range(len(PROMPTS)))
    assert not three_in_flight
    assert not synced.busy


@exact
def test_weights_change_between_two_steps_and_each_token_knows_its_own(synced: Engine, tiny_folder: Path) -> None:
    """Requests go on over keys and values of earlier weights; the logprobs are those of the weights that sampled."""
    policy = load_policy(tiny_folder)
    synced.sync(policy)
    states, finished = [state(policy)], []
    for key, prompt in enumerate(PROMPTS[:-1]):
        synced.submit(key, prompt, max_tokens=8 + 8 * key, seed=100 + key)
    for version in (1, 2):
        for _ in range(10):
            finished += synced.step()
        finished += synced.settle()
        with pytest.raises(RuntimeError, match="idle"):
            synced.sync(policy)
        optimizer_steps(policy, 1)
        report = synced.sync(policy, version=version, in_flight=True)
        assert report.bytes_copied == 0
        assert np.isnan(report.parity_mean)
        states.append(state(policy))
    # It shares its first block with a request that has filled it with keys of earlier weights.
    synced.submit(5, PROMPTS[-1], max_tokens=12, seed=105)
    while synced.busy:
        finished += synced.step()
    assert sorted(completion.key for completion in finished) == list(range(6))
    for completion in finished:
        expected = cached_logprobs(tiny_folder, states, completion)
        assert completion.logprobs == pytest.approx(expected, abs=1e-4), completion.key
        assert completion.versions == sorted(completion.versions)
    versions = {completion.key: set(completion.versions) for completion in finished}
    assert versions == {0: {0}, 1: {0, 1}, 2: {0, 1, 2}, 3: {0, 1, 2}, 4: {0, 1, 2}, 5: {2}}
    assert synced.sync(policy, version=3, in_flight=True).parity_max < 1e-4


@exact
def test_prefixes_of_earlier_weights_are_forgotten_under_open_requests(synced: Engine, tiny_folder: Path) -> None:
    policy = load_policy(tiny_folder)
    synced.sync(policy)
    long_prompt = [(13 * j) % 1000 for j in range(200)]
    synced.submit(0, long_prompt, max_tokens=20, seed=0)
    for _ in range(4):
        synced.step()
    finished = synced.settle()
    optimizer_steps(policy, 1)
    synced.sync(policy, version=1, in_flight=True)
    synced.submit(1, long_prompt, max_tokens=4, seed=1)
    while synced.busy:
        finished += synced.step()
    (late,) = (completion for completion in finished if completion.key == 1)
    expected = policy.logprobs([long_prompt + late.token_ids])[0][-4:]
    torch.testing.assert_close(torch.tensor(late.logprobs), expected, atol=1e-4, rtol=0)
    # The other one's second half was computed over its own, earlier keys.
    (early,) = (completion for completion in finished if completion.key == 0)
    fresh = policy.logprobs([long_prompt + early.token_ids])[0][-4:]
    assert (torch.tensor(early.logprobs[-4:]) - fresh).abs().max() > 1e-4


def nucleus(logprobs_V: torch.Tensor, options: dict[str, float]) -> torch.Tensor:
    """Which tokens may be drawn, by the definitions of top-k (2018), top-p (2019) and min-p (2024)."""
    sorted_V = logprobs_V.sort(descending=True).values
    if "top_k" in options:
        return logprobs_V >= sorted_V[int(options["top_k"]) - 1]
    if "min_p" in options:
        return logprobs_V >= sorted_V[0] + np.log(options["min_p"])
    before_V = sorted_V.exp().cumsum(0) - sorted_V.exp()
    return logprobs_V >= sorted_V[before_V < options["top_p"]][-1]


@exact
@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.3}, {"min_p": 0.3}], ids=str)
def test_logprobs_of_a_truncated_distribution_add_up_over_what_may_be_drawn(
    synced: Engine, policy: Policy, options: dict[str, float]
) -> None:
    for completion in generate(synced, temperature=0.8, **options):
        first, token_ids = len(PROMPTS[completion.key]), torch.tensor(PROMPTS[completion.key] + completion.token_ids)
        with torch.no_grad():
            hidden_TH = one_sequence(policy, token_ids)[first - 1 : -1]
            logprobs_TV = (hidden_TH @ policy.head_weight.T / 0.8).log_softmax(-1)
        for logprobs_V, token, sampled in zip(logprobs_TV, token_ids[first:], completion.logprobs, strict=True):
            kept_V = nucleus(logprobs_V, options)
            assert kept_V.sum() < len(kept_V)
            expected = logprobs_V[token] - logprobs_V[kept_V].logsumexp(0)
            assert kept_V[token]
            assert sampled == pytest.approx(float(expected), abs=2e-4)


def test_a_text_ends_a_completion_with_the_token_that_completes_it(synced: Engine) -> None:
    """The text is of two tokens; between them may be some that the tokenizer does not know."""
    tokenizer = AutoTokenizer.from_pretrained(synced._path)
    found = 0
    for whole in generate(synced, max_tokens=64):
        letters = [(at, tokenizer.decode([token])) for at, token in enumerate(whole.token_ids) if token < 256]
        pairs = [(b, x + y) for (_, x), (b, y) in itertools.pairwise(letters) if x.isascii() and y.isascii()]
        for at, text in pairs[:1]:
            synced.submit(whole.key, PROMPTS[whole.key], max_tokens=64, seed=100 + whole.key, stop=[text, "unwritten"])
            (cut,) = finish(synced)
            assert cut.finish_reason == "stop"
            assert cut.token_ids == whole.token_ids[: at + 1]
            assert cut.logprobs == pytest.approx(whole.logprobs[: at + 1], abs=1e-3)
            assert len(cut.versions) == at + 1
            found += 1
    assert found
