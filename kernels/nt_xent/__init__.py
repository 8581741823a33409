"""NT-Xent, the contrastive loss of SimCLR, behind one function that picks the implementation."""

from __future__ import annotations

from typing import Literal

import torch.distributed as dist
from torch import Tensor

from fastsimclr.kernels.nt_xent.reference import NtXent, Scaling, nt_xent_reference

__all__ = ["NtXent", "nt_xent"]


def nt_xent(
    x: Tensor,
    temperature: float,
    *,
    scaling: Scaling = "paper",
    block_rows: int | None = None,
    backend: Literal["auto", "reference"] = "auto",
    group: dist.ProcessGroup | None = None,
) -> NtXent:
    """The NT-Xent loss of 2N projections, with its gradient and the contrastive top-1 and top-5.

    x: [2N, D], float, any device, not normalised; rows n and n + N are the two views of one image.
    temperature: above 0. block_rows: rows worked on at once, chosen by a memory budget when None.
    scaling: "paper" is the mean over the 2N rows; "google" is mean(CE_a) + mean(CE_b), twice as much.
    backend: "auto" takes the fastest present; so far "reference", in torch operations, is the only one.
    group: the ranks that share a global batch; x is then this rank's own [2N, D], of the same shape on all. Its rows
    meet the rows of all W ranks. Its gradient is W times that of the global mean, so that DDP's average of the ranks is
    exact. loss, top1 and top5 are means over the own rows; their mean over the ranks is that of the global batch. Two
    collectives in the forward, none in the backward, whose upstream gradient must be the same on every rank.
    Returns NtXent(loss, top1, top5), scalars on x's device; the maths and the edge cases stand at `nt_xent_reference`.
    Raises ValueError for a wrong shape, dtype, temperature, scaling, block size or backend, and for ranks of different
    shapes (looked at when this rank's changes).
    """
    if backend not in ("auto", "reference"):
        raise ValueError(f"backend={backend!r} is not an NT-Xent implementation; use 'auto' or 'reference'")
    return nt_xent_reference(x, temperature, scaling=scaling, block_rows=block_rows, group=group)
