"""Every backend: the ids, labels, epochs and windows of the plan, exact resume, evaluation, refusals, flat memory."""

from __future__ import annotations

import gc
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from fastsimclr.bench.crop_errors import crop_errors, exact_crop
from fastsimclr.cli.main import main
from fastsimclr.kernels.views import make_views
from fastsimclr.loaders import loader as loader_module
from fastsimclr.loaders.backends import dali as dali_module
from fastsimclr.loaders.batch import Batch
from fastsimclr.loaders.beton.reader import BetonSource
from fastsimclr.loaders.beton.writer import BetonWriter
from fastsimclr.loaders.cut import Crops
from fastsimclr.loaders.data import DataConfig, LoaderName, open_data
from fastsimclr.loaders.decode import decode
from fastsimclr.loaders.draw import Policy, draw
from fastsimclr.loaders.loader import EvalLoader, TrainLoader
from fastsimclr.loaders.order import epoch_order
from fastsimclr.loaders.sets.basic import ArraySource, FileSource, Relabelled, Subset
from fastsimclr.loaders.source import DataError, Source
from tests.loaders.mutate import drawn, smooth

NEEDS_DALI = pytest.mark.needs("nvidia.dali")
DALI = pytest.param("dali", marks=NEEDS_DALI)
TORCHVISION = pytest.param("torchvision", marks=pytest.mark.slow)  # each of its workers is a process that starts
BACKENDS = ["native", TORCHVISION, DALI]  # those that cut the windows of `draw` out of files
N, SIDE = 30, 40
POLICY = Policy(size=SIDE, normalise="none")
CENTRE = Crops(policy=Policy(size=SIDE, crop="centre", flip=0, normalise="none"), seed=0, views=1)


def saved(picture: Image.Image, kind: str, **keys: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **keys)
    return file.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> FileSource:
    """30 images with labels 0, 1, 2, 0, ...: JPEGs, and all that decoders see in different ways."""
    root, images = tmp_path_factory.mktemp("files"), drawn(N)
    rgb = Image.fromarray(smooth(70, 90, 99))
    turned = Image.Exif()
    turned[0x0112] = 6
    images[3] = saved(rgb, "JPEG", exif=turned)
    images[8] = saved(rgb.convert("CMYK"), "JPEG")
    images[9] = saved(rgb, "JPEG", keep_rgb=True)
    images[11] = saved(Image.merge("RGBA", (*rgb.split(), rgb.split()[0])), "PNG")
    images[14] = saved(Image.fromarray(smooth(60, 61, 5)[:, :, 0].astype(np.uint16) * 257), "PNG")
    images[17] = saved(rgb.quantize(128, dither=Image.Dither.NONE), "PNG")
    images[20] = saved(rgb, "WEBP", lossless=True)
    images[23] = saved(rgb, "TIFF")
    images[26] = saved(rgb.convert("L"), "BMP")
    for k, data in enumerate(images):
        (root / f"{k:02}.JPEG").write_bytes(data)
    return FileSource("files", root, [f"{k:02}.JPEG" for k in range(N)], [0] * N, np.arange(N) % 3, ("a", "b", "c"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> BetonSource:
    """A .beton of 30 JPEGs, every sixth as decoded pixels."""
    path = tmp_path_factory.mktemp("packed") / "files.beton"
    writer = BetonWriter(path, N, 2**21)
    for k, data in enumerate(drawn(N)):
        pixels = decode(data, "")
        writer.add(k, pixels.tobytes() if k % 6 == 5 else data, *pixels.shape[:2], k % 6 == 5)
    writer.finish(np.arange(N) % 3)
    writer.close()
    return BetonSource(path)


def training(source: Source, loader: LoaderName, policy: Policy = POLICY, **keys: Any) -> TrainLoader:
    config = {"threads": 2, **{key: keys.pop(key) for key in ("photometric", "threads") if key in keys}}
    crops = Crops(policy=policy, seed=5, views=2)
    keys = {"batch": 8, "seed": 5, "stop": 9, "crops": crops, **keys}
    return TrainLoader(source, DataConfig(loader=loader, **config), **keys)


def pixels_of(source: Source, index: int) -> torch.Tensor:
    data = source.read(index)
    return torch.from_numpy((data if isinstance(data, np.ndarray) else decode(data, "")).copy())


def same(one: Batch, other: Batch) -> bool:
    names = ("ids", "epochs", "labels", "sizes")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names) and all(
        torch.equal(one.images.image(row), other.images.image(row)) for row in range(len(one.images))
    )


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).abs().mean())


@pytest.mark.parametrize("loader", ["native", TORCHVISION, DALI, "synthetic"])
def test_training_batches_against_a_plain_loop(files: FileSource, loader: LoaderName) -> None:
    order = [(epoch, i) for epoch in range(3) for i in epoch_order(N, 5, epoch).tolist()]
    train = training(files, loader, threads=1 if loader == "torchvision" else 2)
    batches = list(train)
    assert (train.name, len(batches)) == (loader, 9)
    for step, batch in enumerate(batches):
        expected = order[8 * step : 8 * step + 8]
        assert list(zip(batch.epochs.tolist(), batch.ids.tolist(), strict=True)) == expected
        assert batch.labels.tolist() == [i % 3 for _, i in expected]
        assert batch.params is not None and len(batch.params) == len(batch.images) == 16
        assert batch.images.heights.tolist() == batch.images.widths.tolist() == [SIDE] * 16
        params = draw(POLICY, 5, batch.epochs, batch.ids, 2, batch.sizes)
        for name in ("flip", "jitter", "factors", "order", "grey", "sigma"):
            assert torch.equal(getattr(batch.params, name), getattr(params, name))
        if loader == "synthetic":
            continue
        for row in range(16):
            whole, box = pixels_of(files, int(batch.ids[row % 8])), params.crop[row].tolist()
            assert batch.sizes[row % 8].tolist() == list(whole.shape[:2])
            assert distance(batch.images.image(row), exact_crop(whole, box, SIDE)) < 0.6
            # What a window one pixel off would be: the bound tells them apart.
            if box[0] and distance(exact_crop(whole, box, SIDE), exact_crop(whole.roll(1, 0), box, SIDE)) > 1.2:
                shifted = exact_crop(whole, [box[0] - 1, *box[1:]], SIDE)
                assert distance(batch.images.image(row), shifted) > 0.6


@pytest.mark.parametrize("loader", [*BACKENDS, "synthetic"])
def test_a_run_resumes_and_threads_and_ranks_change_nothing(files: FileSource, loader: LoaderName) -> None:
    whole = list(training(files, loader))
    tail = list(training(files, loader, start=4, threads=1))
    assert all(same(a, b) for a, b in zip(tail, whole[4:], strict=True))
    ranks = [list(training(files, loader, start=4, stop=6, rank=rank, world=2)) for rank in range(2)]
    for step in range(2):
        assert torch.cat([part[step].ids for part in ranks]).tolist() == whole[4 + step].ids.tolist()
        for row in range(16) if loader != "synthetic" else ():
            mine = ranks[row % 8 // 4][step].images.image(4 * (row // 8) + row % 4)
            assert torch.equal(mine, whole[4 + step].images.image(row))


@pytest.mark.parametrize("loader", BACKENDS)
def test_evaluation_and_leaving_early(files: FileSource, loader: LoaderName) -> None:
    test = EvalLoader(files, DataConfig(loader=loader, threads=2), batch=12, crops=CENTRE)
    for _ in range(2):
        batches = list(test)
        assert [batch.ids.tolist() for batch in batches] == [[*range(12)], [*range(12, 24)], [*range(24, 30)]]
        for row in range(6):
            params = draw(CENTRE.policy, 0, [0], [24 + row], 1, batches[2].sizes[row : row + 1])
            exact = exact_crop(pixels_of(files, 24 + row), params.crop[0].tolist(), SIDE)
            assert distance(batches[2].images.image(row), exact) < 0.6
    for early in test:
        assert len(early) == 12
        break
    with test:
        assert next(iter(test)).ids.tolist() == [*range(12)]


@pytest.mark.parametrize("loader", BACKENDS)
def test_arrays(loader: LoaderName) -> None:
    pixels = np.stack([smooth(32, 32, k) for k in range(20)])
    source = ArraySource("arrays", pixels, np.arange(20) % 2, ("a", "b"))
    for batch in training(source, loader, batch=6):
        params = draw(POLICY, 5, batch.epochs, batch.ids, 2, batch.sizes)
        for row in range(12):
            exact = exact_crop(torch.from_numpy(pixels[batch.ids[row % 6]]), params.crop[row].tolist(), SIDE)
            assert distance(batch.images.image(row), exact) < 0.6


@pytest.mark.parametrize(
    ("loader", "mean", "most", "step"),
    [
        ("native", 0.4, 3, 8),
        pytest.param("native", 0.4, 3, 1, marks=pytest.mark.slow),
        pytest.param("torchvision", 0.3, 0.4, 1, marks=pytest.mark.slow),
        pytest.param("dali", 0.3, 0.7, 1, marks=[NEEDS_DALI, pytest.mark.slow]),
    ],
)
def test_imagenets_crops_are_exact_within_rounding(
    imagenet_samples: Path, loader: LoaderName, mean: float, most: float, step: int
) -> None:
    """50 or 400 samples. most: native's plain bilinear shows in single crops; torchvision rounds after each axis."""
    source = open_data(DataConfig(source="folder", root=str(imagenet_samples))).unlabelled
    errors = crop_errors(Subset(source, np.arange(0, len(source), step)), loader, size=64)
    assert errors["mean"] < mean and errors["largest mean"] < most


@pytest.mark.slow
@pytest.mark.needs("ffcv")
def test_ffcv_reads_our_order_and_draws_its_own_windows(packed: BetonSource) -> None:
    half = Relabelled(Subset(packed, np.arange(0, N, 2)), np.arange(15) % 5)
    for source in (packed, half):
        n = len(source)
        order = [(epoch, i) for epoch in range(5) for i in epoch_order(n, 5, epoch).tolist()]
        batches = list(training(source, "ffcv"))
        for step, batch in enumerate(batches):
            assert list(zip(batch.epochs.tolist(), batch.ids.tolist(), strict=True)) == order[8 * step : 8 * step + 8]
            assert batch.labels.tolist() == source.labels[batch.ids.numpy()].tolist()
            for row in range(8):
                whole = pixels_of(source, int(batch.ids[row])).float()
                assert batch.sizes[row].tolist() == list(whole.shape[:2])
                for crop in (batch.images.image(row).float(), batch.images.image(8 + row).float()):
                    # Of this image: no colour that it has not. Of another one's gradients some would lie outside.
                    assert (crop.amin((0, 1)) >= whole.amin((0, 1)) - 6).all()
                    assert (crop.amax((0, 1)) <= whole.amax((0, 1)) + 6).all()
                assert not torch.equal(batch.images.image(row), batch.images.image(8 + row))
    # The same window for a scale and ratio of one: the whole image, which tells order and images exactly.
    square = Policy(size=SIDE, scale=(1, 1), ratio=(1, 1), normalise="none")
    pixels = [smooth(64, 64, k) for k in range(N)]
    path = packed.path.with_name("square.beton")
    writer = BetonWriter(path, N, 2**21)
    for k in range(N):
        writer.add(k, saved(Image.fromarray(pixels[k]), "JPEG", quality=95), 64, 64, False)
    writer.finish(np.arange(N))
    writer.close()
    for batch in training(BetonSource(path), "ffcv", square):
        for row in range(16):
            index = int(batch.ids[row % 8])
            assert (
                distance(batch.images.image(row), exact_crop(torch.from_numpy(pixels[index]), [0, 0, 64, 64], 40)) < 3
            )
    test = EvalLoader(packed, DataConfig(loader="ffcv", threads=2), batch=12, crops=CENTRE)
    native = EvalLoader(packed, DataConfig(loader="native", threads=2), batch=12, crops=CENTRE)
    assert all(same(a, b) for a, b in zip(test, native, strict=True))


@NEEDS_DALI
def test_dalis_own_operators(files: FileSource) -> None:
    """Flip, grey and blur as our kernel's; brightness, contrast and saturation by DALI's formulas, in its order."""

    def views(photometric: str, policy: Policy) -> list[torch.Tensor]:
        found = []
        for batch in training(files, "dali", policy, photometric=photometric, stop=4):
            assert batch.params is not None and (photometric == "kernel" or not batch.params.ops)
            found.append(255 * make_views(batch.images, batch.params, **policy.rendering))
        return found

    plain = Policy(size=SIDE, normalise="none", jitter=0, grey=0, blur=0)
    for policy, bound in (
        (plain, 1e-3),
        (Policy(size=SIDE, normalise="none", jitter=0, grey=1, blur=0), 1.5),
        (Policy(size=SIDE, normalise="none", jitter=0, grey=0, blur=1), 1.5),
    ):
        for ours, theirs in zip(views("kernel", policy), views("dali", policy), strict=True):
            assert distance(ours, theirs) < bound
    jitter = Policy(size=SIDE, normalise="none", flip=0, jitter=1, grey=0.3, blur=0)
    luma = torch.tensor([0.299, 0.587, 0.114])
    cut = training(files, "dali", jitter, stop=4)
    for batch, theirs in zip(cut, views("dali", jitter), strict=True):
        assert batch.params is not None
        brightness, contrast, saturation, hue = batch.params.factors.T
        saturation = torch.where(batch.params.grey, 0.0, saturation)
        for row in range(16):
            x = (batch.images.image(row).float() - 128) * contrast[row] + 128
            x = x * brightness[row]
            grey = (x @ luma)[..., None]
            x = grey + saturation[row] * (x - grey)
            if abs(float(hue[row])) < 0.02 or batch.params.grey[row]:  # a turn in YIQ, where there is one
                assert distance(x.clamp(0, 255), theirs[row].permute(1, 2, 0)) < 4


def test_refusals(files: FileSource, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    tensorflow = Policy(size=SIDE, semantics="tensorflow")
    with pytest.raises(ValueError, match=r"data.loader=torchvision resizes as torchvision does.*tensorflow"):
        training(files, "torchvision", tensorflow)
    with pytest.raises(ValueError, match=r"data.loader=torchvision makes crops only; give crops"):
        iter(TrainLoader(files, DataConfig(loader="torchvision"), batch=8, seed=0, stop=1))
    with pytest.raises(ValueError, match=r"data.photometric=dali needs data.loader=dali or dali_gpu, not native"):
        DataConfig(loader="native", photometric="dali")
    native = training(files, "native", tensorflow)
    assert not native.always_cuts and native.crops is None
    monkeypatch.setattr(loader_module, "import_module", missing)
    with pytest.raises(DataError, match=r"data.loader=dali needs nvidia.dali .* run: pip install nvidia-dali-cuda130"):
        training(files, "dali")
    with pytest.raises(DataError, match=r"data.loader=ffcv needs ffcv .* run: apt-get install .* pip install ffcv"):
        training(files, "ffcv")
    monkeypatch.setattr(loader_module, "import_module", lambda name: None)
    with pytest.raises(DataError, match=r"loader=ffcv reads .beton files only, not files; fastsimclr pack SRC DST"):
        training(files, "ffcv")
    more = Policy(size=SIDE, solarise=0.2, cutout=1)
    with pytest.raises(ValueError, match=r"data.photometric=dali can blur, flip.* also need cutout, solarise"):
        training(files, "dali", more, photometric="dali")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DataError, match=r"data.loader=dali_gpu needs a CUDA device, and there is none"):
        training(files, "dali_gpu")


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    "loader",
    [
        "native",
        TORCHVISION,
        pytest.param("dali", marks=[NEEDS_DALI, pytest.mark.slow]),
        pytest.param("synthetic", marks=pytest.mark.slow),
    ],
)
def test_memory_is_flat_over_ten_epochs(files: FileSource, loader: LoaderName) -> None:
    policy = Policy(size=96, normalise="none")  # crops of 1.6 MiB an epoch
    train = training(files, loader, policy, batch=30, stop=10)
    taken = [resident_bytes() for _ in train]
    assert len(taken) == 10 and max(taken[4:]) - taken[3] < 6 * 2**20


def test_the_loader_that_serves_and_its_name(files: FileSource) -> None:
    for loader, name in (("auto", "native"), ("native", "native"), ("synthetic", "synthetic")):
        assert TrainLoader(files, DataConfig(loader=loader), batch=8, seed=0, stop=1).name == name
    batch = next(iter(TrainLoader(files, DataConfig(loader="synthetic"), batch=8, seed=0, stop=1)))
    assert batch.images.image(7).shape == (224, 224, 3) and batch.params is None


def losses(folder: Path, root: Path, loader: str, *more: str) -> list[float]:
    """The losses of two smoke epochs from the command line. The rate is so low that the data alone makes them."""
    out = folder / loader
    words = f"pretrain --loader {loader} --smoke --config folder --data.root {root} --views.size 40 --device cpu"
    words += f" --pretrain.epochs 2 --pretrain.optim.lr 1e-6 --data.threads 2 --out {out}"
    assert main([*words.split(), *more]) == 0
    assert json.loads((out / "result.json").read_text())["implementations"]["loader"] == loader
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.fixture(scope="module")
def native_losses(imagenet_samples: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(tmp_path_factory.mktemp("run"), imagenet_samples, "native")


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["torchvision", DALI])
def test_two_epochs_have_natives_loss_curve(
    imagenet_samples: Path, native_losses: list[float], tmp_path: Path, loader: str
) -> None:
    """Within 1 %: what rounding of the pixels does to the loss of an untrained network; noise does far more."""
    assert len(native_losses) > 2
    np.testing.assert_allclose(losses(tmp_path, imagenet_samples, loader), native_losses, rtol=0.01)


@pytest.mark.slow
def test_two_epochs_of_noise_have_another_curve(
    imagenet_samples: Path, native_losses: list[float], tmp_path: Path
) -> None:
    noise = np.array(losses(tmp_path, imagenet_samples, "synthetic"))
    assert (np.abs(noise / native_losses - 1) > 0.01).any()


@pytest.mark.slow
@pytest.mark.needs("ffcv")
def test_two_epochs_of_ffcv(packed: BetonSource, tmp_path: Path) -> None:
    assert np.isfinite(losses(tmp_path, packed.path, "ffcv", "--data.source", "beton")).all()


@NEEDS_DALI
def test_foreign_files_reach_dali_decoded(files: FileSource, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = dali_module.decode

    def counted(data: bytes, name: str, max_pixels: int) -> npt.NDArray[np.uint8]:
        seen.append(int(Path(name).stem))
        return original(data, name, max_pixels)

    monkeypatch.setattr(dali_module, "decode", counted)
    test = EvalLoader(files, DataConfig(loader="dali", threads=1), batch=30, crops=CENTRE)
    assert len(list(test)) == 1
    assert sorted(seen) == [8, 9, 11, 14, 17, 20, 23, 26]


@pytest.mark.gpu
@NEEDS_DALI
def test_dali_decodes_on_the_gpu(files: FileSource) -> None:
    cuda = torch.device("cuda")
    for there, here in zip(training(files, "dali_gpu"), training(files, "dali"), strict=True):
        assert there.images.buffer.device.type == there.images.offsets.device.type == cuda.type
        assert torch.equal(there.ids, here.ids) and torch.equal(there.labels, here.labels)
        for row in range(16):
            assert distance(there.images.image(row).cpu(), here.images.image(row)) < 2  # nvJPEG's own upsampling
