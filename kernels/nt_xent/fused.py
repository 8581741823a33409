"""NT-Xent in Triton: fp16 vectors in the gather buffer, similarities a tile at a time; the equations: programs.py.

Rows are divided among programs by blocks, columns by splits, so that small batches fill the device too. Each program
writes its own partial sums and a second one adds them in a fixed order: no atomics, the same bits every time. Each row
block works out its complete gradient, so the backward exchanges nothing between ranks.
"""

# M rows of this rank    A rows of all W ranks    K rows of the bank    R, P: see layout.py

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastsimclr.kernels.ahead import Variant
from fastsimclr.kernels.gather import gather, gather_in_place
from fastsimclr.kernels.nt_xent import packing, programs
from fastsimclr.kernels.nt_xent.layout import CHUNK, DEEP, packed, padded_rows
from fastsimclr.kernels.nt_xent.rectangular import maximum_is_fixed
from fastsimclr.kernels.nt_xent.state import Inputs, State


class Tile(NamedTuple):
    """rows x columns of similarities that a program of `warps` works on at a time, `stages` tiles in flight."""

    rows: int
    columns: int
    warps: int
    stages: int


# Two or more programs share a multiprocessor, so that the exponentials of one run beside the products of another.
FORWARD = {80: Tile(128, 64, 8, 3), 90: Tile(128, 128, 4, 2)}
"""By the least compute capability."""
FORWARD_WIDE = {80: Tile(64, 64, 4, 3), 90: Tile(128, 64, 4, 3)}
"""With an online maximum or more than DEEP dimensions, which need more registers."""
BACKWARD = {80: Tile(64, 64, 4, 3)}
PACK_ELEMENTS, FINISH_ROWS, TOTAL_BLOCKS, SMALL_WARPS = 2048, 128, 512, 4
"""Elements of a block that packs or adds up gradients; rows of one that adds up sums; sums added at once."""
PROGRAMS_A_PROCESSOR, INTERPRETED_PROGRAMS = 2, 8
MOST_SPLITS, MOST_PARTIAL_ELEMENTS = 16, 2**24
"""Limits on what the splits write, beside what it takes to fill the device: 64 MiB of float32 above one split."""
TILES_TO_START = 4
"""What a program costs beside its tiles, in tiles."""


class _Columns(NamedTuple):
    """How the columns are divided: arguments of both large programs, in their order, and the number of splits."""

    first_column: int
    columns: int
    bank_start: int
    bank_stop: int
    splits: int
    tiles: int
    bank_tiles: int
    all_splits: int


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, State]:
    """Loss, top1, top5 and what the backward needs."""
    x, temperature, weights_M, bank, keys, factor, _, group = inputs
    m, dim = x.shape
    bank_rows = 0 if bank is None else len(bank)
    world, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    first_column, every = m * rank, m * world
    rows, width = packed(every, bank_rows, dim, 0 if keys is None else m)
    first_row = first_column if keys is None else rows - m
    online, k, heat = _temperature(temperature, x.device)
    single: dict[str, Any] = {"device": x.device, "dtype": torch.float32}
    inverse_M, positive_M = torch.empty(2, m, **single).unbind()
    z_RP = torch.empty(rows, width, device=x.device, dtype=torch.float16)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        if keys is None:
            _pack(x.contiguous(), z_RP, inverse_M, positive_M, first_column, True)
        else:
            _pack_with_keys(x.contiguous(), keys.contiguous(), z_RP, inverse_M, positive_M, first_row, first_column)
        z_RP[every : padded_rows(every)].zero_()
        if bank is not None:
            start = padded_rows(every)
            _pack(bank.contiguous(), z_RP, inverse_M, positive_M, start, False)
            z_RP[start + bank_rows : start + padded_rows(bank_rows)].zero_()
        if group is not None:
            gather_in_place(z_RP[:every], group)
        tile = _tile(FORWARD_WIDE if online or width > DEEP else FORWARD, x.device)
        part = _divide(m, every, bank_rows, first_column, tile, 1, x.device)
        partial_KSM = torch.empty(4 if online else 2, part.all_splits, m, **single)
        total, count = partial_KSM[0], partial_KSM[1]
        peak, slope = (partial_KSM[2], partial_KSM[3]) if online else (total, total)
        programs.forward[(_blocks(m, tile.rows), part.all_splits)](
            z_RP, positive_M, heat, total, count, peak, slope, k, m, m // 2, first_row, *part[:-1],
            **_shape(width, tile, online), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        blocks = _blocks(m, FINISH_ROWS)
        sums = torch.empty(5, blocks, **single)
        fill = math.inf if online else 0.0
        # Over ranks the largest w_i q_i travels at the end of the columns, in the same exchange.
        column_R = torch.full((rows,), fill, **single)
        # Keys are no rows, so that no rank needs another's rows.
        alone = group is None or keys is not None
        column_M = column_R[first_row : first_row + m] if alone else torch.empty(m + 1, **single)
        pull_M = torch.empty(m, **single)
        programs.finish_forward[(blocks,)](
            total, count, peak, slope, positive_M, positive_M if weights_M is None else weights_M.contiguous(), heat,
            column_M, pull_M, sums, k, m, part.all_splits, ONLINE=online, WEIGHTED=weights_M is not None, B=FINISH_ROWS,
            num_warps=SMALL_WARPS,
        )  # fmt: skip
        loss, top1, top5, dt, largest = (torch.empty((), **single) for _ in range(5))
        programs.totals[(1,)](
            sums, loss, top1, top5, dt, largest if alone else column_M[m], blocks, m, factor, B=TOTAL_BLOCKS,
            num_warps=SMALL_WARPS,
        )  # fmt: skip
        if group is not None and keys is None:
            all_WM = gather(column_M, group)
            column_R[:every].view(world, m).copy_(all_WM[:, :m])
            largest = all_WM[:, m].amax()
    return loss, top1, top5, State(z_RP, inverse_M, column_R, pull_M, largest, dt)


def backward(
    upstream: Tensor,
    state: State,
    temperature: float | Tensor,
    factor: float,
    first_column: int,
    dtype: torch.dtype,
    world: int,
    dim: int,
    bank_rows: int,
    keyed: bool = False,
) -> tuple[Tensor, Tensor]:
    """dx [2N, D] of `dtype` and dL/dt, a scalar, which is 0 unless the temperature is a tensor."""
    z_RP, m, width = state.z, len(state.inverse), state.z.shape[1]
    first_row = len(z_RP) - m if keyed else first_column
    online, k, heat = _temperature(temperature, z_RP.device)
    with torch.cuda.device_of(z_RP):  # type: ignore[no-untyped-call]
        tile = _tile(BACKWARD, z_RP.device)
        part = _divide(m, m * world, bank_rows, first_column, tile, width, z_RP.device)
        shape = _shape(width, tile, online)
        partial_SMP = torch.empty(part.all_splits, m, width, device=z_RP.device, dtype=torch.float32)
        programs.backward[(_blocks(m, tile.rows), part.all_splits, width // shape["Q"])](
            z_RP, state.column, heat, state.largest, partial_SMP, k, m, m // 2, first_row, *part[:-1],
            **shape, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        dx = torch.empty(m, dim, device=z_RP.device, dtype=dtype)
        power = _power(width)
        rows = max(1, PACK_ELEMENTS // power)
        programs.finish_backward[(_blocks(m, rows),)](
            partial_SMP, z_RP, state.inverse, state.pull, heat, state.largest, upstream, dx, k, factor, m, m // 2,
            first_row, first_column, dim, part.all_splits, ONLINE=online, KEYED=keyed, P=width, B=rows, E=power,
            num_warps=SMALL_WARPS,
        )  # fmt: skip
        return dx, state.slope * upstream


def _temperature(temperature: float | Tensor, device: torch.device) -> tuple[bool, float, Tensor]:
    """Whether the maximum is online, and log2(e) / t as a number or t as a tensor, of which the programs read one."""
    if isinstance(temperature, Tensor):
        return True, 0.0, temperature.float()
    online = not maximum_is_fixed(temperature)
    heat = torch.full((), temperature, device=device) if online else torch.empty((), device=device)
    return online, math.log2(math.e) / temperature, heat


def _pack(x: Tensor, z_RP: Tensor, inverse_M: Tensor, positive_M: Tensor, first_row: int, paired: bool) -> None:
    rows, dim = (len(x) // 2 if paired else len(x)), x.shape[1]
    power = _power(z_RP.shape[1])
    block = max(1, PACK_ELEMENTS // power)
    packing.pack[(_blocks(rows, block),)](
        x, z_RP, inverse_M, positive_M, rows, first_row, dim, PAIRED=paired, P=z_RP.shape[1], B=block, E=power,
        num_warps=SMALL_WARPS,
    )  # fmt: skip


def _pack_with_keys(
    x: Tensor, keys: Tensor, z_RP: Tensor, inverse_M: Tensor, positive_M: Tensor, first_row: int, first_column: int
) -> None:
    rows, dim = len(x) // 2, x.shape[1]
    power = _power(z_RP.shape[1])
    block = max(1, PACK_ELEMENTS // power)
    packing.pack_with_keys[(_blocks(rows, block),)](
        x, keys, z_RP, inverse_M, positive_M, rows, first_row, first_column, dim, P=z_RP.shape[1], B=block, E=power,
        num_warps=SMALL_WARPS,
    )  # fmt: skip


def _divide(
    m: int, columns: int, bank_rows: int, first_column: int, tile: Tile, elements_a_row: int, device: torch.device
) -> _Columns:
    """As many splits as make the slowest multiprocessor's work least; batch and bank do not share a split."""
    blocks, tiles, bank_tiles = _blocks(m, tile.rows), _blocks(columns, tile.columns), _blocks(bank_rows, tile.columns)
    slots = INTERPRETED_PROGRAMS
    if device.type == "cuda":
        slots = PROGRAMS_A_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
    limit = max(1, min(MOST_SPLITS, tiles + bank_tiles, MOST_PARTIAL_ELEMENTS // (m * elements_a_row)))
    splits = min(range(1, limit + 1), key=lambda s: _cost(blocks * s, tiles + bank_tiles, s, slots))
    each = _blocks(tiles + bank_tiles, splits)
    parts, bank_parts = _blocks(tiles, each), _blocks(bank_tiles, each)
    start = padded_rows(columns)
    return _Columns(first_column, columns, start, start + bank_rows, parts, each, each, parts + bank_parts)


def _cost(count: int, tiles: int, splits: int, slots: int) -> int:
    return _blocks(count, slots) * (_blocks(tiles, splits) + TILES_TO_START)


def _blocks(count: int, block: int) -> int:
    return -(-count // block)


def _power(width: int) -> int:
    return 1 << (width - 1).bit_length()


def _tile(by_capability: dict[int, Tile], device: torch.device) -> Tile:
    capability = 90
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        capability = 10 * major + minor
    return by_capability[max(least for least in by_capability if least <= max(capability, 80))]


def _shape(width: int, tile: Tile, online: bool) -> dict[str, Any]:
    """The constants of both large programs."""
    deep = width > DEEP
    tiles = {"B": tile.rows, "C": tile.columns, "STAGES": tile.stages}
    return {"ONLINE": online, "P": width, "DEEP": deep, "Q": CHUNK if deep else width, **tiles}


def variants() -> list[Variant]:
    """Every program in each class of shapes: narrow, 128, deep vectors; fixed, online maximum; each dtype of x."""
    small = Tile(0, 0, SMALL_WARPS, 3)
    found: list[Variant] = []
    for width, online in ((16, False), (DEEP, False), (DEEP, True), (2 * DEEP, False), (2 * DEEP, True)):
        words, wide = f"P {width} {'online' if online else 'fixed'}", online or width > DEEP
        for name, tiles in (("forward", FORWARD_WIDE if wide else FORWARD), ("backward", BACKWARD)):
            for least, tile in tiles.items():
                found.append(
                    _variant(
                        f"{name} {words} {tile.rows}x{tile.columns}", getattr(programs, name), tile,
                        _shape(width, tile, online), tensor_cores=True, architectures=_for(least, tiles),
                    )
                )  # fmt: skip
    for x, width in (("fp32", DEEP), ("fp32", 2048), ("fp16", DEEP), ("bf16", DEEP)):
        block = {"P": width, "B": PACK_ELEMENTS // width, "E": width}
        found.append(_variant(f"pack {x} P {width}", packing.pack, small, {"PAIRED": True, **block}, x=x))
        constants = {"ONLINE": False, "KEYED": False, **block}
        found.append(_variant(f"finish_backward {x} P {width}", programs.finish_backward, small, constants, x=x))
    block = {"P": DEEP, "B": PACK_ELEMENTS // DEEP, "E": DEEP}
    found.append(_variant(f"pack bank fp32 P {DEEP}", packing.pack, small, {"PAIRED": False, **block}))
    # As training with half precision has them: the momentum encoder's keys come normalised, in float32.
    found.append(_variant(f"pack bf16 with keys fp32 P {DEEP}", packing.pack_with_keys, small, block, x="bf16"))
    constants = {"ONLINE": False, "KEYED": True, **block}
    name = f"finish_backward keys fp32 P {DEEP}"
    found.append(_variant(name, programs.finish_backward, small, constants, architectures=(90,)))
    constants = {"ONLINE": True, "KEYED": False, **block}
    found.append(_variant(f"finish_backward online fp32 P {DEEP}", programs.finish_backward, small, constants))
    for online, weighted in itertools.product((False, True), repeat=2):
        constants = {"ONLINE": online, "WEIGHTED": weighted, "B": FINISH_ROWS}
        words = f"{'online' if online else 'fixed'}{' weighted' if weighted else ''}"
        found.append(_variant(f"finish_forward {words}", programs.finish_forward, small, constants))
    found.append(_variant("totals", programs.totals, small, {"B": TOTAL_BLOCKS}))
    return found


def _variant(name: str, kernel: Any, tile: Tile, constants: dict[str, Any], x: str = "fp32", **more: Any) -> Variant:
    """The launches' types: numbers by name, vectors fp16, projections x, all other pointers, keys among them, fp32."""
    types = dict.fromkeys((*programs.SIZES, "all_splits", "rows", "blocks", "dim"), "i32")
    types |= {"k": "fp32", "factor": "fp32", "z": "*fp16", "x": f"*{x}", "dx": f"*{x}"}
    signature = {arg: types.get(arg, "*fp32") for arg in kernel.arg_names if arg not in constants}
    aligned = [arg for arg, kind in signature.items() if kind.startswith("*") or arg == "dim"]
    return Variant(
        name=f"nt_xent.{name}", kernel=kernel, signature=signature, constants=constants, aligned=aligned,
        warps=tile.warps, stages=tile.stages, **more,
    )  # fmt: skip


def _for(least: int, by_capability: dict[int, Tile]) -> tuple[int, ...]:
    """The architectures that take the tile of `least`."""
    return tuple(a for a in (80, 90, 100) if max(c for c in by_capability if c <= a) == least)
