"""The launches of the fused views: at most mean, cut, blur and Sobel edges; one alone for small views without blur.

mean: what contrast needs, where a view takes more than one tile. cut: everything up to the blur. Views with neither
blur nor edges are finished there; the others wait in scratch memory, 2 bytes a value where `dtype` has 2.
"""

# M views, S side

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from fastsimclr.kernels.ahead import ARCHITECTURES, Variant
from fastsimclr.kernels.views.fused_blur import blur_kernel, sobel_kernel
from fastsimclr.kernels.views.fused_cut import cut_kernel, mean_kernel
from fastsimclr.kernels.views.inputs import Params
from fastsimclr.kernels.views.op import FIELDS, Pixels, blur_radius

SIDE = 32
"""Of a program's tile. Views of up to this side are one tile: their mean is known to the program that makes them."""
LAUNCH = {"num_warps": 4, "num_stages": 1}
"""Of all kernels. Their loops read what the caches hold, so there is nothing to fetch ahead."""
SCRATCH_BYTES = 256 << 20
_OF_OP = {
    "rotate": ("angle",), "quarter": ("quarter",), "flip": ("flip",), "jitter": ("jitter", "factors", "order"),
    "grey": ("grey",), "blur": ("sigma",), "sobel": ("sobel",), "noise": ("noise", "noise_key"),
    "solarise": ("solarise",), "cutout": ("cutout",),
}  # fmt: skip
_KINDS = {torch.bool: "i1", torch.int32: "i32", torch.float32: "fp32"}
_LAST = ("noise", "noise_key", "solarise", "cutout")
_MEAN = ("angle", "quarter", "flip", "jitter", "factors", "order")


def make_views(
    pixels: Pixels,
    params: Params,
    *,
    size: int,
    semantics: str,
    brightness: str,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype,
) -> Tensor:
    """The views of `params`, [M, 3, size, size] in `dtype`, channels-last; see fastsimclr.kernels.views.make_views.

    There is a view and an image. A row that makes no sense gives a view of NaN. The host reads no value of a tensor.
    """
    device, count = pixels.buffer.device, params.source.shape[0]
    out = torch.empty((count, 3, size, size), dtype=dtype, device=device, memory_format=torch.channels_last)
    column = {
        name: getattr(params, name).contiguous() if op in params.ops else None
        for op, names in _OF_OP.items()
        for name in names
    }
    waits, channels = column["sigma"] is not None or column["sobel"] is not None, 1 if semantics == "torchvision" else 3
    tiles = triton.cdiv(size, SIDE) ** 2
    kept = torch.float32 if dtype == torch.float32 else torch.float16
    views = min(count, max(1, SCRATCH_BYTES // (3 * size * size * kept.itemsize))) if waits else count

    def memory(wanted: bool, *shape: int, kind: torch.dtype) -> Tensor | None:
        return torch.empty(shape, dtype=kind, device=device) if wanted else None

    # What rows wait in: between cut and blur or edges, and between blur and edges.
    scratch = memory(waits, views, 3, size, size, kind=kept)
    both = column["sigma"] is not None and column["sobel"] is not None
    edges = memory(both, views, 3, size, size, kind=kept)
    has_mean = column["jitter"] is not None and tiles > 1
    sums = memory(has_mean, views, channels, tiles, kind=torch.float32)
    places = _places(pixels)
    window = {"source": params.source.contiguous(), "crop": params.crop.contiguous(), **places}
    shape = {"SIZE": size, "TORCHVISION": semantics == "torchvision", "ADD": brightness == "add", "SIDE": SIDE}
    last = {name: column[name] for name in _LAST} | _normalise(mean, std)
    neighbours = {"out": out, "scratch": scratch, "edges": edges, "sigma": column["sigma"], "sobel": column["sobel"]}
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        for start in range(0, count, views):
            rows = min(views, count - start)
            if sums is not None:
                mine = {name: column[name] for name in _MEAN}
                mean_kernel[(rows * tiles,)](sums=sums, **window, **mine, first_view=start, **shape, **LAUNCH)
            cut_kernel[(rows * tiles,)](
                out=out, scratch=scratch, sums=sums, **window, **column, **_normalise(mean, std), first_view=start,
                **shape, **LAUNCH,
            )  # fmt: skip
            if column["sigma"] is not None:
                blur_kernel[(rows * tiles,)](
                    **neighbours, **last, first_view=start, **_blur_shape(size, semantics, kept), **LAUNCH
                )
            if column["sobel"] is not None:
                sobel_kernel[(rows * tiles,)](**neighbours, **last, first_view=start, SIZE=size, SIDE=SIDE, **LAUNCH)
    return out


def _places(pixels: Pixels) -> dict[str, Any]:
    """The arguments that say where images are."""
    described = {"offsets": pixels.offsets, "heights": pixels.heights, "widths": pixels.widths, "ids": pixels.ids}
    height, width = pixels.buffer.shape[1:3] if pixels.offsets is None else (0, 0)
    return {
        **{name: tensor.contiguous() if tensor is not None else None for name, tensor in described.items()},
        "buffer": pixels.buffer,
        "buffer_bytes": pixels.buffer.numel(),
        "images": pixels.images,
        "chosen": pixels.chosen,
        "image_height": height,
        "image_width": width,
    }


def _normalise(mean: Sequence[float] | None, std: Sequence[float] | None) -> dict[str, float]:
    """(x - mean) / std as gain x + offset."""
    mean, std = mean or (0.0, 0.0, 0.0), std or (1.0, 1.0, 1.0)
    gains = {f"gain_{c}": 1 / s for c, s in zip("rgb", std, strict=True)}
    return gains | {f"offset_{c}": -m / s for c, m, s in zip("rgb", mean, std, strict=True)}


def _blur_shape(size: int, semantics: str, kept: torch.dtype) -> dict[str, Any]:
    shape = {"SIZE": size, "RADIUS": blur_radius(size), "TORCHVISION": semantics == "torchvision", "SIDE": SIDE}
    # float32 products take more room than float16 ones, and no tensor core.
    return shape | {"SPAN": 16 if kept == torch.float32 else 64}


def variants() -> list[Variant]:
    """Every kernel in the shapes of SimCLR: 224 pixels with blur, CIFAR without, from a set held on the device.

    What differs from a variant before it in the type of a store or in absent arguments only is for sm_90 alone.
    """
    simclr, every = frozenset({"flip", "jitter", "grey", "blur"}), frozenset(_OF_OP)
    found = []
    for semantics in ("torchvision", "tensorflow"):
        found.append(_variant("mean", semantics, "fp16", 224, simclr))
        for dtype in ("fp16", "bf16", "fp32"):
            on = ARCHITECTURES if dtype == "fp16" else (90,)
            found.append(_variant("cut", semantics, dtype, 224, simclr, on))
            found.append(_variant("cut", semantics, dtype, 32, simclr - {"blur"}, on, gather=True))
            found.append(_variant("blur", semantics, dtype, 224, simclr, (90,) if dtype == "bf16" else ARCHITECTURES))
    found += [_variant("cut", "torchvision", "fp16", 224, every), _variant("sobel", "torchvision", "fp16", 224, every)]
    found += [_variant(kernel, "tensorflow", "fp16", 224, every, (90,)) for kernel in ("mean", "cut", "blur")]
    return found


def _variant(
    name: str,
    semantics: str,
    dtype: str,
    size: int,
    ops: frozenset[str],
    architectures: Sequence[int] = ARCHITECTURES,
    gather: bool = False,
) -> Variant:
    kernel = {"mean": mean_kernel, "cut": cut_kernel, "blur": blur_kernel, "sobel": sobel_kernel}[name]
    kept = "fp32" if dtype == "fp32" else "fp16"
    used = {column for op in ops for column in _OF_OP[op]}
    kinds = {
        "out": dtype, "scratch": kept, "edges": kept, "sums": "fp32", "buffer": "u8", "offsets": "i64",
        "heights": "i32", "widths": "i32", "ids": "i64",
        **{name: _KINDS[kind] for name, (kind, _) in FIELDS.items() if name != "extent"},
    }  # fmt: skip
    absent = {column for names in _OF_OP.values() for column in names} - used
    absent |= {"offsets", "heights", "widths"} if gather else {"ids"}
    absent |= set() if used & {"sigma", "sobel"} else {"scratch"}
    absent |= set() if {"sigma", "sobel"} <= used else {"edges"}
    absent |= {"sums"} if size <= SIDE else set()
    shape: dict[str, Any] = {"SIZE": size, "TORCHVISION": semantics == "torchvision", "ADD": False}
    shape |= _blur_shape(size, semantics, torch.float32 if kept == "fp32" else torch.float16)
    scalars = {name: "fp32" for name in _normalise(None, None)} | {"buffer_bytes": "i64"}
    scalars |= dict.fromkeys(("images", "image_height", "image_width", "chosen", "first_view"), "i32")
    arguments = kernel.arg_names
    constants = {key: value for key, value in shape.items() if key in arguments}
    constants |= {key: None for key in absent if key in arguments}
    return Variant(
        name=f"views {name}, {size} px, {semantics}, {dtype}, {'all ops' if 'sobel' in ops else 'SimCLR'}",
        kernel=kernel,
        signature={**{key: "*" + kind for key, kind in kinds.items()}, **scalars},
        constants=constants,
        aligned=[key for key in ("out", "scratch", "edges", "sums") if key in arguments and key not in absent],
        warps=LAUNCH["num_warps"],
        stages=LAUNCH["num_stages"],
        tensor_cores=name == "blur" and kept == "fp16",
        architectures=architectures,
    )
