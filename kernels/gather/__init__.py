"""What is brought together: every rank's rows on every rank, and views from a data set held on the device."""

# W ranks    N rows of a rank

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from fastsimclr.kernels.gather.collectives import all_gather_single
from fastsimclr.kernels.gather.reference import all_gather_rows
from fastsimclr.kernels.gather.views import gather_views

__all__ = ["all_gather_rows", "gather", "gather_in_place", "gather_views"]


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[W, *x.shape]: every rank's x in the order of the ranks; no gradient.

    x: one dimension or more, the same shape and dtype on all ranks, which is not checked here. One collective.
    """
    parts = x.new_empty(dist.get_world_size(group), *x.shape)
    all_gather_single(parts.flatten(0, 1), x.contiguous(), group=group)
    return parts


def gather_in_place(rows: Tensor, group: dist.ProcessGroup) -> None:
    """Fills rows [W * N, ...], contiguous, in which this rank has written its own N at N * rank. One collective."""
    own = rows.chunk(dist.get_world_size(group))[dist.get_rank(group)]
    all_gather_single(rows, own, group=group)
