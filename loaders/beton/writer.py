"""Writes .beton files page by page, as FFCV's own loader expects them: the fields image and label.

A page is a power of two of bytes and begins at a multiple of it; a blob lies in one page. A blob that is larger raises
the page to the next power of two: what lies in small pages lies in the large ones too, so that what is written stays.
"""

# n rows of the table

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastsimclr.loaders.beton.tables import (
    ALLOCATION,
    FIELD,
    HEADER,
    IMAGE_FIELD,
    INT_FIELD,
    JPEG,
    MIN_PAGE,
    RAW,
    VERSION,
    row_type,
)
from fastsimclr.loaders.source import DataError

MAX_PAGE = 2**31  # its size must fit four bytes
FIELDS = ((IMAGE_FIELD, b"image"), (INT_FIELD, b"label"))
ROW = row_type([kind for kind, _ in FIELDS])
LONGEST_SIDE = 2**16 - 1


class BetonWriter:
    """A .beton of at most `images` images at `path`, which exists from the start and is valid after `finish`.

    Blobs are laid down as they arrive. `reached` is where the next page begins: all before it is in the file.
    written: uint64 rows (row, start, bytes) so far. To go on with a file, give the rows that lie before `reached`.
    Raises OSError where the disk does.
    """

    def __init__(
        self,
        path: Path,
        images: int,
        page_bytes: int,
        *,
        reached: int | None = None,
    ) -> None:
        if not MIN_PAGE <= page_bytes <= MAX_PAGE or page_bytes & (page_bytes - 1):
            raise ValueError(f"page_bytes={page_bytes} must be a power of two from {MIN_PAGE} to {MAX_PAGE}")
        self.path = path
        self.page_bytes = page_bytes
        self._images = images
        self._table = HEADER.itemsize + len(FIELDS) * FIELD.itemsize
        self.reached = _up(self._table + images * ROW.itemsize, page_bytes) if reached is None else reached
        self._page = bytearray()
        self._rows = np.zeros(images, dtype=ROW)
        self._allocations: list[tuple[int, int, int]] = []
        self._file = path.open("wb" if reached is None else "r+b", buffering=0)
        try:
            self._file.truncate(self.reached)
        except OSError:
            self._file.close()
            raise

    def restore(self, row: int, start: int, length: int, height: int, width: int, raw: bool) -> None:
        """Enter an image whose blob is in the file already."""
        self._rows["f0"][row] = (RAW if raw else JPEG, width, height, start)
        self._allocations.append((row, start, length))

    def add(self, row: int, blob: bytes, height: int, width: int, raw: bool) -> int:
        """Lay down the blob of image `row`, in any order of rows; returns the byte at which it will lie.

        DataError for a blob of more than 2 GiB or a side of more than 65,535 pixels, which the format cannot hold.
        """
        what = f"image {row} of {self.path.name}"
        if len(blob) > MAX_PAGE or max(height, width) > LONGEST_SIDE:
            raise DataError(
                f"{what} takes {len(blob)} bytes at {height} x {width} pixels, over the format's {MAX_PAGE} bytes or"
                f" {LONGEST_SIDE} pixels a side; shrink it or leave it out"
            )
        if len(self._page) + len(blob) > self.page_bytes:
            self.end_page()
            if len(blob) > self.page_bytes:
                self.page_bytes = 1 << (len(blob) - 1).bit_length()
                self.reached = _up(self.reached, self.page_bytes)
                self._file.truncate(self.reached)  # all before it is in the file
        start = self.reached + len(self._page)
        self._page += blob
        self.restore(row, start, len(blob), height, width, raw)
        return start

    def end_page(self) -> None:
        """Write the page begun, whole; nothing where it is empty."""
        if self._page:
            whole = memoryview(bytes(self._page).ljust(self.page_bytes, b"\0"))
            self._file.seek(self.reached)
            _write(self._file.fileno(), whole)
            self.reached += self.page_bytes
            self._page.clear()

    def sync(self) -> None:
        """Wait until the pages written are on the disk."""
        os.fsync(self._file.fileno())

    def finish(self, labels: npt.ArrayLike) -> int:
        """Write the tables and the header for the first len(labels) rows; returns the file's bytes.

        labels: int64 [n], -1 for none. ValueError where a row below n has no blob, or one above has.
        """
        whole = np.asarray(labels, dtype=np.int64)
        table = np.array(self._allocations, dtype=np.uint64).reshape(-1, 3)
        if not np.array_equal(np.sort(table[:, 0]), np.arange(len(whole), dtype=np.uint64)):
            raise ValueError(f"{len(table)} blobs for {len(whole)} labels: each row from 0 needs exactly one")
        self.end_page()
        self._rows["f1"][: len(whole)] = whole
        header = np.zeros(1, dtype=HEADER)
        header[0] = (VERSION, len(FIELDS), self.page_bytes, len(whole), _up(self.reached, self.page_bytes))
        fields = np.zeros(len(FIELDS), dtype=FIELD)
        fields["type"], fields["name"] = zip(*FIELDS, strict=True)
        tail = int(header["allocations"][0])
        self._file.truncate(tail)
        for place, data in (
            (tail, table.astype("<u8").tobytes()),
            (0, header.tobytes() + fields.tobytes() + self._rows[: len(whole)].tobytes()),
        ):
            self._file.seek(place)
            _write(self._file.fileno(), memoryview(data))
        self.sync()
        return tail + table.shape[0] * ALLOCATION.itemsize

    def close(self) -> None:
        """Close the file, finished or not."""
        self._file.close()


def _up(value: int, page: int) -> int:
    return -(-value // page) * page


def _write(number: int, data: memoryview) -> None:
    """All of `data`: a write may take a part of it, as where a disk is nearly full."""
    while data:
        data = data[os.write(number, data) :]
