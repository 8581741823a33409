"""The interface between the trainer and whatever is trained: views in, loss and metrics out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastsimclr.optim import HeadSetting


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """loss: scalar with gradient. metrics: detached float scalars on the device, averaged by the trainer over steps."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Objective(nn.Module, ABC):
    """Networks and the loss that trains them. Parameters with requires_grad are optimised, the rest is carried along.

    views: how many views of each image it wants.
    group: the ranks that share the global batch, set by the trainer; None where this process is alone. With it, forward
    sees this rank's images, in equal numbers on all; losses and metrics are such that their mean over the ranks is that
    of the global batch, and gradients such that DDP's average of them is exact.
    """

    views: int
    group: dist.ProcessGroup | None = None

    @abstractmethod
    def forward(self, images: Tensor, labels: Tensor) -> Outcome:
        """images: float [V·N, 3, S, S], view-major. labels: int64 [N], -1 where there is none."""

    @abstractmethod
    def loss_name(self, device: torch.device) -> str:
        """The implementation of its loss on `device`, for the result file."""

    def supervised_heads(self) -> Sequence[nn.Module]:
        """The classifiers: excluded from LARS's trust ratio; their decay is an L2 term in the loss (Google)."""
        return ()

    def head_settings(self) -> Sequence[HeadSetting]:
        """What each of the classifiers has of its own, where several are trained side by side; () otherwise."""
        return ()
