"""Contrastive pretraining: NT-Xent between two views of each image. Chen et al. 2020, Algorithm 1."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastsimclr.kernels.backend import chosen
from fastsimclr.kernels.nt_xent import NtXent, nt_xent
from fastsimclr.methods.base import Objective, Outcome
from fastsimclr.models import SimCLRNet


class Contrastive(Objective):
    """NT-Xent on the projections of both views, from one forward pass of the concatenated batch.

    temperature > 0. scaling: "paper" is the mean over the 2N rows, "google" the sum of the two views' means (twice).
    """

    views = 2
    joint = True

    def __init__(self, network: SimCLRNet, *, temperature: float, scaling: Literal["paper", "google"]) -> None:
        super().__init__()
        self.network = network
        self.temperature = temperature
        self.scaling: Literal["paper", "google"] = scaling

    def loss_name(self, device: torch.device) -> str:
        """The NT-Xent that the device gets."""
        return chosen("nt_xent", device)

    def forward(self, images: Tensor, labels: Tensor) -> Outcome:
        contrasts = self.contrasts(images)  # first, while no activations wait for the backward pass
        return self.compare(self.embed(images), labels, contrasts)

    def embed(self, images: Tensor) -> Tensor:
        """The projections of the views."""
        projections: Tensor = self.network(images)[1]
        return projections

    def compare(self, embedded: Tensor, labels: Tensor, contrasts: Tensor | None = None) -> Outcome:
        """NT-Xent of projections [2N, D]."""
        return outcome_of(nt_xent(embedded, self.temperature, scaling=self.scaling, group=self.group))


def outcome_of(result: NtXent) -> Outcome:
    """The loss, and how well the positives rank, as metrics."""
    return Outcome(loss=result.loss, metrics={"contrastive_top1": result.top1, "contrastive_top5": result.top5})
