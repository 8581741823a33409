"""FFCV's .beton files read without FFCV: all tables are checked when a file is opened, each image at its first read."""

# n samples

from __future__ import annotations

import copy
import mmap
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fastsimclr.loaders.arrays import Ints, Pixels
from fastsimclr.loaders.beton.sidecar import Sidecar, read_sidecar, sidecar_path
from fastsimclr.loaders.beton.tables import REMEDY, read_tables
from fastsimclr.loaders.scratch import Scratch
from fastsimclr.loaders.sets.lists import some
from fastsimclr.loaders.source import DataError, Source, digest
from fastsimclr.loaders.turbo import Spans

_FILE = Scratch()


class _Handle:
    """A file opened for reading, shared by a source and its relabelled copies, closed with the last of them."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class BetonSource(Source):
    """The images of a .beton file. Copies, threads and ranks share the page cache, not memory.

    Names, class names and checksums come from the sidecar, FILE.beton.json, where there is one. Without it (FFCV's own
    files) the classes are "0", "1", ... and an image is called FILE[12]. A label below 0 is none.
    pixel_sizes: int32 [n, 2], height and width. lengths: int64 [n], bytes stored. raw: bool [n], decoded pixels.
    verified: there are checksums; each was of an image that decodes, and an image's first read is held against its own.
    blocks: int64 [pages + 1], the bounds of the ids in each page, where they lie in the order of the ids; else None.
    Raises DataError for a file that is not a whole and consistent .beton, and for a sidecar of another file.
    """

    pixel_sizes: npt.NDArray[np.int32]

    def __init__(self, path: Path, sidecar: Path | None = None) -> None:
        self.path = Path(path)
        self.name = self.path.name
        self._open()
        tables = read_tables(self._map, self.path)
        self.page_bytes, self._end, self._tail = tables.page_bytes, tables.end, tables.tail
        self.raw, self.pixel_sizes = tables.raw, tables.pixel_sizes
        self.starts, self.lengths, self.labels = tables.starts, tables.lengths, tables.labels
        self._finish(sidecar_path(self.path) if sidecar is None else sidecar)
        self.verified = self.sidecar is not None
        self._crc32 = np.empty(0, np.uint32) if self.sidecar is None else self.sidecar.crc32
        self._unchecked = np.ones(len(self), dtype=bool) if self.verified else None
        self.blocks = self._pages()
        self._expected: set[int] = set()
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
        data = self.borrow(index)
        return data if isinstance(data, np.ndarray) else bytes(data)

    def borrow(self, index: int) -> memoryview | Pixels:
        """`read`, but a JPEG lies in memory of this thread's own, which its next call overwrites."""
        start, length = int(self.starts[index]), int(self.lengths[index])
        if self.raw[index]:
            height, width = self.pixel_sizes[index].tolist()
            pixels = self._map[start : start + length].reshape(height, width, 3)
            self._check(index, pixels.data)
            return pixels
        data = _FILE.take(length).data
        try:
            found = os.preadv(self._handle.number, [data], start)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.describe(index)) from error
        if found < length:
            raise OSError(f"{self.describe(index)}: {self.path} ended after {found} of {length} bytes; {REMEDY}")
        self._check(index, data)
        return data

    def spans(self, ids: npt.ArrayLike) -> Spans | None:
        """Where the JPEGs `ids` lie, but for those whose checksum is still to be checked; None where none is left."""
        index = np.asarray(ids, dtype=np.int64)
        alone = self.raw[index] if self._unchecked is None else self.raw[index] | self._unchecked[index]
        if alone.all():
            return None
        return Spans(
            file=self._handle.number, starts=self.starts[index], lengths=np.where(alone, 0, self.lengths[index])
        )

    def mapped(self, ids: npt.ArrayLike) -> tuple[Pixels, Ints] | None:
        """The mapped file, uint8, flat, and where in it pixels `ids` begin; None unless all lie decoded and checked."""
        index = np.asarray(ids, dtype=np.int64)
        if not self.raw[index].all() or (self._unchecked is not None and self._unchecked[index].any()):
            return None
        return self._map, self.starts[index]

    def expect(self, ids: npt.ArrayLike) -> None:
        """Have the system read ahead the pages of images `ids`, which in a quasi-random order come next as a whole."""
        pages = set((self.starts[np.asarray(ids, dtype=np.int64)] // self.page_bytes).tolist())
        for page in sorted(pages - self._expected) if hasattr(os, "posix_fadvise") else ():
            os.posix_fadvise(self._handle.number, page * self.page_bytes, self.page_bytes, os.POSIX_FADV_WILLNEED)
        self._expected = pages

    def _check(self, index: int, data: bytes | memoryview) -> None:
        if self._unchecked is not None and self._unchecked[index]:
            if (crc := zlib.crc32(data)) != (expected := int(self._crc32[index])):
                raise DataError(
                    f"{self.describe(index)} is damaged: its CRC-32 is {crc:08x}, not {expected:08x}; {REMEDY}"
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
        other.fingerprint = digest(self.fingerprint.encode(), "\0".join(classes).encode(), other.labels.tobytes())
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

    def _open(self) -> None:
        try:
            self._handle = _Handle(self.path)
            empty = not os.fstat(self._handle.number).st_size  # which cannot be mapped
            whole = b"" if empty else mmap.mmap(self._handle.number, 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}; name a .beton file") from error
        self._map: Pixels = np.frombuffer(whole, dtype=np.uint8)

    def _pages(self) -> Ints | None:
        pages = self.starts // self.page_bytes
        if not (np.diff(self.starts) > 0).all():
            return None
        return np.concatenate([[0], np.flatnonzero(np.diff(pages)) + 1, [len(self)]]).astype(np.int64)

    def _finish(self, path: Path) -> None:
        """Names and classes, from the sidecar where there is one, and the fingerprint, which it must agree with."""
        self.sidecar: Sidecar | None = read_sidecar(path) if path.is_file() else None
        self.classes: tuple[str, ...]
        self.names: tuple[str, ...] | None
        if self.sidecar is None:
            self.classes, self.names = tuple(map(str, range(int(self.labels.max(initial=-1)) + 1))), None
            self.fingerprint = digest(self._tables())
            return
        card, remedy = self.sidecar, "put the file and its own sidecar together, or pack again"
        if (card.images, card.file_bytes) != (len(self), len(self._map)):
            raise DataError(
                f"{path} belongs to another file than {self.path}: it tells of {card.images} images in"
                f" {card.file_bytes} bytes, not of {len(self)} in {len(self._map)}; {remedy}"
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
        return digest(self._tables(), card.digest())
