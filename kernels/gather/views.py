"""The dataset gather: finished views straight out of a data set held on the device, whose pixels are not copied."""

# N images, B ids, M views

from __future__ import annotations

import torch
from torch import Tensor

from fastsimclr.kernels.backend import Backend
from fastsimclr.kernels.views import Images, Params
from fastsimclr.kernels.views.inputs import Brightness, Semantics, Triple
from fastsimclr.kernels.views.op import Look, Pixels, render


def gather_views(
    dataset: Tensor | Images,
    ids: Tensor,
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
    """The views of the images dataset[ids] that `params` describes, [M, 3, size, size] in `dtype`, channels-last.

    dataset: uint8 [N, H, W, 3], contiguous, images of one size; or Images of any sizes. ids: int64 [B] on the dataset's
    device, which images are chosen, any as often as wanted; params.source (int32 [M]) picks among them, 0 to B - 1.
    The rest is as in fastsimclr.kernels.views.make_views, in the same launches. An id outside 0 to N - 1: ValueError on
    the CPU; on another device its views are NaN.
    """
    if isinstance(dataset, Tensor):
        if dataset.dim() != 4 or dataset.shape[3] != 3:
            raise ValueError(f"dataset is {list(dataset.shape)}; give [N, H, W, 3], or Images where sizes differ")
        pixels = Pixels(buffer=dataset, offsets=None, heights=None, widths=None, ids=ids)
    else:
        buffer, offsets = dataset.buffer, dataset.offsets
        pixels = Pixels(buffer=buffer, offsets=offsets, heights=dataset.heights, widths=dataset.widths, ids=ids)
    look = Look(size=size, semantics=semantics, brightness=brightness, mean=mean, std=std, dtype=dtype)
    return render(pixels, params, look, backend)
