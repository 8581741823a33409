"""Supervised cross-entropy: fine-tuning, the from-scratch baseline, and linear evaluation with a frozen body."""

# N images, K classes

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsimclr.methods.base import Objective, Outcome
from fastsimclr.models import BatchNorm, ClassifierNet


class CrossEntropy(Objective):
    """Mean cross-entropy of the labels.

    frozen_body: only the classifier trains; the rest stays in evaluation mode, so its BN statistics do not move.
    frozen_bn: everything trains, but BN normalises with its stored statistics (for batches too small to have any).
    """

    views = 1
    loss_implementation = "cross_entropy.torch"

    def __init__(self, network: ClassifierNet, *, frozen_body: bool = False, frozen_bn: bool = False) -> None:
        super().__init__()
        self.network = network
        self.frozen_body, self.frozen_bn = frozen_body, frozen_bn
        if frozen_body:
            network.requires_grad_(False)
            network.classifier.requires_grad_(True)

    def frozen_modules(self) -> Sequence[nn.Module]:
        if self.frozen_body:
            return (self.network,)
        if not self.frozen_bn:
            return ()
        return [module for module in self.network.modules() if isinstance(module, BatchNorm)]

    def forward(self, images: Tensor, labels: Tensor) -> Outcome:
        if self.frozen_body:
            with torch.no_grad():
                features = self.network.features(images)
            logits_NK = self.network.classifier(features)
        else:
            logits_NK = self.network(images)
        logits_NK = logits_NK.to(torch.promote_types(logits_NK.dtype, torch.float32))
        correct = (logits_NK.detach().argmax(dim=1) == labels).float().mean()
        return Outcome(loss=F.cross_entropy(logits_NK, labels), metrics={"top1": correct})

    def supervised_heads(self) -> Sequence[nn.Module]:
        return (self.network.classifier,)
