"""A layer with a state sees each run of a packed row, after its prompt, and nothing else."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import FalconH1Config, Qwen3_5TextConfig

from fastgrpo.errors import UserError
from fastgrpo.policy import recurrent
from fastgrpo.policy.layer_kinds import SIMILAR
from fastgrpo.policy.loading import load_policy
from fastgrpo.policy.recurrent import recur_within_runs, rows_of
from fastgrpo.types import Runs
from tests.helpers.tiny_model import DELTA_RULE, FALCON_H1, save_tiny_model

REACH = 3


def mamba2_chunk_scan(*_: Any, **__: Any) -> Tensor:
    """Ours stands in its place."""
    raise AssertionError


def mixed(x_SLH: Tensor) -> Tensor:
    """The sums of each token and the `REACH` before it, tokens of zeros before the first."""
    return sum(pad(x_SLH, (0, 0, back, 0))[:, : x_SLH.shape[1]] for back in range(REACH + 1))  # type: ignore[return-value]


class Sums(nn.Module):
    """A simple layer with a convolution and a state: each token's output is the sum of all mixed ones until then."""

    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(()))
        self.rows: list[tuple[int, ...]] = []

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.rows.append(tuple(hidden_states.shape[:2]))
        x_SLHP = mixed(hidden_states)[..., None]
        one_SLGN, zero_H = torch.ones_like(x_SLHP[:, :, :1]), torch.zeros(x_SLHP.shape[2])
        # Steps of 1, after which all of a state is left.
        options = {"D": zero_H, "dt_bias": zero_H, "dt_limit": (1.0, 1.0)}
        return mamba2_chunk_scan(x_SLHP, x_SLHP[..., 0], zero_H, one_SLGN, one_SLGN, **options).squeeze(-1)


def packed(groups: list[tuple[int, list[int]]]) -> Runs:
    """Prompts of so many tokens (0 = none is shared), each with continuations of so many."""
    queries, keys, index, at = [], [], [], 0
    for prompt, continuations in groups:
        before, shared = torch.arange(0), torch.arange(at, at + prompt)
        for length in ([prompt] if prompt else []) + continuations:
            index.append(torch.cat([before, torch.arange(at, at + length)]))
            before = shared
            queries.append(length)
            keys.append(len(index[-1]))
            at += length
    cu_queries, cu_keys = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (queries, keys))
    index_U = torch.cat(index) if any(prompt for prompt, _ in groups) else None
    return Runs(cu_queries, max(queries), cu_keys, max(keys), index_U)


@given(
    st.lists(
        st.tuples(st.integers(0, 12), st.lists(st.integers(1, 40), min_size=1, max_size=5)), min_size=1, max_size=4
    )
)
def test_states_stay_within_runs_and_begin_with_the_prompt(groups: list[tuple[int, list[int]]]) -> None:
    runs, layer = packed(groups), Sums()
    recur_within_runs(layer)
    tokens = int(runs.cu_queries_S[-1])
    x = torch.randn(1, tokens, 3, requires_grad=True)
    rows = rows_of(runs, REACH)
    found = layer(x, rows=rows, attention_mask=None)
    index = torch.arange(tokens) if runs.key_index_U is None else runs.key_index_U
    expected = [
        mixed(x[:, index[first:last]])[0].cumsum(0)[-(own[1] - own[0]) :]
        for (first, last), own in zip(pairwise(runs.cu_keys_S), pairwise(runs.cu_queries_S), strict=True)
    ]
    torch.testing.assert_close(found[0], torch.cat(expected), atol=1e-4, rtol=1e-5)
    weights = torch.randn_like(found)
    (ours,) = torch.autograd.grad((found * weights).sum(), x, retain_graph=True)
    (theirs,) = torch.autograd.grad((torch.cat(expected)[None] * weights).sum(), x)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
    # A prompt is computed once, unless it is shorter than what a convolution reads.
    before = sum(min(prompt, REACH) * len(continuations) for prompt, continuations in groups)
    laid_out = sum(rows * length for rows, length in layer.rows)
    assert tokens <= laid_out
    assert laid_out * SIMILAR <= tokens + before


@pytest.mark.parametrize(("kind", "changes"), [(FalconH1Config, FALCON_H1), (Qwen3_5TextConfig, DELTA_RULE)])
def test_a_model_trains_the_same_with_and_without_checkpointing(tmp_path: Path, kind: Any, changes: Any) -> None:
    save_tiny_model(tmp_path, kind=kind, **changes)
    runs = packed([(5, [3, 9])])
    ids, positions = torch.arange(17) + 40, torch.tensor([*range(5), *range(5, 8), *range(5, 14)])
    gradients = []
    for checkpointing in (False, True):
        policy = load_policy(tmp_path, gradient_checkpointing=checkpointing)
        policy.forward(ids, positions, runs).sin().sum().backward()
        gradients.append([parameter.grad for parameter in policy.model.parameters() if parameter.grad is not None])
    torch.testing.assert_close(*gradients)


def test_flash_linear_attention_gets_the_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers' own function, which takes what that takes."""
    policy = load_policy(save_tiny_model(tmp_path, kind=Qwen3_5TextConfig, **DELTA_RULE))
    runs = packed([(5, [3, 9]), (1, [2, 2]), (0, [4])])
    ids, found = torch.arange(int(runs.cu_queries_S[-1])) + 40, []
    for theirs in (False, True):
        monkeypatch.setattr(recurrent, "_is_flas", lambda query, theirs=theirs: theirs)
        hidden_TH = policy.forward(ids, ids % 7, runs)
        found.append(
            [hidden_TH, *torch.autograd.grad(hidden_TH.sin().sum(), list(policy.model.base_model.parameters()))]
        )
    for ours, other in zip(*found, strict=True):
        assert (ours - other).norm() <= 1e-3 * other.norm() + 1e-6


@pytest.mark.parametrize("key", ["compile_layers", "sharded"])
def test_what_is_not_made_for_recurrent_layers_is_refused(key: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, kind=FalconH1Config, **FALCON_H1)
    options: dict[str, Any] = {key: True}
    with pytest.raises(UserError, match=r"recurrent layers, for which (model.compile|engine.tensor_parallel) is not"):
        load_policy(tmp_path, **options)


@pytest.mark.parametrize(
    ("installed", "hopper", "has"),
    [
        ({}, True, False),
        ({"fla-core": "0.6.0", "triton": "3.7.0"}, True, False),
        ({"fla-core": "0.6.0", "triton": "3.7.0"}, False, True),
        ({"fla-core": "0.6.0", "triton": "3.7.0", "tilelang": "0.1"}, True, True),
        ({"fla-core": "0.6.0", "triton": "3.7.1"}, True, True),
        ({"fla-core": "0.6.0", "triton": "3.3.1"}, True, True),
    ],
)
def test_flash_linear_attention_stays_where_it_has_gradients(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], hopper: bool, has: bool
) -> None:
    def version(package: str) -> str:
        if package not in installed:
            raise recurrent.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(recurrent, "version", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0) if hopper else (8, 0))
    assert recurrent.fla_has_gradients.__wrapped__() is has
