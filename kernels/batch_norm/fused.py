"""Batch normalisation, residual and ReLU in Triton, on maps that are read as rows of channels; see programs.py.

Three launches each way: parts of the statistics, their pool, the values; parts of the sums, their sum, the gradients.
Bytes decide what the backward keeps of ReLU, a value being 2 bytes: without a residual nothing, as its sign follows
from x, which is read anyway. With one a bit a value: backward 12.25 and forward 8.1 bytes a value, 20.4 in all. To
read y twice instead would be 16 and 8, 24 in all.
"""

# M rows, all values of a channel    C channels    R ranks    S runs of rows

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsimclr.kernels.ahead import Variant
from fastsimclr.kernels.batch_norm import programs
from fastsimclr.kernels.batch_norm.reference import Normalisation

TILE, MOST_CHANNELS, LEAST_CHANNELS = 4096, 256, 16
"""Values that a program works on at once, 16 a thread, half as many where rows do not start at multiples of 16
channels; of at most and at least that many channels."""
PARTS, PART_CHANNELS = 256, 16
"""Parts, and their channels, that are added at once."""
WARPS, STAGES = 8, 1
SUMMING, MAPPING = 4, 16
"""Programs a multiprocessor, which has room for two or three at once: of those that end in parts, and of those that
write maps. Not tuned on a GPU yet."""
INTERPRETED_PROGRAMS = 8


def statistics(x_MC: Tensor, running: Sequence[Tensor], factor: float) -> Tensor:
    """As the reference's, float32."""
    shape, each, grid = _divided(x_MC, SUMMING)
    with torch.cuda.device_of(x_MC):  # type: ignore[no-untyped-call]
        partials_S2C = _float(x_MC, grid[1], 2, x_MC.shape[1])
        programs.statistics[grid](x_MC, partials_S2C, len(x_MC), each, x_MC.shape[1], **shape, **_options())
        return _pooled(partials_S2C, len(x_MC), each, running, factor)


def pooled(partials_R2C: Tensor, rows: int, running: Sequence[Tensor], factor: float) -> Tensor:
    """As the reference's."""
    with torch.cuda.device_of(partials_R2C):  # type: ignore[no-untyped-call]
        return _pooled(partials_R2C, rows * len(partials_R2C), rows, running, factor)


def _pooled(partials_S2C: Tensor, rows: int, each: int, running: Sequence[Tensor], factor: float) -> Tensor:
    count, _, channels = partials_S2C.shape
    mean_var_2C = _float(partials_S2C, 2, channels)
    mean_C, var_C = running or (mean_var_2C, mean_var_2C)
    programs.pool[(_blocks(channels, PART_CHANNELS),)](
        partials_S2C, mean_var_2C, mean_C, var_C, count, rows, each, channels, factor,
        TRACK=bool(running), P=PARTS, K=PART_CHANNELS, **_options(),
    )  # fmt: skip
    return mean_var_2C


def apply(x_MC: Tensor, residual_MC: Tensor | None, norm: Normalisation, relu: bool) -> tuple[Tensor, Tensor]:
    """As the reference's, with a bit for each value kept, uint8 [M, ceil(C / 8)]."""
    rows, channels = x_MC.shape
    shape, each, grid = _divided(x_MC, MAPPING)
    y_MC = torch.empty(rows, channels, dtype=x_MC.dtype, device=x_MC.device)
    kept = (rows, _blocks(channels, 8)) if relu and residual_MC is not None else (0,)
    bits = torch.empty(kept, dtype=torch.uint8, device=x_MC.device)
    with torch.cuda.device_of(x_MC):  # type: ignore[no-untyped-call]
        programs.apply[grid](
            x_MC, x_MC if residual_MC is None else residual_MC, *_vectors(norm), y_MC, bits,
            rows, each, channels, norm.eps,
            RESIDUAL=residual_MC is not None, BIAS=norm.bias_C is not None, RELU=relu, **shape, **_options(),
        )  # fmt: skip
    return y_MC, bits


def sums(dy_MC: Tensor, x_MC: Tensor, norm: Normalisation, bits: Tensor, relu: bool) -> Tensor:
    """As the reference's."""
    rows, channels = x_MC.shape
    shape, each, grid = _divided(x_MC, SUMMING)
    partials_S2C, total_2C = _float(x_MC, grid[1], 2, channels), _float(x_MC, 2, channels)
    with torch.cuda.device_of(x_MC):  # type: ignore[no-untyped-call]
        programs.sums[grid](
            dy_MC, x_MC, *_vectors(norm), bits, partials_S2C, rows, each, channels, norm.eps,
            BITS=bool(bits.numel()), BIAS=norm.bias_C is not None, RELU=relu, **shape, **_options(),
        )  # fmt: skip
        programs.add[(_blocks(2 * channels, PART_CHANNELS),)](
            partials_S2C, total_2C, grid[1], 2 * channels, P=PARTS, K=PART_CHANNELS, **_options()
        )
    return total_2C


def gradient(
    dy_MC: Tensor, x_MC: Tensor, norm: Normalisation, bits: Tensor, relu: bool, total_2C: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    """As the reference's."""
    M, channels = x_MC.shape
    shape, each, grid = _divided(x_MC, MAPPING)
    like: dict[str, Any] = {"dtype": x_MC.dtype, "device": x_MC.device}
    dx_MC, dresidual = torch.empty(M, channels, **like), torch.empty((M, channels) if bits.numel() else (0,), **like)
    with torch.cuda.device_of(x_MC):  # type: ignore[no-untyped-call]
        programs.gradient[grid](
            dy_MC, x_MC, *_vectors(norm), bits, total_2C, dx_MC, dresidual,
            M, each, channels, 1 / rows, norm.eps,
            BITS=bool(bits.numel()), BIAS=norm.bias_C is not None, RELU=relu, **shape, **_options(),
        )  # fmt: skip
    return dx_MC, dresidual


def _vectors(norm: Normalisation) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, bias, and mean with variance, as programs take them: without a bias they read no second vector."""
    return norm.weight_C, norm.weight_C if norm.bias_C is None else norm.bias_C, norm.mean_var_2C


def _divided(x_MC: Tensor, programs_a_processor: int) -> tuple[dict[str, int], int, tuple[int, int]]:
    """The tile, how many rows a program's run has, and the grid: blocks of channels, runs of rows."""
    rows, channels = x_MC.shape
    shape = _tile(channels)
    tiles, blocks = _blocks(rows, shape["B"]), _blocks(channels, shape["K"])
    slots = INTERPRETED_PROGRAMS
    if x_MC.device.type == "cuda":
        slots = programs_a_processor * torch.cuda.get_device_properties(x_MC.device).multi_processor_count
    each = _blocks(tiles, max(1, slots // blocks)) * shape["B"]
    return shape, each, (blocks, _blocks(rows, each))


def _tile(channels: int) -> dict[str, int]:
    wide = min(MOST_CHANNELS, max(LEAST_CHANNELS, 1 << (channels - 1).bit_length()))
    return {"B": (TILE if channels % 16 == 0 else TILE // 2) // wide, "K": wide}


def _float(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _blocks(count: int, block: int) -> int:
    return -(-count // block)


def _options() -> dict[str, int]:
    return {"num_warps": WARPS, "num_stages": STAGES}


def variants() -> list[Variant]:
    """Every program, with residual and without: 256 channels of bf16; on sm_90 other dtypes and numbers of channels."""
    found = [
        _variant("pool", programs.pool, {"TRACK": True, "P": PARTS, "K": PART_CHANNELS}),
        _variant("add", programs.add, {"P": PARTS, "K": PART_CHANNELS}),
    ]
    for x, channels in (("bf16", 256), ("bf16", 64), ("fp16", 256), ("fp32", 256), ("bf16", 24)):
        tile, words = _tile(channels), f"{x} C {channels}"
        more: dict[str, Any] = {"x": x, "aligned": channels % 16 == 0}
        more |= {} if words == "bf16 C 256" else {"architectures": (90,)}
        found.append(_variant(f"statistics {words}", programs.statistics, tile, **more))
        for residual in (False, True):
            flags = {"BIAS": True, "RELU": True, **tile}
            name = f"{words}{' residual' if residual else ''}"
            found.append(_variant(f"apply {name}", programs.apply, {"RESIDUAL": residual, **flags}, **more))
            for kernel in (programs.sums, programs.gradient):
                found.append(_variant(f"{kernel.__name__} {name}", kernel, {"BITS": residual, **flags}, **more))
    return found


def _variant(
    name: str, kernel: Any, constants: dict[str, Any], *, x: str = "fp32", aligned: bool = True, **more: Any
) -> Variant:
    """The types that the launches above give. aligned: C is a multiple of 16, so that rows start at wide addresses."""
    types = dict.fromkeys((*programs.COUNTS, "channels"), "i32")
    types |= dict.fromkeys(("eps", "factor", "inverse_count"), "fp32") | {"bits": "*u8"}
    types |= dict.fromkeys(("x", "residual", "y", "dy", "dx", "dresidual"), f"*{x}")
    signature = {arg: types.get(arg, "*fp32") for arg in kernel.arg_names if arg not in constants}
    multiples = [arg for arg, kind in signature.items() if kind.startswith("*") or (arg == "channels" and aligned)]
    return Variant(
        name=f"batch_norm.{name}", kernel=kernel, signature=signature, constants=constants, aligned=multiples,
        warps=WARPS, stages=STAGES, **more,
    )  # fmt: skip
