"""Damaged images in every backend: mutated JPEGs as files, in shards and packed; workers and threads that fail."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from fastsimclr.loaders import faults as faults_module
from fastsimclr.loaders import turbo
from fastsimclr.loaders.backends import dali as dali_module
from fastsimclr.loaders.beton.reader import BetonSource
from fastsimclr.loaders.beton.writer import BetonWriter
from fastsimclr.loaders.cut import Crops
from fastsimclr.loaders.data import DataConfig, LoaderName
from fastsimclr.loaders.draw import Policy
from fastsimclr.loaders.loader import EvalLoader, TrainLoader
from fastsimclr.loaders.sets.basic import FileSource
from fastsimclr.loaders.shards.remote import FetchError
from fastsimclr.loaders.source import DataError
from tests.loaders.mutate import (
    KINDS,
    Deadly,
    check,
    drawn,
    expected,
    make_beton,
    make_files,
    make_packed,
    make_shards,
    smooth,
)
from tests.loading import hold

TORCHVISION = pytest.param("torchvision", marks=pytest.mark.slow)  # each of its workers is a process that starts
DALI = pytest.param("dali", marks=[pytest.mark.needs("nvidia.dali"), pytest.mark.slow])
FFCV = pytest.param("ffcv", marks=[pytest.mark.needs("ffcv"), pytest.mark.slow])  # it compiles for seconds
CROPS = Crops(policy=Policy(size=16, normalise="none"), seed=0, views=2)


@pytest.fixture(scope="module", params=[80, pytest.param(200, marks=pytest.mark.full)])
def mutated(
    request: pytest.FixtureRequest, imagenet_samples: Path, tmp_path_factory: pytest.TempPathFactory
) -> FileSource:
    """80 or 200 files, of which every eighth is undamaged; half of them were real."""
    real = [path.read_bytes() for path in sorted(imagenet_samples.iterdir())[:60] if path.stat().st_size < 100_000]
    return make_files(tmp_path_factory.mktemp("mutated"), request.param, real)


def test_the_mutations_are_as_hard_as_they_should_be(mutated: FileSource) -> None:
    bad, _ = expected(mutated)
    n = len(mutated)
    share = {kind: np.mean([k in bad for k in range(i, n, len(KINDS))]) for i, kind in enumerate(KINDS)}
    assert share["sound"] == share["png"] == 0
    assert share["magic"] == share["empty"] == share["huge"] == 1
    assert share["truncated"] > 0.8 and 0.3 < share["flipped"] < 1 and 0.3 < share["header"] < 1


@pytest.mark.parametrize("loader", ["native", "resident", TORCHVISION, DALI])
def test_damage_is_named_counted_and_replaced(mutated: FileSource, loader: LoaderName) -> None:
    assert check(mutated, loader) == len(expected(mutated)[0]) > len(mutated) / 2


@pytest.mark.parametrize("loader", ["native", "resident", TORCHVISION, DALI])
def test_damage_in_shards_is_named_counted_and_replaced(
    mutated: FileSource, tmp_path: Path, loader: LoaderName
) -> None:
    assert check(make_shards(tmp_path, mutated), loader) == len(expected(mutated)[0])


@pytest.mark.parametrize("loader", ["native", "resident", DALI, FFCV])
def test_damage_in_a_beton_is_named_counted_and_replaced(
    mutated: FileSource, tmp_path: Path, loader: LoaderName
) -> None:
    assert check(make_beton(tmp_path / "mutated.beton", mutated), loader) == len(expected(mutated)[0])


@pytest.mark.parametrize("loader", ["native", DALI])
def test_damage_is_left_out_of_a_packed_file(mutated: FileSource, tmp_path: Path, loader: LoaderName) -> None:
    assert check(make_packed(tmp_path / "packed.beton", mutated), loader) == 0


@pytest.mark.parametrize("crops", [False, True])
def test_a_beton_whose_table_is_wrong_names_what_is_wrong(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, crops: bool
) -> None:
    writer = BetonWriter(tmp_path / "x.beton", 5, 2**21)
    blobs = []
    for k, kind in enumerate(("JPEG", "PNG", "JPEG", "JPEG")):
        file = io.BytesIO()
        Image.fromarray(smooth(90, 90, k)).save(file, kind)
        blobs.append(file.getvalue())
    for row, (blob, side) in enumerate(zip([*blobs, b"no image"], (90, 60, 60, 95, 90), strict=True)):
        writer.add(row, blob, side, side, False)
    writer.finish(np.zeros(5))
    writer.close()
    data = DataConfig(threads=1, loader="native", max_bad_fraction=0.9)
    source = BetonSource(tmp_path / "x.beton")
    loader = TrainLoader(source, data, batch=5, seed=0, stop=2, crops=CROPS if crops else None)
    assert [len(batch) for batch in loader] == [5, 5]
    more = "has 90 x 90 pixels, more than its header or table said; pack it anew"
    assert sorted(loader.bad) == [1, 2, 3, 4] and more in loader.bad[1] and more in loader.bad[2]
    assert "has (90, 90) pixels, (95, 95) by its header or table; pack it anew" in loader.bad[3]
    assert "x.beton[4] is not an image" in loader.bad[4] and "begins b'no image'" in loader.bad[4]


@pytest.fixture
def files(tmp_path: Path) -> FileSource:
    """40 sound files."""
    names = [f"{k:02}.jpg" for k in range(40)]
    for name, data in zip(names, drawn(40), strict=True):
        (tmp_path / name).write_bytes(data)
    return FileSource("files", tmp_path, names, [0] * 40, np.arange(40), [str(k) for k in range(40)])


@pytest.mark.parametrize("loader", [TORCHVISION, DALI])
def test_too_many_and_none_readable(files: FileSource, loader: LoaderName) -> None:
    for k in (3, 30):
        (files.root / files.names[k]).write_bytes(b"\xff\xd8 no more")
    config = DataConfig(loader=loader, threads=2, max_bad_fraction=0.04)
    with pytest.raises(DataError, match=r"at least 2 of 40 images are damaged, over data.max_bad_fraction=0.04"):
        list(TrainLoader(files, config, batch=40, seed=0, stop=1, crops=CROPS))
    # A second loader of the same source knows of them, and so does an evaluation.
    again = EvalLoader(files, DataConfig(loader=loader, threads=2, max_bad_fraction=0.05), batch=40, crops=CROPS)
    assert [len(batch) for batch in again] == [38] and sorted(again.bad) == [3, 30]
    for name in files.names:
        (files.root / name).write_bytes(b"")
    empty = FileSource("empty", files.root, files.names, files.sizes.tolist(), files.labels, files.classes)
    for run in (
        TrainLoader(empty, config, batch=8, seed=0, stop=1, crops=CROPS),
        EvalLoader(empty, config, batch=8, crops=CROPS),
    ):
        with pytest.raises(DataError, match="damaged"):
            list(run)


@pytest.mark.parametrize("loader", [TORCHVISION, DALI])
def test_each_image_is_decoded_strictly_once(
    files: FileSource, loader: LoaderName, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    for run in (1, 2):
        train = TrainLoader(files, DataConfig(loader=loader, threads=2), batch=10, seed=run, stop=8, crops=CROPS)
        strict = train.reader.decode

        def counted(index, *rest, strict=strict):  # type: ignore[no-untyped-def]
            seen.append(index)
            return strict(index, *rest)

        monkeypatch.setattr(train.reader, "decode", counted)
        assert sum(len(batch) for batch in train) == 80
        # Two threads may meet at an image that the end of one epoch and the beginning of the next ask for.
        assert set(seen) == (set(range(40)) if run == 1 else set())
        seen.clear()
    packed = FileSource("packed", files.root, files.names, files.sizes.tolist(), files.labels, files.classes)
    packed.verified = True  # type: ignore[attr-defined]
    train = TrainLoader(packed, DataConfig(loader=loader, threads=2), batch=10, seed=0, stop=4, crops=CROPS)
    monkeypatch.setattr(train.reader, "decode", counted)
    assert sum(len(batch) for batch in train) == 40 and not seen


@pytest.mark.parametrize("loader", ["native", pytest.param("torchvision", marks=pytest.mark.slow)])
def test_the_header_of_a_file_is_parsed_once(
    files: FileSource, loader: LoaderName, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[int] = []
    really = simplejpeg.decode_jpeg_header

    def counted(data: bytes) -> Any:
        parsed.append(1)
        return really(data)

    monkeypatch.setattr(simplejpeg, "decode_jpeg_header", counted)
    monkeypatch.setattr(turbo, "AVAILABLE", False)
    list(TrainLoader(files, DataConfig(loader=loader, threads=2), batch=40, seed=0, stop=1, crops=CROPS))
    assert len(parsed) == 40


@pytest.mark.slow
def test_a_worker_that_dies_is_a_named_error(files: FileSource) -> None:
    deadly = Deadly("deadly", files.root, files.names, files.sizes.tolist(), files.labels, files.classes)
    deadly.deadly = 17
    train = TrainLoader(deadly, DataConfig(loader="torchvision", threads=2), batch=10, seed=0, stop=9, crops=CROPS)
    with pytest.raises(RuntimeError, match=r"loader=torchvision: a worker process died .* use loader=native"):
        list(train)


@pytest.mark.needs("nvidia.dali")
def test_a_pipeline_that_dies_is_a_named_error(files: FileSource, monkeypatch: pytest.MonkeyPatch) -> None:
    original = dali_module._file

    def broken(data, plain, job, index):  # type: ignore[no-untyped-def]
        return np.frombuffer(b"\xff\xd8 damaged since", np.uint8) if index == 17 else original(data, plain, job, index)

    monkeypatch.setattr(dali_module, "_file", broken)
    train = TrainLoader(files, DataConfig(loader="dali", threads=2), batch=10, seed=0, stop=9, crops=CROPS)
    with pytest.raises(DataError, match=r"DALI failed on a batch of 10 images, from .*\.jpg to .*use loader=native"):
        list(train)


class Defective(FileSource):
    """Files of which reading one fails, and not because of the file."""

    error: Exception

    def read(self, index: int) -> bytes:
        if index == 17:
            raise self.error
        return super().read(index)


def everything(source: FileSource, loader: LoaderName) -> None:
    """Every image of an epoch, by this backend."""
    config = DataConfig(loader=loader, threads=2, max_bad_fraction=0.9)
    if loader == "resident":
        source.pixel_sizes = np.ones((40, 2), np.int32)  # type: ignore[attr-defined]  # so that it reads in threads only
        hold(source, config, torch.device("cpu"))
    else:
        list(TrainLoader(source, config, batch=10, seed=0, stop=4, crops=CROPS))


def assert_no_threads() -> None:
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("decode", "resident"))]


@pytest.mark.parametrize("loader", ["native", "resident", TORCHVISION, DALI])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), r"\(MemoryError\); free memory"),
        (KeyError("bug"), r"\(KeyError: 'bug'\); --traceback"),
        (StopIteration(), r"\(StopIteration\); --traceback"),
    ],
)
def test_a_thread_that_fails_otherwise_names_the_image(
    files: FileSource, loader: LoaderName, error: Exception, said: str
) -> None:
    source = Defective("defective", files.root, files.names, files.sizes.tolist(), files.labels, files.classes)
    source.error = error
    with pytest.raises(RuntimeError, match=rf"/17\.jpg could not be read or decoded, and no .* {said}") as caught:
        everything(source, loader)
    assert caught.value.__cause__ is error
    assert_no_threads()


@pytest.mark.parametrize("loader", ["native", "resident", TORCHVISION, DALI])
def test_memory_that_is_short_while_decoding_names_the_image(
    files: FileSource, loader: LoaderName, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = faults_module.decode

    def short(data, name, *rest):  # type: ignore[no-untyped-def]
        if name.endswith("/17.jpg"):
            raise MemoryError
        return really(data, name, *rest)

    monkeypatch.setattr(faults_module, "decode", short)
    monkeypatch.setattr(turbo, "AVAILABLE", False)
    with pytest.raises(RuntimeError, match=r"/17\.jpg could not be read or decoded.* free memory, or lower"):
        everything(files, loader)
    assert_no_threads()


@pytest.mark.parametrize("loader", ["native", "resident", TORCHVISION, DALI])
def test_a_network_that_fails_stops_every_backend(files: FileSource, loader: LoaderName) -> None:
    source = Defective("defective", files.root, files.names, files.sizes.tolist(), files.labels, files.classes)
    source.error = FetchError("http://h/t-0.tar could not be fetched in 6 attempts")
    with pytest.raises(FetchError, match=r"t-0\.tar could not be fetched"):
        everything(source, loader)
    assert_no_threads()
