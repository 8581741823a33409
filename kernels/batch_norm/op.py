"""Batch normalisation as torch.library operators, which torch.compile and autocast take as they are.

Statistics come first, on their own: an operator that changes the running ones cannot have a gradient. That of the
normalisation takes them for functions of its x.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from fastsimclr.kernels.batch_norm import reference
from fastsimclr.kernels.batch_norm.reference import Normalisation
from fastsimclr.kernels.gather import gather


def _implementation(name: str) -> ModuleType:
    if name == "reference":
        return reference
    from fastsimclr.kernels.batch_norm import fused  # triton may be absent

    return fused


def _rows(x: Tensor) -> Tensor:
    """[M, C], a row for each image and position; a view where maps are channels-last."""
    return _laid_out(x).movedim(1, -1).reshape(-1, x.shape[1])


def _laid_out(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)


def _like(y_MC: Tensor, x: Tensor) -> Tensor:
    """Rows as maps of x's shape, channels-last."""
    return y_MC.view(len(x), *x.shape[2:], x.shape[1]).movedim(-1, 1)


def _blank(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)


@torch.library.custom_op("fastsimclr::batch_norm_statistics", mutates_args=("running",))
def statistics_op(
    x: Tensor, running: Sequence[Tensor], factor: float, implementation: str, group: str, world: int
) -> Tensor:
    """Mean and biased variance [2, C] of x [N, C] or [N, C, H, W], float32 (float64 for float64).

    running: nothing, or running mean and variance, which are moved by `factor` of the way. group: the name of that of
    the `world` ranks whose x, of one shape, are counted together; "" for this one alone. One exchange.
    """
    run, x_MC = _implementation(implementation), _rows(x)
    if not group:
        alone: Tensor = run.statistics(x_MC, running, factor)
        return alone
    partials_R2C = gather(run.statistics(x_MC, [], 0.0), _resolve_process_group(group))  # type: ignore[arg-type]
    mean_var: Tensor = run.pooled(partials_R2C, len(x_MC), running, factor)
    return mean_var


@statistics_op.register_fake
def _(x: Tensor, running: Sequence[Tensor], factor: float, implementation: str, group: str, world: int) -> Tensor:
    return x.new_empty(2, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("fastsimclr::batch_norm", mutates_args=())
def batch_norm_op(
    x: Tensor,
    residual: Tensor | None,
    relu: bool,
    implementation: str,
    group: str,
    world: int,
    weight: Tensor,
    bias: Tensor | None,
    mean_var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """y, and which values ReLU kept where that cannot be worked out again. mean_var: what statistics_op gave for x."""
    residual_MC = None if residual is None else _rows(residual)
    norm = Normalisation(weight, bias, mean_var, eps)
    y_MC, bits = _implementation(implementation).apply(_rows(x), residual_MC, norm, relu)
    return _like(y_MC, x), bits


@batch_norm_op.register_fake
def _(x: Tensor, residual: Tensor | None, relu: bool, implementation: str, *_: Any) -> tuple[Tensor, Tensor]:
    channels = x.shape[1]
    shape: tuple[Any, ...] = (0,)
    if relu and residual is not None:
        shape = (x.numel() // channels, channels if implementation == "reference" else (channels + 7) // 8)
    return _blank(x), x.new_empty(shape, dtype=torch.uint8)


@torch.library.custom_op("fastsimclr::batch_norm_backward", mutates_args=())
def batch_norm_backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean_var: Tensor,
    bits: Tensor,
    eps: float,
    relu: bool,
    implementation: str,
    group: str,
    world: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dresidual (empty where `bits` is), and dbias and dweight, [2, C], of this rank. One exchange in a group."""
    run, x_MC, dy_MC = _implementation(implementation), _rows(x), _rows(dy)
    norm = Normalisation(weight, bias, mean_var, eps)
    own_2C: Tensor = run.sums(dy_MC, x_MC, norm, bits, relu)
    total_2C = own_2C
    if group:
        total_2C = own_2C.clone()
        dist.all_reduce(total_2C, group=_resolve_process_group(group))  # type: ignore[arg-type]
    rows = len(x_MC) * world
    dx_MC, dresidual = run.gradient(dy_MC, x_MC, norm, bits, relu, total_2C, rows)
    return _like(dx_MC, x), _like(dresidual, x) if len(dresidual) else dresidual, own_2C


@batch_norm_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, mean_var: Tensor, bits: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _blank(x), _blank(x) if bits.numel() else x.new_empty(0), torch.empty_like(mean_var)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, *options, weight, bias, mean_var, eps = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, bias, mean_var, output[1])
    ctx.options, ctx.eps, ctx.residual = options, eps, residual is not None


def _gradient(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 10
    x, weight, bias, mean_var, bits = ctx.saved_tensors
    dx, dresidual, sums_2C = batch_norm_backward_op(dy, x, weight, bias, mean_var, bits, ctx.eps, *ctx.options)
    dbias, dweight = sums_2C.unbind()
    residual = (dresidual if ctx.options[0] else dy) if ctx.residual else None
    return (dx, residual, *(None,) * 4, dweight, None if bias is None else dbias, None, None)


batch_norm_op.register_autograd(_gradient, setup_context=_remember)
