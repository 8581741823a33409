"""Views of images on the device: random crops, colour jitter, grey, blur, in one call for a ragged batch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsimclr.kernels.views import reference
from fastsimclr.kernels.views.inputs import Brightness, Images, Params, Semantics, Triple

__all__ = ["BACKENDS", "Images", "Params", "make_views"]

BACKENDS = {"reference": reference.make_views}


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
    backend: str = "auto",
) -> Tensor:
    """The M views that `params` describes, [M, 3, size, size] in `dtype`, channels-last, on the images' device.

    Values are in [0, 1], or (x - mean) / std where both are given. Arithmetic is float32 whatever `dtype` is.
    semantics: "torchvision" or "tensorflow" (as google-research/simclr uses it). brightness: "multiply" or "add".
    backend: "auto", or a key of BACKENDS. Raises ValueError for an unknown backend or keyword, mean without std, or
    images and parameters on different devices.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not available for views; use auto or one of {sorted(BACKENDS)}")
    if semantics not in ("torchvision", "tensorflow") or brightness not in ("multiply", "add"):
        raise ValueError(
            f"semantics={semantics!r}, brightness={brightness!r}: give torchvision or tensorflow, multiply or add"
        )
    if (mean is None) != (std is None):
        raise ValueError(f"mean={mean} and std={std} go together; give both or neither")
    if images.buffer.device != params.source.device:
        raise ValueError(
            f"images are on {images.buffer.device}, parameters on {params.source.device}; move one with .to(device)"
        )
    render = BACKENDS["reference" if backend == "auto" else backend]
    return render(
        images, params, size=size, semantics=semantics, brightness=brightness, mean=mean, std=std, dtype=dtype
    )
