"""What can be packed: a folder, a list of files, a ready-made set, WebDataset shards, Hugging Face data, a .beton."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fastsimclr.loaders.beton.reader import BetonSource
from fastsimclr.loaders.sets.basic import ArraySource, FileSource, Subset, digits, torchvision_set
from fastsimclr.loaders.sets.folder import open_folder
from fastsimclr.loaders.sets.hugging import open_hugging
from fastsimclr.loaders.sets.lists import read_labels_csv
from fastsimclr.loaders.shards.cache import ShardCache, default_cache
from fastsimclr.loaders.shards.source import open_shards
from fastsimclr.loaders.source import DataError, Source

SETS = ("cifar10", "cifar100", "stl10")
_HEADING = "path,label"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the images come from. src: see `open_origin`. The rest is for the kinds of source that use it."""

    src: str
    root: str = "data"
    """Folder of the archives of cifar10, cifar100 and stl10."""
    download: bool = False
    """Fetch such a set where its archive is missing."""
    labels: str | None = None
    """For a folder: CSV of path,label. Default: SRC/labels.csv where there is one, else the class folders."""
    val: str | None = None
    """For a folder: folder of validation images. Default: SRC/val or SRC/test where there is one."""
    val_labels: str | None = None
    """For a folder: labels of a flat validation folder, as in ImageNet's LOC_val_solution.csv."""
    column: str | None = None
    """For Hugging Face data (a folder saved with save_to_disk, or a name): the column of images."""
    label_column: str = "label"
    """For Hugging Face data: the column of labels; where there is none, nothing is labelled."""
    cache: str | None = None
    """For shards: folder for those that are not on this machine. Default: fastsimclr/shards in $XDG_CACHE_HOME or
    ~/.cache."""


def open_origin(origin: Origin) -> dict[str, Source]:
    """{"train": images} or {"train": ..., "val": ...} where the source has both; reads lists, decodes nothing.

    src: a folder (its train and val or test apart), FILE.beton, a text file with one path a line (a tab or a comma and
    the class may follow), cifar10, cifar100, stl10, digits, tars by name, glob or brace pattern, and with `column` data
    of Hugging Face. Raises DataError.
    """
    src = origin.src
    path = Path(src)
    if origin.column is not None:
        return open_hugging(src, origin.column, origin.label_column)
    if path.is_dir():
        labels, val, val_labels = (None if text is None else Path(text) for text in _folder_options(origin))
        training, validation = open_folder(path, labels=labels, val=val, val_labels=val_labels)
        return {"train": training, "val": validation} if len(validation) else {"train": training}
    if given := [text for text in _folder_options(origin) if text is not None]:
        raise DataError(f"{', '.join(given)}: labels and val are for a folder, and {src} is none; leave them out")
    if path.suffix == ".beton":
        return {"train": BetonSource(path)}
    if src.partition("?")[0].endswith(".tar") or "://" in src:
        folder = default_cache() if origin.cache is None else Path(origin.cache)
        return {"train": open_shards(src, ShardCache(folder))}
    if path.is_file():
        return {"train": open_list(path)}
    if src == "digits":
        return {"train": digits()}
    if src in SETS:
        first = "train+unlabeled" if src == "stl10" else "train"
        root = Path(origin.root)
        return {
            key: torchvision_set(src, split, root, origin.download)
            for key, split in (("train", first), ("val", "test"))
        }
    raise DataError(
        f"{src} is no folder and no file; give one, FILE.beton, tars ('shards-{{000..099}}.tar'), {', '.join(SETS)},"
        " digits, or --column with data of Hugging Face"
    )


def _folder_options(origin: Origin) -> tuple[str | None, ...]:
    return origin.labels, origin.val, origin.val_labels


def open_list(path: Path) -> FileSource:
    """The images of a text file: one path a line, relative to its folder; a tab or a comma and the class may follow.

    A line that names a file as a whole has no class. A first line path,label is a heading. Sorted by path.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no list of images: {error}; give a UTF-8 file with one path a line") from error
    base = Path(os.path.abspath(path)).parent
    rows: dict[str, str | None] = {}
    if lines and lines[0].strip().lower() == _HEADING:
        for image, label in read_labels_csv(path).items():
            rows[os.path.relpath(image, base) if Path(image).is_relative_to(base) else image] = label
        lines = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text:
            continue
        mark = "\t" if "\t" in text else ","
        name, _, label = (text, "", "") if mark == "," and (base / text).is_file() else text.rpartition(mark)
        name, label = (name.strip(), label.strip()) if name else (text, "")
        if name in rows:
            raise DataError(f"{path}:{number}: {name} is listed twice; leave one line for each image")
        rows[name] = label or None
    if not rows:
        raise DataError(f"{path} names no image; write one path a line")
    names = sorted(rows)
    classes = sorted({label for label in rows.values() if label is not None})
    index = {label: i for i, label in enumerate(classes)}
    labels = [-1 if (known := rows[name]) is None else index[known] for name in names]
    sizes = [size.st_size if (size := _stat(base / name)) else 0 for name in names]
    return FileSource(path.name, base, names, sizes, labels, classes)


def _stat(path: Path) -> os.stat_result | None:
    """None for a file that is not there, which counts as a damaged image when it is read."""
    try:
        return path.stat()
    except OSError:
        return None


def image_names(source: Source) -> list[str]:
    """What each image is called within its source: a path below its root, or what the source calls it."""
    if isinstance(source, Subset):
        every = image_names(source.base)
        return [every[index] for index in source.indices.tolist()]
    if isinstance(source, FileSource | BetonSource) and source.names is not None:
        return list(source.names)
    if isinstance(source, ArraySource):
        return [f"{index:06d}" for index in range(len(source))]
    return [source.describe(index) for index in range(len(source))]
