"""One pass of a network over image files of any number, in flat memory, that can be stopped cleanly."""

# N images of a batch, C outputs

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastsimclr.deploy.images import open_images
from fastsimclr.deploy.origin import Origin, Precision, open_run
from fastsimclr.loaders import Crops, DataConfig, EvalLoader
from fastsimclr.runs.log import logger
from fastsimclr.runs.stop import StopFlag, Stopped
from fastsimclr.training.feed import ship


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """What `embed` and `predict` have in common."""

    run: str
    """Run folder of a stage that trains, or a checkpoint in one."""
    images: str
    """Folder of images with its sub-folders, or a text file with one path a line."""
    out: str
    """The file to write."""
    overwrite: bool = False
    """Replace the file where it exists."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda or cuda:N."""
    precision: Precision | None = None
    """Autocast precision; null: that of the run's recipe."""
    batch: int = 256
    """Images at a time."""
    threads: int = 0
    """Threads that read and decode; 0 takes one for each core."""
    max_bad_fraction: float | None = None
    """Share of damaged images above which it stops; null: that of the run's recipe. Up to it, they are left out."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"--batch={self.batch} must be 1 or more; 256 is usual")


class Pass:
    """The images of a stream and their way through the network; `paths` and `labels` belong to them."""

    def __init__(self, config: StreamConfig) -> None:
        self.origin: Origin = open_run(Path(config.run), config.device, config.precision)
        self.source = open_images(Path(config.images))
        limit = self.origin.max_bad_fraction if config.max_bad_fraction is None else config.max_bad_fraction
        self._loader = EvalLoader(
            self.source,
            DataConfig(
                source="folder",
                root=config.images,
                threads=config.threads,
                max_bad_fraction=limit,
                max_pixels=self.origin.max_pixels,
            ),
            batch=config.batch,
            pin=self.origin.runtime.pins,
        )
        self.done = 0
        self._stop = StopFlag()

    @property
    def damaged(self) -> int:
        """Damaged images found so far; each is named in the log and left out."""
        return len(self._loader.bad)

    def outputs(self, network: Callable[[Tensor], Tensor]) -> Iterator[tuple[list[int], Tensor]]:
        """(ids, float32 [N, C] on the CPU) batch by batch, in the order of the paths, until the end or a signal."""
        runtime, crops = self.origin.runtime, Crops(policy=self.origin.policy, seed=0, views=1)
        runtime.to_device(self.origin.network).eval()
        bar = tqdm(total=len(self.source), desc=self.source.name, unit="image", disable=None, leave=False)
        with self._stop, self._loader, bar:
            for batch in self._loader:
                shipment = ship(batch, crops, runtime)
                with torch.no_grad(), runtime.autocast():
                    values = network(shipment.render(runtime.view_dtype))
                yield shipment.ids.tolist(), values.float().cpu()
                self.done += len(batch)
                bar.update(len(batch))
                if self._stop.signum is not None:
                    break
        if self.damaged:
            logger.warning("%d of %d images are damaged and left out", self.damaged, len(self.source))

    def end(self, out: str) -> None:
        """Raises Stopped, with what `out` holds, where a signal left images over."""
        if self._stop.signum is not None and self.done + self.damaged < len(self.source):
            text = f"stopped: {out} holds {self.done:,} of {len(self.source):,} images, in the order of their paths"
            raise Stopped(self._stop.signum, text)

    def paths(self, ids: list[int]) -> list[str]:
        """The paths of images, relative to the folder or the list's folder."""
        return [self.source.names[i] for i in ids]

    def labels(self, ids: list[int]) -> list[str | None]:
        """The labels of images, None where not known."""
        return [None if label < 0 else self.source.classes[label] for label in self.source.labels[ids].tolist()]
