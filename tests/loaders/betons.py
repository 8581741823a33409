"""A .beton of two samples, written byte by byte as FFCV describes it, with nothing of fastsimclr."""

from __future__ import annotations

import io
import struct
from pathlib import Path

from PIL import Image

PAGE = 2**21
PIXELS = bytes(range(2 * 5 * 3))


def jpeg(width: int, height: int, colour: int) -> bytes:
    """A JPEG of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), (colour, 90, 255 - colour)).save(file, "JPEG")
    return file.getvalue()


FIRST, SECOND = jpeg(7, 4, 10), PIXELS  # of sample 0, a JPEG; of sample 1, 2 x 5 pixels
# What stands in a row for each field of a sample, with the bytes that alignment leaves empty before it.
ORDERS = {
    "image label": (b"%I3x%L", 24),
    "label image": (b"%L%I3x", 24),
    "image": (b"%I", 13),
    "bytes image float json label array tensor": (b"%B%I3x%F%B%L%A%A", 16 + 16 + 8 + 16 + 8 + 8 + 8),
}
TYPES = {"float": 0, "label": 1, "image": 2, "bytes": 3, "array": 4, "json": 5, "tensor": 6}
TABLE = 24 + 2 * 1041


def by_hand(fields: str = "image label", labels: tuple[int, int] = (3, -1)) -> bytes:
    """A file of two samples in one page, with nothing of fastsimclr."""
    names = fields.split()
    start = (PAGE, PAGE + len(FIRST) + 1)  # a byte of sample 0's other field lies between
    other = PAGE + len(FIRST)
    layout, size = ORDERS[fields]
    rows = b""
    for mode, width, height, blob, label in ((0, 7, 4, start[0], labels[0]), (1, 5, 2, start[1], labels[1])):
        row, rest = b"", layout
        while rest:
            kind, rest = rest[:2], rest[2:]
            row += {
                b"%I": struct.pack("<BHHQ", mode, width, height, blob),
                b"%L": struct.pack("<q", label),
                b"%F": struct.pack("<d", 0.5),
                b"%B": struct.pack("<QQ", other, 1),
                b"%A": struct.pack("<Q", other),
                b"3x": bytes(3),
            }[kind]
        assert len(row) == size
        rows += row
    described = b"".join(struct.pack("<B16s1024x", TYPES[name], name.encode()) for name in names)
    head = struct.pack("<HHIQQ", 2, len(names), PAGE, 2, 2 * PAGE) + described + rows
    data = FIRST + b"x" + SECOND
    table = struct.pack("<QQQ", 1, start[1], len(SECOND)) + struct.pack("<QQQ", 0, start[0], len(FIRST))
    if "bytes" in names:
        table += struct.pack("<QQQ", 0, other, 1) + struct.pack("<QQQ", 1, start[1], 0)  # one empty, at another's place
    return head.ljust(PAGE, b"\0") + data.ljust(PAGE, b"\0") + table


def put(path: Path, data: bytes) -> Path:
    """Write a file."""
    path.write_bytes(data)
    return path
