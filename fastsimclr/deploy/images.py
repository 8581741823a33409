"""The images that a network is run over: all below a folder, or those of a list."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fastsimclr.loaders import DataError, FileSource
from fastsimclr.loaders.sets.folder import class_folders, list_images
from fastsimclr.loaders.sets.lists import read_labels_csv

_HEADING = "path,label"


def open_images(path: Path) -> FileSource:
    """The images of a folder or of a list, sorted by path; label -1 where none is known. Decodes nothing.

    A folder: every image below it, its labels those of its labels.csv, else the names of its sub-folders where no image
    lies beside them. A list: a text file with one path a line, relative to its own folder, or such a labels.csv (first
    line path,label). Raises DataError for no image, or a path that is listed twice.
    """
    path = Path(os.path.abspath(path))
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist; give a folder of images, or a text file with one path a line")
    return _list(path)


def _folder(root: Path) -> FileSource:
    names, sizes = list_images(root)
    labels: list[str | None] = [None] * len(names)
    if (root / "labels.csv").is_file():
        rows = read_labels_csv(root / "labels.csv")
        labels = [rows.get(os.path.abspath(root / name)) for name in names]
    elif class_folders(root):
        labels = [name.partition("/")[0] for name in names]
    return _source(root.name, root, names, sizes, labels)


def _list(path: Path) -> FileSource:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no list of images: {error}; give a UTF-8 file with one path a line") from error
    rows: dict[str, str | None] = {}
    if lines and lines[0].strip().lower() == _HEADING:
        for image, label in read_labels_csv(path).items():
            rows[_within(path.parent, image)] = label
    else:
        for number, line in enumerate(lines, 1):
            name = line.strip()
            if name in rows:
                raise DataError(f"{path}:{number}: {name} is listed twice; leave one line for each image")
            if name:
                rows[name] = None
    if not rows:
        raise DataError(f"{path} names no image; write one path a line")
    names = sorted(rows)
    return _source(path.name, path.parent, names, [0] * len(names), [rows[name] for name in names])


def _within(folder: Path, image: str) -> str:
    """`image` relative to `folder` where it lies below it."""
    path = Path(image)
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else image


def _source(
    name: str, root: Path, names: Sequence[str], sizes: Sequence[int], labels: Sequence[str | None]
) -> FileSource:
    classes = sorted({label for label in labels if label is not None})
    index = {label: i for i, label in enumerate(classes)}
    return FileSource(name, root, names, sizes, [-1 if label is None else index[label] for label in labels], classes)
