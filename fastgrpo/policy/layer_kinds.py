"""Which layers of a model carry a state from token to token, and how wide they are, by its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

# Kinds of `layer_types` whose layers have such a state, and those that have keys and values; "hybrid" has both.
RECURRENT_LAYERS = frozenset({"linear_attention", "mamba", "hybrid"})
KEYED_LAYERS = frozenset({"full_attention", "sliding_attention", "attention", "hybrid"})
# A row of a recurrent layer is at least as long as this share of the longest that it is laid out with.
SIMILAR = 0.75


@dataclass(frozen=True, slots=True)
class Widths:
    """Columns of a recurrent layer: those of its values, those that are convolved; and the elements of its state.

    before: tokens before its own that the convolution reads.
    delta_rule: whether its rule is that of `kernels/delta_rule.py`, else that of `kernels/mamba2.py`.
    """

    values: int
    convolved: int
    state: int
    before: int
    delta_rule: bool


def widths(config: PretrainedConfig) -> Widths | None:
    """Those of the model's recurrent layers, None where it has none."""
    text = config.get_text_config()
    if not is_recurrent(text):
        return None
    names = ("linear_conv_kernel_dim", "mamba_d_conv", "conv_kernel")
    before = next(value for name in names if (value := getattr(text, name, None))) - 1
    if hasattr(text, "linear_num_value_heads"):
        keys = text.linear_num_key_heads * text.linear_key_head_dim
        values = text.linear_num_value_heads * text.linear_value_head_dim
        return Widths(values, values + 2 * keys, values * text.linear_key_head_dim, before, delta_rule=True)
    heads, size, state, groups = (
        next(value for name in names if (value := getattr(text, name, None)))
        for names in (
            ("mamba_n_heads", "mamba_num_heads"),
            ("mamba_d_head", "mamba_head_dim"),
            ("mamba_d_state", "ssm_state_size"),
            ("mamba_n_groups", "n_groups"),
        )
    )
    return Widths(heads * size, heads * size + 2 * groups * state, heads * size * state, before, delta_rule=False)


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
