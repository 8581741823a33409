"""Views in plain torch, for a batch of images of any sizes. Device-agnostic, without a host sync.

Crop and resize, rotate, quarter turns, flip; jitter, grey, clip; blur, clip; sobel; noise, clip; solarise; normalise;
cutout. Those of SimCLR in its order (arXiv 2002.05709, appendix A), the rest of its figure 5 where they make sense.
"""

# M views, B views of a chunk, S side

from __future__ import annotations

import torch
from torch import Tensor

from fastsimclr.kernels.precision import full_precision
from fastsimclr.kernels.views import colour, stencil
from fastsimclr.kernels.views.inputs import Brightness, Images, Params, Semantics, Triple
from fastsimclr.kernels.views.noise import add_noise
from fastsimclr.kernels.views.resample import axis_weights, gather_windows, quarter_turns, resample, rotate

# Bytes of one temporary of a chunk: within the cache of a core, or small beside the memory of an accelerator.
_CHUNK_BYTES = {"cpu": 1 << 20}
_CHUNK_BYTES_ELSEWHERE = 1 << 29


def make_views(
    images: Images,
    params: Params,
    *,
    size: int,
    semantics: Semantics,
    brightness: Brightness,
    mean: Triple | None,
    std: Triple | None,
    dtype: torch.dtype,
) -> Tensor:
    """The views of `params`, [M, 3, size, size] in `dtype`, channels-last; see fastsimclr.kernels.views.make_views."""
    device, count = images.buffer.device, params.source.shape[0]
    views = torch.empty((count, 3, size, size), dtype=dtype, device=device, memory_format=torch.channels_last)
    if count == 0:
        return views
    tallest, widest = params.extent.amax(dim=0).tolist()
    budget = _CHUNK_BYTES.get(device.type, _CHUNK_BYTES_ELSEWHERE)
    chunk = max(1, budget // (12 * max(tallest, size) * max(widest, size)))
    with full_precision(device):
        jitter = colour.Jitter.plan(params, semantics, brightness) if "jitter" in params.ops else None
        for start in range(0, count, chunk):
            rows = slice(start, min(start + chunk, count))
            x = _cut(images, params, rows, size, semantics)
            x = _colour(x, params, rows, jitter, semantics)
            if mean is not None and std is not None:
                for channel in range(3):
                    x[:, channel].sub_(mean[channel]).div_(std[channel])
            if "cutout" in params.ops:
                x = stencil.cutout(x, params.cutout[rows])
            views[rows] = x
    return views


def _cut(images: Images, params: Params, rows: slice, size: int, semantics: Semantics) -> Tensor:
    """Crop, resize, turn, flip: float32 [B, 3, S, S]."""
    source = params.source[rows]
    top, left, height, width = params.crop[rows].long().unbind(1)
    pitch = 3 * images.widths.index_select(0, source).long()
    first = images.offsets.index_select(0, source) + top * pitch + 3 * left
    tallest, widest = params.extent[rows].amax(dim=0).tolist()
    windows, shift = gather_windows(images.buffer, first, pitch, height, (tallest, widest))
    flip = params.flip[rows]
    if bool((params.extent[rows] == size).all()):  # cut to size already: resampling would be the identity
        x = windows.view(-1, size, size, 3).permute(0, 3, 1, 2).float().div_(255)
        x = torch.where(flip[:, None, None, None], x.flip(3), x) if "flip" in params.ops else x.contiguous()
    else:
        grid = torch.arange(size, device=top.device).expand(len(source), size)
        across = torch.where(flip[:, None], size - 1 - grid, grid) if "flip" in params.ops else grid
        x = resample(
            windows,
            axis_weights(semantics, height, 0, grid, size, tallest),
            axis_weights(semantics, width, shift, across, size, widest),
        )
    # The flip is done already: turning first and then mirroring is mirroring and turning back.
    if "rotate" in params.ops:
        angle = params.angle[rows]
        x = rotate(x, torch.where(flip, -angle, angle))
    if "quarter" in params.ops:
        quarter = params.quarter[rows]
        x = quarter_turns(x, torch.where(flip, -quarter, quarter))
    return x


def _colour(x: Tensor, params: Params, rows: slice, jitter: colour.Jitter | None, semantics: Semantics) -> Tensor:
    """Jitter, grey, blur, sobel, noise, solarise: float32 [B, 3, S, S] in [0, 1]."""
    shape = x.shape
    x = x.flatten(2)
    if jitter is not None:
        x = jitter.apply(x, rows, semantics)
    if "grey" in params.ops:
        x = colour.grey(x, params.grey[rows])
    x = x.clamp_(0, 1).view(shape)
    if "blur" in params.ops:
        x = colour.blur(x, params.sigma[rows], semantics).clamp_(0, 1)
    if "sobel" in params.ops:
        x = stencil.sobel(x, params.sobel[rows])
    if "noise" in params.ops:
        x = add_noise(x, params.noise[rows], params.noise_key[rows])
    if "solarise" in params.ops:
        x = colour.solarise(x, params.solarise[rows])
    return x
