"""FILE.beton.json: what a .beton file cannot say of itself: names, classes, checksums, settings, and what was left out.

One JSON object. The checksums are one string, base64 of n little-endian uint32: CRC-32 (zlib) of each stored blob.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastsimclr.loaders.source import DataError
from fastsimclr.loaders.whole import write_whole

Crcs = npt.NDArray[np.uint32]

FORMAT = "fastsimclr beton sidecar 1"


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """What stands beside a .beton file of `images` images and `file_bytes` bytes.

    names: of each image in its source, all different. classes: the name of each label. crc32: uint32 [images], of the
    stored blobs. source: name and fingerprint of what was packed. settings: the packer's. stored: {way: images}.
    left_out: (name, reason). fingerprint: BetonSource.fingerprint_with(this).
    """

    images: int
    file_bytes: int
    names: tuple[str, ...]
    classes: tuple[str, ...]
    crc32: Crcs
    source: dict[str, str]
    settings: dict[str, Any]
    stored: dict[str, int]
    left_out: tuple[tuple[str, str], ...]
    fingerprint: str = ""

    def digest(self) -> bytes:
        """SHA-256 of the names, the classes and the checksums."""
        whole = hashlib.sha256()
        for part in ("\0".join(self.names), "\0".join(self.classes)):
            data = part.encode("utf-8", "surrogatepass")
            whole.update(len(data).to_bytes(8, "little") + data)
        whole.update(self.crc32.astype("<u4").tobytes())
        return whole.digest()


def sidecar_path(beton: Path) -> Path:
    """FILE.beton.json."""
    return beton.with_name(beton.name + ".json")


def left_out_path(beton: Path) -> Path:
    """FILE.beton.left-out.csv."""
    return beton.with_name(beton.name + ".left-out.csv")


def write_sidecar(path: Path, card: Sidecar) -> None:
    """Write `card` to `path`, whole or not at all. Raises OSError."""
    values = asdict(card)
    crcs = base64.b64encode(card.crc32.astype("<u4").tobytes()).decode()
    write_whole(path, json.dumps({"format": FORMAT, **values, "crc32": crcs}, separators=(",", ":")).encode() + b"\n")


def write_left_out(path: Path, left_out: Iterable[tuple[str, str]]) -> None:
    """Write name,reason, one image a line, to `path`, whole or not at all. Raises OSError."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([("name", "reason"), *left_out])
    write_whole(path, text.getvalue().encode(errors="surrogateescape"))  # a name that is not UTF-8 keeps its bytes


def read_sidecar(path: Path) -> Sidecar:
    """The sidecar at `path`. DataError where it is damaged, foreign or of another version."""
    remedy = "pack again, or remove it to read the .beton without names and checksums"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}; {remedy}") from error
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise DataError(f"{path} is not a sidecar of this version ({FORMAT!r} must stand under format); {remedy}")
    try:
        crcs = np.frombuffer(base64.b64decode(values["crc32"], validate=True), dtype="<u4")
        lists = {key: tuple(values[key]) for key in ("names", "classes")}
        pairs = tuple((str(name), str(reason)) for name, reason in values["left_out"])
        card = Sidecar(**{**values, **lists, "crc32": crcs, "left_out": pairs})
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise DataError(f"{path} is damaged: {type(error).__name__}: {error}; {remedy}") from error
    texts = all(isinstance(text, str) for text in (*card.names, *card.classes, card.fingerprint))
    kinds = isinstance(card.images, int) and isinstance(card.file_bytes, int)
    mappings = all(isinstance(value, dict) for value in (card.source, card.settings, card.stored))
    if not (texts and kinds and mappings) or not len(card.names) == len(crcs) == card.images:
        lengths = f"{len(card.names)} names and {len(crcs)} checksums for {card.images} images"
        raise DataError(f"{path} is damaged: {lengths}, or values of the wrong kind; {remedy}")
    return card
