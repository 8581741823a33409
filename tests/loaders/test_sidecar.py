"""The sidecar of a .beton: names, classes and checksums, and what is damaged in it or in the file."""

from __future__ import annotations

import json
import pickle
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsimclr.loaders.beton.reader import BetonSource
from fastsimclr.loaders.beton.sidecar import Sidecar, read_sidecar, sidecar_path, write_sidecar
from fastsimclr.loaders.beton.writer import BetonWriter
from fastsimclr.loaders.source import DataError
from tests.loaders.betons import FIRST, PAGE, PIXELS, SECOND, TABLE, by_hand, put


@pytest.fixture(scope="module")
def carded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file built by hand, with a sidecar."""
    path = put(tmp_path_factory.mktemp("carded") / "x.beton", by_hand())
    card = Sidecar(
        images=2,
        file_bytes=path.stat().st_size,
        names=("cat/a.jpg", "b\udcff.png"),  # the second is a file name that is not UTF-8
        classes=("w", "x", "y", "z"),
        crc32=np.array([zlib.crc32(FIRST), zlib.crc32(SECOND)], dtype=np.uint32),
        source={"name": "here", "fingerprint": "f"},
        settings={"quality": 90},
        stored={"verbatim": 2},
        left_out=(("c.png", "c.png is damaged"),),
    )
    write_sidecar(sidecar_path(path), replace(card, fingerprint=BetonSource(path).fingerprint_with(card)))
    return path


def test_the_sidecar_gives_names_classes_and_checksums(carded: Path) -> None:
    source = BetonSource(carded)
    assert source.names == ("cat/a.jpg", "b\udcff.png") and source.classes == ("w", "x", "y", "z")
    assert source.describe(0) == f"{carded}/cat/a.jpg"
    assert source.verified and source.read(0) == FIRST
    assert source.sidecar is not None
    assert source.sidecar.left_out == (("c.png", "c.png is damaged"),) and source.sidecar.settings == {"quality": 90}


# Places that say something: the header, types and names, the rows without what alignment leaves, the last table.
SAID = [*range(24), *(24 + 1041 * k + j for k in (0, 1) for j in range(17)), *range(TABLE, TABLE + 13)]
SAID += [*range(TABLE + 16, TABLE + 37), *range(TABLE + 40, TABLE + 48), *range(2 * PAGE, 2 * PAGE + 48)]


@given(place=st.sampled_from(SAID), bit=st.integers(0, 7), card=st.booleans())
def test_a_flipped_bit_is_refused_or_harmless(carded: Path, place: int, bit: int, card: bool) -> None:
    sidecar = None if card else carded.with_name("none.json")
    size = carded.stat().st_size
    with carded.open("r+b", buffering=0) as file:
        file.seek(place)
        (byte,) = file.read(1)
        try:
            file.seek(place)
            file.write(bytes([byte ^ 1 << bit]))
            try:
                source = BetonSource(carded, sidecar)
            except DataError:
                return
            assert not card  # with a sidecar every bit counts
            assert (source.starts >= TABLE).all() and (source.starts + source.lengths <= size).all()
            for index in range(len(source)):
                data = source.read(index)
                assert len(data) == source.lengths[index] if isinstance(data, bytes) else data.size > 0
        finally:
            file.seek(place)
            file.write(bytes([byte]))


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_damaged_sidecar_is_refused_or_harmless(
    carded: Path, tmp_path_factory: pytest.TempPathFactory, place: int, bit: int
) -> None:
    data = bytearray(sidecar_path(carded).read_bytes())
    data[place % len(data)] ^= 1 << bit
    bad = put(tmp_path_factory.mktemp("card") / "bad.json", bytes(data))
    try:
        source = BetonSource(carded, bad)
    except DataError as error:
        assert str(bad) in str(error)
    else:  # only what says nothing of the images may change unnoticed
        assert source.names == ("cat/a.jpg", "b\udcff.png") and source.classes == ("w", "x", "y", "z")


def test_a_sidecar_of_another_file_is_refused(carded: Path, tmp_path: Path) -> None:
    other = put(tmp_path / "x.beton", by_hand(labels=(3, 0)))
    sidecar_path(other).write_bytes(sidecar_path(carded).read_bytes())
    with pytest.raises(DataError, match="do not agree: one of them was changed"):
        BetonSource(other)
    writer = BetonWriter(other, 3, PAGE)
    for row in range(3):
        writer.add(row, FIRST, 4, 7, False)
    writer.finish([0, 1, 2])
    writer.close()
    with pytest.raises(DataError, match=r"belongs to another file than .*: it tells of 2 images .* not of 3"):
        BetonSource(other)
    sidecar_path(other).write_text(json.dumps({"format": "something else"}))
    with pytest.raises(DataError, match=r"x\.beton\.json is not a sidecar of this version"):
        BetonSource(other)


def test_a_damaged_blob_is_named_at_its_first_read(carded: Path, tmp_path: Path) -> None:
    path = put(tmp_path / "x.beton", carded.read_bytes())
    sidecar_path(path).write_bytes(sidecar_path(carded).read_bytes())
    with path.open("r+b") as file:
        file.seek(PAGE + 40)
        file.write(b"!!")
    source = BetonSource(path)
    with pytest.raises(DataError, match=r"x\.beton/cat/a\.jpg is damaged: its CRC-32 is [0-9a-f]{8}, not [0-9a-f]{8}"):
        source.read(0)
    assert read_sidecar(sidecar_path(path)).images == 2
    np.testing.assert_array_equal(np.asarray(source.read(1)).reshape(-1), np.frombuffer(PIXELS, np.uint8))
    with path.open("r+b") as file:
        file.truncate(PAGE + 10)
    with pytest.raises(OSError, match="ended after 10 of"):
        source.read(0)


def test_copies_threads_and_pickles(carded: Path) -> None:
    source = BetonSource(carded)
    other = source.relabelled([1, 0], ["p", "q"])
    assert (other.labels.tolist(), other.classes) == ([1, 0], ("p", "q")) and source.labels.tolist() == [3, -1]
    assert other.fingerprint != source.fingerprint
    assert BetonSource(carded, carded.with_name("none.json")).fingerprint != source.fingerprint
    del source
    again = pickle.loads(pickle.dumps(other))
    assert again.fingerprint == other.fingerprint and again.labels.tolist() == [1, 0]
    with ThreadPoolExecutor(8) as pool:
        reads = list(pool.map(again.read, [0, 1] * 200)), list(pool.map(other.read, [0, 1] * 200))
    assert all(each[0] == FIRST and each[-1].tobytes() == PIXELS for each in reads)
