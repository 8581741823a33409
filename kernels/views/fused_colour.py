"""The photometric ops inside a kernel: r, g, b are float32 tiles of one view, so every branch on its row is uniform.

brightness x f (or x + f), contrast f x + (1 - f) mean, saturation f x + (1 - f) grey (tensorflow: in HSV), hue in HSV.
"""

# TORCHVISION: its semantics, else tensorflow's. ADD: brightness is added. SIZE: side of a view

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

GREY_R = tl.constexpr(0.2989)
GREY_G = tl.constexpr(0.587)
GREY_B = tl.constexpr(0.114)
TINY = tl.constexpr(1e-20)
CENTRE = tl.constexpr(0.5)
"""Scratch holds x - .5: fp16 has half the error there, and a sum of weighted differences keeps what is flat."""


@triton.jit
def clip(x):
    """x in [0, 1]; NaN stays NaN."""
    low = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(low, 1.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def to_grey(r, g, b):
    """.2989 r + .587 g + .114 b."""
    return r * GREY_R + g * GREY_G + b * GREY_B


@triton.jit
def _hue(r, g, b, turns):
    """The hue turned, 1 is once round, at fixed largest and smallest channel.

    A channel is low + chroma * clip(|h - 3| - 1) for red, of 2 - |h - 2| for green, 2 - |h - 4| for blue, 0 <= h < 6.
    """
    low, top = tl.minimum(tl.minimum(r, g), b), tl.maximum(tl.maximum(r, g), b)
    chroma = top - low
    sixth = 1.0 / tl.maximum(6.0 * chroma, TINY)
    hue = tl.where(top == g, (b - r) * sixth + 1 / 3, (r - g) * sixth + 2 / 3)
    hue = tl.where(top == r, (g - b) * sixth, hue) + turns
    h = 6.0 * (hue - tl.floor(hue))
    red, green, blue = tl.abs(h - 3.0) - 1.0, 2.0 - tl.abs(h - 2.0), 2.0 - tl.abs(h - 4.0)
    return low + chroma * _unit(red), low + chroma * _unit(green), low + chroma * _unit(blue)


@triton.jit
def _unit(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _saturation(r, g, b, factor, TORCHVISION: tl.constexpr):
    """A blend with grey; tensorflow: rgb' = v + min(f, v / chroma) (rgb - v) with v the largest channel."""
    if TORCHVISION:
        rest = (1.0 - factor) * to_grey(r, g, b)
        r, g, b = factor * r + rest, factor * g + rest, factor * b + rest
    else:
        low, top = tl.minimum(tl.minimum(r, g), b), tl.maximum(tl.maximum(r, g), b)
        ratio = tl.maximum(tl.minimum(factor, top / tl.maximum(top - low, TINY)), 0.0)
        ratio = tl.where(factor == 1.0, 1.0, ratio) - 1.0
        r, g, b = r + ratio * (r - top), g + ratio * (g - top), b + ratio * (b - top)
    return r, g, b


@triton.jit
def jitter_op(
    r, g, b, op, factor, mean_r, mean_g, mean_b,
    TORCHVISION: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """One of the four ops (0 brightness, 1 contrast, 2 saturation, 3 hue), then the clip."""
    if op == 0:
        if ADD:
            r, g, b = r + factor, g + factor, b + factor
        else:
            r, g, b = r * factor, g * factor, b * factor
    elif op == 1:
        rest = 1.0 - factor
        r, g, b = factor * r + rest * mean_r, factor * g + rest * mean_g, factor * b + rest * mean_b
    elif op == 2:
        r, g, b = _saturation(r, g, b, factor, TORCHVISION)
    else:
        r, g, b = _hue(r, g, b, factor)
    return clip(r), clip(g), clip(b)


@triton.jit
def cos_sin(turns):
    """Cosine and sine of 2 pi turns, turns of any size, to 1e-7. The library's own keep an array in slow memory."""
    quarters = tl.floor(4.0 * turns + 0.5)
    x = 6.283185307179586 * (turns - 0.25 * quarters)
    s = x * x
    sin = x * (1.0 + s * (-1 / 6 + s * (1 / 120 + s * (-1 / 5040 + s * (1 / 362880)))))
    cos = 1.0 + s * (-0.5 + s * (1 / 24 + s * (-1 / 720 + s * (1 / 40320))))
    quarter = quarters.to(tl.int32) & 3
    odd = (quarter & 1) == 1
    first, second = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where((quarter == 1) | (quarter == 2), -first, first), tl.where(quarter >= 2, -second, second)


@triton.jit
def _normals(key, pixel):
    """Three standard normals of pixel number `pixel`: Philox4x32-10 of (key, 0), (pixel, 0, 0, 0), then Box-Muller."""
    zero = pixel * 0
    w0, w1, w2, w3 = tl.philox(key.to(tl.uint32, bitcast=True), pixel, zero, zero, zero)
    u0 = ((w0 >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08
    u1 = ((w1 >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08
    u2 = ((w2 >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08
    u3 = ((w3 >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08
    cos, sin = cos_sin(u1)
    other, _ = cos_sin(u3)
    radius, radius2 = tl.sqrt(-2.0 * tl.log(u0)), tl.sqrt(-2.0 * tl.log(u2))
    return radius * cos, radius * sin, radius2 * other


@triton.jit
def finish(
    out, view, r, g, b, y, x,
    noise, noise_key, solarise, cutout,
    gain_r, gain_g, gain_b, offset_r, offset_g, offset_b,
    SIZE: tl.constexpr,
):  # fmt: skip
    """The last ops of a pixel, which need no other: noise, solarise, normalise, cutout; stored as NHWC.

    y, x: int32 [.., 1] and [1, ..], the pixel's place. An op that no view has comes as None.
    """
    if noise is not None:
        std = tl.load(noise + view)
        if std != 0.0:
            n0, n1, n2 = _normals(tl.load(noise_key + view), y * SIZE + x)
            r, g, b = clip(r + std * n0), clip(g + std * n1), clip(b + std * n2)
    if solarise is not None:
        chosen = tl.load(solarise + view)
        r = tl.where(chosen & (r >= 0.5), 1.0 - r, r)
        g = tl.where(chosen & (g >= 0.5), 1.0 - g, g)
        b = tl.where(chosen & (b >= 0.5), 1.0 - b, b)
    r, g, b = r * gain_r + offset_r, g * gain_g + offset_g, b * gain_b + offset_b
    if cutout is not None:
        top, left = tl.load(cutout + 4 * view), tl.load(cutout + 4 * view + 1)
        height, width = tl.load(cutout + 4 * view + 2), tl.load(cutout + 4 * view + 3)
        cut = ((y >= top) & (y < top + height)) & ((x >= left) & (x < left + width))
        # A view of NaN is one of a row that makes no sense: it says so everywhere.
        r = tl.where(cut & (r == r), 0.0, r)
        g = tl.where(cut & (g == g), 0.0, g)
        b = tl.where(cut & (b == b), 0.0, b)
    inside = (y < SIZE) & (x < SIZE)
    at = out + view.to(tl.int64) * (3 * SIZE * SIZE) + 3 * (y * SIZE + x)
    tl.store(at, r.to(out.dtype.element_ty), mask=inside)
    tl.store(at + 1, g.to(out.dtype.element_ty), mask=inside)
    tl.store(at + 2, b.to(out.dtype.element_ty), mask=inside)


@triton.jit
def keep(scratch, row, r, g, b, y, x, SIZE: tl.constexpr):
    """A tile for a pass that needs its neighbours: planar, less CENTRE, row `row` of the scratch memory."""
    inside = (y < SIZE) & (x < SIZE)
    at = scratch + row.to(tl.int64) * (3 * SIZE * SIZE) + (y * SIZE + x)
    # Said to be less contiguous than it is: a layout of several columns a thread repeats the weights of each column,
    # and scatters the stores of the views that are finished.
    at = tl.max_contiguous(at, [1, 1])
    tl.store(at, (r - CENTRE).to(scratch.dtype.element_ty), mask=inside)
    tl.store(at + SIZE * SIZE, (g - CENTRE).to(scratch.dtype.element_ty), mask=inside)
    tl.store(at + 2 * SIZE * SIZE, (b - CENTRE).to(scratch.dtype.element_ty), mask=inside)
