"""NT-Xent in row blocks. l_i = -log(exp(s_ip) / sum_{k!=i} exp(s_ik)), s = z z^T / t. Chen et al. 2020, Eq. 1.

The similarities are symmetric, so a block of B rows meets only the columns from its first row on: its row sums serve
its own rows, its column sums the later ones. With N_i the sum of exp(s_ij) over the negatives j of row i,
    loss_i   = log(1 + N_i / exp(s_ip)),    lse_i = log(N_i + exp(s_ip)) - log(w_i)
    q_i      = w_i N_i / (N_i + exp(s_ip)),     w_i = 1 where there are no weights
    dL/dz_i  = (1 / (M t)) (sum_{j != i, p} (exp(s_ij - lse_i) + exp(s_ij - lse_j)) z_j - (q_i + q_p) z_p)
    dL/dt    = -(1 / t) (sum_i z_i dL/dz_i) / 2
where no term cancels as the loss goes to 0. s is kept less 1/t, its largest value, which changes no result. A vector b
of the bank is a negative of every row and a row of no loss: exp(s_ib - lse_i) b, which in dL/dt counts whole.

With keys k, a momentum encoder's vectors of the same rows, all columns are of that kind: s_ij = z_i k_j / t, k_i is
left out, k_p is the positive (He et al. 2020, Eq. 1; Chen et al. 2020b, Sec. 2.1), and
    dL/dz_i  = (1 / (M t)) (sum_{j != i, p} exp(s_ij - lse_i) k_j + sum_b exp(s_ib - lse_i) b - q_i k_p)

Over W ranks a rank works out its own M rows against all W·M columns, rectangular.py. It gathers z and the lse in the
forward; by the formula above its rows' gradient then needs nothing more, so the backward exchanges nothing.
"""

# M rows of this rank, both views    N = M / 2 images    D dimensions    A = W M rows of all ranks    K rows of the bank
# R = A + K, and M more where there are keys: keys of all ranks, bank, own rows    B rows of a block
# C columns from the block's first row on

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from fastsimclr.kernels.gather import gather, gather_in_place
from fastsimclr.kernels.nt_xent.rectangular import (
    TIE,
    add_negatives_of_all,
    maximum_is_fixed,
    row_statistics_of_all,
    scaled_products,
)
from fastsimclr.kernels.nt_xent.state import Inputs, State

BLOCK_ELEMENTS, BLOCK_ELEMENTS_ELSEWHERE = 2**18, 2**26
"""Similarities held at once when the caller names no block size: 1 MiB of float32, which a CPU core's cache holds; 256
MiB on other devices, where few launches matter more."""

MINIMUM_ROWS = 64
"""Fewer rows a block leave the matrix product short of work, whatever the cache holds."""


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, State]:
    """Loss, top1, top5 and what the backward needs.

    Half precision is worked on in float32, also under autocast. Memory is O((W 2N + K) (D + rows)), with keys 2N D
    more.
    """
    x, temperature, weights_M, bank, keys, factor, block_rows, group = inputs
    x_MD = x if x.dtype == torch.float64 else x.float()
    m, n, bank_rows = len(x_MD), len(x_MD) // 2, 0 if bank is None else len(bank)
    world, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    first_column, every = m * rank, m * world
    temperature = _checked(temperature, x_MD)
    rows = _rows(block_rows, x.device, max(every, bank_rows))
    columns = every + bank_rows
    z_RD = x_MD.new_empty(columns if keys is None else columns + m, x_MD.shape[1])
    z_AD, z_KD, own_MD = z_RD[:every], z_RD[every:columns], z_RD[first_column : first_column + m]
    z_MD = own_MD if keys is None else z_RD[columns:]
    inverse_M = _normalise(x_MD, z_MD)
    if keys is not None:
        _normalise(keys.to(x_MD.dtype), own_MD)
    if bank is not None:
        _normalise(bank.to(x_MD.dtype), z_KD)
    positive_M = ((z_MD * own_MD.roll(n, 0)).sum(1) - 1).div_(temperature)
    bound_M = positive_M - TIE / temperature
    if group is not None:
        gather_in_place(z_AD, group)
    if group is None and keys is None:
        negatives_M, below_M = _row_statistics(z_MD, bound_M, temperature, rows)
    else:
        negatives_M, below_M = row_statistics_of_all(z_MD, z_AD, bound_M, first_column, temperature, rows)
    if bank is not None:
        more_M, below_bank_M = row_statistics_of_all(z_MD, z_KD, bound_M, None, temperature, rows)
        negatives_M, below_M = torch.logaddexp(negatives_M, more_M), below_M + below_bank_M
    margin_M = negatives_M - positive_M
    loss_M, pull_M = torch.logaddexp(margin_M, torch.zeros_like(margin_M)), margin_M.sigmoid()
    lse_M = torch.logaddexp(negatives_M, positive_M)
    if weights_M is not None:
        w_M = torch.where(weights_M >= 0, weights_M, math.nan).to(x_MD.dtype)
        loss_M, pull_M, lse_M = loss_M * w_M, pull_M * w_M, lse_M - w_M.log()
    # `below` counts the row itself and its positive too: both are masked with -inf.
    rank_M = columns - below_M
    top1, top5 = (rank_M < 1).float().mean(), (rank_M < 5).float().mean()
    # With keys no other rank's row has a gradient through this rank's columns, and the own lse are enough.
    lse_A = lse_M if group is None or keys is not None else gather(lse_M, group).flatten()
    none = x_MD.new_zeros(())
    return loss_M.mean() * factor, top1, top5, State(z_RD, inverse_M, lse_A, pull_M, none, none.clone())


def backward(
    upstream: Tensor,
    state: State,
    temperature: float | Tensor,
    factor: float,
    block_rows: int,
    first_column: int,
    dtype: torch.dtype,
    keyed: bool = False,
) -> tuple[Tensor, Tensor]:
    """dx [2N, D] of `dtype` and dL/dt, a scalar, which is 0 unless the temperature is a tensor."""
    temperature = _checked(temperature, state.z)
    parts = _of_keys if keyed else _of_rows
    z_MD, dz_MD, radial_M, slope = parts(state, temperature, block_rows, first_column)
    m, inverse_M = len(z_MD), state.inverse
    dz_MD -= z_MD * radial_M[:, None]
    # Of W ranks this is W times the gradient of the mean over all rows, which DDP's average makes exact.
    scale = upstream * (factor / m) / temperature
    dz_MD *= inverse_M[:, None] * scale
    slope = -scale / temperature * slope if isinstance(temperature, Tensor) else torch.zeros_like(slope)
    return dz_MD.to(dtype), slope


def _of_rows(
    state: State, temperature: float | Tensor, block_rows: int, first_column: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z [M, D] of the own rows, M t dL/dz, z dz [M] and -M t^2 dL/dt, where rows and columns are the same vectors."""
    z_RD, lse_A, pull_M = state.z, state.column, state.pull
    m, n, every = len(pull_M), len(pull_M) // 2, len(lse_A)
    z_MD, z_AD, z_KD = z_RD[first_column : first_column + m], z_RD[:every], z_RD[every:]
    rows = _rows(block_rows, z_RD.device, max(every, len(z_KD)))
    pull_N1 = (pull_M[:n] + pull_M[n:])[:, None]
    dz_MD = torch.cat((z_MD[n:] * -pull_N1, z_MD[:n] * -pull_N1))
    lse_M = lse_A[first_column : first_column + m]
    if every == m:
        _add_negatives(dz_MD, z_MD, lse_A, temperature, rows)
    else:
        add_negatives_of_all(dz_MD, z_MD, z_AD, lse_M, lse_A, first_column, temperature, rows)
    radial_M = (z_MD * dz_MD).sum(1)
    slope = radial_M.sum() / 2
    if len(z_KD):
        add_negatives_of_all(dz_MD, z_MD, z_KD, lse_M, None, None, temperature, rows)
        whole_M = (z_MD * dz_MD).sum(1)
        slope += (whole_M - radial_M).sum()
        radial_M = whole_M
    return z_MD, dz_MD, radial_M, slope


def _of_keys(
    state: State, temperature: float | Tensor, block_rows: int, first_column: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As _of_rows, where the columns, keys of all ranks and bank, are no rows."""
    m, n = len(state.pull), len(state.pull) // 2
    z_CD, z_MD = state.z[:-m], state.z[-m:]
    rows = _rows(block_rows, z_CD.device, len(z_CD))
    dz_MD = z_CD[first_column : first_column + m].roll(n, 0) * -state.pull[:, None]
    add_negatives_of_all(dz_MD, z_MD, z_CD, state.column, None, first_column, temperature, rows)
    radial_M = (z_MD * dz_MD).sum(1)
    return z_MD, dz_MD, radial_M, radial_M.sum()


def _checked(temperature: float | Tensor, like: Tensor) -> float | Tensor:
    """A tensor in the precision worked in, NaN where it is not above 0: to look would wait for the device."""
    if not isinstance(temperature, Tensor):
        return temperature
    return torch.where(temperature > 0, temperature, math.nan).to(like.dtype)


def _rows(block_rows: int, device: torch.device, columns: int) -> int:
    elements = BLOCK_ELEMENTS if device.type == "cpu" else BLOCK_ELEMENTS_ELSEWHERE
    return block_rows or max(MINIMUM_ROWS, elements // columns)


def _normalise(x_MD: Tensor, z_MD: Tensor) -> Tensor:
    """Writes x / |x| to z; 1 / |x| [M], 0 for a zero row."""
    norm_M = torch.linalg.vector_norm(x_MD, dim=1)
    # An infinite norm would turn a diverged row into a harmless zero vector.
    norm_M = norm_M.masked_fill(norm_M.isinf(), math.nan)
    inverse_M = torch.where(norm_M == 0, 0, norm_M.reciprocal())
    torch.mul(x_MD, inverse_M[:, None], out=z_MD)
    return inverse_M


def _similarities(z_MD: Tensor, start: int, rows: int, temperature: float | Tensor, out: Tensor) -> Tensor:
    """s - 1/t [B, C] of the rows from `start` against all columns from `start`; itself and the positive are -inf."""
    s_BC = scaled_products(z_MD[start : start + rows], z_MD[start:], temperature, out)
    n = z_MD.shape[0] // 2
    for offset in (0, n, -n):
        s_BC.diagonal(offset).fill_(-math.inf)
    return s_BC


def _row_statistics(z_MD: Tensor, bound_M: Tensor, temperature: float | Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Per row: log of the sum of exp(s - 1/t) over its negatives, and how many entries lie below its positive."""
    m = z_MD.shape[0]
    fixed = maximum_is_fixed(temperature)
    total_M = z_MD.new_full((m,), 0 if fixed else -math.inf)
    # Counts are kept as floats, exact to 2^24: summing booleans costs ten times as much on a CPU.
    below_M = z_MD.new_zeros(m)
    buffer, flags = z_MD.new_empty(min(rows, m) * m), z_MD.new_empty(min(rows, m) * m)
    for start in range(0, m, rows):
        stop = min(start + rows, m)
        s_BC = _similarities(z_MD, start, rows, temperature, buffer)
        below_BC = flags[: s_BC.numel()].view_as(s_BC)
        below_M[start:stop] += torch.lt(s_BC, bound_M[start:stop, None], out=below_BC).sum(1)
        below_M[stop:] += torch.lt(s_BC, bound_M[start:], out=below_BC)[:, stop - start :].sum(0)
        if fixed:
            e_BC = s_BC.exp_()
            total_M[start:stop] += e_BC.sum(1)
            total_M[stop:] += e_BC[:, stop - start :].sum(0)
        else:
            total_M[start:stop] = torch.logaddexp(total_M[start:stop], s_BC.logsumexp(1))
            total_M[stop:] = torch.logaddexp(total_M[stop:], s_BC[:, stop - start :].logsumexp(0))
    return (total_M.log() if fixed else total_M), below_M


def _add_negatives(dz_MD: Tensor, z_MD: Tensor, lse_M: Tensor, temperature: float | Tensor, rows: int) -> None:
    """Adds sum_j (exp(s_ij - lse_i) + exp(s_ij - lse_j)) z_j over the negatives j to each row of dz, in place."""
    m = z_MD.shape[0]
    fixed = maximum_is_fixed(temperature)
    inverse_sum_M = lse_M.neg().exp()
    buffer, weights = z_MD.new_empty(min(rows, m) * m), z_MD.new_empty(min(rows, m) * m)
    for start in range(0, m, rows):
        stop = min(start + rows, m)
        s_BC = _similarities(z_MD, start, rows, temperature, buffer)
        w_BC = weights[: s_BC.numel()].view_as(s_BC)
        if fixed:
            torch.add(inverse_sum_M[start:stop, None], inverse_sum_M[start:], out=w_BC)
            w_BC *= s_BC.exp_()
        else:
            torch.sub(s_BC, lse_M[start:stop, None], out=w_BC).exp_()
            w_BC += s_BC.sub_(lse_M[start:]).exp_()
        dz_MD[start:stop].addmm_(w_BC, z_MD[start:])
        dz_MD[stop:].addmm_(w_BC[:, stop - start :].T, z_MD[start:stop])
