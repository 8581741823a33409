"""Crops cut and resized on the CPU, out of one decoded image for all of its views, as PIL and torchvision resize.

Bilinear, antialiased where it shrinks; within .53 of 255 levels of the same in float32, by cut.c where it is compiled.
Without a C compiler at its installation torch's own operator does it (within 1 level, three to four times slower).
"""

# V views, N images, S side of a view

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsimclr.loaders.arrays import Ints, Pixels
from fastsimclr.loaders.compiled import LIBRARY
from fastsimclr.loaders.draw import Policy, ViewParams, draw

Sizes = npt.NDArray[np.int32]

MOST = 32
"""Largest reduction that cut.c's 16 bits hold; MOST of jpeg.c."""


@dataclass(frozen=True, kw_only=True)
class Crops:
    """Which views are wanted of each image: views 0 .. views - 1 that `draw` gives for the policy and the seed."""

    policy: Policy
    seed: int
    views: int

    def draw(self, epochs: Ints | Tensor, ids: Ints | Tensor, sizes: Sizes | Tensor) -> ViewParams:
        """The parameters of the V·N views of images of `sizes` (int32 [N, 2]), view-major."""
        return draw(self.policy, self.seed, epochs, ids, self.views, sizes)


def cut(pixels: Pixels, box: tuple[int, int, int, int], out: Pixels) -> None:
    """The crop `box` (top, left, height, width) of `pixels` (uint8 [H, W, 3]) resized into `out` (uint8 [S, S, 3]).

    ValueError for a box that is empty or not within the image.
    """
    top, left, height, width = box
    size = out.shape[0]
    pitch, *steps = pixels.strides
    if not (0 <= top < top + height <= pixels.shape[0] and 0 <= left < left + width <= pixels.shape[1]):
        raise ValueError(f"box={box} must lie in an image of {pixels.shape[:2]} pixels")
    if LIBRARY is not None and max(height, width) <= MOST * size and steps == [3, 1] and out.flags.c_contiguous:
        if LIBRARY.fastsimclr_cut(
            pixels.ctypes.data + top * pitch + 3 * left, pitch, height, width, size, out.ctypes.data
        ):
            raise MemoryError(f"no memory to cut {height} x {width} pixels")
        return
    window = pixels[top : top + height, left : left + width].copy()  # torch warns of memory that is for reading only
    planar = torch.from_numpy(window).permute(2, 0, 1)[None]
    small = F.interpolate(planar, size=(size, size), mode="bilinear", antialias=True)
    out[:] = small[0].permute(1, 2, 0).numpy()


def cut_many(memory: Pixels, starts: Ints, sizes: Sizes, boxes: Sizes, out: Pixels, rows: slice) -> None:
    """The crops of images `rows` of N that lie decoded in `memory` (uint8, flat): a whole batch without Python between.

    starts: int64 [N], where each image begins. sizes: int32 [N, 2], its pixels. boxes: int32 [V, N, 4], as for `cut`.
    out: uint8 [V, N, S, S, 3]. All contiguous. ValueError for an image or a box outside its memory.
    """
    views, n, size = out.shape[:3]
    some, shapes, windows = starts[rows], sizes[rows].astype(np.int64), boxes[:, rows]
    ends = windows[:, :, :2] + windows[:, :, 2:]
    inside = (windows[..., :2] >= 0).all() and (windows[..., 2:] > 0).all() and (ends <= shapes).all()
    if not inside or (some < 0).any() or (some + 3 * shapes.prod(axis=1) > len(memory)).any():
        raise ValueError(f"rows {rows.start} to {rows.stop} of {n}: an image or a box lies outside of its memory")
    if LIBRARY is None or windows[..., 2:].max(initial=0) > MOST * size:
        for k in range(*rows.indices(n)):
            height, width = sizes[k].tolist()
            image = memory[starts[k] : starts[k] + 3 * height * width].reshape(height, width, 3)
            for view in range(views):
                cut(image, tuple(boxes[view, k].tolist()), out[view, k])
        return
    first, count = rows.start, len(some)
    widths = np.ascontiguousarray(sizes[rows, 1])
    arrays = (some.ctypes.data, widths.ctypes.data, boxes[:, first:].ctypes.data)
    if LIBRARY.fastsimclr_cut_many(memory.ctypes.data, count, views, n, *arrays, size, out[:, first:].ctypes.data):
        raise MemoryError(f"no memory to cut {count} images")


def copy_many(memory: Pixels, starts: Ints, counts: Ints, out: Pixels, out_starts: Ints) -> None:
    """counts[k] bytes of `memory` from starts[k] to `out` from out_starts[k]; int64 [n], both memories uint8, flat.

    For where cut.c is compiled. ValueError for bytes outside of either.
    """
    assert LIBRARY is not None
    least = min(starts.min(initial=0), out_starts.min(initial=0), counts.min(initial=0))
    if least < 0 or (starts + counts > len(memory)).any() or (out_starts + counts > len(out)).any():
        raise ValueError(f"{len(starts)} images: bytes lie outside of their memory")
    first, bytes_of, to = (np.ascontiguousarray(array) for array in (starts, counts, out_starts))
    arrays = first.ctypes.data, bytes_of.ctypes.data, out.ctypes.data, to.ctypes.data
    LIBRARY.fastsimclr_copy_many(memory.ctypes.data, len(starts), *arrays)
