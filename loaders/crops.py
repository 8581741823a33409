"""Crop windows under both semantics: torchvision's RandomResizedCrop, TensorFlow's sampler, and the centred window."""

# R images, T tries

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt

Semantics = Literal["torchvision", "tensorflow"]
I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Range = tuple[float, float]
# (rows int64 [R], first try, T) -> uniform numbers in (0, 1), float64 [R, T, 4]
Uniforms = Callable[[I64, int, int], F64]

# Most rows are settled by their first try; the rest are tried in bulk. The sums are the two rules' numbers of tries.
_TRIES = {"torchvision": (1, 9), "tensorflow": (1, 9, 90)}
_MIN_OBJECT_COVERED = 0.1


def random_crops(semantics: Semantics, scale: Range, ratio: Range, sizes: I64, uniforms: Uniforms) -> I64:
    """One random window for each image: top, left, height, width in pixels, int64 [R, 4].

    sizes: int64 [R, 2], height and width. scale: range of the area as a part of the image's. ratio: of width / height.
    A try's numbers depend on its row and its place alone, so it does not matter how many tries other rows need.
    """
    heights, widths = sizes[:, 0], sizes[:, 1]
    if semantics == "torchvision":
        propose, boxes = _propose_torchvision, _central_fallback(ratio, heights, widths)
    else:
        propose, boxes = _propose_tensorflow, np.stack([0 * heights, 0 * widths, heights, widths], axis=1)
    rows, first = np.arange(len(sizes)), 0
    for count in _TRIES[semantics]:
        tried, valid = propose(uniforms(rows, first, count), scale, ratio, heights[rows, None], widths[rows, None])
        chosen = valid.argmax(axis=1)
        found = valid[np.arange(len(rows)), chosen]
        boxes[rows[found]] = tried[found, chosen[found]]
        rows, first = rows[~found], first + count
        if rows.size == 0:
            break
    return boxes


def centre_crops(semantics: Semantics, fraction: float, sizes: I64) -> I64:
    """The square window in the centre, round(fraction * shorter side) wide: top, left, height, width, int64 [R, 4].

    For torchvision this is Resize(size / fraction) and CenterCrop(size) in one resampling; for tensorflow it is
    center_crop of google-research/simclr data_util.py, which rounds an odd margin up.
    """
    side = np.maximum(np.rint(fraction * sizes.min(axis=1)), 1).astype(np.int64)[:, None]
    margin = sizes - side
    corner = (margin + 1) // 2 if semantics == "tensorflow" else np.rint(margin / 2).astype(np.int64)
    return np.concatenate([corner, side, side], axis=1)


def _propose_torchvision(u: F64, scale: Range, ratio: Range, heights: I64, widths: I64) -> tuple[I64, Bools]:
    """RandomResizedCrop.get_params, one try in each column: area uniform, logarithm of the ratio uniform."""
    area = heights * widths * (scale[0] + (scale[1] - scale[0]) * u[..., 0])
    low, high = np.log(ratio[0]), np.log(ratio[1])
    aspect = np.exp(low + (high - low) * u[..., 1])
    width, height = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    valid = (width > 0) & (width <= widths) & (height > 0) & (height <= heights)
    top, left = np.floor(u[..., 2] * (heights - height + 1)), np.floor(u[..., 3] * (widths - width + 1))
    return np.stack([top, left, height, width], axis=-1).astype(np.int64), valid


def _central_fallback(ratio: Range, heights: I64, widths: I64) -> I64:
    """What RandomResizedCrop takes after ten misses: the largest centred window whose ratio is in range."""
    shape = widths / heights
    width = np.where(shape > ratio[1], np.rint(heights * ratio[1]), widths).astype(np.int64)
    height = np.where(shape < ratio[0], np.rint(widths / ratio[0]), heights).astype(np.int64)
    return np.stack([(heights - height) // 2, (widths - width) // 2, height, width], axis=1)


def _propose_tensorflow(u: F64, scale: Range, ratio: Range, heights: I64, widths: I64) -> tuple[I64, Bools]:
    """tf.image.sample_distorted_bounding_box over the whole image, as google-research/simclr calls it.

    The ratio is uniform, then the height is a uniform integer between those that the two areas ask for; corners are
    drawn from [0, margin), so the last row and column are left out unless the window spans the image.
    """
    aspect = ratio[0] + (ratio[1] - ratio[0]) * u[..., 0]
    least, most = scale[0] * heights * widths, scale[1] * heights * widths
    highest = np.rint(np.sqrt(most / aspect))
    widest = np.floor((widths + 0.5 - 1e-7) / aspect)
    highest = np.minimum(np.where(np.rint(highest * aspect) > widths, widest, highest), heights)
    lowest = np.minimum(np.rint(np.sqrt(least / aspect)), highest)
    height = lowest + np.floor(u[..., 1] * (highest - lowest + 1))
    # Rounding may leave the range of areas by a pixel: TensorFlow tries one taller, then one lower.
    height = height + (height * np.rint(height * aspect) < least)
    height = height - (height * np.rint(height * aspect) > most)
    width = np.rint(height * aspect)
    area = height * width
    valid = (area >= least) & (area <= most) & (area >= _MIN_OBJECT_COVERED * heights * widths)
    valid &= (width > 0) & (height > 0) & (width <= widths) & (height <= heights)
    top, left = np.floor(u[..., 2] * (heights - height)), np.floor(u[..., 3] * (widths - width))
    return np.stack([top, left, height, width], axis=-1).astype(np.int64), valid
