"""The gated delta rule in plain torch, for a CPU, and the oracle of its kernels; `delta_rule.py` has the formulas.

Three operations go from chunk to chunk forward, and as many backward; all else is products of all chunks at once.

Shapes: N chunks of C tokens, X = B H heads of all rows; K columns of a key, V of a value. M = N + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrpo.kernels.chunks import CHUNK, fading, in_chunks

# Added to the squared length of a key or a query, as flash-linear-attention and transformers do.
EPS = 1e-6


@dataclass(frozen=True, slots=True)
class _Chunks:
    """Rows in chunks, in fp32, with keys and queries scaled, and how states fade in a chunk."""

    query_NXCK: Tensor
    key_NXCK: Tensor
    value_NXCV: Tensor
    beta_NXC1: Tensor
    query_scale_NXC1: Tensor
    key_scale_NXC1: Tensor
    fade_NXCC: Tensor  # D
    since_start_NXC1: Tensor  # exp(G)
    until_end_NXC1: Tensor  # exp(G_C - G)

    @property
    def whole_NX11(self) -> Tensor:
        """exp(G_C): what remains of a state after the chunk."""
        return self.since_start_NXC1[..., -1:, :]

    def reading_keys(self) -> Tensor:
        """What reads the chunk's first state, exp(G) b k, [N, X, C, K]."""
        return self.key_NXCK * (self.since_start_NXC1 * self.beta_NXC1)

    def attention(self) -> Tensor:
        """What a token's output takes of its chunk's new values, [N, X, C, C]."""
        return (self.query_NXCK @ self.key_NXCK.mT).mul_(self.fade_NXCC)

    def products(self) -> Tensor:
        """T^-1 below its diagonal, [N, X, C, C]; on and above it other numbers."""
        return ((self.key_NXCK * self.beta_NXC1) @ self.key_NXCK.mT).mul_(self.fade_NXCC)


def forward(inputs: Sequence[Tensor], output: Tensor, initial_state: Tensor, final_state: Tensor) -> tuple[Tensor, ...]:
    """Writes the results of `gated_delta_rule`, of which `inputs` and `initial_state` are the arguments, in fp32.

    What `backward` needs besides comes back: T and the states.
    """
    chunks = _chunks(*inputs)
    inverse_NXCC = _inverse(chunks)
    written_NXCV, states_MXKV = _states(chunks, inverse_NXCC, initial_state.flatten(0, 1))
    output_NXCV = chunks.attention() @ written_NXCV
    output_NXCV += (chunks.query_NXCK * chunks.since_start_NXC1) @ states_MXKV[:-1]
    _write_rows(output_NXCV, output)
    final_state.copy_(states_MXKV[-1].view(final_state.shape))
    return inverse_NXCC, states_MXKV


def backward(
    d_output: Tensor,
    inputs: Sequence[Tensor],
    kept: Sequence[Tensor],
    gradients: Sequence[Tensor],
    d_final: Tensor,
    d_initial: Tensor,
) -> None:
    """Writes the `gradients` of `inputs` and that of the initial state, arguments of `forward`, which gave `kept`.

    d_output, d_final: the gradients of what it wrote.
    """
    inverse_NXCC, states_MXKV = kept
    chunks, d_output_NXCV = _chunks(*inputs), _in_chunks(d_output)
    reading_NXCK = chunks.reading_keys()
    written_NXCV = (chunks.value_NXCV * chunks.beta_NXC1).sub_(reading_NXCK @ states_MXKV[:-1])
    written_NXCV = inverse_NXCC @ written_NXCV
    reading_NXCK = inverse_NXCC @ reading_NXCK
    d_written_NXCV, d_states_MXKV = _d_states(chunks, reading_NXCK, d_output_NXCV, d_final.flatten(0, 1))
    del reading_NXCK
    d_initial.copy_(d_states_MXKV[0].view(d_initial.shape))
    d_betas_value_NXCV = inverse_NXCC.mT @ d_written_NXCV
    del d_written_NXCV
    found = _d_inputs(chunks, states_MXKV, d_states_MXKV, written_NXCV, d_betas_value_NXCV, d_output_NXCV)
    for chunked, gradient in zip(found, gradients, strict=True):
        _write_rows(chunked, gradient)


def _in_chunks(given: Tensor) -> Tensor:
    """[B, L, H, ...] as chunks in fp32, [N, B H, C, ...], zeros after the last token."""
    return in_chunks(given).movedim(1, 0).to(torch.float32, memory_format=torch.contiguous_format).flatten(1, 2)


def _write_rows(chunks: Tensor, rows: Tensor) -> None:
    """Chunks into rows [B, L, H, ...], in the type of these."""
    given = chunks.unflatten(1, (rows.shape[0], -1)).movedim(2, 3).movedim(0, 1)
    whole, rest = divmod(rows.shape[1], CHUNK)
    rows[:, : whole * CHUNK].unflatten(1, (whole, CHUNK)).copy_(given[:, :whole])
    if rest:
        rows[:, whole * CHUNK :].copy_(given[:, whole, :rest])


def _chunks(*inputs: Tensor) -> _Chunks:
    query, key, value, g, beta = (_in_chunks(given) for given in inputs)
    query_scale, key_scale = (x.square().sum(-1, keepdim=True).add_(EPS).rsqrt_() for x in (query, key))
    query_scale *= query.shape[-1] ** -0.5
    # In fp32 a difference of two long sums, where states fade fast, keeps few digits.
    g_NXC = g.cumsum(-1, dtype=torch.float64)
    fade_NXCC = fading(g_NXC, g_NXC)
    columns = g_NXC.float().exp_()[..., None], fade_NXCC[..., -1, :, None]
    scaled = query * query_scale, key * key_scale
    return _Chunks(*scaled, value, beta[..., None], query_scale, key_scale, fade_NXCC, *columns)


def _inverse(chunks: _Chunks) -> Tensor:
    """T of each chunk, [N, X, C, C]."""
    products_NXCC = chunks.products()
    identity = torch.eye(CHUNK, device=products_NXCC.device).expand_as(products_NXCC)
    # The diagonal is taken for ones.
    return torch.linalg.solve_triangular(products_NXCC, identity, upper=False, unitriangular=True)


def _states(chunks: _Chunks, inverse_NXCC: Tensor, initial_XKV: Tensor) -> tuple[Tensor, Tensor]:
    """What each token writes, [N, X, C, V]; and the state before each chunk and after the last, [N + 1, X, K, V]."""
    reading_NXCK = inverse_NXCC @ chunks.reading_keys()
    written_NXCV = inverse_NXCC @ (chunks.value_NXCV * chunks.beta_NXC1)
    writing_NXCK = chunks.key_NXCK * chunks.until_end_NXC1
    count, heads, _, columns = reading_NXCK.shape
    states_MXKV = reading_NXCK.new_empty(count + 1, heads, columns, written_NXCV.shape[-1])
    states_MXKV[0] = initial_XKV
    for chunk, whole_X11 in enumerate(chunks.whole_NX11):
        written_NXCV[chunk].baddbmm_(reading_NXCK[chunk], states_MXKV[chunk], alpha=-1)
        torch.mul(states_MXKV[chunk], whole_X11, out=states_MXKV[chunk + 1])
        states_MXKV[chunk + 1].baddbmm_(writing_NXCK[chunk].mT, written_NXCV[chunk])
    return written_NXCV, states_MXKV


def _d_states(
    chunks: _Chunks, reading_NXCK: Tensor, d_output_NXCV: Tensor, d_final_XKV: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of what `_states` returns, by way of outputs and of later chunks; `reading_NXCK` as there."""
    d_written_NXCV = chunks.attention().mT @ d_output_NXCV
    count, heads, _, columns = reading_NXCK.shape
    d_states_MXKV = reading_NXCK.new_empty(count + 1, heads, columns, d_output_NXCV.shape[-1])
    d_states_MXKV[-1] = d_final_XKV
    faded_NXCK = chunks.query_NXCK * chunks.since_start_NXC1
    torch.matmul(faded_NXCK.mT, d_output_NXCV, out=d_states_MXKV[:-1])
    writing_NXCK = torch.mul(chunks.key_NXCK, chunks.until_end_NXC1, out=faded_NXCK)
    for chunk in reversed(range(count)):
        d_written_NXCV[chunk].baddbmm_(writing_NXCK[chunk], d_states_MXKV[chunk + 1])
        d_states_MXKV[chunk].addcmul_(d_states_MXKV[chunk + 1], chunks.whole_NX11[chunk])
        d_states_MXKV[chunk].baddbmm_(reading_NXCK[chunk].mT, d_written_NXCV[chunk], alpha=-1)
    return d_written_NXCV, d_states_MXKV


def _d_inputs(
    chunks: _Chunks,
    states_MXKV: Tensor,
    d_states_MXKV: Tensor,
    written_NXCV: Tensor,
    d_betas_value_NXCV: Tensor,
    d_output_NXCV: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, g and beta, in chunks; `d_betas_value_NXCV` is the gradient of b v.

    The gradient of T^-1 is -T^T dT T^T, and with dT = dN (b v - exp(G) b k S)^T that is -d(b v) N^T.
    """
    query, key, value, beta = chunks.query_NXCK, chunks.key_NXCK, chunks.value_NXCV, chunks.beta_NXC1
    d_query = (d_output_NXCV @ states_MXKV[:-1].mT).mul_(chunks.since_start_NXC1)
    d_betas_key = (d_betas_value_NXCV @ states_MXKV[:-1].mT).mul_(-chunks.since_start_NXC1)
    d_key = (written_NXCV @ d_states_MXKV[1:].mT).mul_(chunks.until_end_NXC1)
    reads_NXC = _dot(d_query, query) + beta.squeeze(-1) * _dot(d_betas_key, key)
    d_whole_NX = (states_MXKV[:-1] * d_states_MXKV[1:]).sum((-2, -1)) * chunks.whole_NX11[..., 0, 0]
    d_attention_NXCC = d_output_NXCV @ written_NXCV.mT
    d_products_NXCC = (d_betas_value_NXCV @ written_NXCV.mT).neg_()
    faded_NXCC = d_attention_NXCC * chunks.attention() + d_products_NXCC * chunks.products()
    d_g_NXC = _d_g(reads_NXC, _dot(d_key, key), d_whole_NX, faded_NXCC)
    d_attention_NXCC *= chunks.fade_NXCC
    d_products_NXCC.mul_(chunks.fade_NXCC).tril_(-1)
    d_query += d_attention_NXCC @ key
    d_betas_key += d_products_NXCC @ key
    d_key += d_attention_NXCC.mT @ query
    d_key += d_products_NXCC.mT @ (key * beta)
    d_beta = _dot(d_betas_value_NXCV, value) + _dot(d_betas_key, key)
    d_key += d_betas_key.mul_(beta)
    # Of a vector that is divided by its length only the part across it has a gradient.
    d_key -= key * _dot(d_key, key)[..., None]
    d_query -= query * (_dot(d_query, query)[..., None] * query.shape[-1])
    scaled = d_query.mul_(chunks.query_scale_NXC1), d_key.mul_(chunks.key_scale_NXC1)
    return *scaled, d_betas_value_NXCV * beta, d_g_NXC, d_beta


def _d_g(reads_NXC: Tensor, writes_NXC: Tensor, d_whole_NX: Tensor, faded_NXCC: Tensor) -> Tensor:
    """The gradient of g, [N, X, C]: of what fades at a token all that comes from before it and is used from it on.

    Given are the gradients' products with what fades: with what tokens read of the chunk's first state, with what they
    write into its last one, with all of the first state that reaches the last, and, [..., i, j], with what token i
    takes of token j. G's gradient, summed from the end, is the same; where states fade fast it is the small difference
    of large numbers.
    """
    d_g_NXC = reads_NXC.flip(-1).cumsum(-1).flip(-1) + d_whole_NX[..., None]
    across_NXCC = faded_NXCC.cumsum(-1).tril_(-1)
    d_g_NXC[..., 1:] += across_NXCC.sum(-2)[..., :-1] + writes_NXC.cumsum(-1)[..., :-1]
    return d_g_NXC


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)
