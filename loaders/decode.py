"""From the bytes of one file to uint8 RGB: simplejpeg for JPEG, Pillow for everything else.

Rules, the same for every loader: the EXIF orientation is ignored, alpha is dropped, 16-bit grey keeps its high byte,
an animation gives its first frame (torchvision's ImageFolder does the same, but that it clips 16-bit grey).
The content decides, not the extension: a PNG named .JPEG is read as a PNG.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from fastsimclr.loaders.arrays import Pixels
from fastsimclr.loaders.source import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
MAX_PIXELS = 80_000_000

# catch_warnings is not safe in threads, so the filters are set once. A bomb is an error, which decode() names;
# damaged metadata is none of our business as long as the pixels decode.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


Encoded = bytes | memoryview


@dataclass(frozen=True, kw_only=True)
class Header:
    """What the header of a file says.

    size: height and width in pixels. plain: whether it is a JPEG in grey or YCbCr, which every decoder reads alike.
    picture: the file opened by Pillow, which is to decode it; None where simplejpeg is.
    """

    size: tuple[int, int]
    plain: bool
    picture: Image.Image | None


def decode(
    data: Encoded,
    name: str,
    max_pixels: int = MAX_PIXELS,
    out: Pixels | None = None,
    header: Header | None = None,
) -> Pixels:
    """The image in `data` as uint8 [H, W, 3], RGB; in `out` (uint8, flat, contiguous), which is large enough, if given.

    header: what `read_header` gave for `data`; read here where None.
    Raises DataError, naming the file by `name`, for empty, foreign, truncated or damaged data, for pixels of 32 bits,
    and for more than `max_pixels` pixels (Pillow's own limit of 89 million holds for what is not JPEG).
    A JPEG has no checksum: damage whose codes are still possible goes unnoticed.
    """
    header = header or read_header(data, name, max_pixels)
    (height, width), picture = header.size, header.picture
    room = None if out is None else out[: 3 * height * width]
    if room is not None and len(room) < 3 * height * width:
        raise DataError(f"{name} has {height} x {width} pixels, more than its header or table said; pack it anew")
    try:
        if picture is None:
            pixels: Pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True, buffer=room)
            return pixels
        pixels = _rgb(picture, name)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise anything at all on damaged bytes
        raise DataError(f"{name} is damaged: {error}") from error
    if room is None:
        return pixels
    room[:] = pixels.reshape(-1)
    return room.reshape(pixels.shape)


def read_header(data: Encoded, name: str, max_pixels: int = MAX_PIXELS) -> Header:
    """The header of the file `data`, of which no more is decoded. Raises as `decode`."""
    if not data:
        raise DataError(f"{name} is empty (0 bytes)")
    picture, colours = None, ""
    try:
        if data[:2] == b"\xff\xd8":
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if data[:2] != b"\xff\xd8" or colours in ("CMYK", "YCCK"):
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = picture.size
    except UnidentifiedImageError as error:
        raise DataError(f"{name} is not an image ({', '.join(FORMATS)}): it begins {bytes(data[:8])!r}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name} is larger than Pillow accepts: {error}") from error
    except MemoryError:
        raise
    except Exception as error:
        raise DataError(f"{name} is damaged: {error}") from error
    if height * width > max_pixels:
        raise DataError(f"{name} has {height} x {width} pixels, over max_pixels={max_pixels}; shrink it or raise it")
    if height < 1 or width < 1:
        raise DataError(f"{name} has no pixels: {height} x {width}")
    return Header(size=(height, width), plain=colours in ("Gray", "YCbCr"), picture=picture)


def _rgb(picture: Image.Image, name: str) -> Pixels:
    if picture.mode in ("I", "F"):
        raise DataError(f"{name} has 32-bit pixels (mode {picture.mode}) of no known range; save it with 8 or 16 bits")
    if picture.mode.startswith("I;16"):
        grey = (np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if picture.mode in ("P", "PA"):  # straight to RGB, Pillow would warn of a transparency in bytes
        picture = picture.convert("RGBA")
    return np.array(picture.convert("RGB"))
