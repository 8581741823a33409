"""Crops cut and resized on the CPU, out of one decoded image for all of its views.

Bilinear, as torchvision resizes. Up to a reduction of 1.15 OpenCV's plain bilinear resize, mean difference below one of
255 levels to the antialiased one (400 ImageNet samples, docs/loaders.md); above, torch's antialiased resize of uint8.
"""

# V views, N images, S side of a view

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from fastsimclr.loaders.draw import Policy, ViewParams, draw

Ints = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]

PLAIN = 1.15
"""Largest reduction on an axis at which plain bilinear stands for antialiased bilinear."""

# OpenCV would use threads of its own for one small image, beside those that the loader runs.
cv2.setNumThreads(1)


@dataclass(frozen=True, kw_only=True)
class Crops:
    """Which crops a loader cuts itself: those of views 0 .. views - 1 that `draw` gives for the policy and the seed."""

    policy: Policy
    seed: int
    views: int

    def draw(self, epochs: Ints, ids: Ints, sizes: npt.NDArray[np.int32]) -> ViewParams:
        """The parameters of the V·N views of images of `sizes` (int32 [N, 2]), view-major."""
        return draw(self.policy, self.seed, epochs, ids, self.views, sizes)


def cut(pixels: Pixels, box: tuple[int, int, int, int], out: Pixels) -> None:
    """The crop `box` (top, left, height, width) of `pixels` (uint8 [H, W, 3]) resized into `out` (uint8 [S, S, 3])."""
    top, left, height, width = box
    size = out.shape[0]
    window = pixels[top : top + height, left : left + width]
    if max(height, width) <= PLAIN * size:
        cv2.resize(window, (size, size), dst=out, interpolation=cv2.INTER_LINEAR)
        return
    planar = torch.from_numpy(window).permute(2, 0, 1)[None]
    small = F.interpolate(planar, size=(size, size), mode="bilinear", antialias=True)
    out[:] = small[0].permute(1, 2, 0).numpy()


def as_cut(params: ViewParams, size: int) -> ViewParams:
    """The parameters of views whose crops lie ready, one [S, S, 3] image a view: the whole of image m is view m."""
    m = len(params)
    whole = torch.tensor([0, 0, size, size], dtype=torch.int32).repeat(m, 1)
    return replace(params, source=torch.arange(m, dtype=torch.int32), crop=whole, extent=whole[:, 2:])
