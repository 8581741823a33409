"""NT-Xent's row blocks where the rows are one rank's and the columns all ranks': no symmetry to use across ranks."""

# M rows of this rank, both views    N = M / 2 images    D dimensions    A rows of all ranks, rank after rank
# B rows of a block    first: of this rank's rows among the A

from __future__ import annotations

import math

import torch
from torch import Tensor

FIXED_MAXIMUM_TEMPERATURE = 0.025
"""From here up exp(-2/t) >= exp(-80) is a normal float32, so 1/t serves as the maximum of every row."""


def row_statistics_of_all(
    z_AD: Tensor, positive_M: Tensor, first: int, temperature: float, rows: int
) -> tuple[Tensor, Tensor]:
    """Per own row: log of the sum of exp(s - 1/t) over its negatives, and how many of the A lie below its positive.

    The row itself and its positive count as below.
    """
    m = len(positive_M)
    fixed = temperature >= FIXED_MAXIMUM_TEMPERATURE
    total_M, below_M = torch.empty_like(positive_M), torch.empty_like(positive_M)
    buffer, flags = z_AD.new_empty(min(rows, m) * len(z_AD)), z_AD.new_empty(min(rows, m) * len(z_AD))
    for start in range(0, m, rows):
        stop = min(start + rows, m)
        s_BA = _similarities(z_AD, first, m, start, stop, temperature, buffer)
        below_BA = flags[: s_BA.numel()].view_as(s_BA)
        below_M[start:stop] = torch.lt(s_BA, positive_M[start:stop, None], out=below_BA).sum(1)
        total_M[start:stop] = s_BA.exp_().sum(1) if fixed else s_BA.logsumexp(1)
    return (total_M.log() if fixed else total_M), below_M


def add_negatives_of_all(dz_MD: Tensor, z_AD: Tensor, lse_A: Tensor, first: int, temperature: float, rows: int) -> None:
    """Adds sum_j (exp(s_ij - lse_i) + exp(s_ij - lse_j)) z_j over all negatives j to each own row of dz, in place."""
    m = len(dz_MD)
    fixed = temperature >= FIXED_MAXIMUM_TEMPERATURE
    lse_M = lse_A[first : first + m]
    inverse_A, inverse_M = lse_A.neg().exp(), lse_M.neg().exp()
    buffer, weights = z_AD.new_empty(min(rows, m) * len(z_AD)), z_AD.new_empty(min(rows, m) * len(z_AD))
    for start in range(0, m, rows):
        stop = min(start + rows, m)
        s_BA = _similarities(z_AD, first, m, start, stop, temperature, buffer)
        w_BA = weights[: s_BA.numel()].view_as(s_BA)
        if fixed:
            torch.add(inverse_M[start:stop, None], inverse_A, out=w_BA)
            w_BA *= s_BA.exp_()
        else:
            torch.sub(s_BA, lse_M[start:stop, None], out=w_BA).exp_()
            w_BA += s_BA.sub_(lse_A).exp_()
        dz_MD[start:stop].addmm_(w_BA, z_AD)


def _similarities(z_AD: Tensor, first: int, m: int, start: int, stop: int, temperature: float, out: Tensor) -> Tensor:
    """s - 1/t [B, A] of the own rows from `start` to `stop`; the row itself and its positive are -inf."""
    block_BD = z_AD[first + start : first + stop]
    s_BA = out[: len(block_BD) * len(z_AD)].view(len(block_BD), len(z_AD))
    # In place: autocast leaves in-place products in their own precision.
    s_BA.fill_(-1 / temperature).addmm_(block_BD, z_AD.T, alpha=1 / temperature)
    own_BM = s_BA[:, first : first + m]
    for offset in (start, start + m // 2, start - m // 2):
        own_BM.diagonal(offset).fill_(-math.inf)
    return s_BA
