"""make_views as one operation of torch: what torch.compile and autocast leave whole, and where rows are checked."""

# N images, B ids, M views, S side

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from fastsimclr.kernels.backend import Backend, choose
from fastsimclr.kernels.views import reference
from fastsimclr.kernels.views.inputs import Brightness, Params, Semantics, Triple

FIELDS = {
    "source": (torch.int32, 0), "crop": (torch.int32, 4), "angle": (torch.float32, 0), "quarter": (torch.int32, 0),
    "flip": (torch.bool, 0), "jitter": (torch.bool, 0), "factors": (torch.float32, 4), "order": (torch.int32, 4),
    "grey": (torch.bool, 0), "sigma": (torch.float32, 0), "sobel": (torch.bool, 0), "noise": (torch.float32, 0),
    "noise_key": (torch.int32, 0), "solarise": (torch.bool, 0), "cutout": (torch.int32, 4), "extent": (torch.int32, 2),
}  # fmt: skip
"""The columns of Params: dtype, and numbers a row (0: the column has one dimension)."""
OPS = frozenset(("rotate", "quarter", "flip", "jitter", "grey", "blur", "sobel", "noise", "solarise", "cutout"))
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Of finished views; the last has no fused kernel."""
LARGEST = 16383
"""Largest size: places on an axis stay exact in 32 bits with crops of up to 65,540 pixels a side."""


class Look(TypedDict):
    """How views are rendered; see fastsimclr.kernels.views.make_views."""

    size: int
    semantics: Semantics
    brightness: Brightness
    mean: Triple | None
    std: Triple | None
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """Images, and which of them `source` counts.

    buffer: uint8, [bytes] of images that `offsets`, `heights` and `widths` describe, or [N, H, W, 3] where those are
    None. ids: int64 [B], the images chosen; None: all in order.
    """

    buffer: Tensor
    offsets: Tensor | None
    heights: Tensor | None
    widths: Tensor | None
    ids: Tensor | None

    @property
    def images(self) -> int:
        """N."""
        return self.buffer.shape[0] if self.offsets is None else self.offsets.shape[0]

    @property
    def chosen(self) -> int:
        """How many images `source` chooses from."""
        return self.images if self.ids is None else self.ids.shape[0]

    def rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each chosen image: offset, height, width, and whether it is there (else those of image 0)."""
        device = self.buffer.device
        index = torch.arange(self.images, device=device) if self.ids is None else self.ids
        known = (index >= 0) & (index < self.images)
        index = torch.where(known, index, 0)
        if self.offsets is None or self.heights is None or self.widths is None:
            height, width = self.buffer.shape[1:3]
            side = torch.ones_like(index, dtype=torch.int32)
            return index * (3 * height * width), side * height, side * width, known
        offsets, heights, widths = self.offsets[index], self.heights[index], self.widths[index]
        size = 3 * heights.long() * widths.long()
        return offsets, heights, widths, known & (offsets >= 0) & (offsets + size <= self.buffer.numel())


@dataclass(frozen=True, kw_only=True)
class _Images:
    buffer: Tensor
    offsets: Tensor
    heights: Tensor
    widths: Tensor


def _params(columns: Mapping[str, Tensor], ops: frozenset[str]) -> Params:
    return cast(Params, SimpleNamespace(**columns, ops=ops))


def render(pixels: Pixels, params: Params, look: Look, backend: Backend) -> Tensor:
    """What make_views and gather_views have in common: everything is checked that needs no value of a tensor."""
    device, size, mean, std, dtype = pixels.buffer.device, look["size"], look["mean"], look["std"], look["dtype"]
    semantics, brightness = look["semantics"], look["brightness"]
    if semantics not in ("torchvision", "tensorflow") or brightness not in ("multiply", "add"):
        raise ValueError(
            f"semantics={semantics!r}, brightness={brightness!r}: give torchvision or tensorflow, multiply or add"
        )
    if (mean is None) != (std is None):
        raise ValueError(f"mean={mean} and std={std} go together; give both or neither")
    if mean is not None and std is not None and (len(mean) != 3 or len(std) != 3 or not min(std) > 0):
        raise ValueError(f"mean={mean} and std={std} are not those of three channels; give three of each, std > 0")
    if not 1 <= size <= LARGEST or dtype not in DTYPES:
        raise ValueError(f"size={size}, dtype={dtype}: give 1 to {LARGEST}, and float16, bfloat16, float32 or float64")
    if unknown := params.ops - OPS:
        raise ValueError(f"params.ops names {sorted(unknown)}; known are {sorted(OPS)}")
    if params.source.device != device:
        raise ValueError(f"images are on {device}, parameters on {params.source.device}; move one with .to(device)")
    if pixels.buffer.dtype != torch.uint8 or not pixels.buffer.is_contiguous():
        raise ValueError(f"images are {pixels.buffer.dtype}, or not contiguous; give one contiguous uint8 buffer")
    described = {"offsets": pixels.offsets, "heights": pixels.heights, "widths": pixels.widths, "ids": pixels.ids}
    for name, tensor in described.items():
        if tensor is not None:
            kind = torch.int64 if name in ("offsets", "ids") else torch.int32
            _expect(name, tensor, kind, (pixels.chosen if name == "ids" else pixels.images,), device)
    if dtype == torch.float64 and backend == "fused":
        raise ValueError("backend=fused gives float16, bfloat16 or float32 views, not float64; use backend=auto")
    implementation = "reference" if dtype == torch.float64 else choose("views", backend, device)
    rows = params.source.shape[0]
    for name, (kind, numbers) in FIELDS.items():
        shape = (rows, numbers) if numbers else (rows,)
        _expect(name, getattr(params, name), kind, shape, torch.device("cpu") if name == "extent" else device)
    views: Tensor = make_views_op(
        pixels.buffer,
        [getattr(params, name) for name in FIELDS],
        size,
        dtype,
        [tensor for tensor in (pixels.offsets, pixels.heights, pixels.widths) if tensor is not None],
        pixels.ids,
        ",".join(sorted(params.ops)),
        semantics,
        brightness,
        mean,
        std,
        implementation,
    )
    return views


def _expect(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    if tensor.dtype != dtype or tensor.shape != shape or tensor.device != device:
        found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{name} is {found}; give {dtype} {list(shape)} on {device}")


@torch.library.custom_op("fastsimclr::make_views", mutates_args=())
def make_views_op(
    buffer: Tensor,
    columns: Sequence[Tensor],
    size: int,
    dtype: torch.dtype,
    described: Sequence[Tensor],
    ids: Tensor | None,
    ops: str,
    semantics: str,
    brightness: str,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    implementation: str,
) -> Tensor:
    """make_views with its arguments unpacked, those that the result's shape depends on first.

    columns: those of FIELDS. described: offsets, heights, widths, or nothing where the buffer has four dimensions.
    ops: joined by commas. implementation: fused or reference.
    """
    offsets, heights, widths = described if described else (None, None, None)
    pixels = Pixels(buffer=buffer, offsets=offsets, heights=heights, widths=widths, ids=ids)
    present = frozenset(ops.split(",")) - (set() if blur_radius(size) else {"blur"})
    params = _params(dict(zip(FIELDS, columns, strict=True)), present)
    look = Look(
        size=size,
        semantics=cast(Semantics, semantics),
        brightness=cast(Brightness, brightness),
        mean=cast(Triple | None, mean),
        std=cast(Triple | None, std),
        dtype=dtype,
    )
    if not len(params.source):
        return _blank(buffer, 0, size, dtype)
    if buffer.device.type == "cpu":
        check_rows(pixels, params)
    elif not pixels.chosen or not pixels.images or not buffer.numel():
        return _blank(buffer, len(params.source), size, dtype).fill_(torch.nan)
    if implementation == "fused":
        from fastsimclr.kernels.views import fused

        return fused.make_views(pixels, params, **look)
    return _by_reference(pixels, params, look)


@make_views_op.register_fake
def _(buffer: Tensor, columns: Sequence[Tensor], size: int, dtype: torch.dtype, *_: Any) -> Tensor:
    return _blank(buffer, columns[0].shape[0], size, dtype)


def _blank(buffer: Tensor, rows: int, size: int, dtype: torch.dtype) -> Tensor:
    shape, layout = (rows, 3, size, size), torch.channels_last
    return torch.empty(shape, dtype=dtype, device=buffer.device, memory_format=layout)


def blur_radius(size: int) -> int:
    """Pixels to each side of the blur's kernel, which is a tenth of the view; 0: no blur."""
    return int(size // 10 / 2)


def _by_reference(pixels: Pixels, params: Params, look: Look) -> Tensor:
    offsets, heights, widths, _ = pixels.rows()
    images = _Images(buffer=pixels.buffer.view(-1), offsets=offsets, heights=heights, widths=widths)
    if pixels.buffer.device.type == "cpu":
        return reference.make_views(images, params, **look)
    bad = torch.stack(list(faults(pixels, params).values())).any(0)
    first_pixel = torch.arange(4, dtype=torch.int32, device=bad.device) // 2
    sound = {
        "source": params.source.masked_fill(bad, 0),
        "crop": torch.where(bad[:, None], first_pixel, params.crop),
        "order": params.order.masked_fill(bad[:, None], 0),
    }
    params = _params({name: sound.get(name, getattr(params, name)) for name in FIELDS}, params.ops)
    return reference.make_views(images, params, **look).masked_fill_(bad[:, None, None, None], torch.nan)


def faults(pixels: Pixels, params: Params) -> dict[str, Tensor]:
    """The rules that a row must keep, and which rows break them, bool [M]; N and B are at least 1."""
    _, heights, widths, there = pixels.rows()
    known = (params.source >= 0) & (params.source < pixels.chosen)
    source = torch.where(known, params.source, 0)
    top, left, height, width = params.crop.unbind(1)
    inside = (top >= 0) & (left >= 0) & (height >= 1) & (width >= 1)
    inside &= (height <= heights[source] - top) & (width <= widths[source] - left)
    ordered = params.order.sort(1).values == torch.arange(4, device=known.device)
    finite = {"jitter": "factors", "rotate": "angle", "blur": "sigma", "noise": "noise"}
    broken = {
        f"source is 0 to {pixels.chosen - 1}": ~known,
        f"ids are 0 to {pixels.images - 1} and each image lies in the buffer": ~there[source],
        "the crop (top, left, height, width) has pixels and lies in its image": ~inside,
    }
    if "jitter" in params.ops:
        broken["order is a permutation of 0, 1, 2, 3"] = ~ordered.all(1)
    for op, name in finite.items():
        if op in params.ops:
            broken[f"{name} is finite"] = ~getattr(params, name).view(len(known), -1).isfinite().all(1)
    return broken


def check_rows(pixels: Pixels, params: Params) -> None:
    """ValueError for the first row that makes no sense. Reads values: for tensors on the CPU."""
    if not pixels.chosen or not pixels.buffer.numel():
        raise ValueError(f"{len(params.source)} views of no images; give images, or no rows of parameters")
    broken = faults(pixels, params)
    broken["extent is the crop's height and width"] = (params.extent != params.crop[:, 2:]).any(1)
    for rule, bad in broken.items():
        if bad.any():
            row = int(bad.nonzero()[0])
            found = {name: getattr(params, name)[row].tolist() for name in ("source", "crop", "factors", "order")}
            found |= {name: getattr(params, name)[row].tolist() for name in ("angle", "sigma", "noise", "extent")}
            raise ValueError(f"row {row} of the views breaks a rule: {rule}; found {found}. Draw it again")
