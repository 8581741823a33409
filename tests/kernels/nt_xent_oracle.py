"""NT-Xent with weights and a bank by the whole matrix in float64, for autograd: what the kernels are held against."""

# M rows, both views    D dimensions    K rows of the bank

from __future__ import annotations

import math

import torch
from torch import Tensor


def pairs(images: int, dim: int, *, noise: float = 0.7, spread: float = 1.0, seed: int = 0) -> Tensor:
    """[2N, D] float32: pairs that differ by `noise`, about a common direction of length 1 - spread; norms .1 to 5."""
    generator = torch.Generator().manual_seed(1000 * images + dim + seed)
    base, other = torch.randn(2, images, dim, generator=generator) / math.sqrt(dim)
    views = spread * torch.cat((base, base + noise * other)) + (1 - spread) * torch.ones(dim) / math.sqrt(dim)
    return views * (0.1 + 5 * torch.rand(2 * images, 1, generator=generator))


def normalised(x: Tensor) -> Tensor:
    z: Tensor = x / x.norm(dim=1, keepdim=True)
    return z


def whole_matrix(
    z_MD: Tensor, temperature: float | Tensor, weights_M: Tensor | None = None, bank_KD: Tensor | None = None
) -> Tensor:
    """mean(w_i log(1 + sum over negatives exp(s_ij - s_ip))) of vectors that are normalised already."""
    m = len(z_MD)
    s_MM = z_MD @ z_MD.T / temperature
    itself, positive = (
        torch.eye(m, dtype=torch.bool, device=z_MD.device),
        torch.arange(m, device=z_MD.device).roll(m // 2),
    )
    s_M1 = s_MM.gather(1, positive[:, None])
    left_out = itself | itself[positive]
    negatives_M = (s_MM - s_M1).exp().masked_fill(left_out, 0).sum(1)
    if bank_KD is not None:
        negatives_M = negatives_M + (z_MD @ bank_KD.T / temperature - s_M1).exp().sum(1)
    losses_M = negatives_M.log1p()
    return (losses_M if weights_M is None else weights_M * losses_M).mean()


def top(z_MD: Tensor, k: int, bank_KD: Tensor | None = None) -> float:
    """The fraction of rows with fewer than k negatives at least as similar as the positive, within 5e-6."""
    m = len(z_MD)
    c_MM = z_MD @ z_MD.T
    positive = torch.arange(m, device=z_MD.device).roll(m // 2)
    c_M1 = c_MM.gather(1, positive[:, None])
    c_MM.fill_diagonal_(-2).scatter_(1, positive[:, None], -2)
    columns = c_MM if bank_KD is None else torch.cat((c_MM, z_MD @ bank_KD.T), dim=1)
    return float(((columns >= c_M1 - 5e-6).sum(1) < k).double().mean())
