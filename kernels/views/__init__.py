"""Views of images on the device: random crops, colour jitter, grey, blur, in one call for a ragged batch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsimclr.kernels.backend import Backend
from fastsimclr.kernels.views.inputs import Brightness, Images, Params, Semantics, Triple
from fastsimclr.kernels.views.op import Look, Pixels, render

__all__ = ["Images", "Params", "make_views"]


def make_views(
    images: Images,
    params: Params,
    *,
    size: int,
    semantics: Semantics = "torchvision",
    brightness: Brightness = "multiply",
    mean: Triple | None = None,
    std: Triple | None = None,
    dtype: torch.dtype = torch.float32,
    backend: Backend = "auto",
) -> Tensor:
    """The M views that `params` describes, [M, 3, size, size] in `dtype`, channels-last, on the images' device.

    Values are in [0, 1], or (x - mean) / std where both are given. Arithmetic is float32 whatever `dtype` is; where
    that has 16 bits, views that are blurred or searched for edges pass through memory as float16 on the way.
    size: 1 to 16383. semantics: "torchvision" or "tensorflow" (as google-research/simclr uses it). brightness:
    "multiply" or "add". dtype: float32, float16, bfloat16, or float64, which the reference alone gives, of
    float32 arithmetic. backend: "auto", "fused" or "reference".

    A row whose source is no image, whose crop leaves its image or has no pixels, whose order is no permutation, or
    whose factors, angle, sigma or noise are not finite: ValueError on the CPU; on another device, where that would have
    to be waited for, the whole view is NaN. ValueError for what shapes, dtypes, devices and keywords show. No gradient.
    """
    pixels = Pixels(
        buffer=images.buffer, offsets=images.offsets, heights=images.heights, widths=images.widths, ids=None
    )
    look = Look(size=size, semantics=semantics, brightness=brightness, mean=mean, std=std, dtype=dtype)
    return render(pixels, params, look, backend)
