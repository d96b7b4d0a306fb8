"""vLLM's sampling on a GPU in one read of the logits, where nothing but a temperature is asked of them.

vLLM copies the logits to float32 and reads the copy four times, once for a rank that nobody looks at here. Batches with
top-p, penalties and the like are vLLM's; their tokens are drawn with the same noise, so that a request with a seed has
one answer whatever is beside it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

from fastgrpo.engine.guards import source_digest

# Of vLLM's sampler that `_output` stands for (`sampler_shape`): 0.25.1.
KNOWN_SAMPLER = "44a904eb9c55395b"


@source_digest
def sampler_shape() -> list[Any]:
    """vLLM's sampler."""
    from vllm.v1.worker.gpu.sample.sampler import Sampler

    return [Sampler]


@cache
def sample_in_one_pass() -> None:
    """For the samplers of this process; nothing is done where vLLM's is not the known one."""
    if sampler_shape() != KNOWN_SAMPLER:
        return
    from vllm.v1.worker.gpu.sample import sampler

    from fastgrpo.kernels.sampling_triton import sample

    own_call, own_draw = sampler.Sampler.__call__, sampler.gumbel_sample

    def call(self: Any, logits_NV: Tensor, batch: Any) -> Any:
        if is_plain(self, len(logits_NV), batch.idx_mapping_np):
            return _output(self, logits_NV, batch)
        return own_call(self, logits_NV, batch)

    def draw(
        logits_NV: Tensor, row_N: Tensor, temperature_R: Tensor, seed_R: Tensor, position_N: Tensor, **options: Any
    ) -> Tensor:
        if options["use_fp64"]:
            return own_draw(logits_NV, row_N, temperature_R, seed_R, position_N, **options)
        # The temperature has been applied, but for one of 0.
        left_N = (temperature_R[row_N] != 0.0).float()
        return sample(logits_NV, left_N, seed_R[row_N], position_N)[0]

    sampler.Sampler.__call__ = call  # type: ignore[assignment, method-assign]
    sampler.gumbel_sample = draw  # type: ignore[assignment]


def _output(sampler: Any, logits_NV: Tensor, batch: Any) -> Any:
    """vLLM's output of a batch that `is_plain`; ranks, which nobody looks at, are the tokens themselves."""
    from vllm.v1.outputs import LogprobsTensors
    from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected
    from vllm.v1.worker.gpu.sample.output import SamplerOutput

    from fastgrpo.kernels.sampling_triton import sample

    states, row_N = sampler.sampling_states, batch.expanded_idx_mapping
    position_N = batch.positions[batch.logits_indices]
    token_N, logprob_N = sample(logits_NV, states.temperature.gpu[row_N], states.seeds.gpu[row_N], position_N)
    # As in vLLM's: a request in the midst of its prompt samples nothing.
    counts = get_num_sampled_and_rejected(
        batch.seq_lens.new_ones(batch.num_reqs),
        batch.seq_lens,
        batch.cu_num_logits,
        batch.idx_mapping,
        sampler.req_states.prefill_len.gpu,
    )
    wanted = states.num_logprobs[batch.idx_mapping_np].max() == 0
    logprobs = LogprobsTensors(token_N[:, None], logprob_N[:, None], token_N) if wanted else None
    return SamplerOutput(token_N[:, None], logprobs, None, *counts)


def is_plain(sampler: Any, logits: int, row_N: np.ndarray) -> bool:
    """Whether the requests in `row_N` of vLLM's tables ask for a temperature and their tokens' logprobs alone."""
    states = sampler.sampling_states
    return (
        logits == len(row_N)
        and sampler.logprobs_mode == "processed_logprobs"
        and not (sampler.compute_nans or sampler.use_fp64_gumbel)
        and states.num_logprobs[row_N].max() <= 0
        and not sampler.logprob_token_ids_state.num_token_ids.np[row_N].any()
        and not sampler.logit_bias_state.use_logit_bias[row_N].any()
        and not sampler.penalties_state.use_penalty[row_N].any()
        and not sampler.bad_words_state.num_bad_words.np[row_N].any()
        and not states.min_p.np[row_N].any()
        and (states.top_k.np[row_N] == states.vocab_size).all()
        and (states.top_p.np[row_N] == 1.0).all()
    )
