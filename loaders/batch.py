"""What a loader yields: decoded uint8 images of any size in one buffer, with ids, epochs and labels."""

# N images

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastsimclr.loaders.draw import ViewParams


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

    def __len__(self) -> int:
        return self.ids.shape[0]


def offsets_of(sizes: Tensor) -> Tensor:
    """Where each image begins in a buffer that holds all in order. sizes: int32 [n, 2], pixels; int64 [n], bytes."""
    lengths = 3 * sizes[:, 0].long() * sizes[:, 1].long()
    return lengths.cumsum(0) - lengths
