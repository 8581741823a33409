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
from fastsimclr.loaders import Batch, Crops, Loader, Policy, Ragged, ViewParams
from fastsimclr.runtime.device import Mark, Runtime, SideStream

_AHEAD = 2  # batches drawn and shipped ahead; each holds its images on the device
_END = object()


@dataclass(frozen=True, kw_only=True)
class Shipment:
    """One batch on the device: images, the parameters of its V·N views, labels int64 [N]; `ids` stay on the CPU.

    policy: that of the views.
    """

    policy: Policy
    images: Ragged
    params: ViewParams
    labels: Tensor
    ids: Tensor
    shipped: Mark | None = None

    def wait(self) -> None:
        """Order the current stream's work behind the copies, which another stream makes; the host does not wait."""
        if self.shipped is not None:
            values = [getattr(part, field.name) for part in (self.images, self.params) for field in fields(part)]
            self.shipped.wait([self.labels, *(value for value in values if isinstance(value, Tensor))])

    def render(self, dtype: torch.dtype) -> Tensor:
        """The views, [V·N, 3, S, S], channels-last."""
        return make_views(self.images, self.params, **self.policy.rendering, dtype=dtype)


def ship(batch: Batch, crops: Crops, runtime: Runtime) -> Shipment:
    """Draw the parameters of a batch's views, if its loader has not, and move everything to the device."""
    params, device = batch.params or crops.draw(batch.epochs, batch.ids, batch.sizes), runtime.device
    return Shipment(
        policy=crops.policy,
        images=batch.images.to(device, non_blocking=True),
        params=params.to(device, pin=runtime.pins),
        labels=batch.labels.to(device, non_blocking=True),
        ids=batch.ids,
    )


class Feed:
    """Iterates the shipments of a loader, made ahead in a thread. `waited_s` is the time next() blocked.

    crops: the views to draw of each image, those that the loader was given where it cuts them.
    An error in the loader is raised by next(). Close it (or use it as a context manager) to end the thread early.
    """

    def __init__(self, batches: Iterable[Batch], crops: Crops, runtime: Runtime) -> None:
        self.waited_s = 0.0
        self._queue: queue.Queue[object] = queue.Queue(maxsize=_AHEAD)
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._here: Iterator[Shipment] | None = None
        if isinstance(batches, Loader) and batches.exchanges:
            self._here = (ship(batch, crops, runtime) for batch in batches)
            return
        side = runtime.side_stream()  # its copies run beside the step's kernels
        self._thread = threading.Thread(
            target=self._run, args=(batches, crops, runtime, side), name="feed", daemon=True
        )
        self._thread.start()

    def _run(self, batches: Iterable[Batch], crops: Crops, runtime: Runtime, side: SideStream) -> None:
        try:
            side.claim_thread()
            for batch in batches:
                with side.current():
                    shipment = replace(ship(batch, crops, runtime), shipped=side.mark())
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
