"""NT-Xent in row blocks. l_i = -log(exp(s_ip) / sum_{k!=i} exp(s_ik)), s = z z^T / t. Chen et al. 2020, Eq. 1.

The similarities are symmetric, so a block of B rows meets only the columns from its first row on: its row sums serve
its own rows, its column sums the later ones. With N_i the sum of exp(s_ij) over the negatives j of row i,
    loss_i   = log(1 + N_i / exp(s_ip)),    lse_i = log(N_i + exp(s_ip)),    q_i = 1 - exp(s_ip - lse_i)
    dL/dz_i  = (1 / (M t)) (sum_{j != i, p} (exp(s_ij - lse_i) + exp(s_ij - lse_j)) z_j - (q_i + q_p) z_p)
where no term cancels as the loss goes to 0. s is kept less 1/t, its largest value, which changes no result.

Over W ranks a rank works out its own M rows against all W·M columns, rectangular.py. It gathers z and the lse in the
forward; by the formula above its rows' gradient then needs nothing more, so the backward exchanges nothing.
"""

# M rows of this rank, both views    N = M / 2 images    D dimensions    A = W M rows of all ranks
# B rows of a block    C columns from the block's first row on

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsimclr.kernels.gather import gather
from fastsimclr.kernels.nt_xent.rectangular import (
    FIXED_MAXIMUM_TEMPERATURE,
    add_negatives_of_all,
    row_statistics_of_all,
)

Scaling = Literal["paper", "google"]

BLOCK_ELEMENTS, BLOCK_ELEMENTS_ELSEWHERE = 2**18, 2**26
"""Similarities held at once when the caller names no block size: 1 MiB of float32, which a CPU core's cache holds; 256
MiB on other devices, where few launches matter more."""

MINIMUM_ROWS = 64
"""Fewer rows a block leave the matrix product short of work, whatever the cache holds."""


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
    x: Tensor,
    temperature: float,
    *,
    scaling: Scaling = "paper",
    block_rows: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> NtXent:
    """NT-Xent in torch operations: the test oracle, the CPU path and the baseline of the fused kernels.

    x: [2N, D] float, rows n and n + N a pair; half precision is worked on in float32, also under autocast, and the
    gradient comes back in x's dtype. Memory is O(2N * block_rows + 2N * D). The gradient is not differentiable again.

    Edge cases: a zero row stays zero and gets no gradient. NaN, infinity or a norm that overflows in any row make the
    loss and the gradient NaN. With a single pair there is no negative: the loss and the gradient are 0.

    group: the ranks whose projections meet, see `nt_xent`. Memory is then O(2NW * block_rows + 2NW * D).
    Raises ValueError for a wrong shape, dtype, temperature, scaling or block size, and where the ranks' shapes differ.
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
    world = 1 if group is None else dist.get_world_size(group)
    rows = block_rows or max(MINIMUM_ROWS, elements // (x.shape[0] * world))
    x = x if x.dtype == torch.float64 else x.float()
    if world == 1:
        group = None
    else:
        assert group is not None
        _check_ranks(x, group)
    loss, top1, top5 = _NtXent.apply(x, float(temperature), 2.0 if scaling == "google" else 1.0, rows, group)
    return NtXent(loss, top1, top5)


_agreed: dict[dist.ProcessGroup, tuple[int, ...]] = {}


def _check_ranks(x: Tensor, group: dist.ProcessGroup) -> None:
    """Compare the ranks' shapes, once and whenever this rank's changes: to read them waits for the device."""
    shape = (*x.shape, x.element_size())
    if _agreed.get(group) == shape:
        return
    _agreed.clear()  # of groups that are gone, too
    for rank, other in enumerate(gather(torch.tensor(shape, device=x.device), group).tolist()):
        if tuple(other) != shape:
            mine = dist.get_rank(group)
            raise ValueError(
                f"rank {mine} has projections of shape {list(shape[:2])} and {shape[2]} bytes a value, rank {rank} of"
                f" {other[:2]} and {other[2]}; give every rank the same number of images, and the same network"
            )
    _agreed[group] = shape


class _NtXent(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_MD: Tensor, temperature: float, scale: float, rows: int, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        m, n = x_MD.shape[0], x_MD.shape[0] // 2
        norm_M = torch.linalg.vector_norm(x_MD, dim=1)
        # An infinite norm would turn a diverged row into a harmless zero vector.
        norm_M = norm_M.masked_fill(norm_M.isinf(), math.nan)
        inverse_M = torch.where(norm_M == 0, 0, norm_M.reciprocal())
        z_MD = x_MD * inverse_M[:, None]
        positive_M = ((z_MD[:n] * z_MD[n:]).sum(1) - 1).div_(temperature).repeat(2)
        if group is None:
            first, z_AD = 0, z_MD
            negatives_M, below_M = _row_statistics(z_MD, positive_M, temperature, rows)
        else:
            first, z_AD = m * dist.get_rank(group), gather(z_MD, group).flatten(0, 1)
            negatives_M, below_M = row_statistics_of_all(z_AD, positive_M, first, temperature, rows)
        margin_M = negatives_M - positive_M
        loss = torch.logaddexp(margin_M, torch.zeros_like(margin_M)).mean() * scale
        # `below` counts the row itself and its positive too: both are masked with -inf.
        rank_M = len(z_AD) - below_M
        top1, top5 = (rank_M < 1).float().mean(), (rank_M < 5).float().mean()
        lse_M = torch.logaddexp(negatives_M, positive_M)
        lse_A = lse_M if group is None else gather(lse_M, group).flatten()
        ctx.save_for_backward(z_AD, inverse_M, lse_A, margin_M.sigmoid())
        ctx.temperature, ctx.scale, ctx.rows, ctx.first, ctx.alone = temperature, scale, rows, first, group is None
        ctx.mark_non_differentiable(top1, top5)
        return loss, top1, top5

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None, None]:
        z_AD, inverse_M, lse_A, share_M = ctx.saved_tensors
        m, n = len(inverse_M), len(inverse_M) // 2
        z_MD = z_AD[ctx.first : ctx.first + m]
        pull_N1 = (share_M[:n] + share_M[n:])[:, None]
        dz_MD = torch.cat((z_MD[n:] * -pull_N1, z_MD[:n] * -pull_N1))
        if ctx.alone:
            _add_negatives(dz_MD, z_MD, lse_A, ctx.temperature, ctx.rows)
        else:
            add_negatives_of_all(dz_MD, z_AD, lse_A, ctx.first, ctx.temperature, ctx.rows)
        dz_MD -= z_MD * (z_MD * dz_MD).sum(1, keepdim=True)
        # Of W ranks this is W times the gradient of the mean over all rows, which DDP's average makes exact.
        dz_MD *= inverse_M[:, None] * (loss_grad * (ctx.scale / (m * ctx.temperature)))
        return dz_MD, None, None, None, None


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
