"""A mixture's experts, of which transformers keeps a layer's as one tensor [E, ., .], and files each one's weights."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

# Of a tensor of all experts: what files have of each, by rows.
PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def is_of_experts(weight: Tensor) -> bool:
    """Whether it holds all experts of a layer: nothing else that is trained has three dimensions."""
    return weight.ndim == 3


def names_in_files(name: str, experts: int) -> list[list[str]]:
    """The names of each expert's parts where `name` is that of `experts` in one tensor, else none."""
    layer, found, whole = name.rpartition(".experts.")
    if not found:
        return []
    return [[f"{layer}.experts.{number}.{part}.weight" for part in PARTS[whole]] for number in range(experts)]


def of_each_expert(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The weight by the names of files: of a layer's experts the rows of each one's, in the same memory."""
    experts = names_in_files(name, len(weight)) if is_of_experts(weight) else []
    if not experts:
        yield name, weight
        return
    for names, rows in zip(experts, weight, strict=True):
        yield from zip(names, rows.chunk(len(names)), strict=True)
