"""What one image becomes in a packed file: a plain baseline JPEG that every reader decodes alike, or decoded pixels.

Plain: sequential Huffman coding of 8 bits, grey or YCbCr, and no EXIF orientation, which OpenCV and DALI would apply
where this project, like torchvision's ImageFolder, ignores it (decode.py). Such a file is stored byte by byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import simplejpeg

from fastsimclr.loaders.arrays import Pixels
from fastsimclr.loaders.beton.lossless import to_baseline
from fastsimclr.loaders.decode import MAX_PIXELS, decode
from fastsimclr.loaders.source import DataError

Way = Literal["verbatim", "orientation removed", "baseline", "re-encoded", "shrunk", "pixels"]

cv2.setNumThreads(1)  # the threads of the packer are enough

_PLAIN = (0xC0, 0xC1)  # baseline and extended sequential, Huffman
_EXIF = b"Exif\0"
_ORIENTATION = 0x0112


@dataclass(frozen=True, kw_only=True)
class Recoding:
    """How images are stored."""

    short_side: int | None = None
    """Shrink to this many pixels on the shorter side; null: keep the size. Smaller images stay as they are."""
    quality: int = 90
    """JPEG quality of what must be encoded: shrunk, no JPEG, CMYK or RGB JPEG, progressive with no libturbojpeg."""
    store: Literal["auto", "jpeg", "raw"] = "auto"
    """jpeg; raw: decoded pixels, some nine times as large; auto: jpeg for image files, raw for decoded sets."""
    max_pixels: int = MAX_PIXELS
    """Most pixels an image may have; larger ones are left out."""

    def __post_init__(self) -> None:
        rules = {
            "short_side": (self.short_side is None or 1 <= self.short_side < 2**16, "1 to 65535"),
            "quality": (1 <= self.quality <= 100, "1 to 100; 90 is usual"),
            "max_pixels": (self.max_pixels >= 1, "1 or more"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"--{name}={getattr(self, name)} must be {rule}")


@dataclass(frozen=True)
class Stored:
    """One image as it is stored: a JPEG file, or where `raw` its pixels, height x width x 3 bytes."""

    blob: bytes
    height: int
    width: int
    raw: bool
    way: Way


def recode(data: bytes | Pixels, name: str, rules: Recoding) -> Stored:
    """The image `data` (a file, or uint8 [H, W, 3]) as it is to be stored. DataError, as `decode`, where it is damaged.

    Every file is decoded once, strictly, so that what is stored can be read.
    """
    file = data if isinstance(data, bytes) else None
    pixels = data if not isinstance(data, bytes) else decode(data, name, rules.max_pixels)
    height, width = pixels.shape[:2]
    if file is None and height * width > rules.max_pixels:
        raise DataError(f"{name} has {height} x {width} pixels, over max_pixels={rules.max_pixels}; raise it")
    shrunk = shrink(pixels, rules.short_side)
    rows, columns = shrunk.shape[:2]
    way: Way = "pixels" if shrunk is pixels else "shrunk"
    if rules.store == "raw" or (rules.store == "auto" and file is None and shrunk is pixels):
        return Stored(shrunk.tobytes(), rows, columns, True, way)
    jpeg = file if file is not None and file[:2] == b"\xff\xd8" else None
    _, _, colours, subsampling = simplejpeg.decode_jpeg_header(jpeg) if jpeg else (0, 0, "", "420")
    grey = colours == "Gray"
    if shrunk is not pixels:
        return Stored(encode(shrunk, rules.quality, grey, "420", name), rows, columns, False, "shrunk")
    if jpeg is not None and colours in ("Gray", "YCbCr"):
        kept = _keep(jpeg, pixels)
        if kept is not None:
            return Stored(kept[0], height, width, False, kept[1])
    finer = subsampling if subsampling in ("444", "422", "440") else "420"
    return Stored(encode(pixels, rules.quality, grey, finer, name), height, width, False, "re-encoded")


def shrink(pixels: Pixels, short_side: int | None) -> Pixels:
    """`pixels` with the shorter side `short_side` by area averaging; the very same array where it is no larger."""
    height, width = pixels.shape[:2]
    if short_side is None or min(height, width) <= short_side:
        return pixels
    scale = short_side / min(height, width)
    size = (max(short_side, round(width * scale)), max(short_side, round(height * scale)))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def encode(pixels: Pixels, quality: int, grey: bool, subsampling: str, name: str) -> bytes:
    """A baseline JPEG of uint8 [H, W, 3]; of the first channel alone where `grey`. DataError over 65,500 a side."""
    plane, space, chroma = (pixels[:, :, :1], "GRAY", "Gray") if grey else (pixels, "RGB", subsampling)
    try:
        data: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(plane), quality, space, chroma)
    except ValueError as error:
        height, width = pixels.shape[:2]
        raise DataError(f"{name}, {height} x {width} pixels, cannot be a JPEG: {error}; shrink it") from error
    return data


def _keep(jpeg: bytes, pixels: Pixels) -> tuple[bytes, Way] | None:
    """The JPEG itself, or without its EXIF, or coded anew without loss; None where it must be encoded again."""
    segments = list(_segments(jpeg))
    if not any(marker in _PLAIN for marker, _, _ in segments):
        plain = to_baseline(jpeg)
        same = plain is not None and np.array_equal(decode(plain, "the baseline copy"), pixels)
        return (plain, "baseline") if plain is not None and same else None
    exif = [
        (start, stop) for marker, start, stop in segments if marker == 0xE1 and jpeg[start + 4 : start + 9] == _EXIF
    ]
    if all(_upright(jpeg[start + 10 : stop]) for start, stop in exif):
        return jpeg, "verbatim"
    for start, stop in reversed(exif):
        jpeg = jpeg[:start] + jpeg[stop:]
    return jpeg, "orientation removed"


def _segments(jpeg: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, stop) of each segment up to the first scan; libjpeg has read the file before."""
    at = 2
    while at + 4 <= len(jpeg) and jpeg[at] == 0xFF:
        marker = jpeg[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == 0xDA:
            return
        stop = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        yield marker, at, stop
        at = stop


def _upright(tiff: bytes) -> bool:
    """Whether an EXIF block has no orientation or 1; False where it cannot be told, as readers may see one in it."""
    order: Literal["little", "big"] = "little" if tiff[:2] == b"II" else "big"
    first = int.from_bytes(tiff[4:8], order)
    count = int.from_bytes(tiff[first : first + 2], order)
    if tiff[:2] not in (b"II", b"MM") or first < 8 or first + 2 + 12 * count > len(tiff):
        return False
    entries = (tiff[at : at + 12] for at in range(first + 2, first + 2 + 12 * count, 12))
    found = [entry for entry in entries if int.from_bytes(entry[:2], order) == _ORIENTATION]
    return all(int.from_bytes(entry[8:10], order) == 1 for entry in found)
