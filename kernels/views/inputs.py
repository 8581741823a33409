"""What make_views asks of its caller: decoded images in one buffer, and one row of parameters for each view."""

# N images, M views

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

Semantics = Literal["torchvision", "tensorflow"]
Brightness = Literal["multiply", "add"]
Triple = tuple[float, float, float]


class Images(Protocol):
    """N RGB images of any size, height by width by 3, in one contiguous uint8 buffer on one device.

    buffer: uint8 [bytes]. offsets: int64 [N], an image's first byte. heights, widths: int32 [N], pixels.
    """

    @property
    def buffer(self) -> Tensor: ...
    @property
    def offsets(self) -> Tensor: ...
    @property
    def heights(self) -> Tensor: ...
    @property
    def widths(self) -> Tensor: ...


class Params(Protocol):
    """M views on the images' device; their fields are those of fastsimclr.loaders.draw.ViewParams.

    source: int32 [M]. crop: int32 [M, 4], top, left, height, width. angle: float32 [M], radians counter-clockwise.
    flip, jitter, grey, solarise: bool [M]. factors: float32 [M, 4], brightness, contrast, saturation, hue in turns.
    order: int32 [M, 4], a permutation of the four. sigma: float32 [M], 0 for no blur.
    extent: int32 [M, 2] on the CPU, crop height and width once more, so that window shapes need no sync.
    ops: which of flip, jitter, grey, blur, solarise, rotate any row may ask for; the others are not computed.
    """

    @property
    def source(self) -> Tensor: ...
    @property
    def crop(self) -> Tensor: ...
    @property
    def angle(self) -> Tensor: ...
    @property
    def flip(self) -> Tensor: ...
    @property
    def jitter(self) -> Tensor: ...
    @property
    def factors(self) -> Tensor: ...
    @property
    def order(self) -> Tensor: ...
    @property
    def grey(self) -> Tensor: ...
    @property
    def sigma(self) -> Tensor: ...
    @property
    def solarise(self) -> Tensor: ...
    @property
    def extent(self) -> Tensor: ...
    @property
    def ops(self) -> frozenset[str]: ...
