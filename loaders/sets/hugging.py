"""Images in a column of a Hugging Face data set: a folder that save_to_disk wrote, or a set that load_dataset knows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastsimclr.loaders.sets.lists import some
from fastsimclr.loaders.source import DataError, Source

_VAL = ("validation", "val", "valid", "test")


class HuggingSource(Source):
    """One split. rows: a datasets.Dataset whose image column is not decoded."""

    def __init__(self, name: str, rows: Any, column: str, labels: npt.ArrayLike, classes: Sequence[str]) -> None:
        self.name = name
        self.labels = np.array(labels, dtype=np.int64)
        self.classes = tuple(classes)
        self._rows = rows
        self._column = column

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> str:
        # datasets keeps a digest of the table and of all that was done to it.
        parts = (str(self._rows._fingerprint), self._column, "\0".join(self.classes))
        return hashlib.sha256("\0\0".join(parts).encode() + self.labels.tobytes()).hexdigest()

    def read(self, index: int) -> bytes:
        """The file, from the table or from where it points. Raises OSError; DataError where there is neither."""
        cell = self._rows[index][self._column]
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise DataError(f"{self.describe(index)} is empty")
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    def describe(self, index: int) -> str:
        return f"{self.name}[{index}]"


def open_hugging(where: str, column: str, label_column: str) -> dict[str, Source]:
    """{"train": ..., "val": ...} of the folder or the name `where`; "val" is its validation or test split, if any.

    Class names come from a ClassLabel column, else they are the sorted distinct texts or numbers. Raises DataError.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError("--column needs the package datasets; run: pip install 'fastsimclr[hugging]'") from error
    try:
        found: Any = datasets.load_from_disk(where) if Path(where).is_dir() else datasets.load_dataset(where)
    except Exception as error:  # a hub that cannot be reached, a folder of another kind, a damaged table: anything
        text = f"{type(error).__name__}: {error}"
        raise DataError(f"{where} is no data set that the package datasets opens ({text}); give one it does") from error
    splits = dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}
    train = next((key for key in ("train", *splits) if key in splits), None)
    if train is None:
        raise DataError(f"{where} has no split; give a data set with images")
    val = next((key for key in _VAL if key in splits and key != train), None)
    chosen = {"train": splits[train]} | ({} if val is None else {"val": splits[val]})
    classes = _classes(chosen, label_column)
    return {
        key: _source(f"{Path(where).name}:{key}", rows, column, label_column, classes, datasets)
        for key, rows in chosen.items()
    }


def _classes(splits: dict[str, Any], label_column: str) -> tuple[str, ...]:
    labelled = [rows for rows in splits.values() if label_column in rows.column_names]
    if not labelled:
        return ()
    names = getattr(labelled[0].features[label_column], "names", None)
    if names is not None:
        return tuple(names)
    values = {value for rows in labelled for value in rows.unique(label_column) if value is not None}
    try:
        return tuple(map(str, sorted(values)))
    except TypeError as error:
        raise DataError(
            f"--label_column {label_column} holds values of several kinds; name a column of classes"
        ) from error


def _source(
    name: str, rows: Any, column: str, label_column: str, classes: Sequence[str], datasets: Any
) -> HuggingSource:
    if column not in rows.column_names:
        raise DataError(f"{name} has no column {column}, but {some(rows.column_names)}; name one with --column")
    if not isinstance(rows.features[column], datasets.Image):
        raise DataError(f"{name}: the column {column} is {rows.features[column]}, not Image; name one with --column")
    labels = np.full(len(rows), -1, dtype=np.int64)
    if label_column in rows.column_names:
        index = {text: label for label, text in enumerate(classes)}
        coded = hasattr(rows.features[label_column], "names")
        cells = enumerate(rows[label_column][:])
        found = [(i, cell if coded else index[str(cell)]) for i, cell in cells if cell is not None]
        for i, label in found:
            labels[i] = label
    return HuggingSource(name, rows.cast_column(column, datasets.Image(decode=False)), column, labels, classes)
