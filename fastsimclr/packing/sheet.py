"""A contact sheet: images spread evenly over a packed file, each with its place and its class, as one PNG."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fastsimclr.loaders import DataError
from fastsimclr.loaders.beton.reader import BetonSource
from fastsimclr.loaders.decode import decode

_COLUMNS, _ROWS = 8, 6
_TILE, _CAPTION, _GAP = 144, 16, 6  # pixels
_LETTERS = 22  # of a caption


def write_sheet(source: BetonSource, path: Path) -> None:
    """Draw up to 48 images of `source` into the PNG `path`; a damaged one is a crossed tile. Raises OSError."""
    ids = np.unique(np.linspace(0, len(source) - 1, min(len(source), _COLUMNS * _ROWS)).astype(np.int64))
    columns = min(_COLUMNS, len(ids))
    rows = -(-len(ids) // columns)
    across, down = _TILE + _GAP, _TILE + _CAPTION + _GAP
    sheet = Image.new("RGB", (columns * across + _GAP, rows * down + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for place, index in enumerate(ids.tolist()):
        left, top = _GAP + place % columns * across, _GAP + place // columns * down
        try:
            data = source.read(index)
            picture = Image.fromarray(decode(data, "") if isinstance(data, bytes) else data)
        except DataError:
            draw.rectangle((left, top, left + _TILE - 1, top + _TILE - 1), outline="red")
            draw.line((left, top, left + _TILE, top + _TILE), fill="red")
        else:
            picture.thumbnail((_TILE, _TILE))
            if max(picture.size) < _TILE // 2:  # digits and CIFAR: whole pixels
                times = _TILE // max(picture.size)
                picture = picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
            sheet.paste(picture, (left + (_TILE - picture.width) // 2, top + (_TILE - picture.height) // 2))
        label = int(source.labels[index])
        caption = f"{index} {source.classes[label]}" if label >= 0 else str(index)
        draw.text((left, top + _TILE + 1), caption[:_LETTERS].encode("ascii", "replace").decode(), fill="black")
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        sheet.save(file, "PNG")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
