"""NT-Xent's row blocks where rows and columns differ: one rank's rows, and the columns of all ranks or of the bank.

s_ij = z_i z_j / t is kept less 1/t, its largest value.
"""

# M rows of this rank, both views    N = M / 2 images    D dimensions    C columns: rows of all ranks, or of the bank
# B rows of a block    first_column: this rank's first row, or key, among the columns; None where those are the bank

from __future__ import annotations

import math

import torch
from torch import Tensor

TIE = 1e-5
"""A negative this little below the positive, in cosine, counts as a tie: the two are summed in different orders."""
FIXED_MAXIMUM_TEMPERATURE = 0.025
"""From here up exp(-2/t) >= exp(-80) is a normal float32, so 1/t serves as the maximum of every row."""


def maximum_is_fixed(temperature: float | Tensor) -> bool:
    """Whether 1/t may serve as the maximum; of a tensor nobody knows before the device has come that far."""
    return not isinstance(temperature, Tensor) and temperature >= FIXED_MAXIMUM_TEMPERATURE


def row_statistics_of_all(
    z_MD: Tensor, z_CD: Tensor, bound_M: Tensor, first_column: int | None, temperature: float | Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    """Per row: log of the sum of exp(s - 1/t) over its negatives, and how many of the C lie below its bound.

    The row itself and its positive count as below.
    """
    m = len(z_MD)
    fixed = maximum_is_fixed(temperature)
    total_M, below_M = torch.empty_like(bound_M), torch.empty_like(bound_M)
    buffer, flags = z_CD.new_empty(min(rows, m) * len(z_CD)), z_CD.new_empty(min(rows, m) * len(z_CD))
    for start in range(0, m, rows):
        stop = min(start + rows, m)
        s_BC = _similarities(z_MD, z_CD, first_column, start, stop, temperature, buffer)
        below_BC = flags[: s_BC.numel()].view_as(s_BC)
        below_M[start:stop] = torch.lt(s_BC, bound_M[start:stop, None], out=below_BC).sum(1)
        total_M[start:stop] = s_BC.exp_().sum(1) if fixed else s_BC.logsumexp(1)
    return (total_M.log() if fixed else total_M), below_M


def add_negatives_of_all(
    dz_MD: Tensor,
    z_MD: Tensor,
    z_CD: Tensor,
    lse_M: Tensor,
    lse_C: Tensor | None,
    first_column: int | None,
    temperature: float | Tensor,
    rows: int,
) -> None:
    """Adds sum_j (exp(s_ij - lse_i) + exp(s_ij - lse_j)) z_j over the negatives j to each row of dz, in place.

    Columns without lse_C, keys and the bank's, are rows of no loss: their second term is absent.
    """
    m = len(dz_MD)
    fixed = maximum_is_fixed(temperature)
    inverse_M, inverse_C = lse_M.neg().exp(), None if lse_C is None else lse_C.neg().exp()
    buffer, weights = z_CD.new_empty(min(rows, m) * len(z_CD)), z_CD.new_empty(min(rows, m) * len(z_CD))
    for start in range(0, m, rows):
        stop = min(start + rows, m)
        s_BC = _similarities(z_MD, z_CD, first_column, start, stop, temperature, buffer)
        w_BC = weights[: s_BC.numel()].view_as(s_BC)
        if fixed:
            s_BC.exp_()
            if inverse_C is None:
                torch.mul(s_BC, inverse_M[start:stop, None], out=w_BC)
            else:
                torch.add(inverse_M[start:stop, None], inverse_C, out=w_BC).mul_(s_BC)
        else:
            torch.sub(s_BC, lse_M[start:stop, None], out=w_BC).exp_()
            if lse_C is not None:
                w_BC += s_BC.sub_(lse_C).exp_()
        dz_MD[start:stop].addmm_(w_BC, z_CD)


def _similarities(
    z_MD: Tensor,
    z_CD: Tensor,
    first_column: int | None,
    start: int,
    stop: int,
    temperature: float | Tensor,
    out: Tensor,
) -> Tensor:
    """s - 1/t [B, C] of the rows from `start` to `stop`; the row itself and its positive are -inf."""
    s_BC = scaled_products(z_MD[start:stop], z_CD, temperature, out)
    if first_column is not None:
        m = len(z_MD)
        own_BM = s_BC[:, first_column : first_column + m]
        for offset in (start, start + m // 2, start - m // 2):
            own_BM.diagonal(offset).fill_(-math.inf)
    return s_BC


def scaled_products(z_BD: Tensor, z_CD: Tensor, temperature: float | Tensor, out: Tensor) -> Tensor:
    """(z z'^T - 1) / t [B, C], in the memory of `out`."""
    s_BC = out[: len(z_BD) * len(z_CD)].view(len(z_BD), len(z_CD))
    # In place: autocast leaves in-place products in their own precision.
    s_BC.fill_(-1 / temperature)
    if isinstance(temperature, Tensor):
        return s_BC.addmm_(z_BD / temperature, z_CD.T)
    return s_BC.addmm_(z_BD, z_CD.T, alpha=1 / temperature)
