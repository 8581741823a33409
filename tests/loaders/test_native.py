"""Batches: what is in them against a plain loop, for any number of threads; damaged images; threads that end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from fastsimclr.loaders.backends import held as held_module
from fastsimclr.loaders.backends import resident as resident_module
from fastsimclr.loaders.backends.held import free_bytes
from fastsimclr.loaders.backends.resident import Resident
from fastsimclr.loaders.batch import Batch
from fastsimclr.loaders.data import DataConfig, open_data
from fastsimclr.loaders.decode import decode
from fastsimclr.loaders.loader import EvalLoader, Loader, TrainLoader
from fastsimclr.loaders.order import epoch_order
from fastsimclr.loaders.sets.basic import ArraySource, FileSource, SyntheticSource
from fastsimclr.loaders.source import DataError, Source
from tests.loading import hold

Pixels = npt.NDArray[np.uint8]
CPU = torch.device("cpu")
N = 23


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> FileSource:
    """23 images of different sizes in three formats, labels 0, 1, 2, 0, ..."""
    root = tmp_path_factory.mktemp("files")
    draw = np.random.default_rng(0)
    names = [f"{k:02}.{('png', 'jpg', 'webp')[k % 3]}" for k in range(N)]
    for k, name in enumerate(names):
        Image.fromarray(draw.integers(0, 256, (3 + k, 40 - k, 3), dtype=np.uint8)).save(root / name)
    return FileSource("files", root, names, [0] * N, np.arange(N) % 3, ("a", "b", "c"))


class Damaged(Source):
    """A source some of whose images are damaged, or whose read fails as `failure` says."""

    def __init__(self, source: Source, bad: tuple[int, ...], failure: BaseException | None = None) -> None:
        self.source, self.bad, self.failure = source, bad, failure
        self.name, self.classes, self.labels, self.fingerprint = "damaged", source.classes, source.labels, "f"

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> bytes | Pixels:
        if index in self.bad:
            if self.failure:
                raise self.failure
            return b"not an image at all"
        return self.source.read(index)

    def describe(self, index: int) -> str:
        return self.source.describe(index)


def config(**keys: Any) -> DataConfig:
    return DataConfig(**{"threads": 2, **keys})


def plain(source: Source, index: int) -> Pixels:
    data = source.read(index)
    return decode(data, "x") if isinstance(data, bytes) else data


def same(one: Batch, other: Batch) -> bool:
    pairs = [(getattr(one, name), getattr(other, name)) for name in ("ids", "epochs", "labels", "sizes")]
    images = [(one.images.image(i), other.images.image(i)) for i in range(len(one))]
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in pairs + images)


@pytest.fixture(params=["native", "resident"])
def how(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def kept(how: str, source: Source, **keys: Any) -> Resident | None:
    return hold(source, config(**keys), CPU) if how == "resident" else None


def test_training_batches_against_a_plain_loop(files: FileSource, how: str) -> None:
    loader = TrainLoader(files, config(), batch=8, seed=5, start=1, stop=9, resident=kept(how, files))
    order = [(epoch, i) for epoch in range(4) for i in epoch_order(N, 5, epoch).tolist()]
    batches = list(loader)
    assert (loader.name, len(loader), len(batches)) == (how, 8, 8)
    for step, batch in enumerate(batches, 1):
        expected = order[8 * step : 8 * step + 8]
        assert list(zip(batch.epochs.tolist(), batch.ids.tolist(), strict=True)) == expected
        assert batch.labels.tolist() == [i % 3 for _, i in expected]
        for row, (_, i) in enumerate(expected):
            pixels = plain(files, i)
            assert np.array_equal(batch.images.image(row).numpy(), pixels)
            assert batch.sizes[row].tolist() == list(pixels.shape[:2])
        assert batch.ids.dtype == batch.epochs.dtype == batch.labels.dtype == batch.images.offsets.dtype == torch.int64
        assert batch.sizes.dtype == batch.images.heights.dtype == batch.images.widths.dtype == torch.int32


def test_evaluation_is_one_pass_in_order(files: FileSource, how: str) -> None:
    loader = EvalLoader(files, config(), batch=10, resident=kept(how, files))
    for _ in range(2):
        batches = list(loader)
        assert [len(batch) for batch in batches] == [10, 10, 3]
        assert torch.cat([batch.ids for batch in batches]).tolist() == list(range(N))
        assert not any(batch.epochs.any() for batch in batches)
        assert np.array_equal(batches[2].images.image(2).numpy(), plain(files, 22))
    assert len(loader) == 3


def test_any_number_of_threads_and_either_loader_give_the_same(files: FileSource) -> None:
    bad = Damaged(files, (0, 7, 8, 22))
    runs = []
    for threads in (1, 2, 5):
        some = config(threads=threads, max_bad_fraction=0.5)
        runs.append(list(TrainLoader(bad, some, batch=9, seed=1, stop=6)))
        runs.append(list(TrainLoader(bad, some, batch=9, seed=1, stop=6, resident=hold(bad, some, CPU))))
    for run in runs[1:]:
        assert all(same(a, b) for a, b in zip(run, runs[0], strict=True))


def test_ranks_share_the_global_batch_and_runs_resume(files: FileSource, how: str) -> None:
    memory = kept(how, files)
    whole = list(TrainLoader(files, config(), batch=6, seed=2, stop=8, resident=memory))
    parts = [
        list(TrainLoader(files, config(), batch=6, seed=2, stop=8, rank=r, world=3, resident=memory)) for r in range(3)
    ]
    for step, batch in enumerate(whole):
        assert torch.cat([part[step].ids for part in parts]).tolist() == batch.ids.tolist()
    tail = list(TrainLoader(files, config(), batch=6, seed=2, start=5, stop=8, resident=memory))
    assert all(same(a, b) for a, b in zip(tail, whole[5:], strict=True))


@pytest.mark.parametrize("failure", [None, PermissionError("no entry"), DataError("cannot be")])
def test_damaged_images_in_training(
    files: FileSource, how: str, failure: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    bad = Damaged(files, (0, 7, 8, 22), failure)
    loader = TrainLoader(bad, config(), batch=N, seed=0, stop=3)
    with pytest.raises(
        DataError, match=r"damaged: at least [1-4] of 23 images are damaged, over data.max_bad_fraction=0.01"
    ):
        list(loader)
    caplog.clear()
    lenient = config(max_bad_fraction=4 / N)
    loader = TrainLoader(bad, lenient, batch=N, seed=0, stop=3, resident=kept(how, bad, max_bad_fraction=4 / N))
    stand_ins = {0: 1, 7: 9, 8: 9, 22: 1}
    for epoch, batch in enumerate(loader):
        assert batch.ids.tolist() == epoch_order(N, 0, epoch).tolist()
        for row, index in enumerate(batch.ids.tolist()):
            shown = stand_ins.get(index, index)
            assert np.array_equal(batch.images.image(row).numpy(), plain(files, shown))
            assert batch.labels[row] == shown % 3
    assert sorted(loader.bad) == [0, 7, 8, 22]
    reason = str(failure) if failure else "00.png is not an image"
    assert reason in loader.bad[0]
    assert sorted(record.getMessage().split()[2] for record in caplog.records) == ["0", "22", "7", "8"]
    with pytest.raises(DataError, match="at least 4 of 23"):
        list(TrainLoader(bad, config(max_bad_fraction=3.9 / N), batch=N, seed=0, stop=3))


def test_damaged_images_in_evaluation(files: FileSource, how: str) -> None:
    bad = Damaged(files, (1, 20, 21, 22))
    loader = EvalLoader(bad, config(max_bad_fraction=0.2), batch=10, resident=kept(how, bad, max_bad_fraction=0.2))
    batches = list(loader)
    assert [batch.ids.tolist() for batch in batches] == [[0, *range(2, 10)], list(range(10, 20))]
    assert batches[0].labels.tolist() == [i % 3 for i in (0, *range(2, 10))]
    assert np.array_equal(batches[0].images.image(1).numpy(), plain(files, 2))
    assert sorted(loader.bad) == [1, 20, 21, 22]


def test_nothing_readable(files: FileSource) -> None:
    bad = Damaged(files, tuple(range(N)))
    for run in (TrainLoader(bad, config(), batch=4, seed=0, stop=3), EvalLoader(bad, config(), batch=4)):
        with pytest.raises(DataError, match=r"repair or remove them, or raise it. The first: .*\.\w+ is not an image"):
            list(run)
    with pytest.raises(DataError, match="damaged"):
        hold(bad, config(loader="resident"), CPU)


def test_refusals(files: FileSource) -> None:
    with pytest.raises(DataError, match="global_batch=24 is larger than the 23 images of files; lower it"):
        TrainLoader(files, config(), batch=24, seed=0, stop=1)
    with pytest.raises(ValueError, match="global_batch=9 is not divisible by world_size=2; use 8"):
        TrainLoader(files, config(), batch=9, seed=0, stop=1, world=2)
    with pytest.raises(ValueError, match="resident holds files, not synthetic"):
        EvalLoader(SyntheticSource(4, 4, 2), config(), batch=2, resident=hold(files, config(), CPU))


def names_of_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("decode", "pack", "resident"))]


class Slow(ArraySource):
    """An array that takes 2 ms an image and counts its reads."""

    def __init__(self) -> None:
        super().__init__("slow", np.zeros((64, 2, 2, 3), np.uint8), [0] * 64, ("a",))
        self.reads = 0

    def read(self, index: int) -> Pixels:
        self.reads += 1
        time.sleep(0.002)
        return super().read(index)


def leave(loader: Loader, way: str) -> None:
    with loader:
        iterator: Iterator[Batch] = iter(loader)
        next(iterator)
        assert names_of_threads()
        if way == "error":
            raise KeyboardInterrupt
        if way == "end":
            list(iterator)


@pytest.mark.parametrize("way", ["end", "with", "error"])
def test_threads_end_with_the_iteration(way: str) -> None:
    source = Slow()
    loader = TrainLoader(source, config(), batch=16, seed=0, stop=50 if way != "end" else 6)
    if way == "error":
        with pytest.raises(KeyboardInterrupt):
            leave(loader, way)
    else:
        leave(loader, way)
    assert names_of_threads() == []
    assert source.reads <= 16 * 6  # what runs ahead is bounded, and was not worked off


def test_breaking_out_of_a_loop_ends_the_threads() -> None:
    for _ in TrainLoader(Slow(), config(), batch=16, seed=0, stop=50):
        break
    assert names_of_threads() == []


def test_an_error_in_a_thread_reaches_the_consumer(files: FileSource) -> None:
    broken = Damaged(files, (5,), ZeroDivisionError("in a thread"))
    with pytest.raises(RuntimeError, match=r"no damage explains it \(ZeroDivisionError: in a thread"):
        list(TrainLoader(broken, config(), batch=N, seed=0, stop=50))
    broken.pixel_sizes = np.ones((N, 2), np.int32)  # type: ignore[attr-defined]  # else its images are read once before
    with pytest.raises(RuntimeError, match=r"no damage explains it \(ZeroDivisionError: in a thread"):
        hold(broken, config(), CPU)
    assert names_of_threads() == []


def test_residence(files: FileSource, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = sum(plain(files, i).size for i in range(N))
    seen: list[tuple[int, int]] = []
    held = hold(files, config(loader="resident"), CPU, lambda done, n: seen.append((done, n)))
    assert held is not None
    assert held.images.buffer.numel() == exact
    assert seen[-1] == (N, N)
    assert hold(files, config(loader="native"), CPU) is None
    assert hold(files, config(resident_gib=(exact - 1) / 2**30), CPU) is None
    assert hold(files, config(resident_gib=(exact + 1) / 2**30), CPU) is not None
    with pytest.raises(
        DataError, match=r"data.loader=resident, but files takes .* use auto or raise data.resident_gib"
    ):
        hold(files, config(loader="resident", resident_gib=1e-9), CPU)
    monkeypatch.setattr(resident_module, "SAMPLE", 2)  # the two smallest: the buffer has to grow
    monkeypatch.setattr(held_module, "CHUNK", 4)
    grown = hold(files, config(), CPU)
    assert grown is not None
    assert torch.equal(grown.images.buffer, held.images.buffer)


def test_free_memory_is_below_what_is_built_in() -> None:
    text = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").exists() else ""
    if text:
        assert 0 < free_bytes(CPU) < int(text.split()[1]) * 1024


def test_digits_fit(how: str) -> None:
    train = open_data(DataConfig()).train
    batch = next(iter(TrainLoader(train, config(), batch=64, seed=0, stop=1, resident=kept(how, train))))
    assert batch.images.buffer.dtype == torch.uint8
    assert (batch.sizes == 8).all()
    assert batch.labels.tolist() == train.labels[batch.ids.numpy()].tolist()


def test_cifar_as_jpeg(cifar_samples: Path) -> None:
    splits = open_data(DataConfig(source="folder", root=str(cifar_samples)))
    assert (len(splits.unlabelled), len(splits.val), len(splits.train.classes)) == (400, 200, 10)
    held = hold(splits.unlabelled, config(loader="resident"), CPU)
    assert held is not None
    assert held.images.buffer.numel() == 400 * 32 * 32 * 3
    for one, two in zip(
        TrainLoader(splits.unlabelled, config(), batch=128, seed=0, stop=4, resident=held),
        TrainLoader(splits.unlabelled, config(), batch=128, seed=0, stop=4),
        strict=True,
    ):
        assert same(one, two)


def test_imagenet_in_threads(imagenet_samples: Path) -> None:
    source = open_data(DataConfig(source="folder", root=str(imagenet_samples))).unlabelled
    ids = [batch.ids for batch in TrainLoader(source, config(), batch=100, seed=0, stop=2)]
    assert len(set(torch.cat(ids).tolist())) == 200
