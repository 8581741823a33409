"""Runs of JPEGs in one call: the pixels and crops of one at a time, bit for bit; everything else is left to those."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from PIL import Image

from fastsimclr.loaders import turbo
from fastsimclr.loaders.backends import native
from fastsimclr.loaders.beton.pack import Packing, pack
from fastsimclr.loaders.beton.reader import BetonSource
from fastsimclr.loaders.beton.recode import Recoding
from fastsimclr.loaders.compiled import COMPILED
from fastsimclr.loaders.cut import Crops, copy_many, cut
from fastsimclr.loaders.data import DataConfig
from fastsimclr.loaders.decode import decode
from fastsimclr.loaders.draw import Policy
from fastsimclr.loaders.loader import TrainLoader
from fastsimclr.loaders.sets.basic import Relabelled, Subset
from tests.loaders.mutate import KINDS, make_files, mutated
from tests.loaders.test_cut import smooth

CROPS = Crops(policy=Policy(size=24, normalise="none"), seed=0, views=2)

Pixels = npt.NDArray[np.uint8]
MOST = 10_000_000
needs_turbo = pytest.mark.skipif(not turbo.AVAILABLE, reason="libturbojpeg or a C compiler is missing")
needs_compiler = pytest.mark.skipif(not COMPILED, reason="a C compiler is missing")


def jpeg(pixels: Pixels, **keys: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85, **keys)
    return file.getvalue()


def sizes_of(files: list[bytes]) -> npt.NDArray[np.int32]:
    return np.array([decode(file, "x").shape[:2] for file in files], dtype=np.int32)


def run(files: list[bytes], sizes: npt.NDArray[np.int32], most: int = MOST) -> tuple[list[int], list[Pixels]]:
    """(rows left, the images as they lie in memory that was filled with 7)."""
    ends = np.cumsum(3 * sizes.prod(axis=1, dtype=np.int64))
    places, out = np.append(0, ends[:-1]), np.full(ends[-1] + 9, 7, dtype=np.uint8)
    left = turbo.decode_run(files, sizes, most, out, places)
    assert (out[ends[-1] :] == 7).all(), "written past the end"
    images = [out[place:end].reshape(*size, 3) for place, end, size in zip(places, ends, sizes.tolist(), strict=True)]
    return left, images


@needs_turbo
def test_the_same_pixels_for_each_sampling() -> None:
    files = [
        jpeg(smooth(31 + k, 50 - k, k), subsampling=subsampling, progressive=progressive)
        for k, (subsampling, progressive) in enumerate((s, p) for s in (0, 1, 2) for p in (False, True))
    ]
    files.append(jpeg(smooth(33, 21, 9)[:, :, 0].copy()))
    left, images = run(files, sizes_of(files))
    assert left == []
    assert all(np.array_equal(image, decode(file, "x")) for image, file in zip(images, files, strict=True))


@needs_turbo
def test_the_same_pixels_of_real_photographs(imagenet_samples: Path) -> None:
    files = [path.read_bytes() for path in sorted(imagenet_samples.iterdir())[:60]]
    left, images = run(files, sizes_of(files))
    assert len(left) < 6
    for k, file in enumerate(files):
        assert k in left or np.array_equal(images[k], decode(file, "x"))


@needs_turbo
def test_what_is_not_plain_and_sound_is_left() -> None:
    pixels = smooth(40, 52, 0)
    cmyk, png = io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels).convert("CMYK").save(cmyk, "JPEG")
    Image.fromarray(pixels).save(png, "PNG")
    rare = simplejpeg.encode_jpeg(pixels, colorsubsampling="440")
    short = jpeg(pixels)[:-200]
    files = [jpeg(pixels), b"", cmyk.getvalue(), png.getvalue(), rare, short, b"\xff\xd8", jpeg(pixels)]
    sizes = np.tile(np.array([[40, 52]], dtype=np.int32), (len(files), 1))
    left, images = run(files, sizes)
    assert left == [1, 2, 3, 4, 5, 6]
    assert np.array_equal(images[0], images[7]) and np.array_equal(images[0], decode(files[0], "x"))
    sizes[7] = (39, 52)
    assert run(files, sizes)[0] == [1, 2, 3, 4, 5, 6, 7], "another size than the one that it was said to have"
    assert run(files, sizes, 40 * 52 - 1)[0] == [0, 1, 2, 3, 4, 5, 6, 7], "too many pixels"


@needs_turbo
def test_crops_are_those_of_single_ones() -> None:
    files = [jpeg(smooth(60 + k, 90 - k, k)) for k in range(7)]
    sizes = sizes_of(files)
    boxes = np.array([[[1, 2, h - 3, w - 4] for h, w in sizes.tolist()], [[0, 0, h, w] for h, w in sizes.tolist()]])
    boxes = boxes.astype(np.int32)
    boxes[1, 3] = (0, 1, 63, 87)  # one pixel over the right edge
    out = np.full((2, 7, 2, 2, 3), 7, dtype=np.uint8)
    assert turbo.crop_run(files[2:6], sizes[2:6], MOST, out, boxes, slice(2, 6)) == [0, 1, 2, 3], "over 32 times"
    out = np.full((2, 7, 16, 16, 3), 7, dtype=np.uint8)
    assert turbo.crop_run(files[2:6], sizes[2:6], MOST, out, boxes, slice(2, 6)) == [1]
    for k in range(7):
        for view in range(2):
            expected = np.full((16, 16, 3), 7, dtype=np.uint8)
            if k in (2, 4, 5) or (k, view) == (3, 0):
                top, left, height, width = boxes[view, k].tolist()
                cut(decode(files[k], "x"), (top, left, height, width), expected)
            assert np.array_equal(out[view, k], expected), (k, view)


def test_packed_files_are_read_from_their_places(tmp_path: Path) -> None:
    """First reads, which check sums, go one by one; a part of a set and a relabelled one know their places too."""
    files = make_files(tmp_path, len(KINDS) * 3, [])
    sound = Subset(files, [k for k, name in enumerate(files.names) if "sound" in name or "png" in name])
    beton = pack(sound, tmp_path / "a.beton", Packing(recoding=Recoding(), threads=1))
    assert beton.spans(np.arange(len(beton))) is None
    for k in range(0, len(beton), 2):
        beton.read(k)
    spans = beton.spans([0, 1])
    assert spans is not None and spans.lengths.tolist() == [int(beton.lengths[0]), 0]
    for part in (Subset(Relabelled(beton, beton.labels), [3, 2, 0]), Relabelled(Subset(beton, [3, 2, 0]), [0, 1, 0])):
        spans = part.spans(np.array([1, 2, 0]))
        assert spans is not None and spans.lengths[2] == 0
        assert spans.starts[:2].tolist() == beton.starts[[2, 0]].tolist()
    assert Subset(files, [0]).spans([0]) is None


@needs_turbo
@pytest.mark.parametrize("crops", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_batches_are_the_same_without_it(
    crops: bool, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of damage among the files, two epochs, so that packed ones are read in runs."""
    files = make_files(tmp_path, 6 * len(KINDS), [])
    source = (
        pack(files, tmp_path / "a.beton", Packing(recoding=Recoding(), threads=1, max_bad_fraction=0.99))
        if packed
        else files
    )
    calls, really = [], turbo._run

    def counted(*args, **keys):  # type: ignore[no-untyped-def]
        left = really(*args, **keys)
        calls.append(len(args[1]) - len(left))
        return left

    monkeypatch.setattr(turbo, "_run", counted)

    def digest() -> list[object]:
        config, cut = DataConfig(threads=2, loader="native", max_bad_fraction=0.99), CROPS if crops else None
        loader = TrainLoader(source, config, batch=8, seed=1, stop=2 * (len(source) // 8), crops=cut)
        with loader:
            found: list[object] = [
                (batch.ids.tolist(), zlib.crc32(b"".join(batch.images.image(i).numpy().tobytes() for i in range(8))))
                for batch in loader
            ]
            return [*found, sorted(loader.bad.items())]

    with_it = digest()
    assert sum(calls) > 10, "images decoded in runs"
    monkeypatch.setattr(turbo, "AVAILABLE", False)
    if packed:
        source = BetonSource(tmp_path / "a.beton")
    calls.clear()
    assert digest() == with_it and not calls


@needs_turbo
def test_damage_is_judged_as_without_it(imagenet_samples: Path) -> None:
    """300 files damaged in any place: what a run takes, strict decoding takes as well, and to the same pixels."""
    random = np.random.default_rng(3)
    real = [data for path in sorted(imagenet_samples.iterdir())[:40] if len(data := path.read_bytes()) < 100_000]
    taken = 0
    for k in range(300):
        data = mutated(real[k % len(real)], ("flipped", "header", "truncated")[k % 3], random)
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            height, width = 8, 8
        if height * width > MOST:
            continue
        left, (image,) = run([data], np.array([[height, width]], dtype=np.int32))
        if not left:
            taken += 1
            assert np.array_equal(image, decode(data, "x"))
    assert taken > 30


@pytest.mark.parametrize("crops", [False, True])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_decoded_pixels_are_taken_a_run_at_a_time(
    crops: bool, compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a packed file whose sums are checked in the first epoch, and from a part of it; as one by one."""
    files = make_files(tmp_path, 6 * len(KINDS), [])
    packing = Packing(recoding=Recoding(store="raw"), threads=1, max_bad_fraction=0.99)
    pack(files, tmp_path / "a.beton", packing)
    monkeypatch.setattr(native, "COMPILED", compiled)
    calls: list[str] = []
    for name in ("cut_many", "copy_many"):
        really = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *a, name=name, really=really: (calls.append(name), really(*a))[1])

    def digest() -> list[object]:
        beton = BetonSource(tmp_path / "a.beton")
        some, config = Subset(beton, range(1, 13)), DataConfig(threads=2, loader="native")
        loader = TrainLoader(some, config, batch=4, seed=1, stop=9, crops=CROPS if crops else None)
        with loader:
            found: list[object] = [
                zlib.crc32(b"".join(batch.images.image(i).numpy().tobytes() for i in range(len(batch.images.offsets))))
                for batch in loader
            ]
            assert beton.mapped([1, 2, 3]) is not None and beton.mapped([0, 1]) is None, "image 0 was never read"
        return found

    together = digest()
    assert set(calls) == ({"cut_many"} if crops else {"copy_many"} if compiled else set())
    monkeypatch.setattr(native._Decoding, "_left", lambda self, start, stop: range(start, stop))
    assert digest() == together


@needs_compiler
def test_bytes_outside_of_their_memory_are_refused() -> None:
    memory, out = np.arange(20, dtype=np.uint8), np.zeros(20, dtype=np.uint8)
    one = np.array([3, 15]), np.array([5, 5]), np.array([0, 10])
    copy_many(memory, one[0], one[1], out, one[2])
    assert out[:5].tolist() == [3, 4, 5, 6, 7] and out[10:15].tolist() == [15, 16, 17, 18, 19] and not out[15:].any()
    for k, value in ((0, 16), (0, -1), (1, 6), (1, -1), (2, 16), (2, -1)):
        wrong = [array.copy() for array in one]
        wrong[k][1] = value
        with pytest.raises(ValueError, match="outside of their memory"):
            copy_many(memory, wrong[0], wrong[1], out, wrong[2])
