"""The exchange between ranks: every rank's rows on every rank."""

# W ranks

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from fastsimclr.kernels.gather.reference import all_gather_rows

__all__ = ["all_gather_rows", "gather"]


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[W, *x.shape]: every rank's x in the order of the ranks; no gradient.

    x: one dimension or more, the same shape and dtype on all ranks, which is not checked here. One collective.
    """
    parts = x.new_empty(dist.get_world_size(group), *x.shape)
    dist.all_gather_into_tensor(parts.flatten(0, 1), x.contiguous(), group=group)
    return parts
