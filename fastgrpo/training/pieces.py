"""How work is cut: sizes of the optimizer's pieces and buckets, which the memory plan counts too, and `partition`."""

from __future__ import annotations

from collections.abc import Sequence

# Of the optimizer's offloaded state, on the device at once.
PIECE_ELEMENTS = 32 * 2**20
# Of gradients, or of parameters that are gathered together.
BUCKET_ELEMENTS = 32 * 2**20
BUCKETS_IN_FLIGHT = 2


def partition(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices grouped by first-fit decreasing, each group at most `budget` tokens; a longer sequence stands alone.

    First-fit decreasing needs at most 11/9 of the fewest possible groups. Ties keep the input's order.
    Raises ValueError for a budget below one token.
    """
    if budget < 1:
        raise ValueError(f"budget must be at least 1 token, got {budget}")
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        need = lengths[index]
        fit = next((g for g, free in enumerate(room) if free >= need), None)
        if fit is None:
            groups.append([index])
            room.append(budget - need)
        else:
            groups[fit].append(index)
            room[fit] -= need
    return groups
