"""What LARS takes: dense tensors of equal shape and layout on one device; checked once for each set of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Variant = Literal["google", "lightly"]
MASTERS = (torch.float32, torch.float64)
HALVES = (torch.float16, torch.bfloat16)
_KNOWN: dict[Any, None] = {}
"""What was found right, by strides, sizes, devices and dtypes: these stay while addresses change."""


class Tensors(NamedTuple):
    """T tensors and what each has of its own, as `lars_step` says it."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    momenta: Sequence[Tensor]
    copies: Sequence[Tensor | None]
    weight_decay: Sequence[float]
    l2: Sequence[float]
    lr_scale: Sequence[float]
    excluded: Sequence[bool]

    def select(self, rows: slice) -> Tensors:
        """Some of them."""
        columns: Any = (column[rows] for column in self)
        return Tensors(*columns)


class Rule(NamedTuple):
    """What holds for all tensors of a step, as `lars_step` says it."""

    lr: float | Tensor
    momentum: float
    trust: float
    variant: Variant
    eps: float
    inverse_scale: Tensor | None
    found_inf: Tensor | None


def alike(params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, those in another memory layout than their parameter as copies in its layout.

    A copy is one launch more a tensor and step. foreach needs it too: one odd tensor sends it to loops over all.
    """
    if list(map(Tensor.stride, params)) == list(map(Tensor.stride, grads)):
        return list(grads)
    return [
        g if w.shape != g.shape or _order(w) == _order(g) else torch.empty_like(w, dtype=g.dtype).copy_(g)
        for w, g in zip(params, grads, strict=True)
    ]


def check_tensors(
    params: Sequence[Tensor], grads: Sequence[Tensor], momenta: Sequence[Tensor], copies: Sequence[Tensor | None]
) -> None:
    """Raises ValueError for shapes, dtypes, devices or layouts that do not fit. Reads no values."""
    tensors = [*params, *grads, *momenta, *(c for c in copies if c is not None)]
    facts = (
        len(params),
        tuple(map(Tensor.stride, tensors)),
        tuple(map(Tensor.numel, tensors)),
        tuple(map(Tensor.get_device, tensors)),
        tuple([t.dtype for t in tensors]),
        tuple([c is None for c in copies]),
    )
    if facts in _KNOWN:
        return
    first = params[0]
    for i, (w, g, v, c) in enumerate(zip(params, grads, momenta, copies, strict=True)):
        others = {f"grads[{i}]": g, f"momenta[{i}]": v} | ({} if c is None else {f"copies[{i}]": c})
        if w.dtype not in MASTERS or w.dtype != first.dtype:
            raise ValueError(
                f"params[{i}] is {w.dtype}, params[0] {first.dtype}; LARS needs float32 masters (or float64), all of"
                " one dtype: keep half-precision weights as copies="
            )
        if not _dense(w):
            raise ValueError(
                f"params[{i}] of shape {tuple(w.shape)} and strides {w.stride()} is not dense; make it contiguous"
            )
        for name, t in others.items():
            if t.shape != w.shape:
                raise ValueError(f"{name} is {tuple(t.shape)}, params[{i}] {tuple(w.shape)}; give equal shapes")
            if _order(t) != _order(w):
                raise ValueError(
                    f"{name} has strides {t.stride()}, params[{i}] {w.stride()}; make it with torch.empty_like(param)"
                )
        for name, t in {f"params[{i}]": w, **others}.items():
            if t.device != first.device:
                raise ValueError(f"{name} is on {t.device}, params[0] on {first.device}; move all to one device")
        if v.dtype != w.dtype:
            raise ValueError(f"momenta[{i}] is {v.dtype}, params[{i}] {w.dtype}; give momenta of the masters' dtype")
        if g.dtype not in (w.dtype, *HALVES):
            raise ValueError(f"grads[{i}] is {g.dtype}, params[{i}] {w.dtype}; use that dtype, float16 or bfloat16")
        if c is not None and c.dtype not in HALVES:
            raise ValueError(f"copies[{i}] is {c.dtype}; use float16 or bfloat16, or None for no copy")
    if len(_KNOWN) >= 64:
        _KNOWN.clear()
    _KNOWN[facts] = None


def check_scalar(name: str, value: Tensor | None, device: torch.device) -> None:
    """Raises ValueError where a tensor that stands for a number has a dimension or lies on another device."""
    if value is not None and (value.dim() != 0 or value.device != device):
        raise ValueError(
            f"{name} is a tensor of shape {tuple(value.shape)} on {value.device}; give one of 0 dimensions on {device}"
        )


def check_numbers(name: str, values: Sequence[float]) -> None:
    """Raises ValueError where one of the numbers is negative or not finite."""
    for value in set(values):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value} must be finite and at least 0")


def _order(t: Tensor) -> tuple[int, ...]:
    """The strides that place elements: those of dimensions of size 1 do not."""
    return tuple([stride for size, stride in zip(t.shape, t.stride(), strict=True) if size != 1])


def _dense(t: Tensor) -> bool:
    """Whether the elements fill their memory, each once, in any order of the dimensions."""
    filled = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size != 1 and t.numel():
            if stride != filled:
                return False
            filled *= size
    return True
