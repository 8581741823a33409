"""FFCV's .beton files, version 2, read without FFCV: every table is checked when the file is opened.

header | descriptors of the fields | one row a sample | data in pages | allocation table. libffcv/ffcv 1.0.2, types.py.
"""

# n samples, R rows of the allocation table

from __future__ import annotations

import copy
import hashlib
import logging
import mmap
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fastsimclr.loaders.beton.sidecar import Sidecar, read_sidecar, sidecar_path
from fastsimclr.loaders.sets.lists import some
from fastsimclr.loaders.source import DataError

Ints = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]

LOG = logging.getLogger("fastsimclr")
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
_REMEDY = "pack it again, or copy it again from where it is whole"


def row_type(types: Sequence[int]) -> np.dtype[Any]:
    """One sample's row in the metadata table: a column f0, f1, ... for each field, aligned as a C struct."""
    return np.dtype([(f"f{i}", _COLUMNS[kind]) for i, kind in enumerate(types)], align=True)


class _Handle:
    """A file opened for reading, shared by a source and its relabelled copies, closed with the last of them."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class BetonSource:
    """The images of a .beton file. Implements `Source`; copies, threads and ranks share the page cache, not memory.

    Names, class names and checksums come from the sidecar, FILE.beton.json, where there is one. Without it (FFCV's own
    files) the classes are "0", "1", ... and an image is called FILE[12]. A label below 0 is none.
    pixel_sizes: int32 [n, 2], height and width. lengths: int64 [n], bytes stored. raw: bool [n], decoded pixels.
    verified: there are checksums; each was of an image that decodes, and an image's first read is held against its own.
    blocks: int64 [pages + 1], the bounds of the ids in each page, where they lie in the order of the ids; else None.
    Raises DataError for a file that is not a whole and consistent .beton, and for a sidecar of another file.
    """

    def __init__(self, path: Path, sidecar: Path | None = None) -> None:
        self.path = Path(path)
        self.name = self.path.name
        self._open()
        types, names = self._fields(self._header())
        rows = self._rows(types)
        image = rows[f"f{self._image_field(types, names)}"]
        self.raw: npt.NDArray[np.bool_] = image["mode"] == RAW
        self.pixel_sizes: npt.NDArray[np.int32] = np.stack([image["height"], image["width"]], axis=1).astype(np.int32)
        self._check_images(image["mode"])
        self.starts, self.lengths = self._blobs(image["start"])
        label = _label_field(types, names)
        self.labels = self._labels(None if label is None else rows[f"f{label}"])
        self._finish(sidecar_path(self.path) if sidecar is None else sidecar)
        self.verified = self.sidecar is not None
        self._crc32 = np.empty(0, np.uint32) if self.sidecar is None else self.sidecar.crc32
        self._unchecked = np.ones(self._n, dtype=bool) if self.verified else None
        self.blocks = self._pages()
        for array in (self.raw, self.pixel_sizes, self.starts, self.lengths, self.labels):
            array.setflags(write=False)

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, index: int) -> bytes | Pixels:
        """The JPEG file, or a uint8 [H, W, 3] view of the mapped file where it holds decoded pixels.

        Raises OSError, and DataError for a wrong checksum.

        A JPEG is read, not mapped: that releases the interpreter's lock while the disk works, and a disk that fails
        or a file cut off meanwhile is an error with a name, where a map would end the process.
        """
        start, length = int(self.starts[index]), int(self.lengths[index])
        if self.raw[index]:
            height, width = self.pixel_sizes[index].tolist()
            pixels = self._map[start : start + length].reshape(height, width, 3)
            self._check(index, pixels.data)
            return pixels
        data = os.pread(self._handle.number, length, start)
        if len(data) < length:
            raise OSError(f"{self.describe(index)}: {self.path} ended after {len(data)} of {length} bytes; {_REMEDY}")
        self._check(index, data)
        return data

    def _check(self, index: int, data: bytes | memoryview) -> None:
        if self._unchecked is not None and self._unchecked[index]:
            if (crc := zlib.crc32(data)) != (expected := int(self._crc32[index])):
                raise DataError(
                    f"{self.describe(index)} is damaged: its CRC-32 is {crc:08x}, not {expected:08x}; {_REMEDY}"
                )
            self._unchecked[index] = False

    def describe(self, index: int) -> str:
        return f"{self.path}/{self.names[index]}" if self.names is not None else f"{self.path}[{index}]"

    def relabelled(self, labels: npt.ArrayLike, classes: Sequence[str]) -> BetonSource:
        """The same images with other labels, int64 [n], and class names."""
        other = copy.copy(self)
        other.labels = np.array(labels, dtype=np.int64)
        other.labels.setflags(write=False)
        other.classes = tuple(classes)
        other.fingerprint = _digest(self.fingerprint.encode(), "\0".join(classes).encode(), other.labels.tobytes())
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_map", "_handle")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __copy__(self) -> Self:
        other = self.__class__.__new__(self.__class__)
        other.__dict__.update(self.__dict__)
        return other

    def _refuse(self, text: str, remedy: str = _REMEDY) -> DataError:
        return DataError(f"{self.path} {text}; {remedy}")

    def _open(self) -> None:
        try:
            self._handle = _Handle(self.path)
            size = os.fstat(self._handle.number).st_size
            if size < HEADER.itemsize:
                raise self._refuse(f"has {size} bytes, fewer than the {HEADER.itemsize} of a .beton header")
            whole = mmap.mmap(self._handle.number, 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}; name a .beton file") from error
        self._map: Pixels = np.frombuffer(whole, dtype=np.uint8)

    def _header(self) -> np.void:
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

    def _pages(self) -> Ints | None:
        pages = self.starts // self.page_bytes
        if not (np.diff(self.starts) > 0).all():
            return None
        return np.concatenate([[0], np.flatnonzero(np.diff(pages)) + 1, [self._n]]).astype(np.int64)

    def _finish(self, path: Path) -> None:
        """Names and classes, from the sidecar where there is one, and the fingerprint, which it must agree with."""
        self.sidecar: Sidecar | None = read_sidecar(path) if path.is_file() else None
        self.classes: tuple[str, ...]
        self.names: tuple[str, ...] | None
        if self.sidecar is None:
            self.classes, self.names = tuple(map(str, range(int(self.labels.max(initial=-1)) + 1))), None
            self.fingerprint = _digest(self._tables())
            return
        card, remedy = self.sidecar, "put the file and its own sidecar together, or pack again"
        if (card.images, card.file_bytes) != (self._n, len(self._map)):
            raise DataError(
                f"{path} belongs to another file than {self.path}: it tells of {card.images} images in"
                f" {card.file_bytes} bytes, not of {self._n} in {len(self._map)}; {remedy}"
            )
        if self.labels.max(initial=-1) >= len(card.classes):
            first = some([str(label) for label in self.labels[self.labels >= len(card.classes)].tolist()])
            raise DataError(f"{path} names {len(card.classes)} classes, but {self.path} has label {first}; {remedy}")
        self.classes, self.names = card.classes, card.names
        self.fingerprint = self.fingerprint_with(card)
        if card.fingerprint != self.fingerprint:
            raise DataError(f"{path} and {self.path} do not agree: one of them was changed or damaged; {remedy}")

    def _tables(self) -> bytes:
        return self._map[: self._end].tobytes() + self._map[self._tail :].tobytes()

    def fingerprint_with(self, card: Sidecar) -> str:
        """Digest of this file's tables and of the lists in `card`: what a sidecar's own fingerprint must be."""
        return _digest(self._tables(), card.digest())


def _label_field(types: Sequence[int], names: Sequence[str]) -> int | None:
    """The integer field called label, else the only integer field; None where there is none or no telling."""
    whole = [i for i, kind in enumerate(types) if kind == INT_FIELD]
    chosen = [i for i in whole if names[i] == "label"] or whole
    if len(chosen) > 1:
        LOG.info("of the fields %s none is called label, and %d could be: read as unlabelled", names, len(chosen))
    return chosen[0] if len(chosen) == 1 else None


def _digest(*parts: bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()
