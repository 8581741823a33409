"""A small writer of TensorFlow's checkpoint format, so that every kind of file can be made, the wrong ones too."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

MAGIC = 0xDB4775248B80FB57
KINDS = {"float32": 1, "float64": 2, "int32": 3, "string": 7, "int64": 9, "bfloat16": 14, "float16": 19}
Values = Mapping[str, npt.NDArray[np.generic] | torch.Tensor]


def slow_crc32c(data: bytes) -> int:
    """CRC-32C, bit by bit through a table of bytes."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _byte(value: int) -> int:
    for _ in range(8):
        value = (value >> 1) ^ (0x82F63B78 * (value & 1))
    return value


TABLE = [_byte(value) for value in range(256)]


def mask(crc: int) -> int:
    """What LevelDB stores of a CRC: rotated right by 15 bits, plus a constant."""
    return (((crc >> 15) | (crc << 17 & 0xFFFFFFFF)) + 0xA282EAD8) % 2**32


def varint(value: int) -> bytes:
    """Seven bits a byte, lowest first."""
    out = b""
    while value >= 128:
        out += bytes([value % 128 + 128])
        value //= 128
    return out + bytes([value])


def number(field: int, value: int) -> bytes:
    """A protocol buffer's field of an int; 0 is left out, as proto3 does."""
    return varint(field << 3) + varint(value) if value else b""


def message(field: int, content: bytes) -> bytes:
    """A protocol buffer's field of a message."""
    return varint(field << 3 | 2) + varint(len(content)) + content


def block(pairs: list[tuple[bytes, bytes]], compression: int) -> bytes:
    """A LevelDB block with its trailer; keys share prefixes, but for every fourth."""
    out, restarts, last = b"", [], b""
    for position, (key, value) in enumerate(pairs):
        shared = 0
        if position % 4 == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    out += struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts)) + bytes([compression])
    return out + struct.pack("<I", mask(slow_crc32c(out)))


def write_bundle(
    prefix: Path,
    values: Values,
    *,
    shards: int = 1,
    per_block: int = 7,
    header: bytes = b"",
    compression: int = 0,
    kinds: Mapping[str, int] | None = None,
) -> Path:
    """Write PREFIX.index and its data files; tensors take turns among the shards. Returns `prefix`.

    header: more bytes of BundleHeaderProto. compression: what the blocks claim. kinds: a DataType to claim for a name.
    """
    files = [b"" for _ in range(shards)]
    pairs = [(b"", number(1, shards) + header + message(3, number(1, 1)))]
    for position, name in enumerate(sorted(values)):
        value, shard = values[name], position % shards
        if isinstance(value, torch.Tensor):  # bfloat16
            kind, shape, raw = KINDS["bfloat16"], tuple(value.shape), value.view(torch.int16).numpy().tobytes()
        else:
            kind, shape, raw = KINDS[value.dtype.name], value.shape, value.tobytes()
        kind = (kinds or {}).get(name, kind)
        dims = b"".join(message(2, number(1, size)) for size in shape)
        entry = number(1, kind) + message(2, dims) + number(3, shard) + number(4, len(files[shard]))
        entry += number(5, len(raw)) + varint(6 << 3 | 5) + struct.pack("<I", mask(slow_crc32c(raw)))
        pairs.append((name.encode(), entry))
        files[shard] += raw
    for shard, content in enumerate(files):
        prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{shards:05d}").write_bytes(content)
    index, handles = b"", []
    for start in range(0, len(pairs), per_block):
        part = pairs[start : start + per_block]
        written = block(part, compression)
        handles.append((part[-1][0], varint(len(index)) + varint(len(written) - 5)))
        index += written
    footer = b""
    for content in ([], handles):  # the index of what is not there, and that of the blocks
        written = block(content, compression)
        footer += varint(len(index)) + varint(len(written) - 5)
        index += written
    index += footer.ljust(40, b"\0") + struct.pack("<Q", MAGIC)
    prefix.with_name(prefix.name + ".index").write_bytes(index)
    return prefix
