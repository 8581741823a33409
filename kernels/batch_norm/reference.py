"""Batch normalisation, the sum with a residual, and ReLU, in torch operations.

With mean and var of all M values of a channel and xhat = (x - mean) / sqrt(var + eps)
    y = relu(weight xhat + bias + residual)
    d = dy where y > 0, else 0;   dresidual = d;   dbias = sum d;   dweight = sum d xhat
    dx = weight / sqrt(var + eps) (d - mean(d) - xhat mean(d xhat))
Ioffe & Szegedy 2015 (arXiv 1502.03167). Ranks that share statistics pool theirs (Chan et al. 1983) and add their sums.
"""

# M rows, all values of a channel    C channels    R ranks

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Normalisation(NamedTuple):
    """What a channel's values go through: weight [C], bias [C] or None, mean and biased variance [2, C]."""

    weight_C: Tensor
    bias_C: Tensor | None
    mean_var_2C: Tensor
    eps: float


def statistics(x_MC: Tensor, running: Sequence[Tensor], factor: float) -> Tensor:
    """Mean and biased variance [2, C]; `running`, where it is not empty, follows them as `pooled` says."""
    var_C, mean_C = torch.var_mean(_wide(x_MC), 0, correction=0)
    return _tracked(torch.stack((mean_C, var_C)), len(x_MC), running, factor)


def pooled(partials_R2C: Tensor, rows: int, running: Sequence[Tensor], factor: float) -> Tensor:
    """Mean and biased variance [2, C] of all ranks' rows, of `rows` each, out of every rank's.

    running: empty, or mean and variance [C], which become (1 - factor) times themselves plus factor times these, the
    variance without bias.
    """
    mean_RC, var_RC = partials_R2C.unbind(1)
    mean_C = mean_RC.mean(0)
    mean_var_2C = torch.stack((mean_C, (var_RC + (mean_RC - mean_C).square()).mean(0)))
    return _tracked(mean_var_2C, rows * len(partials_R2C), running, factor)


def apply(x_MC: Tensor, residual_MC: Tensor | None, norm: Normalisation, relu: bool) -> tuple[Tensor, Tensor]:
    """y of x's dtype, and uint8 [M, C], where ReLU keeps a value; empty unless there are both ReLU and residual."""
    v_MC = _scaled(x_MC, norm)
    if residual_MC is not None:
        v_MC = v_MC + residual_MC
    y_MC = v_MC.to(x_MC.dtype)
    kept = (~(y_MC <= 0)).byte() if relu and residual_MC is not None else y_MC.new_empty(0, dtype=torch.uint8)
    return y_MC.relu() if relu else y_MC, kept


def sums(dy_MC: Tensor, x_MC: Tensor, norm: Normalisation, kept: Tensor, relu: bool) -> Tensor:
    """The sums of d and of d xhat, [2, C]."""
    d_MC = _kept_gradient(dy_MC, x_MC, norm, kept, relu)
    return torch.stack((d_MC.sum(0), (d_MC * _normalised(x_MC, norm)).sum(0)))


def gradient(
    dy_MC: Tensor, x_MC: Tensor, norm: Normalisation, kept: Tensor, relu: bool, total_2C: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    """dx, and dresidual, empty where `kept` is. total_2C: the sums over `rows`, those of all ranks."""
    d_MC = _kept_gradient(dy_MC, x_MC, norm, kept, relu)
    scale_C = norm.weight_C * (norm.mean_var_2C[1] + norm.eps).rsqrt()
    means_2C = total_2C / rows
    dx_MC = scale_C * (d_MC - means_2C[0] - _normalised(x_MC, norm) * means_2C[1])
    return dx_MC.to(x_MC.dtype), d_MC.to(x_MC.dtype) if kept.numel() else x_MC.new_empty(0)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _tracked(mean_var_2C: Tensor, rows: int, running: Sequence[Tensor], factor: float) -> Tensor:
    for old_C, new_C, unbiased in zip(running, mean_var_2C, (1.0, rows / max(rows - 1, 1)), strict=False):
        old_C.mul_(1 - factor).add_(new_C, alpha=factor * unbiased)
    return mean_var_2C


def _normalised(x_MC: Tensor, norm: Normalisation) -> Tensor:
    mean_C, var_C = norm.mean_var_2C.unbind()
    return (_wide(x_MC) - mean_C) * (var_C + norm.eps).rsqrt()


def _scaled(x_MC: Tensor, norm: Normalisation) -> Tensor:
    v_MC = _normalised(x_MC, norm) * norm.weight_C
    return v_MC if norm.bias_C is None else v_MC + norm.bias_C


def _kept_gradient(dy_MC: Tensor, x_MC: Tensor, norm: Normalisation, kept: Tensor, relu: bool) -> Tensor:
    """d: what ReLU leaves of dy."""
    if not relu:
        return _wide(dy_MC)
    if not kept.numel():
        kept = ~(_scaled(x_MC, norm).to(x_MC.dtype) <= 0)
    return torch.where(kept.bool(), _wide(dy_MC), 0)
