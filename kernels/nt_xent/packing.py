"""The Triton programs that normalise NT-Xent's vectors and write them as fp16 to their places in the packed buffer."""

# B rows of a block    D dimensions, P of them with the padding, E the next power of 2

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("rows", "first_row"))
def pack(
    x, z, inverse, positive, rows, first_row, dim,
    PAIRED: tl.constexpr, P: tl.constexpr, B: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """z = fp16(x / |x|), 1/|x|, and c_ip of the rounded rows i and i + rows; without PAIRED z alone. E: P's power of 2.

    A zero row stays zero with inverse 0; a norm that is not finite makes the row NaN.
    """
    i = tl.program_id(0) * B + tl.arange(0, B)
    d = tl.arange(0, E)
    there_BE = (i < rows)[:, None] & (d < dim)[None, :]
    write_BE = (i < rows)[:, None] & (d < P)[None, :]
    source = i.to(tl.int64)[:, None] * dim + d[None, :]
    target = (first_row + i.to(tl.int64))[:, None] * P + d[None, :]
    a_BE, inverse_B = _normalised(x + source, there_BE)
    tl.store(z + target, a_BE, mask=write_BE)
    if PAIRED:
        b_BE, inverse_pair_B = _normalised(x + source + rows.to(tl.int64) * dim, there_BE)
        tl.store(z + target + rows.to(tl.int64) * P, b_BE, mask=write_BE)
        c_B = tl.sum(a_BE.to(tl.float32) * b_BE.to(tl.float32), 1)
        tl.store(positive + i, c_B, mask=i < rows)
        tl.store(positive + rows + i, c_B, mask=i < rows)
        tl.store(inverse + i, inverse_B, mask=i < rows)
        tl.store(inverse + rows + i, inverse_pair_B, mask=i < rows)


@triton.jit(do_not_specialize=("rows", "first_row", "first_column"))
def pack_with_keys(
    x, keys, z, inverse, positive, rows, first_row, first_column, dim, P: tl.constexpr, B: tl.constexpr, E: tl.constexpr
):  # fmt: skip
    """As `pack` of rows i, i + rows: x to `first_row`, keys to `first_column`, c_ip of each row and its pair's key."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    d = tl.arange(0, E)
    there_BE = (i < rows)[:, None] & (d < dim)[None, :]
    write_BE = (i < rows)[:, None] & (d < P)[None, :]
    source = i.to(tl.int64)[:, None] * dim + d[None, :]
    pair = source + rows.to(tl.int64) * dim
    target = i.to(tl.int64)[:, None] * P + d[None, :]
    pair_target = target + rows.to(tl.int64) * P
    z_own, z_keys = z + first_row.to(tl.int64) * P, z + first_column.to(tl.int64) * P
    a_BE, inverse_B = _normalised(x + source, there_BE)
    b_BE, inverse_pair_B = _normalised(x + pair, there_BE)
    key_BE, _ = _normalised(keys + source, there_BE)
    key_pair_BE, _ = _normalised(keys + pair, there_BE)
    tl.store(z_own + target, a_BE, mask=write_BE)
    tl.store(z_own + pair_target, b_BE, mask=write_BE)
    tl.store(z_keys + target, key_BE, mask=write_BE)
    tl.store(z_keys + pair_target, key_pair_BE, mask=write_BE)
    tl.store(positive + i, tl.sum(a_BE.to(tl.float32) * key_pair_BE.to(tl.float32), 1), mask=i < rows)
    tl.store(positive + rows + i, tl.sum(b_BE.to(tl.float32) * key_BE.to(tl.float32), 1), mask=i < rows)
    tl.store(inverse + i, inverse_B, mask=i < rows)
    tl.store(inverse + rows + i, inverse_pair_B, mask=i < rows)


@triton.jit
def _normalised(pointers, there):
    x = tl.load(pointers, mask=there, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(x * x, 1))
    inverse = tl.where(norm == 0, 0.0, 1 / tl.where(norm == 0, 1.0, norm))
    inverse = tl.where(norm == float("inf"), float("nan"), inverse)
    return (x * inverse[:, None]).to(tl.float16), inverse
