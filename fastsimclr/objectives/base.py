"""The interface between the trainer and whatever is trained: views in, loss and metrics out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """loss: scalar with gradient. metrics: detached float scalars on the device, averaged by the trainer over steps."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Objective(nn.Module, ABC):
    """Networks and the loss that trains them. Parameters with requires_grad are optimised, the rest is carried along.

    views: how many views of each image it wants. loss_name: the implementation of its loss, for the result file.
    """

    views: int
    loss_name: str

    @abstractmethod
    def forward(self, images: Tensor, labels: Tensor) -> Outcome:
        """images: float [V·N, 3, S, S], view-major. labels: int64 [N], -1 where there is none."""

    def supervised_heads(self) -> Sequence[nn.Module]:
        """The classifiers: excluded from LARS's trust ratio; their decay is an L2 term in the loss (Google)."""
        return ()
