"""LARS in foreach operations. g += d w; r = c |w| / |g|; v = m v + lr r g; w -= v. You et al. 2017; Google's SimCLR."""

# K tensors that are adapted, that is, not excluded

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fastsimclr.kernels.lars.inputs import Rule, Tensors, Variant

T = TypeVar("T")

_ELEMENTS = {"cpu": 1 << 18}
_ELEMENTS_ELSEWHERE = 1 << 62
"""Elements of the tensors that are stepped together."""


@torch.no_grad()
def lars_step_reference(tensors: Tensors, rule: Rule) -> None:
    """One LARS step as `lars_step` says it, of tensors that were checked; in place, and nothing is synced.

    About 20 foreach operations, and one small launch more for each adapted tensor: foreach has no fast form of lists
    times 0-dim tensors. With `found_inf` two more a tensor: what was there before is kept, and chosen on the device.
    On a CPU a few tensors at a time, so that what one operation writes is in the cache for the next.
    """
    params = tensors.params
    limit = _ELEMENTS.get(params[0].device.type, _ELEMENTS_ELSEWHERE) if params else 0
    start = 0
    while start < len(params):
        stop, count = start + 1, params[start].numel()
        while stop < len(params) and count + params[stop].numel() <= limit:
            count += params[stop].numel()
            stop += 1
        _step(tensors.select(slice(start, stop)), rule)
        start = stop


def _step(tensors: Tensors, rule: Rule) -> None:
    params, grads, momenta, copies, weight_decay, l2, lr_scale, excluded = tensors
    lr, momentum, trust, variant, eps, inverse_scale, found_inf = rule
    params, momenta = list(params), list(momenta)
    written = [*params, *momenta, *(c for c in copies if c is not None)]
    before = [] if found_inf is None else [t.clone() for t in written]
    updates = [g if g.dtype == w.dtype else g.to(w.dtype) for w, g in zip(params, grads, strict=True)]
    if inverse_scale is not None:
        updates = list(torch._foreach_mul(updates, inverse_scale))
    heads = [i for i, coefficient in enumerate(l2) if coefficient]
    if heads:
        _put(updates, heads, _decayed(_at(updates, heads), _at(params, heads), _at(l2, heads)))
    adapted = [i for i, flag in enumerate(excluded) if not flag]
    if adapted:
        decays = _at(weight_decay, adapted)
        scaled = _scaled_gradients(_at(params, adapted), _at(updates, adapted), decays, trust, variant, eps)
        _put(updates, adapted, scaled)
    torch._foreach_mul_(momenta, momentum)
    if variant == "google":
        _add_times(momenta, updates, lr, lr_scale, 1.0)
        torch._foreach_sub_(params, momenta)
    else:
        torch._foreach_add_(momenta, updates)
        _add_times(params, momenta, lr, lr_scale, -1.0)
    for w, c in zip(params, copies, strict=True):
        if c is not None:
            c.copy_(w)
    if found_inf is not None:
        skip = found_inf != 0
        for now, old in zip(written, before, strict=True):
            torch.where(skip, old, now, out=now)


def _scaled_gradients(
    params: list[Tensor],
    grads: list[Tensor],
    decays: list[float],
    trust: float,
    variant: Variant,
    eps: float,
) -> list[Tensor]:
    """The decayed gradients times their trust ratios, as new tensors."""
    decayed = _decayed(grads, params, decays)
    w_norms = torch._foreach_norm(params)
    w_K = torch.stack(w_norms)
    if variant == "google":
        g_K = torch.stack(torch._foreach_norm(decayed))
        ratio_K = torch.where((w_K > 0) & (g_K > 0), trust * w_K / g_K, 1)
    else:
        g_K = torch.stack(torch._foreach_norm(grads))
        decay_w_K = torch.stack(torch._foreach_mul(w_norms, decays))
        ratio_K = torch.where(w_K > 0, trust * w_K / (g_K + decay_w_K + eps), 1)
        # lightly leaves a zero gradient undecayed, so that its update is zero.
        ratio_K = torch.where(g_K > 0, ratio_K, 0)
    torch._foreach_mul_(decayed, ratio_K.unbind())
    return decayed


def _decayed(grads: list[Tensor], params: list[Tensor], decays: list[float]) -> list[Tensor]:
    """g + decay w, as new tensors."""
    if len(set(decays)) == 1:
        return list(torch._foreach_add(grads, params, alpha=decays[0]))
    return list(torch._foreach_add(grads, torch._foreach_mul(params, decays)))


def _add_times(
    tensors: list[Tensor], others: list[Tensor], lr: float | Tensor, lr_scale: Sequence[float], sign: float
) -> None:
    """Adds sign times each other times its learning rate, in place."""
    if isinstance(lr, Tensor):
        scaled = torch._foreach_mul(others, lr)
        torch._foreach_add_(tensors, torch._foreach_mul(scaled, [sign * scale for scale in lr_scale]))
    elif len(set(lr_scale)) == 1:
        torch._foreach_add_(tensors, others, alpha=sign * lr * lr_scale[0])
    else:
        torch._foreach_add_(tensors, torch._foreach_mul(others, [sign * lr * scale for scale in lr_scale]))


def _at(values: Sequence[T], indices: list[int]) -> list[T]:
    return [values[i] for i in indices]


def _put(values: list[T], indices: list[int], new: list[T]) -> None:
    for i, value in zip(indices, new, strict=True):
        values[i] = value
