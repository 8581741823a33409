"""LARS, the layer-wise scaled momentum step of SimCLR's training, of a whole network in one call."""

# T tensors

from __future__ import annotations

from collections.abc import Sequence
from typing import cast, get_args

import torch
from torch import Tensor

from fastsimclr.kernels.backend import Backend, Implementation, choose
from fastsimclr.kernels.lars.inputs import Rule, Tensors, Variant, alike, check_numbers, check_scalar, check_tensors
from fastsimclr.kernels.lars.reference import lars_step_reference

__all__ = ["Variant", "implementation", "lars_step"]


@torch.no_grad()
def lars_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float | Sequence[float],
    momentum: float = 0.9,
    trust: float = 0.001,
    excluded: Sequence[bool],
    l2: Sequence[float] | None = None,
    lr_scale: Sequence[float] | None = None,
    variant: Variant = "google",
    eps: float = 1e-8,
    inverse_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    copies: Sequence[Tensor | None] | None = None,
    backend: Backend = "auto",
) -> None:
    """One LARS step of T tensors, in place on params, momenta and copies; nothing waits for the device.

    With g = inverse_scale * grad + l2 w and u = g + weight_decay w, of each tensor:
    variant "google": r = trust |w| / |u|, 1 where a norm is 0; v = momentum v + lr lr_scale r u; w -= v.
    variant "lightly": r = trust |w| / (|g| + weight_decay |w| + eps), 1 where w is 0, 0 where g is; v = momentum v +
    r u; w -= lr lr_scale v. Unlike lightly's own class it scales with decay 0 too: there, decay 0 switches LARS off.

    params, momenta: float32 (or float64), dense in any order of the dimensions, momenta laid out as their parameter and
    zero at first. grads: float32, float16, bfloat16 or the params' dtype; one in another layout than its parameter is
    copied first, and none is changed. copies: half-precision copies of params, written too; None where there is none.
    weight_decay: one for all, or one a tensor. excluded: one flag a tensor: neither decay nor trust ratio, r = 1.
    l2: coefficients of an L2 term of the loss, l2 / 2 * |w|^2; 0 by default. lr_scale: multiples of lr; 1 by default.
    lr: a number, or a 0-dim tensor on the params' device. inverse_scale: 0-dim, what gradients are multiplied with (one
    over the loss scale). found_inf: 0-dim; where it is not 0, params, momenta and copies stay as they are.
    backend: "fused" is two Triton launches for all tensors, "reference" foreach operations, "auto" fused on CUDA for
    float32. Both can be captured in a CUDA graph after one step outside of it.

    Not read, so not checked: a gradient or rate that is not finite. NaN in a gradient is NaN in its weight, momentum
    and copy; with google the tensor's other elements then move with r = 1, with lightly with r = 0.
    Raises ValueError for sequences of different lengths, for shapes, dtypes, layouts or devices that do not fit, for
    numbers that are negative or not finite, and for an unknown variant or a backend that is not to be had.
    """
    T = len(params)
    flags, scales = list(excluded), [1.0] * T if lr_scale is None else list(lr_scale)
    decays = [float(weight_decay)] * T if isinstance(weight_decay, (int, float)) else list(weight_decay)
    coefficients = [0.0] * T if l2 is None else list(l2)
    halves = [None] * T if copies is None else list(copies)
    named = {"grads": grads, "momenta": momenta, "excluded flags": flags, "weight_decay": decays}
    named |= {"l2": coefficients, "lr_scale": scales, "copies": halves}
    if any(len(values) != T for values in named.values()):
        lengths = ", ".join(f"{len(values)} {name}" for name, values in named.items())
        raise ValueError(f"LARS got {T} params, {lengths}; give one of each per tensor")
    if variant not in get_args(Variant):
        raise ValueError(f"variant={variant!r} is unknown; use 'google' or 'lightly'")
    if T == 0:
        return
    numbers = {"lr": () if isinstance(lr, Tensor) else (lr,), "momentum": (momentum,), "trust": (trust,), "eps": (eps,)}
    for name, values in {**numbers, "weight_decay": decays, "l2": coefficients, "lr_scale": scales}.items():
        check_numbers(name, values)
    rate, number = (lr, 1.0) if isinstance(lr, Tensor) else (None, float(lr))
    which = implementation(params[0], backend)
    _lars_step(
        list(params), list(grads), list(momenta), [c for c in halves if c is not None],
        [i for i, c in enumerate(halves) if c is not None], rate, inverse_scale, found_inf,
        number, decays, coefficients, scales, flags, momentum, trust, eps, variant, which,
    )  # fmt: skip


def implementation(param: Tensor, backend: Backend = "auto") -> Implementation:
    """What `lars_step` runs for params like this one. ValueError where a backend is not to be had."""
    if param.dtype == torch.float32 or backend not in ("auto", "fused"):
        return choose("lars_step", backend, param.device)
    if backend == "fused":
        raise ValueError(f"backend=fused needs float32 params for lars_step, these are {param.dtype}; use auto")
    return "reference"


@torch.library.custom_op("fastsimclr::lars_step", mutates_args=("params", "momenta", "copies"))
def _lars_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    copies: Sequence[Tensor],
    copy_of: Sequence[int],
    lr_tensor: Tensor | None,
    inverse_scale: Tensor | None,
    found_inf: Tensor | None,
    lr: float,
    weight_decay: Sequence[float],
    l2: Sequence[float],
    lr_scale: Sequence[float],
    excluded: Sequence[bool],
    momentum: float,
    trust: float,
    eps: float,
    variant: str,
    which: str,
) -> None:
    """`lars_step` as one operator. copy_of: which parameter each copy is of. `lr` counts where there is no `lr_tensor`.

    torch.compile cannot handle a list of tensors that are changed and may be None, hence copy_of.
    """
    device = params[0].device
    for name, value in (("lr", lr_tensor), ("inverse_scale", inverse_scale), ("found_inf", found_inf)):
        check_scalar(name, value, device)
    grads = alike(params, grads)
    halves: list[Tensor | None] = [None] * len(params)
    for i, c in zip(copy_of, copies, strict=True):
        halves[i] = c
    check_tensors(params, grads, momenta, halves)
    step = lars_step_reference
    if which == "fused":
        from fastsimclr.kernels.lars.fused import lars_step_fused as step
    rate = lr if lr_tensor is None else lr_tensor
    step(
        Tensors(params, grads, momenta, halves, weight_decay, l2, lr_scale, excluded),
        Rule(rate, momentum, trust, cast(Variant, variant), eps, inverse_scale, found_inf),
    )


@_lars_step.register_fake
def _(*_arguments: object) -> None:
    return None
