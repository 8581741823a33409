"""Packed files as the data of a run: one .beton, or a folder with train.beton and val.beton."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastsimclr.loaders.beton.reader import BetonSource
from fastsimclr.loaders.sets.basic import Subset
from fastsimclr.loaders.sets.lists import read_labels_csv, read_val_labels, some
from fastsimclr.loaders.source import DataError, Source


def open_packed(root: Path, *, labels: Path | None, val: Path | None, val_labels: Path | None) -> tuple[Source, Source]:
    """(training images, validation images) of FILE.beton, or of a folder with train.beton and val.beton or test.beton.

    labels: a CSV of path,label whose paths are names in the training file, in place of its own labels; an image without
    a line has none. val: another file of validation images. val_labels: their labels, as for a flat folder. Labels of
    the two files are brought together by the names of the classes. Raises DataError.
    """
    folder = root.is_dir()
    train = root / "train.beton" if folder else root
    if not train.is_file():
        how = "pack into it: fastsimclr pack SRC" if folder else "name FILE.beton, or a folder with train.beton"
        raise DataError(f"{train} does not exist; {how}{f' {root}' if folder else ''}")
    own = [root / name for name in ("val.beton", "test.beton") if folder and (root / name).is_file()]
    val = val or next(iter(own), None)
    if labels is None and folder and (root / "labels.csv").is_file():
        labels = root / "labels.csv"
    training = BetonSource(train)
    if labels is not None:
        training = _labelled_by(training, labels)
    if val is None or not training.classes:  # without training labels there is nothing to test
        return training, Subset(training, ())
    validation = BetonSource(val)
    if val_labels is not None:
        names = _names(validation, val_labels)
        return training, validation.relabelled(read_val_labels(val_labels, names, training.classes), training.classes)
    if (validation.labels < 0).any():
        first = validation.describe(int(np.argmin(validation.labels)))
        raise DataError(f"{first} has no label; pack {val} with labels, or give them in data.val_labels")
    return training, _with_classes(validation, training.classes)


def _names(source: BetonSource, wanted_by: Path) -> Sequence[str]:
    if source.names is None:
        raise DataError(f"{wanted_by} names images, but {source.path} has no sidecar with names; pack it again")
    return source.names


def _labelled_by(source: BetonSource, path: Path) -> BetonSource:
    """`source` with the labels of a CSV; its classes are those of the CSV, sorted."""
    names = _names(source, path)
    folder = Path(os.path.abspath(path)).parent
    rows = {
        os.path.relpath(image, folder).replace(os.sep, "/"): label for image, label in read_labels_csv(path).items()
    }
    if strangers := sorted(rows.keys() - set(names)):
        raise DataError(f"{path} names {some(strangers)}, not in {source.path}; correct the paths")
    classes = sorted(set(rows.values()))
    index = {name: label for label, name in enumerate(classes)}
    return source.relabelled([index[rows[name]] if name in rows else -1 for name in names], classes)


def _with_classes(source: BetonSource, classes: Sequence[str]) -> BetonSource:
    """`source` with its labels as positions in `classes`."""
    if source.classes == tuple(classes):
        return source
    index = {name: label for label, name in enumerate(classes)}
    used = np.unique(source.labels).tolist()
    if unknown := [source.classes[label] for label in used if source.classes[label] not in index]:
        raise DataError(f"{source.path} has classes that no training image has: {some(unknown)}; leave them out")
    table = np.array([index.get(name, -1) for name in source.classes], dtype=np.int64)
    return source.relabelled(table[source.labels], classes)
