"""Rollout routing replay (R3, arXiv 2510.11370): a mixture's tokens go to the experts that vLLM chose as it sampled.

Of a token x whose scores are s(x), and of which vLLM chose the experts R, a layer computes

    sum_{e in R} g_e expert_e(x),   g = what the model makes of the scores s_e(x), e in R

where without replay R are the experts of the trainer's own largest scores (with a bias, by groups, as the model has
it). Scores and their gradient are the trainer's; no gradient reached a choice before either.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastgrpo.kernels.experts import Replay, replayed
from fastgrpo.policy.experts import is_of_experts
from fastgrpo.types import RoutingReplay


def let_replay(model: nn.Module) -> None:
    """Let the mixtures of `model`, of whatever kind, take experts from `replay`; until then nothing changes.

    Before their `forward` is wrapped by what computes it anew in backward.
    """
    for module in model.modules():
        experts = getattr(module, "experts", None)
        weights = list(experts.parameters()) if isinstance(experts, nn.Module) else []
        if weights and is_of_experts(weights[0]):
            block: Any = module
            block.replay = None
            block.forward = partial(_forward, block, block.forward, len(weights[0]))


def replay(model: nn.Module, routes: RoutingReplay | None) -> None:
    """The experts of the next forward pass, and of what backward computes anew of it; None: each layer's own choice.

    Raises ValueError where `routes` are not of as many layers as choose.
    """
    blocks: list[Any] = [module for module in model.modules() if "replay" in vars(module)]
    if routes is not None and routes.experts_TLK.shape[1] != len(blocks):
        raise ValueError(f"routes of {routes.experts_TLK.shape[1]} layers for a model of {len(blocks)} mixtures")
    for layer, block in enumerate(blocks):
        block.replay = routes and Replay(routes.experts_TLK[:, layer], routes.counts_2)


def _forward(block: Any, own: Callable[..., Any], experts: int, *inputs: Any, **options: Any) -> Any:
    if block.replay is None:
        return own(*inputs, **options)
    with _Choosing(block.replay, experts):
        return own(*inputs, **options)


_CHOOSE, _CUT = (torch.topk, Tensor.topk), (torch.masked_fill, Tensor.masked_fill)


class _Choosing(TorchFunctionMode):
    """In the block the largest of T tokens' scores for `experts` are those that `replay` names.

    All kinds of routers choose by one `topk` over [T, E], those in groups after others of other shapes, and read the
    weights at the ids that it returns or take its values. These are of the scores before the best groups are cut out
    (`masked_fill`): vLLM's may have been others.
    """

    def __init__(self, replay: Replay, experts: int) -> None:
        super().__init__()
        self._replay, self._experts = replay, experts
        self._cut: tuple[Tensor, Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        if func not in _CHOOSE + _CUT or args[0].ndim != 2 or args[0].shape[1] != self._experts:
            return answer
        score_TE: Tensor = args[0]
        if func in _CUT:
            self._cut = answer, score_TE
            return answer
        if self._cut is not None and self._cut[0] is score_TE:
            score_TE = self._cut[1]
        chosen_TK = replayed(answer.indices, self._replay)
        return torch.return_types.topk((score_TE.gather(1, chosen_TK), chosen_TK))
