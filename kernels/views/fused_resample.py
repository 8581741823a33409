"""Crop, resize, turn and flip inside a kernel: out[y, x] = sum_ij wy[y, i] wx[x, j] image[i, j], tap by tap.

Weights are computed where they are used, and nothing is stored between the two axes.
"""

# SIZE: side of a view. SIDE: of a program's tile. TORCHVISION: its semantics, else tensorflow's

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from fastsimclr.kernels.views.fused_colour import cos_sin


@triton.jit
def window(
    view, buffer, buffer_bytes, offsets, heights, widths, images,
    image_height, image_width, ids, chosen, source, crop, SIZE: tl.constexpr,
):  # fmt: skip
    """The crop of a view: whether it lies in its image; its first byte, bytes a row, height and width.

    Image i is at offsets[i], or where all have one size and `offsets` is None, at i times its bytes. A crop that does
    not lie in its image becomes the buffer's first pixel, so that nothing else is read.
    """
    image = tl.load(source + view).to(tl.int64)
    good = (image >= 0) & (image < chosen)
    image = tl.where(good, image, 0)
    if ids is not None:
        image = tl.load(ids + image)
        good = good & (image >= 0) & (image < images)
        image = tl.where(good, image, 0)
    if offsets is not None:
        offset, tall, wide = tl.load(offsets + image), tl.load(heights + image), tl.load(widths + image)
    else:
        tall, wide = image_height, image_width
        offset = image * 3 * tall * wide
    top, left = tl.load(crop + 4 * view), tl.load(crop + 4 * view + 1)
    height, width = tl.load(crop + 4 * view + 2), tl.load(crop + 4 * view + 3)
    good = good & (top >= 0) & (left >= 0) & (height >= 1) & (width >= 1)
    good = good & (height <= tall - top) & (width <= wide - left)
    good = good & (offset >= 0) & (offset + tall.to(tl.int64) * wide * 3 <= buffer_bytes)
    # Places on an axis are exact fractions in 32 bits: (2 SIZE - 1) * length fits.
    good = good & (height <= 2147483647 // (2 * SIZE)) & (width <= 2147483647 // (2 * SIZE))
    start = tl.where(good, offset + (top.to(tl.int64) * wide + left) * 3, 0)
    return good, buffer + start, tl.where(good, 3 * wide, 3), tl.where(good, height, 1), tl.where(good, width, 1)


@triton.jit
def _axis(position, length, SIZE: tl.constexpr, TORCHVISION: tl.constexpr):
    """The first pixel that the output pixels at `position` look at, and its distance from where they lie."""
    if TORCHVISION:
        # The centre (position + .5) length / SIZE as a whole and a part, so that wide images lose no digits.
        twice = (2 * position + 1) * length
        whole = twice // (2 * SIZE)
        part = (twice - whole * (2 * SIZE)).to(tl.float32) / (2 * SIZE)
        shift = tl.floor(part + 0.5 - tl.maximum(length.to(tl.float32) / SIZE, 1.0))
        first = whole + shift.to(tl.int32)
        # The taps are moved into the crop: those that come in have no weight.
        begin = tl.minimum(tl.maximum(first, 0), length - _taps(length, SIZE, TORCHVISION))
        return begin, (begin - first).to(tl.float32) + shift + (0.5 - part)
    else:
        # float64, as a float32 product would be fused with the difference and not be rounded as TensorFlow's is.
        scale = tl.div_rn(length.to(tl.float32), SIZE * 1.0)
        at = (position.to(tl.float64) * scale.to(tl.float64)).to(tl.float32)
        whole = tl.floor(at)
        # Adding 1.5 * 2^23 rounds to a whole number, halves to even.
        offset = ((at - whole) * 1024.0 + 12582912.0 - 12582912.0) * 0.0009765625
        return whole.to(tl.int32) - 1, -1.0 - offset


@triton.jit
def _taps(length, SIZE: tl.constexpr, TORCHVISION: tl.constexpr):
    """How many pixels of a side of `length` an output pixel looks at; the cubic may look at an edge more than once."""
    if TORCHVISION:
        return tl.minimum(tl.maximum((2 * length + SIZE - 1) // SIZE, 2), length)
    else:
        return 4 + 0 * length


@triton.jit
def _tap(first_pixel, distance, tap, length, slope, TORCHVISION: tl.constexpr):
    """The weight and the place of a tap: a triangle inside the crop, or Keys' cubic (a = -.75) with edges repeated."""
    at, away = first_pixel + tap, tl.abs(distance + tap)
    if TORCHVISION:
        return tl.maximum(1.0 - away * slope, 0.0), at
    else:
        near = (1.25 * away - 2.25) * away * away + 1.0
        weight = tl.where(away <= 1.0, near, ((-0.75 * away + 3.75) * away - 6.0) * away + 3.0)
        return weight, tl.minimum(tl.maximum(at, 0), length - 1)


@triton.jit
def _sum_taps(
    start, pitch, height, width, first_y, distance_y, first_x, distance_x, taps_y, taps_x,
    SIZE: tl.constexpr, SIDE: tl.constexpr, TORCHVISION: tl.constexpr,
):  # fmt: skip
    """The weighted sums of the bytes, divided by the sum of the weights (those of the cubic add up to 1) and by 255."""
    slope_y = 1.0 / tl.maximum(height.to(tl.float32) / SIZE, 1.0)
    slope_x = 1.0 / tl.maximum(width.to(tl.float32) / SIZE, 1.0)
    r = tl.zeros([SIDE, SIDE], tl.float32)
    g, b, total = r, r, r
    for i in range(taps_y):
        weight_y, at_y = _tap(first_y, distance_y, i, height, slope_y, TORCHVISION)
        line = start + at_y.to(tl.int64) * pitch
        for j in range(taps_x):
            weight_x, at_x = _tap(first_x, distance_x, j, width, slope_x, TORCHVISION)
            weight, pixel = weight_y * weight_x, line + 3 * at_x
            r += weight * tl.load(pixel).to(tl.float32)
            g += weight * tl.load(pixel + 1).to(tl.float32)
            b += weight * tl.load(pixel + 2).to(tl.float32)
            if TORCHVISION:
                total += weight
    scale = 1 / 255
    if TORCHVISION:
        scale = scale / total
    return r * scale, g * scale, b * scale


@triton.jit
def _resample(
    start, pitch, height, width, down, across,
    SIZE: tl.constexpr, SIDE: tl.constexpr, TORCHVISION: tl.constexpr,
):  # fmt: skip
    """The crop resized to SIZE x SIZE, in 0..1, at places down, across: [SIDE, 1] and [1, SIDE], or both full."""
    first_y, distance_y = _axis(down, height, SIZE, TORCHVISION)
    first_x, distance_x = _axis(across, width, SIZE, TORCHVISION)
    taps_y, taps_x = _taps(height, SIZE, TORCHVISION), _taps(width, SIZE, TORCHVISION)
    # Most crops are enlarged: two taps an axis, which the compiler unrolls.
    if TORCHVISION and (taps_y == 2) & (taps_x == 2):
        r, g, b = _sum_taps(
            start, pitch, height, width, first_y, distance_y, first_x, distance_x, 2, 2,
            SIZE, SIDE, TORCHVISION,
        )  # fmt: skip
    else:
        r, g, b = _sum_taps(
            start, pitch, height, width, first_y, distance_y, first_x, distance_x, taps_y, taps_x,
            SIZE, SIDE, TORCHVISION,
        )  # fmt: skip
    return r, g, b


@triton.jit
def _turned(
    start, pitch, height, width, down, across, angle,
    SIZE: tl.constexpr, SIDE: tl.constexpr, TORCHVISION: tl.constexpr,
):  # fmt: skip
    """The resized crop turned about its centre: bilinear between four of its pixels, black outside."""
    cos, sin = cos_sin((angle.to(tl.float64) * 0.15915494309189535).to(tl.float32))
    v, u = down - (SIZE - 1) * 0.5, across - (SIZE - 1) * 0.5
    y, x = sin * u + cos * v + (SIZE - 1) * 0.5, cos * u - sin * v + (SIZE - 1) * 0.5
    whole_y, whole_x = tl.floor(y), tl.floor(x)
    r = tl.zeros([SIDE, SIDE], tl.float32)
    g, b = r, r
    for corner in range(4):
        below, right = corner // 2, corner % 2
        weight = tl.abs(1.0 - below - (y - whole_y)) * tl.abs(1.0 - right - (x - whole_x))
        at_y, at_x = whole_y.to(tl.int32) + below, whole_x.to(tl.int32) + right
        weight = tl.where((at_y >= 0) & (at_y < SIZE) & (at_x >= 0) & (at_x < SIZE), weight, 0.0)
        at_y, at_x = tl.minimum(tl.maximum(at_y, 0), SIZE - 1), tl.minimum(tl.maximum(at_x, 0), SIZE - 1)
        r1, g1, b1 = _resample(start, pitch, height, width, at_y, at_x, SIZE, SIDE, TORCHVISION)
        r, g, b = r + weight * r1, g + weight * g1, b + weight * b1
    return r, g, b


@triton.jit
def cut_tile(
    view, good, start, pitch, height, width, y, x,
    angle, quarter, flip,
    SIZE: tl.constexpr, SIDE: tl.constexpr, TORCHVISION: tl.constexpr,
):  # fmt: skip
    """Crop, resize, rotate, quarter turns, flip: backwards, from the places y, x to where their pixels come from."""
    # Places beyond the view repeat its last pixel and are not stored.
    down, across = tl.minimum(y, SIZE - 1), tl.minimum(x, SIZE - 1)
    if flip is not None:
        across = tl.where(tl.load(flip + view), SIZE - 1 - across, across)
    if quarter is not None:
        down, across = tl.broadcast(down, across)
        for _ in range(tl.load(quarter + view) & 3):
            down, across = across, SIZE - 1 - down
    if angle is not None:
        down, across = tl.broadcast(down, across)
        turn = tl.where(good, tl.load(angle + view), 0.0)
        return _turned(
            start, pitch, height, width, down, across, turn, SIZE, SIDE, TORCHVISION
        )  # fmt: skip
    else:
        return _resample(start, pitch, height, width, down, across, SIZE, SIDE, TORCHVISION)
