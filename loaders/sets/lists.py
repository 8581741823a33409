"""Text files that name images: labels.csv, ImageNet's validation labels, published lists of labelled images."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np

from fastsimclr.loaders.arrays import Ints
from fastsimclr.loaders.source import DataError

T = TypeVar("T")

# First words of a heading; "imageid" is Kaggle's LOC_val_solution.csv.
HEADINGS = {"imageid", "path", "file", "filename", "image", "name"}


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(where, text) of each line that is not blank; utf-8, with or without a mark."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}; give a UTF-8 file") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield f"{path}:{number}", line.strip()


def some(names: Sequence[str]) -> str:
    """The first three of many names and how many more there are, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_labels_csv(path: Path) -> dict[str, str]:
    """labels.csv as {absolute path of the image: label}; further columns are passed over.

    The header begins path,label; paths are relative to the file's folder.
    """
    return {image: cells[1] for image, cells in _labels_table(path)[1].items()}


def read_subgroups_csv(path: Path, column: str) -> dict[str, str]:
    """That column of labels.csv as {absolute path of the image: cell}; "" where a cell is empty."""
    header, rows = _labels_table(path)
    position = _position(column, header, path)
    return {image: cells[position] for image, cells in rows.items()}


def _labels_table(path: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The header of labels.csv, and {absolute path of the image: its cells}."""
    rows: dict[str, list[str]] = {}
    lines = list(_lines(path))
    table = [[cell.strip() for cell in row] for row in csv.reader(text for _, text in lines)]
    header = table[0] if table else []
    if [cell.lower() for cell in header[:2]] != ["path", "label"]:
        raise DataError(f"{path} must begin with the line path,label; it begins {lines[0][1] if lines else ''!r}")
    if len(table) != len(lines):
        raise DataError(f"{path} has a quoted cell that spans lines; write one image a line")
    for (where, text), cells in zip(lines[1:], table[1:], strict=True):
        if len(cells) != len(header) or not all(cells[:2]):
            raise DataError(f"{where}: {text!r} is not {','.join(header)}; write one image and its label a line")
        image = os.path.abspath(path.parent / cells[0])
        if image in rows:
            raise DataError(f"{where}: {cells[0]} is listed twice; leave one line for each image")
        rows[image] = cells
    return header, rows


def _position(column: str, header: Sequence[str], path: Path) -> int:
    if header.count(column) != 1:
        raise DataError(
            f"data.subgroup={column}: {path} has {header.count(column)} columns of that name, its header is"
            f" {','.join(header)}; name one column of it"
        )
    return header.index(column)


def read_val_labels(path: Path, names: Sequence[str], classes: Sequence[str]) -> Ints:
    """The label of each of `names`, int64 [n], from two columns: a file's name and its class.

    The columns are parted by a tab, a comma or a space. The class is a name or a position in `classes`, which are
    sorted; after a tab or comma, only the first cell or word of it counts where the whole is no class (Kaggle's
    LOC_val_solution.csv goes on with boxes). A name is matched without folder, with or without its extension.
    """
    index = {name: label for label, name in enumerate(classes)}
    rows: dict[str, int] = {}
    for number, (where, text) in enumerate(_lines(path)):
        mark = next((mark for mark in "\t," if mark in text), None)
        cells = [cell.strip() for cell in (text.split(mark, 1) if mark else text.rsplit(None, 1))]
        if number == 0 and cells[0].lower() in HEADINGS:
            continue
        if len(cells) != 2 or not all(cells):
            raise DataError(f"{where}: {text!r} is not a file's name and its class; write both, parted by a comma")
        cell = next(csv.reader([cells[1]], delimiter=mark or ","))[0].strip()
        known = (text for text in (cells[1], cell) if text in index)
        file, label = PurePosixPath(cells[0]).name, next(known, (cell.split() or [""])[0])
        if label not in index and not (label.isdecimal() and int(label) < len(classes)):
            raise DataError(f"{where}: {label!r} is no class; use a class name or 0..{len(classes) - 1}")
        if file in rows:
            raise DataError(f"{where}: {file} is listed twice; leave one line for each image")
        rows[file] = index[label] if label in index else int(label)
    return np.array(_of_each(names, rows, path), dtype=np.int64)


def read_val_subgroups(path: Path, names: Sequence[str], column: str) -> list[str]:
    """That column of the file of `read_val_labels`, which must have a heading then, for each of `names`; "" is none.

    All its columns are parted by a tab, or all by a comma.
    """
    lines = list(_lines(path))
    mark = "\t" if lines and "\t" in lines[0][1] else ","
    table = [[cell.strip() for cell in row] for row in csv.reader((text for _, text in lines), delimiter=mark)]
    header = table[0] if table and table[0][0].lower() in HEADINGS else []
    position = _position(column, header, path)
    rows = {PurePosixPath(row[0]).name: row[position] if position < len(row) else "" for row in table[1:]}
    return _of_each(names, rows, path)


def _of_each(names: Sequence[str], rows: dict[str, T], path: Path) -> list[T]:
    """The row of each name, found without its folder, with or without its extension. DataError unless one to one."""
    found, missing, used = [], [], set()
    for name in names:
        base = PurePosixPath(name)
        key = next((key for key in (base.name, base.stem) if key in rows), None)
        if key is None:
            missing.append(name)
        else:
            found.append(rows[key])
            used.add(key)
    if missing:
        raise DataError(f"{path} has no line for {some(missing)}; add {len(missing)} lines or remove the images")
    if unused := sorted(rows.keys() - used):
        raise DataError(f"{path} names {some(unused)}, not in the folder; remove {len(unused)} lines or add the images")
    return found


def read_label_list(path: Path, names: Sequence[str]) -> Ints:
    """The positions in `names` of the images listed in `path`, one a line; sorted int64 [k].

    A line is an image's name without folder, as in Google's 1percent.txt and 10percent.txt, or with as many of its
    folders as tell it from others of that name.
    """
    bases: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        bases.setdefault(name.rpartition("/")[2], []).append(i)
    chosen: dict[int, str] = {}
    unknown: list[tuple[str, str]] = []
    for where, text in _lines(path):
        found = bases.get(text.rpartition("/")[2], [])
        if len(found) > 1:
            found = [i for i in found if f"/{names[i]}".endswith(f"/{text}")] or found
        if len(found) > 1:
            raise DataError(f"{where}: {text} could be {some([names[i] for i in found])}; write its folder too")
        if found and found[0] in chosen:
            raise DataError(f"{where}: {text} is listed twice, first at {chosen[found[0]]}; leave one line for each")
        if found:
            chosen[found[0]] = where
        else:
            unknown.append((where, text))
    if unknown:
        where, absent = unknown[0][0], some([text for _, text in unknown])
        raise DataError(
            f"{where}: the list names {absent}, not among the labelled training images;"
            f" remove {len(unknown)} lines, or give the folder that it was made for"
        )
    if not chosen:
        raise DataError(f"{path} names no image; write one name a line")
    return np.array(sorted(chosen), dtype=np.int64)
