"""Evaluation of frozen features: weighted kNN, logistic regression, and the accuracy of a classifier."""

# N images to classify, T labelled images, C channels, K classes

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsimclr.feed import ship
from fastsimclr.loaders import Batch, Policy
from fastsimclr.models import BatchNorm
from fastsimclr.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a network says of a set of images: values float32 [N, C] on the device, labels int64 [N] on the device."""

    values: Tensor
    labels: Tensor


def extract(
    network: Callable[[Tensor], Tensor], batches: Iterable[Batch], policy: Policy, runtime: Runtime
) -> Features:
    """Run `network` without gradient over one sequential pass and keep its outputs."""
    values, labels = [], []
    with torch.no_grad():
        for batch in batches:
            shipment = ship(batch, policy, 0, 1, runtime.device)
            with runtime.autocast():
                values.append(network(shipment.views(policy, runtime.view_dtype)).float())
            labels.append(shipment.labels)
    if not values:
        raise ValueError("there is no image to evaluate; check data.val and data.val_fraction")
    return Features(values=torch.cat(values), labels=torch.cat(labels))


def raw_pixels(images: Tensor) -> Tensor:
    """The baseline without a network: the pixels themselves, [N, 3, S, S] -> [N, 3·S·S]."""
    return images.flatten(1)


def calibrate_bn(encoder: nn.Module, batches: Iterable[Batch], policy: Policy, runtime: Runtime) -> None:
    """Set the BN statistics of `encoder` to the averages over these batches; weights stay as they are."""
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


def accuracy(logits_NK: Tensor, labels: Tensor) -> dict[str, float]:
    """top1 and, with more than five classes, top5: fractions of the N rows."""
    ranked = logits_NK.topk(min(5, logits_NK.shape[1]), dim=1).indices == labels[:, None]
    result = {"top1": ranked[:, 0].float().mean().item()}
    if logits_NK.shape[1] > 5:
        result["top5"] = ranked.any(dim=1).float().mean().item()
    return result


def knn(train: Features, test: Features, classes: int, *, k: int, temperature: float) -> dict[str, float]:
    """Weighted kNN on cosine similarity, each neighbour voting exp(similarity / temperature). Wu et al. 2018, Sec. 3.4.

    k is cut to the number of labelled images. O(block·T) memory.
    """
    k = min(k, len(train.labels))
    bank_TC, query_NC = F.normalize(train.values, dim=1), F.normalize(test.values, dim=1)
    votes = []
    for block in torch.split(query_NC, max(1, 2**24 // len(bank_TC))):
        similarity, index = (block @ bank_TC.T).topk(k, dim=1)
        weight = ((similarity - 1) / temperature).exp()
        votes.append(weight.new_zeros(len(block), classes).scatter_add_(1, train.labels[index], weight))
    return accuracy(torch.cat(votes), test.labels)


def logistic_regression(train: Features, test: Features, classes: int, *, l2: float) -> tuple[dict[str, float], int]:
    """Multinomial logistic regression by L-BFGS on features of length sqrt(C); accuracy on `test`, and its iterations.

    Minimises mean cross-entropy + l2 / 2 · |W|² (the bias is free).
    """
    x_TC, y_NC = (math.sqrt(f.values.shape[1]) * F.normalize(f.values, dim=1) for f in (train, test))
    weight = torch.zeros(classes, x_TC.shape[1], device=x_TC.device, requires_grad=True)
    bias = torch.zeros(classes, device=x_TC.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=200, tolerance_grad=1e-5, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(x_TC, weight, bias), train.labels) + 0.5 * l2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    solver.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        result = accuracy(F.linear(y_NC, weight, bias), test.labels)
    return result, int(solver.state[weight]["n_iter"])
