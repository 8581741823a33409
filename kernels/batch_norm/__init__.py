"""Batch normalisation with the batch's own statistics, the sum with a residual and ReLU in one call."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastsimclr.kernels.backend import Backend, Implementation, choose
from fastsimclr.kernels.batch_norm.op import batch_norm_op, statistics_op

__all__ = ["DTYPES", "batch_norm", "implementation"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What the fused kernels take; statistics and parameters are float32."""


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    running: tuple[Tensor, Tensor] | None = None,
    factor: float = 0.1,
    eps: float = 1e-5,
    group: dist.ProcessGroup | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """relu((x - mean) / sqrt(var + eps) * weight + bias + residual), mean and var of each channel of x; with gradient.

    x: [N, C] or [N, C, H, W] in float32, float16, bfloat16 or float64; maps are worked on channels-last, others are
    copied first. Between x and the result, of x's shape and dtype and channels-last, all is float32 (float64 for
    float64). The gradient is not differentiable again.
    weight, bias: [C], float32 (float64 for float64); a bias of None is 0. residual: as x, added before ReLU.
    relu: negative values become 0; NaN stays.
    running: the running mean and variance [C], of weight's dtype, changed in place to (1 - factor) times themselves
    plus factor times those of x, the variance without bias. None: none.
    group: ranks that count their x, of one shape, together: one exchange forward and one backward. dweight and dbias
    are of this rank's x alone, as DDP wants them.
    backend: "auto" takes the fused kernels on CUDA but for float64, else torch operations; "fused" and "reference"
    insist. The kernels add in a fixed order: the same inputs give the same bits.

    Raises ValueError for shapes, dtypes or devices that do not fit, for one value a channel, which has no variance, and
    for a backend that is not to be had.
    """
    if x.dim() not in (2, 4) or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {list(x.shape)}; batch_norm takes floats [N, C] or [N, C, H, W]")
    channels, single = x.shape[1], torch.promote_types(x.dtype, torch.float32)
    mean, var = running or (None, None)
    for name, vector in {"weight": weight, "bias": bias, "running mean": mean, "running variance": var}.items():
        if vector is not None:
            _check(name, vector, (channels,), single, x.device)
    if residual is not None:
        _check("residual", residual, tuple(x.shape), x.dtype, x.device)
    world = 1 if group is None else dist.get_world_size(group)
    if x.numel() // max(channels, 1) * world < 2:
        raise ValueError(
            f"x of {list(x.shape)} has fewer than two values a channel, which have no variance; use a larger batch"
        )
    which, name = implementation(x, backend), "" if group is None or world == 1 else group.group_name
    found = statistics_op(x.detach(), list(running or ()), factor, which, name, world)
    y: Tensor = batch_norm_op(x, residual, relu, which, name, world, weight, bias, found, eps)[0]
    return y


def implementation(x: Tensor, backend: Backend = "auto") -> Implementation:
    """What `batch_norm` runs for an x like this one. ValueError where a backend is not to be had."""
    if x.dtype in DTYPES or backend not in ("auto", "fused"):
        return choose("batch_norm", backend, x.device)
    if backend == "fused":
        raise ValueError(f"backend=fused does not take x of {x.dtype} for batch_norm; use backend=auto")
    return "reference"


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
        found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{name} is {found}; x needs it {dtype} {list(shape)} on {device}")
