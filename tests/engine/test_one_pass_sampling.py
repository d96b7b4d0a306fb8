"""Which batches are sampled in one read of their logits; what is drawn is in `tests/kernels/test_sampling.py`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastgrpo.engine.one_pass_sampling import is_plain

ROWS = np.array([2, 0])


def sampler(**changed: Any) -> Any:
    """As much of vLLM's sampler as tells what its five requests ask for; each has a row in `changed`."""
    kept = {"num_logprobs": np.zeros(5, int)} | changed
    tables = {"min_p": 0.0, "top_p": 1.0, "top_k": 100, "num_token_ids": 0, "num_bad_words": 0}
    rows = {name: SimpleNamespace(np=np.full(5, kept.pop(name, value))) for name, value in tables.items()}
    states = SimpleNamespace(vocab_size=100, num_logprobs=kept.pop("num_logprobs"))
    states.min_p, states.top_p, states.top_k = rows["min_p"], rows["top_p"], rows["top_k"]
    flags = {name: np.full(5, kept.pop(name, False)) for name in ("use_logit_bias", "use_penalty")}
    own = {"logprobs_mode": "processed_logprobs", "compute_nans": False, "use_fp64_gumbel": False} | kept
    return SimpleNamespace(
        sampling_states=states,
        logprob_token_ids_state=SimpleNamespace(num_token_ids=rows["num_token_ids"]),
        bad_words_state=SimpleNamespace(num_bad_words=rows["num_bad_words"]),
        logit_bias_state=SimpleNamespace(use_logit_bias=flags["use_logit_bias"]),
        penalties_state=SimpleNamespace(use_penalty=flags["use_penalty"]),
        **own,
    )


@pytest.mark.parametrize("wanted", [0, -1])
def test_a_temperature_and_the_tokens_own_logprobs_are_plain(wanted: int) -> None:
    assert is_plain(sampler(num_logprobs=np.full(5, wanted)), 2, ROWS)


@pytest.mark.parametrize(
    "asked",
    [
        {"num_logprobs": np.full(5, 3)},
        {"min_p": 0.1},
        {"top_p": 0.9},
        {"top_k": 20},
        {"num_token_ids": 2},
        {"num_bad_words": 1},
        {"use_logit_bias": True},
        {"use_penalty": True},
        {"logprobs_mode": "raw_logprobs"},
        {"compute_nans": True},
        {"use_fp64_gumbel": True},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_all_else_is_vllms(asked: dict[str, Any]) -> None:
    assert not is_plain(sampler(**asked), 2, ROWS)


def test_drafted_tokens_are_vllms() -> None:
    assert not is_plain(sampler(), 4, ROWS)


def test_requests_that_are_not_in_the_batch_ask_for_nothing() -> None:
    gone = sampler()
    gone.sampling_states.top_p.np[3] = 0.5
    gone.penalties_state.use_penalty[1] = True
    assert is_plain(gone, 2, ROWS)
