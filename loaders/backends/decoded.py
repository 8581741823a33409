"""Crops cut on the CPU straight out of decoded images in memory: whole runs of a batch at a time, in threads."""

# n images, N images of a batch, V views, S side

from __future__ import annotations

from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from fastsimclr.loaders.ahead import ahead
from fastsimclr.loaders.arrays import Ints, Pixels
from fastsimclr.loaders.backends.native import AHEAD, Buffers
from fastsimclr.loaders.batch import Batch
from fastsimclr.loaders.cut import Crops, Sizes, cut_many


def cut_batches(
    plan: Iterable[tuple[Ints, Ints]],
    crops: Crops,
    memory: Pixels,
    starts: Ints,
    sizes: Sizes,
    labels: Ints,
    threads: int,
) -> Generator[Batch]:
    """The batches of `plan`, (epochs, ids) int64 [N] each, as finished crops; AHEAD of them in the making.

    memory: uint8, flat, in which image i begins at starts[i] (int64 [n]) and has sizes[i] (int32 [n, 2]) pixels.
    labels: int64 [n]. The threads end with the generator.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="cut")
    buffers, side = Buffers(), crops.policy.size

    def begin(epochs: Ints, ids: Ints) -> tuple[list[Future[None]], Batch]:
        n, those = len(ids), sizes[ids]
        params = crops.draw(epochs, ids, those)
        cuts = buffers.take(crops.views * n * 3 * side * side, False).view(crops.views, n, side, side, 3)
        job = (memory, starts[ids], those, params.crop.view(crops.views, n, 4).numpy(), cuts.numpy())
        run = max(1, -(-n // (2 * threads)))
        tasks = [pool.submit(cut_many, *job, slice(k, min(k + run, n))) for k in range(0, n, run)]
        mine = labels[ids]
        batch = Batch.of_crops(cuts, params, ids=ids, epochs=epochs, labels=mine, sizes=those, pin=False)
        return tasks, batch

    def finished(begun: tuple[list[Future[None]], Batch]) -> Batch:
        tasks, batch = begun
        for task in tasks:
            task.result()
        return batch

    with ahead(pool, (begin(epochs, ids) for epochs, ids in plan), AHEAD) as batches:
        yield from map(finished, batches)  # no name for a batch: it would hold its memory
