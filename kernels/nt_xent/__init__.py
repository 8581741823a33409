"""NT-Xent, the contrastive loss of SimCLR, behind one function that picks the implementation."""

from __future__ import annotations

from typing import Literal

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
) -> NtXent:
    """The NT-Xent loss of 2N projections, with its gradient and the contrastive top-1 and top-5.

    x: [2N, D], float, any device, not normalised; rows n and n + N are the two views of one image.
    temperature: above 0. block_rows: rows worked on at once, chosen by a memory budget when None.
    scaling: "paper" is the mean over the 2N rows; "google" is mean(CE_a) + mean(CE_b), twice as much.
    backend: "auto" takes the fastest present; so far "reference", in torch operations, is the only one.
    Returns NtXent(loss, top1, top5), scalars on x's device; the maths and the edge cases stand at `nt_xent_reference`.
    Raises ValueError for a wrong shape, dtype, temperature, scaling, block size or backend.
    """
    if backend not in ("auto", "reference"):
        raise ValueError(f"backend={backend!r} is not an NT-Xent implementation; use 'auto' or 'reference'")
    return nt_xent_reference(x, temperature, scaling=scaling, block_rows=block_rows)
