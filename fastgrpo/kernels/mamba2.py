"""The recurrence of Mamba-2 (arXiv 2405.21060) in chunks, computed again for its gradients, so that it keeps its inputs
alone.

With a step d_t > 0 and A < 0 of each head, state S [N, P] and the token's x [P], b and c [N] (section 6, algorithm 1):

    S_t = exp(d_t A) S_{t-1} + d_t b_t x_t^T        y_t = S_t^T c_t + D x_t

In a chunk that begins with S, with G = cumsum(d A) and F_ij = exp(G_i - G_j) for j <= i:

    y = (c b^T * F * d) x + exp(G) c S + D x        and it adds (exp(G_C - G) d b)^T x to exp(G_C) S

The state before each chunk is the sum of what those before it add, faded: one product for all chunks.

Shapes: B rows of J chunks of C tokens, M = J + 1; G groups of R heads that have b and c in common; P columns of a head,
N of a state.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus
from torch.utils.checkpoint import checkpoint

from fastgrpo.kernels.chunks import fading, in_chunks

# Elements of the rows that are computed together, in fp32: what their backward works with is bounded so.
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
    count = max(1, TOGETHER // x[0].numel())
    given = [each.split(count) for each in (x, dt, b, c)]
    states = [None] * len(given[0]) if initial_state is None else initial_state.split(count)
    parts = [
        checkpoint(_rows, *part, a, d, dt_bias, dt_limit, use_reentrant=False, preserve_rng_state=False)
        for part in zip(*given, states, strict=True)
    ]
    outputs, last = zip(*parts, strict=True)
    return torch.cat(outputs), torch.cat(last)


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
