"""Crops that the loader cuts: the windows that `draw` gives, resized as torchvision does within rounding; stand-ins."""

from __future__ import annotations

import gc
import io
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

from fastsimclr.loaders.backends.native import Buffers
from fastsimclr.loaders.cut import cut
from fastsimclr.loaders.data import DataConfig
from fastsimclr.loaders.draw import Policy, draw
from fastsimclr.loaders.loader import EvalLoader, TrainLoader

Pixels = npt.NDArray[np.uint8]
ROUNDING = 1.01  # of 255 levels: OpenCV weighs in 11 bits, torch rounds after each axis
POLICY = Policy(size=48, normalise="none")


def smooth(height: int, width: int, seed: int) -> Pixels:
    """An image of soft gradients, as photographs have them."""
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 255
    fine = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    return np.ascontiguousarray(fine[0].permute(1, 2, 0).clamp(0, 255).round().to(torch.uint8).numpy())


def exact(pixels: Pixels, box: list[int], size: int) -> npt.NDArray[np.float32]:
    """The crop cut from a float image: bilinear, antialiased where it shrinks by more than 1.15."""
    top, left, height, width = box
    window = torch.from_numpy(pixels[top : top + height, left : left + width].copy()).permute(2, 0, 1)[None].float()
    found = F.interpolate(window, size=(size, size), mode="bilinear", antialias=max(height, width) > 1.15 * size)
    crop: npt.NDArray[np.float32] = found[0].permute(1, 2, 0).numpy()
    return crop


class Pictures:
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


@pytest.mark.parametrize("box", [[0, 0, 20, 30], [3, 5, 48, 48], [1, 2, 55, 50], [0, 0, 100, 60], [7, 0, 100, 130]])
def test_a_crop_is_torchvisions_within_rounding(box: list[int]) -> None:
    pixels, out = smooth(110, 130, 0), np.full((48, 48, 3), 77, dtype=np.uint8)
    cut(pixels, (box[0], box[1], box[2], box[3]), out)
    assert np.abs(out - exact(pixels, box, 48)).max() <= ROUNDING
    antialiased = v2.functional.resized_crop(
        torch.from_numpy(pixels).permute(2, 0, 1).float(), *box, [48, 48], antialias=True
    )
    assert np.abs(out - antialiased.permute(1, 2, 0).numpy()).mean() < 1


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_batches_have_the_drawn_crops(threads: int, sized: bool) -> None:
    source = Pictures(sized=sized)
    loader = TrainLoader(source, DataConfig(threads=threads, loader="native"), batch=8, seed=5, stop=6)
    whole = [(batch.epochs, batch.ids, batch.labels, batch.sizes) for batch in loader]
    loader.cut(POLICY, 5, 2)
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
    loader = TrainLoader(source, data, batch=7, seed=1, stop=6)
    if crops:
        loader.cut(POLICY, 1, 2)
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
    loader = EvalLoader(source, DataConfig(threads=2, loader="native", max_bad_fraction=0.5), batch=6)
    loader.cut(Policy(size=48, crop="centre", normalise="none"), 0, 1)
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
