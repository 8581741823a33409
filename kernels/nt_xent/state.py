"""What NT-Xent's forward takes, and what it leaves to its backward, whatever the implementation."""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor


class Inputs(NamedTuple):
    """The arguments of nt_xent as it has checked them; weights are [2N].

    factor: on the loss. block_rows: rows that the reference works on at once, 0 chooses; the fused kernels ignore it.
    """

    x: Tensor
    temperature: float | Tensor
    weights: Tensor | None = None
    bank: Tensor | None = None
    keys: Tensor | None = None
    factor: float = 1.0
    block_rows: int = 0
    group: dist.ProcessGroup | None = None


class State(NamedTuple):
    """z: rows of all ranks, then the bank, normalised; fused: fp16 [R, P], padded with zeros in both directions. With
    keys those of all ranks, the bank, and the own rows.

    inverse [M]: 1 / |x| of the own rows. column: per column the reference's lse_j [A], with keys of the own rows [M],
    or the fused w_j A_j or l_j [R].
    pull [M]: w_i q_i. largest: the largest w_i q_i of all ranks, with keys of this one, and slope: dL/dt; scalars,
    fused only.
    """

    z: Tensor
    inverse: Tensor
    column: Tensor
    pull: Tensor
    largest: Tensor
    slope: Tensor
