"""The ops that look at a pixel's neighbours: blur, both axes of it in one kernel, and Sobel edges.

blur(x)[y, x] = sum_ij w_i w_j x[y + i, x + j], w_d = exp(-d^2 / 2 sigma^2) / sum: two matrix products of a tile with
banded matrices, on the tensor cores where scratch is fp16. Gaussian weights go in undivided: their largest is 1, which
fp16 holds exactly, and the division by the sum of the rounded ones keeps what is flat as it is.
"""

# TORCHVISION: edges are reflected, else black. RADIUS: the kernel has 2 RADIUS + 1 pixels. SIDE: of a program's tile

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from fastsimclr.kernels.views.fused_colour import CENTRE, clip, finish, keep

_ANY = ["sigma", "sobel", "noise", "noise_key", "solarise", "cutout"]  # as in fused_cut


@triton.jit
def _gaussian(distance, slope, RADIUS: tl.constexpr):
    """exp(-d^2 / 2 sigma^2) = 2^(slope d^2) up to RADIUS, then 0."""
    d = distance.to(tl.float32)
    return tl.where(tl.abs(distance) <= RADIUS, tl.exp2(slope * d * d), 0.0)


@triton.jit
def _weights(
    pixel, origin, offset, slope, scratch,
    SIZE: tl.constexpr, RADIUS: tl.constexpr, SIDE: tl.constexpr, TORCHVISION: tl.constexpr,
):  # fmt: skip
    """How much of a pixel goes to origin + offset, in the type of the scratch memory.

    A pixel counts once more for each mirror image of it that is near, at the first and at the last pixel of the axis.
    """
    at = origin + offset
    weight = _gaussian(pixel - at, slope, RADIUS)
    if TORCHVISION and ((origin < RADIUS) | (origin + SIDE + RADIUS > SIZE)):
        before = tl.where(pixel > 0, _gaussian(pixel + at, slope, RADIUS), 0.0)
        after = tl.where(pixel < SIZE - 1, _gaussian(2 * (SIZE - 1) - pixel - at, slope, RADIUS), 0.0)
        weight = tl.where((pixel >= 0) & (pixel < SIZE), weight + before + after, 0.0)
    return weight.to(scratch.dtype.element_ty)


@triton.jit
def _blurred(
    scratch, row, channel: tl.constexpr, top, left, slope, scale,
    SIZE: tl.constexpr, RADIUS: tl.constexpr, SIDE: tl.constexpr, SPAN: tl.constexpr, TORCHVISION: tl.constexpr,
):  # fmt: skip
    """The tile [SIDE, SIDE] of one channel at top, left, from SPAN pixels at a time on each axis."""
    # Spans begin at multiples of 16 pixels, so that they are read 16 bytes at a time.
    AHEAD: tl.constexpr = (RADIUS + 15) // 16 * 16
    place, around = tl.arange(0, SIDE), tl.arange(0, SPAN)
    outside = 0.0 if TORCHVISION else -CENTRE
    plane = scratch + (3 * row + channel).to(tl.int64) * (SIZE * SIZE)
    done = tl.zeros([SIDE, SIDE], tl.float32)
    for begin_y in range(0, SIDE + RADIUS + AHEAD, SPAN):
        y = top + begin_y - AHEAD + around
        across = tl.zeros([SPAN, SIDE], tl.float32)
        for begin_x in range(0, SIDE + RADIUS + AHEAD, SPAN):
            x = left + begin_x - AHEAD + around
            inside = ((y >= 0) & (y < SIZE))[:, None] & ((x >= 0) & (x < SIZE))[None, :]
            pixels = tl.load(plane + y[:, None] * SIZE + x[None, :], mask=inside, other=outside)
            band = _weights(x[:, None], left, place[None, :], slope, scratch, SIZE, RADIUS, SIDE, TORCHVISION)
            across = tl.dot(pixels, band, across, input_precision="ieee")
        across = (across * scale).to(scratch.dtype.element_ty)
        band = _weights(y[None, :], top, place[:, None], slope, scratch, SIZE, RADIUS, SIDE, TORCHVISION)
        done = tl.dot(band, across, done, input_precision="ieee")
    return clip(done * scale + CENTRE)


@triton.jit
def _scale(slope, scratch, RADIUS: tl.constexpr, SPAN: tl.constexpr):
    """1 / sum of the kernel, of its weights as they are rounded."""
    total = 0.0
    for begin in range(0, 2 * RADIUS + 1, SPAN):
        weight = _gaussian(begin + tl.arange(0, SPAN) - RADIUS, slope, RADIUS).to(scratch.dtype.element_ty)
        total += tl.sum(weight.to(tl.float32))
    return 1.0 / total


@triton.jit(do_not_specialize=["first_view"], do_not_specialize_on_alignment=_ANY)
def blur_kernel(
    out, scratch, edges, sigma, sobel, noise, noise_key, solarise, cutout,
    first_view, gain_r, gain_g, gain_b, offset_r, offset_g, offset_b,
    SIZE: tl.constexpr, RADIUS: tl.constexpr, SIDE: tl.constexpr, SPAN: tl.constexpr, TORCHVISION: tl.constexpr,
):  # fmt: skip
    """Blur of the views with sigma > 0, then the last ops; or into `edges` where sobel comes next."""
    WIDE: tl.constexpr = (SIZE + SIDE - 1) // SIDE
    row, tile = tl.program_id(0) // (WIDE * WIDE), tl.program_id(0) % (WIDE * WIDE)
    view = first_view + row
    deviation = tl.load(sigma + view)
    if deviation > 0.0:
        top, left = tile // WIDE * SIDE, tile % WIDE * SIDE
        # -log2(e) / 2 sigma^2; below a sigma of .02 no neighbour has a weight.
        slope = -0.7213475204444817 / (tl.maximum(deviation, 0.02) * tl.maximum(deviation, 0.02))
        scale = _scale(slope, scratch, RADIUS, SPAN)
        r = _blurred(scratch, row, 0, top, left, slope, scale, SIZE, RADIUS, SIDE, SPAN, TORCHVISION)
        g = _blurred(scratch, row, 1, top, left, slope, scale, SIZE, RADIUS, SIDE, SPAN, TORCHVISION)
        b = _blurred(scratch, row, 2, top, left, slope, scale, SIZE, RADIUS, SIDE, SPAN, TORCHVISION)
        y, x = top + tl.arange(0, SIDE)[:, None], left + tl.arange(0, SIDE)[None, :]
        waits = False
        if sobel is not None:
            waits = tl.load(sobel + view)
        if edges is not None:
            if waits:
                keep(edges, row, r, g, b, y, x, SIZE)
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


@triton.jit
def _gradient(plane, y, x, SIZE: tl.constexpr):
    """sqrt(gx^2 + gy^2) / (4 sqrt 2) of one channel; borders repeat their own pixel."""
    gx, gy = 0.0 * (y + x), 0.0 * (y + x)
    above, below = _clamped(y - 1, SIZE) * SIZE, _clamped(y + 1, SIZE) * SIZE
    before, after = _clamped(x - 1, SIZE), _clamped(x + 1, SIZE)
    for step in range(3):
        weight = 1.0 + step % 2
        row, column = _clamped(y + step - 1, SIZE) * SIZE, _clamped(x + step - 1, SIZE)
        gx += weight * (_at(plane, row, after) - _at(plane, row, before))
        gy += weight * (_at(plane, below, column) - _at(plane, above, column))
    return tl.sqrt(gx * gx + gy * gy) * 0.17677669529663687


@triton.jit
def _clamped(at, SIZE: tl.constexpr):
    return tl.minimum(tl.maximum(at, 0), SIZE - 1)


@triton.jit
def _at(plane, row, column):
    return tl.load(plane + row + column).to(tl.float32)


@triton.jit(do_not_specialize=["first_view"], do_not_specialize_on_alignment=_ANY)
def sobel_kernel(
    out, scratch, edges, sigma, sobel, noise, noise_key, solarise, cutout,
    first_view, gain_r, gain_g, gain_b, offset_r, offset_g, offset_b,
    SIZE: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Edges of the chosen views, from `edges` where they were blurred and `scratch` where not, then the last ops."""
    WIDE: tl.constexpr = (SIZE + SIDE - 1) // SIDE
    row, tile = tl.program_id(0) // (WIDE * WIDE), tl.program_id(0) % (WIDE * WIDE)
    view = first_view + row
    if tl.load(sobel + view):
        y = tile // WIDE * SIDE + tl.arange(0, SIDE)[:, None]
        x = tile % WIDE * SIDE + tl.arange(0, SIDE)[None, :]
        plane = scratch + row.to(tl.int64) * (3 * SIZE * SIZE)
        if sigma is not None and tl.load(sigma + view) > 0.0:
            plane = edges + row.to(tl.int64) * (3 * SIZE * SIZE)
        r = _gradient(plane, y, x, SIZE)
        g = _gradient(plane + SIZE * SIZE, y, x, SIZE)
        b = _gradient(plane + 2 * SIZE * SIZE, y, x, SIZE)
        finish(
            out, view, r, g, b, y, x, noise, noise_key, solarise, cutout,
            gain_r, gain_g, gain_b, offset_r, offset_g, offset_b, SIZE,
        )  # fmt: skip
