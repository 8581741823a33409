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
    quarter: int32 [M], counter-clockwise turns by 90 degrees, 0 to 3 (of other numbers the remainder by 4 counts).
    flip, jitter, grey, sobel, solarise: bool [M].
    factors: float32 [M, 4], brightness, contrast, saturation, hue in turns.
    order: int32 [M, 4], a permutation of the four. sigma: float32 [M], 0 for no blur.
    noise: float32 [M], standard deviation, 0 for none. noise_key: int32 [M], 32 bits that choose the noise.
    cutout: int32 [M, 4], top, left, height, width in pixels of the view, all 0 for none.
    extent: int32 [M, 2] on the CPU, crop height and width once more, so that window shapes need no sync.
    ops: which of rotate, quarter, flip, jitter, grey, blur, sobel, noise, solarise, cutout any row may ask for; the
        others are not computed.
    """

    @property
    def source(self) -> Tensor: ...
    @property
    def crop(self) -> Tensor: ...
    @property
    def angle(self) -> Tensor: ...
    @property
    def quarter(self) -> Tensor: ...
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
    def sobel(self) -> Tensor: ...
    @property
    def noise(self) -> Tensor: ...
    @property
    def noise_key(self) -> Tensor: ...
    @property
    def solarise(self) -> Tensor: ...
    @property
    def cutout(self) -> Tensor: ...
    @property
    def extent(self) -> Tensor: ...
    @property
    def ops(self) -> frozenset[str]: ...
