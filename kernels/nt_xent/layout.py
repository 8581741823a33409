"""The sizes of the fused NT-Xent's packed buffer [R, P]: all ranks' rows, zeros to the next tile, the bank, zeros.

With a momentum encoder's keys those stand in the place of the rows, and this rank's own rows follow at the end.
"""

# R rows    P dimensions with the padding    A rows of all ranks    K rows of the bank    D dimensions

from __future__ import annotations

TILE = 128
"""Rows of all ranks and rows of the bank are each padded to a multiple of this, the widest tile of columns."""
MOST_DIMENSIONS = 2048
"""Wider projections go to the reference: a program holds a whole row where it normalises."""
AUTO_DIMENSIONS = 512
"""Above this the fused backward, which computes the similarities anew for each CHUNK of dimensions, loses to the
reference's products."""
DEEP = 128
"""Up to this P a program holds its rows' whole vectors; above, it walks through them in CHUNKs."""
CHUNK = 64


def padded_rows(rows: int) -> int:
    """The next multiple of TILE."""
    return (rows + TILE - 1) // TILE * TILE


def padded_dim(dim: int) -> int:
    """P: 16, 32, 64 or 128, then multiples of CHUNK."""
    for power in (16, 32, 64, DEEP):
        if dim <= power:
            return power
    return (dim + CHUNK - 1) // CHUNK * CHUNK


def packed(rows: int, bank_rows: int, dim: int, rank_rows: int = 0) -> tuple[int, int]:
    """(R, P) for A = `rows`, K = `bank_rows`, D = `dim` and `rank_rows` more rows at the end."""
    return padded_rows(rows) + padded_rows(bank_rows) + rank_rows, padded_dim(dim)
