"""Gaussian noise as a pure function of a key and a pixel's place, by Philox4x32-10 and Box-Muller.

words = Philox(key = (noise_key, 0), counter = (y S + x, 0, 0, 0)); u = ((word >> 8) + .5) 2^-24;
normals = sqrt(-2 ln u0) (cos, sin)(2 pi u1), sqrt(-2 ln u2) cos(2 pi u3).  Salmon et al. 2011; Box and Muller 1958.
"""

# B views, C = 3 channels, P = pixels

from __future__ import annotations

import math

import torch
from torch import Tensor

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def philox(counter: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words for each counter (c, 0, 0, 0) and key (k, 0); all int64 in [0, 2**32), broadcast."""
    c0, k0, k1 = counter, key, 0
    c1 = c2 = c3 = torch.zeros_like(counter)
    for _ in range(10):
        # The product wraps to a negative int64 at 2**63; the mask makes its high word right again.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((second >> 32) & _WORD) ^ c1 ^ k0, second & _WORD
        c2, c3 = ((first >> 32) & _WORD) ^ c3 ^ k1, first & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def normals(key_B: Tensor, pixels: int) -> Tensor:
    """Standard normal numbers, float32 [B, 3, pixels]. key_B: int32, its bits taken as unsigned."""
    counter = torch.arange(pixels, device=key_B.device)
    words = philox(counter, (key_B.long() & _WORD)[:, None])
    u0, u1, u2, u3 = (((word >> 8).float() + 0.5) * 2.0**-24 for word in words)
    r, r2 = (-2 * u0.log()).sqrt(), (-2 * u2.log()).sqrt()
    turn, turn2 = 2 * math.pi * u1, 2 * math.pi * u3
    return torch.stack([r * turn.cos(), r * turn.sin(), r2 * turn2.cos()], dim=1)


def add_noise(x_BCSS: Tensor, std_B: Tensor, key_B: Tensor) -> Tensor:
    """Views plus std_B times their normal numbers, clipped to [0, 1]; std 0 leaves a view as it is. [B, 3, S, S]."""
    noise = normals(key_B, x_BCSS.shape[2] * x_BCSS.shape[3]).view_as(x_BCSS)
    return noise.mul_(std_B[:, None, None, None]).add_(x_BCSS).clamp_(0, 1)
