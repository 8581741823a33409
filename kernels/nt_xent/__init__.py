"""NT-Xent, the contrastive loss of SimCLR, behind one function that picks the implementation."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from fastsimclr.kernels.backend import Backend, Implementation, choose
from fastsimclr.kernels.nt_xent.layout import AUTO_DIMENSIONS, MOST_DIMENSIONS
from fastsimclr.kernels.nt_xent.op import nt_xent_op

__all__ = ["NtXent", "Scaling", "nt_xent"]

Scaling = Literal["paper", "google"]
_FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class NtXent(NamedTuple):
    """The loss and how well the positives rank, as 0-dim tensors on the device of the projections.

    loss: float32 (float64 for float64 projections), with gradient.
    top1, top5: float32, no gradient: the fraction of rows with no, or fewer than five, negatives that are at least as
    similar as the positive. Ties count against it, so that collapsed projections do not look perfect; down to 1e-5 (in
    cosine) below the positive is a tie.
    """

    loss: Tensor
    top1: Tensor
    top5: Tensor


def nt_xent(
    x: Tensor,
    temperature: float | Tensor,
    *,
    weights: Tensor | None = None,
    keys: Tensor | None = None,
    bank: Tensor | None = None,
    scaling: Scaling = "paper",
    block_rows: int | None = None,
    backend: Backend = "auto",
    group: dist.ProcessGroup | None = None,
) -> NtXent:
    """The NT-Xent loss of 2N projections, its gradient and the contrastive top-1 and top-5. Chen et al. 2020, Eq. 1.

    x: [2N, D], float, any device, not normalised; rows n and n + N are the two views of one image. Half precision is
    worked on in float32; the gradient has x's dtype and is not differentiable again.
    temperature: a number above 0, or a 0-dim float tensor on x's device, which gets its gradient and is not read by
    the host: on a CPU a value not above 0 is a ValueError, elsewhere it makes everything NaN.
    weights: float [2N], or [N] for both views of an image, 0 or more: the loss is the mean over the rows of
    w_i loss_i. They get no gradient and leave top1 and top5 alone. A negative one is treated as such a temperature.
    keys: float [2N, D], not normalised, the momentum encoder's projections of the same views in x's layout, with no
    gradient. They take the place of x in all columns: row i's positive is the key of the other view of its image, its
    negatives are the keys of all other images' views, on all ranks, and the key of its own view is left out. He et al.
    2020, Eq. 1; Chen et al. 2020b (SimCLRv2), Sec. 2.1.
    bank: float [K, D], K >= 1, more negatives for every row (a queue, a memory), normalised here like x, with no
    gradient; the same on all ranks.
    scaling: "paper" is the mean over the 2N rows; "google" is mean(CE_a) + mean(CE_b), twice as much.
    block_rows: rows the reference works on at once, chosen by a memory budget when None.
    backend: "auto" takes the fused kernels on CUDA for x of float32, float16 or bfloat16 with D <= 512, and else the
    reference, in torch operations; "fused" (D <= 2048) and "reference" insist. The fused kernels hold z as fp16 and sum
    in float32.
    group: the ranks that share a global batch; x is then this rank's own [2N, D], of the same shape on all. Its rows
    meet the rows of all W ranks. Its gradient is W times that of the global mean, so that DDP's average of the ranks is
    exact, the temperature's likewise. loss, top1 and top5 are means over the own rows; their mean over the ranks is
    that of the global batch. Two collectives in the forward (with keys one), none in the backward, whose upstream
    gradient must be the same on every rank.

    Edge cases: a zero row stays zero and gets no gradient. NaN, infinity or a norm that overflows float32 in any row
    make the loss and the gradient NaN. With keys a row of x is nobody's column: a bad one makes the loss of its rank
    NaN, and of the gradient its own row only. With a single pair and no bank there is no negative: loss and gradient
    are 0.
    Memory: O((2NW + K) (D + block_rows)) in the reference, O((2NW + K) D) fused, with keys 2N D more; never the matrix
    of similarities.

    Raises ValueError for a wrong shape, dtype, device, temperature, scaling, block size or backend, and for ranks of
    different shapes (looked at when this rank's changes).
    """
    if x.dim() != 2 or x.shape[0] < 2 or x.shape[0] % 2 or x.shape[1] == 0:
        raise ValueError(f"x has shape {list(x.shape)}, not [2N, D] with N, D >= 1; stack the two views with torch.cat")
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}, which is not a floating type; use x.float()")
    if isinstance(temperature, Tensor):
        _check("temperature", temperature, x, ([],))
    elif not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} is not above 0 and finite; SimCLR uses .05 to 1")
    if weights is not None:
        _check("weights", weights, x, ([x.shape[0]], [x.shape[0] // 2]))
    if keys is not None:
        _check("keys", keys, x, (list(x.shape),))
    if bank is not None:
        _check("bank", bank, x, ([max(1, bank.shape[0]) if bank.dim() else 1, x.shape[1]],))
    if scaling not in get_args(Scaling):
        raise ValueError(f"scaling={scaling!r} is unknown; use 'paper' or 'google'")
    if block_rows is not None and block_rows < 1:
        raise ValueError(f"block_rows={block_rows} is below 1; use None to choose it by memory")
    world = 1 if group is None else dist.get_world_size(group)
    loss, top1, top5, *_ = nt_xent_op(
        x,
        None if bank is None else bank.detach(),
        None if keys is None else keys.detach(),
        _implementation(x, backend),
        world,
        1.0 if isinstance(temperature, Tensor) else float(temperature),
        temperature if isinstance(temperature, Tensor) else None,
        None if weights is None else weights.detach(),
        2.0 if scaling == "google" else 1.0,
        block_rows or 0,
        "" if group is None or world == 1 else group.group_name,
    )
    return NtXent(loss, top1, top5)


def _check(name: str, tensor: Tensor, x: Tensor, shapes: tuple[list[int], ...]) -> None:
    if list(tensor.shape) not in shapes:
        wanted = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"{name} has shape {list(tensor.shape)}, not {wanted}, as x of {list(x.shape)} needs")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has dtype {tensor.dtype}, which is not a floating type; use {name}.float()")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device} and x on {x.device}; use {name}.to(x.device)")


def _implementation(x: Tensor, backend: Backend) -> Implementation:
    implementation = choose("nt_xent", backend, x.device)
    if implementation == "fused" and (x.dtype not in _FUSED_DTYPES or x.shape[1] > MOST_DIMENSIONS):
        if backend == "fused":
            raise ValueError(
                f"backend=fused does not take x of {x.dtype} with {x.shape[1]} dimensions, only float32, float16 and"
                f" bfloat16 with up to {MOST_DIMENSIONS}; use backend=reference or auto"
            )
        return "reference"
    return "reference" if backend == "auto" and x.shape[1] > AUTO_DIMENSIONS else implementation
