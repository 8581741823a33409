"""The gather that autograd understands: forward all-gather, backward reduce-scatter of the sum; oracle of the losses.

With y = (x_0, ..., x_{W-1}) on each rank and L = sum_r L_r(y), dL/dx_r = sum_s dL_s/dx_r. A gather with no gradient, or
one that returns the rank's own slice dL_r/dx_r alone, loses the terms of the other ranks (the commonest fault of public
SimCLR trainers). The fast path, kernels/nt_xent, needs no collective in the backward: it knows those terms by formula.
"""

# W ranks, N rows of a rank

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def all_gather_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[N, ...] on each rank -> [W * N, ...] on all, in the order of the ranks, with the gradient of the sum of losses.

    Where DDP averages the gradients over the ranks, each rank's loss must be the mean over its own rows. All ranks have
    the same shape and run the backward.
    """
    rows: Tensor = _AllGather.apply(x, group)
    return rows


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        parts = [part.contiguous() for part in dy.chunk(dist.get_world_size(ctx.group))]
        dx = torch.empty_like(parts[0])
        dist.reduce_scatter(dx, parts, group=ctx.group)
        return dx, None
