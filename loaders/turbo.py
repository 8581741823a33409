"""Runs of JPEGs read, decoded and cut in one call of jpeg.c, by the system's libturbojpeg (1.5 or later).

A short cut: the pixels are those of `decode`, bit for bit, and whatever is not a sound plain JPEG is left to it.
Without libturbojpeg or a C compiler at the installation all of them are.
"""

# n images of a run, V views, S side

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastsimclr.loaders.arrays import Ints, Pixels
from fastsimclr.loaders.compiled import LIBRARY, TURBO_JPEG
from fastsimclr.loaders.scratch import Scratch

Sizes = npt.NDArray[np.int32]

AVAILABLE = TURBO_JPEG is not None
_FILE, _IMAGE = Scratch(), Scratch()


@dataclass(frozen=True, kw_only=True)
class Spans:
    """Where n JPEG files lie in an open file.

    file: its number. starts, lengths: int64 [n], bytes; a length of 0 leaves image k to `decode`.
    """

    file: int
    starts: Ints
    lengths: Ints


def decode_run(
    files: Spans | Sequence[bytes], sizes: Sizes, max_pixels: int, out: Pixels, out_starts: Ints
) -> list[int]:
    """The images of `files` decoded to RGB, image k from out[out_starts[k]] on; the images that it leaves to `decode`.

    sizes: int32 [n, 2], height and width by their headers. out: uint8, flat, with room for 3 height width each.
    """
    return _run(files, sizes, max_pixels, out, out_starts=np.ascontiguousarray(out_starts))


def crop_run(
    files: Spans | Sequence[bytes], sizes: Sizes, max_pixels: int, out: Pixels, boxes: Sizes, rows: slice
) -> list[int]:
    """The crops of images `rows` of N decoded and cut as by `cut`; of the n images those that it leaves to that.

    boxes: int32 [V, N, 4], within the images. out: uint8 [V, N, S, S, 3]. Both contiguous.
    """
    return _run(files, sizes, max_pixels, out, boxes=boxes, first_row=rows.start)


def _run(
    files: Spans | Sequence[bytes],
    sizes: Sizes,
    max_pixels: int,
    out: Pixels,
    *,
    out_starts: Ints | None = None,
    boxes: Sizes | None = None,
    first_row: int = 0,
) -> list[int]:
    n = len(sizes)
    if LIBRARY is None or TURBO_JPEG is None:
        return list(range(n))
    sizes = np.ascontiguousarray(sizes)
    areas = sizes.prod(axis=1, dtype=np.int64)
    if isinstance(files, Spans):
        number, data, starts = files.file, None, np.ascontiguousarray(files.starts)
        lengths = np.where(areas <= max_pixels, files.lengths, 0)
        room = _FILE.take(int(lengths.max(initial=1)))
    else:
        number, data, starts = -1, (ctypes.c_char_p * n)(*files), np.zeros(0, dtype=np.int64)
        lengths = np.where(areas <= max_pixels, [len(file) for file in files], 0)
        room = np.zeros(0, dtype=np.uint8)
    left = np.empty(n, dtype=np.uint8)
    views = stride = size = 0
    scratch, windows, target, at = np.zeros(0, dtype=np.uint8), None, out, None
    if boxes is not None:
        views, stride, size = out.shape[:3]
        scratch = _IMAGE.take(3 * int(areas[lengths > 0].max(initial=1)))
        windows, target = boxes[:, first_row:].ctypes.data, out[:, first_row:]
    elif out_starts is not None:
        at = out_starts.ctypes.data
    LIBRARY.fastsimclr_jpegs(
        *(TURBO_JPEG, n, number, data, starts.ctypes.data, lengths.ctypes.data, sizes.ctypes.data),
        *(room.ctypes.data, scratch.ctypes.data, views, stride, windows, size, target.ctypes.data, at),
        left.ctypes.data,
    )
    return list(np.flatnonzero(left).tolist())
