"""NT-Xent in row blocks. l_i = -log(exp(s_ip) / sum_{k!=i} exp(s_ik)), s = z z^T / t. Chen et al. 2020, Eq. 1.

The similarities are symmetric, so a block of B rows meets only the columns from its first row on: its row sums serve
its own rows, its column sums the later ones. With N_i the sum of exp(s_ij) over the negatives j of row i,
    loss_i   = log(1 + N_i / exp(s_ip)),    lse_i = log(N_i + exp(s_ip)),    q_i = 1 - exp(s_ip - lse_i)
    dL/dz_i  = (1 / (M t)) (sum_{j != i, p} (exp(s_ij - lse_i) + exp(s_ij - lse_j)) z_j - (q_i + q_p) z_p)
where no term cancels as the loss goes to 0. s is kept less 1/t, its largest value, which changes no result.
"""

# M rows, both views    N = M / 2 images    D dimensions    B rows of a block    C columns from the block's first row on

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Scaling = Literal["paper", "google"]

BLOCK_ELEMENTS, BLOCK_ELEMENTS_ELSEWHERE = 2**18, 2**26
"""Similarities held at once when the caller names no block size: 1 MiB of float32, which a CPU core's cache holds; 256
MiB on other devices, where few launches matter more."""

MINIMUM_ROWS = 64
"""Fewer rows a block leave the matrix product short of work, whatever the cache holds."""

FIXED_MAXIMUM_TEMPERATURE = 0.025
"""From here up exp(-2/t) >= exp(-80) is a normal float32, so 1/t serves as the maximum of every row."""


class NtXent(NamedTuple):
    """The loss and how well the positives rank, as 0-dim tensors on the device of the projections.

    loss: float32 (float64 for float64 projections), with gradient.
    top1, top5: float32, no gradient: the fraction of rows with no, or fewer than five, negatives that are at least as
    similar as the positive. Ties count against it, so that collapsed projections do not look perfect.
    """

    loss: Tensor
    top1: Tensor
    top5: Tensor


def nt_xent_reference(
    x: Tensor, temperature: float, *, scaling: Scaling = "paper", block_rows: int | None = None
) -> NtXent:
    """NT-Xent in torch operations: the test oracle, the CPU path and the baseline of the fused kernels.

    x: [2N, D] float, rows n and n + N a pair; half precision is worked on in float32, also under autocast, and the
    gradient comes back in x's dtype. Memory is O(2N * block_rows + 2N * D). The gradient is not differentiable again.

    Edge cases: a zero row stays zero and gets no gradient. NaN, infinity or a norm that overflows in any row make the
    loss and the gradient NaN. With a single pair there is no negative: the loss and the gradient are 0.
    Raises ValueError for a wrong shape, dtype, temperature, scaling or block size.
    """
    if x.dim() != 2 or x.shape[0] < 2 or x.shape[0] % 2 or x.shape[1] == 0:
        raise ValueError(f"x has shape {list(x.shape)}, not [2N, D] with N, D >= 1; stack the two views with torch.cat")
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}, which is not a floating type; use x.float()")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} is not above 0 and finite; SimCLR uses .05 to 1")
    if scaling not in get_args(Scaling):
        raise ValueError(f"scaling={scaling!r} is unknown; use 'paper' or 'google'")
    if block_rows is not None and block_rows < 1:
        raise ValueError(f"block_rows={block_rows} is below 1; use None to choose it by memory")
    elements = BLOCK_ELEMENTS if x.device.type == "cpu" else BLOCK_ELEMENTS_ELSEWHERE
    rows = block_rows or max(MINIMUM_ROWS, elements // x.shape[0])
    x = x if x.dtype == torch.float64 else x.float()
    loss, top1, top5 = _NtXent.apply(x, float(temperature), 2.0 if scaling == "google" else 1.0, rows)
    return NtXent(loss, top1, top5)


class _NtXent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, temperature: float, scale: float, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        m, n = x_MD.shape[0], x_MD.shape[0] // 2
        norm_M = torch.linalg.vector_norm(x_MD, dim=1)
        # An infinite norm would turn a diverged row into a harmless zero vector.
        norm_M = norm_M.masked_fill(norm_M.isinf(), math.nan)
        inverse_M = torch.where(norm_M == 0, 0, norm_M.reciprocal())
        z_MD = x_MD * inverse_M[:, None]
        positive_M = ((z_MD[:n] * z_MD[n:]).sum(1) - 1).div_(temperature).repeat(2)
        negatives_M, below_M = _row_statistics(z_MD, positive_M, temperature, rows)
        margin_M = negatives_M - positive_M
        loss = torch.logaddexp(margin_M, torch.zeros_like(margin_M)).mean() * scale
        # `below` counts the row itself and its positive too: both are masked with -inf.
        rank_M = m - below_M
        top1, top5 = (rank_M < 1).float().mean(), (rank_M < 5).float().mean()
        ctx.save_for_backward(z_MD, inverse_M, torch.logaddexp(negatives_M, positive_M), margin_M.sigmoid())
        ctx.temperature, ctx.scale, ctx.rows = temperature, scale, rows
        ctx.mark_non_differentiable(top1, top5)
        return loss, top1, top5

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None]:
        z_MD, inverse_M, lse_M, share_M = ctx.saved_tensors
        m, n = z_MD.shape[0], z_MD.shape[0] // 2
        pull_N1 = (share_M[:n] + share_M[n:])[:, None]
        dz_MD = torch.cat((z_MD[n:] * -pull_N1, z_MD[:n] * -pull_N1))
        _add_negatives(dz_MD, z_MD, lse_M, ctx.temperature, ctx.rows)
        dz_MD -= z_MD * (z_MD * dz_MD).sum(1, keepdim=True)
        dz_MD *= inverse_M[:, None] * (loss_grad * (ctx.scale / (m * ctx.temperature)))
        return dz_MD, None, None, None


def _similarities(z_MD: Tensor, start: int, rows: int, temperature: float, out: Tensor) -> Tensor:
    """s - 1/t [B, C] of the rows from `start` against all columns from `start`; itself and the positive are -inf."""
    block_BD, later_CD = z_MD[start : start + rows], z_MD[start:]
    s_BC = out[: block_BD.shape[0] * later_CD.shape[0]].view(block_BD.shape[0], later_CD.shape[0])
    # In place, here and below: autocast leaves in-place products in their own precision.
    s_BC.fill_(-1 / temperature).addmm_(block_BD, later_CD.T, alpha=1 / temperature)
    n = z_MD.shape[0] // 2
    for offset in (0, n, -n):
        s_BC.diagonal(offset).fill_(-math.inf)
    return s_BC


def _row_statistics(z_MD: Tensor, positive_M: Tensor, temperature: float, rows: int) -> tuple[Tensor, Tensor]:
    """Per row: log of the sum of exp(s - 1/t) over its negatives, and how many entries lie below its positive."""
    m = z_MD.shape[0]
    fixed = temperature >= FIXED_MAXIMUM_TEMPERATURE
    total_M = z_MD.new_full((m,), 0 if fixed else -math.inf)
    # Counts are kept as floats, exact to 2^24: summing booleans costs ten times as much on a CPU.
    below_M = z_MD.new_zeros(m)
    buffer, flags = z_MD.new_empty(min(rows, m) * m), z_MD.new_empty(min(rows, m) * m)
    for start in range(0, m, rows):
        stop = min(start + rows, m)
        s_BC = _similarities(z_MD, start, rows, temperature, buffer)
        below_BC = flags[: s_BC.numel()].view_as(s_BC)
        below_M[start:stop] += torch.lt(s_BC, positive_M[start:stop, None], out=below_BC).sum(1)
        below_M[stop:] += torch.lt(s_BC, positive_M[start:], out=below_BC)[:, stop - start :].sum(0)
        if fixed:
            e_BC = s_BC.exp_()
            total_M[start:stop] += e_BC.sum(1)
            total_M[stop:] += e_BC[:, stop - start :].sum(0)
        else:
            total_M[start:stop] = torch.logaddexp(total_M[start:stop], s_BC.logsumexp(1))
            total_M[stop:] = torch.logaddexp(total_M[stop:], s_BC[:, stop - start :].logsumexp(0))
    return (total_M.log() if fixed else total_M), below_M


def _add_negatives(dz_MD: Tensor, z_MD: Tensor, lse_M: Tensor, temperature: float, rows: int) -> None:
    """Adds sum_j (exp(s_ij - lse_i) + exp(s_ij - lse_j)) z_j over the negatives j to each row of dz, in place."""
    m = z_MD.shape[0]
    fixed = temperature >= FIXED_MAXIMUM_TEMPERATURE
    inverse_sum_M = lse_M.neg().exp()
    buffer, weights = z_MD.new_empty(min(rows, m) * m), z_MD.new_empty(min(rows, m) * m)
    for start in range(0, m, rows):
        stop = min(start + rows, m)
        s_BC = _similarities(z_MD, start, rows, temperature, buffer)
        w_BC = weights[: s_BC.numel()].view_as(s_BC)
        if fixed:
            torch.add(inverse_sum_M[start:stop, None], inverse_sum_M[start:], out=w_BC)
            w_BC *= s_BC.exp_()
        else:
            torch.sub(s_BC, lse_M[start:stop, None], out=w_BC).exp_()
            w_BC += s_BC.sub_(lse_M[start:]).exp_()
        dz_MD[start:stop].addmm_(w_BC, z_MD[start:])
        dz_MD[stop:].addmm_(w_BC[:, stop - start :].T, z_MD[start:stop])
