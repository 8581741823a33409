"""Crops cut on the CPU straight out of decoded images in memory: whole runs of a batch at a time, in threads."""

# n images, N images of a batch, V views, S side

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from fastsimclr.loaders.backends.native import AHEAD, Buffers, Ints, Pixels
from fastsimclr.loaders.batch import Batch, Ragged
from fastsimclr.loaders.cut import Crops, Sizes, as_cut, cut_many


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
    begun: deque[tuple[list[Future[None]], Batch]] = deque()

    def begin(epochs: Ints, ids: Ints) -> tuple[list[Future[None]], Batch]:
        n, those = len(ids), sizes[ids]
        params = crops.draw(epochs, ids, those)
        buffer = buffers.take(crops.views * n * 3 * side * side, False)
        out = buffer.numpy().reshape(crops.views, n, side, side, 3)
        job = (memory, starts[ids], those, params.crop.view(crops.views, n, 4).numpy(), out)
        run = max(1, -(-n // (2 * threads)))
        tasks = [pool.submit(cut_many, *job, slice(k, min(k + run, n))) for k in range(0, n, run)]
        sides = torch.full((crops.views * n,), side, dtype=torch.int32)
        offsets = torch.arange(crops.views * n) * (3 * side * side)
        batch = Batch(
            images=Ragged(buffer=buffer, offsets=offsets, heights=sides, widths=sides),
            ids=torch.from_numpy(ids),
            epochs=torch.from_numpy(epochs),
            labels=torch.from_numpy(labels[ids]),
            sizes=torch.from_numpy(those),
            params=as_cut(params, side),
        )
        return tasks, batch

    def finished() -> Batch:
        tasks, batch = begun.popleft()
        for task in tasks:
            task.result()
        return batch

    try:
        for epochs, ids in plan:
            begun.append(begin(epochs, ids))
            if len(begun) > AHEAD:
                yield finished()
        while begun:
            yield finished()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
