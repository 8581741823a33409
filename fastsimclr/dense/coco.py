"""Annotations of boxes in COCO's format (instances_*.json): read, and checked before the first step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsimclr.loaders import DataError
from fastsimclr.runs.log import logger

EDGE_PX = 1.0  # COCO's own boxes end up to a pixel outside of their images
EMPTY_PX = 0.005  # some of them have no height; their numbers have two decimals


@dataclass(frozen=True)
class Boxes:
    """An image and its boxes: [x, y, width, height] in pixels, and category ids. crowd: one that stands for several."""

    id: int
    path: Path
    width: int
    height: int
    boxes: list[list[float]]
    categories: list[int]
    crowd: list[bool]


@dataclass(frozen=True)
class Annotations:
    """All images of a file, in its order, and its categories {id: name}, sorted by id."""

    images: list[Boxes]
    categories: dict[int, str]


def read_coco(path: Path, folder: Path) -> Annotations:
    """Read annotations of the images in `folder`. Opens no image.

    DataError, with the first entries that break the rule, for a file that is no such JSON, images that are missing or
    listed twice, boxes that reach out of their image, unknown images and categories. Boxes without area inside of their
    image are left out, and their number logged.
    """
    try:
        content = json.loads(path.read_text())
        categories = {int(entry["id"]): str(entry["name"]) for entry in content["categories"]}
        images = {int(entry["id"]): entry for entry in content["images"]}
        sizes = {key: (int(entry["width"]), int(entry["height"])) for key, entry in images.items()}
        names = {key: str(entry["file_name"]) for key, entry in images.items()}
        boxes = [_box(entry) for entry in content["annotations"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no COCO annotation file ({type(error).__name__}: {error}); it needs images (id, file_name,"
            " width, height), categories (id, name) and annotations (image_id, category_id, bbox)"
        ) from error
    if len(images) < len(content["images"]):
        raise DataError(f"{path}: {len(content['images']) - len(images)} image ids stand twice; give each image one id")
    if not images or not categories:
        raise DataError(f"{path} has {len(images)} images and {len(categories)} categories; it needs at least one each")
    _refuse(path, f"images are not in {folder}; give their folder", _missing(names.values(), folder))
    _refuse(path, "annotations name no image of the file; repair them", (b for b in boxes if b[0] not in images))
    _refuse(path, "annotations name no category of the file; repair them", (b for b in boxes if b[1] not in categories))
    wrong = "boxes reach out of their image; repair them ([x, y, width, height] in pixels)"
    _refuse(path, wrong, (f"{names[b[0]]} {b[2]}" for b in boxes if not _fits(b[2], *sizes[b[0]])))
    of_image: dict[int, list[Any]] = {key: [] for key in images}
    for entry in boxes:
        if _has_area(entry[2], *sizes[entry[0]]):
            of_image[entry[0]].append(entry)
    if empty := len(boxes) - sum(map(len, of_image.values())):
        logger.warning("%s: %d of %d boxes have no area in their image and are left out", path, empty, len(boxes))
    return Annotations(
        [
            Boxes(
                key,
                folder / names[key],
                *sizes[key],
                [entry[2] for entry in mine],
                [entry[1] for entry in mine],
                [entry[3] for entry in mine],
            )
            for key, mine in of_image.items()
        ],
        dict(sorted(categories.items())),
    )


def _box(entry: dict[str, Any]) -> tuple[int, int, list[float], bool]:
    x, y, width, height = map(float, entry["bbox"])
    return int(entry["image_id"]), int(entry["category_id"]), [x, y, width, height], bool(entry.get("iscrowd", 0))


def _fits(box: Sequence[float], width: int, height: int) -> bool:
    x, y, w, h = box
    return x >= -EDGE_PX and y >= -EDGE_PX and x + w <= width + EDGE_PX and y + h <= height + EDGE_PX


def _has_area(box: Sequence[float], width: int, height: int) -> bool:
    x, y, w, h = box
    across, down = min(width, x + w) - max(0, x), min(height, y + h) - max(0, y)
    return across >= EMPTY_PX and down >= EMPTY_PX


def _missing(names: Iterator[str] | Any, folder: Path) -> Iterator[str]:
    return (name for name in names if not (folder / name).is_file())


def _refuse(path: Path, fault: str, faulty: Iterator[Any], shown: int = 3) -> None:
    if found := list(faulty):
        some = ", ".join(map(str, found[:shown])) + (", ..." if len(found) > shown else "")
        raise DataError(f"{path}: {len(found)} {fault}: {some}")
