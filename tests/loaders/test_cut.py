"""Crops that the loader cuts: the windows that `draw` gives, resized as torchvision does within rounding; stand-ins."""

from __future__ import annotations

import gc
import io
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

from fastsimclr.loaders import compiled as compiled_module
from fastsimclr.loaders import cut as cut_module
from fastsimclr.loaders.backends.native import Buffers
from fastsimclr.loaders.compiled import COMPILED
from fastsimclr.loaders.cut import Crops, cut, cut_many
from fastsimclr.loaders.data import DataConfig
from fastsimclr.loaders.draw import Policy, draw
from fastsimclr.loaders.loader import EvalLoader, TrainLoader
from fastsimclr.loaders.source import Source
from tests.loading import hold

Pixels = npt.NDArray[np.uint8]
ROUNDING = 0.53 if COMPILED else 1.01  # of 255 levels: one rounding, and weights of 16 bits; torch rounds each axis
POLICY = Policy(size=48, normalise="none")


def smooth(height: int, width: int, seed: int) -> Pixels:
    """An image of soft gradients, as photographs have them."""
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 255
    fine = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    return np.ascontiguousarray(fine[0].permute(1, 2, 0).clamp(0, 255).round().to(torch.uint8).numpy())


def exact(pixels: Pixels, box: list[int], size: int) -> npt.NDArray[np.float32]:
    """The crop cut from a float image: bilinear, antialiased where it shrinks."""
    top, left, height, width = box
    window = torch.from_numpy(pixels[top : top + height, left : left + width].copy()).permute(2, 0, 1)[None].float()
    found = F.interpolate(window, size=(size, size), mode="bilinear", antialias=True)
    crop: npt.NDArray[np.float32] = found[0].permute(1, 2, 0).numpy()
    return crop


class Pictures(Source):
    """21 JPEG files in memory, those of `damaged` cut off in the middle; sizes known or not."""

    name, classes, fingerprint = "pictures", ("a", "b"), "p"

    def __init__(self, damaged: tuple[int, ...] = (), sized: bool = False) -> None:
        self.labels = np.arange(21) % 2
        self.pixels = [smooth(50 + 5 * k, 120 - 3 * k, k) for k in range(21)]
        self.files = []
        for k, pixels in enumerate(self.pixels):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG", quality=95)
            data = file.getvalue()
            self.files.append(data[: len(data) // 2] if k in damaged else data)
        if sized:
            self.pixel_sizes = np.array([pixels.shape[:2] for pixels in self.pixels], dtype=np.int32)

    def __len__(self) -> int:
        return 21

    def read(self, index: int) -> bytes:
        return self.files[index]

    def describe(self, index: int) -> str:
        return f"{index}.jpg"


def decoded(data: bytes) -> Pixels:
    import simplejpeg

    pixels: Pixels = simplejpeg.decode_jpeg(data)
    return pixels


def test_cut_c_is_compiled_where_there_is_a_compiler() -> None:
    assert COMPILED or shutil.which("cc") is None, "run: pip install -e ."


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    ("box", "size"),
    [
        ([0, 0, 20, 30], 48),
        ([3, 5, 48, 48], 48),
        ([1, 2, 55, 50], 48),
        ([0, 0, 100, 60], 48),
        ([7, 0, 100, 130], 47),
        ([0, 0, 110, 130], 5),
        ([109, 129, 1, 1], 33),
        ([50, 0, 1, 130], 17),
        ([0, 64, 110, 2], 224),
        ([2, 3, 64, 96], 3),
        ([0, 0, 110, 130], 1),
    ],
)
def test_a_crop_is_torchvisions_within_rounding(
    box: list[int], size: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(cut_module, "LIBRARY", None)
    noise = np.random.default_rng(0).integers(0, 256, (110, 130, 3), dtype=np.uint8)
    part = np.random.default_rng(1).integers(0, 256, (150, 140, 3), dtype=np.uint8)[20:130, 7:137]
    for pixels in (smooth(110, 130, 0), noise, np.full_like(noise, 255), part):
        out = np.full((size, size, 3), 77, dtype=np.uint8)
        cut(pixels, (box[0], box[1], box[2], box[3]), out)
        assert np.abs(out - exact(pixels, box, size)).max() <= (ROUNDING if compiled else 1.01)
    picture = torch.from_numpy(noise).permute(2, 0, 1).float()
    theirs = v2.functional.resized_crop(picture, *box, [size, size], antialias=True)
    assert np.abs(theirs.permute(1, 2, 0).numpy() - exact(noise, box, size)).max() < 0.01


def test_crops_of_other_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    tall = np.random.default_rng(1).integers(0, 256, (700, 40, 3), dtype=np.uint8)
    out = np.zeros((20, 20, 3), dtype=np.uint8)
    cut(tall, (5, 3, 660, 30), out)  # shrunk by 33: more than 16 bits hold
    assert np.abs(out - exact(tall, [5, 3, 660, 30], 20)).max() <= 1.01
    room = np.zeros((2, 20, 30, 3), dtype=np.uint8)
    cut(tall, (5, 3, 60, 30), room[1, :, 4:24])  # rows that do not stand one after another
    assert np.abs(room[1, :, 4:24] - exact(tall, [5, 3, 60, 30], 20)).max() <= 1.01
    assert not room[0].any() and not room[1, :, :4].any() and not room[1, :, 24:].any()
    for box in ((-1, 0, 5, 5), (0, -1, 5, 5), (690, 0, 11, 5), (0, 38, 5, 3)):
        with pytest.raises(ValueError, match=r"must lie in an image of \(700, 40\)"):
            cut(tall, box, out)
    monkeypatch.setattr(cut_module, "LIBRARY", SimpleNamespace(fastsimclr_cut=lambda *_: 1))
    with pytest.raises(MemoryError, match="5 x 6 pixels"):
        cut(tall, (0, 0, 5, 6), out)


def test_a_library_of_other_sources_is_not_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled_module, "__file__", str(tmp_path / "compiled.py"))
    assert compiled_module._compiled() is None and not caplog.records
    (tmp_path / f"_cut{EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    assert compiled_module._compiled() is None and "install again" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(compiled_module, "VERSION", compiled_module.VERSION + 1)
    assert compiled_module._compiled() is None


def test_memory_for_reading_only(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, out = smooth(60, 60, 0), np.zeros((2, 20, 20, 3), dtype=np.uint8)
    pixels.setflags(write=False)
    cut(pixels, (1, 2, 50, 40), out[0])
    monkeypatch.setattr(cut_module, "LIBRARY", None)
    cut(pixels, (1, 2, 50, 40), out[1])  # torch would warn
    assert np.abs(out[0].astype(int) - out[1]).max() <= 1


@pytest.mark.parametrize("compiled", [True, False])
def test_many_crops_are_those_of_single_ones(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(cut_module, "LIBRARY", None)
    generator = np.random.default_rng(2)
    sizes = generator.integers(8, 60, (9, 2)).astype(np.int32)
    ends = 5 + np.cumsum(3 * sizes.prod(axis=1, dtype=np.int64))
    starts, memory = np.append(5, ends[:-1]), generator.integers(0, 256, ends[-1], dtype=np.uint8)
    boxes = np.array([[[1, 2, h - 3, w - 4], [0, 0, h, w]] for h, w in sizes.tolist()], dtype=np.int32)
    boxes = np.ascontiguousarray(boxes.transpose(1, 0, 2))
    out = np.full((2, 9, 16, 16, 3), 7, dtype=np.uint8)
    cut_many(memory, starts, sizes, boxes, out, slice(3, 8))
    for k, (height, width) in enumerate(sizes.tolist()):
        image = memory[starts[k] : ends[k]].reshape(height, width, 3)
        for view in range(2):
            expected = np.full((16, 16, 3), 7, dtype=np.uint8)
            if 3 <= k < 8:
                cut(image, tuple(boxes[view, k].tolist()), expected)
            assert np.array_equal(out[view, k], expected)
    for where, wrong in ((boxes, (0, 4, 2)), (boxes, (1, 4, 0)), (starts, 4)):
        kept = where[wrong]  # type: ignore[index]
        where[wrong] = ends[-1] if where is starts else -1  # type: ignore[index]
        with pytest.raises(ValueError, match="outside of its memory"):
            cut_many(memory, starts, sizes, boxes, out, slice(3, 8))
        where[wrong] = kept  # type: ignore[index]


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: cut.c is not compiled here either")
def test_cut_c_stays_within_its_memory(tmp_path: Path) -> None:
    """500 windows at the ends of their memory under the compiler's address and undefined-behaviour checks."""
    main = tmp_path / "main.c"
    main.write_text(
        f'#include "{Path(cut_module.__file__).with_name("cut.c").resolve()}"\n'
        """int main(void) {
            srand(1);
            for (int t = 0; t < 500; t++) {
                int size = 1 + rand() % 70, most = t % 5 ? 120 : 32 * size, other = t % 3 ? 120 : 8;
                int height = 1 + rand() % most, width = 1 + rand() % other, white = 255 * (rand() % 2);
                if (height > 32 * size) height = 32 * size;
                if (width > 32 * size) width = 32 * size;
                int64_t pitch = 3 * width + rand() % 50;
                size_t bytes = (size_t)pitch * (height - 1) + 3 * width;
                uint8_t *crop = malloc(bytes), *out = malloc(3 * (size_t)size * size);
                memset(crop, white, bytes);
                if (fastsimclr_cut(crop, pitch, height, width, size, out)) return 2;
                for (int i = 0; i < 3 * size * size; i++) if (out[i] != white) return 3;
                free(crop), free(out);
            }
            return 0;
        }"""
    )
    built = ["cc", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover", str(main)]
    subprocess.run([*built, "-o", str(tmp_path / "main")], check=True)
    done = subprocess.run([str(tmp_path / "main")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_batches_have_the_drawn_crops(threads: int, sized: bool) -> None:
    source = Pictures(sized=sized)
    loader = TrainLoader(source, DataConfig(threads=threads, loader="native"), batch=8, seed=5, stop=6)
    whole = [(batch.epochs, batch.ids, batch.labels, batch.sizes) for batch in loader]
    crops = Crops(policy=POLICY, seed=5, views=2)
    loader = TrainLoader(source, DataConfig(threads=threads, loader="native"), batch=8, seed=5, stop=6, crops=crops)
    for batch, (epochs, ids, labels, sizes) in zip(loader, whole, strict=True):
        assert torch.equal(batch.ids, ids) and torch.equal(batch.epochs, epochs)
        assert torch.equal(batch.labels, labels) and torch.equal(batch.sizes, sizes)
        params = draw(POLICY, 5, epochs, ids, 2, sizes)
        assert batch.params is not None and len(batch.images) == 16
        assert torch.equal(batch.params.factors, params.factors) and torch.equal(batch.params.flip, params.flip)
        for row in range(16):
            pixels = decoded(source.files[int(ids[row % 8])])
            expected = exact(pixels, params.crop[row].tolist(), 48)
            assert np.abs(batch.images.image(row).numpy() - expected).max() <= ROUNDING


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("crops", [False, True])
def test_damage_found_while_decoding_is_stood_in_for(sized: bool, crops: bool) -> None:
    source = Pictures(damaged=(4, 5, 20), sized=sized)
    data = DataConfig(threads=2, loader="native", max_bad_fraction=0.5)
    views = Crops(policy=POLICY, seed=1, views=2) if crops else None
    loader = TrainLoader(source, data, batch=7, seed=1, stop=6, crops=views)
    stand_in = {4: 6, 5: 6, 20: 0}
    for batch in loader:
        params = draw(POLICY, 1, batch.epochs, batch.ids, 2, batch.sizes)
        for row, index in enumerate(batch.ids.tolist()):
            pixels = decoded(source.files[stand_in.get(index, index)])
            assert batch.sizes[row].tolist() == list(pixels.shape[:2])
            assert int(batch.labels[row]) == stand_in.get(index, index) % 2
            for view in range(2) if crops else ():
                expected = exact(pixels, params.crop[7 * view + row].tolist(), 48)
                assert np.abs(batch.images.image(7 * view + row).numpy() - expected).max() <= ROUNDING
            assert crops or np.array_equal(batch.images.image(row).numpy(), pixels)
    assert sorted(loader.bad) == [4, 5, 20] and all(f"{k}.jpg" in reason for k, reason in loader.bad.items())


@pytest.mark.parametrize("sized", [False, True])
def test_evaluation_leaves_out_what_is_damaged(sized: bool) -> None:
    source = Pictures(damaged=(0, 9, 10), sized=sized)
    crops = Crops(policy=Policy(size=48, crop="centre", normalise="none"), seed=0, views=1)
    data = DataConfig(threads=2, loader="native", max_bad_fraction=0.5)
    loader = EvalLoader(source, data, batch=6, crops=crops)
    seen = []
    for batch in loader:
        assert batch.params is not None and len(batch.params) == len(batch) == len(batch.images)
        for row, index in enumerate(batch.ids.tolist()):
            params = draw(
                Policy(size=48, crop="centre"), 0, batch.epochs[[row]], batch.ids[[row]], 1, batch.sizes[[row]]
            )
            expected = exact(decoded(source.files[index]), params.crop[0].tolist(), 48)
            assert np.abs(batch.images.image(row).numpy() - expected).max() <= ROUNDING
        seen += batch.ids.tolist()
    assert seen == [k for k in range(21) if k not in (0, 9, 10)]


@pytest.mark.parametrize("threads", [1, 3])
def test_resident_crops_are_natives(threads: int) -> None:
    source = Pictures(damaged=(4, 5, 20))
    data = DataConfig(threads=threads, loader="native", max_bad_fraction=0.5)
    held = hold(source, replace(data, loader="resident"), torch.device("cpu"))
    crops = Crops(policy=POLICY, seed=1, views=2)
    where: tuple[dict[str, object], ...] = ({"crops": crops}, {"crops": crops, "resident": held})
    pairs = [[TrainLoader(source, data, batch=7, seed=1, stop=12, **keys) for keys in where]]
    pairs += [[EvalLoader(source, data, batch=4, **keys) for keys in where]]
    for loaders in pairs:
        count = 0
        for native, resident in zip(*loaders, strict=True):
            for a, b in (
                (native.ids, resident.ids),
                (native.epochs, resident.epochs),
                (native.labels, resident.labels),
            ):
                assert torch.equal(a, b)
            assert torch.equal(native.sizes, resident.sizes)
            assert native.params is not None and resident.params is not None
            assert torch.equal(native.params.factors, resident.params.factors)
            assert len(native.images) == len(resident.images) == 2 * len(native)
            for row in range(len(native.images)):
                assert torch.equal(native.images.image(row), resident.images.image(row))
            count += len(native)
        assert count == (84 if loaders is pairs[0] else 18)


def test_a_batch_in_use_is_never_overwritten() -> None:
    source = Pictures()

    def batches() -> Iterator[tuple[list[int], list[Pixels], list[Pixels]]]:
        loader = TrainLoader(source, DataConfig(threads=2, loader="native"), batch=7, seed=1, stop=30)
        for batch in loader:
            images = [batch.images.image(row).numpy() for row in range(7)]
            yield batch.ids.tolist(), images, [image.copy() for image in images]

    kept = list(batches())
    for _, images, copies in kept:
        assert all(np.array_equal(image, copy) for image, copy in zip(images, copies, strict=True))


def test_memory_that_nobody_holds_is_used_again() -> None:
    buffers = Buffers()
    first = buffers.take(1000, False)
    view, address = first[10:20], first.data_ptr()
    del first
    gc.collect()
    second = buffers.take(900, False)
    assert second.data_ptr() != address  # `view` still lies there
    del view
    gc.collect()
    assert buffers.take(900, False).data_ptr() == address
