"""The synthetic backend: ids and labels of the source, noise for pixels: to measure everything but the reading."""

# N images of a batch, V views, S side

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import torch

from fastsimclr.loaders.backends.native import DecodeJob
from fastsimclr.loaders.backends.screen import Screened
from fastsimclr.loaders.batch import Batch, Ragged


def synthetic_batches(job: DecodeJob) -> Generator[Batch]:
    """The batches of job.plan(); nothing is read. An image has data.synthetic_size pixels a side, a crop its policy's.

    All batches share one piece of memory: pixels depend on the row in the batch alone.
    """
    side = job.config.synthetic_size
    noise = torch.empty(0, dtype=torch.uint8)
    for epochs, ids in job.plan():
        n = len(ids)
        needed = 3 * n * (side**2 if job.crops is None else job.crops.views * job.crops.policy.size**2)
        if len(noise) < needed:
            noise = torch.randint(256, (needed,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
            noise = noise.pin_memory() if job.pin else noise
        sizes = np.full((n, 2), side, dtype=np.int32)
        found = Screened(epochs=epochs, ids=ids, owners=ids, sizes=sizes, plain=np.ones(n, dtype=bool), data=[])
        if job.crops is not None:
            size = job.crops.policy.size
            cuts = noise[:needed].view(job.crops.views, n, size, size, 3)
            yield found.batch(job, cuts, found.draw(job.crops))
            continue
        sides = torch.full((n,), side, dtype=torch.int32)
        images = Ragged(
            buffer=noise[:needed], offsets=torch.arange(n) * (3 * side * side), heights=sides, widths=sides.clone()
        )
        yield Batch(
            images=images.pinned() if job.pin else images,
            ids=torch.from_numpy(ids),
            epochs=torch.from_numpy(epochs),
            labels=torch.from_numpy(job.source.labels[ids]),
            sizes=torch.from_numpy(sizes),
        )
