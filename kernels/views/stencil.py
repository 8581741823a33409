"""Sobel edges and cutout: ops on a pixel's neighbours and on its place.

sobel = sqrt(gx^2 + gy^2) / (4 sqrt 2), gx and gy the 3 x 3 Sobel filters, so that values of [0, 1] stay in [0, 1].
cutout: DeVries and Taylor 2017, arXiv 1708.04552.
"""

# B views, C = 3 channels, S side

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sobel(x_BCSS: Tensor, chosen_B: Tensor) -> Tensor:
    """The strength of the edges of each channel of the chosen views, [B, 3, S, S].

    Borders repeat their own pixel (scipy's mode "reflect"), as skimage.filters.sobel does.
    """
    x = F.pad(x_BCSS, (1, 1, 1, 1), mode="replicate")
    down, right = x[:, :, 2:] - x[:, :, :-2], x[..., 2:] - x[..., :-2]
    gy = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
    gx = right[:, :, :-2] + 2 * right[:, :, 1:-1] + right[:, :, 2:]
    edges = (gx.square_() + gy.square_()).sqrt_().mul_(1 / (4 * math.sqrt(2)))
    return torch.where(chosen_B[:, None, None, None], edges, x_BCSS)


def cutout(x_BCSS: Tensor, box_B4: Tensor) -> Tensor:
    """Views that are 0 within box_B4 (int32 [B, 4]: top, left, height, width), whatever stood there."""
    place = torch.arange(x_BCSS.shape[2], device=x_BCSS.device)
    top, left, height, width = box_B4.unsqueeze(2).unbind(1)
    rows_BS, columns_BS = (place >= top) & (place < top + height), (place >= left) & (place < left + width)
    return x_BCSS.masked_fill_((rows_BS[:, :, None] & columns_BS[:, None])[:, None], 0)
