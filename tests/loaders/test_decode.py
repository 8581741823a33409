"""Every format against Pillow, every kind of damage against its message."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from fastsimclr.loaders.decode import decode, read_header
from fastsimclr.loaders.source import DataError

Pixels = npt.NDArray[np.uint8]


def photo(height: int = 37, width: int = 53) -> Pixels:
    """A smooth picture with some noise, uint8 [H, W, 3]."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 9 + c) * np.cos(y / 7 - c) * 90 + 120 for c in range(3)]
    noise = np.random.default_rng(0).integers(-8, 9, (height, width, 3))
    return np.clip(np.stack(waves, axis=2) + noise, 0, 255).astype(np.uint8)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


RGB = Image.fromarray(photo())
RGBA = Image.merge("RGBA", (*RGB.split(), Image.linear_gradient("L").resize(RGB.size)))


@pytest.mark.parametrize(
    ("image", "kind", "options"),
    [
        (RGB, "PNG", {}),
        (RGB, "BMP", {}),
        (RGB, "TIFF", {}),
        (RGB, "WEBP", {"lossless": True}),
        (RGB, "WEBP", {"quality": 80}),
        (RGBA, "PNG", {}),
        (RGBA, "WEBP", {"lossless": True}),
        (RGB.convert("L"), "PNG", {}),
        (RGB.convert("LA"), "PNG", {}),
        (RGB.convert("1"), "PNG", {}),
        (RGB.convert("P"), "PNG", {}),
        (RGB.convert("P"), "PNG", {"transparency": bytes(range(256))}),
        (RGB.convert("P"), "PNG", {"transparency": 3}),
        (RGB.convert("CMYK"), "JPEG", {}),
        (RGB.convert("CMYK"), "TIFF", {}),
    ],
)
def test_formats_of_pillow(image: Image.Image, kind: str, options: dict[str, Any]) -> None:
    data = encode(image, kind, **options)
    pixels = decode(data, "x")
    expected = Image.open(io.BytesIO(data))
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.asarray(expected.convert("RGBA").convert("RGB")))
    assert read_header(data, "x").size == pixels.shape[:2] == (37, 53)


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg(mode: str, options: dict[str, Any]) -> None:
    data = encode(RGB.convert(mode), "JPEG", **options)
    pixels = decode(data, "x")
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert read_header(data, "x").size == pixels.shape[:2]
    assert np.abs(pixels.astype(int) - expected).max() <= 2  # two builds of libjpeg-turbo round differently


def test_exif_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encode(RGB, "JPEG", exif=exif), "x").shape == (37, 53, 3)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_high_byte(kind: str) -> None:
    grey = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    pixels = decode(encode(Image.fromarray(grey), kind), "x")
    np.testing.assert_array_equal(pixels, np.repeat((grey // 256)[..., None], 3, axis=2))


JPEG, PNG = encode(RGB, "JPEG"), encode(RGB, "PNG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"just a text file", "is not an image"),
        (b"GIF89a" + bytes(20), "is not an image"),
        (JPEG[: len(JPEG) // 2], "is damaged"),
        (JPEG[:-2], "is damaged"),
        (JPEG[:20], "is damaged"),
        (b"\xff\xd8\xff", "is damaged"),
        (PNG[: len(PNG) // 2], "is damaged"),
        (PNG[:100] + bytes(20) + PNG[120:], "is damaged"),
        (encode(RGB, "WEBP")[:-50], "is (damaged|not an image)"),
        (encode(Image.new("F", (4, 4)), "TIFF"), "32-bit"),
    ],
)
def test_damage_is_named(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=rf"dir/a\.jpg .*{reason}|dir/a\.jpg {reason}"):
        decode(data, "dir/a.jpg")


@pytest.mark.parametrize("whole", [JPEG, PNG])
def test_a_flipped_bit_gives_an_image_or_a_data_error(whole: bytes) -> None:
    found = 0
    for place in range(0, 8 * len(whole), 7):
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        try:
            assert decode(bytes(data), "x", max_pixels=10**6).ndim == 3
        except DataError as error:
            assert str(error).startswith("x ")
            found += 1
    assert found > len(whole) // 10  # a JPEG has no checksum: most flips there are legal codes


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_bombs_are_refused_before_they_are_decoded(kind: str) -> None:
    with pytest.raises(DataError, match=r"a has 37 x 53 pixels, over max_pixels=1960"):
        decode(encode(RGB, kind), "a", max_pixels=1960)
    decode(encode(RGB, kind), "a", max_pixels=1961)
    with pytest.raises(DataError, match="larger than Pillow accepts"):
        decode(encode(Image.new("1", (20_000, 20_000)), "PNG"), "a", max_pixels=10**9)
    with pytest.raises(DataError, match="larger than Pillow accepts"):
        decode(encode(Image.new("1", (10_000, 10_000)), "PNG"), "a", max_pixels=10**9)


@pytest.mark.parametrize("step", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_imagenet_samples(imagenet_samples: Path, step: int) -> None:
    files = sorted(imagenet_samples.iterdir())[::step]
    assert len(files) == 400 // step
    grey = 0
    for k, file in enumerate(files):
        data = file.read_bytes()
        pixels = decode(data, str(file))
        grey += bool((pixels == pixels[..., :1]).all())
        assert pixels.shape == (*read_header(data, str(file)).size, 3)
        if k % 20 == 0:
            expected = np.asarray(Image.open(file).convert("RGB")).astype(int)
            assert np.abs(pixels - expected).mean() < 0.5
    assert grey >= 6 // step
