"""Subgroups of the validation images, as data.subgroup names them: a column beside their labels."""

from __future__ import annotations

from pathlib import Path

from fastsimclr.loaders.sets.lists import read_subgroups_csv, read_val_subgroups
from fastsimclr.loaders.source import DataError, Source

NO_SUBGROUP = "(none)"


def read_subgroups(
    val: Source, column: str, *, root: Path, labels: Path | None, val_labels: Path | None
) -> tuple[str, ...]:
    """The subgroup of each image of `val`, which lies in files: column `column` of `val_labels`, where that is given,
    else of `labels`, by default root/labels.csv.

    An image without a line, or with an empty cell, is of the group "(none)". DataError where there is no such file or
    column, or where no image has a subgroup.
    """
    names = [val.describe(i) for i in range(len(val))]
    path = val_labels or labels or root / "labels.csv"
    if val_labels is not None:
        found = read_val_subgroups(val_labels, names, column)
    elif path.is_file():
        rows = read_subgroups_csv(path, column)
        found = [rows.get(name, "") for name in names]
    else:
        raise DataError(
            f"data.subgroup={column}: {path} does not exist; name a CSV of path,label,{column} in data.labels"
        )
    if not any(found):
        raise DataError(
            f"data.subgroup={column}: {path} gives none of the {len(names)} validation images a subgroup;"
            " add lines for them, or leave data.subgroup out"
        )
    return tuple(text or NO_SUBGROUP for text in found)
