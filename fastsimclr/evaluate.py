"""Evaluation of frozen features: weighted kNN, logistic regression, and the accuracy of a classifier, over all ranks.

Each rank holds the features of its part of the images. What is reported comes from counts summed over the ranks, so
that parts of unequal length, and images left out as damaged, change nothing.
"""

# N images to classify, T labelled images, C channels, K classes, S settings

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsimclr.feed import ship
from fastsimclr.loaders import Batch, Policy
from fastsimclr.models import BatchNorm
from fastsimclr.ranks import Ranks
from fastsimclr.runtime import Runtime
from fastsimclr.scores import Score, count, score


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a network says of this rank's images: values float [N, C] on the device, labels int64 [N] on the device.

    ids: the images' positions in their source, int64 [N] on the CPU; None of several sources together.
    """

    values: Tensor
    labels: Tensor
    ids: Tensor | None = None

    def and_also(self, other: Features) -> Features:
        """These rows, then those of `other`."""
        return Features(values=torch.cat([self.values, other.values]), labels=torch.cat([self.labels, other.labels]))


def extract(
    network: Callable[[Tensor], Tensor], batches: Iterable[Batch], policy: Policy, runtime: Runtime
) -> Features:
    """Run `network` without gradient over one sequential pass of this rank's part and keep its outputs, float32.

    Every rank calls it. ValueError where no rank has an image; a rank without any gets 0 rows.
    """
    values, labels, ids = [], [], []
    with torch.no_grad():
        for batch in batches:
            shipment = ship(batch, policy, 0, 1, runtime.device)
            with runtime.autocast():
                values.append(network(shipment.views(policy, runtime.view_dtype)).float())
            labels.append(shipment.labels)
            ids.append(shipment.ids)
    shapes = runtime.ranks.gather(tuple(values[0].shape[1:]) if values else None)
    shape = next((shape for shape in shapes if shape is not None), None)
    if shape is None:
        raise ValueError("there is no image to evaluate; check data.val and data.val_fraction")
    if not values:
        nothing = torch.empty(0, *shape, device=runtime.device)
        none = torch.empty(0, dtype=torch.int64)
        return Features(values=nothing, labels=none.to(runtime.device), ids=none)
    return Features(values=torch.cat(values), labels=torch.cat(labels), ids=torch.cat(ids))


def raw_pixels(images: Tensor) -> Tensor:
    """The baseline without a network: the pixels themselves, [N, 3, S, S] -> [N, 3·S·S]."""
    return images.flatten(1)


def calibrate_bn(encoder: nn.Module, batches: Iterable[Batch], policy: Policy, runtime: Runtime) -> None:
    """Set the BN statistics of `encoder` to the averages over these batches; weights stay as they are.

    Give every rank the same batches, not its part of them: the statistics are each rank's own.
    """
    norms = [module for module in encoder.modules() if isinstance(module, BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    encoder.train()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the cumulative average
    with torch.no_grad():
        for batch in batches:
            shipment = ship(batch, policy, 0, 1, runtime.device)
            with runtime.autocast():
                encoder(shipment.views(policy, runtime.view_dtype))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    encoder.eval()


def knn(
    train: Features, test: Features, classes: int, *, ks: Sequence[int], temperatures: Sequence[float], ranks: Ranks
) -> dict[tuple[int, float], Score]:
    """Weighted kNN on cosine similarity, each neighbour voting exp(similarity / temperature). Wu et al. 2018, Sec. 3.4.

    The score of each (k, temperature), the first of both first; k is cut to the number of labelled images. Each rank
    classifies its own images by the labelled ones of all ranks: T·C numbers in memory, and those of a block of images
    against them.
    """
    bank_TC = ranks.gather_rows(F.normalize(train.values, dim=1))
    labels_T = ranks.gather_rows(train.labels)
    settings = list(dict.fromkeys((min(k, len(bank_TC)), temperature) for k in ks for temperature in temperatures))
    most = max(k for k, _ in settings)
    counts_S3K = torch.zeros(len(settings), 3, classes, dtype=torch.int64, device=bank_TC.device)
    predicted_SN = torch.empty(len(settings), len(test.labels), dtype=torch.int64, device=bank_TC.device)
    done = 0
    rows = max(1, 2**24 // len(bank_TC))
    blocks = torch.split(F.normalize(test.values, dim=1), rows), torch.split(test.labels, rows)
    for block_NC, truth_N in zip(*blocks, strict=True):
        similarity, index = (block_NC @ bank_TC.T).topk(most, dim=1)  # the nearest first
        neighbours = labels_T[index]
        for s, (k, temperature) in enumerate(settings):
            weight = ((similarity[:, :k] - 1) / temperature).exp()
            votes_NK = weight.new_zeros(len(block_NC), classes).scatter_add_(1, neighbours[:, :k], weight)
            counts_3K, predicted_SN[s, done : done + len(block_NC)] = count(votes_NK, truth_N)
            counts_S3K[s] += counts_3K
        done += len(block_NC)
    summed = ranks.total(counts_S3K).cpu()
    return {
        setting: Score(counts_3K=counts_3K, predicted_N=predicted_N)
        for setting, counts_3K, predicted_N in zip(settings, summed, predicted_SN, strict=True)
    }


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
