"""The ffcv backend: FFCV's own Loader and decoder on a .beton file, in our order.

Its decoder draws its own windows, not to be repeated, with the policy's scale and ratio; all other draws are ours.
Passes over centre crops are read natively: FFCV's centre crop rounds otherwise. What is no plain JPEG is cut natively.
"""

# N images of a batch, V views, S side, n images of a source

from __future__ import annotations

from collections.abc import Generator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsimclr.loaders.arrays import Ints, Pixels
from fastsimclr.loaders.backends.native import Buffers, DecodeJob, native_batches
from fastsimclr.loaders.backends.screen import Screened, largest_batch, screened
from fastsimclr.loaders.batch import Batch
from fastsimclr.loaders.beton.reader import BetonSource
from fastsimclr.loaders.cut import cut
from fastsimclr.loaders.draw import Policy
from fastsimclr.loaders.sets.basic import Relabelled, Subset
from fastsimclr.loaders.source import DataError, Source

INSTALL = (
    "apt-get install libopencv-dev libturbojpeg0-dev pkg-config build-essential && pip install ffcv"
    " (a C++ compiler builds it)"
)


def beton_rows(source: Source) -> tuple[Path, Ints]:
    """(the .beton file, the row of each image in it, int64 [n]) of a source of packed images. DataError for others."""
    if isinstance(source, BetonSource):
        return source.path, np.arange(len(source))
    if isinstance(source, Relabelled):
        return beton_rows(source.base)
    if isinstance(source, Subset):
        path, rows = beton_rows(source.base)
        return path, rows[source.indices]
    raise DataError(
        f"loader=ffcv reads .beton files only, not {source.name}; fastsimclr pack SRC DST.beton, then"
        " --data.source beton --data.root DST.beton; or use loader=native"
    )


def ffcv_batches(job: DecodeJob) -> Generator[Batch]:
    """The batches of job.plan() with V random crops each; what FFCV raises is raised here."""
    assert job.crops is not None  # Loader sees to it
    crops, side = job.crops, job.crops.policy.size
    if crops.policy.crop != "random" or crops.policy.one_branch:
        yield from native_batches(job)
        return
    path, rows = beton_rows(job.source)
    given, reading, buffers = screened(job, data=False), None, Buffers()
    try:
        for found in given:
            n = len(found.ids)
            if reading is None:
                reading = _Reading(path, crops.policy, crops.views, largest_batch(job), job.threads)
            params = found.draw(crops)
            cuts = buffers.take(crops.views * n * 3 * side * side, job.pin).view(crops.views, n, side, side, 3)
            if found.plain.any():
                # Whatever FFCV cannot decode it leaves as it finds it: such rows are given to it as another image.
                asked = np.where(found.plain, found.owners, found.owners[found.plain][0])
                for view, pixels in enumerate(reading.views(rows[asked])):
                    cuts.numpy()[view] = pixels
            for k in np.flatnonzero(~found.plain).tolist():
                _cut_natively(job, found, k, params.crop.view(crops.views, n, 4)[:, k].tolist(), cuts.numpy())
            yield found.batch(job, cuts, params)
    finally:
        given.close()


def _cut_natively(job: DecodeJob, batch: Screened, k: int, boxes: list[list[int]], cuts: Pixels) -> None:
    owner = int(batch.owners[k])
    if (pixels := job.reader.read(owner)) is None:
        raise DataError(
            f"{job.reader.damage.bad[owner]}; it was sound at its first visit, so the file changed meanwhile"
        )
    for view, (top, left, height, width) in enumerate(boxes):
        cut(pixels, (top, left, height, width), cuts[view, k])


class _Reading:
    """FFCV's compiled pipeline for batches of up to `largest` images.

    It is run in the thread that asks, batch by batch: FFCV's own iterator reads ahead in a thread whose failure nobody
    would hear of, and wants the whole order beforehand, which damaged images can still change. Feed reads ahead.
    """

    def __init__(self, path: Path, policy: Policy, views: int, largest: int, threads: int) -> None:
        numba: Any = import_module("numba")
        iterator: Any = import_module("ffcv.loader.epoch_iterator").EpochIterator
        self._threads = min(threads, numba.config.NUMBA_NUM_THREADS)
        self._set_threads = numba.set_num_threads
        torch_threads = torch.get_num_threads()  # FFCV sets them to its own
        try:
            loader = _loader(path, policy.size, policy.scale, policy.ratio, views, largest, self._threads)
            threadless: Any = type("Threadless", (iterator,), {"start": lambda self: None})
            self._batches = threadless(loader, np.zeros(0, dtype=np.uint64))
        finally:
            torch.set_num_threads(torch_threads)

    def views(self, rows: Ints) -> tuple[Pixels, ...]:
        """V arrays uint8 [N, S, S, 3] of the images at `rows` (int64 [N]); the next call overwrites them."""
        self._set_threads(self._threads)  # numba's count is each thread's own
        result: tuple[Pixels, ...] = self._batches.run_pipeline(0, rows.astype(np.uint64), 0, None)
        return result


@cache
def _loader(
    path: Path, size: int, scale: tuple[float, float], ratio: tuple[float, float], views: int, batch: int, threads: int
) -> Any:
    """FFCV's Loader, kept: compiling takes seconds, and numba (0.68) fails while it forgets what it compiled."""
    fields, loaders = import_module("ffcv.fields.rgb_image"), import_module("ffcv.loader")
    specs, reader = import_module("ffcv.pipeline.pipeline_spec"), import_module("ffcv.reader")
    handlers = reader.Reader(str(path), {}).handlers
    images = [name for name, handler in handlers.items() if isinstance(handler, fields.RGBImageField)]
    image = "image" if "image" in images else images[0]  # as BetonSource chooses
    pipelines: dict[str, Any] = dict.fromkeys(handlers)  # None: not read
    for view in range(views):
        decoder = fields.RandomResizedCropRGBImageDecoder((size, size), scale, ratio)
        pipelines[f"view{view}"] = specs.PipelineSpec(image, decoder=decoder, transforms=[])
    return loaders.Loader(
        str(path),
        batch_size=batch,
        num_workers=threads,
        os_cache=True,  # the ranks of a machine share the page cache
        order=loaders.OrderOption.SEQUENTIAL,
        pipelines=pipelines,
        drop_last=False,
        batches_ahead=0,
        seed=0,
    )
