"""The kernel that makes views up to the blur, and the one before it for the mean that contrast needs.

contrast: f x + (1 - f) mean, the mean of all that came before it. A program makes a tile of SIDE x SIDE pixels of one
view; where a view is one tile, its mean needs no kernel of its own.
"""

# sums [views, channels, tiles]

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from fastsimclr.kernels.views.fused_colour import clip, finish, jitter_op, keep, to_grey
from fastsimclr.kernels.views.fused_resample import cut_tile, window

PARTIALS = tl.constexpr(128)
"""Partial sums added at a time."""
# Counts and alignments differ between batches: one binary for all of them, so that no step waits for a compiler.
_COUNTS = ["buffer_bytes", "images", "image_height", "image_width", "chosen", "first_view"]
_ANY = [
    "buffer", "offsets", "heights", "widths", "ids", "source", "crop", "angle", "quarter", "flip", "jitter", "factors",
    "order", "grey", "sigma", "sobel", "noise", "noise_key", "solarise", "cutout",
]  # fmt: skip


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _is_permutation(order, view):
    """Whether the four numbers of a view's order are 0, 1, 2, 3."""
    a, b = tl.load(order + 4 * view), tl.load(order + 4 * view + 1)
    c, d = tl.load(order + 4 * view + 2), tl.load(order + 4 * view + 3)
    seen = (1 << (a & 3)) | (1 << (b & 3)) | (1 << (c & 3)) | (1 << (d & 3))
    return (seen == 15) & ((a | b | c | d) == 3)


@triton.jit
def _makes_sense(view, angle, factors, order, sigma, noise):
    """Whether the row's numbers are finite and its order is one; of ops that no view has (None) nothing is asked."""
    good = view >= 0
    if angle is not None:
        good = good & _finite(tl.load(angle + view))
    if factors is not None:
        at = factors + 4 * view
        good = good & _finite(tl.load(at)) & _finite(tl.load(at + 1))
        good = good & _finite(tl.load(at + 2)) & _finite(tl.load(at + 3)) & _is_permutation(order, view)
    if sigma is not None:
        good = good & _finite(tl.load(sigma + view))
    if noise is not None:
        good = good & _finite(tl.load(noise + view))
    return good


@triton.jit
def _mean(sums, channel, TILES: tl.constexpr, SIZE: tl.constexpr):
    """The mean of one channel from the partial sums of a view's tiles, always added in the same order."""
    place = tl.arange(0, PARTIALS)
    total = tl.zeros([PARTIALS], tl.float32)
    for begin in range(0, TILES, PARTIALS):
        at = begin + place
        total += tl.load(sums + channel * TILES + at, mask=at < TILES, other=0.0)
    return tl.sum(total) / (SIZE * SIZE)


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=_ANY)
def mean_kernel(
    sums, buffer, buffer_bytes, offsets, heights, widths, images,
    image_height, image_width, ids, chosen, source, crop,
    angle, quarter, flip, jitter, factors, order, first_view,
    SIZE: tl.constexpr, SIDE: tl.constexpr, TORCHVISION: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """sums[view, channel, tile] = sum of the tile's pixels as contrast finds them; torchvision: of their grey alone."""
    WIDE: tl.constexpr = (SIZE + SIDE - 1) // SIDE
    TILES: tl.constexpr = WIDE * WIDE
    row, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    view = first_view + row
    if tl.load(jitter + view):
        good, start, pitch, height, width = window(
            view, buffer, buffer_bytes, offsets, heights, widths, images, image_height, image_width,
            ids, chosen, source, crop, SIZE,
        )  # fmt: skip
        good = good & _makes_sense(view, angle, None, None, None, None)
        y = tile // WIDE * SIDE + tl.arange(0, SIDE)[:, None]
        x = tile % WIDE * SIDE + tl.arange(0, SIDE)[None, :]
        r, g, b = cut_tile(
            view, good, start, pitch, height, width, y, x, angle, quarter, flip, SIZE, SIDE, TORCHVISION
        )  # fmt: skip
        before = 0
        running = 1
        for place in range(4):
            running = running * (tl.load(order + 4 * view + place) != 1).to(tl.int32)
            before += running
        for place in range(before):
            op = tl.load(order + 4 * view + place) & 3
            r, g, b = jitter_op(
                r, g, b, op, tl.load(factors + 4 * view + op), 0.0, 0.0, 0.0, TORCHVISION, ADD
            )  # fmt: skip
        inside = (y < SIZE) & (x < SIZE)
        if TORCHVISION:
            tl.store(sums + row.to(tl.int64) * TILES + tile, tl.sum(tl.where(inside, to_grey(r, g, b), 0.0)))
        else:
            at = sums + row.to(tl.int64) * (3 * TILES) + tile
            tl.store(at, tl.sum(tl.where(inside, r, 0.0)))
            tl.store(at + TILES, tl.sum(tl.where(inside, g, 0.0)))
            tl.store(at + 2 * TILES, tl.sum(tl.where(inside, b, 0.0)))


@triton.jit
def _jitter(
    r, g, b, view, sums, inside, factors, order,
    TILES: tl.constexpr, SIZE: tl.constexpr, TORCHVISION: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """The four ops in the view's own order. sums: the partial sums of this view; None where the tile is the view."""
    mean_r, mean_g, mean_b = 0.0, 0.0, 0.0
    if sums is not None:
        mean_r = _mean(sums, 0, TILES, SIZE)
        mean_g, mean_b = mean_r, mean_r
        if not TORCHVISION:
            mean_g, mean_b = _mean(sums, 1, TILES, SIZE), _mean(sums, 2, TILES, SIZE)
    for place in range(4):
        op = tl.load(order + 4 * view + place) & 3
        if sums is None and op == 1:
            if TORCHVISION:
                mean_r = tl.sum(tl.where(inside, to_grey(r, g, b), 0.0)) / (SIZE * SIZE)
                mean_g, mean_b = mean_r, mean_r
            else:
                mean_r = tl.sum(tl.where(inside, r, 0.0)) / (SIZE * SIZE)
                mean_g = tl.sum(tl.where(inside, g, 0.0)) / (SIZE * SIZE)
                mean_b = tl.sum(tl.where(inside, b, 0.0)) / (SIZE * SIZE)
        factor = tl.load(factors + 4 * view + op)
        r, g, b = jitter_op(r, g, b, op, factor, mean_r, mean_g, mean_b, TORCHVISION, ADD)
    return r, g, b


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=_ANY)
def cut_kernel(
    out, scratch, sums, buffer, buffer_bytes, offsets, heights, widths,
    images, image_height, image_width, ids, chosen, source, crop,
    angle, quarter, flip, jitter, factors, order, grey, sigma, sobel,
    noise, noise_key, solarise, cutout, first_view,
    gain_r, gain_g, gain_b, offset_r, offset_g, offset_b,
    SIZE: tl.constexpr, SIDE: tl.constexpr, TORCHVISION: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Everything up to grey and its clip, then the last ops; or into scratch where blur or sobel come between."""
    WIDE: tl.constexpr = (SIZE + SIDE - 1) // SIDE
    TILES: tl.constexpr = WIDE * WIDE
    row, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    view = first_view + row
    good, start, pitch, height, width = window(
        view, buffer, buffer_bytes, offsets, heights, widths, images, image_height, image_width,
        ids, chosen, source, crop, SIZE,
    )  # fmt: skip
    good = good & _makes_sense(view, angle, factors, order, sigma, noise)
    y = tile // WIDE * SIDE + tl.arange(0, SIDE)[:, None]
    x = tile % WIDE * SIDE + tl.arange(0, SIDE)[None, :]
    r, g, b = cut_tile(
        view, good, start, pitch, height, width, y, x, angle, quarter, flip, SIZE, SIDE, TORCHVISION
    )  # fmt: skip
    if jitter is not None and tl.load(jitter + view):
        inside = (y < SIZE) & (x < SIZE)
        if sums is None:
            r, g, b = _jitter(r, g, b, view, None, inside, factors, order, TILES, SIZE, TORCHVISION, ADD)
        else:
            mine = sums + row.to(tl.int64) * (TILES if TORCHVISION else 3 * TILES)
            r, g, b = _jitter(r, g, b, view, mine, inside, factors, order, TILES, SIZE, TORCHVISION, ADD)
    if grey is not None and tl.load(grey + view):
        r = to_grey(r, g, b)
        g, b = r, r
    nan = float("nan")
    r, g, b = tl.where(good, clip(r), nan), tl.where(good, clip(g), nan), tl.where(good, clip(b), nan)
    waits = False
    if sigma is not None:
        waits = tl.load(sigma + view) > 0.0
    if sobel is not None:
        waits = waits | tl.load(sobel + view)
    if scratch is not None:
        if waits:
            keep(scratch, row, r, g, b, y, x, SIZE)
        else:
            finish(
                out, view, r, g, b, y, x, noise, noise_key, solarise, cutout,
                gain_r, gain_g, gain_b, offset_r, offset_g, offset_b, SIZE,
            )  # fmt: skip
    else:
        finish(
            out, view, r, g, b, y, x, noise, noise_key, solarise, cutout,
            gain_r, gain_g, gain_b, offset_r, offset_g, offset_b, SIZE,
        )  # fmt: skip
