"""Image files on disk as sources: folders of classes, unlabelled folders with a labels.csv, ImageNet's flat val."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from fastsimclr.loaders.log import LOG
from fastsimclr.loaders.sets.basic import FileSource, Subset
from fastsimclr.loaders.sets.lists import read_labels_csv, read_val_labels, some
from fastsimclr.loaders.source import DataError, Source

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def list_images(root: Path, apart: Collection[Path] = ()) -> tuple[list[str], list[int]]:
    """(paths relative to `root`, sorted, with forward slashes; their bytes) of the images below `root`.

    Known by extension, in any case. Hidden files and folders, and the folders `apart`, are ignored; links are followed;
    other files are counted in one note. Raises DataError where there is no such folder or no image in it.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; name the folder that holds the images")
    found: list[tuple[str, int]] = []
    others: list[str] = []
    for folder, below, files in os.walk(root, onerror=_refuse, followlinks=True):
        within = os.path.relpath(folder, root).replace(os.sep, "/")
        prefix = "" if within == "." else within + "/"
        below[:] = [name for name in below if not name.startswith(".") and Path(folder, name) not in apart]
        for file in files:
            if file.startswith("."):
                continue
            if file.lower().endswith(EXTENSIONS):
                found.append((prefix + file, _bytes(os.path.join(folder, file))))
            else:
                others.append(prefix + file)
    if not found:
        raise DataError(f"{root} holds no image; put files there that end in {', '.join(EXTENSIONS)}")
    if others:
        LOG.info("%s: left out %d files that are not images: %s", root, len(others), some(sorted(others)))
    found.sort()
    return [name for name, _ in found], [size for _, size in found]


def _bytes(path: str) -> int:
    """The size of a file; 0 for a link that leads nowhere, which counts as a damaged image when it is read."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be listed: {error.strerror}; allow it or remove the folder") from error


def class_folders(root: Path, apart: Collection[Path] = ()) -> tuple[str, ...]:
    """The names of the class folders of `root`, sorted; () where images lie directly in it."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; name the folder that holds the images")
    entries = [entry for entry in os.scandir(root) if not entry.name.startswith(".")]
    if any(entry.name.lower().endswith(EXTENSIONS) and entry.is_file() for entry in entries):
        return ()
    return tuple(sorted(entry.name for entry in entries if entry.is_dir() and Path(entry.path) not in apart))


def open_class_folders(
    root: Path, classes: Sequence[str], known: Sequence[str], apart: Collection[Path] = ()
) -> FileSource:
    """The images of root/CLASS/ for each of `classes`, labelled by their position in `known`."""
    if unknown := sorted(set(classes) - set(known)):
        raise DataError(f"{root} has folders that are no class of the training images: {some(unknown)}; remove them")
    names, sizes = list_images(root, apart)
    index = {name: label for label, name in enumerate(known)}
    labels = [index[name.partition("/")[0]] for name in names]
    if empty := sorted(set(classes) - {known[label] for label in labels}):
        raise DataError(
            f"{root / empty[0]} is a class with no image ({len(empty)} such); add images or remove the folder"
        )
    return FileSource(root.name, root, names, sizes, labels, known)


def open_folder(root: Path, *, labels: Path | None, val: Path | None, val_labels: Path | None) -> tuple[Source, Source]:
    """(training images, validation images) of a folder; label -1 where an image has none.

    The training images lie in root/train where that exists, else in root. Their labels are those of `labels`, else of
    root/labels.csv where that exists, else the class folders; a folder with images directly in it has no labels.
    The validation images lie in `val`, else in root/val or root/test, in class folders or, with `val_labels` or lines
    of labels.csv, in any; with no such folder, or no training labels, the second source is empty. Raises DataError.
    """
    root = Path(os.path.abspath(root))
    train = root / "train" if (root / "train").is_dir() else root
    own = [root / name for name in ("val", "test") if (root / name).is_dir()]
    val = Path(os.path.abspath(val)) if val else next(iter(own), None)
    apart = [*own, val] if val else own
    if labels is None and (root / "labels.csv").is_file():
        labels = root / "labels.csv"
    rows = read_labels_csv(labels) if labels else {}
    train_classes = class_folders(train, apart)
    if labels is None:
        if train_classes:
            training = open_class_folders(train, train_classes, train_classes, apart)
        else:
            names, sizes = list_images(train, apart)
            training = FileSource(root.name, train, names, sizes, np.full(len(names), -1), ())
    else:
        training = _labelled_by(rows, train, sorted(set(rows.values())), apart)
    if val is None or not training.classes:  # without training labels there is nothing to test
        validation: Source = Subset(training, ())
    else:
        validation = _open_val(val, val_labels, rows, training.classes)
    if labels is not None:
        sources = (training, validation)
        listed = {source.describe(i) for source in sources for i in range(len(source))}
        strangers = sorted(rows.keys() - listed)
    if labels is not None and strangers:
        raise DataError(f"{labels} names {some(strangers)}, not among the images below {train}; correct the paths")
    return training, validation


def _open_val(val: Path, val_labels: Path | None, rows: dict[str, str], classes: Sequence[str]) -> FileSource:
    if val_labels is not None:
        names, sizes = list_images(val)
        return FileSource(val.name, val, names, sizes, read_val_labels(val_labels, names, classes), classes)
    if folders := class_folders(val):
        return open_class_folders(val, folders, classes)
    source = _labelled_by(rows, val, classes, ())
    if (source.labels < 0).any():
        first = source.describe(int(np.argmin(source.labels)))
        raise DataError(f"{first} has no label; sort {val} into class folders, or give its labels in data.val_labels")
    return source


def _labelled_by(rows: dict[str, str], root: Path, classes: Sequence[str], apart: Collection[Path]) -> FileSource:
    names, sizes = list_images(root, apart)
    index = {name: label for label, name in enumerate(classes)}
    found = [rows.get(os.path.abspath(root / name)) for name in names]
    return FileSource(root.name, root, names, sizes, [-1 if name is None else index[name] for name in found], classes)
