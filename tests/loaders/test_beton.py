"""The .beton format: read and written byte by byte against files built here by hand, and against FFCV itself."""

from __future__ import annotations

import io
import json
import pickle
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from PIL import Image

from fastsimclr.loaders.beton.reader import BetonSource
from fastsimclr.loaders.beton.sidecar import Sidecar, read_sidecar, sidecar_path, write_sidecar
from fastsimclr.loaders.beton.writer import MAX_PAGE, BetonWriter
from fastsimclr.loaders.data import DataConfig, open_data
from fastsimclr.loaders.decode import decode
from fastsimclr.loaders.source import DataError

PAGE = 2**21
PIXELS = bytes(range(2 * 5 * 3))


def jpeg(width: int, height: int, colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (colour, 90, 255 - colour)).save(file, "JPEG")
    return file.getvalue()


FIRST, SECOND = jpeg(7, 4, 10), PIXELS  # of sample 0, a JPEG; of sample 1, 2 x 5 pixels
# What stands in a row for each field of a sample, with the bytes that alignment leaves empty before it.
ORDERS = {
    "image label": (b"%I3x%L", 24),
    "label image": (b"%L%I3x", 24),
    "image": (b"%I", 13),
    "bytes image float json label array tensor": (b"%B%I3x%F%B%L%A%A", 16 + 16 + 8 + 16 + 8 + 8 + 8),
}
TYPES = {"float": 0, "label": 1, "image": 2, "bytes": 3, "array": 4, "json": 5, "tensor": 6}


def by_hand(fields: str = "image label", labels: tuple[int, int] = (3, -1)) -> bytes:
    """A file of two samples in one page, written as spec/loaders.md describes it, with nothing of fastsimclr."""
    names = fields.split()
    start = (PAGE, PAGE + len(FIRST) + 1)  # a byte of sample 0's other field lies between
    other = PAGE + len(FIRST)
    layout, size = ORDERS[fields]
    rows = b""
    for mode, width, height, blob, label in ((0, 7, 4, start[0], labels[0]), (1, 5, 2, start[1], labels[1])):
        row, rest = b"", layout
        while rest:
            kind, rest = rest[:2], rest[2:]
            row += {
                b"%I": struct.pack("<BHHQ", mode, width, height, blob),
                b"%L": struct.pack("<q", label),
                b"%F": struct.pack("<d", 0.5),
                b"%B": struct.pack("<QQ", other, 1),
                b"%A": struct.pack("<Q", other),
                b"3x": bytes(3),
            }[kind]
        assert len(row) == size
        rows += row
    described = b"".join(struct.pack("<B16s1024x", TYPES[name], name.encode()) for name in names)
    head = struct.pack("<HHIQQ", 2, len(names), PAGE, 2, 2 * PAGE) + described + rows
    data = FIRST + b"x" + SECOND
    table = struct.pack("<QQQ", 1, start[1], len(SECOND)) + struct.pack("<QQQ", 0, start[0], len(FIRST))
    if "bytes" in names:
        table += struct.pack("<QQQ", 0, other, 1) + struct.pack("<QQQ", 1, start[1], 0)  # one empty, at another's place
    return head.ljust(PAGE, b"\0") + data.ljust(PAGE, b"\0") + table


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


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


HEAD = "<HHIQQ"
TABLE = 24 + 2 * 1041
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
@examples(max_examples=300)
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
@examples(max_examples=60)
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


def test_which_field_is_which(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = bytearray(by_hand("bytes image float json label array tensor"))
    data[24 + 4 * 1041 + 1 :][:5] = b""
    struct.pack_into("<16s", data, 24 + 4 * 1041 + 1, b"y")  # the only integer is the label, whatever its name
    assert BetonSource(put(tmp_path / "a.beton", bytes(data))).labels.tolist() == [3, -1]
    struct.pack_into("<B16s", data, 24 + 5 * 1041, 1, b"z")  # two integers, none called label
    with caplog.at_level("INFO", "fastsimclr"):
        assert BetonSource(put(tmp_path / "b.beton", bytes(data))).labels.tolist() == [-1, -1]
    assert "2 could be: read as unlabelled" in caplog.text


def packed(path: Path, labels: list[int], names: list[str], classes: list[str]) -> Path:
    """A packed file of tiny images with a sidecar."""
    path.parent.mkdir(exist_ok=True)
    sidecar_path(path).unlink(missing_ok=True)
    blobs = [jpeg(6, 5, k) for k in range(len(labels))]
    writer = BetonWriter(path, len(labels), PAGE)
    for row, blob in enumerate(blobs):
        writer.add(row, blob, 5, 6, False)
    size = writer.finish(labels)
    writer.close()
    crcs = np.array([zlib.crc32(blob) for blob in blobs], dtype=np.uint32)
    facts = {"source": {"name": "", "fingerprint": ""}, "settings": {}, "stored": {}, "left_out": ()}
    card = Sidecar(images=len(labels), file_bytes=size, names=tuple(names), classes=tuple(classes), crc32=crcs, **facts)
    write_sidecar(sidecar_path(path), replace(card, fingerprint=BetonSource(path).fingerprint_with(card)))
    return path


def test_packed_files_as_the_data_of_a_run(tmp_path: Path) -> None:
    names = [f"{k}.jpg" for k in range(10)]
    one = packed(tmp_path / "one/train.beton", [0, 1] * 5, names, ["cat", "dog"])
    held = open_data(DataConfig(source="beton", root=str(one), val_fraction=0.2))
    assert (len(held.unlabelled), len(held.val), held.val.classes) == (8, 2, ("cat", "dog"))
    val = packed(tmp_path / "one/val.beton", [1, 1, 0], names[:3], ["bird", "dog"])
    with pytest.raises(DataError, match=r"val\.beton has classes that no training image has: bird"):
        open_data(DataConfig(source="beton", root=str(one.parent)))
    packed(val, [1, 1, 0], names[:3], ["dog", "cat"])
    both = open_data(DataConfig(source="beton", root=str(one.parent)))
    assert both.val.labels.tolist() == [0, 0, 1] and both.val.classes == ("cat", "dog")
    assert len(both.unlabelled) == 10 and both.train is both.unlabelled
    (tmp_path / "one/labels.csv").write_text("path,label\n3.jpg,owl\n4.jpg,dog\n")
    packed(val, [0, 1, 1], names[:3], ["dog", "owl"])
    few = open_data(DataConfig(source="beton", root=str(one.parent)))
    assert few.unlabelled.labels.tolist() == [-1, -1, -1, 1, 0, -1, -1, -1, -1, -1]
    assert few.train.classes == ("dog", "owl") and few.val.labels.tolist() == [0, 1, 1]
    (tmp_path / "v.csv").write_text("0.jpg,owl\n1.jpg,0\n2.jpg,1\n")
    listed = DataConfig(source="beton", root=str(one.parent), val=str(val), val_labels=str(tmp_path / "v.csv"))
    assert open_data(listed).val.labels.tolist() == [1, 0, 1]
    (tmp_path / "one/labels.csv").write_text("path,label\nnone.jpg,owl\n")
    with pytest.raises(DataError, match=r"labels.csv names none.jpg, not in .*train.beton"):
        open_data(DataConfig(source="beton", root=str(one.parent)))
    with pytest.raises(DataError, match=r"train.beton does not exist; pack into it: fastsimclr pack SRC"):
        open_data(DataConfig(source="beton", root=str(tmp_path)))
    with pytest.raises(ValueError, match=r"data\.source=beton needs data.root"):
        DataConfig(source="beton")


Exchange = tuple[Path, list[npt.NDArray[np.uint8]], list[bytes]]

FFCV = """
import sys, warnings
warnings.simplefilter("ignore")
import numpy as np
from ffcv.fields import BytesField, FloatField, IntField, JSONField, NDArrayField, RGBImageField
from ffcv.fields.decoders import IntDecoder
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.writer import DatasetWriter

folder = sys.argv[1]
images = np.load(folder + "/images.npz")
images = [images[key] for key in images.files]

class Data:
    def __len__(self):
        return len(images)
    def __getitem__(self, i):
        i = int(i)
        note, array = np.frombuffer(b"x" * (i % 3), np.uint8), np.full((3, 2), i, np.float32)
        return note, images[i], i / 2, {"a": i}, i % 7, array

fields = {
    "note": BytesField(), "picture": RGBImageField(write_mode="proportion", jpeg_quality=95), "x": FloatField(),
    "json": JSONField(), "label": IntField(), "array": NDArrayField(np.dtype("float32"), (3, 2)),
}
writer = DatasetWriter(folder + "/theirs.beton", fields, page_size=2**21, num_workers=2)
writer.from_indexed_dataset(Data(), chunksize=7)

pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
for cached in (True, False):
    loader = Loader(
        folder + "/ours.beton", batch_size=4, num_workers=1, order=OrderOption.SEQUENTIAL, drop_last=False,
        os_cache=cached, pipelines=pipelines,
    )
    read = [(np.array(x), np.array(y)) for x, y in loader]
    np.savez(f"{folder}/read-{cached}.npz", images=np.concatenate([x for x, _ in read]),
             labels=np.concatenate([y for _, y in read])[:, 0])
"""


@pytest.fixture(scope="module")
def both_ways(tmp_path_factory: pytest.TempPathFactory) -> Exchange:
    """A folder in which FFCV wrote three files of the images, and read a file of ours with the blobs."""
    folder = tmp_path_factory.mktemp("ffcv")
    random = np.random.default_rng(5)
    images = [random.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in random.integers(20, 300, (40, 2)).tolist()]
    np.savez(folder / "images.npz", *images)
    colours = random.integers(0, 256, (9, 6, 8, 3), dtype=np.uint8)
    plain = [np.kron(each, np.ones((8, 8, 1), np.uint8)) for each in colours]
    blobs, writer = [], BetonWriter(folder / "ours.beton", 9, PAGE)
    for row, pixels in enumerate(plain):
        file = io.BytesIO()
        picture = Image.fromarray(pixels)
        (picture.convert("L") if row == 4 else picture).save(file, "JPEG", quality=95)  # one is grey, one is raw
        blobs.append(pixels.tobytes() if row == 5 else file.getvalue())
        writer.add(row, blobs[row], 48, 64, row == 5)
    writer.finish([row % 4 - 1 for row in range(9)])
    writer.close()
    # Its own process: FFCV warns at import, compiles for seconds, and a test that fails must not leave its threads.
    run = subprocess.run([sys.executable, "-c", FFCV, str(folder)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return folder, images, blobs


@pytest.mark.needs("ffcv")
def test_ffcv_reads_what_we_write(both_ways: Exchange) -> None:
    folder, _, blobs = both_ways
    for cached in (True, False):
        read = np.load(folder / f"read-{cached}.npz")
        assert read["labels"].tolist() == [row % 4 - 1 for row in range(9)]
        for row, blob in enumerate(blobs):
            raw = row == 5
            # FFCV decodes with libjpeg-turbo too, and asks for its fast DCT; one level for another version of it.
            own = (
                np.frombuffer(blob, np.uint8).reshape(48, 64, 3) if raw else simplejpeg.decode_jpeg(blob, fastdct=True)
            )
            assert np.abs(own.astype(int) - read["images"][row]).max() <= (0 if raw else 1)


@pytest.mark.needs("ffcv")
def test_we_read_what_ffcv_writes(both_ways: Exchange) -> None:
    folder, images, _ = both_ways
    source = BetonSource(folder / "theirs.beton")
    assert source.labels.tolist() == [row % 7 for row in range(40)] and source.classes == tuple("0123456")
    assert source.pixel_sizes.tolist() == [list(pixels.shape[:2]) for pixels in images]
    assert 0 < source.raw.sum() < 40  # FFCV chose by chance: some are JPEG, some are not
    for row, pixels in enumerate(images):
        data = source.read(row)
        if isinstance(data, bytes):
            assert decode(data, "").shape == pixels.shape
            assert abs(decode(data, "").mean() - pixels.mean()) < 2
        else:
            np.testing.assert_array_equal(data, pixels)
