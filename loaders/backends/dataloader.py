"""The torchvision backend, the baseline: torch's DataLoader, whose worker processes decode and crop by Pillow.

The windows are those that `draw` gives. Like torchvision's transforms on Pillow images the resize is antialiased.
"""

# N images of a batch, V views, S side

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pickle import PicklingError

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastsimclr.loaders.arrays import Ints
from fastsimclr.loaders.backends.native import DecodeJob
from fastsimclr.loaders.backends.screen import Screened, screened
from fastsimclr.loaders.batch import Batch
from fastsimclr.loaders.cut import Crops
from fastsimclr.loaders.decode import decode
from fastsimclr.loaders.draw import ViewParams
from fastsimclr.loaders.source import DataError, Source

_METHOD = "forkserver"  # a fork of this process, with its threads, may hang


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a worker makes into one batch: owners int64 [N], plain bool [N], boxes int32 [V, N, 4]."""

    owners: Ints
    plain: npt.NDArray[np.bool_]
    boxes: npt.NDArray[np.int32]


class Views(Dataset[Tensor]):
    """The crops of a task, uint8 [V, N, S, S, 3]; as a data set whose indices are tasks."""

    def __init__(self, source: Source, size: int, max_pixels: int) -> None:
        self.source, self.size, self.max_pixels = source, size, max_pixels

    def __getitem__(self, task: Task) -> Tensor:
        from torchvision.transforms.v2 import functional as v2  # two seconds, which no other backend is to wait

        cuts = torch.empty((len(task.boxes), len(task.owners), self.size, self.size, 3), dtype=torch.uint8)
        for row, owner in enumerate(task.owners.tolist()):
            picture = self._picture(owner, bool(task.plain[row]))
            for view, (top, left, height, width) in enumerate(task.boxes[:, row].tolist()):
                crop = v2.resized_crop(picture, top, left, height, width, [self.size, self.size], antialias=True)
                cuts[view, row] = v2.pil_to_tensor(crop).permute(1, 2, 0)
        return cuts

    def _picture(self, owner: int, plain: bool) -> Image.Image:
        data = self.source.read(owner)
        if isinstance(data, np.ndarray):
            return Image.fromarray(data)
        with suppress(Exception):  # Pillow refuses, in many ways, what strict decoding may still take
            if plain:
                return Image.open(BytesIO(data)).convert("RGB")
        return Image.fromarray(decode(data, self.source.describe(owner), self.max_pixels))


def torchvision_batches(job: DecodeJob) -> Generator[Batch]:
    """The batches of job.plan() with the crops of job.crops. RuntimeError where a worker process dies."""
    assert job.crops is not None  # Loader sees to it
    given = screened(job, data=False)
    tasks = _Tasks(given, job.crops)
    multiprocessing.get_context(_METHOD).set_forkserver_preload([__name__])
    loader: DataLoader[Tensor] = DataLoader(
        Views(job.source, job.crops.policy.size, job.reader.max_pixels),
        batch_sampler=tasks,
        num_workers=job.threads,
        collate_fn=_only,
        pin_memory=job.pin,  # persistent workers are of no use: one pass serves all epochs
        multiprocessing_context=_METHOD,
    )
    try:
        for cuts in _started(loader, job.source):
            found, params = tasks.waiting.popleft()
            yield found.batch(job, cuts, params)
        if tasks.error is not None:
            del loader  # the error refers to this frame: what it holds is left to the garbage collector
            raise tasks.error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RuntimeError(
            f"loader=torchvision: a worker process died ({error}); see the system's log for why (memory?), lower"
            " data.threads, or use loader=native"
        ) from error
    finally:
        given.close()


def _only(cuts: list[Tensor]) -> Tensor:
    return cuts[0]


class _Tasks:
    """The tasks of the batches to come, for the workers; it remembers which batches are on their way.

    An error ends them and is kept: raised within DataLoader it would leave its workers to the garbage collector.
    """

    def __init__(self, given: Iterable[Screened], crops: Crops) -> None:
        self.given, self.crops = given, crops
        self.waiting: deque[tuple[Screened, ViewParams]] = deque()
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[list[Task]]:
        try:
            for found in self.given:
                params = found.draw(self.crops)
                self.waiting.append((found, params))
                boxes = params.crop.view(self.crops.views, len(found.ids), 4).numpy()
                yield [Task(owners=found.owners, plain=found.plain, boxes=boxes)]
        except Exception as error:
            self.error = error


def _started(loader: DataLoader[Tensor], source: Source) -> Iterator[Tensor]:
    try:
        return iter(loader)
    except (TypeError, AttributeError, PicklingError) as error:
        raise DataError(
            f"loader=torchvision sends {source.name} to its worker processes, which failed ({error}); use loader=native"
        ) from error
