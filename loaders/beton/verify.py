"""Every blob of a .beton file held against its checksum and decoded strictly, by many threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from fastsimclr.loaders.ahead import ahead
from fastsimclr.loaders.beton.reader import BetonSource
from fastsimclr.loaders.decode import decode
from fastsimclr.loaders.source import DataError

CHUNK = 64  # images checked by one task
_ANY = 2**62  # pixels: the table has told the size


def damaged_blobs(
    source: BetonSource, threads: int, *, decoding: bool, tick: Callable[[], None] = lambda: None
) -> Iterator[tuple[int, str]]:
    """(id, reason) of each image whose checksum is wrong, or which does not decode to the size in the table, in order.

    Without a sidecar there are no checksums, and only decoding tells. tick: called every 64 images; what it raises ends
    the check.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="verify")

    def begun() -> Iterator[Future[list[tuple[int, str]]]]:
        for start in range(0, len(source), CHUNK):
            tick()
            yield pool.submit(_check, source, range(start, min(start + CHUNK, len(source))), decoding)

    with ahead(pool, begun(), 2 * threads) as checks:
        for check in checks:
            yield from check.result()


def _check(source: BetonSource, ids: range, decoding: bool) -> list[tuple[int, str]]:
    found = []
    for index in ids:
        try:
            data = source.read(index)  # the first read of an image is held against its checksum
            if not decoding or not isinstance(data, bytes):
                continue
            size = decode(data, source.describe(index), _ANY).shape[:2]
            if not np.array_equal(size, source.pixel_sizes[index]):
                told = " x ".join(map(str, source.pixel_sizes[index].tolist()))
                raise DataError(f"it decodes to {size[0]} x {size[1]} pixels, not to {told}")
        except (DataError, OSError) as error:
            found.append((index, str(error)))
    return found
