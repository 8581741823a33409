"""Where decoded images are held: in the memory of a device, or in memory that all ranks of a machine share."""

# n images, p images of this rank's part

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastsimclr.loaders.ahead import ahead
from fastsimclr.loaders.arrays import Pixels
from fastsimclr.loaders.backends.sharded import Peers
from fastsimclr.loaders.faults import Reader
from fastsimclr.loaders.shards.cache import GIB
from fastsimclr.loaders.source import DataError

CHUNK = 64  # images decoded by one task


class Room(Protocol):
    """Memory that images are put into, one after another, and then read from."""

    def put(self, images: Sequence[Pixels]) -> list[int]: ...
    def filled(self) -> Tensor: ...


class DeviceRoom:
    """A buffer of `expected` bytes on `device`, which grows where that was too little."""

    def __init__(self, device: torch.device, expected: int) -> None:
        self._buffer = torch.empty(expected, dtype=torch.uint8, device=device)
        self._used = 0

    def put(self, images: Sequence[Pixels]) -> list[int]:
        """Where each of `images`, of which there is one at least, begins, in bytes."""
        flat = np.concatenate([pixels.reshape(-1) for pixels in images])
        if self._used + flat.size > self._buffer.numel():
            larger = self._larger(self._used + flat.size + self._buffer.numel() // 16)
            larger[: self._used] = self._buffer[: self._used]  # no more, for pages never written take no memory
            self._buffer = larger
        self._buffer[self._used : self._used + flat.size].copy_(torch.from_numpy(flat))
        ends = self._used + np.cumsum([pixels.size for pixels in images])
        self._used += flat.size
        return [int(end) - pixels.size for end, pixels in zip(ends, images, strict=True)]

    def _larger(self, count: int) -> Tensor:
        try:
            return self._buffer.new_empty(count)
        except RuntimeError as error:  # of any device's allocator
            raise DataError(
                f"the decoded images take more than the {self._buffer.numel()} bytes estimated, and {count} bytes more"
                f" are not free on {self._buffer.device}; lower data.resident_gib, or set data.loader=native"
            ) from error

    def filled(self) -> Tensor:
        """uint8 [bytes], all that was put in."""
        if self._buffer.device.type != "cpu":  # for streams other than the one that copied
            torch.get_device_module(self._buffer.device).synchronize(self._buffer.device)
        return self._buffer[: self._used]


class HostRoom:
    """One buffer of all ranks of a machine: each puts its images in, and when all have, each reads all of them.

    It has no name in the file system, so that nothing is left of it when the last rank ends, however that comes about.
    How long it gets is nobody's to know before the last image is decoded: so each rank takes every local_world-th
    extent of it, as many as it needs, and what it leaves of an extent takes no memory.
    Every rank makes one at the same place. DataError on every rank where one cannot reach the memory of its machine.
    """

    def __init__(self, peers: Peers, max_pixels: int) -> None:
        self._place, self._stride = peers.local_rank, peers.local_world
        self._extent = max(GIB, 3 * max_pixels)  # an image lies in one
        self._used = 0
        self._file, path, failure = -1, "", None
        try:
            if peers.local_rank == 0:
                self._file, path = _unnamed()
        except OSError as error:
            failure = str(error)
        paths = peers.gather(path)
        try:
            if self._file < 0 and (path := paths[peers.rank - peers.local_rank]):
                self._file = os.open(path, os.O_RDWR)
        except OSError as error:
            failure = f"{path}: {error.strerror}"
        failures = peers.gather(failure)
        if peers.local_rank == 0 and path and not path.startswith("/proc/"):
            os.unlink(path)
        for rank, said in enumerate(failures):
            if said is not None:
                if self._file >= 0:
                    os.close(self._file)
                raise DataError(f"rank {rank} cannot share memory with the ranks of its machine: {said}")

    def put(self, images: Sequence[Pixels]) -> list[int]:
        """Where each of `images` begins, in bytes. Raises OSError where memory is used up."""
        return [self._put(np.ascontiguousarray(pixels)) for pixels in images]

    def _put(self, pixels: Pixels) -> int:
        if self._used % self._extent + pixels.size > self._extent:
            self._used += -self._used % self._extent
        turn, within = divmod(self._used, self._extent)
        start = (turn * self._stride + self._place) * self._extent + within
        # Written as to a file: it grows as needed, and an error comes where a store to mapped memory would kill.
        rest, position = pixels.data.cast("B"), start
        while rest:
            try:
                count = os.pwrite(self._file, rest, position)
            except OSError as error:
                raise DataError(
                    f"the decoded images need more memory than this machine has free ({error.strerror});"
                    " lower data.resident_gib, or set data.loader=native"
                ) from error
            rest, position = rest[count:], position + count
        self._used += pixels.size
        return start

    def filled(self) -> Tensor:
        """uint8 [bytes], what all ranks of the machine have put in; ask once, when all have."""
        shared = mmap.mmap(self._file, os.fstat(self._file).st_size)
        os.close(self._file)
        return torch.frombuffer(shared, dtype=torch.uint8)


def _unnamed() -> tuple[int, str]:
    """A file in memory, and the path by which another process of the user opens it; to be unlinked if not in /proc."""
    if hasattr(os, "memfd_create"):  # unlike /dev/shm, which a container cuts to 64 MiB
        file = os.memfd_create("fastsimclr")
        return file, f"/proc/{os.getpid()}/fd/{file}"
    return tempfile.mkstemp(prefix="fastsimclr-")  # not Linux


def decode_into(
    room: Room, reader: Reader, ids: range, threads: int, progress: Callable[[int, int], None] | None
) -> tuple[Tensor, Tensor]:
    """Decode images `ids` into `room`: (sizes int32 [p, 2], where each begins int64 [p]), 0 where damaged.

    progress: called with (images done, p).
    """
    sizes = torch.zeros((len(ids), 2), dtype=torch.int32)
    offsets = torch.zeros(len(ids), dtype=torch.int64)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="resident")

    def decode(start: int) -> list[Pixels | None]:
        return [reader.read(index) for index in ids[start : start + CHUNK]]

    done = 0
    with ahead(pool, (pool.submit(decode, k) for k in range(0, len(ids), CHUNK)), 2 * threads - 1) as chunks:
        for chunk in chunks:
            pixels = chunk.result()
            sound = [k for k, found in enumerate(pixels, done) if found is not None]
            readable = [found for found in pixels if found is not None]
            if readable:
                sizes[sound] = torch.tensor([found.shape[:2] for found in readable], dtype=torch.int32)
                offsets[sound] = torch.tensor(room.put(readable))
            done += len(pixels)
            if progress:
                progress(done, len(ids))
    return sizes, offsets


def free_bytes(device: torch.device) -> int:
    """Memory free on `device` in bytes; for the CPU what the process's control group leaves it."""
    if device.type != "cpu":
        return int(torch.get_device_module(device).mem_get_info(device)[0])
    lines = _table(Path("/proc/meminfo"))
    if "MemAvailable:" not in lines:  # not Linux: half of what is built in
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    free = lines["MemAvailable:"] * 1024
    group = Path("/sys/fs/cgroup")
    limit, stat = group / "memory.max", _table(group / "memory.stat")
    if limit.is_file() and (text := limit.read_text().strip()).isdecimal() and "inactive_file" in stat:
        taken = int((group / "memory.current").read_text()) - stat["inactive_file"]
        free = min(free, max(int(text) - taken, 0))
    return free


def _table(path: Path) -> dict[str, int]:
    """A kernel file of lines "name number ..." as a dict; empty where there is no such file."""
    if not path.is_file():
        return {}
    rows = [line.split() for line in path.read_text().splitlines()]
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}
