"""Crop, resize and turn: ragged windows are gathered, then resampled by one weight matrix for each axis of each view.

out[s, t] = sum_yx weights_y[s, y] window[y, x] weights_x[t, x]: separable, so two batched matrix products.
"""

# B views, S output side, Y by X the window (the largest crop of the chunk), C = 3 channels

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsimclr.kernels.views.inputs import Semantics

_FAR = 1e9


def gather_windows(
    buffer: Tensor, start_B: Tensor, pitch_B: Tensor, rows_B: Tensor, extent: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Windows of `extent` = (Y, X) pixels out of a buffer of images, uint8 [B, Y, X * 3], and their shift, int64 [B].

    buffer: uint8 [bytes]. start_B: int64, first byte of a window. pitch_B: int64, bytes from row to row.
    rows_B: int64, rows that a view needs; those below repeat the last one. Pixels to the right of an image are
    whatever follows it. A window that would leave the buffer begins `shift` pixels further left.
    """
    height, width = extent
    overrun = start_B + (rows_B - 1) * pitch_B + 3 * width - buffer.shape[0]
    shift_B = (overrun.clamp(min=0) + 2) // 3
    row_Y = torch.arange(height, device=buffer.device)
    starts_BY = (start_B - 3 * shift_B)[:, None] + torch.minimum(row_Y, rows_B[:, None] - 1) * pitch_B[:, None]
    # Overlapping rows of one stride: an index for each row, not for each byte.
    rows = buffer.as_strided((buffer.shape[0] - 3 * width + 1, 3 * width), (1, 1))
    return rows.index_select(0, starts_BY.flatten()).view(-1, height, 3 * width), shift_B


def axis_weights(
    semantics: Semantics, length_B: Tensor, shift_B: Tensor | int, grid_BS: Tensor, size: int, span: int
) -> Tensor:
    """Weights of one axis, float32 [B, S, span]; zero outside the crop, sums of one along the span.

    length_B: int64, the crop's pixels on this axis, which begin at `shift_B` of the span's.
    grid_BS: int64, the output pixel that stands at each place, 0 .. size - 1 (reversed where flipped).
    """
    pixel_BX = torch.arange(span, device=length_B.device) - (
        shift_B.view(-1, 1) if isinstance(shift_B, Tensor) else shift_B
    )
    inside_BX = (pixel_BX >= 0) & (pixel_BX < length_B[:, None])
    pixel_BX = torch.where(inside_BX, pixel_BX, _FAR).float()
    weigh = _triangle if semantics == "torchvision" else _legacy_bicubic
    return weigh(length_B[:, None], grid_BS, size, pixel_BX[:, None])


def _triangle(length_B1: Tensor, grid_BS: Tensor, size: int, pixel_B1X: Tensor) -> Tensor:
    """Bilinear with antialiasing, half-pixel centres: F.interpolate(antialias=True, align_corners=False)."""
    scale_B1 = length_B1.double() / size
    centre_BS = (grid_BS + 0.5) * scale_B1
    # The whole part apart: differences of integers are exact in float32, so that wide images lose no digits.
    whole_BS = centre_BS.floor()
    weight_BSX = (pixel_B1X + 0.5) - whole_BS.float()[..., None]
    weight_BSX.sub_((centre_BS - whole_BS).float()[..., None]).abs_()
    weight_BSX.mul_(-1 / scale_B1.clamp(min=1).float()[..., None]).add_(1).clamp_(min=0)
    return weight_BSX.div_(weight_BSX.sum(2, keepdim=True))


def _legacy_bicubic(length_B1: Tensor, grid_BS: Tensor, size: int, pixel_B1X: Tensor) -> Tensor:
    """TensorFlow's resize_bicubic of old: a = -.75, no half-pixel centres, no antialiasing, edges repeated.

    Offsets are rounded to 1/1024, as its table of coefficients has 1024 entries; in float32, as there.
    """
    place_BS = grid_BS.float() * (length_B1.float() / size)
    whole_BS = place_BS.floor()
    offset_BS = (place_BS - whole_BS).mul_(1024).round_().div_(1024)
    weight_BSX = torch.zeros(*grid_BS.shape, pixel_B1X.shape[2], device=grid_BS.device)
    for tap in (-1, 0, 1, 2):
        at_BS = torch.minimum((whole_BS + tap).clamp(min=0), length_B1 - 1.0)
        weight_BSX.addcmul_(_cubic((offset_BS - tap).abs())[..., None], (pixel_B1X == at_BS[..., None]).float())
    return weight_BSX


def _cubic(x: Tensor, a: float = -0.75) -> Tensor:
    """Keys' cubic convolution kernel at distances 0 <= x <= 2."""
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, far)


def resample(window_BYXC: Tensor, weights_BSY: Tensor, weights_BTX: Tensor) -> Tensor:
    """uint8 windows [B, Y, X * 3] and the weights of both axes, float32, to planar views in [0, 1], [B, 3, S, S]."""
    b, size, span = weights_BTX.shape
    tall = torch.bmm(weights_BSY.div(255), window_BYXC.float())
    planar = tall.view(b, size, span, 3).permute(0, 3, 1, 2).reshape(b, 3 * size, span)
    return torch.bmm(planar, weights_BTX.transpose(1, 2)).view(b, 3, size, size)


def rotate(x_BCSS: Tensor, angle_B: Tensor) -> Tensor:
    """Views turned counter-clockwise about their centre by angle_B (radians): bilinear, black where uncovered."""
    cos, sin, zero = angle_B.cos(), angle_B.sin(), torch.zeros_like(angle_B)
    theta = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid = F.affine_grid(theta, list(x_BCSS.shape), align_corners=False)
    return F.grid_sample(x_BCSS, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def quarter_turns(x_BCSS: Tensor, turns_B: Tensor) -> Tensor:
    """Views turned counter-clockwise by 90 degrees as often as turns_B (int32) says."""
    twice, once = (turns_B & 2).bool()[:, None, None, None], (turns_B & 1).bool()[:, None, None, None]
    x_BCSS = torch.where(twice, x_BCSS.flip((2, 3)), x_BCSS)
    return torch.where(once, x_BCSS.rot90(1, (2, 3)), x_BCSS)
