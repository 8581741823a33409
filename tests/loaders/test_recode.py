"""What an image becomes in a packed file: plain JPEG, the same pixels, never enlarged."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from fastsimclr.loaders.beton import lossless
from fastsimclr.loaders.beton.recode import Recoding, recode
from fastsimclr.loaders.decode import decode
from tests.loaders.pictures import encoded, oriented, picture

# file name -> (bytes, way it is stored)
KINDS: dict[str, tuple[bytes, str]] = {
    "plain.jpg": (encoded(picture()), "verbatim"),
    "grey.jpg": (encoded(picture().convert("L")), "verbatim"),
    "444.jpg": (encoded(picture(), subsampling=0), "verbatim"),
    "upright.jpg": (encoded(picture(), exif=oriented(1)), "verbatim"),
    "turned.jpg": (encoded(picture(), exif=oriented(6)), "orientation removed"),
    "broken-exif.jpg": (encoded(picture(), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"), "orientation removed"),
    "progressive.jpg": (encoded(picture(), progressive=True, exif=oriented(8)), "baseline"),
    "cmyk.jpg": (encoded(picture().convert("CMYK")), "re-encoded"),
    "rgb.jpg": (encoded(picture(), keep_rgb=True), "re-encoded"),
    "colour.png": (encoded(picture(), "PNG"), "re-encoded"),
    "clear.png": (encoded(picture().convert("RGBA"), "PNG"), "re-encoded"),
    "palette.png": (encoded(picture().convert("L").quantize(64, dither=Image.Dither.NONE), "PNG"), "re-encoded"),
    "deep.png": (encoded(Image.fromarray(np.arange(4800, dtype=np.uint16).reshape(60, 80) * 13), "PNG"), "re-encoded"),
    "turned.png": (encoded(picture(), "PNG", exif=oriented(3)), "re-encoded"),
    "web.webp": (encoded(picture(), "WEBP"), "re-encoded"),
    "tagged.tif": (encoded(picture(), "TIFF"), "re-encoded"),
    "png.JPEG": (encoded(picture(), "PNG"), "re-encoded"),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("library", [True, False])
def test_everything_becomes_a_plain_jpeg(monkeypatch: pytest.MonkeyPatch, name: str, library: bool) -> None:
    data, way = KINDS[name]
    if not library:
        monkeypatch.setattr("fastsimclr.loaders.beton.recode.to_baseline", lambda jpeg: None)
    stored = recode(data, name, Recoding())
    assert (stored.height, stored.width, stored.raw) == (60, 80, False)
    assert stored.way == way or (way, stored.way) == ("baseline", "re-encoded")
    assert (stored.blob == data) == (way == "verbatim")
    # Every reader sees the same pixels, without turning them; OpenCV and Pillow have libjpegs of their own.
    ours = decode(stored.blob, name).astype(int)
    by_cv2 = cv2.cvtColor(cv2.imdecode(np.frombuffer(stored.blob, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    with Image.open(io.BytesIO(stored.blob)) as opened:
        assert opened.format == "JPEG" and opened.mode in ("RGB", "L") and not opened.info.get("progressive")
        assert opened.getexif().get(0x0112, 1) == 1
        by_pillow = np.asarray(opened.convert("RGB"))
    assert np.abs(ours - by_cv2).max() <= 3 and np.abs(ours - by_pillow).max() <= 3
    before = decode(data, name).astype(int)
    limit = 0.0 if way in ("verbatim", "orientation removed") else 3.0  # levels, on average: quality 90
    assert np.abs(ours - before).mean() <= limit


def test_progressive_is_made_baseline_without_loss_or_said_not_to_be() -> None:
    data, _ = KINDS["progressive.jpg"]
    stored = recode(data, "x", Recoding())
    if lossless.describe() == "re-encoded":  # no libturbojpeg on this machine
        assert stored.way == "re-encoded"
        return
    assert stored.way == "baseline"
    np.testing.assert_array_equal(decode(stored.blob, ""), decode(data, ""))
    with Image.open(io.BytesIO(stored.blob)) as after, Image.open(io.BytesIO(data)) as before:
        assert after.quantization == before.quantization


@pytest.mark.parametrize(
    ("size", "short_side", "becomes"),
    [
        ((400, 300), 256, (341, 256)),
        ((300, 1000), 100, (100, 333)),
        ((256, 900), 256, (256, 900)),
        ((20, 30), 256, (20, 30)),
        ((9999, 3), 2, (6666, 2)),
        ((300, 300), 299, (299, 299)),
    ],
)
def test_shrinking_never_enlarges(size: tuple[int, int], short_side: int, becomes: tuple[int, int]) -> None:
    stored = recode(encoded(picture(*size)), "x", Recoding(short_side=short_side))
    assert (stored.height, stored.width) == becomes
    assert decode(stored.blob, "x").shape == (*becomes, 3)
    assert stored.way == ("verbatim" if becomes == size else "shrunk")


def test_shrinking_averages_areas() -> None:
    pixels = np.asarray(picture(64, 96, 3))
    blocks = pixels.reshape(32, 2, 48, 2, 3).astype(float).mean(axis=(1, 3))
    raw = recode(pixels, "x", Recoding(short_side=32, store="raw"))
    assert raw.raw and raw.way == "shrunk"
    assert np.abs(np.frombuffer(raw.blob, np.uint8).reshape(32, 48, 3) - blocks).max() <= 1
    jpeg = recode(encoded(picture(64, 96, 3).convert("L")), "x", Recoding(short_side=32, quality=95))
    with Image.open(io.BytesIO(jpeg.blob)) as opened:
        assert opened.mode == "L"  # grey stays grey


def test_settings_are_checked() -> None:
    for key, value in (("short_side", 0), ("quality", 101), ("max_pixels", 0)):
        with pytest.raises(ValueError, match=f"--{key}={value} must be"):
            Recoding(**{key: value})
