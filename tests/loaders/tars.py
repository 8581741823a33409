"""Tars for tests: by Python's tarfile in three dialects, headers written out by hand, and shards of noise."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

Files = Sequence[tuple[str, bytes]]
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
SIZE = 61440  # bytes of a `shard`
PER_SHARD = 8
END = bytes(1024)


def tar(files: Files, dialect: str = "pax") -> bytes:
    """A tar of these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[dialect]) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_tar(path: Path, files: Files, dialect: str = "pax") -> Path:
    """The same as a file, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar(files, dialect))
    return path


def header(name: bytes, size: bytes, kind: bytes = b"0", magic: bytes = b"ustar\x0000", prefix: bytes = b"") -> bytes:
    """A tar header by the table of POSIX.1-1988, written out by hand."""
    fields = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size.ljust(12, b"\0") + b"00000000000\0"
    rest = kind + bytes(100) + magic + bytes(64) + bytes(16) + prefix.ljust(155, b"\0") + bytes(12)
    total = sum(fields) + 8 * ord(" ") + sum(rest)
    return fields + b"%06o\0 " % total + rest


def padded(data: bytes) -> bytes:
    """`data`, up to whole blocks of 512 bytes."""
    return data + bytes(-len(data) % 512)


def noise(index: int, size: int = 5000) -> bytes:
    """The content of image `index`."""
    return np.random.default_rng(index).bytes(size)


def shard(number: int) -> bytes:
    """Eight images of noise with labels."""
    ids = range(PER_SHARD * number, PER_SHARD * (number + 1))
    data = tar([f for i in ids for f in ((f"{i:04d}.jpg", noise(i)), (f"{i:04d}.cls", b"%d" % (i % 5)))])
    assert len(data) == SIZE
    return data
