"""From the bytes of one file to uint8 RGB: simplejpeg for JPEG, Pillow for everything else.

Rules, the same for every loader: the EXIF orientation is ignored, alpha is dropped, 16-bit grey keeps its high byte,
an animation gives its first frame (torchvision's ImageFolder does the same, but that it clips 16-bit grey).
The content decides, not the extension: a PNG named .JPEG is read as a PNG.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from fastsimclr.loaders.source import DataError

Pixels = npt.NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
MAX_PIXELS = 80_000_000

# catch_warnings is not safe in threads, so the filters are set once. A bomb is an error, which decode() names;
# damaged metadata is none of our business as long as the pixels decode.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


Encoded = bytes | memoryview


def is_plain_jpeg(data: Encoded) -> bool:
    """Whether `data`, whose header is sound, is a JPEG in grey or YCbCr, which every decoder reads alike."""
    return data[:2] == b"\xff\xd8" and simplejpeg.decode_jpeg_header(data)[2] in ("Gray", "YCbCr")


def image_size(data: Encoded, what: str, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) in pixels, from the header alone. Raises as `decode`."""
    return _open(data, what, max_pixels)[:2]


def decode(data: Encoded, what: str, max_pixels: int = MAX_PIXELS, out: Pixels | None = None) -> Pixels:
    """The image in `data` as uint8 [H, W, 3], RGB; in `out` (uint8, flat, contiguous), which is large enough, if given.

    Raises DataError, naming the file by `what`, for empty, foreign, truncated or damaged data, for pixels of 32 bits,
    and for more than `max_pixels` pixels (Pillow's own limit of 89 million holds for what is not JPEG).
    A JPEG has no checksum: damage whose codes are still possible goes unnoticed.
    """
    height, width, picture = _open(data, what, max_pixels)
    room = None if out is None else out[: 3 * height * width]
    if room is not None and len(room) < 3 * height * width:
        raise DataError(f"{what} has {height} x {width} pixels, more than its header or table said; pack it anew")
    try:
        if picture is None:
            pixels: Pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True, buffer=room)
            return pixels
        pixels = _rgb(picture, what)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise anything at all on damaged bytes
        raise DataError(f"{what} is damaged: {error}") from error
    if room is None:
        return pixels
    room[:] = pixels.reshape(-1)
    return room.reshape(pixels.shape)


def _open(data: Encoded, what: str, max_pixels: int) -> tuple[int, int, Image.Image | None]:
    """Height, width, and the opened picture where Pillow is to decode it."""
    if not data:
        raise DataError(f"{what} is empty (0 bytes)")
    picture = None
    try:
        if data[:2] == b"\xff\xd8":
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if data[:2] != b"\xff\xd8" or colours in ("CMYK", "YCCK"):
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = picture.size
    except UnidentifiedImageError as error:
        raise DataError(f"{what} is not an image ({', '.join(FORMATS)}): it begins {bytes(data[:8])!r}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{what} is larger than Pillow accepts: {error}") from error
    except MemoryError:
        raise
    except Exception as error:
        raise DataError(f"{what} is damaged: {error}") from error
    if height * width > max_pixels:
        raise DataError(f"{what} has {height} x {width} pixels, over max_pixels={max_pixels}; shrink it or raise it")
    if height < 1 or width < 1:
        raise DataError(f"{what} has no pixels: {height} x {width}")
    return height, width, picture


def _rgb(picture: Image.Image, what: str) -> Pixels:
    if picture.mode in ("I", "F"):
        raise DataError(f"{what} has 32-bit pixels (mode {picture.mode}) of no known range; save it with 8 or 16 bits")
    if picture.mode.startswith("I;16"):
        grey = (np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if picture.mode in ("P", "PA"):  # straight to RGB, Pillow would warn of a transparency in bytes
        picture = picture.convert("RGBA")
    return np.array(picture.convert("RGB"))
