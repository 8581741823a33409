"""The Triton programs of NT-Xent. With k = log2(e) / t, c_ij = z_i z_j and the negatives j of row i (batch and bank):

    e_ij = exp2(k c_ij - r_i),  N_i = sum_j e_ij,  p_i = exp2(k c_ip - r_i),  A_i = 1 / (N_i + p_i),  q_i = N_i A_i
    loss_i = log(1 + N_i / p_i)
    dL/dz_i = factor / (M t) (sum_j e_ij (w_i A_i + w_j A_j) z_j - (w_i q_i + w_p q_p) z_p)
r_i is k, the largest k c, while exp2(-2k) is a normal float32 (FIXED); else the running maximum, and the columns keep
the logarithm l_i = log2(N_i + p_i) + r_i - log2(w_i) in place of w_i A_i (ONLINE). A column of the bank has no w_j A_j.
With a momentum encoder's keys z_j is a key, row p has no part in z_p's gradient, and no column has a w_j A_j.
"""

# M rows of this rank    R rows of the packed buffer: all ranks' rows or keys, zeros to the next tile, the bank, zeros;
# with keys then this rank's rows. first_column: where this rank's columns are; first_row: where its rows are
# B rows of a block      C columns of a tile      D dimensions, P of them with the padding

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
TIE: tl.constexpr = tl.constexpr(1e-5)
"""A negative this little below the positive counts as a tie: tensor cores and `pack` sum a product in other orders."""
HEADROOM: tl.constexpr = tl.constexpr(14.0)
"""log2 of what the largest w_i q_i becomes before G, at most twice that, is rounded to fp16, whose end is 2^16."""
MOST_SCALE: tl.constexpr = tl.constexpr(60.0)
"""log2 of the largest factor: e_ij times it stays within float32."""

SIZES = (
    "m", "half", "first_row", "first_column", "columns", "bank_start", "bank_stop", "splits", "tiles", "bank_tiles"
)  # fmt: skip
"""Numbers that vary from call to call: no program is compiled anew for their multiples of 16 or for 1."""


@triton.jit
def _factor(temperature, k, ONLINE: tl.constexpr):
    """k = log2(e) / t: the host's number, or from the device's t, where t <= 0 gives NaN."""
    if ONLINE:
        t = tl.load(temperature)
        k = tl.where(t > 0, tl.full((), LOG2_E, tl.float32) / t, float("nan"))
    return k


@triton.jit
def _columns(columns, bank_start, bank_stop, splits, tiles, bank_tiles, C: tl.constexpr):
    """(start, stop, limit) of this program's columns in R: a part of the batch or a part of the bank."""
    split = tl.program_id(1)
    if split < splits:
        start = split * tiles * C
        limit = columns
        stop = tl.minimum(start + tiles * C, limit)
    else:
        start = bank_start + (split - splits) * bank_tiles * C
        limit = bank_stop
        stop = tl.minimum(start + bank_tiles * C, limit)
    return start, stop, limit


@triton.jit
def _cosines(
    left_BD, right_CD, z_I, z_J, itself_B, positive_B, row, col, half, limit,
    P: tl.constexpr, B: tl.constexpr, C: tl.constexpr, DEEP: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """c [B, C]; -inf where a column is the row itself, its positive or past the end. DEEP: Q dimensions at a time."""
    if DEEP:
        c_BC = tl.zeros((B, C), tl.float32)
        for q in range(0, P, Q):
            c_BC = tl.dot(tl.load(z_I + q), tl.trans(tl.load(z_J + q)), c_BC)
    else:
        c_BC = tl.dot(left_BD, tl.trans(right_CD))
    # Most tiles hold no such column: the branch keeps the comparisons out of them.
    near = (col < row + B) & (row < col + C)
    near |= (col < row + half + B) & (row + half < col + C)
    near |= (col < row - half + B) & (row - half < col + C)
    if near | (col + C > limit):
        j = col + tl.arange(0, C)
        others_BC = (j[None, :] != itself_B[:, None]) & (j[None, :] != positive_B[:, None])
        c_BC = tl.where(others_BC & (j < limit)[None, :], c_BC, float("-inf"))
    return c_BC


@triton.jit(do_not_specialize=SIZES)
def forward(
    z, positive, temperature, total, count, peak, slope,
    k, m, half, first_row, first_column, columns, bank_start, bank_stop, splits, tiles, bank_tiles,
    ONLINE: tl.constexpr, P: tl.constexpr, B: tl.constexpr, C: tl.constexpr, DEEP: tl.constexpr, Q: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Per row and split: sum_j e_ij (total) and how many c_ij >= c_ip - TIE (count), over the negatives.

    ONLINE also max_j k c_ij (peak), which total is relative to, and sum_j e_ij (c_ij - c_ip) (slope).
    """
    k = _factor(temperature, k, ONLINE)
    i = tl.program_id(0) * B + tl.arange(0, B)
    i = tl.minimum(i, m - 1)
    itself_B = first_column + i
    positive_B = first_column + tl.where(i < half, i + half, i - half)
    c_ip = tl.load(positive + i)
    bound_B = c_ip - TIE
    row = first_column + tl.program_id(0) * B
    start, stop, limit = _columns(columns, bank_start, bank_stop, splits, tiles, bank_tiles, C)
    d = tl.arange(0, Q)
    z_I = z + (first_row + i).to(tl.int64)[:, None] * P + d[None, :]
    z_J = z + start.to(tl.int64) * P + tl.arange(0, C)[:, None] * P + d[None, :]
    left_BD = tl.load(z_I)
    total_B = tl.zeros((B,), tl.float32)
    count_B = tl.zeros((B,), tl.float32)
    peak_B = tl.full((B,), float("-inf"), tl.float32)
    slope_B = tl.zeros((B,), tl.float32)
    for col in tl.range(start, stop, C, num_stages=STAGES):
        right_CD = tl.load(z_J)
        c_BC = _cosines(
            left_BD, right_CD, z_I, z_J, itself_B, positive_B, row, col, half, limit, P, B, C, DEEP, Q
        )  # fmt: skip
        # Not "c >= bound": NaN counts against the positive.
        count_B += tl.sum(tl.where(c_BC < bound_B[:, None], 0.0, 1.0), 1)
        if ONLINE:
            s_BC = c_BC * k
            now_B = tl.maximum(peak_B, tl.max(s_BC, 1))
            safe_B = tl.where(now_B == float("-inf"), 0.0, now_B)
            e_BC = tl.exp2(s_BC - safe_B[:, None])
            shrink_B = tl.exp2(peak_B - safe_B)
            total_B = total_B * shrink_B + tl.sum(e_BC, 1)
            above_BC = tl.where(c_BC == float("-inf"), 0.0, c_BC - c_ip[:, None])
            slope_B = slope_B * shrink_B + tl.sum(e_BC * above_BC, 1)
            peak_B = now_B
        else:
            total_B += tl.sum(tl.exp2(c_BC * k - k), 1)
        z_J += C * P
    i = tl.program_id(0) * B + tl.arange(0, B)
    at = tl.program_id(1).to(tl.int64) * m + i
    tl.store(total + at, total_B, mask=i < m)
    tl.store(count + at, count_B, mask=i < m)
    if ONLINE:
        tl.store(peak + at, peak_B, mask=i < m)
        tl.store(slope + at, slope_B, mask=i < m)


@triton.jit(do_not_specialize=("m", "all_splits"))
def finish_forward(
    total, count, peak, slope, positive, weights, temperature, column, pull, sums,
    k, m, all_splits, ONLINE: tl.constexpr, WEIGHTED: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Adds the splits up. Per row w_i A_i or l_i (column) and w_i q_i (pull); per block the sums that `totals` adds.

    sums [5, blocks]: of the loss, of rank < 1, of rank < 5, of dloss/dt, and the largest w_i q_i.
    """
    k = _factor(temperature, k, ONLINE)
    i = tl.program_id(0) * B + tl.arange(0, B)
    there = i < m
    c_ip = tl.load(positive + i, mask=there, other=0.0)
    rank_B = tl.zeros((B,), tl.float32)
    total_B = tl.zeros((B,), tl.float32)
    slope_B = tl.zeros((B,), tl.float32)
    reference_B = tl.zeros((B,), tl.float32) + k
    if ONLINE:
        reference_B = c_ip * k
        for split in range(all_splits):
            at = tl.cast(split, tl.int64) * m + i
            reference_B = tl.maximum(reference_B, tl.load(peak + at, mask=there, other=0.0))
    for split in range(all_splits):
        at = tl.cast(split, tl.int64) * m + i
        rank_B += tl.load(count + at, mask=there, other=0.0)
        some_B = tl.load(total + at, mask=there, other=0.0)
        if ONLINE:
            shrink_B = tl.exp2(tl.load(peak + at, mask=there, other=0.0) - reference_B)
            total_B += some_B * shrink_B
            slope_B += tl.load(slope + at, mask=there, other=0.0) * shrink_B
        else:
            total_B += some_B
    p_B = tl.exp2(c_ip * k - reference_B)
    inverse_B = 1 / (total_B + p_B)
    share_B = total_B * inverse_B
    # log(1 + y): a series where 1 + y would round y away, a difference of logarithms where y would overflow.
    y_B = total_B / p_B
    small_B = tl.minimum(y_B, 1.0)
    series_B = small_B * (1 - small_B * (1 / 2 - small_B * (1 / 3 - small_B * (1 / 4 - small_B / 5))))
    far_B = tl.log(total_B + p_B) + (reference_B - c_ip * k) * LN_2
    loss_B = tl.where(y_B < 0.0625, series_B, tl.where(y_B < 1e30, tl.log(1 + y_B), far_B))
    w_B = tl.full((B,), 1.0, tl.float32)
    if WEIGHTED:
        w_B = tl.load(weights + i, mask=there, other=0.0).to(tl.float32)
        w_B = tl.where(w_B >= 0, w_B, float("nan"))
    if ONLINE:
        tl.store(column + i, tl.log2(total_B + p_B) + reference_B - tl.log2(w_B), mask=there)
    else:
        tl.store(column + i, w_B * inverse_B, mask=there)
    tl.store(pull + i, w_B * share_B, mask=there)
    at = sums + tl.program_id(0)
    blocks = tl.num_programs(0)
    tl.store(at, tl.sum(tl.where(there, w_B * loss_B, 0.0), 0))
    tl.store(at + blocks, tl.sum(tl.where(there & (rank_B < 1), 1.0, 0.0), 0))
    tl.store(at + 2 * blocks, tl.sum(tl.where(there & (rank_B < 5), 1.0, 0.0), 0))
    if ONLINE:
        # dloss_i/dt = -(1/t) sum_j e_ij A_i (s_ij - s_ip), and 1/t is k ln 2.
        slope_B *= -(k * LN_2) * (k * LN_2) * w_B * inverse_B
    tl.store(at + 3 * blocks, tl.sum(tl.where(there, slope_B, 0.0), 0))
    tl.store(at + 4 * blocks, tl.max(tl.where(there, w_B * share_B, 0.0), 0))


@triton.jit(do_not_specialize=("blocks", "m"))
def totals(sums, loss, top1, top5, slope, largest, blocks, m, factor, B: tl.constexpr):
    """The means over the rows, and the largest w_i q_i: one program, so that the order of the sums is fixed."""
    loss_B = tl.zeros((B,), tl.float32)
    top1_B = tl.zeros((B,), tl.float32)
    top5_B = tl.zeros((B,), tl.float32)
    slope_B = tl.zeros((B,), tl.float32)
    largest_B = tl.zeros((B,), tl.float32)
    for start in range(0, blocks, B):
        at = start + tl.arange(0, B)
        there = at < blocks
        loss_B += tl.load(sums + at, mask=there, other=0.0)
        top1_B += tl.load(sums + blocks + at, mask=there, other=0.0)
        top5_B += tl.load(sums + 2 * blocks + at, mask=there, other=0.0)
        slope_B += tl.load(sums + 3 * blocks + at, mask=there, other=0.0)
        largest_B = tl.maximum(largest_B, tl.load(sums + 4 * blocks + at, mask=there, other=0.0))
    tl.store(loss, tl.sum(loss_B, 0) * (factor / m))
    tl.store(top1, tl.sum(top1_B, 0) / m)
    tl.store(top5, tl.sum(top5_B, 0) / m)
    tl.store(slope, tl.sum(slope_B, 0) * (factor / m))
    tl.store(largest, tl.max(largest_B, 0))


@triton.jit
def _scale(largest):
    """log2 of the factor on G. e_ij A_i <= q_i, so no G exceeds twice the largest w_i q_i."""
    return tl.minimum(-(tl.log2(tl.load(largest)) - HEADROOM), MOST_SCALE)


@triton.jit(do_not_specialize=SIZES)
def backward(
    z, column, temperature, largest, partial,
    k, m, half, first_row, first_column, columns, bank_start, bank_stop, splits, tiles, bank_tiles,
    ONLINE: tl.constexpr, P: tl.constexpr, B: tl.constexpr, C: tl.constexpr, DEEP: tl.constexpr, Q: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """partial [splits, M, P] = scale * sum over the split's negatives j of e_ij (w_i A_i + w_j A_j) z_j."""
    k = _factor(temperature, k, ONLINE)
    scale = _scale(largest)
    i = tl.program_id(0) * B + tl.arange(0, B)
    i = tl.minimum(i, m - 1)
    itself_B = first_column + i
    positive_B = first_column + tl.where(i < half, i + half, i - half)
    column_B = tl.load(column + first_row + i)
    row = first_column + tl.program_id(0) * B
    start, stop, limit = _columns(columns, bank_start, bank_stop, splits, tiles, bank_tiles, C)
    d = tl.arange(0, Q)
    z_I = z + (first_row + i).to(tl.int64)[:, None] * P + d[None, :]
    z_J = z + start.to(tl.int64) * P + tl.arange(0, C)[:, None] * P + d[None, :]
    out = tl.program_id(2) * Q
    left_BD = tl.load(z_I)
    dz_BD = tl.zeros((B, Q), tl.float32)
    for col in tl.range(start, stop, C, num_stages=STAGES):
        right_CD = tl.load(z_J + out)
        column_C = tl.load(column + col + tl.arange(0, C))
        c_BC = _cosines(
            left_BD, right_CD, z_I, z_J, itself_B, positive_B, row, col, half, limit, P, B, C, DEEP, Q
        )  # fmt: skip
        if ONLINE:
            s_BC = c_BC * k + scale
            g_BC = tl.exp2(s_BC - column_B[:, None]) + tl.exp2(s_BC - column_C[None, :])
        else:
            g_BC = tl.exp2(c_BC * k + (scale - k)) * (column_B[:, None] + column_C[None, :])
        dz_BD = tl.dot(g_BC.to(tl.float16), right_CD, dz_BD)
        z_J += C * P
    i = tl.program_id(0) * B + tl.arange(0, B)
    at = (tl.program_id(1).to(tl.int64) * m + i)[:, None] * P + out + d[None, :]
    tl.store(partial + at, dz_BD, mask=(i < m)[:, None])


@triton.jit(do_not_specialize=("m", "half", "first_row", "first_column", "all_splits"))
def finish_backward(
    partial, z, inverse, pull, temperature, largest, upstream, dx,
    k, factor, m, half, first_row, first_column, dim, all_splits,
    ONLINE: tl.constexpr, KEYED: tl.constexpr, P: tl.constexpr, B: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """dx = (dz - z (z dz) / (z z)) upstream factor / (M t |x|), where dz sums the splits and the positive's pull.

    KEYED: the positive is no row, so that its own q_p does not pull.
    """
    k = _factor(temperature, k, ONLINE)
    i = tl.program_id(0) * B + tl.arange(0, B)
    d = tl.arange(0, E)
    p = tl.where(i < half, i + half, i - half)
    there_BE = (i < m)[:, None] & (d < P)[None, :]
    dz_BE = tl.zeros((B, E), tl.float32)
    for split in range(all_splits):
        at = (tl.cast(split, tl.int64) * m + i)[:, None] * P + d[None, :]
        dz_BE += tl.load(partial + at, mask=there_BE, other=0.0)
    z_i = tl.load(z + (first_row + i).to(tl.int64)[:, None] * P + d[None, :], mask=there_BE, other=0.0).to(tl.float32)
    z_p = tl.load(
        z + (first_column + p).to(tl.int64)[:, None] * P + d[None, :], mask=there_BE, other=0.0
    ).to(tl.float32)  # fmt: skip
    pull_B = tl.load(pull + i, mask=i < m, other=0.0)
    if not KEYED:
        pull_B += tl.load(pull + p, mask=i < m, other=0.0)
    dz_BE = dz_BE * tl.exp2(-_scale(largest)) - pull_B[:, None] * z_p
    length_B = tl.sum(z_i * z_i, 1)
    radial_B = tl.sum(z_i * dz_BE, 1) / tl.where(length_B == 0, 1.0, length_B)
    inverse_B = tl.load(inverse + i, mask=i < m, other=0.0) * (tl.load(upstream).to(tl.float32) * factor * k * LN_2 / m)
    dx_BE = (dz_BE - radial_B[:, None] * z_i) * inverse_B[:, None]
    write_BE = (i < m)[:, None] & (d < dim)[None, :]
    tl.store(dx + i.to(tl.int64)[:, None] * dim + d[None, :], dx_BE.to(dx.dtype.element_ty), mask=write_BE)
