"""Where each file lies in a plain tar: POSIX.1-1988 (ustar), GNU long names and sizes, POSIX.1-2001 (pax) headers."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from fastsimclr.loaders.source import DataError

BLOCK = 512
_ZEROS = bytes(BLOCK)
_REST = 1 << 20  # bytes looked at in one go behind the end mark
_LONGEST = 1 << 20  # bytes of a name or of pax records; longer ones are damage
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Member(NamedTuple):
    """A file in a tar. kind: "file", "link" (without data of its own) or "other" (a folder, a device).

    offset, size: of the data, bytes. stamp: CRC-32 of the 512 bytes before the data, by which a reader that knows the
    offset from an earlier scan can tell that it is still the same file there.
    """

    name: str
    kind: str
    offset: int
    size: int
    stamp: int


def members(fd: int, size: int, location: str) -> Iterator[Member]:
    """Every member of the tar of `size` bytes behind `fd`, in order. Reads headers only, by os.pread.

    Raises DataError, naming the tar by `location`, for compressed and foreign files, damaged headers, members that do
    not end within the file, an archive without its end mark (a copy cut off between two members has no other sign),
    data behind that mark (archives put together by cat), and sparse members.
    """
    at, shared, own, long_name = 0, dict[str, bytes](), dict[str, bytes](), None
    while True:
        header = os.pread(fd, BLOCK, at)
        if len(header) < BLOCK:
            where = "inside a header" if header else "without the end mark of a tar"
            raise DataError(f"{location} is truncated: it ends {where} at byte {at + len(header)}; copy it again")
        if header == _ZEROS:
            _only_zeros(fd, at, size, location)
            return
        _check(header, at, location)
        kind, start = header[156:157], at + BLOCK
        length = _size(own.get("size") or shared.get("size"), header, at, location)
        # Links, devices and folders have no data, whatever their size says.
        at = start + (0 if kind in b"123456" else -(-length // BLOCK) * BLOCK)
        if kind not in b"123456" and start + length > size:
            raise DataError(
                f"{location} is truncated: {_name(header)} ends at byte {start + length} of {size}; copy it again"
            )
        if kind in b"LKxg":
            if length > _LONGEST:
                raise DataError(f"{location} is damaged: a name of {length} bytes at byte {start}; copy it again")
            data = os.pread(fd, length, start)
            if kind == b"L":
                long_name = data.rstrip(b"\0")
            elif kind != b"K":
                (own if kind == b"x" else shared).update(_records(data, start, location))
            continue
        records = {**shared, **own}
        if kind == b"S" or any(key.startswith("GNU.sparse") for key in records):
            raise DataError(f"{location}: {_name(header)} is a sparse file; pack the tar without --sparse")
        raw = records.get("path") or long_name
        name = _name(header) if raw is None else raw.decode("utf-8", "backslashreplace")
        sort = "link" if kind in b"12" else "other" if kind in b"3456" or name.endswith("/") else "file"
        yield Member(name, sort, start, length, zlib.crc32(header))
        own, long_name = {}, None


def _only_zeros(fd: int, at: int, size: int, location: str) -> None:
    while rest := os.pread(fd, _REST, at):
        if rest.count(0) != len(rest):
            raise DataError(
                f"{location} has data behind its end mark, within {len(rest)} bytes after byte {at} of {size}: archives"
                " put together by cat; pack the files into one tar"
            )
        at += len(rest)


def _check(header: bytes, at: int, location: str) -> None:
    """DataError where the checksum of a header is not that of its bytes."""
    try:
        stated = int(header[148:156].strip(b" \0") or b"0", 8)
    except ValueError:
        stated = -1
    # The field counts as eight spaces. Some old programs summed signed bytes.
    total = sum(header) - sum(header[148:156]) + 8 * 32
    if stated == total or stated == total - 256 * sum(byte > 127 for byte in header[:148] + header[156:]):
        return
    if at == 0:
        packed = next((name for magic, name in COMPRESSED.items() if header.startswith(magic)), None)
        if packed:
            raise DataError(
                f"{location} is a {packed} file; unpack it to a plain .tar, images are compressed as they are"
            )
        raise DataError(f"{location} is not a tar: it begins {header[:8]!r}; give WebDataset shards")
    raise DataError(f"{location} is damaged: the header at byte {at} has a wrong checksum; copy it again")


def _size(stated: bytes | None, header: bytes, at: int, location: str) -> int:
    """Bytes of a member: of its pax record, else of the header's field, octal or (GNU) base 256."""
    field = header[124:136]
    try:
        if stated is not None:
            length = int(stated)
        elif field[0] & 0x80:
            length = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        else:
            length = int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        length = -1
    if length < 0:
        raise DataError(f"{location} is damaged: the header at byte {at} has no size; copy it again")
    return length


def _name(header: bytes) -> str:
    name, _, _ = header[:100].partition(b"\0")
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "backslashreplace")


def _records(data: bytes, start: int, location: str) -> dict[str, bytes]:
    """The records "length key=value\\n" of a pax header; the length counts the whole record."""
    found: dict[str, bytes] = {}
    at = 0
    while at < len(data):
        digits = data[at : at + 8].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = data[at + len(digits) + 1 : at + length].partition(b"=")
        if length <= len(digits) + 1 or at + length > len(data) or not equals or value[-1:] != b"\n":
            raise DataError(f"{location} is damaged: a pax record at byte {start + at} is malformed; copy it again")
        found[key.decode("utf-8", "backslashreplace")] = value[:-1]
        at += length
    return found
