"""Tables written row by row: .npy, Parquet and CSV, each a valid file of the rows so far once it is closed."""

# N rows of a batch, C columns of numbers

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from fastsimclr.deploy.files import need

Rows = npt.NDArray[np.float32] | npt.NDArray[np.float16]
Dtype = Literal["float32", "float16"]

_NPY_HEADER = 128  # bytes: room for any number of rows, so that the count can be written last


class Sink(Protocol):
    """A table of embeddings: a path, a label (None: not known) and C numbers a row."""

    def write(self, paths: Sequence[str], labels: Sequence[str | None], rows_NC: Rows) -> None:
        """Append N rows."""
        ...

    def close(self) -> None:
        """Make the file valid for the rows written."""
        ...


class Csv:
    """A CSV file in UTF-8; a file name that is not UTF-8 keeps its bytes."""

    def __init__(self, path: Path, header: Sequence[str]) -> None:
        self._file = path.open("w", encoding="utf-8", errors="surrogateescape", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow(header)

    def rows(self, rows: Sequence[Sequence[str | None]]) -> None:
        """Append rows; None is an empty cell."""
        self._writer.writerows(rows)

    def close(self) -> None:
        self._file.close()


class Npy:
    """An .npy array [rows, C], and beside it a CSV of path,label with the same rows. Implements `Sink`."""

    def __init__(self, path: Path, table: Path, columns: int, dtype: Dtype) -> None:
        self._columns, self._dtype, self._rows = columns, np.dtype(dtype), 0
        self._table = Csv(table, ("path", "label"))
        self._file = path.open("wb")
        self._head()

    def _head(self) -> None:
        """The array's header for the rows so far (format 1.0 of numpy.lib.format), padded to its fixed length."""
        shape = (self._rows, self._columns)
        text = f"{{'descr': {self._dtype.str!r}, 'fortran_order': False, 'shape': {shape}, }}"
        magic = b"\x93NUMPY\x01\x00" + (_NPY_HEADER - 10).to_bytes(2, "little")
        self._file.seek(0)
        self._file.write(magic + text.ljust(_NPY_HEADER - 11).encode() + b"\n")

    def write(self, paths: Sequence[str], labels: Sequence[str | None], rows_NC: Rows) -> None:
        """Append N rows."""
        self._file.write(np.ascontiguousarray(rows_NC, dtype=self._dtype).tobytes())
        self._table.rows(list(zip(paths, labels, strict=True)))
        self._rows += len(rows_NC)

    def close(self) -> None:
        """Write the count into the header."""
        self._head()
        self._file.close()
        self._table.close()


class Parquet:
    """A Parquet file of path, label, embedding (list of C numbers), one row group a batch. Implements `Sink`."""

    def __init__(self, path: Path, columns: int, dtype: Dtype) -> None:
        need("a Parquet file", "parquet", "pyarrow")
        import pyarrow
        import pyarrow.parquet

        self._arrow: Any = pyarrow
        number = pyarrow.float16() if dtype == "float16" else pyarrow.float32()
        self._embedding = pyarrow.list_(number, columns)
        fields = [("path", pyarrow.string()), ("label", pyarrow.string()), ("embedding", self._embedding)]
        self._schema = pyarrow.schema(fields)
        self._writer = pyarrow.parquet.ParquetWriter(path, self._schema)

    def write(self, paths: Sequence[str], labels: Sequence[str | None], rows_NC: Rows) -> None:
        """Append N rows."""
        flat = self._arrow.array(np.ascontiguousarray(rows_NC).reshape(-1), self._embedding.value_type)
        embedding = self._arrow.FixedSizeListArray.from_arrays(flat, type=self._embedding)
        texts = [path.encode(errors="surrogateescape").decode(errors="replace") for path in paths]  # Parquet is UTF-8
        columns = [self._arrow.array(texts), self._arrow.array(labels, self._arrow.string()), embedding]
        self._writer.write_table(self._arrow.Table.from_arrays(columns, schema=self._schema))

    def close(self) -> None:
        """Write the footer."""
        self._writer.close()
