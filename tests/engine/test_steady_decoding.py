"""vLLM's scheduler with and without `Steady`, step by step beside each other: what is sent, kept and answered."""

from __future__ import annotations

import copy
import os
import random
import sys
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastgrpo.engine import guards, steady_decoding
from fastgrpo.engine.steady_decoding import shape, spare_steady_steps
from fastgrpo.engine.vllm_patches import _one_more, idle_inside_blocks, keep_own_logprobs_only, resume_when_known

pytestmark = pytest.mark.engine

BLOCK, LENGTH, STOP = 4, 48, 7
# vLLM logs, compiles or warns at import otherwise.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


@pytest.fixture(autouse=True)
def what_vllm_changes_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM sets both while it reads a configuration (`patched_vllm`); programs of later tests would have them."""
    monkeypatch.setenv("LD_PRELOAD", os.environ.get("LD_PRELOAD", ""))
    monkeypatch.setattr(torch, "set_num_threads", torch.set_num_threads)


class Side:
    """A scheduler and an output processor of vLLM, and a model that is made up: each of its tokens is a draw of
    the request's name and the token's place. `flying`: steps in flight; above 1 is asynchronous scheduling."""

    def __init__(self, folder: Path, *, flying: int, second_runner: bool, blocks: int) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import init_none_hash
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.engine.output_processor import OutputProcessor
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        init_none_hash(sha256)
        options = {"model": str(folder), "dtype": "float32", "skip_tokenizer_init": True, "enforce_eager": True}
        limits = {"max_model_len": LENGTH, "max_num_seqs": 8, "max_num_batched_tokens": 64, "block_size": BLOCK}
        config = EngineArgs(**options | limits, enable_prefix_caching=True).create_engine_config()
        config.cache_config.block_size = BLOCK
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
        cache = KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)])
        config.cache_config.num_gpu_blocks = blocks
        kind = AsyncScheduler if flying > 1 else Scheduler
        self.scheduler: Any = kind(
            vllm_config=config,
            kv_cache_config=cache,
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
            hash_block_size=BLOCK,
            log_stats=False,
        )
        self.scheduler.use_v2_model_runner = second_runner
        self.processor: Any = OutputProcessor(None, log_stats=False)
        core = SimpleNamespace(scheduler=self.scheduler)
        self.llm: Any = SimpleNamespace(
            engine_core=SimpleNamespace(engine_core=core), output_processor=self.processor, vllm_config=config
        )
        idle_inside_blocks(self.llm)
        resume_when_known(self.llm)
        self._flying, self._launched = flying, deque[tuple[Any, Any]]()

    def add(self, name: str, prompt: list[int], params: Any) -> None:
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher
        from vllm.v1.engine import EngineCoreRequest
        from vllm.v1.request import Request

        sent = EngineCoreRequest(name, list(prompt), None, copy.copy(params), None, 0.0, None, None, None)
        sent.external_req_id = name
        self.processor.add_request(sent, None, None, 0)
        hasher = get_request_block_hasher(BLOCK, sha256)
        self.scheduler.add_request(Request.from_engine_core_request(sent, hasher))

    def abort(self, name: str) -> None:
        from vllm.v1.request import RequestStatus

        self.processor.abort_requests([name], internal=True)
        self.scheduler.finish_requests([name], RequestStatus.FINISHED_ABORTED)

    def step(self) -> tuple[Any, list[Any]]:
        """What is sent to the model, if anything, and the requests that are answered."""
        sent = None
        if self.scheduler.has_requests():
            sent = self.scheduler.schedule()
            self._launched.append((sent, self._sampled(sent)))
            sent = copy.copy(sent)
            if len(self._launched) < self._flying:
                return sent, []
        if not self._launched:
            return sent, []
        outputs = self.scheduler.update_from_output(*self._launched.popleft())
        given = outputs[0].outputs if 0 in outputs else []
        return sent, self.processor.process_outputs(given).request_outputs

    def _sampled(self, sent: Any) -> Any:
        from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput

        names = sorted(sent.num_scheduled_tokens, reverse=True)
        requests = [self.scheduler.requests[name] for name in names]
        draws = [random.Random(f"{one.request_id} {one.num_computed_tokens}") for one in requests]
        # As a worker does, whatever the scheduler takes for a chunk of a prompt.
        chunk = [one.num_computed_tokens < one.num_tokens for one in requests]
        tokens = [[] if left else [draw.randrange(40)] for left, draw in zip(chunk, draws, strict=True)]
        column = np.array([draw.random() for draw in draws], np.float32)[:, None]
        ids = np.array([[*one, 0][0] for one in tokens], np.int32)[:, None]
        logprobs = LogprobsLists(ids, column, ids[:, 0])
        rows = {name: row for row, name in enumerate(names)}
        return ModelRunnerOutput(names, rows, sampled_token_ids=tokens, logprobs=logprobs, prompt_logprobs_dict={})

    def state(self) -> dict[str, Any]:
        """What the next steps depend on."""
        scheduler, manager = self.scheduler, self.scheduler.kv_cache_manager
        requests = {name: {**vars(one)} for name, one in scheduler.requests.items()}
        for name, kept in requests.items():
            # Objects that are compared by identity, and a step that is past either way (`next_decode_...`).
            for ignored in ("_block_hasher", "sampling_params", "next_decode_eligible_step", "output_token_ids"):
                kept.pop(ignored, None)
            kept["all_token_ids"] = kept["_all_token_ids"]
            kept["prefill_stats"] = kept["prefill_stats"] is None
            answer = self.processor.request_states[name]
            kept["answer"] = (
                answer.detokenizer.token_ids,
                getattr(answer.logprobs_processor.logprobs, "logprobs", None),
            )
            kept["blocks"] = manager.get_block_ids(name)
        return {
            "requests": requests,
            "running": [one.request_id for one in scheduler.running],
            "waiting": [one.request_id for one in scheduler.waiting],
            "free": manager.block_pool.get_num_free_blocks(),
            "cached": sorted(map(repr, manager.block_pool.cached_block_hash_to_block._cache)),
            "in the step before": scheduler.prev_step_scheduled_req_ids,
        }


def sampling(draw: random.Random) -> Any:
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    final = RequestOutputKind.FINAL_ONLY
    return SamplingParams(
        max_tokens=draw.randrange(1, 40),
        logprobs=draw.choice([0, 0, 0, None]),
        stop_token_ids=draw.choice([[], [STOP]]),
        # Its requests are no lines.
        min_tokens=draw.choice([0, 0, 0, 1]),
        ignore_eos=True,
        detokenize=False,
        flat_logprobs=True,
        output_kind=final,
    )


def answers(outputs: list[Any]) -> list[tuple[Any, ...]]:
    ends = [output.outputs[0] for output in outputs]
    return [
        (output.request_id, list(end.token_ids), end.logprobs and list(end.logprobs.logprobs), end.finish_reason)
        for output, end in zip(outputs, ends, strict=True)
    ]


@pytest.mark.parametrize("blocks", [200, 24], ids=["room", "preemptions"])
@pytest.mark.parametrize("second_runner", [False, True], ids=["first-runner", "second-runner"])
@pytest.mark.parametrize("flying", [1, 2, 3], ids=["sync", "async", "three"])
def test_every_step_is_vllms_own(tiny_folder: Path, flying: int, second_runner: bool, blocks: int) -> None:
    keep_own_logprobs_only()
    plain, spared = (Side(tiny_folder, flying=flying, second_runner=second_runner, blocks=blocks) for _ in range(2))
    steady = spare_steady_steps(spared.llm)
    assert steady is not None
    filled, draw, preempted, made = count_calls(steady, "_fill"), random.Random(blocks), 0, 0
    for step in range(400):
        if step < 300 and draw.random() < 0.12:
            # Some begin alike, so that blocks are shared.
            prompt = [draw.randrange(2)] * draw.randrange(10) + [
                draw.randrange(1000) for _ in range(draw.randrange(1, 10))
            ]
            params = sampling(draw)
            for side in (plain, spared):
                side.add(f"r{made}", prompt, params)
            made += 1
        if plain.scheduler.requests and draw.random() < 0.02:
            name = draw.choice(sorted(plain.scheduler.requests))
            for side in (plain, spared):
                side.abort(name)
        (sent, done), (sent_too, done_too) = plain.step(), spared.step()
        assert (sent is None) == (sent_too is None)
        if sent is not None:
            one, other = vars(sent), vars(sent_too)
            for new in (*one["scheduled_new_reqs"], *other["scheduled_new_reqs"]):
                new.sampling_params = None
            assert one == other
            assert list(one["num_scheduled_tokens"]) == list(other["num_scheduled_tokens"])
            preempted += len(one["preempted_req_ids"] or ())
        assert answers(done) == answers(done_too)
        assert plain.state() == spared.state()
    assert not plain.scheduler.requests
    assert filled() > 100
    assert (preempted > 0) == (blocks < 100)
    assert not [name for name, line in steady._lines.items() if line]


@pytest.mark.parametrize("blocks", [200, 24], ids=["room", "preemptions"])
def test_answers_do_not_hang_on_how_many_steps_are_in_flight(tiny_folder: Path, blocks: int) -> None:
    keep_own_logprobs_only()
    found = []
    for flying in (1, 2, 3):
        side, draw = Side(tiny_folder, flying=flying, second_runner=True, blocks=blocks), random.Random(blocks)
        assert spare_steady_steps(side.llm) is not None
        done: list[Any] = []
        for number in range(40):
            side.add(f"r{number}", [draw.randrange(1000) for _ in range(draw.randrange(1, 16))], sampling(draw))
            for _ in range(6):
                done += side.step()[1]
        while side.scheduler.requests:
            done += side.step()[1]
        found.append(sorted(answers(done)))
    assert len(found[0]) == 40
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(("own", "second_runner", "steps"), [(2, True, 3), (2, False, 2), (1, True, 1)])
def test_a_third_step_is_in_flight_where_vllm_has_two(own: int, second_runner: bool, steps: int) -> None:
    from vllm.config import VllmConfig

    assert callable(vars(VllmConfig)["max_concurrent_batches"].fget)
    config = SimpleNamespace(use_v2_model_runner=second_runner)
    assert _one_more(lambda config: own, config) == steps


def count_calls(owner: Any, name: str) -> Any:
    calls, method = [0], getattr(owner, name)

    def call(*arguments: Any) -> Any:
        calls[0] += 1
        return method(*arguments)

    setattr(owner, name, call)
    return lambda: calls[0]


def test_another_vllm_is_left_alone(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    side = Side(tiny_folder, flying=2, second_runner=True, blocks=24)
    schedule = side.scheduler.schedule
    monkeypatch.setattr(steady_decoding, "KNOWN_SHAPES", frozenset({"another"}))
    assert spare_steady_steps(side.llm) is None
    monkeypatch.undo()
    assert shape() in steady_decoding.KNOWN_SHAPES
    side.scheduler.num_spec_tokens = 2
    assert spare_steady_steps(side.llm) is None
    assert side.scheduler.schedule == schedule


@pytest.mark.parametrize("missing", ["sources", "a module"])
def test_a_vllm_without_what_is_looked_at_is_left_alone(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """As one of compiled files, or one that keeps its scheduler elsewhere."""
    side = Side(tiny_folder, flying=2, second_runner=True, blocks=24)
    if missing == "sources":

        def without(_: object) -> str:
            raise OSError("could not get source code")

        monkeypatch.setattr(guards.inspect, "getsource", without)
    else:
        monkeypatch.setitem(sys.modules, "vllm.v1.core.sched.async_scheduler", None)
        monkeypatch.delattr(side.scheduler.kv_cache_manager, "coordinator")
    assert spare_steady_steps(side.llm) is None
