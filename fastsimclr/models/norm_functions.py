"""The autograd functions of batch normalisation over groups of the global batch, and what the ranks exchange in them.

A group that several ranks hold is put together from each part's mean, variance and share f of the group's values,
    mean = sum_k f_k mean_k,    var = sum_k f_k (var_k + (mean_k - mean)^2)
(Chan et al. 1983), which cancels nothing, unlike E[x^2] - E[x]^2. With a = weight / sqrt(var + eps) and means over it,
    dx = a (dy - mean(dy) - xhat mean(dy xhat)).
"""

# C channels, S parts of a rank's batch (each lies in one group), P pieces of a part, K parts that the ranks exchange

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsimclr.kernels.gather import gather
from fastsimclr.models.batch_groups import BatchGroups, GroupLayout, group_layout

PIECE_ELEMENTS = 2**18
"""Values that a CPU core works on at once, which its cache holds. More would also lose digits: torch sums float32
values one by one."""


class Running(NamedTuple):
    """The running mean and variance [C], changed in place, and how far they move towards those of the batch, 0 to 1."""

    mean_C: Tensor
    var_C: Tensor
    factor: float


class NormInGroups(torch.autograd.Function):
    """Any groups, on any device. It reads x twice forward and, with dy, twice backward, as torch's own does."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_C: Tensor, bias_C: Tensor | None, running: Running, eps: float, groups: BatchGroups
    ) -> Tensor:
        x = x.contiguous(memory_format=_layout(x))
        plan, count = _plan(x, weight_C, groups)
        unused = torch.zeros_like(weight_C), torch.zeros_like(weight_C)  # without it: half statistics of half maps
        found: list[Tensor] = []
        for part, share_P in zip(plan.pieces, plan.shares_P, strict=True):
            of_pieces = [torch.batch_norm_update_stats(x[rows], unused[0], unused[1], 0.0) for rows in part]
            found.append(_pooled(torch.stack([torch.stack(pair) for pair in of_pieces]), share_P))
        if plan.sent:
            received_K2C = _exchanged(found, plan, groups)
            for (part_index, _), fraction_K in zip(plan.shared, plan.fractions_K, strict=True):
                found[part_index] = _pooled(received_K2C, fraction_K)
        y = torch.empty_like(x)
        for part, (mean_C, var_C) in zip(plan.pieces, found, strict=True):
            for rows in part:
                _affine(x[rows], weight_C, bias_C, mean_C, var_C, eps, out=y[rows])
        statistics_S2C = torch.stack(found)
        mean_C, var_C = (plan.weight_S[:, None, None] * statistics_S2C).sum(0)
        running.mean_C.mul_(1 - running.factor).add_(mean_C, alpha=running.factor)
        running.var_C.mul_(1 - running.factor).add_(var_C, alpha=running.factor * count / (count - 1))
        ctx.save_for_backward(x, weight_C, statistics_S2C)
        ctx.plan, ctx.count, ctx.eps, ctx.groups = plan, count, eps, groups
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_C, statistics_S2C = ctx.saved_tensors
        plan: GroupLayout = ctx.plan
        dy = dy.contiguous(memory_format=_layout(x))
        mean_SC, var_SC = statistics_S2C.unbind(1)
        inverse_SC = (var_SC + ctx.eps).rsqrt()
        sums: list[Tensor] = []  # of dy and of dy xhat
        for part, mean_C, inverse_C in zip(plan.pieces, mean_SC, inverse_SC, strict=True):
            of_pieces = [_sums(dy[rows], x[rows], weight_C, mean_C, inverse_C, ctx.eps) for rows in part]
            sums.append(torch.stack(of_pieces).sum(0))
        dbias_C, dweight_C = torch.stack(sums).sum(0)  # of this rank; DDP averages them
        dx = None
        if ctx.needs_input_grad[0]:
            if plan.sent:
                received_K2C = _exchanged(sums, plan, ctx.groups)
                for (part_index, _), fraction_K in zip(plan.shared, plan.fractions_K, strict=True):
                    sums[part_index] = (received_K2C * (fraction_K > 0)[:, None, None]).sum(0)
            scale_SC = weight_C * inverse_SC
            shift_SC, slope_SC = (torch.stack(sums) * (scale_SC / -ctx.count)[:, None]).unbind(1)
            dx = torch.empty_like(x)
            half = dx.dtype != weight_C.dtype  # these are worked on in float32, a piece at a time
            most = max(rows.stop - rows.start for part in plan.pieces for rows in part)
            buffers = [torch.empty_like(x[:most], dtype=weight_C.dtype) for _ in range(3 if half else 0)]
            for s, part in enumerate(plan.pieces):
                scale = scale_SC[s].view(1, -1, *[1] * (x.dim() - 2))
                for rows in part:
                    piece, grad, out = x[rows], dy[rows], dx[rows]
                    if half:
                        piece, grad, out = (buffer[: len(piece)] for buffer in buffers)
                        piece.copy_(x[rows])
                        grad.copy_(dy[rows])
                    _affine(piece, slope_SC[s], shift_SC[s], mean_SC[s], var_SC[s], ctx.eps, out=out)
                    out.addcmul_(grad, scale)
                    if half:
                        dx[rows] = out
        return dx, dweight_C, dbias_C if ctx.needs_input_grad[2] else None, None, None, None


class NormOfOneGroupOnCuda(torch.autograd.Function):
    """A rank's batch lies in one group that other ranks share: the kernels of torch's SyncBatchNorm."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_C: Tensor, bias_C: Tensor | None, running: Running, eps: float, groups: BatchGroups
    ) -> Tensor:
        assert groups.exchange is not None
        x = x.contiguous(memory_format=_layout(x))
        _, count = _plan(x, weight_C, groups)
        received_W2C = gather(torch.stack(torch.batch_norm_stats(x, eps)), groups.exchange)
        counts_W = torch.full((groups.peers,), count / groups.peers, dtype=received_W2C.dtype, device=x.device)
        mean_C, inverse_C = torch.batch_norm_gather_stats_with_counts(
            x, received_W2C[:, 0], received_W2C[:, 1], *running, eps, counts_W
        )
        ctx.save_for_backward(x, weight_C, mean_C, inverse_C, counts_W.int())
        ctx.exchange = groups.exchange
        y: Tensor = torch.batch_norm_elemt(x, weight_C, bias_C, mean_C, inverse_C, eps)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_C, mean_C, inverse_C, counts_W = ctx.saved_tensors
        dy = dy.contiguous(memory_format=_layout(x))
        *sums, dweight_C, dbias_C = torch.batch_norm_backward_reduce(
            dy, x, mean_C, inverse_C, weight_C, True, True, True
        )
        dx = None
        if ctx.needs_input_grad[0]:
            sums_2C = torch.stack(sums)  # of dy and of dy (x - mean)
            dist.all_reduce(sums_2C, group=ctx.exchange)
            dx = torch.batch_norm_backward_elemt(dy, x, mean_C, inverse_C, weight_C, sums_2C[0], sums_2C[1], counts_W)
        return dx, dweight_C, dbias_C if ctx.needs_input_grad[2] else None, None, None, None


def _layout(x: Tensor) -> torch.memory_format:
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _plan(x: Tensor, weight_C: Tensor, groups: BatchGroups) -> tuple[GroupLayout, int]:
    """The plan for x, and how many values of a channel a group has."""
    rows, channels, values = len(x), x.shape[1], x.numel() // len(x)
    at_once = PIECE_ELEMENTS * torch.get_num_threads() if x.device.type == "cpu" else x.numel()
    plan = group_layout(groups, rows, max(1, at_once // values), x.device, weight_C.dtype)
    count = plan.group_rows * (values // channels)
    if count == 1:
        raise ValueError(
            f"BatchNorm has one value per channel in each of groups={groups.groups} of the global batch, which have"
            " no variance; use fewer groups or a larger batch"
        )
    return plan, count


def _pooled(parts_K2C: Tensor, share_K: Tensor) -> Tensor:
    """Mean and biased variance [2, C] of the whole, of those of its parts and their shares, which sum to 1."""
    mean_KC, var_KC = parts_K2C.unbind(1)
    share_K1 = share_K[:, None]
    mean_C = (share_K1 * mean_KC).sum(0)
    return torch.stack((mean_C, (share_K1 * (var_KC + (mean_KC - mean_C).square())).sum(0)))


def _exchanged(part_statistics: list[Tensor], plan: GroupLayout, groups: BatchGroups) -> Tensor:
    """[K, 2, C]: what all ranks of the exchange have of the parts that they share. One collective."""
    assert groups.exchange is not None
    sent = part_statistics[0].new_zeros(plan.sent, *part_statistics[0].shape)
    for part, place in plan.shared:
        sent[place] = part_statistics[part]
    return gather(sent, groups.exchange).flatten(0, 1)


def _affine(
    x: Tensor, weight_C: Tensor, bias_C: Tensor | None, mean_C: Tensor, var_C: Tensor, eps: float, *, out: Tensor
) -> None:
    """out = (x - mean) / sqrt(var + eps) * weight + bias by torch's kernel for evaluation, in one pass."""
    unused = weight_C.new_empty(0)
    torch.ops.aten.native_batch_norm.out(
        x, weight_C, bias_C, mean_C, var_C, False, 0.0, eps, out=out, save_mean=unused, save_invstd=unused
    )


def _sums(dy: Tensor, x: Tensor, weight_C: Tensor, mean_C: Tensor, inverse_C: Tensor, eps: float) -> Tensor:
    """[2, C]: the sums of dy and of dy xhat, which torch knows as the gradients of bias and weight."""
    _, dweight_C, dbias_C = torch.ops.aten.native_batch_norm_backward(
        dy, x, weight_C, None, None, mean_C, inverse_C, True, eps, [False, True, True]
    )
    return torch.stack((dbias_C, dweight_C))
