"""The Triton programs of batch normalisation with residual and ReLU; the equations: reference.py.

Maps are matrices of a row for each image and position. A program works on K channels of a run of rows, B at a time, in
float32. What it sums it writes as its own part, and another adds the parts in their order: no atomics, the same bits
every time.
"""

# M rows, all values of a channel    C channels    B rows, K channels of a tile    P parts added at once

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

COUNTS = ("rows", "each", "count")
"""Numbers that vary from call to call: no program is compiled anew for their multiples of 16 or for 1."""


@triton.jit
def _channels(channels, K: tl.constexpr):
    """This program's channels, and which of them there are."""
    c = tl.program_id(0) * K + tl.arange(0, K)
    return c, c < channels


@triton.jit
def _run(rows, each):
    """First row of this program's run, and the one after its last."""
    start = tl.program_id(1) * each
    return start, tl.minimum(start + each, rows)


@triton.jit(do_not_specialize=COUNTS)
def statistics(x, partials, rows, each, channels, B: tl.constexpr, K: tl.constexpr):
    """partials[s] = mean and biased variance of each channel over run s.

    Every lane follows Welford's recurrence on x less the channel's first value, so that neither a far mean nor a far
    first value costs digits; then the lanes are pooled (Chan et al. 1983).
    """
    c, there_K = _channels(channels, K)
    start, stop = _run(rows, each)
    r = tl.arange(0, B)
    inside_BK = r[:, None] * channels + c[None, :]
    first_K = tl.load(x + c, mask=there_K, other=0.0).to(tl.float32)
    mean_BK = tl.zeros((B, K), tl.float32)
    squares_BK = tl.zeros((B, K), tl.float32)
    at = x + start.to(tl.int64) * channels
    seen = 0.0
    for row in range(start, stop, B):
        there_BK = (row + r < stop)[:, None] & there_K[None, :]
        x_BK = tl.load(at + inside_BK, mask=there_BK, other=0.0).to(tl.float32) - first_K[None, :]
        step_BK = tl.where(there_BK, x_BK - mean_BK, 0.0)
        seen += 1.0
        mean_BK += step_BK * (1.0 / seen)
        squares_BK += step_BK * (x_BK - mean_BK)
        at += B * channels
    n_B1 = ((tl.maximum(stop - start - r, 0) + B - 1) // B).to(tl.float32)[:, None]
    n = (stop - start).to(tl.float32)
    mean_K = tl.sum(n_B1 * mean_BK, 0) / n
    far_BK = mean_BK - mean_K[None, :]
    var_K = (tl.sum(squares_BK, 0) + tl.sum(n_B1 * far_BK * far_BK, 0)) / n
    out = partials + tl.program_id(1).to(tl.int64) * 2 * channels + c
    tl.store(out, first_K + mean_K, mask=there_K)
    tl.store(out + channels, var_K, mask=there_K)


@triton.jit(do_not_specialize=COUNTS)
def pool(
    partials, mean_var, running_mean, running_var, count, rows, each, channels, factor,
    TRACK: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """mean_var = mean and biased variance of all `rows`, from `count` partials of `each` rows; the last may be shorter.

    TRACK: running = (1 - factor) running + factor (mean, unbiased variance).
    """
    c, there_K = _channels(channels, K)
    origin_K = tl.load(partials + c, mask=there_K, other=0.0)
    sum_K = tl.zeros((K,), tl.float32)
    for start in range(0, count, P):
        at_PK, there_PK, n_P1 = _partials(partials, start, count, rows, each, channels, c, there_K, P)
        mean_PK = tl.load(at_PK, mask=there_PK, other=0.0)
        sum_K += tl.sum(tl.where(there_PK, n_P1 * (mean_PK - origin_K[None, :]), 0.0), 0)
    mean_K = origin_K + sum_K / rows
    squares_K = tl.zeros((K,), tl.float32)
    for start in range(0, count, P):
        at_PK, there_PK, n_P1 = _partials(partials, start, count, rows, each, channels, c, there_K, P)
        far_PK = tl.load(at_PK, mask=there_PK, other=0.0) - mean_K[None, :]
        var_PK = tl.load(at_PK + channels, mask=there_PK, other=0.0)
        squares_K += tl.sum(tl.where(there_PK, n_P1 * (var_PK + far_PK * far_PK), 0.0), 0)
    tl.store(mean_var + c, mean_K, mask=there_K)
    tl.store(mean_var + channels + c, squares_K / rows, mask=there_K)
    if TRACK:
        old_K = tl.load(running_mean + c, mask=there_K, other=0.0)
        tl.store(running_mean + c, (1.0 - factor) * old_K + factor * mean_K, mask=there_K)
        old_K = tl.load(running_var + c, mask=there_K, other=0.0)
        tl.store(running_var + c, (1.0 - factor) * old_K + factor * squares_K / (rows - 1), mask=there_K)


@triton.jit
def _partials(partials, start, count, rows, each, channels, c, there_K, P: tl.constexpr):
    """Where the means of the partials from `start` on lie, which there are, and of how many rows each is."""
    p = (start + tl.arange(0, P)).to(tl.int64)
    n_P = tl.minimum(tl.maximum(rows - p * each, 0), each).to(tl.float32)
    return partials + p[:, None] * (2 * channels) + c[None, :], (p < count)[:, None] & there_K[None, :], n_P[:, None]


@triton.jit
def _coefficients(mean_var, weight, bias, eps, channels, c, there_K, BIAS: tl.constexpr):
    """mean, 1 / sqrt(var + eps), weight / sqrt(var + eps) and bias of each channel."""
    mean_K = tl.load(mean_var + c, mask=there_K, other=0.0)
    inverse_K = 1.0 / tl.sqrt(tl.load(mean_var + channels + c, mask=there_K, other=1.0) + eps)
    scale_K = tl.load(weight + c, mask=there_K, other=0.0) * inverse_K
    bias_K = tl.zeros_like(scale_K)
    if BIAS:
        bias_K = tl.load(bias + c, mask=there_K, other=0.0)
    return mean_K, inverse_K, scale_K, bias_K


@triton.jit
def _bytes_of_bits(channels, r, K: tl.constexpr):
    """Where a tile's bits lie from its first row on, which bytes there are, and how many a row has."""
    wide = (channels + 7) // 8
    byte = tl.program_id(0) * (K // 8) + tl.arange(0, K // 8)
    return r[:, None] * wide + byte[None, :], (byte < wide)[None, :], wide


@triton.jit(do_not_specialize=COUNTS)
def apply(
    x, residual, weight, bias, mean_var, y, bits, rows, each, channels, eps,
    RESIDUAL: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr, B: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """y = relu((x - mean) scale + bias + residual). With RELU and RESIDUAL also a bit a value: whether it is kept."""
    c, there_K = _channels(channels, K)
    start, stop = _run(rows, each)
    r = tl.arange(0, B)
    mean_K, _, scale_K, bias_K = _coefficients(mean_var, weight, bias, eps, channels, c, there_K, BIAS)
    inside_BK = r[:, None] * channels + c[None, :]
    bytes_BQ, there_Q, wide = _bytes_of_bits(channels, r, K)
    offset = start.to(tl.int64) * channels
    x_at, residual_at, y_at = x + offset, residual + offset, y + offset
    bits_at = bits + start.to(tl.int64) * wide
    for row in range(start, stop, B):
        there_B1 = (row + r < stop)[:, None]
        there_BK = there_B1 & there_K[None, :]
        v_BK = tl.load(x_at + inside_BK, mask=there_BK, other=0.0).to(tl.float32) - mean_K[None, :]
        v_BK = tl.fma(v_BK, tl.broadcast_to(scale_K[None, :], (B, K)), tl.broadcast_to(bias_K[None, :], (B, K)))
        if RESIDUAL:
            v_BK += tl.load(residual_at + inside_BK, mask=there_BK, other=0.0).to(tl.float32)
        if RELU:
            kept_BK = _kept(v_BK, y)
            v_BK = tl.where(kept_BK, v_BK, 0.0)
            if RESIDUAL:
                kept_BQ8 = tl.reshape(kept_BK.to(tl.int32), (B, K // 8, 8))
                byte_BQ = tl.sum(kept_BQ8 << tl.arange(0, 8)[None, None, :], 2)
                tl.store(bits_at + bytes_BQ, byte_BQ.to(tl.uint8), mask=there_B1 & there_Q)
        tl.store(y_at + inside_BK, v_BK.to(y.dtype.element_ty), mask=there_BK)
        x_at += B * channels
        residual_at += B * channels
        y_at += B * channels
        bits_at += B * wide


@triton.jit
def _kept(v_BK, y):
    """Where ReLU keeps a value and its gradient: what is above 0 as `y` stores it, or NaN."""
    return (v_BK.to(y.dtype.element_ty).to(tl.float32) <= 0.0) == 0


@triton.jit
def _gradient(
    dy_BK, far_BK, scale_K, bias_K, dy, bits_at, bytes_BQ, there_BQ,
    BITS: tl.constexpr, RELU: tl.constexpr, B: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """dy where ReLU kept the value, else 0: by its bit, or by working the value out again, which reads nothing more."""
    if BITS:
        byte_BQ = tl.load(bits_at + bytes_BQ, mask=there_BQ, other=0).to(tl.int32)
        kept_BQ8 = (byte_BQ[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
        dy_BK = tl.where(tl.reshape(kept_BQ8, (B, K)) != 0, dy_BK, 0.0)
    elif RELU:
        v_BK = tl.fma(far_BK, tl.broadcast_to(scale_K[None, :], (B, K)), tl.broadcast_to(bias_K[None, :], (B, K)))
        dy_BK = tl.where(_kept(v_BK, dy), dy_BK, 0.0)
    return dy_BK


@triton.jit(do_not_specialize=COUNTS)
def sums(
    dy, x, weight, bias, mean_var, bits, partials, rows, each, channels, eps,
    BITS: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr, B: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """partials[s] = the sums over run s of d, what ReLU leaves of dy, and of d xhat."""
    c, there_K = _channels(channels, K)
    start, stop = _run(rows, each)
    r = tl.arange(0, B)
    mean_K, inverse_K, scale_K, bias_K = _coefficients(mean_var, weight, bias, eps, channels, c, there_K, BIAS)
    inside_BK = r[:, None] * channels + c[None, :]
    bytes_BQ, there_Q, wide = _bytes_of_bits(channels, r, K)
    offset = start.to(tl.int64) * channels
    x_at, dy_at, bits_at = x + offset, dy + offset, bits + start.to(tl.int64) * wide
    d_sum_BK = tl.zeros((B, K), tl.float32)
    far_sum_BK = tl.zeros((B, K), tl.float32)
    for row in range(start, stop, B):
        there_B1 = (row + r < stop)[:, None]
        there_BK = there_B1 & there_K[None, :]
        far_BK = tl.load(x_at + inside_BK, mask=there_BK, other=0.0).to(tl.float32) - mean_K[None, :]
        d_BK = tl.load(dy_at + inside_BK, mask=there_BK, other=0.0).to(tl.float32)
        d_BK = _gradient(
            d_BK, far_BK, scale_K, bias_K, dy, bits_at, bytes_BQ, there_B1 & there_Q, BITS, RELU, B, K
        )  # fmt: skip
        d_sum_BK += d_BK
        far_sum_BK += d_BK * far_BK
        x_at += B * channels
        dy_at += B * channels
        bits_at += B * wide
    out = partials + tl.program_id(1).to(tl.int64) * 2 * channels + c
    tl.store(out, tl.sum(d_sum_BK, 0), mask=there_K)
    tl.store(out + channels, tl.sum(far_sum_BK, 0) * inverse_K, mask=there_K)


@triton.jit(do_not_specialize=COUNTS)
def add(partials, total, count, channels, P: tl.constexpr, K: tl.constexpr):
    """total = the sum of `count` partials of `channels` numbers."""
    c, there_K = _channels(channels, K)
    sum_K = tl.zeros((K,), tl.float32)
    for start in range(0, count, P):
        p = (start + tl.arange(0, P)).to(tl.int64)
        there_PK = (p < count)[:, None] & there_K[None, :]
        sum_K += tl.sum(tl.load(partials + p[:, None] * channels + c[None, :], mask=there_PK, other=0.0), 0)
    tl.store(total + c, sum_K, mask=there_K)


@triton.jit(do_not_specialize=COUNTS)
def gradient(
    dy, x, weight, bias, mean_var, bits, total, dx, dresidual, rows, each, channels, inverse_count, eps,
    BITS: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr, B: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """dx = scale (d - mean(d) - xhat mean(d xhat)), means by the totals and 1 / count; with BITS also dresidual = d."""
    c, there_K = _channels(channels, K)
    start, stop = _run(rows, each)
    r = tl.arange(0, B)
    mean_K, inverse_K, scale_K, bias_K = _coefficients(mean_var, weight, bias, eps, channels, c, there_K, BIAS)
    level_K = tl.load(total + c, mask=there_K, other=0.0) * inverse_count
    slope_K = tl.load(total + channels + c, mask=there_K, other=0.0) * inverse_count * inverse_K
    inside_BK = r[:, None] * channels + c[None, :]
    bytes_BQ, there_Q, wide = _bytes_of_bits(channels, r, K)
    offset = start.to(tl.int64) * channels
    x_at, dy_at, bits_at = x + offset, dy + offset, bits + start.to(tl.int64) * wide
    dx_at, dresidual_at = dx + offset, dresidual + offset
    for row in range(start, stop, B):
        there_B1 = (row + r < stop)[:, None]
        there_BK = there_B1 & there_K[None, :]
        far_BK = tl.load(x_at + inside_BK, mask=there_BK, other=0.0).to(tl.float32) - mean_K[None, :]
        d_BK = tl.load(dy_at + inside_BK, mask=there_BK, other=0.0).to(tl.float32)
        d_BK = _gradient(
            d_BK, far_BK, scale_K, bias_K, dy, bits_at, bytes_BQ, there_B1 & there_Q, BITS, RELU, B, K
        )  # fmt: skip
        if BITS:
            tl.store(dresidual_at + inside_BK, d_BK.to(dresidual.dtype.element_ty), mask=there_BK)
        dx_BK = scale_K[None, :] * (d_BK - level_K[None, :] - far_BK * slope_K[None, :])
        tl.store(dx_at + inside_BK, dx_BK.to(dx.dtype.element_ty), mask=there_BK)
        x_at += B * channels
        dy_at += B * channels
        bits_at += B * wide
        dx_at += B * channels
        dresidual_at += B * channels
