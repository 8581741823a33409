"""A data set held decoded in memory: read once, after which a batch is a list of ids."""

# n images, N images of a batch

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastsimclr.loaders.batch import Batch, Ragged
from fastsimclr.loaders.data import DataConfig
from fastsimclr.loaders.decode import image_size
from fastsimclr.loaders.faults import Reader
from fastsimclr.loaders.source import DataError, Source

Ints = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]

LOG = logging.getLogger("fastsimclr")
GIB = 2**30
CHUNK = 64  # images decoded by one task
SAMPLE = 256  # images whose sizes stand for all
HEADROOM = 1.05  # on the estimate from a sample


def thread_count(asked: int) -> int:
    """`asked`, or one thread for each core this process may use where it is 0."""
    if asked:
        return asked
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def offsets_of(sizes: Tensor) -> Tensor:
    """Where each image begins in a buffer that holds all in order. sizes: int32 [n, 2], pixels; int64 [n], bytes."""
    lengths = 3 * sizes[:, 0].long() * sizes[:, 1].long()
    return lengths.cumsum(0) - lengths


class Resident:
    """The n images of `source` decoded in one buffer on a device, with their sizes and labels on the host.

    A damaged image has the pixels, size and label of the next readable one. bad: {id: reason}.
    images: n rows on the device. sizes: int32 [n, 2]. labels: int64 [n]. readable: bool [n], numpy.
    """

    name = "resident"

    def __init__(self, source: Source, images: Ragged, sizes: Tensor, labels: Tensor, bad: dict[int, str]) -> None:
        self.source = source
        self.images = images
        self.sizes = sizes
        self.labels = labels
        self.bad = bad
        self.readable = np.ones(len(source), dtype=bool)
        self.readable[list(bad)] = False

    def batch(self, epochs: Ints, ids: Ints, stand_in: bool) -> Batch:
        """The images at `ids` (int64 [N]) as rows of the buffer; damaged ones left out unless others stand in."""
        if not stand_in:
            epochs, ids = epochs[self.readable[ids]], ids[self.readable[ids]]
        index = torch.from_numpy(ids)
        device = self.images.buffer.device
        there = index if device.type == "cpu" else index.pin_memory().to(device, non_blocking=True)
        return Batch(
            images=self.images.select(there),
            ids=index,
            epochs=torch.from_numpy(epochs),
            labels=self.labels[index],
            sizes=self.sizes[index],
        )


def hold(
    source: Source,
    config: DataConfig,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
    *,
    free: int | None = None,
) -> Resident | None:
    """`source` decoded on `device`, or None where config.loader is "auto" and it does not fit, or one that reads.

    progress: called with (images done, n). free: bytes to reckon with, measured where None.
    Raises DataError where it must fit and does not, or too much is damaged.
    """
    if config.loader not in ("auto", "resident") or not len(source):
        return None
    limit = int(config.resident_gib * GIB) or (free_bytes(device) if free is None else free) // 2
    reader = Reader(source, config.max_bad_fraction, config.max_pixels)
    # Shards that do not fit their cache are not fetched to learn their images' sizes.
    needed = _estimate(reader) if getattr(source, "whole_fits", True) else 2**63
    if needed > limit:
        text = f"{source.name} takes {needed / GIB:.2f} GiB decoded, over the limit of {limit / GIB:.2f} GiB a process"
        if config.loader == "resident":
            raise DataError(f"data.loader=resident, but {text} on {device}; use auto or raise data.resident_gib")
        LOG.info("%s: not held in memory", text)
        return None
    return _decode_all(reader, needed, device, thread_count(config.threads), progress)


def _estimate(reader: Reader) -> int:
    """Bytes of all images decoded, from the sizes of up to 256 spread over the source; exact where those are all."""
    n = len(reader.source)
    if (sizes := getattr(reader.source, "pixel_sizes", None)) is not None:
        return 3 * int(sizes.prod(axis=1, dtype=np.int64).sum())
    ids = np.unique(np.linspace(0, n - 1, min(n, SAMPLE)).astype(np.int64))
    areas = [area for index in ids if (area := _area(reader, int(index)))]
    if not areas:
        return 0
    alike = len(ids) == n or min(areas) == max(areas)
    return int(np.ceil(3 * n * np.mean(areas) * (1 if alike else HEADROOM)))


def _area(reader: Reader, index: int) -> int:
    """Pixels of an image; 0 where it is damaged, which the decoding will count."""
    try:
        data = reader.source.read(index)
        size = data.shape[:2] if isinstance(data, np.ndarray) else image_size(data, "", reader.max_pixels)
    except (DataError, OSError):
        return 0
    return int(size[0]) * int(size[1])


def _decode_all(
    reader: Reader, needed: int, device: torch.device, threads: int, progress: Callable[[int, int], None] | None
) -> Resident:
    n = len(reader.source)
    sizes = torch.zeros((n, 2), dtype=torch.int32)
    owners = torch.arange(n)
    buffer = torch.empty(needed, dtype=torch.uint8, device=device)
    used = 0
    starts = deque(range(0, n, CHUNK))
    running: deque[tuple[int, Future[list[Pixels | None]]]] = deque()

    def decode(start: int) -> list[Pixels | None]:
        return [reader.read(index) for index in range(start, min(start + CHUNK, n))]

    with ThreadPoolExecutor(threads, thread_name_prefix="resident") as pool:
        try:
            while starts or running:
                while starts and len(running) < 2 * threads:
                    running.append((starts[0], pool.submit(decode, starts.popleft())))
                start, future = running.popleft()
                pixels = future.result()
                sizes[start : start + len(pixels)] = torch.tensor(
                    [p.shape[:2] if p is not None else (0, 0) for p in pixels]
                )
                flat = np.concatenate([p.reshape(-1) for p in pixels if p is not None] or [np.empty(0, np.uint8)])
                if used + flat.size > buffer.numel():  # the sample was too small
                    buffer = torch.cat([buffer[:used], buffer.new_empty(flat.size + buffer.numel() // 4)])
                buffer[used : used + flat.size].copy_(torch.from_numpy(flat))
                used += flat.size
                if progress:
                    progress(start + len(pixels), n)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    for index in 2 * sorted(reader.bad, reverse=True):  # from the end, and twice, for a run that goes past the end
        owners[index] = owners[(index + 1) % n]
    offsets = offsets_of(sizes)[owners]
    sizes = sizes[owners]
    images = Ragged(
        buffer=buffer[:used], offsets=offsets, heights=sizes[:, 0].contiguous(), widths=sizes[:, 1].contiguous()
    )
    labels = torch.tensor(reader.source.labels)[owners]
    return Resident(reader.source, images.to(device), sizes, labels, reader.bad)


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
