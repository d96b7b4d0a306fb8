"""The recurrence of Mamba-2 (arXiv 2405.21060) in chunks, computed again for its gradients, so that it keeps its inputs
alone.

With a step d_t > 0 and A < 0 of each head, state S [N, P] and the token's x [P], b and c [N] (section 6, algorithm 1):

    S_t = exp(d_t A) S_{t-1} + d_t b_t x_t^T        y_t = S_t^T c_t + D x_t

In a chunk that begins with S, with G = cumsum(d A) and F_ij = exp(G_i - G_j) for j <= i:

    y = (c b^T * F * d) x + exp(G) c S + D x        and it adds (exp(G_C - G) d b)^T x to exp(G_C) S

In plain torch the state before each chunk is the sum of what those before it add, faded: one product for all chunks.
`mamba2_forward_triton` and `mamba2_backward_triton` have both passes for bfloat16 on a GPU, with states that go from
chunk to chunk; plain torch is for all else, and their oracle.

Shapes: B rows of J chunks of C tokens, M = J + 1; G groups of R heads that have b and c in common; P columns of a head,
N of a state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, softplus
from torch.utils.checkpoint import checkpoint

from fastgrpo.kernels.backend import triton_runs
from fastgrpo.kernels.chunks import fading, in_chunks, whole_chunks

# Elements of the rows that are computed together, in whole chunks: what their backward works with is bounded so.
TOGETHER = 2**25


def mamba2(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    dt_bias: Tensor,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs [B, L, H, P] of rows, and the state [B, H, N, P] after each row's last token; both fp32, as computed.

    x: [B, L, H, P]; dt: [B, L, H], whose softplus after adding dt_bias [H] is the step, kept within dt_limit, or 0
    where dt is -inf, as after the end of a row shorter than L: such a token leaves the state as it is;
    a: [H], below 0; b, c: [B, L, G, N], heads in G groups; d: [H]; initial_state: [B, H, N, P], fp32, zeros if None.
    """
    if x.dtype == b.dtype == c.dtype == torch.bfloat16 and triton_runs(x.device):
        if initial_state is None:
            initial_state = x.new_zeros(len(x), x.shape[2], b.shape[-1], x.shape[-1], dtype=torch.float32)
        results: tuple[Tensor, Tensor] = _Kernels.apply(x, dt, a, b, c, d, dt_bias, initial_state, dt_limit)
        return results
    count = _together(x)
    given = [each.split(count) for each in (x, dt, b, c)]
    states = [None] * len(given[0]) if initial_state is None else initial_state.split(count)
    parts = [
        checkpoint(_rows, *part, a, d, dt_bias, dt_limit, use_reentrant=False, preserve_rng_state=False)
        for part in zip(*given, states, strict=True)
    ]
    outputs, last = zip(*parts, strict=True)
    return torch.cat(outputs), torch.cat(last)


def _together(x: Tensor) -> int:
    """Rows that are computed together."""
    return max(1, TOGETHER // (whole_chunks(x.shape[1]) * x[0, 0].numel()))


class _Kernels(torch.autograd.Function):
    """Both passes in Triton, some rows after the others; arguments and results as those of `mamba2`."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        from fastgrpo.kernels import mamba2_forward_triton

        x, dt, a, b, c, d, dt_bias, initial_state, ctx.dt_limit = given
        # Kernels take the numbers of heads as one after another.
        a, d, dt_bias = (each.contiguous() for each in (a, d, dt_bias))
        output = x.new_empty(x.shape, dtype=torch.float32)
        final_state = torch.empty_like(initial_state, memory_format=torch.contiguous_format)
        split = (each.split(_together(x)) for each in (x, dt, b, c, output, initial_state, final_state))
        for of_x, of_dt, of_b, of_c, *results in zip(*split, strict=True):
            mamba2_forward_triton.forward((of_x, of_dt, a, of_b, of_c, d, dt_bias), ctx.dt_limit, *results)
        ctx.save_for_backward(x, dt, a, b, c, d, dt_bias, initial_state)
        return output, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        from fastgrpo.kernels import mamba2_backward_triton

        x, dt, a, b, c, d, dt_bias, initial_state = ctx.saved_tensors
        rows = x, dt, b, c, initial_state
        d_x, d_dt, d_b, d_c, d_initial = d_rows = [
            torch.empty_like(each, memory_format=torch.contiguous_format) for each in rows
        ]
        d_a, d_d, d_bias = sums = [torch.zeros_like(each, dtype=torch.float32) for each in (a, d, dt_bias)]
        split = (each.split(_together(x)) for each in (d_output, d_final, *rows, *d_rows))
        for of_output, of_final, *of_rows in zip(*split, strict=True):
            (of_x, of_dt, of_b, of_c, initial), (to_x, to_dt, to_b, to_c, to_initial) = of_rows[:5], of_rows[5:]
            inputs, gradients = (of_x, of_dt, a, of_b, of_c, d, dt_bias), (to_x, to_dt, d_a, to_b, to_c, d_d, d_bias)
            mamba2_backward_triton.backward(of_output, of_final, inputs, ctx.dt_limit, initial, gradients, to_initial)
        d_a, d_d, d_bias = (given.to(like.dtype) for given, like in zip(sums, (a, d, dt_bias), strict=True))
        return d_x, d_dt, d_a, d_b, d_c, d_d, d_bias, d_initial, None


def _rows(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    initial_state: Tensor | None,
    a: Tensor,
    d: Tensor,
    dt_bias: Tensor,
    dt_limit: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Rows that are computed together; arguments and results as those of `mamba2`."""
    length, heads, groups = *x.shape[1:3], b.shape[2]
    step_BLH = softplus(dt.float() + dt_bias.float()).clamp(*dt_limit).masked_fill(dt == -torch.inf, 0)
    x_BJGRCP = in_chunks(x.float()).unflatten(2, (groups, -1))
    step_BJGRC = in_chunks(step_BLH).unflatten(2, (groups, -1))
    b_BJGCN, c_BJGCN = in_chunks(b.float()), in_chunks(c.float())
    # In fp32 a difference of two long sums, where states fade fast, keeps few digits.
    g_BJGRC = (step_BJGRC * a.float().unflatten(0, (groups, -1))[..., None]).cumsum(-1, dtype=torch.float64)
    within_BJGRCC = (c_BJGCN @ b_BJGCN.mT)[:, :, :, None] * fading(g_BJGRC, g_BJGRC) * step_BJGRC[..., None, :]
    output_BJGRCP = within_BJGRCC @ x_BJGRCP
    until_end_BJGRC = (g_BJGRC[..., -1:] - g_BJGRC).float().exp()
    added_BJGRNP = b_BJGCN.mT[:, :, :, None] @ (x_BJGRCP * (step_BJGRC * until_end_BJGRC)[..., None])
    states_BMGRNP = _states(added_BJGRNP, g_BJGRC[..., -1], initial_state)
    output_BJGRCP = output_BJGRCP + (c_BJGCN[:, :, :, None] @ states_BMGRNP[:, :-1]) * g_BJGRC.float().exp()[..., None]
    output_BLHP = output_BJGRCP.movedim(4, 2).reshape(len(x), -1, heads, x.shape[-1])
    return output_BLHP[:, :length] + x.float() * d.float()[:, None], states_BMGRNP[:, -1].flatten(1, 2)


def _states(added_BJGRNP: Tensor, fades_BJGR: Tensor, initial_BHNP: Tensor | None) -> Tensor:
    """The state before each chunk and after the last, of what each adds and the logarithm of what each leaves."""
    faded_BGRJ = fades_BJGR.movedim(1, -1).cumsum(-1)
    before_BGRM = pad(faded_BGRJ, (1, 0))
    of_earlier_BGRMJ = fading(before_BGRM, faded_BGRJ, own=False)
    states_BGRMx = of_earlier_BGRMJ @ added_BJGRNP.movedim(1, 3).flatten(-2)
    if initial_BHNP is not None:
        initial_BGR1x = initial_BHNP.unflatten(1, faded_BGRJ.shape[1:3]).flatten(3)[..., None, :]
        states_BGRMx = states_BGRMx + before_BGRM.float().exp()[..., None] * initial_BGR1x
    return states_BGRMx.unflatten(-1, added_BJGRNP.shape[-2:]).movedim(3, 1)
