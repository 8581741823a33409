"""What a loader yields: decoded uint8 images of any size in one buffer, with ids, epochs and labels."""

# N images

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastsimclr.loaders.arrays import Ints
from fastsimclr.loaders.draw import ViewParams

Sizes = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Ragged:
    """N decoded RGB images of any size, height by width by 3, in one uint8 buffer.

    One form serves three cases: images of several sizes, images of one size, and a choice from a data set held in
    memory, where the buffer is the whole set's and only the N rows of `offsets`, `heights` and `widths` are chosen.

    buffer: uint8 [bytes], contiguous; image i is buffer[offsets[i] : offsets[i] + 3 * heights[i] * widths[i]].
    offsets: int64 [N]. heights, widths: int32 [N], pixels. All four on one device.
    """

    buffer: Tensor
    offsets: Tensor
    heights: Tensor
    widths: Tensor

    def __len__(self) -> int:
        return self.offsets.shape[0]

    def select(self, index: Tensor) -> Ragged:
        """The images at `index` (int64 [K], on the same device), sharing the buffer."""
        return Ragged(
            buffer=self.buffer,
            offsets=self.offsets[index],
            heights=self.heights[index],
            widths=self.widths[index],
        )

    def image(self, index: int) -> Tensor:
        """Image `index` as uint8 [H, W, 3], sharing the buffer. Reads device values: not for the hot path."""
        start, height, width = int(self.offsets[index]), int(self.heights[index]), int(self.widths[index])
        return self.buffer[start : start + 3 * height * width].view(height, width, 3)

    def pinned(self) -> Ragged:
        """The same images in pinned memory, for copies to a GPU that do not wait."""
        return Ragged(
            buffer=self.buffer if self.buffer.is_pinned() else self.buffer.pin_memory(),
            offsets=self.offsets.pin_memory(),
            heights=self.heights.pin_memory(),
            widths=self.widths.pin_memory(),
        )

    def to(self, device: torch.device, non_blocking: bool = False) -> Ragged:
        """The same images on `device`."""
        return Ragged(
            buffer=self.buffer.to(device, non_blocking=non_blocking),
            offsets=self.offsets.to(device, non_blocking=non_blocking),
            heights=self.heights.to(device, non_blocking=non_blocking),
            widths=self.widths.to(device, non_blocking=non_blocking),
        )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """N samples. The images may be on a device; ids, epochs, labels and sizes are CPU tensors.

    ids: int64 [N], the sample's position in its source; with `epochs` (int64 [N]) it fixes the draws of its views.
    labels: int64 [N], -1 where there is none. sizes: int32 [N, 2], height and width in pixels.
    params: where the loader has cut the crops itself, the parameters of the V·N views; images then has those V·N crops.
    """

    images: Ragged
    ids: Tensor
    epochs: Tensor
    labels: Tensor
    sizes: Tensor
    params: ViewParams | None = None

    @classmethod
    def of_crops(
        cls, cuts_VNSS3: Tensor, params: ViewParams, *, ids: Ints, epochs: Ints, labels: Ints, sizes: Sizes, pin: bool
    ) -> Self:
        """A batch of finished crops, uint8 [V, N, S, S, 3], contiguous, on any device; the rest on the CPU.

        params: what was drawn for the V·N views, of which the crops are done. pin: put what is on the CPU in pinned
        memory.
        """
        views, n, side = cuts_VNSS3.shape[:3]
        sides = torch.full((views * n,), side, dtype=torch.int32, device=cuts_VNSS3.device)
        offsets = torch.arange(views * n, device=cuts_VNSS3.device) * (3 * side * side)
        images = Ragged(buffer=cuts_VNSS3.view(-1), offsets=offsets, heights=sides, widths=sides)
        return cls(
            images=images.pinned() if pin and cuts_VNSS3.device.type == "cpu" else images,
            ids=torch.from_numpy(ids),
            epochs=torch.from_numpy(epochs),
            labels=torch.from_numpy(labels),
            sizes=torch.from_numpy(sizes),
            params=params.of_finished_crops(side),
        )

    def __len__(self) -> int:
        return self.ids.shape[0]


def offsets_of(sizes: Tensor) -> Tensor:
    """Where each image begins in a buffer that holds all in order. sizes: int32 [n, 2], pixels; int64 [n], bytes."""
    lengths = 3 * sizes[:, 0].long() * sizes[:, 1].long()
    return lengths.cumsum(0) - lengths
