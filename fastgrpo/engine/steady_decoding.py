"""Decoding steps in which nothing but tokens changes, without most of vLLM's Python.

vLLM goes through all running requests in eight loops a token, with an object for each that says what it sampled. Where
they only decode, a few short loops leave the same behind. All else stays vLLM's: a step that admits or preempts a
request, and of each step the requests that begin, end or ask for more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastgrpo.engine.guards import source_digest

# Of vLLM's sources that the loops below stand for (`shape`): 0.25.1, 0.32.0.
KNOWN_SHAPES = frozenset({"adf3b253e0d96c51", "47070108ff19a97b"})
# What a scheduler, by any of its versions, may have set that the loops below do not do.
_FOREIGN = (
    "connector",
    "ec_connector",
    "lora_config",
    "use_pp",
    "num_spec_tokens",
    "dynamic_sd_lookup",
    "num_lookahead_tokens",
    "defer_block_free",
    "log_stats",
    "need_mamba_block_aligned_split",
    "has_mamba_layers",
    "needs_kv_cache_zeroing",
    "enable_return_routed_experts",
    "aux_output_connector",
    "return_sampling_mask",
    "is_encoder_decoder",
    "is_mm_encoder_only",
    "perf_metrics",
    "num_prefill_lookahead",
    "enable_kv_cache_events",
)
_QUEUES = ("waiting", "skipped_waiting", "kv_holding_waiting", "deferred_waiting", "_inflight_prefills")


@source_digest
def shape() -> list[Any]:
    """vLLM's sources that `Steady` stands for."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.core.sched.utils import check_stop
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState
    from vllm.v1.request import Request

    return [
        Scheduler.schedule,
        Scheduler._make_cached_request_data,
        Scheduler._update_after_schedule,
        Scheduler.update_from_output,
        Scheduler._update_request_with_output,
        AsyncScheduler._update_after_schedule,
        AsyncScheduler._update_request_with_output,
        check_stop,
        Request.append_output_token_ids,
        IncrementalDetokenizer.update,
        LogprobsProcessor.update_from_output,
        RequestState.make_request_output,
        OutputProcessor.process_outputs,
    ]


def spare_steady_steps(llm: Any) -> Steady | None:
    """Put `Steady` between `llm` and its scheduler; None, and nothing done, where vLLM is not as it knows it."""
    if shape() not in KNOWN_SHAPES:
        return None
    scheduler = llm.engine_core.engine_core.scheduler
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    if (
        type(scheduler).__name__ not in ("Scheduler", "AsyncScheduler")
        or scheduler.num_sampled_tokens_per_step != 1
        or any(getattr(scheduler, name, None) for name in _FOREIGN)
        or [type(manager).__name__ for manager in managers] != ["FullAttentionManager"]
        or llm.output_processor.stream_interval > 1
    ):
        return None
    return Steady(scheduler, llm.output_processor)


@dataclass(frozen=True, slots=True)
class _Line:
    """A request that has begun to decode, where its next token goes, and what ends it.

    `everything`: its prompt and what is sampled. It ends with one of the tokens `stops`, or with `longest` in all.
    """

    request: Any
    everything: list[int]
    append_output: Callable[[int], None]
    append_all: Callable[[int], None]
    append_answer: Callable[[int], None]
    append_logprob: Callable[[float], None] | None
    stops: frozenset[int | None]
    longest: int


class Steady:
    """The scheduler's `schedule` and `update_from_output`; each goes to vLLM's own for all but plain decoding."""

    def __init__(self, scheduler: Any, processor: Any) -> None:
        from vllm.v1.request import Request

        self._scheduler, self._processor = scheduler, processor
        self._ahead = type(scheduler).__name__ == "AsyncScheduler"
        self._blocks = scheduler.vllm_config.cache_config.block_size
        self._counts_flight = "num_in_flight_tokens" in Request.__init__.__code__.co_names
        # What a request has where a token that it sampled before it was preempted is yet to come.
        self._stale = "num_stale_output_tokens" if self._counts_flight else "async_tokens_to_discard"
        self._queues = [name for name in _QUEUES if hasattr(scheduler, name)]
        self._hashed = scheduler.kv_cache_manager.block_pool.hash_block_size
        self._schedule, self._update = scheduler.schedule, scheduler.update_from_output
        self._lines: dict[str, _Line | None] = {}
        # Running requests as they were when they were last found to be plain ones.
        self._plain: list[Any] = []
        scheduler.schedule, scheduler.update_from_output = self.schedule, self.update_from_output

    def schedule(self, throttle_prefills: bool = False) -> Any:
        """What vLLM's `schedule` returns."""
        scheduler, chosen = self._scheduler, self._next()
        if not chosen:
            output = self._schedule(throttle_prefills)
        else:
            # vLLM makes the step's output of no request at all, and all is filled in that these need.
            scheduler.running, running = [], scheduler.running
            try:
                output = self._schedule(throttle_prefills)
            finally:
                scheduler.running = running
            self._fill(output, chosen)
        for name in output.finished_req_ids:
            self._lines.pop(name, None)
        return output

    def _next(self) -> list[Any]:
        """The requests of the next step where each of them decodes one token and nothing else is to do; else none."""
        scheduler = self._scheduler
        running = scheduler.running
        if (
            any(getattr(scheduler, name) for name in self._queues)
            or scheduler._pause_state.name != "UNPAUSED"
            or len(running) > scheduler.max_num_scheduled_tokens
            or not self._all_plain(running)
        ):
            return []
        chosen, full, blocks, last = [], 0, self._blocks, scheduler.max_model_len - 1
        for request in running:
            computed, ahead = request.num_computed_tokens, request.num_output_placeholders
            if ahead > 0 and computed + 2 - ahead >= request.num_prompt_tokens + request.max_tokens:
                continue
            if computed >= last or request.is_prefill_chunk or len(request._all_token_ids) + ahead - computed != 1:
                return []
            full += not computed % blocks
            chosen.append(request)
        if full > scheduler.kv_cache_manager.block_pool.get_num_free_blocks():
            return []
        known = scheduler.use_v2_model_runner or scheduler.prev_step_scheduled_req_ids.issuperset(
            [request.request_id for request in chosen]
        )
        return chosen if known else []

    def _all_plain(self, running: list[Any]) -> bool:
        if running != self._plain:
            if not all(_plain(request) for request in running):
                return False
            self._plain = list(running)
        return True

    def _fill(self, output: Any, chosen: list[Any]) -> None:
        """Put `chosen` into vLLM's `output`, and into their own counts that they have one token more in flight."""
        scheduler, blocks = self._scheduler, self._blocks
        manager = scheduler.kv_cache_manager
        names = [request.request_id for request in chosen]
        computed = [request.num_computed_tokens for request in chosen]
        new_blocks: list[Any] = [None] * len(chosen)
        for place, count in enumerate(computed):
            if not count % blocks:
                # There is room: `_next` has counted.
                new_blocks[place] = manager.allocate_slots(chosen[place], 1).get_block_ids(allow_none=True)
        output.num_scheduled_tokens, output.total_num_scheduled_tokens = dict.fromkeys(names, 1), len(names)
        cached = output.scheduled_cached_reqs
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens = names, new_blocks, computed
        cached.num_output_tokens = [request.num_computed_tokens + 1 - request.num_prompt_tokens for request in chosen]
        if getattr(output, "num_common_prefix_blocks", None):
            output.num_common_prefix_blocks = manager.get_num_common_prefix_blocks(scheduler.running[0].request_id)
        if not scheduler.use_v2_model_runner:
            scheduler.prev_step_scheduled_req_ids.update(names)
        for request in chosen:
            request.num_computed_tokens += 1
        if self._ahead:
            for request in chosen:
                request.num_output_placeholders += 1
        if self._counts_flight:
            for request in chosen:
                request.num_in_flight_tokens += 1

    def update_from_output(self, scheduled: Any, sampled: Any) -> Any:
        """What vLLM's returns, less the outputs that say of a request no more than its next token.

        That token is where vLLM's output processor would put it.
        """
        column = self._logprobs(sampled)
        if column is not None:
            scheduled.num_scheduled_tokens = self._continue(scheduled.num_scheduled_tokens, sampled, column)
        outputs = self._update(scheduled, sampled)
        for name in scheduled.num_scheduled_tokens:
            self._begin(name)
        return outputs

    def _logprobs(self, sampled: Any) -> list[float] | None:
        """Those of the sampled tokens, by row; none where none are asked for, None where the step has more to it."""
        if (
            not sampled.sampled_token_ids
            or sampled.pooler_output
            or sampled.num_nans_in_logits
            or any(one is not None for one in sampled.prompt_logprobs_dict.values())
        ):
            return None
        if sampled.logprobs is None:
            return []
        # Column 0 is the sampled token's. Where nothing was drafted a row is a request.
        return sampled.logprobs.logprobs[:, 0].tolist() if sampled.logprobs.cu_num_generated_tokens is None else None

    def _continue(self, counts: dict[str, int], sampled: Any, column: list[float]) -> dict[str, int]:
        """Give the requests that go on their next token; what is left of `counts`, a request's tokens in the step."""
        from vllm.v1.request import RequestStatus

        lines, rows, tokens = self._lines, sampled.req_id_to_index, sampled.sampled_token_ids
        stale, running = self._stale, RequestStatus.RUNNING
        left: dict[str, int] = {}
        gone_on: list[Any] = []
        for name, count in counts.items():
            line = lines.get(name)
            if line is None or count != 1 or len(new := tokens[row := rows[name]]) != 1:
                left[name] = count
                continue
            request, token, known = line.request, new[0], len(line.everything) + 1
            if request.status is not running or token in line.stops or known >= line.longest or getattr(request, stale):
                left[name] = count
                continue
            line.append_output(token)
            line.append_all(token)
            line.append_answer(token)
            if column and line.append_logprob is not None:
                line.append_logprob(column[row])
            if not known % self._hashed:
                request.update_block_hashes()
            gone_on.append(request)
        self._land(gone_on)
        return left

    def _land(self, requests: list[Any]) -> None:
        """A token of each of `requests` is in flight no longer."""
        if self._counts_flight:
            for request in requests:
                request.num_in_flight_tokens -= 1
        if not self._ahead:
            return
        manager, blocks = self._scheduler.kv_cache_manager, self._blocks
        for request in requests:
            request.num_output_placeholders = ahead = request.num_output_placeholders - 1
            known = request.num_computed_tokens - ahead
            if not known % blocks:
                manager.cache_blocks(request, known)

    def _begin(self, name: str) -> None:
        """The request `name` has its first token and may go on as a line, or as None, which is vLLM's own way."""
        request, state = self._scheduler.requests.get(name), self._processor.request_states.get(name)
        if name in self._lines or request is None or state is None or not request._output_token_ids:
            return
        if not _simple(request, state):
            self._lines[name] = None
            return
        params, kept = request.sampling_params, state.logprobs_processor.logprobs
        self._lines[name] = _Line(
            request,
            request._all_token_ids,
            request._output_token_ids.append,
            request._all_token_ids.append,
            state.detokenizer.token_ids.append,
            None if params.num_logprobs is None else kept.logprobs.append,
            frozenset([params.eos_token_id, *(params.stop_token_ids or ())]),
            min(self._scheduler.max_model_len, request.num_prompt_tokens + request.max_tokens),
        )


def _simple(request: Any, state: Any) -> bool:
    """Whether nothing but its tokens and their own logprobs is asked of `request`, and nothing before its end."""
    params, kept = request.sampling_params, state.logprobs_processor.logprobs
    return (
        _plain(request)
        and not request.resumable
        and request.prefill_stats is None
        and not params.min_tokens
        and params.repetition_detection is None
        and params.prompt_logprobs is None
        and (params.num_logprobs is None or (params.num_logprobs == 0 and hasattr(kept, "logprobs")))
        # A subclass would make text of the tokens.
        and type(state.detokenizer).__name__ == "IncrementalDetokenizer"
        and state.output_kind.name == "FINAL_ONLY"
        and not (state.queue or state.parent_req or state.stats or state.streaming_input)
    )


def _plain(request: Any) -> bool:
    """Whether `request` is text to text, without a grammar."""
    return not (request.mm_features or request.structured_output_request or request.pooling_params)
