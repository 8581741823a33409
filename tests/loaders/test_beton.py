"""The .beton format: read and written byte by byte against files built by hand; damaged tables refused."""

from __future__ import annotations

import os
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from fastsimclr.loaders.beton.reader import BetonSource
from fastsimclr.loaders.beton.writer import MAX_PAGE, BetonWriter
from fastsimclr.loaders.data import DataConfig
from fastsimclr.loaders.loader import TrainLoader
from fastsimclr.loaders.source import DataError
from tests.loaders.betons import FIRST, ORDERS, PAGE, PIXELS, SECOND, TABLE, by_hand, jpeg, put


@pytest.mark.parametrize("fields", ORDERS)
def test_a_file_built_by_hand(tmp_path: Path, fields: str) -> None:
    source = BetonSource(put(tmp_path / "x.beton", by_hand(fields)))
    assert len(source) == 2 and source.name == "x.beton"
    assert source.read(0) == FIRST
    pixels = source.read(1)
    assert isinstance(pixels, np.ndarray)
    assert pixels.dtype == np.uint8 and pixels.shape == (2, 5, 3) and pixels.tobytes() == PIXELS
    assert source.pixel_sizes.dtype == np.int32 and source.pixel_sizes.tolist() == [[4, 7], [2, 5]]
    assert source.raw.tolist() == [False, True] and source.lengths.tolist() == [len(FIRST), len(SECOND)]
    assert source.describe(1) == f"{tmp_path}/x.beton[1]" and not source.verified
    labelled = "label" in fields
    assert source.labels.tolist() == ([3, -1] if labelled else [-1, -1])
    assert source.classes == (("0", "1", "2", "3") if labelled else ())


def test_the_writer_makes_the_file_built_by_hand(tmp_path: Path) -> None:
    writer = BetonWriter(tmp_path / "x.beton", 2, PAGE)
    assert writer.add(1, SECOND, 2, 5, True) == PAGE
    assert writer.add(0, FIRST, 4, 7, False) == PAGE + len(SECOND)
    size = writer.finish([3, -1])
    writer.close()
    rows = struct.pack("<BHHQ3xq", 0, 7, 4, PAGE + len(SECOND), 3) + struct.pack("<BHHQ3xq", 1, 5, 2, PAGE, -1)
    fields = struct.pack("<B16s1024x", 2, b"image") + struct.pack("<B16s1024x", 1, b"label")
    head = struct.pack("<HHIQQ", 2, 2, PAGE, 2, 2 * PAGE) + fields + rows
    tail = struct.pack("<QQQQQQ", 1, PAGE, len(SECOND), 0, PAGE + len(SECOND), len(FIRST))
    written = (tmp_path / "x.beton").read_bytes()
    assert written == head.ljust(PAGE, b"\0") + (SECOND + FIRST).ljust(PAGE, b"\0") + tail
    assert size == len(written)


@given(st.data())
@examples(max_examples=15)
def test_pages_hold_whole_blobs_in_any_order(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    near = st.sampled_from([1, 2, PAGE // 2, PAGE // 2 + 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE])
    sizes = data.draw(st.lists(st.one_of(st.integers(1, 2000), near), min_size=1, max_size=8))
    order = data.draw(st.permutations(range(len(sizes))))
    more = data.draw(st.sampled_from([0, 1, 5]))  # rows foreseen and not used
    path = tmp_path_factory.mktemp("pages") / "x.beton"
    blobs = [np.random.default_rng(row).bytes(size) for row, size in enumerate(sizes)]
    writer = BetonWriter(path, len(sizes) + more, PAGE)
    for row in order:
        writer.add(row, blobs[row], 1 + row, 2, False)
    writer.finish([row % 3 for row in range(len(sizes))])
    writer.close()
    source = BetonSource(path)
    assert [source.read(row) for row in range(len(sizes))] == blobs
    assert source.pixel_sizes[:, 0].tolist() == [1 + row for row in range(len(sizes))]
    assert source.labels.tolist() == [row % 3 for row in range(len(sizes))]
    page = source.page_bytes
    assert page >= max(sizes) and page & (page - 1) == 0
    assert page == PAGE or page < 2 * max(sizes)
    for start, size in zip(source.starts.tolist(), sizes, strict=True):
        assert start // page == (start + size - 1) // page
    if list(order) == sorted(order):
        assert source.blocks is not None
        pages = [{start // page for start in source.starts[a:b].tolist()} for a, b in pairwise(source.blocks)]
        assert all(len(each) == 1 for each in pages) and len(set.union(*pages)) == len(pages)


def test_pages_that_come_next_are_read_ahead_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = BetonWriter(tmp_path / "x.beton", 12, PAGE)
    for row in range(12):
        writer.add(row, bytes(PAGE // 3), 1, 2, False)
    writer.finish(np.zeros(12))
    writer.close()
    source = BetonSource(tmp_path / "x.beton")
    assert source.blocks is not None and source.blocks.tolist() == [0, 3, 6, 9, 12]
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *what: asked.append(what))
    where = [int(source.starts[3 * block]) // PAGE * PAGE for block in range(4)]
    for ids, blocks in (([4, 0], [0, 1]), ([5, 9], [3]), ([9], []), ((), []), ([9], [3])):
        asked.clear()
        source.expect(ids)
        assert asked == [(where[block], PAGE, os.POSIX_FADV_WILLNEED) for block in blocks]
    with TrainLoader(source, DataConfig(order="quasi", window=1, loader="native"), batch=3, seed=0, stop=4) as loader:
        asked.clear()
        assert len(list(loader.plan())) == 4 and not asked  # nobody reads
        with pytest.raises(DataError, match="damaged"):  # these are no images
            next(iter(loader))
        assert asked


def test_the_writer_refuses_what_the_format_cannot_hold(tmp_path: Path) -> None:
    writer = BetonWriter(tmp_path / "x.beton", 2, PAGE)
    with pytest.raises(DataError, match=r"70000 x 2 pixels, over the format's .* 65535 pixels a side; shrink it"):
        writer.add(0, b"x", 70000, 2, False)
    writer.add(0, b"x", 1, 2, False)
    with pytest.raises(ValueError, match="1 blobs for 2 labels"):
        writer.finish([0, 1])
    writer.close()
    for page in (PAGE // 2, PAGE + 1, 2 * MAX_PAGE):
        with pytest.raises(ValueError, match=r"page_bytes=\d+ must be a power of two from 2097152"):
            BetonWriter(tmp_path / "y.beton", 2, page)


DAMAGE = [
    (0, "<H", 3, "is not a .beton of version 2: its first two bytes say 3"),
    (2, "<H", 0, "has 0 fields and 2 samples"),
    (2, "<H", 60000, "has 60000 fields in its header, more than fit"),
    (4, "<I", PAGE + 1, "page_size=2097153 in its header, which must be a power of two"),
    (4, "<I", PAGE // 2, "must be a power of two from 2097152"),
    (8, "<Q", 0, "has 2 fields and 0 samples"),
    (8, "<Q", 2**63, "more than fit before byte"),
    (8, "<Q", 3, "has mode"),  # a third row of zeros is a JPEG of no size
    (16, "<Q", 2 * PAGE + 1, "the rest must be whole rows of 24 bytes"),
    (16, "<Q", 2**40, "the rest must be whole rows of 24 bytes"),
    (24, "<B", 255, r"has the field b'image' of type 255.*write it without custom fields"),
    (24, "<B", 1, "has 0 image fields among image, label"),
    (TABLE, "<B", 2, "has mode 2 in row 0"),
    (TABLE + 1, "<H", 0, "has an image of 4 x 0 pixels in row 0"),
    (TABLE + 24 + 1, "<H", 6, r"has 30 bytes for the pixels of sample 1, which is 2 x 6 x 3"),
    (TABLE + 5, "<Q", 77, "points to byte 77 for sample 0, where the allocation table has no blob"),
    (TABLE + 5, "<Q", PAGE + len(FIRST) + 1, "for sample 0, where the allocation table has no blob of that sample"),
    (TABLE + 16, "<q", 2**40, "has label 1099511627776 in row 0"),
    (2 * PAGE, "<Q", 2, r"has the allocation \(sample, start, bytes\) = \(2, .* outside its 2 samples"),
    (2 * PAGE + 8, "<Q", 8, "outside its 2 samples or its data"),
    (2 * PAGE + 8, "<Q", 2**64 - 8, "outside its 2 samples or its data"),
    (2 * PAGE + 16, "<Q", PAGE, "outside its 2 samples or its data"),
    (2 * PAGE + 16, "<Q", 2**64 - 1, "outside its 2 samples or its data"),
    (2 * PAGE + 40, "<Q", len(FIRST) + 2, "has allocations that overlap"),
]


@pytest.mark.parametrize(("place", "code", "value", "said"), DAMAGE)
def test_damaged_tables_are_refused(tmp_path: Path, place: int, code: str, value: int, said: str) -> None:
    data = bytearray(by_hand())
    struct.pack_into(code, data, place, value)
    if (place, value) == (8, 3):
        said = "has an image of 0 x 0 pixels in row 2"
    with pytest.raises(DataError, match=said) as caught:
        BetonSource(put(tmp_path / "bad.beton", bytes(data)))
    assert str(caught.value).startswith(f"{tmp_path}/bad.beton ") and "; " in str(caught.value)


def test_a_blob_across_a_page_is_refused(tmp_path: Path) -> None:
    data = bytearray(by_hand()[: 2 * PAGE] + bytes(PAGE) + by_hand()[2 * PAGE :])
    struct.pack_into("<Q", data, 16, 3 * PAGE)
    struct.pack_into("<QQ", data, 3 * PAGE + 8, 2 * PAGE - 3, len(SECOND))
    struct.pack_into("<Q", data, TABLE + 24 + 5, 2 * PAGE - 3)
    with pytest.raises(DataError, match=f"across a page of {PAGE}; pack it again"):
        BetonSource(put(tmp_path / "x.beton", bytes(data)))


@pytest.mark.parametrize("size", [0, 1, 23, 24, 1000, TABLE + 30, PAGE, *(2 * PAGE + more for more in (0, 1, 24, 47))])
def test_a_truncated_file_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(DataError, match=r"x\.beton .*pack it again"):
        BetonSource(put(tmp_path / "x.beton", by_hand()[:size]))


def test_what_is_no_beton_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not a \.beton of version 2"):
        BetonSource(put(tmp_path / "x.beton", jpeg(640, 480, 3)))
    with pytest.raises(DataError, match=r"cannot be read: .*; name a "):
        BetonSource(tmp_path)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        BetonSource(tmp_path / "none.beton")


def test_which_field_is_which(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = bytearray(by_hand("bytes image float json label array tensor"))
    data[24 + 4 * 1041 + 1 :][:5] = b""
    struct.pack_into("<16s", data, 24 + 4 * 1041 + 1, b"y")  # the only integer is the label, whatever its name
    assert BetonSource(put(tmp_path / "a.beton", bytes(data))).labels.tolist() == [3, -1]
    struct.pack_into("<B16s", data, 24 + 5 * 1041, 1, b"z")  # two integers, none called label
    with caplog.at_level("INFO", "fastsimclr"):
        assert BetonSource(put(tmp_path / "b.beton", bytes(data))).labels.tolist() == [-1, -1]
    assert "2 could be: read as unlabelled" in caplog.text
