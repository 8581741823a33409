"""The photometric ops, batched with parameters per view, under torchvision's and TensorFlow's definitions.

Brightness, contrast, torchvision's saturation and grey are x' = A x + b with A 3 x 3 and b per view. The order of the
four jitter ops differs between views, so each view runs the same seven slots: three affine slots, hue, three affine
slots, where the slots that its order does not use are the identity. Nothing depends on the data's values, and the
dear op, hue, is computed once.
"""

# B views, C = 3 channels, P = pixels, S side

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fastsimclr.kernels.views.inputs import Brightness, Params, Semantics

GREY = (0.2989, 0.587, 0.114)
_TINY = 1e-20


@lru_cache
def _grey_matrix(device: torch.device) -> Tensor:
    return torch.tensor([GREY] * 3, device=device)


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """Colour jitter of B views as slots: before the hue (0, 1, 2) and after it (3, 4, 5).

    matrix: float32 [6, B, 3, 3]. offset: [6, B, 1, 1], added. contrast: [6, B, 1, 1], how much of the mean is added.
    saturation: [6, B, 1, 1], factor of HSV saturation (1 everywhere under torchvision semantics).
    low, high: [6, B, 1, 1], the clip, infinite where the slot is not used. turns: [B, 1], of the hue.
    most: [B, 1, 1], 1 where the view is jittered, else infinite: the clip after the hue, which makes nothing negative.
    """

    matrix: Tensor
    offset: Tensor
    contrast: Tensor
    saturation: Tensor
    low: Tensor
    high: Tensor
    turns: Tensor
    most: Tensor

    @classmethod
    def plan(cls, params: Params, semantics: Semantics, brightness: Brightness) -> Jitter:
        """The slots of all M views; `order` and `jitter` of the parameters decide which slots are used."""
        order_M4, place = params.order.long(), torch.arange(4, device=params.order.device)
        hue_at = (order_M4 == 3).int().argmax(1, keepdim=True)
        op = torch.cat([order_M4[:, :3], order_M4[:, 1:]], 1)
        used = torch.cat([place[:3] < hue_at, place[1:] > hue_at], 1) & params.jitter[:, None]
        drawn, one, zero = params.factors.gather(1, op), params.factors.new_ones(()), params.factors.new_zeros(())
        factor = torch.where(used, drawn, one)
        offset = torch.where(used & (op == 0), drawn, zero) if brightness == "add" else torch.zeros_like(drawn)
        gain = torch.where(op == 0, one, factor) if brightness == "add" else factor
        is_saturation = op == 2
        blend = torch.where(is_saturation, 1 - factor, zero)
        if semantics == "tensorflow":
            gain, blend = torch.where(is_saturation, one, gain), torch.zeros_like(blend)
        eye = torch.eye(3, device=op.device)
        matrix = gain.T[..., None, None] * eye + blend.T[..., None, None] * _grey_matrix(op.device)
        limit = torch.where(used, zero, torch.inf)

        def column(values_M6: Tensor) -> Tensor:
            return values_M6.T[..., None, None].contiguous()

        return cls(
            matrix=matrix,
            offset=column(offset),
            contrast=column(torch.where(op == 1, 1 - factor, zero)),
            saturation=column(torch.where(is_saturation, factor, one)),
            low=column(-limit),
            high=column(limit + 1),
            turns=torch.where(params.jitter, params.factors[:, 3], zero)[:, None],
            most=torch.where(params.jitter, one, torch.inf)[:, None, None],
        )

    def apply(self, x_BCP: Tensor, rows: slice, semantics: Semantics) -> Tensor:
        """The views `rows` after jitter; x_BCP: float32 [B, 3, P]."""
        for slot in range(6):
            if slot == 3:
                x_BCP = shift_hue(x_BCP, self.turns[rows])
                if semantics == "tensorflow":
                    x_BCP.clamp_(max=self.most[rows]).clamp_(min=1 - self.most[rows])
            mean = x_BCP.mean(2, keepdim=True)
            if semantics == "torchvision":
                mean = (mean * _grey_matrix(mean.device)[0, :, None]).sum(1, keepdim=True)
            offset = self.contrast[slot, rows] * mean + self.offset[slot, rows]
            x_BCP = torch.baddbmm(offset, self.matrix[slot, rows], x_BCP)
            if semantics == "torchvision":
                x_BCP.clamp_(0, 1)
            else:
                x_BCP = scale_saturation(x_BCP, self.saturation[slot, rows])
                # Bicubic overshoots: a view that is not jittered keeps its values until the clip after grey.
                x_BCP.clamp_(min=self.low[slot, rows]).clamp_(max=self.high[slot, rows])
        return x_BCP


def _extremes(x_BCP: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest channel of each pixel, [B, P]; amin and amax are slow along an axis of three."""
    r, g, b = x_BCP.unbind(1)
    return torch.minimum(torch.minimum(r, g), b), torch.maximum(torch.maximum(r, g), b)


def shift_hue(x_BCP: Tensor, turns_B1: Tensor) -> Tensor:
    """The hue turned by turns_B1 (1 = once round) at fixed largest and smallest channel, as in HSV. [B, 3, P]."""
    r, g, b = x_BCP.unbind(1)
    low, top = _extremes(x_BCP)
    chroma = top - low
    sixth = (chroma * 6).clamp_(min=_TINY).reciprocal_()
    hue = torch.where(top == g, (b - r).mul_(sixth).add_(1 / 3), (r - g).mul_(sixth).add_(2 / 3))
    hue = torch.where(top == r, (g - b).mul_(sixth), hue).add_(turns_B1)
    out = torch.empty_like(x_BCP)
    # Channel n is low + chroma * clip(|6 h - 3| - 1) at hue h from its own primary; whole turns keep h positive.
    for channel, start in enumerate((1, 2 / 3, 4 / 3)):
        away = (hue + start).frac_().mul_(6).sub_(3).abs_().sub_(1).clamp_(0, 1)
        torch.addcmul(low, chroma, away, out=out[:, channel])
    return out


def scale_saturation(x_BCP: Tensor, factor_B11: Tensor) -> Tensor:
    """HSV saturation times a factor, clipped to [0, 1], at fixed hue and value: tf.image.adjust_saturation. [B, 3, P].

    rgb' = v + min(f, v / chroma) (rgb - v), as s = chroma / v and a factor of s is one of every distance to v.
    """
    low, top = (side[:, None] for side in _extremes(x_BCP))
    ratio = torch.minimum(factor_B11, top / (top - low).clamp_(min=_TINY)).clamp_(min=0)
    ratio = torch.where(factor_B11 == 1, factor_B11, ratio)
    return torch.addcmul(x_BCP, ratio.sub_(1), x_BCP - top)


def grey(x_BCP: Tensor, chosen_B: Tensor) -> Tensor:
    """The chosen views with all channels .2989 r + .587 g + .114 b. [B, 3, P]."""
    eye = torch.eye(3, device=x_BCP.device)
    matrix = torch.where(chosen_B[:, None, None], _grey_matrix(x_BCP.device), eye)
    return torch.bmm(matrix, x_BCP)


@lru_cache
def _band(size: int, radius: int, semantics: Semantics, device: torch.device) -> Tensor:
    """How often the kernel's value at distance d falls on entry (s, t) of the blur matrix, [radius + 1, S * S]."""
    band = torch.zeros(radius + 1, size, size)
    for row in range(size):
        for step in range(-radius, radius + 1):
            column = row + step
            if semantics == "torchvision":
                column = abs(column) if column < size else 2 * (size - 1) - column
            if 0 <= column < size:
                band[abs(step), row, column] += 1
    return band.view(radius + 1, size * size).to(device)


def blur_matrix(sigma_B: Tensor, size: int, radius: int, semantics: Semantics) -> Tensor:
    """The Gaussian of 2 * radius + 1 pixels as a matrix on `size` pixels, [B, size, size]; sigma 0: the identity.

    Edges: reflected under torchvision semantics, zeros under tensorflow.
    """
    distance = torch.arange(radius + 1, device=sigma_B.device)
    taps = (-0.5 * (distance / sigma_B.clamp(min=0.02)[:, None]) ** 2).exp()
    taps = taps / (2 * taps.sum(1, keepdim=True) - 1)
    return (taps @ _band(size, radius, semantics, sigma_B.device)).view(-1, size, size)


def blur(x_BCSS: Tensor, sigma_B: Tensor, semantics: Semantics) -> Tensor:
    """Gaussian blur with a kernel of 2 * int(S // 10 / 2) + 1 pixels; sigma 0 leaves a view as it is. [B, 3, S, S]."""
    b, channels, size, _ = x_BCSS.shape
    radius = int(size // 10 / 2)
    if radius == 0:
        return x_BCSS
    kernel_BSS = blur_matrix(sigma_B, size, radius, semantics)
    across = torch.bmm(x_BCSS.reshape(b, channels * size, size), kernel_BSS.transpose(1, 2))
    return torch.matmul(kernel_BSS[:, None], across.view(b, channels, size, size))


def solarise(x_BCSS: Tensor, chosen_B: Tensor) -> Tensor:
    """The chosen views with every value of one half or more inverted. [B, 3, S, S]."""
    return torch.where(chosen_B[:, None, None, None] & (x_BCSS >= 0.5), 1 - x_BCSS, x_BCSS)
