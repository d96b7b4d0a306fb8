"""Generation: vLLM in this process, sampling from the trainer's own weight memory.

`engine_process.py` runs the same in a process of its own. This file, `refusals.py`, `vllm_patches.py` and the patches
that it names are all that touches vLLM, imported on first use (it costs seconds). Token ids go in, token ids and
logprobs come out; text is made of them only where a request ends with one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer

from fastgrpo.engine.choices import STEP_TOKENS
from fastgrpo.engine.completion import Completion, OpenRequest
from fastgrpo.engine.guards import interrupt_deferred, replaced
from fastgrpo.engine.refusals import check_latent_widths, check_recurrent, check_sinks
from fastgrpo.engine.routes import RouteKeeper, asked_options, told_routes
from fastgrpo.engine.shared_memory import Handles, export_parameters, load_lent
from fastgrpo.engine.vllm_patches import (
    absorb_again,
    forget_prefixes,
    has_steps,
    nothing_scheduled,
    patched_vllm,
    prefixes_cached,
    sampled_tokens,
    start_vllm,
    vllm_model,
)
from fastgrpo.engine.weight_sync import SyncReport, WeightSync
from fastgrpo.policy.latent_attention import latent_widths
from fastgrpo.policy.layer_kinds import is_recurrent
from fastgrpo.ranks.collectives import check_world
from fastgrpo.ranks.deadlines import within

if TYPE_CHECKING:
    from fastgrpo.policy.model import Policy

# Until a completion is there a step of vLLM may compile kernels: it may take as many times longer.
FIRST_STEP = 10


class Engine:
    """A vLLM engine for one policy on this process's device.

    `submit` requests, call `step` while `busy`, take finished completions as they leave. `sync(policy)` must be called
    once before the first generation and after each optimizer step; where requests stay open meanwhile, `settle` comes
    before that step and `sync(policy, in_flight=True)` before the next `step`. Not thread-safe; SIGINT during `step` is
    delivered after it, so the engine is never torn in the middle and `abort_all` leaves it clean.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        max_model_len: int,
        max_num_seqs: int = 64,
        dtype: str = "auto",
        seed: int = 0,
        kv_cache_gib: float | None = None,
        kv_cache_dtype: str = "auto",
        enforce_eager: bool = False,
        parity_threshold: float = 0.1,
        step_timeout_s: float = 40.0,
        tensor_parallel: int = 1,
        free_share: float | None = None,
        worker_process: bool = False,
        routes: bool = False,
    ) -> None:
        """`kv_cache_gib` (GiB) fixes the KV cache; without it a GPU gives what is free, a CPU 1 GiB. `kv_cache_dtype`
        "fp8" is e4m3 at scale 1, "auto" the weights'.

        `dtype` "auto" is float32 on CPU (as fast as bf16 there, and exact) and the checkpoint's on GPU. On CPU there
        are no graphs to capture, so `enforce_eager` is ignored, and generation runs on half of the cores: the jails
        need the others, and a team of OpenMP threads that must share its cores waits for itself, tens of
        times slower. `parity_threshold` is the canary's largest permitted mean |logprob difference| in nats
        (`weight_sync.FP8_PARITY` times it with "fp8"). A step of vLLM that has not returned after `step_timeout_s`, or
        `FIRST_STEP` times that before the first completion, hangs: nothing can interrupt it, so the process ends.
        `tensor_parallel` ranks in a row hold one engine together: each must submit the same requests, with a seed where
        they are sampled, and step, score and sync as the others do (`fastgrpo.engine.tensor_parallel`).
        `worker_process`: vLLM launches the kernels in a further process, beside its scheduler. `free_share` of the
        GPU's memory is free; None = it is looked up. `routes`: completions tell the experts of a mixture's tokens.
        vLLM seeds Python's, numpy's and torch's global generators with `seed`.
        """
        on_gpu = torch.cuda.is_available()
        self.max_model_len, self.parity_threshold = max_model_len, parity_threshold
        # The folder may be a link that is gone after the start.
        self._path = os.path.realpath(model_path)
        self._step_timeout_s, self._decoded = step_timeout_s, False
        self._cpu_threads = None if on_gpu else max(1, len(os.sched_getaffinity(0)) // 2)
        # Nothing is on the GPU in this process where the worker has one of its own.
        self._device = torch.cuda.current_device() if on_gpu and not worker_process else None
        self._open: dict[str, OpenRequest] = {}
        self._version, self._seed, self._fp8_cache = 0, seed, kv_cache_dtype == "fp8"
        self._sync: WeightSync | None = None
        model = AutoConfig.from_pretrained(self._path, trust_remote_code=False)
        recurrent = is_recurrent(model)
        kv_gib = kv_cache_gib if kv_cache_gib is not None or on_gpu else 1.0
        options: dict[str, Any] = {
            "model": str(model_path),
            "dtype": dtype if on_gpu or dtype != "auto" else "float32",
            "seed": seed,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "enforce_eager": enforce_eager or not on_gpu,
            "kv_cache_memory_bytes": None if kv_gib is None else int(kv_gib * 2**30),
            "kv_cache_dtype": kv_cache_dtype,
            # Of recurrent layers vLLM keeps states only after whole large blocks (docs/architecture.md, "Hybrids").
            "enable_prefix_caching": not recurrent,
            "enable_sleep_mode": on_gpu,
            "skip_tokenizer_init": True,
            "logprobs_mode": "processed_logprobs",
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        # Under torchrun each rank has an engine of its own inside the trainer's process group.
        self._joined = torch.distributed.is_initialized() and "RANK" in os.environ
        if self._joined:
            options["distributed_executor_backend"] = "external_launcher"
        if tensor_parallel > 1:
            check_world(tensor_parallel)
            options["tensor_parallel_size"] = tensor_parallel
        if worker_process:
            options |= {"distributed_executor_backend": "mp", "worker_extension_cls": "fastgrpo.engine.worker.Worker"}
        options |= _device_options(max_model_len, max_num_seqs, free_share) | (asked_options() if routes else {})
        self._latent = latent_widths(model)
        if self._latent is not None and not on_gpu:
            # Where a CPU multiplies tiles, vLLM would take another one, which packs weights and throws them away.
            options["attention_backend"] = "CPU_MLA"
        # A worker's process keeps this one's output, and must not keep what is thrown away once the engine has started.
        with patched_vllm(quiet=not worker_process, recurrent=recurrent):
            if recurrent:
                check_recurrent(model, options["dtype"])
            if self._latent is not None and not on_gpu:
                check_latent_widths(self._latent)
            if not on_gpu:
                check_sinks(model, options["dtype"])
            self._llm: Any = start_vllm(options)
        self._records_routes = routes
        if routes:
            RouteKeeper(self._llm, self._open)

    @property
    def busy(self) -> bool:
        """True while a submitted request is unfinished."""
        return bool(self._open)

    def submit(
        self,
        key: int,
        prompt_ids: Sequence[int] | np.ndarray,
        *,
        max_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int | None = None,
        stop_token_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
    ) -> None:
        """Queue one completion; `key` comes back in its `Completion`.

        Generation stops after `max_tokens`, at one of `stop_token_ids` (the stop token is kept; the model's own end
        tokens stop nothing unless they are among these), or with the token that completes one of the texts `stop`,
        which may stand across several. With `seed` the request samples from its own generator: its tokens do not depend
        on what else is in flight. Logprobs are those of what may be drawn at all: where `top_p`, `top_k` or `min_p`
        leave tokens out, the others' probabilities add up to 1.
        """
        if stop and self._llm.output_processor.tokenizer is None:
            self._llm.output_processor.tokenizer = AutoTokenizer.from_pretrained(self._path, trust_remote_code=False)
        params = _sampling_params(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            seed=seed,
            stop_token_ids=list(stop_token_ids),
            stop=list(stop),
            # Only for those texts; tags that are special tokens count among them.
            detokenize=bool(stop),
            skip_special_tokens=False,
            include_stop_str_in_output=True,
            ignore_eos=True,
            logprobs=0,
        )
        self._add(key, prompt_ids, params)

    def step(self) -> list[Completion]:
        """Advance every running request by one token and return those that finished."""
        with interrupt_deferred():
            outputs = self._advance()
        finished = [self._completion(output) for output in outputs if output.finished]
        self._decoded = self._decoded or bool(finished)
        return finished

    def abort(self, keys: Sequence[int]) -> None:
        """Drop those of the requests `keys` that are unfinished: nobody waits for them any more."""
        names = [name for key in keys if (name := str(key)) in self._open]
        with interrupt_deferred():
            self._llm.abort_request(names)
            for name in names:
                del self._open[name]
            if names and not self._open:
                self._advance_to_the_end()

    def settle(self) -> list[Completion]:
        """End the steps that vLLM may have launched ahead, begin none, and return what finished.

        Until the next `step` nothing reads the weights, and each open request's tokens are all known.
        """
        with interrupt_deferred(), nothing_scheduled(self._llm):
            outputs = self._advance_to_the_end()
        if self._device is not None:
            torch.cuda.current_stream().synchronize()
        return [self._completion(output) for output in outputs if output.finished]

    def abort_all(self) -> None:
        """Drop every unfinished request; the engine stays usable."""
        with interrupt_deferred():
            self._llm.abort_request(list(self._open))
            self._open.clear()
            self._advance_to_the_end()

    def score(self, sequences: Sequence[Sequence[int] | np.ndarray]) -> list[list[float]]:
        """Logprobs at temperature 1 of tokens 1.. of each sequence (the first token has none). Must not be busy."""
        require_idle(self.busy, "score")
        params = _sampling_params(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        for key, token_ids in enumerate(sequences):
            self._add(key, token_ids, params)
        scores: dict[int, list[float]] = {}
        while self._open:
            for output in self._advance():
                scores[self._open.pop(output.request_id).key] = list(output.prompt_logprobs.logprobs)
        return [scores[key][-(len(ids) - 1) :] for key, ids in enumerate(sequences)]

    def complete(
        self, prompts: Sequence[Sequence[int] | np.ndarray], *, max_tokens: int, seed: int
    ) -> list[Completion]:
        """A completion of each prompt, in their order, of `max_tokens` sampled at temperature 1. Must not be busy.

        It says nothing of how long a step may take: kernels of larger batches may be compiled yet.
        """
        require_idle(self.busy, "complete")
        for key, prompt_ids in enumerate(prompts):
            self.submit(key, prompt_ids, max_tokens=max_tokens, seed=seed + key)
        finished: list[Completion] = []
        while self._open:
            finished += [self._completion(output) for output in self._advance() if output.finished]
        return sorted(finished, key=lambda one: one.key)

    def sync(self, policy: Policy, *, version: int = 0, in_flight: bool = False) -> SyncReport:
        """Make vLLM sample from `policy`'s present weights, forget cached prefixes, and check parity on the canary.

        Tokens sampled from now on have the number `version`. `in_flight`: requests may be open, after `settle`; they go
        on with the new weights over the keys and values that the earlier ones left (PipelineRL, arXiv 2509.19128), and
        parity is checked where none is.

        The first call turns the policy's parameters into views of vLLM's weight tensors (one copy, then none ever
        again: an optimizer step in place is already in vLLM). An architecture outside of
        `shared_weights.SHARED_ARCHITECTURES` is copied in place each time instead, and so is a sharded policy, by all
        ranks together. A policy synced before gets its own memory back. Must be awake, and idle but for `in_flight`.

        Raises ParityError above `parity_threshold`, or where vLLM reads by these weights and does not decode by them.
        """
        require_idle(self.busy and not in_flight, "sync")
        if self._sync is None:
            vocab = self._llm.model_config.get_vocab_size()
            model, limits = vllm_model(self._llm), (self.max_model_len, self.parity_threshold)
            self._sync = WeightSync(model, vocab, *limits, self._seed, fp8_cache=self._fp8_cache)
        return self._sync(policy, partial(self.renew, version), None if self.busy else self)

    def renew(self, version: int) -> None:
        """The weights have changed and have the number `version`: what is cached of earlier ones serves no request.

        Raises RuntimeError where an idle vLLM still holds a block.
        """
        if self._latent is not None:
            self._llm.apply_model(absorb_again)
        if self.busy:
            if self._device is not None:
                torch.cuda.synchronize()
            forget_prefixes(self._llm)
        # Sleeping has forgotten them already, and vLLM would go through all blocks again, one by one.
        elif prefixes_cached(self._llm) and not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: a block is still in use though nothing is running")
        self._version = version
        counts = sampled_tokens(self._llm) if self._open else {}
        for name, request in self._open.items():
            request.spans.append((counts[name], version))

    def exported_weights(self) -> tuple[Handles, int]:
        """What another process opens vLLM's weights with, and the size of their vocabulary."""
        return self._llm.apply_model(export_parameters)[0], self._llm.model_config.get_vocab_size()

    def load_weights(self, weights: Handles) -> None:
        """Copy weights with the names of Hugging Face, which another process lends, into vLLM's."""
        self._llm.apply_model(partial(load_lent, weights))

    def sleep(self) -> None:
        """Free the KV cache's memory for training (GPU; on CPU nothing). Weights stay: the trainer lives in them."""
        if torch.cuda.is_available():
            self._llm.sleep(level=1)

    def wake(self) -> None:
        """Undo `sleep`; a no-op when awake. What training's allocator keeps in reserve is given back first."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            self._llm.wake_up()

    def close(self) -> None:
        """Release vLLM's memory and process groups. Idempotent; a policy that shared the weights keeps them."""
        if self._llm is None:
            return
        llm, self._llm = self._llm, None
        self._open.clear()
        destroy = torch.distributed.destroy_process_group
        # vLLM would end the trainer's process group with its own.
        keep_default = (lambda group=None: group and destroy(group)) if self._joined else destroy
        with replaced(torch.distributed, "destroy_process_group", keep_default):
            llm.engine_core.shutdown()

    def _add(self, key: int, token_ids: Sequence[int] | np.ndarray, params: Any) -> None:
        name = str(key)
        if name in self._open:
            raise ValueError(f"request {key} is already in flight")
        # vLLM fails later with the integers of an int32 array.
        self._llm.add_request(name, {"prompt_token_ids": np.asarray(token_ids).tolist()}, params)
        self._open[name] = OpenRequest(key, [(0, self._version)])

    def _advance_to_the_end(self) -> list[Any]:
        """What finishes until nothing is in flight; asynchronous scheduling has steps of dropped requests there too."""
        outputs: list[Any] = []
        while has_steps(self._llm):
            outputs += self._advance()
        return outputs

    def _advance(self) -> list[Any]:
        timeout = self._step_timeout_s * (1 if self._decoded else FIRST_STEP)
        if self._device is not None:
            # A new thread is on the first GPU, whichever is this rank's.
            torch.cuda.set_device(self._device)
        threads = torch.get_num_threads()
        torch.set_num_threads(self._cpu_threads or threads)
        try:
            with within(timeout, hangs_after(timeout)):
                return self._llm.step()
        finally:
            torch.set_num_threads(threads)

    def _completion(self, output: Any) -> Completion:
        sample, request = output.outputs[0], self._open.pop(output.request_id)
        routes = None
        if self._records_routes:
            routes = told_routes(request.routes, len(output.prompt_token_ids) + len(sample.token_ids) - 1)
        return Completion(
            key=request.key,
            token_ids=list(sample.token_ids),
            logprobs=list(sample.logprobs.logprobs),
            finish_reason=str(sample.finish_reason),
            versions=request.versions(len(sample.token_ids)),
            routes=routes,
        )


def require_idle(busy: bool, method: str) -> None:
    """Raises RuntimeError where the engine is `busy`, which its `method` cannot work beside."""
    if busy:
        raise RuntimeError(f"Engine.{method} needs an idle engine: finish or abort the requests in flight first")


def hangs_after(seconds: float) -> str:
    """What is said of a step that has not returned after so long."""
    return f"generation hangs: a step of vLLM took over {seconds:g} s; raise engine.step_timeout_s if it may"


def _device_options(max_model_len: int, max_num_seqs: int, free_share: float | None) -> dict[str, Any]:
    """What vLLM is told that only a GPU, or only a CPU, needs."""
    if not torch.cuda.is_available():
        # A partial (chunked) prefill rewinds the request's seeded generator, which CPU generators cannot do.
        most = max(STEP_TOKENS, max_model_len, max_num_seqs)
        return {"enable_chunked_prefill": False, "max_num_batched_tokens": most}
    # vLLM refuses a GPU that others use too unless it is told to expect less than nearly all of it.
    share = free_memory_share() if free_share is None else free_share
    # A sync forgets every cached block one by one: with vLLM's blocks of 16 tokens that takes milliseconds.
    blocks = {"block_size": 64, "gpu_memory_utilization": 0.9 * share}
    # Others keep a mixture's experts in an order of their own, which the trainer could not share.
    experts = {"moe_backend": "triton"}
    return {"max_num_batched_tokens": max(STEP_TOKENS, max_num_seqs)} | blocks | experts


def free_memory_share() -> float:
    """The free share of this GPU's memory."""
    free, total = torch.cuda.mem_get_info()
    return free / total


def _sampling_params(*, detokenize: bool = False, **options: Any) -> Any:
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    final = RequestOutputKind.FINAL_ONLY
    return SamplingParams(detokenize=detokenize, flat_logprobs=True, output_kind=final, **options)
