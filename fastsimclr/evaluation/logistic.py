"""Multinomial logistic regression on frozen features, by L-BFGS over all ranks."""

# N images to classify, T labelled images, C channels, K classes

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastsimclr.distributed.ranks import Ranks
from fastsimclr.evaluation.features import Features
from fastsimclr.evaluation.scores import Score, score


@dataclass(frozen=True, kw_only=True)
class Logistic:
    """A linear classifier on features of length sqrt(C): weight [K, C], bias [K], and the solver's iterations."""

    weight: Tensor
    bias: Tensor
    iterations: int

    def logits(self, test: Features) -> Tensor:
        """[N, K] of this rank's images."""
        return F.linear(_unit_rms(test.values), self.weight, self.bias)

    def score(self, test: Features, ranks: Ranks) -> Score:
        """How often it is right on the images of all ranks."""
        return score(self.logits(test), test.labels, ranks)


def logistic_regression(train: Features, classes: int, *, l2: float, ranks: Ranks) -> Logistic:
    """Multinomial logistic regression by L-BFGS on features of length sqrt(C), in their dtype.

    Minimises mean cross-entropy + l2 / 2 · |W|² over the labelled images of all ranks (the bias is free). Each rank
    keeps its own images; the loss and its gradient are summed, so that every rank takes the same steps.
    """
    x_TC = _unit_rms(train.values)
    total = ranks.total(torch.tensor(len(x_TC), device=x_TC.device))
    weight = x_TC.new_zeros(classes, x_TC.shape[1], requires_grad=True)
    bias = x_TC.new_zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=200, tolerance_grad=1e-5, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        mine = F.cross_entropy(F.linear(x_TC, weight, bias), train.labels, reduction="sum") / total
        d_weight, d_bias = torch.autograd.grad(mine, (weight, bias))
        summed = ranks.total(torch.cat([mine.detach()[None], d_weight.flatten(), d_bias]))
        loss, d_weight, d_bias = torch.split(summed, [1, weight.numel(), classes])
        weight.grad = torch.add(d_weight.view_as(weight), weight.detach(), alpha=l2)
        bias.grad = d_bias.clone()
        whole: Tensor = loss[0] + 0.5 * l2 * weight.detach().square().sum()
        return whole

    solver.step(closure)  # type: ignore[no-untyped-call]
    return Logistic(weight=weight.detach(), bias=bias.detach(), iterations=int(solver.state[weight]["n_iter"]))


def _unit_rms(values: Tensor) -> Tensor:
    """Each row scaled to length sqrt(C), a root mean square of 1."""
    return math.sqrt(values.shape[1]) * F.normalize(values, dim=1)
