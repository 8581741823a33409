"""TensorFlow's checkpoint files, read without TensorFlow.

PREFIX.index is a LevelDB table: blocks of (name, BundleEntryProto), each with a checksum, an index of the blocks, and a
footer of 48 bytes. PREFIX.data-0000i-of-0000n hold the numbers, little-endian, at the offsets that the entries give.
tensorflow/core/protobuf/tensor_bundle.proto and LevelDB's doc/table_format.md.
"""

from __future__ import annotations

import difflib
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastsimclr.models.crc32c import crc32c, masked

_FOOTER_BYTES = 48
_TRAILER_BYTES = 5  # of a block: kind of compression, checksum
_MAGIC = 0xDB4775248B80FB57
# DataType of tensorflow/core/framework/types.proto: name, and the dtype of its bytes. NumPy has no bfloat16.
_TYPES = {
    1: ("float32", "<f4"),
    2: ("float64", "<f8"),
    3: ("int32", "<i4"),
    9: ("int64", "<i8"),
    14: ("bfloat16", "<u2"),
    19: ("float16", "<f2"),
}
_PARTS = re.compile(r"\.(index|data-\d{5}-of-\d{5})$")
_COPY = "copy the checkpoint's files again"


class BundleError(ValueError):
    """A checkpoint that is missing, truncated, damaged or of another kind; names file, rule and remedy."""


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """BundleEntryProto: where a tensor lies. offset and size in bytes, crc of these bytes, masked."""

    kind: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    sliced: bool


class Bundle:
    """One checkpoint: names, shapes and dtypes at once, numbers when they are asked for.

    source: PREFIX, one of PREFIX's files, or a folder: the newest checkpoint that its file `checkpoint` names, or the
    only one in it. Raises BundleError for files that are missing, shorter than the index says, damaged or foreign;
    a tensor's own checksum is compared when it is read.
    """

    def __init__(self, source: str | Path) -> None:
        self.prefix = _prefix(Path(source))
        self.index = self.prefix.with_name(self.prefix.name + ".index")
        if not self.index.is_file():
            raise BundleError(f"{self.index} is not a file; give PREFIX of a checkpoint PREFIX.index, PREFIX.data-…")
        header, self._entries = _read_index(self.index)
        if header.get(2, 0) != 0:
            raise BundleError(f"{self.index} was written on a big-endian machine; save it on a little-endian one")
        shards = header.get(1, 0)
        self._shards = [
            self.prefix.with_name(f"{self.prefix.name}.data-{i:05d}-of-{shards:05d}") for i in range(shards)
        ]
        self._open: dict[int, npt.NDArray[np.uint8]] = {}
        self._check_shards()

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name, sorted."""
        return tuple(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """The dtype of a tensor as TensorFlow names it; "type N" where `read` cannot read it."""
        kind = self._entry(name).kind
        return _TYPES[kind][0] if kind in _TYPES else f"type {kind}"

    def read(self, name: str) -> npt.NDArray[Any]:
        """The numbers of a tensor, in a new array of its dtype; bfloat16 becomes float32.

        Raises BundleError where the name is unknown, the dtype is none of float16, bfloat16, float32, float64, int32,
        int64, or the bytes do not have the checksum that was stored with them.
        """
        entry, file = self._entry(name), self._file_of(name)
        if entry.kind not in _TYPES:
            known = ", ".join(dtype for dtype, _ in _TYPES.values())
            raise BundleError(f"{file}: {name} is of {self.dtype(name)}; only {known} can be read")
        stored = np.dtype(_TYPES[entry.kind][1])
        count = int(np.prod(entry.shape, dtype=np.int64))
        if entry.size != count * stored.itemsize:
            raise BundleError(
                f"{self.index}: {name} {list(entry.shape)} of {self.dtype(name)} has {entry.size} bytes, not"
                f" {count * stored.itemsize}; {_COPY}"
            )
        raw = self._shard(entry.shard)[entry.offset : entry.offset + entry.size] if count else np.zeros(0, np.uint8)
        if (found := masked(crc32c(raw))) != entry.crc:
            raise BundleError(
                f"{file}: {name}, bytes {entry.offset} to {entry.offset + entry.size}, has checksum {found:08x}, the"
                f" index says {entry.crc:08x}: the file is damaged; {_COPY}"
            )
        values = np.frombuffer(raw, stored).reshape(entry.shape)
        if self.dtype(name) == "bfloat16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(stored.newbyteorder("="), copy=True)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            near = difflib.get_close_matches(name, self._entries, 3) or list(self._entries)[:3]
            raise BundleError(
                f"{self.index} has no {name}, of {len(self._entries)} names the nearest: {', '.join(near)}"
            )
        return self._entries[name]

    def _file_of(self, name: str) -> Path:
        return self._shards[self._entries[name].shard]

    def _shard(self, shard: int) -> npt.NDArray[np.uint8]:
        if shard not in self._open:
            self._open[shard] = np.memmap(self._shards[shard], np.uint8, "r")
        return self._open[shard]

    def _check_shards(self) -> None:
        """Every file is there and as long as the entries need: found out before anything is read."""
        for name, entry in self._entries.items():
            if entry.sliced:
                raise BundleError(f"{self.index}: {name} is saved in slices; save it from an unpartitioned variable")
            if not 0 <= entry.shard < len(self._shards):
                raise BundleError(f"{self.index}: {name} lies in file {entry.shard} of {len(self._shards)}; {_COPY}")
        for shard, path in enumerate(self._shards):
            if not path.is_file():
                raise BundleError(f"{path} is not a file, the checkpoint has {len(self._shards)} such; {_COPY}")
            ends = {name: e.offset + e.size for name, e in self._entries.items() if e.shard == shard}
            last = max(ends, key=lambda name: ends[name], default=None)
            if last is not None and path.stat().st_size < ends[last]:
                raise BundleError(
                    f"{path} is truncated: it has {path.stat().st_size} bytes, {last} ends at {ends[last]}; {_COPY}"
                )


def _prefix(source: Path) -> Path:
    if not source.is_dir():
        return source.with_name(_PARTS.sub("", source.name))
    listing = source / "checkpoint"
    if listing.is_file():
        found = re.search(r'^model_checkpoint_path: "(.*)"', listing.read_text(errors="replace"), re.MULTILINE)
        if found is None:
            raise BundleError(f'{listing} has no line model_checkpoint_path: "…"; give PREFIX of PREFIX.index')
        # An absolute path in it is one of the machine that trained.
        return source / Path(found[1]).name
    indices = sorted(source.glob("*.index"))
    if len(indices) != 1:
        raise BundleError(f"{source} has no file `checkpoint` and {len(indices)} *.index; give PREFIX of PREFIX.index")
    return indices[0].with_suffix("")


def _read_index(path: Path) -> tuple[dict[int, int], dict[str, _Entry]]:
    """BundleHeaderProto's numbers, and the entries by name."""
    data = path.read_bytes()
    if len(data) < _FOOTER_BYTES or struct.unpack("<Q", data[-8:])[0] != _MAGIC:
        raise BundleError(
            f"{path} ({len(data)} bytes) does not end as an index of a TensorFlow checkpoint does: it is truncated or"
            f" foreign; {_COPY}"
        )
    try:
        at = len(data) - _FOOTER_BYTES
        for _ in range(2):  # of the index of no use here
            _, at = _varint(data, at)
        entries = {
            key: value
            for _, handle in _pairs(_block(path, data, data[at:]))
            for key, value in _pairs(_block(path, data, handle))
        }
        header = {key: value for key, value in _fields(entries.pop(b"")) if isinstance(value, int)}
        return header, {key.decode(errors="backslashreplace"): _parse(value) for key, value in entries.items()}
    except (IndexError, KeyError, struct.error) as error:
        raise BundleError(
            f"{path} is not laid out as an index of a TensorFlow checkpoint ({error}); {_COPY}"
        ) from error


def _block(path: Path, data: bytes, handle: bytes) -> bytes:
    """The contents of the block at `handle`, two varints: offset and size without the trailer."""
    offset, at = _varint(handle, 0)
    size, _ = _varint(handle, at)
    end = offset + size + _TRAILER_BYTES
    if end > len(data):
        raise BundleError(f"{path} is truncated: it has {len(data)} bytes, a block ends at {end}; {_COPY}")
    compression, stored = struct.unpack_from("<BI", data, offset + size)
    if (found := masked(crc32c(data[offset : offset + size + 1]))) != stored:
        raise BundleError(
            f"{path}: the block at bytes {offset} to {offset + size} has checksum {found:08x}, not {stored:08x}: the"
            f" file is damaged; {_COPY}"
        )
    if compression:
        raise BundleError(
            f"{path} is compressed (kind {compression}, 1 is Snappy), which TensorFlow does not do by itself and this"
            " reader cannot undo; save the checkpoint again with tf.train.Saver"
        )
    return data[offset : offset + size]


def _pairs(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a block; a key is written as what it shares with the one before, and the rest."""
    restarts = struct.unpack_from("<I", block, len(block) - 4)[0]
    end, at, key = len(block) - 4 - 4 * restarts, 0, b""
    while at < end:
        shared, at = _varint(block, at)
        own, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + block[at : at + own]
        yield key, block[at + own : at + own + length]
        at += own + length


def _parse(proto: bytes) -> _Entry:
    values: dict[int, int] = {}
    shape: tuple[int, ...] = ()
    sliced = False
    for number, value in _fields(proto):
        if isinstance(value, int):
            values[number] = value
        elif number == 2:
            dims = [dim for field, dim in _fields(value) if field == 2 and isinstance(dim, bytes)]
            shape = tuple(size for dim in dims for size in [dict(_fields(dim)).get(1, 0)] if isinstance(size, int))
        elif number == 7:
            sliced = True
    kind, shard, offset, size, crc = (values.get(number, 0) for number in (1, 3, 4, 5, 6))
    return _Entry(kind=kind, shape=shape, shard=shard, offset=offset, size=size, crc=crc, sliced=sliced)


def _fields(proto: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of a protocol buffer: numbers as int, messages and strings as bytes."""
    at = 0
    while at < len(proto):
        tag, at = _varint(proto, at)
        match tag & 7:
            case 0:
                value, at = _varint(proto, at)
                yield tag >> 3, value
            case 2:
                length, at = _varint(proto, at)
                yield tag >> 3, proto[at : at + length]
                at += length
            case 1 | 5 as wire:
                width = 8 if wire == 1 else 4
                yield tag >> 3, int.from_bytes(proto[at : at + width], "little")
                at += width
            case wire:
                raise IndexError(f"a field of wire type {wire}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, lowest first, and where the next thing begins."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if byte < 0x80:
            return value, at
