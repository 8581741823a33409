"""Contrastive pretraining against a memory: NT-Xent whose contrasts come from a momentum encoder and a queue.

With queries q of the network and keys k of its momentum copy, unit vectors both, and the queue's keys m,
    l_i = -log(exp(q_i·k_p / t) / (sum_{j != i} exp(q_i·k_j / t) + sum_b exp(q_i·m_b / t)));  w_k <- c w_k + (1 - c) w,
p the other view of image i, j over all views of the global batch but its own. Chen et al. 2020b (SimCLRv2), Sec. 2; the
queue and the momentum encoder are He et al.'s (2020, MoCo, arXiv 1911.05722). That positives and the batch's negatives
are keys, too, is how the paper's authors describe it: https://github.com/google-research/simclr/issues/115.
"""

# N images of a rank, V views, W ranks, D dimensions

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fastsimclr.kernels.gather import gather
from fastsimclr.kernels.nt_xent import nt_xent
from fastsimclr.methods.base import Outcome
from fastsimclr.methods.contrastive import Contrastive, outcome_of
from fastsimclr.models import SimCLRNet


class MomentumContrast(Contrastive):
    """NT-Xent of the network's projections against those of its momentum copy, of this batch and of earlier ones.

    network: encoder and head that are trained. memory: keys that the queue holds, 1 or more, the newest of all ranks;
    it starts empty, and only what was seen is contrasted with. momentum c: in [0, 1).
    temperature, scaling: as Contrastive's.

    The momentum copy, encoder and head, follows the network once per step of the optimizer; its BN normalises with the
    batch's statistics over the network's groups. It is in no gradient. The queue lies in the order of the global batch,
    view by view: it is the same on all ranks, and at any number of them.
    """

    queue: Tensor

    def __init__(
        self,
        network: SimCLRNet,
        *,
        temperature: float,
        scaling: Literal["paper", "google"],
        memory: int,
        momentum: float,
    ) -> None:
        if memory < 1:
            raise ValueError(f"memory={memory} must be at least 1; use Contrastive where there is none")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum} must be 0 or more and below 1, or the copy never moves; use 0.999")
        super().__init__(network, temperature=temperature, scaling=scaling)
        self.momentum = momentum
        self.momentum_network = copy.deepcopy(network).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(memory, network.head.out_features))
        self._seen = 0  # keys that ever entered, known without asking the device
        self._keys: Tensor | None = None

    @property
    def bank(self) -> Tensor | None:
        """The filled part of the queue, [K, D]: unit vectors, in no order of age. None while it is empty."""
        filled = min(self._seen, len(self.queue))
        return self.queue[:filled] if filled else None

    def contrasts(self, images: Tensor) -> Tensor:
        """The keys of the views: unit vectors, of float32 at least."""
        with torch.no_grad():
            z_ND: Tensor = self.momentum_network(images)[1]
            return F.normalize(z_ND.to(torch.promote_types(z_ND.dtype, torch.float32)))

    def compare(self, embedded: Tensor, labels: Tensor, contrasts: Tensor | None = None) -> Outcome:
        """NT-Xent of projections [2N, D] against keys [2N, D] and the queue; the keys enter it after the step."""
        assert contrasts is not None
        self._keys = contrasts
        result = nt_xent(
            embedded, self.temperature, keys=contrasts, bank=self.bank, scaling=self.scaling, group=self.group
        )
        return outcome_of(result)

    @torch.no_grad()
    def updated(self) -> None:
        """Move the momentum copy towards the network, and put the step's keys into the queue."""
        own: list[Tensor] = list(self.network.parameters())
        copied: list[Tensor] = list(self.momentum_network.parameters())
        torch._foreach_lerp_(copied, own, 1 - self.momentum)
        if self._keys is not None:
            self._enqueue(self._keys)
            self._keys = None

    def _enqueue(self, keys_ND: Tensor) -> None:
        """Over the oldest, from where the last ones end; of more than the queue holds, the last."""
        if self.group is not None:  # ranks hold runs of the global batch
            keys_WND = gather(keys_ND, self.group)
            keys_WVND = keys_WND.view(len(keys_WND), self.views, -1, keys_ND.shape[1])
            keys_ND = keys_WVND.transpose(0, 1).flatten(0, 2)
        size = len(self.queue)
        self._seen += len(keys_ND)
        newest = keys_ND[-size:]
        start = (self._seen - len(newest)) % size
        until_end = min(len(newest), size - start)
        self.queue[start : start + until_end] = newest[:until_end]
        self.queue[: len(newest) - until_end] = newest[until_end:]

    def get_extra_state(self) -> Tensor:
        """How many keys ever entered the queue, for the state dict: where it goes on."""
        return torch.tensor(self._seen)

    def set_extra_state(self, state: Tensor) -> None:
        """Take that back."""
        self._seen = int(state)
