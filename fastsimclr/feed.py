"""From a loader to the device: a thread draws the view parameters and ships images ahead of the step."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsimclr.kernels.views import make_views
from fastsimclr.loaders import Batch, Policy, Ragged, ViewParams, draw
from fastsimclr.runtime import Runtime

_AHEAD = 2  # batches drawn and shipped ahead; each holds its images on the device
_END = object()


@dataclass(frozen=True, kw_only=True)
class Shipment:
    """One batch on the device: images, the parameters of its V·N views, labels int64 [N]; `ids` stay on the CPU."""

    images: Ragged
    params: ViewParams
    labels: Tensor
    ids: Tensor

    def views(self, policy: Policy, dtype: torch.dtype) -> Tensor:
        """The views, [V·N, 3, S, S], channels-last."""
        return make_views(self.images, self.params, **policy.rendering, dtype=dtype)


def ship(batch: Batch, policy: Policy, seed: int, views: int, device: torch.device) -> Shipment:
    """Draw the parameters of a batch's views and move everything to the device."""
    params = draw(policy, seed, batch.epochs, batch.ids, views, batch.sizes)
    return Shipment(
        images=batch.images.to(device, non_blocking=True),
        params=params.to(device, non_blocking=True),
        labels=batch.labels.to(device, non_blocking=True),
        ids=batch.ids,
    )


class Feed:
    """Iterates the shipments of a loader, made ahead in a thread. `waited_s` is the time next() blocked.

    An error in the loader is raised by next(). Close it (or use it as a context manager) to end the thread early.
    """

    def __init__(self, batches: Iterable[Batch], policy: Policy, *, seed: int, views: int, runtime: Runtime) -> None:
        self.waited_s = 0.0
        self._queue: queue.Queue[object] = queue.Queue(maxsize=_AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(batches, policy, seed, views, runtime.device), name="feed", daemon=True
        )
        self._thread.start()

    def _run(self, batches: Iterable[Batch], policy: Policy, seed: int, views: int, device: torch.device) -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # the current device is each thread's own
            for batch in batches:
                if not self._put(ship(batch, policy, seed, views, device)):
                    return
            self._put(_END)
        except BaseException as error:  # handed to the consumer, whatever it is
            self._put(error)

    def _put(self, item: object) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[Shipment]:
        return self

    def __next__(self) -> Shipment:
        start = time.perf_counter()
        item = self._queue.get()
        self.waited_s += time.perf_counter() - start
        if isinstance(item, BaseException):
            raise item
        if item is _END:
            raise StopIteration
        assert isinstance(item, Shipment)
        return item

    def close(self) -> None:
        """End the thread; what it had prepared is dropped."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
