"""Layers with a state that each token changes (linear attention, Mamba) over a packed row: no state leaves its run.

transformers runs them over rows [S, L]. What a layer gets of a packed row is laid out so, a run a row, before padding;
what the layer returns is packed again. Runs of similar lengths are laid out together: padding costs time.

First come prompts and whole sequences, then what continues a prompt, from the state after the prompt, which is computed
once. The convolution before the state reads some tokens more, so that the prompt's last ones are laid out before each
continuation. They, and padding after a prompt, leave the state as it is.

The convolution, the gated delta rule and Mamba-2 are those of `kernels/`; the rule is flash-linear-attention's where
that is there and computes gradients.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate, pairwise
from types import FunctionType, MethodType
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn

from fastgrpo.kernels.convolution import convolved
from fastgrpo.kernels.delta_rule import gated_delta_rule
from fastgrpo.kernels.mamba2 import mamba2
from fastgrpo.policy.layer_kinds import SIMILAR
from fastgrpo.policy.packed_attention import Repeated
from fastgrpo.types import Runs

# transformers' functions of the convolution, the gated delta rule and Mamba-2, as its layers call them, and mamba_ssm's
# for a whole layer of Mamba-2, which begins with zeros; None, as transformers' own returns, lets it call the others.
CONVOLUTION, DELTA_RULE, MAMBA2, WHOLE_MAMBA2 = (
    "causal_conv1d_fn",
    "torch_chunk_gated_delta_rule",
    "mamba2_chunk_scan",
    "mamba2_split_conv1d_scan_combined",
)


@dataclass(frozen=True, slots=True)
class Group:
    """The rows of one call of a layer.

    index_SL: the positions of their tokens in the packed row; a row shorter than L repeats its last one.
    still_SL1: which tokens leave the state as it is; None where no state is asked for after them.
    prompt_S: the rows whose last states these begin with, as they are counted from the first; None for zeros.
    """

    index_SL: Tensor
    still_SL1: Tensor | None = None
    prompt_S: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """A packed row of T tokens as rows of its runs.

    back_T: where each token of the packed row is in all rows of the `groups`, one after another.
    """

    groups: list[Group]
    back_T: Tensor


def rows_of(runs: Runs, before: int) -> Rows:
    """How the runs of a packed row are laid out; their boundaries are read from the device once.

    `before`: tokens before its own that a layer's convolution reads. A prompt shorter than that is computed again.
    """
    device = runs.cu_queries_S.device
    queries, keys = runs.cu_queries_S.diff().tolist(), runs.cu_keys_S.diff().tolist()
    first_query, ends = [0, *accumulate(queries)], list(accumulate(keys))
    prompts = _prompts(runs, first_query, keys, before)
    laid = [queries[run] + before if run in prompts else keys[run] for run in range(len(keys))]
    groups, order, back_T, at = [], list[int](), torch.empty(first_query[-1], dtype=torch.int64), 0
    wholes, continuations = ([run for run in range(len(keys)) if (run in prompts) is later] for later in (False, True))
    for group in (*_alike(wholes, laid), *_alike(continuations, laid)):
        end_S1, laid_S1 = (torch.tensor([of[run] for run in group], device=device)[:, None] for of in (ends, laid))
        token_L = torch.arange(laid[group[0]], device=device)
        # A run's own tokens, with those before them, are the last of its keys.
        index_SL = end_S1 - laid_S1 + torch.minimum(token_L, laid_S1 - 1)
        beyond_SL1 = (token_L >= laid_S1)[..., None]
        if runs.key_index_U is None:
            groups.append(Group(index_SL))
        elif group[0] not in prompts:
            groups.append(Group(runs.key_index_U[index_SL], beyond_SL1))
        else:
            prompt_S = torch.tensor([order.index(prompts[run]) for run in group], device=device)
            groups.append(Group(runs.key_index_U[index_SL], beyond_SL1 | (token_L < before)[:, None], prompt_S))
        for run in group:
            end = at + laid[run]
            back_T[first_query[run] : first_query[run + 1]] = torch.arange(end - queries[run], end)
            at += len(token_L)
        order += group
    return Rows(groups, back_T.to(device))


def _prompts(runs: Runs, first_query: Sequence[int], keys: Sequence[int], before: int) -> dict[int, int]:
    """The run of the prompt that each run continues, of those that begin with their prompt's state."""
    if runs.key_index_U is None:
        return {}
    first_keys = runs.key_index_U[runs.cu_keys_S[:-1]].tolist()
    run_at = {first: run for run, first in enumerate(first_query[:-1])}
    shared = [count - (last - first) for count, (first, last) in zip(keys, pairwise(first_query), strict=True)]
    return {run: run_at[first_keys[run]] for run, count in enumerate(shared) if count >= max(before, 1)}


def _alike(runs: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """The runs in groups of similar lengths, the longest first."""
    left = sorted(runs, key=lambda run: -lengths[run])
    while left:
        group = [run for run in left if lengths[run] >= SIMILAR * lengths[left[0]]]
        left = left[len(group) :]
        yield group


def recur_within_runs(decoder: nn.Module) -> None:
    """Let recurrent layers of `decoder` keep to the runs of a packed row, given as `rows` with the other arguments."""
    for module in decoder.modules():
        # The logarithm of how fast a state fades.
        if hasattr(module, "A_log"):
            states = _States()
            module.forward = partial(_forward, _with_our_function(module, states), states)


@dataclass(slots=True)
class _States:
    """What a layer's own forward cannot be given: the states that the rows of a call begin with, and where they stay.

    The call leaves the rows' last states in place of the first.
    """

    first: Tensor | None = None
    still_SL1: Tensor | None = None
    last: Tensor | None = None


def _forward(own: Callable[..., Tensor], states: _States, hidden_states: Tensor, *, rows: Rows, **_: Any) -> Tensor:
    """The layer over one packed row, hidden_states [1, T, H]."""
    x_TH = hidden_states.squeeze(0)
    outputs, after = list[Tensor](), list[Tensor]()
    for group in rows.groups:
        first = None if group.prompt_S is None else Repeated.apply(torch.cat(after), group.prompt_S)
        states.first, states.still_SL1 = first, group.still_SL1
        x_SLH = Repeated.apply(x_TH, group.index_SL.flatten()).unflatten(0, group.index_SL.shape)
        outputs.append(own(x_SLH).flatten(0, 1))
        assert states.last is not None, "transformers calls the layer's function by a name that is not known here"
        if group.prompt_S is None:
            after.append(states.last)
        # What backward needs of a state lives no longer than the graph.
        states.first = states.still_SL1 = states.last = None
    return torch.cat(outputs).index_select(0, rows.back_T)[None]


def _with_our_function(layer: nn.Module, states: _States) -> Callable[..., Tensor]:
    """The layer's own forward, for which functions of this module are what its own calls by the names above.

    Other models of the process, which may generate with it, keep transformers'.
    """
    own = inspect.unwrap(type(layer).forward)
    names = dict(own.__globals__)
    if CONVOLUTION in names:
        names[CONVOLUTION] = partial(_convolution, names[CONVOLUTION])
    if DELTA_RULE in names:
        names[DELTA_RULE] = partial(_delta_rule, states, names[DELTA_RULE])
    else:
        names[MAMBA2], names[WHOLE_MAMBA2] = partial(_mamba2, states), _nothing
    return MethodType(FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__), layer)


def _convolution(
    theirs: Callable[..., Tensor], x_SCL: Tensor, weight_CW: Tensor, bias_C: Tensor | None, **others: Any
) -> Tensor:
    """The convolution as a layer calls it, with silu in all models known."""
    silu = others["activation"] in ("silu", "swish")
    return convolved(x_SCL, weight_CW, bias_C) if silu else theirs(x_SCL, weight_CW, bias_C, **others)


def _delta_rule(
    states: _States,
    theirs: Callable[..., tuple[Tensor, Tensor]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    **others: Any,
) -> tuple[Tensor, None]:
    """The rule as a layer without a cache calls it, which asks for no last state; lengths are 1."""
    g, beta = others["g"], others["beta"]
    if states.still_SL1 is not None:
        g, beta = g.masked_fill(states.still_SL1, 0), beta.masked_fill(states.still_SL1, 0)
    if _is_flas(query):
        options = others | {"g": g, "beta": beta, "initial_state": states.first, "output_final_state": True}
        output, states.last = theirs(query, key, value, **options)
    else:
        output, states.last = gated_delta_rule(query, key, value, g, beta, states.first)
    return output, None


def _mamba2(states: _States, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, **others: Any) -> Tensor:
    """Mamba-2 as a layer without a cache calls it, which asks for no last state; steps are by softplus."""
    if states.still_SL1 is not None:
        dt = dt.masked_fill(states.still_SL1, -torch.inf)
    of_heads = others["D"], others["dt_bias"], others["dt_limit"]
    output, states.last = mamba2(x, dt, a, b, c, *of_heads, states.first)
    return output


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _is_flas(query: Tensor) -> bool:
    """Whether the rule is that of flash-linear-attention."""
    return query.is_cuda and fla_has_gradients()


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
