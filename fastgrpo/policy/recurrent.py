"""Layers with a state that each token changes (linear attention, Mamba) over a packed row: no state leaves its run.

transformers runs them over rows [S, L] of whole sequences. What a layer gets of a packed row is laid out so, each run
after the prompt that it continues and before padding, which comes too late to change anything; what the layer returns
is packed again. Runs of similar lengths are laid out together: padding costs time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from fastgrpo.policy.packed_attention import Repeated
from fastgrpo.types import Runs

# Kinds of `layer_types` whose layers have such a state, and those that have keys and values; "hybrid" has both.
RECURRENT_LAYERS = frozenset({"linear_attention", "mamba", "hybrid"})
KEYED_LAYERS = frozenset({"full_attention", "sliding_attention", "attention", "hybrid"})
# A row is at least as long as this share of the longest that it is laid out with.
SIMILAR = 0.75


@dataclass(frozen=True, slots=True)
class Rows:
    """A packed row as rows of its runs, each with its keys: a group of `rows` is one call of a layer.

    rows_SL: for each group the positions in the packed row, padding repeating a run's last. back_T: where each token of
    the packed row lies in the groups' rows, one after another.
    """

    rows_SL: list[Tensor]
    back_T: Tensor


def rows_of(runs: Runs) -> Rows:
    """How the runs of a packed row are laid out; reads their boundaries from the device once."""
    device = runs.cu_queries_S.device
    queries, keys = runs.cu_queries_S.diff().tolist(), runs.cu_keys_S.diff().tolist()
    starts = [0, *accumulate(keys)]
    ends = list(accumulate(queries))
    order = sorted(range(len(keys)), key=lambda run: -keys[run])
    rows_SL, backs, placed = [], torch.empty(ends[-1], dtype=torch.int64), 0
    while order:
        longest = keys[order[0]]
        group = [run for run in order if keys[run] >= SIMILAR * longest]
        order = order[len(group) :]
        column_L = torch.arange(longest)
        last_S1 = torch.tensor([keys[run] for run in group])[:, None] - 1
        first_S1 = torch.tensor([starts[run] for run in group])[:, None]
        rows_SL.append((first_S1 + torch.minimum(column_L, last_S1)).to(device))
        for row, run in enumerate(group):
            end = placed + row * longest + keys[run]
            backs[ends[run] - queries[run] : ends[run]] = torch.arange(end - queries[run], end)
        placed += len(group) * longest
    if runs.key_index_U is not None:
        rows_SL = [runs.key_index_U[index_SL] for index_SL in rows_SL]
    return Rows(rows_SL, backs.to(device))


@dataclass(frozen=True, slots=True)
class Widths:
    """What a recurrent layer has of each token: columns of its values, columns that are convolved; and its state's size."""

    values: int
    convolved: int
    state: int


def widths(config: PretrainedConfig) -> Widths | None:
    """Those of the model's recurrent layers, None where it has none."""
    text = config.get_text_config()
    if not is_recurrent(text):
        return None
    if hasattr(text, "linear_num_value_heads"):
        keys = text.linear_num_key_heads * text.linear_key_head_dim
        values = text.linear_num_value_heads * text.linear_value_head_dim
        return Widths(values, values + 2 * keys, values * text.linear_key_head_dim)
    heads, size, state, groups = (
        next(value for name in names if (value := getattr(text, name, None)))
        for names in (
            ("mamba_n_heads", "mamba_num_heads"),
            ("mamba_d_head", "mamba_head_dim"),
            ("mamba_d_state", "ssm_state_size"),
            ("mamba_n_groups", "n_groups"),
        )
    )
    return Widths(heads * size, heads * size + 2 * groups * state, heads * size * state)


def is_recurrent(config: PretrainedConfig) -> bool:
    """Whether some layers of the model have a state that each token changes."""
    return recurrent_layers(config) > 0


def layer_kinds(config: PretrainedConfig) -> Sequence[str]:
    """The kind of each layer, in transformers' words; none where all are attention."""
    text = config.get_text_config()
    return getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()


def recurrent_layers(config: PretrainedConfig) -> int:
    """Layers with such a state."""
    return sum(kind in RECURRENT_LAYERS for kind in layer_kinds(config))


def recur_within_runs(decoder: nn.Module) -> None:
    """Let recurrent layers of `decoder` keep to the runs of a packed row, given as `rows` with the other arguments."""
    for module in list(decoder.modules()):
        # The logarithm of how fast a state fades.
        if hasattr(module, "A_log"):
            module.forward = partial(_forward, module.forward)


def _forward(own: Callable[..., Tensor], hidden_states: Tensor, *, rows: Rows, **_: Any) -> Tensor:
    """The layer over one packed row, hidden_states [1, T, H]."""
    x_TH = hidden_states.squeeze(0)
    outputs = [own(Repeated.apply(x_TH, index_SL.flatten()).unflatten(0, index_SL.shape)) for index_SL in rows.rows_SL]
    return torch.cat([output_SLH.flatten(0, 1) for output_SLH in outputs]).index_select(0, rows.back_T)[None]
