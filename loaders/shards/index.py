"""What a WebDataset shard holds, images, places and labels: scanned from the tar, or kept in an index.json."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastsimclr.loaders.sets.lists import some
from fastsimclr.loaders.shards.tar import BLOCK, Member, members
from fastsimclr.loaders.source import DataError

RawLabel = int | str | None  # a class number, a class name, none

IMAGES = ("jpg", "jpeg", "png", "webp")
INDEX = "index.json"
FORMAT = 1
_LARGEST_LABEL = 1 << 20  # bytes of a .cls, .txt or .json; more is no label
_COLUMNS: dict[str, type | tuple[type, ...]] = {
    "members": str,
    "offsets": int,
    "sizes": int,
    "stamps": int,
    "labels": (int, str, type(None)),
}


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """The n samples of a shard in the order of their images, five lists of length n.

    members: the images' names in the tar. offsets, sizes: of their data, bytes. stamps: of `tar.Member`.
    labels: a class number or name, None where the sample has no label. left_out: keys that have no image.
    """

    members: Sequence[str]
    offsets: Sequence[int]
    sizes: Sequence[int]
    stamps: Sequence[int]
    labels: Sequence[RawLabel]
    left_out: Sequence[str]

    def __len__(self) -> int:
        return len(self.members)


def label_member(label_key: str | None) -> tuple[str, tuple[str, ...]]:
    """(extension, fields within JSON) of the member that holds a sample's label. ValueError for what is neither."""
    extension, *fields = ("cls" if label_key is None else label_key).split(".")
    if not extension or not all(fields) or extension in IMAGES or (extension == "json") != bool(fields):
        raise ValueError(
            f"data.label_key={label_key} must be the extension of the members with the labels (cls, txt), or json."
            "FIELD for a field of KEY.json"
        )
    return extension, tuple(fields)


def scan_shard(fd: int, size: int, location: str, label_key: str | None = None) -> ShardIndex:
    """The samples of the tar of `size` bytes behind `fd`: members that agree up to the first dot of their base name.

    A sample is KEY.jpg, .jpeg, .png or .webp, any case, with the label that `label_key` names; its members need not be
    neighbours. What else lies in the tar is passed over, keys without an image are listed in left_out, hidden files
    are nothing. Raises DataError as `members` does, and for a key with two images or two labels, for an image or label
    that is a link, and for a label that is neither a class number nor a name.
    """
    extension, fields = label_member(label_key)
    images: dict[str, Member] = {}
    labels: dict[str, RawLabel] = {}
    keys: dict[str, None] = {}
    for member in members(fd, size, location):
        folder, slash, base = member.name.removeprefix("./").rpartition("/")
        if base.startswith(".") or member.kind == "other" or not base:
            continue
        stem, _, ending = base.partition(".")
        key, ending = folder + slash + stem, ending.lower()
        keys[key] = None
        if ending not in IMAGES and ending != extension:
            continue
        if member.kind == "link":
            raise DataError(f"{location}: {member.name} is a link; pack the files themselves (tar --dereference)")
        if ending in IMAGES:
            if key in images:
                raise DataError(
                    f"{location}: {member.name} is the second image of its key, after {images[key].name}; keep one a"
                    " key, and write a dot only before the extension"
                )
            images[key] = member
        else:
            if key in labels:
                raise DataError(f"{location}: {member.name} is the second label of its key; keep one")
            labels[key] = _label(fd, member, fields, location)
    found = list(images.values())
    return ShardIndex(
        members=[member.name for member in found],
        offsets=[member.offset for member in found],
        sizes=[member.size for member in found],
        stamps=[member.stamp for member in found],
        labels=[labels.get(key) for key in images],
        left_out=[key for key in keys if key not in images],
    )


def _label(fd: int, member: Member, fields: tuple[str, ...], location: str) -> RawLabel:
    where = f"{location}: {member.name}"
    if member.size > _LARGEST_LABEL:
        raise DataError(f"{where} has {member.size} bytes, too many for a label; correct data.label_key")
    try:
        text = os.pread(fd, member.size, member.offset).decode("utf-8-sig").strip()
        value: Any = json.loads(text) if fields else text
    except ValueError as error:
        raise DataError(f"{where} is not {'JSON' if fields else 'UTF-8 text'}: {error}") from error
    for field in fields:
        value = value.get(field) if isinstance(value, dict) else None
    if isinstance(value, str):
        value = value.strip()
        value = int(value) if re.fullmatch(r"-?[0-9]{1,9}", value) else value
    if value is not None and (value == "" or isinstance(value, bool) or not isinstance(value, int | str)):
        raise DataError(f"{where} has the label {value!r:.60}; write a class number or a class name")
    return None if value == -1 else value


@dataclass(frozen=True, kw_only=True)
class IndexFile:
    """An index.json: label_key as `label_member` takes it, the names of the class numbers or None, and the shards.

    location: its path or URL. shards: {base name: (bytes, hex SHA-256, samples)}.
    """

    location: str
    label_key: str
    classes: tuple[str, ...] | None
    shards: dict[str, tuple[int, str, ShardIndex]]


def read_index(data: bytes, location: str) -> IndexFile:
    """The index.json at `location`, a path or URL. Raises DataError for anything but what `dump_index` writes."""
    try:
        whole = json.loads(data)
        if whole["format"] != FORMAT:
            raise ValueError(f"format {whole['format']}, this version reads {FORMAT}")
        names = whole["classes"]
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError("classes are not a list of names")
        label_member(whole["label_key"])
        shards = {
            str(row["name"]): (int(row["size"]), str(row["sha256"]), parse_shard(row, int(row["size"])))
            for row in whole["shards"]
        }
        classes = None if names is None else tuple(names)
        return IndexFile(location=location, label_key=whole["label_key"], classes=classes, shards=shards)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        cause = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{location} is damaged or not by fastsimclr: {cause}; write it again, or remove it") from error


def parse_shard(row: Any, size: int) -> ShardIndex:
    """The samples of a shard of `size` bytes from JSON. ValueError, KeyError or TypeError for what cannot be."""
    columns = {name: row[name] for name in (*_COLUMNS, "left_out")}
    for name, kind in _COLUMNS.items():
        column = columns[name]
        if not isinstance(column, list) or len(column) != len(columns["members"]):
            raise ValueError(f"{name} is not a list of {len(columns['members'])}")
        if any(not isinstance(value, kind) or isinstance(value, bool) for value in column):
            raise ValueError(f"{name} has values of another kind")
    if not 0 <= size < 2**62 or any(not 0 <= stamp < 2**32 for stamp in columns["stamps"]):
        raise ValueError(f"a size of {size} bytes, or a stamp, that cannot be")
    if any(
        at < BLOCK or length < 0 or at + length > size
        for at, length in zip(columns["offsets"], columns["sizes"], strict=True)
    ):
        raise ValueError(f"an image lies outside its shard of {size} bytes")
    return ShardIndex(**columns)


def dump_index(file: IndexFile) -> bytes:
    """index.json as `read_index` reads it."""
    rows = [
        {"name": name, "size": size, "sha256": digest, **vars(index)}
        for name, (size, digest, index) in sorted(file.shards.items())
    ]
    whole = {"format": FORMAT, "label_key": file.label_key, "classes": file.classes, "shards": rows}
    return json.dumps(whole, separators=(",", ":")).encode()


def labels_of(
    shards: Sequence[tuple[str, ShardIndex]], label_key: str | None, classes: Sequence[str] | None
) -> tuple[list[int], tuple[str, ...]]:
    """(the label of every sample, -1 for none; class names) of shards, each with what to call it.

    classes: those of the training images, for a validation set; None takes all names, sorted, or the numbers 0 to the
    largest. Raises DataError for labels that mix numbers and names, are no class, or are asked for and absent.
    """
    raw = [label for _, index in shards for label in index.labels]
    kinds = {type(label) for label in raw} - {type(None)}

    def first_label(wrong: Any) -> str:
        return next(
            f"{what}: {index.members[i]} has the label {label!r}"
            for what, index in shards
            for i, label in enumerate(index.labels)
            if wrong(label)
        )

    if len(kinds) == 2:
        texts = [first_label(lambda label, kind=kind: isinstance(label, kind)) for kind in (int, str)]
        raise DataError(f"labels mix class numbers and names ({'; '.join(texts)}); use one of them")
    if not kinds:
        if label_key is not None and raw:
            raise DataError(
                f"no sample has the label that data.label_key={label_key} names; correct it, or leave it out"
            )
        return [-1] * len(raw), tuple(classes or ())
    if kinds == {str}:
        known = sorted({label for label in raw if isinstance(label, str)}) if classes is None else list(classes)
        position: dict[Any, int] = {name: number for number, name in enumerate(known)}
    else:
        numbers = [label for label in raw if isinstance(label, int)]
        if classes is None and max(numbers) >= _LARGEST_LABEL:
            raise DataError(
                f"{first_label(lambda label: label == max(numbers))}; class numbers go up to {_LARGEST_LABEL - 1}"
            )
        known = [str(number) for number in range(max(numbers) + 1)] if classes is None else list(classes)
        position = {number: number for number in range(len(known))}
    if foreign := [label for label in raw if label is not None and label not in position]:
        where = first_label(lambda label: label == foreign[0])
        raise DataError(f"{where}, which is none of the {len(known)} classes ({some(known)}); correct it")
    return [-1 if label is None else position[label] for label in raw], tuple(known)
