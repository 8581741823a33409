"""From a loader to the device: a thread draws the view parameters and ships images ahead of the step.

Where the ranks exchange their images (fastsimclr.loaders.backends.sharded) all of it happens in the thread that trains.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fastsimclr.kernels.views import make_views
from fastsimclr.loaders import Batch, Loader, Policy, Ragged, ViewParams, draw
from fastsimclr.runtime.device import Runtime

_AHEAD = 2  # batches drawn and shipped ahead; each holds its images on the device
_END = object()


@dataclass(frozen=True, kw_only=True)
class Shipment:
    """One batch on the device: images, the parameters of its V·N views, labels int64 [N]; `ids` stay on the CPU."""

    images: Ragged
    params: ViewParams
    labels: Tensor
    ids: Tensor
    shipped: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Order the work of the current stream behind the copies, which another stream makes; the host does not wait.

        The memory is then not given to other tensors before the current stream's work with it is done.
        """
        if self.shipped is None:
            return
        stream = torch.cuda.current_stream()
        stream.wait_event(self.shipped)
        for part in (self.images, self.params):
            for field in fields(part):
                value = getattr(part, field.name)
                if isinstance(value, Tensor) and value.is_cuda:
                    value.record_stream(stream)
        self.labels.record_stream(stream)

    def views(self, policy: Policy, dtype: torch.dtype) -> Tensor:
        """The views, [V·N, 3, S, S], channels-last."""
        return make_views(self.images, self.params, **policy.rendering, dtype=dtype)


def ship(batch: Batch, policy: Policy, seed: int, views: int, device: torch.device) -> Shipment:
    """Draw the parameters of a batch's views, if its loader has not, and move everything to the device."""
    params = batch.params or draw(policy, seed, batch.epochs, batch.ids, views, batch.sizes)
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
        if isinstance(batches, Loader) and (batches.always_cuts or runtime.device.type == "cpu"):
            batches.cut(policy, seed, views)
        device = runtime.device
        self._thread: threading.Thread | None = None
        self._here: Iterator[Shipment] | None = None
        if isinstance(batches, Loader) and batches.exchanges:
            self._here = (ship(batch, policy, seed, views, device) for batch in batches)
            return
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())  # of this thread; the other has its own
        self._thread = threading.Thread(
            target=self._run, args=(batches, policy, seed, views, device), name="feed", daemon=True
        )
        self._thread.start()

    def _run(self, batches: Iterable[Batch], policy: Policy, seed: int, views: int, device: torch.device) -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # the current device is each thread's own
            # Copies on a stream of their own run beside the step's kernels; None where there are no streams.
            side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
            for batch in batches:
                with torch.cuda.stream(side):
                    shipment = ship(batch, policy, seed, views, device)
                    if side is not None:
                        shipment = replace(shipment, shipped=side.record_event())
                if not self._put(shipment):
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
        item = self._queue.get() if self._here is None else next(self._here, _END)
        self.waited_s += time.perf_counter() - start
        if isinstance(item, BaseException):
            raise item
        if item is _END:
            raise StopIteration
        assert isinstance(item, Shipment)
        item.wait()
        return item

    def close(self) -> None:
        """End the thread; what it had prepared is dropped."""
        self._closed.set()
        self._here = None
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
