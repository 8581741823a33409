"""The interface between the trainer and whatever is trained: views in, loss and metrics out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

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
    loss_implementation: str = "torch"
    """The implementation of the loss. An objective whose loss differs between devices overrides `loss_name` instead."""
    group: dist.ProcessGroup | None = None
    joint = False
    """Whether the loss compares the images of a batch with one another: `forward` is then `compare` of `embed` and
    `contrasts`. The others' loss is a mean over images, so that the mean over equal parts of a batch is that of the
    whole."""

    def embed(self, images: Tensor) -> Tensor:
        """Of a joint objective, what its loss compares: [V·N, D] for images float [V·N, 3, S, S], view-major."""
        raise NotImplementedError(f"{type(self).__name__} compares no images")

    def contrasts(self, images: Tensor) -> Tensor | None:
        """Of a joint objective, what embeddings are compared with instead of one another, [V·N, D], without a graph.

        Called once a step for each image, with the images as `embed` has them. None: they are compared with each other.
        """
        return None

    def compare(self, embedded: Tensor, labels: Tensor, contrasts: Tensor | None = None) -> Outcome:
        """Of a joint objective, the outcome of what `embed` and `contrasts` made of this rank's batch, [V·N, D]."""
        raise NotImplementedError(f"{type(self).__name__} compares no images")

    @abstractmethod
    def forward(self, images: Tensor, labels: Tensor) -> Outcome:
        """images: float [V·N, 3, S, S], view-major. labels: int64 [N], -1 where there is none."""

    def train(self, mode: bool = True) -> Self:
        """As of any module, but `frozen_modules` stay in evaluation mode."""
        super().train(mode)
        for module in self.frozen_modules():
            module.eval()
        return self

    def frozen_modules(self) -> Sequence[nn.Module]:
        """The parts that are never in training mode, so that their BN statistics do not move."""
        return ()

    def in_micro_batches(self, labels: Tensor | None, micro_batches: int) -> None:
        """`forward` will see this rank's batch, with these labels, in `micro_batches` equal calls; None: no longer.

        For losses that divide by what they find in the batch, as by the number of its labels.
        """

    def updated(self) -> None:
        """Called after each step of the optimizer, for what follows the weights without a gradient."""

    def loss_name(self, device: torch.device) -> str:
        """The implementation of its loss on `device`, for the result file."""
        return self.loss_implementation

    def supervised_heads(self) -> Sequence[nn.Module]:
        """The classifiers: excluded from LARS's trust ratio; their decay is an L2 term in the loss (Google)."""
        return ()

    def head_settings(self) -> Sequence[HeadSetting]:
        """What each of the classifiers has of its own, where several are trained side by side; () otherwise."""
        return ()
