"""The tables of a .beton file, version 2, as FFCV writes them: read and checked, every pointer of them.

header | descriptors of the fields | one row a sample | data in pages | allocation table. libffcv/ffcv 1.0.2, types.py.
"""

# n samples, R rows of the allocation table

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastsimclr.loaders.arrays import Ints, Pixels
from fastsimclr.loaders.log import LOG
from fastsimclr.loaders.source import DataError

VERSION = 2
HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page_bytes", "<u4"), ("samples", "<u8"), ("allocations", "<u8")]
)
FIELD = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "V1024")])
ALLOCATION = np.dtype([("sample", "<u8"), ("start", "<u8"), ("bytes", "<u8")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("start", "<u8")])
JPEG, RAW = 0, 1  # IMAGE's modes
FLOAT_FIELD, INT_FIELD, IMAGE_FIELD = 0, 1, 2
MIN_PAGE = 2**21

_SPAN = np.dtype([("start", "<u8"), ("bytes", "<u8")])
_COLUMNS = {FLOAT_FIELD: "<f8", INT_FIELD: "<i8", IMAGE_FIELD: IMAGE, 3: _SPAN, 4: "<u8", 5: _SPAN, 6: "<u8"}
_MOST_CLASSES = 2**20  # a label above is damage, or no label
REMEDY = "pack it again, or copy it again from where it is whole"


def row_type(types: Sequence[int]) -> np.dtype[Any]:
    """One sample's row in the metadata table: a column f0, f1, ... for each field, aligned as a C struct."""
    return np.dtype([(f"f{i}", _COLUMNS[kind]) for i, kind in enumerate(types)], align=True)


@dataclass(frozen=True, kw_only=True)
class Tables:
    """What a file says of its n samples.

    page_bytes: of a page. end, tail: the byte behind the rows and that of the allocation table; the data lie between.
    raw: bool [n], decoded pixels. pixel_sizes: int32 [n, 2], height and width. starts, lengths: int64 [n], the bytes of
    each blob. labels: int64 [n], -1 for none.
    """

    page_bytes: int
    end: int
    tail: int
    raw: npt.NDArray[np.bool_]
    pixel_sizes: npt.NDArray[np.int32]
    starts: Ints
    lengths: Ints
    labels: Ints


def read_tables(file: Pixels, path: Path) -> Tables:
    """The tables of `file`, the whole of it as uint8 [bytes]. DataError, naming `path`, where they are not sound."""
    return _Parsing(file, path).tables()


class _Parsing:
    """One file on its way to `Tables`."""

    def __init__(self, file: Pixels, path: Path) -> None:
        self._map, self.path = file, path

    def tables(self) -> Tables:
        types, names = self._fields(self._header())
        rows = self._rows(types)
        image = rows[f"f{self._image_field(types, names)}"]
        self.raw: npt.NDArray[np.bool_] = image["mode"] == RAW
        self.pixel_sizes: npt.NDArray[np.int32] = np.stack([image["height"], image["width"]], axis=1).astype(np.int32)
        self._check_images(image["mode"])
        starts, lengths = self._blobs(image["start"])
        label = _label_field(types, names)
        return Tables(
            page_bytes=self.page_bytes,
            end=self._end,
            tail=self._tail,
            raw=self.raw,
            pixel_sizes=self.pixel_sizes,
            starts=starts,
            lengths=lengths,
            labels=self._labels(None if label is None else rows[f"f{label}"]),
        )

    def _refuse(self, text: str, remedy: str = REMEDY) -> DataError:
        return DataError(f"{self.path} {text}; {remedy}")

    def _header(self) -> np.void:
        if len(self._map) < HEADER.itemsize:
            raise self._refuse(f"has {len(self._map)} bytes, fewer than the {HEADER.itemsize} of a .beton header")
        header: np.void = self._map[: HEADER.itemsize].view(HEADER)[0]
        self.page_bytes, self._n, self._tail = (int(header[key]) for key in ("page_bytes", "samples", "allocations"))
        size, page = len(self._map), self.page_bytes
        if header["version"] != VERSION:
            raise self._refuse(f"is not a .beton of version {VERSION}: its first two bytes say {header['version']}")
        if page < MIN_PAGE or page & (page - 1):
            raise self._refuse(f"has page_size={page} in its header, which must be a power of two from {MIN_PAGE}")
        if not header["fields"] or not self._n:
            raise self._refuse(f"has {header['fields']} fields and {self._n} samples in its header; both must be 1 up")
        if self._tail >= size or (size - self._tail) % ALLOCATION.itemsize:
            raise self._refuse(
                f"has {size} bytes and its allocation table at {self._tail}: the rest must be whole rows of"
                f" {ALLOCATION.itemsize} bytes, at least one"
            )
        return header

    def _fields(self, header: np.void) -> tuple[list[int], list[str]]:
        self._table = HEADER.itemsize + int(header["fields"]) * FIELD.itemsize
        if self._table > self._tail:
            raise self._refuse(f"has {header['fields']} fields in its header, more than fit before its tables")
        fields = self._map[HEADER.itemsize : self._table].view(FIELD)
        types: list[int] = fields["type"].tolist()
        for kind, name in zip(types, fields["name"].tolist(), strict=True):
            if kind not in _COLUMNS:
                text = f"has the field {name!r} of type {kind}, which says nothing of its size"
                raise self._refuse(f"{text} (known: {sorted(_COLUMNS)})", "write it without custom fields")
        return types, [name.decode("ascii", "replace") for name in fields["name"].tolist()]

    def _image_field(self, types: Sequence[int], names: Sequence[str]) -> int:
        images = [i for i, kind in enumerate(types) if kind == IMAGE_FIELD]
        chosen = [i for i in images if names[i] == "image"] or images
        if len(chosen) != 1:
            text = f"has {len(images)} image fields among {', '.join(names)}"
            raise self._refuse(text, "write it with one, or call one of them image")
        return chosen[0]

    def _rows(self, types: Sequence[int]) -> npt.NDArray[np.void]:
        kind = row_type(types)
        self._end = self._table + self._n * kind.itemsize
        if self._end > self._tail:
            raise self._refuse(f"has {self._n} samples in its header, more than fit before byte {self._tail}")
        return self._map[self._table : self._end].view(kind)

    def _check_images(self, modes: npt.NDArray[np.uint8]) -> None:
        if len(wrong := np.flatnonzero(modes > RAW)):
            raise self._refuse(f"has mode {modes[wrong[0]]} in row {wrong[0]}: 0 (JPEG) or 1 (pixels) must stand there")
        if len(wrong := np.flatnonzero(self.pixel_sizes.min(axis=1) < 1)):
            height, width = self.pixel_sizes[wrong[0]].tolist()
            raise self._refuse(f"has an image of {height} x {width} pixels in row {wrong[0]}; both must be 1 or more")

    def _blobs(self, starts: npt.NDArray[np.uint64]) -> tuple[Ints, Ints]:
        """Where each image's blob lies and its bytes, int64 [n] each, from the allocation table."""
        table = self._map[self._tail :].view(ALLOCATION)
        table = table[table["bytes"] > 0]  # FFCV gives an empty field a place, which is that of what follows
        samples, begins, lengths = table["sample"], table["start"], table["bytes"]
        # In this order, so that no sum of two numbers overflows.
        inside = (samples < self._n) & (begins >= self._end) & (begins < self._tail) & (lengths <= self._tail)
        if len(wrong := np.flatnonzero(~inside | (begins + lengths > self._tail))):
            row = table[wrong[0]].tolist()
            raise self._refuse(
                f"has the allocation (sample, start, bytes) = {row}, outside its {self._n} samples or its data from"
                f" byte {self._end} to {self._tail}"
            )
        bits = np.uint64(self.page_bytes.bit_length() - 1)
        if len(wrong := np.flatnonzero(begins >> bits != (begins + lengths - np.uint64(1)) >> bits)):
            raise self._refuse(f"has the allocation {table[wrong[0]].tolist()} across a page of {self.page_bytes}")
        if len(begins) > 1 and not (begins[:-1] < begins[1:]).all():
            table = table[np.argsort(begins, kind="stable")]
            samples, begins, lengths = table["sample"], table["start"], table["bytes"]
        if len(wrong := np.flatnonzero(begins[:-1] + lengths[:-1] > begins[1:])):
            two = f"{table[wrong[0]].tolist()} and {table[wrong[0] + 1].tolist()}"
            raise self._refuse(f"has allocations that overlap: {two}")
        if not len(table):
            raise self._refuse("has no blob in its allocation table")
        at = np.minimum(np.searchsorted(begins, starts), len(table) - 1)
        missing = (begins[at] != starts) | (samples[at] != np.arange(self._n, dtype=np.uint64))
        if len(wrong := np.flatnonzero(missing)):
            text = f"points to byte {starts[wrong[0]]} for sample {wrong[0]}, where the allocation table has no blob"
            raise self._refuse(f"{text} of that sample")
        held = lengths[at].astype(np.int64)
        pixels = 3 * self.pixel_sizes[:, 0].astype(np.int64) * self.pixel_sizes[:, 1]
        if len(wrong := np.flatnonzero(self.raw & (held != pixels))):
            text = f"has {held[wrong[0]]} bytes for the pixels of sample {wrong[0]}, which is"
            raise self._refuse(f"{text} {' x '.join(map(str, self.pixel_sizes[wrong[0]].tolist()))} x 3")
        return starts.astype(np.int64), held

    def _labels(self, column: npt.NDArray[np.int64] | None) -> Ints:
        if column is None:
            return np.full(self._n, -1, dtype=np.int64)
        if len(wrong := np.flatnonzero(column >= _MOST_CLASSES)):
            text = f"has label {column[wrong[0]]} in row {wrong[0]}; labels count from 0, below {_MOST_CLASSES}"
            raise self._refuse(text)
        return np.maximum(column, -1).astype(np.int64)


def _label_field(types: Sequence[int], names: Sequence[str]) -> int | None:
    """The integer field called label, else the only integer field; None where there is none or no telling."""
    whole = [i for i, kind in enumerate(types) if kind == INT_FIELD]
    chosen = [i for i in whole if names[i] == "label"] or whole
    if len(chosen) > 1:
        LOG.info("of the fields %s none is called label, and %d could be: read as unlabelled", names, len(chosen))
    return chosen[0] if len(chosen) == 1 else None
