"""Several linear classifiers on one frozen network, each with its own learning rate and decay."""

# N images, K classes, S settings

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsimclr.methods.base import Objective, Outcome
from fastsimclr.models import Classifier, ClassifierNet
from fastsimclr.optim import HeadSetting


class LinearSweep(Objective):
    """Mean cross-entropy of S classifiers, summed: they share the features and nothing else, so none sees another.

    network: the frozen body; its own classifier is not trained, it takes the weights of the one that is chosen later.
    settings: one of each classifier.
    """

    views = 1
    loss_implementation = "cross_entropy.torch"

    def __init__(self, network: ClassifierNet, settings: Sequence[HeadSetting]) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.settings = tuple(settings)
        kernel = network.classifier
        self.candidates = nn.ModuleList(Classifier(kernel.in_features, kernel.out_features) for _ in settings)

    def frozen_modules(self) -> Sequence[nn.Module]:
        return (self.network,)

    def forward(self, images: Tensor, labels: Tensor) -> Outcome:
        """loss: the sum over the classifiers. top1: their mean."""
        with torch.no_grad():
            features = self.network.features(images)
        logits_SNK = torch.stack([candidate(features) for candidate in self.candidates])
        logits_SNK = logits_SNK.to(torch.promote_types(logits_SNK.dtype, torch.float32))
        losses = [F.cross_entropy(logits_NK, labels) for logits_NK in logits_SNK]
        top1 = (logits_SNK.detach().argmax(dim=2) == labels).float().mean()
        return Outcome(loss=torch.stack(losses).sum(), metrics={"top1": top1})

    def supervised_heads(self) -> Sequence[nn.Module]:
        return tuple(self.candidates)

    def head_settings(self) -> Sequence[HeadSetting]:
        return self.settings

    def choose(self, index: int) -> None:
        """Give the network the weights of classifier `index`."""
        self.network.classifier.load_state_dict(self.candidates[index].state_dict())
