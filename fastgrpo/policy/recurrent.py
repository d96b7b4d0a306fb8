"""Layers with a state that each token changes (linear attention, Mamba) over a packed row: no state leaves its run.

transformers runs them over rows [S, L] of whole sequences. What a layer gets of a packed row is laid out so, each run
after the prompt that it continues and before padding, which comes too late to change anything; what the layer returns
is packed again. Runs of similar lengths are laid out together: padding costs time.

The gated delta rule and Mamba-2 are those of `kernels/`, unless flash-linear-attention is there and computes gradients,
or mamba_ssm.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import accumulate
from types import FunctionType, MethodType
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn

from fastgrpo.kernels.delta_rule import gated_delta_rule
from fastgrpo.kernels.mamba2 import mamba2
from fastgrpo.policy.layer_kinds import SIMILAR
from fastgrpo.policy.packed_attention import Repeated
from fastgrpo.types import Runs

# transformers' functions of the gated delta rule and of Mamba-2, as its layers call them: those of
# flash-linear-attention and of mamba_ssm where these are there.
DELTA_RULE, MAMBA2 = "torch_chunk_gated_delta_rule", "mamba2_chunk_scan"


@dataclass(frozen=True, slots=True)
class Rows:
    """A packed row of T tokens as rows of its runs, each with all of its keys.

    groups: of each call of a layer the positions of its rows' tokens in the packed row, [S, L]; a row shorter than L
    repeats its last one. back_T: where each token of the packed row is in all those rows, one after another.
    """

    groups: list[Tensor]
    back_T: Tensor


def rows_of(runs: Runs) -> Rows:
    """How the runs of a packed row are laid out; their boundaries are read from the device once."""
    device = runs.cu_queries_S.device
    queries, keys = runs.cu_queries_S.diff().tolist(), runs.cu_keys_S.diff().tolist()
    first_query, first_key = [0, *accumulate(queries)], [0, *accumulate(keys)]
    groups, back_T, laid = [], torch.empty(first_query[-1], dtype=torch.int64), 0
    left = sorted(range(len(keys)), key=lambda run: -keys[run])
    while left:
        longest = keys[left[0]]
        group = [run for run in left if keys[run] >= SIMILAR * longest]
        left = left[len(group) :]
        first_S1, last_S1 = (torch.tensor([at[run] for run in group])[:, None] for at in (first_key, keys))
        groups.append((first_S1 + torch.minimum(torch.arange(longest), last_S1 - 1)).to(device))
        for run in group:
            # A run's own tokens are the last of its keys.
            end = laid + keys[run]
            back_T[first_query[run] : first_query[run + 1]] = torch.arange(end - queries[run], end)
            laid += longest
    if runs.key_index_U is not None:
        groups = [runs.key_index_U[index_SL] for index_SL in groups]
    return Rows(groups, back_T.to(device))


def recur_within_runs(decoder: nn.Module) -> None:
    """Let recurrent layers of `decoder` keep to the runs of a packed row, given as `rows` with the other arguments."""
    for module in decoder.modules():
        # The logarithm of how fast a state fades.
        if hasattr(module, "A_log"):
            module.forward = partial(_forward, _with_our_function(module))


def _forward(own: Callable[..., Tensor], hidden_states: Tensor, *, rows: Rows, **_: Any) -> Tensor:
    """The layer over one packed row, hidden_states [1, T, H]."""
    x_TH = hidden_states.squeeze(0)
    outputs = [own(Repeated.apply(x_TH, index_SL.flatten()).unflatten(0, index_SL.shape)) for index_SL in rows.groups]
    return torch.cat([output_SLH.flatten(0, 1) for output_SLH in outputs]).index_select(0, rows.back_T)[None]


def _with_our_function(layer: nn.Module) -> Callable[..., Tensor]:
    """The layer's own forward, for which `_delta_rule` or `_mamba2` is what its module calls `DELTA_RULE` or `MAMBA2`.

    Other models of the process, which may generate with it, keep transformers'.
    """
    own = inspect.unwrap(type(layer).forward)
    names = dict(own.__globals__)
    if DELTA_RULE in names:
        names[DELTA_RULE] = partial(_delta_rule, names[DELTA_RULE])
    elif MAMBA2 in names and find_spec("mamba_ssm") is None:
        names[MAMBA2] = _mamba2
    else:
        return layer.forward
    return MethodType(FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__), layer)


def _delta_rule(
    theirs: Callable[..., tuple[Tensor, None]], query: Tensor, key: Tensor, value: Tensor, **others: Any
) -> tuple[Tensor, None]:
    """The rule as a layer without a cache calls it: from a state of zeros, the last one forgotten, lengths 1."""
    if query.is_cuda and fla_has_gradients():
        return theirs(query, key, value, **others)
    return gated_delta_rule(query, key, value, others["g"], others["beta"])[0], None


def _mamba2(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, **others: Any) -> Tensor:
    """Mamba-2 as a layer without a cache calls it: from a state of zeros, the last one forgotten, steps by softplus."""
    return mamba2(x, dt, a, b, c, others["D"], others["dt_bias"], others["dt_limit"])[0]


@cache
def fla_has_gradients() -> bool:
    """Whether flash-linear-attention is there and does not refuse gradients of the gated delta rule on this GPU.

    On Hopper it does with Triton 3.4.0 to 3.7.0, whose results are wrong, unless tilelang is there.
    """
    if _version("fla-core") is None:
        return False
    triton = _version("triton")
    refused = triton is not None and Version("3.4.0") <= triton < Version("3.7.1") and _version("tilelang") is None
    return not (refused and torch.cuda.get_device_capability()[0] == 9)


def _version(package: str) -> Version | None:
    try:
        return Version(version(package))
    except PackageNotFoundError:
        return None
