"""LARS in foreach operations. g += d w; r = c |w| / |g|; v = m v + lr r g; w -= v. You et al. 2017; Google's SimCLR."""

# K tensors that are adapted, that is, not excluded

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Variant = Literal["google", "lightly"]


@torch.no_grad()
def lars_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    momentum: float = 0.9,
    trust: float = 0.001,
    excluded: Sequence[bool],
    variant: Variant = "google",
    eps: float = 1e-8,
) -> None:
    """One LARS step, in place on `params` and `momenta`; the gradients are left as they are and nothing is synced.

    params, grads, momenta: tensors of equal shapes, float32 (float64 works too), on one device; momenta start at zero.
    lr: a float or a 0-dim tensor. excluded: one flag a tensor; an excluded one has neither decay nor trust ratio.
    variant "google": r = trust |w| / |g + decay w|, 1 where a norm is 0; v = momentum v + lr r g; w -= v.
    variant "lightly": r = trust |w| / (|g| + decay |w| + eps), g unchanged where a norm is 0; v = momentum v + r g;
    w -= lr v. Unlike lightly's own class it scales with decay 0 too: there, decay 0 silently switches LARS off.
    Raises ValueError where the sequences differ in length or the variant is unknown.
    """
    if not len(params) == len(grads) == len(momenta) == len(excluded):
        lengths = f"{len(params)} params, {len(grads)} grads, {len(momenta)} momenta, {len(excluded)} excluded flags"
        raise ValueError(f"LARS got {lengths}; give one of each per tensor")
    if variant not in get_args(Variant):
        raise ValueError(f"variant={variant!r} is unknown; use 'google' or 'lightly'")
    if not params:
        return
    params, momenta, updates = list(params), list(momenta), list(grads)
    adapted = [i for i, flag in enumerate(excluded) if not flag]
    if adapted:
        scaled = _scaled_gradients(
            [params[i] for i in adapted], [grads[i] for i in adapted], weight_decay, trust, variant, eps
        )
        for i, update in zip(adapted, scaled, strict=True):
            updates[i] = update
    torch._foreach_mul_(momenta, momentum)
    if variant == "google":
        torch._foreach_add_(momenta, torch._foreach_mul(updates, lr))
        torch._foreach_sub_(params, momenta)
    else:
        torch._foreach_add_(momenta, updates)
        torch._foreach_sub_(params, torch._foreach_mul(momenta, lr))


def _scaled_gradients(
    params: list[Tensor], grads: list[Tensor], weight_decay: float, trust: float, variant: Variant, eps: float
) -> list[Tensor]:
    """The decayed gradients times their trust ratios, as new tensors."""
    decayed = list(torch._foreach_add(grads, params, alpha=weight_decay))
    w_K = torch.stack(torch._foreach_norm(params))
    if variant == "google":
        g_K = torch.stack(torch._foreach_norm(decayed))
        ratio_K = torch.where((w_K > 0) & (g_K > 0), trust * w_K / g_K, 1)
    else:
        g_K = torch.stack(torch._foreach_norm(grads))
        ratio_K = torch.where(w_K > 0, trust * w_K / (g_K + weight_decay * w_K + eps), 1)
        # lightly leaves a zero gradient undecayed, so that its update is zero.
        ratio_K = torch.where(g_K > 0, ratio_K, 0)
    torch._foreach_mul_(decayed, ratio_K.unbind())
    return decayed
