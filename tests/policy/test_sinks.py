"""Attention sinks through flash attention, which has none: what it keeps for its backward is made that with a sink."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastgrpo.policy import packed_attention as packed
from fastgrpo.policy.packed_attention import Scores, packed_attention

QUERIES, KEYS = (7, 1, 12), (7, 10, 20)
HEADS, GROUPS, WIDTH = 4, 2, 8


def flash_forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What a kernel computes: the output and the logs of the sums of exponentials."""
    scores_HQK = _scores(query, key, mask, scale)
    lse_HT = scores_HQK.logsumexp(-1)
    return ((scores_HQK - lse_HT[..., None]).exp() @ _heads(value)).transpose(0, 1).contiguous(), lse_HT


def flash_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """What a kernel computes of what was kept."""
    query, key, value, output, lse_HT, mask = ctx.saved_tensors
    share_HQK = (_scores(query, key, mask, ctx.scale) - lse_HT[..., None]).exp()
    grad_HQD = grad.transpose(0, 1)
    along_HQ1 = (output * grad).sum(-1).T[..., None]
    dscores_HQK = share_HQK * (grad_HQD @ _heads(value).mT - along_HQ1) * ctx.scale
    dquery = (dscores_HQK @ _heads(key)).transpose(0, 1)
    dkey, dvalue = (_groups(x.mT @ y) for x, y in ((dscores_HQK, query.transpose(0, 1)), (share_HQK, grad_HQD)))
    return dquery, dkey, dvalue, None, None


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *heads, mask, ctx.scale = inputs
    ctx.save_for_backward(*heads, *output, mask)


class FlashAttention(torch.autograd.Function):
    """As flash-attn's are."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        found = flash_forward(*inputs)
        keep(ctx, inputs, found)
        return found

    backward = staticmethod(flash_backward)


# As torch's own is.
operator = torch.library.custom_op("fastgrpo_test::varlen", flash_forward, mutates_args=())
operator.register_autograd(flash_backward, setup_context=keep)


def _heads(x_UGD: Tensor) -> Tensor:
    return x_UGD.transpose(0, 1).repeat_interleave(HEADS // GROUPS, 0)


def _groups(x_HUD: Tensor) -> Tensor:
    return x_HUD.unflatten(0, (GROUPS, HEADS // GROUPS)).sum(1).transpose(0, 1)


def _scores(query: Tensor, key: Tensor, mask: Tensor, scale: float) -> Tensor:
    return (query.transpose(0, 1) @ _heads(key).mT * scale).masked_fill(~mask, -torch.inf)


def _mask(window: tuple[int, int]) -> Tensor:
    scores = Scores(1.0, None if window[0] < 0 else window[0] + 1, None)
    return torch.block_diag(*(scores.mask(q, k, torch.device("cpu")) for q, k in zip(QUERIES, KEYS, strict=True)))


def flash_attn_2(q: Tensor, k: Tensor, v: Tensor, *_: Any, return_attn_probs: bool = False, **options: Any) -> Any:
    assert options["causal"]
    found = FlashAttention.apply(q, k, v, _mask(options["window_size"]).bool(), options["softmax_scale"])
    return (*found, None) if return_attn_probs else found[0]


def flash_attn_3_at_first(q: Tensor, k: Tensor, v: Tensor, *_: Any, **options: Any) -> Any:
    return flash_attn_2(q, k, v, return_attn_probs=True, **options)[:2]


def torch_varlen(q: Tensor, k: Tensor, v: Tensor, *_: Any, return_aux: Any = None, **options: Any) -> Any:
    found = operator(q, k, v, _mask(options["window_size"]).bool(), options["scale"])
    return found if return_aux is not None and return_aux.lse else found[0]


class Row(NamedTuple):
    """Runs over prompts of other lengths, and the sinks."""

    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor

    @staticmethod
    def drawn(device: str = "cpu", dtype: torch.dtype = torch.float32, width: int = WIDTH) -> "Row":
        torch.manual_seed(0)
        shapes = (sum(QUERIES), HEADS, width), (sum(KEYS), GROUPS, width), (sum(KEYS), GROUPS, width), (HEADS,)
        return Row(*(torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes))

    def attended(self, window: int | None) -> Tensor:
        """By `packed_attention`, [T, H, D]."""
        heads = (x.transpose(0, 1)[None] for x in self[:3])
        options: dict[str, Any] = {"sliding_window": window, "s_aux": self.sinks}
        for name, lengths in (("q", QUERIES), ("k", KEYS)):
            bounds = torch.tensor([0, *lengths], device=self.query.device).cumsum(0).int()
            options |= {f"cu_seq_lens_{name}": bounds, f"max_length_{name}": max(lengths)}
        return packed_attention(torch.nn.Identity(), *heads, None, **options)[0][0]

    def gradients(self, output: Tensor) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        wanted = torch.randn(output.shape, generator=generator).to(output)
        return list(torch.autograd.grad(output, self, wanted))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("function", [flash_attn_2, flash_attn_3_at_first, torch_varlen])
def test_flash_attention_with_a_sink_is_that_of_scores(
    function: Any, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Row.drawn()
    expected = row.attended(window)
    scores = Scores(WIDTH**-0.5, window, None, row.sinks)
    boundaries: Any = (None, None, max(QUERIES), max(KEYS))
    if function is torch_varlen:
        monkeypatch.setattr(packed, "varlen_attn", torch_varlen)
        monkeypatch.setattr(packed, "VARLEN_OPTIONS", {"window_size", "scale"})

    def attended(*heads: Tensor) -> Tensor:
        if function is torch_varlen:
            return packed._torch_varlen(*heads, boundaries, scores)
        return packed._flash(function, *heads, boundaries, scores)

    for output in (attended(*row[:3]), checkpoint(attended, *row[:3], use_reentrant=False)):
        torch.testing.assert_close(output, expected)
        for found, wanted in zip(row.gradients(output), row.gradients(row.attended(window)), strict=True):
            torch.testing.assert_close(found, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("installed", [True, False])
def test_a_gpus_attention_with_a_sink_is_that_of_scores(
    installed: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By flash-attn where it is installed, and by torch's own function."""
    if not installed:
        monkeypatch.setattr(packed, "_flash_attention", lambda device: None)
    row = Row.drawn("cuda", torch.bfloat16, 64)
    exact = Row(*(x.detach().float().requires_grad_() for x in row))  # in fp32 by scores
    output, expected = row.attended(window), exact.attended(window)
    assert (output - expected).norm() < 0.01 * expected.norm()
    for found, wanted in zip(row.gradients(output), exact.gradients(expected), strict=True):
        assert (found - wanted).norm() < 0.02 * wanted.norm()
