"""The numbers of a training: summed on the device, and read from it rarely."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from fastsimclr.runtime.device import Runtime
from fastsimclr.training.feed import Feed


class Meter:
    """Sums metrics on the device between two reads; a read is the loop's only synchronisation.

    Every rank has the same number of images a step, so that the mean over the ranks is that over the global batch.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._dtype = torch.float64 if runtime.precision == "fp64" else torch.float32
        self._feed: Feed | None = None
        self._restart()

    def follow(self, feed: Feed) -> None:
        """Count the waiting of another feed from now on."""
        self._waited += self._waiting()
        self._feed, self._before = feed, feed.waited_s

    def _waiting(self) -> float:
        return 0.0 if self._feed is None else self._feed.waited_s - self._before

    def _restart(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = self._images = 0
        self._since, self._waited = time.perf_counter(), 0.0
        self._before = 0.0 if self._feed is None else self._feed.waited_s

    def add(self, images: int, values: dict[str, Tensor]) -> None:
        """One step: this rank's images, and 0-dim tensors on the device."""
        for key, value in values.items():
            value = value.to(self._dtype)
            self._sums[key] = self._sums[key] + value if key in self._sums else value
        self._steps += 1
        self._images += images

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of probes and checkpoints out of the rates."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Means over steps and ranks since the last read, images/s of all ranks, and the share of waiting."""
        keys, ranks = list(self._sums), self._runtime.ranks
        sums = torch.stack([self._sums[key] for key in keys])
        means = (ranks.total(sums) / (self._steps * ranks.world)).tolist()
        elapsed = time.perf_counter() - self._since
        values = dict(zip(keys, means, strict=True))
        values["images_per_s"] = round(self._images * ranks.world / elapsed, 2)
        values["data_wait_pct"] = round(100 * (self._waited + self._waiting()) / elapsed, 2)
        values["elapsed_s"] = elapsed
        self._restart()
        return values


def shown(values: dict[str, float]) -> dict[str, str]:
    """What the bar shows of a record."""
    texts = {"loss": f"{values['loss']:.3f}"}
    texts |= {key: f"{value:.2f}" for key, value in values.items() if key.endswith(("top1", "agreement"))}
    return texts | {"img/s": f"{values['images_per_s']:.0f}", "wait": f"{values['data_wait_pct']:.0f}%"}
