"""LARS in two Triton launches for a whole network: sums of squares per chunk, then ratio and update. See reference.py.

g = inv_scale grad + l2 w; u = g + decay w; google: r = c |w| / |u|; lightly: r = c |w| / (|g| + decay |w| + eps).
"""

# T tensors, C chunks of them

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsimclr.kernels.ahead import Variant as Compiled
from fastsimclr.kernels.lars.inputs import Rule, Tensors
from fastsimclr.kernels.lars.table import BLOCK, COPY_KINDS, GRAD_KINDS, MAX_CHUNKS, WORDS, table

WARPS = 8
STAGES = 1
ROW = tl.constexpr(WORDS)
W, G, V, COPY, LENGTH, FIRST, BLOCKS, KINDS = (tl.constexpr(column) for column in range(WORDS))
"""Columns of a row: addresses of w, g, v and copy; length, first chunk, blocks a chunk, kinds of g and copy."""
DECAY, L2, EXCLUDED, LR_SCALE = (tl.constexpr(column) for column in range(4))
"""Columns of a row's scalars."""
KINDS_OF_GRAD = tl.constexpr(len(GRAD_KINDS))
# A learning rate may be one number of many in a tensor; one kernel serves it wherever it lies.
ANYWHERE = ("SCALE", "LR", "FOUND")


@triton.jit
def _gradient(address, offsets, mask, kind, aligned: tl.constexpr):  # type: ignore[no-untyped-def]
    """The gradient as float32: kind 0 is stored as float32, 1 as float16, 2 as bfloat16."""
    if kind == 0:
        grad = tl.load(_pointer(address, tl.float32, aligned) + offsets, mask=mask, other=0.0)
    elif kind == 1:
        grad = tl.load(_pointer(address, tl.float16, aligned) + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        grad = tl.load(_pointer(address, tl.bfloat16, aligned) + offsets, mask=mask, other=0.0).to(tl.float32)
    return grad


@triton.jit
def _pointer(address, dtype: tl.constexpr, aligned: tl.constexpr):  # type: ignore[no-untyped-def]
    pointer = address.to(tl.pointer_type(dtype))
    if aligned:
        # Vectors of four whatever the dtype: with eight halves to a thread all others would be reordered to match.
        pointer = tl.multiple_of(pointer, 4 * (dtype.primitive_bitwidth // 8))
    return pointer


@triton.jit
def _squares(  # type: ignore[no-untyped-def]
    row, offsets, limit, scale, l2, decay, GOOGLE: tl.constexpr, ALIGNED: tl.constexpr
):
    """w^2 and u^2 (google) or g^2 (lightly) at the offsets below the limit, 0 elsewhere."""
    mask = offsets < limit
    w = tl.load(_pointer(tl.load(row + W), tl.float32, ALIGNED) + offsets, mask=mask, other=0.0)
    g = scale * _gradient(tl.load(row + G), offsets, mask, tl.load(row + KINDS) % KINDS_OF_GRAD, ALIGNED) + l2 * w
    if GOOGLE:
        g += decay * w
    return w * w, g * g


@triton.jit(do_not_specialize_on_alignment=ANYWHERE)
def lars_sums(  # type: ignore[no-untyped-def]
    TENSORS, SCALARS, CHUNKS, SCALE, SUMS, GOOGLE: tl.constexpr, ALIGNED: tl.constexpr, SPAN: tl.constexpr
):
    """SUMS[c] = (sum of w^2, sum of u^2 or g^2) over chunk c of a tensor that is adapted."""
    chunk = tl.program_id(0)
    tensor = tl.load(CHUNKS + chunk)
    row, scalars = TENSORS + tensor * ROW, SCALARS + tensor * 4
    if tl.load(scalars + EXCLUDED) == 0.0:
        decay, l2, scale = tl.load(scalars + DECAY), tl.load(scalars + L2), tl.load(SCALE)
        length, blocks = tl.load(row + LENGTH), tl.load(row + BLOCKS)
        # Whole vectors of four, so that masked loads stay wide; the last few elements come on their own.
        even = length // 4 * 4
        start = (chunk - tl.load(row + FIRST)) * blocks
        ww = tl.zeros((SPAN,), tl.float32)
        gg = tl.zeros((SPAN,), tl.float32)
        for i in range(0, blocks.to(tl.int32)):
            offsets = (start + i) * SPAN + tl.arange(0, SPAN)
            more_w, more_g = _squares(row, offsets, even, scale, l2, decay, GOOGLE, ALIGNED)
            ww += more_w
            gg += more_g
        w_sum, g_sum = tl.sum(ww), tl.sum(gg)
        if (start + blocks) * SPAN >= length:
            more_w, more_g = _squares(row, even + tl.arange(0, 4), length, scale, l2, decay, GOOGLE, ALIGNED)
            w_sum += tl.sum(more_w)
            g_sum += tl.sum(more_g)
        tl.store(SUMS + 2 * chunk, w_sum)
        tl.store(SUMS + 2 * chunk + 1, g_sum)


@triton.jit
def _move(  # type: ignore[no-untyped-def]
    row, offsets, limit, scale, l2, decay, ratio, rate, momentum, GOOGLE: tl.constexpr, ALIGNED: tl.constexpr
):
    """The update of w, v and the copy at the offsets below the limit."""
    mask = offsets < limit
    kinds = tl.load(row + KINDS)
    w_at = _pointer(tl.load(row + W), tl.float32, ALIGNED) + offsets
    v_at = _pointer(tl.load(row + V), tl.float32, ALIGNED) + offsets
    w = tl.load(w_at, mask=mask, other=0.0)
    v = tl.load(v_at, mask=mask, other=0.0)
    u = scale * _gradient(tl.load(row + G), offsets, mask, kinds % KINDS_OF_GRAD, ALIGNED) + (l2 * w) + decay * w
    if GOOGLE:
        v = momentum * v + rate * (ratio * u)
        w -= v
    else:
        v = momentum * v + ratio * u
        w -= rate * v
    tl.store(v_at, v, mask=mask)
    tl.store(w_at, w, mask=mask)
    copy = tl.load(row + COPY)
    if kinds // KINDS_OF_GRAD == 1:
        tl.store(_pointer(copy, tl.float16, ALIGNED) + offsets, w.to(tl.float16), mask=mask)
    elif kinds // KINDS_OF_GRAD == 2:
        tl.store(_pointer(copy, tl.bfloat16, ALIGNED) + offsets, w.to(tl.bfloat16), mask=mask)


@triton.jit(do_not_specialize_on_alignment=ANYWHERE)
def lars_update(  # type: ignore[no-untyped-def]
    TENSORS,
    SCALARS,
    CHUNKS,
    SCALE,
    SUMS,
    LR,
    FOUND,
    lr,
    momentum,
    trust,
    eps,
    GOOGLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPAN: tl.constexpr,
    CHUNKS_BOUND: tl.constexpr,
):
    """google: v = m v + lr r u, w -= v; lightly: v = m v + r u, w -= lr v; nothing where FOUND is not 0."""
    # From the last chunk to the first: what the sums read last is still in the L2 cache.
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)
    if tl.load(FOUND) == 0.0:
        tensor = tl.load(CHUNKS + chunk)
        row, scalars = TENSORS + tensor * ROW, SCALARS + tensor * 4
        decay, l2, scale = tl.load(scalars + DECAY), tl.load(scalars + L2), tl.load(SCALE)
        rate = lr * tl.load(LR) * tl.load(scalars + LR_SCALE)
        length, blocks, first = tl.load(row + LENGTH), tl.load(row + BLOCKS), tl.load(row + FIRST)
        ratio = 1.0
        if tl.load(scalars + EXCLUDED) == 0.0:
            # Every chunk of a tensor sums the same numbers in the same order: no atomics, the same bits each time.
            index = tl.arange(0, CHUNKS_BOUND)
            mine = index < (length + blocks * SPAN - 1) // (blocks * SPAN)
            w_norm = tl.sqrt(tl.sum(tl.load(SUMS + 2 * (first + index), mask=mine, other=0.0)))
            g_norm = tl.sqrt(tl.sum(tl.load(SUMS + 2 * (first + index) + 1, mask=mine, other=0.0)))
            if GOOGLE:
                ratio = tl.where((w_norm > 0) & (g_norm > 0), trust * w_norm / g_norm, 1.0)
            else:
                ratio = tl.where(w_norm > 0, trust * w_norm / (g_norm + decay * w_norm + eps), 1.0)
                ratio = tl.where(g_norm > 0, ratio, 0.0)
        even = length // 4 * 4
        start = (chunk - first) * blocks
        for i in range(0, blocks.to(tl.int32)):
            offsets = (start + i) * SPAN + tl.arange(0, SPAN)
            _move(row, offsets, even, scale, l2, decay, ratio, rate, momentum, GOOGLE, ALIGNED)
        if (start + blocks) * SPAN >= length:
            offsets = even + tl.arange(0, 4)
            _move(row, offsets, length, scale, l2, decay, ratio, rate, momentum, GOOGLE, ALIGNED)


@torch.no_grad()
def lars_step_fused(tensors: Tensors, rule: Rule) -> None:
    """One LARS step as `lars_step` says it, of tensors that were checked: two launches on the current stream.

    The CPU waits for nothing. Where addresses or scalars are new, one copy of the table comes before the launches.
    """
    params, grads, momenta, copies, weight_decay, l2, lr_scale, excluded = tensors
    lr, momentum, trust, variant, eps, inverse_scale, found_inf = rule
    lengths = tuple(map(Tensor.numel, params))
    if not any(lengths):
        return
    addresses = [tuple(map(Tensor.data_ptr, column)) for column in (params, grads, momenta)]
    addresses.append(tuple([0 if c is None else c.data_ptr() for c in copies]))
    kinds = tuple(
        [
            GRAD_KINDS[g.dtype] + len(GRAD_KINDS) * COPY_KINDS[None if c is None else c.dtype]
            for g, c in zip(grads, copies, strict=True)
        ]
    )
    scalars = (tuple(weight_decay), tuple(l2), tuple(excluded), tuple(lr_scale))
    device = params[0].device
    constants: dict[str, Any] = {"GOOGLE": variant == "google", "SPAN": BLOCK}
    options = {"num_warps": WARPS, "num_stages": STAGES}
    with torch.cuda.device_of(params[0]):  # type: ignore[no-untyped-call]
        where = table(addresses, lengths, kinds, scalars, device)
        C = where.chunks_C.numel()
        sums_C2 = torch.empty(C, 2, dtype=torch.float32, device=device)
        scale = where.one if inverse_scale is None else inverse_scale.float()
        found = where.zero if found_inf is None else found_inf.float()
        rate, factor = (lr.float(), 1.0) if isinstance(lr, Tensor) else (where.one, lr)
        inputs = (where.tensors_T8, where.scalars_T4, where.chunks_C, scale, sums_C2)
        constants["ALIGNED"] = where.aligned
        lars_sums[(C,)](*inputs, **constants, **options)
        lars_update[(C,)](
            *inputs, rate, found, factor, momentum, trust, eps, **constants, CHUNKS_BOUND=MAX_CHUNKS, **options
        )


def variants() -> list[Compiled]:
    """Both kernels in both formulas, for tensors that all start at multiples of 16 bytes and for others."""
    tensors = {"TENSORS": "*i64", "SCALARS": "*fp32", "CHUNKS": "*i32", "SCALE": "*fp32", "SUMS": "*fp32"}
    numbers = {"LR": "*fp32", "FOUND": "*fp32"} | dict.fromkeys(("lr", "momentum", "trust", "eps"), "fp32")
    made = []
    for google, aligned in itertools.product((True, False), (True, False)):
        constants = {"GOOGLE": google, "ALIGNED": aligned, "SPAN": BLOCK}
        name = f"{'google' if google else 'lightly'}{'' if aligned else ', unaligned'}"
        for kernel, signature, more in (
            (lars_sums, tensors, {}),
            (lars_update, tensors | numbers, {"CHUNKS_BOUND": MAX_CHUNKS}),
        ):
            made.append(
                Compiled(
                    name=f"{kernel.__name__} {name}",
                    kernel=kernel,
                    signature=signature,
                    constants=constants | more,
                    aligned=("TENSORS", "SCALARS", "CHUNKS", "SUMS"),
                    warps=WARPS,
                    stages=STAGES,
                )
            )
    return made
