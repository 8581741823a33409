"""The order of the samples: a permutation for each (seed, epoch) that needs no state, and each rank's part of it."""

# n images, B global batch, W ranks

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fastsimclr.loaders.philox import philox4x32

Ints = npt.NDArray[np.int64]

# Views count up from 0 in the same counter word (draw.py), so the last value is free for the order.
ORDER_WORD = 0xFFFF_FFFF


def epoch_order(n: int, seed: int, epoch: int) -> Ints:
    """The permutation of 0..n-1 in which epoch `epoch` visits the images, int64 [n].

    Each id gets a 64-bit key, Philox4x32-10 (Salmon et al. 2011) of (seed, epoch, id); ids are sorted by key.
    seed and epoch are in 0..2**32-1, n in 0..2**32-1.
    """
    if not (0 <= seed < 2**32 and 0 <= epoch < 2**32):
        raise ValueError(f"seed={seed} and epoch={epoch} must be in 0..{2**32 - 1}, the words of the generator's key")
    counter = np.zeros((n, 4), dtype=np.uint32)
    counter[:, 0] = np.arange(n, dtype=np.uint32)
    counter[:, 2] = ORDER_WORD
    words = philox4x32(counter, (seed, epoch)).astype(np.uint64)
    return np.argsort((words[:, 0] << np.uint64(32)) | words[:, 1], kind="stable").astype(np.int64)


class Order:
    """The permutations of epoch 0, 1, 2, ... of n images, end to end; the last two are kept."""

    def __init__(self, n: int, seed: int) -> None:
        self.n = n
        self.seed = seed
        self._kept: dict[int, Ints] = {}

    def at(self, start: int, stop: int) -> tuple[Ints, Ints]:
        """(epochs, ids) of positions start..stop-1, both int64 [stop - start]; the epoch of a position is pos // n."""
        positions = np.arange(start, stop, dtype=np.int64)
        epochs = positions // self.n
        ids = np.empty_like(positions)
        for epoch in range(start // self.n, -(-stop // self.n)):
            here = slice(max(epoch * self.n, start) - start, min((epoch + 1) * self.n, stop) - start)
            ids[here] = self._epoch(epoch)[positions[here] - epoch * self.n]
        return epochs, ids

    def _epoch(self, epoch: int) -> Ints:
        if epoch not in self._kept:
            if len(self._kept) == 2:
                del self._kept[min(self._kept)]
            self._kept[epoch] = epoch_order(self.n, self.seed, epoch)
        return self._kept[epoch]


def steps_per_run(n: int, epochs: int, batch: int) -> int:
    """Steps in a run: n * epochs // batch + 1, Google's rule (google-research/simclr, model_util.get_train_steps)."""
    return n * epochs // batch + 1


def rank_positions(step: int, batch: int, rank: int = 0, world: int = 1) -> tuple[int, int]:
    """(start, stop) of a rank's positions in step `step` of global batch `batch`.

    The global batch takes positions [step * B, (step + 1) * B); a rank takes the rank-th of W equal runs of them.
    """
    if batch < 1 or world < 1 or batch % world:
        remedy = max(batch - batch % world, world) if world > 0 else batch
        raise ValueError(f"global_batch={batch} is not divisible by world_size={world}; use {remedy}")
    if not 0 <= rank < world:
        raise ValueError(f"rank={rank} must be in 0..{world - 1} for world_size={world}")
    part = batch // world
    start = step * batch + rank * part
    return start, start + part
