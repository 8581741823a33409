"""Features of a network: outputs of one pass over images, each rank its part, and the baselines without training.

Each rank holds the features of its part of the images. What is reported comes from counts summed over the ranks, so
that parts of unequal length, and images left out as damaged, change nothing.
"""

# N images of this rank, C channels

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastsimclr.loaders import Batch, Crops, Policy
from fastsimclr.models import BatchNorm
from fastsimclr.runtime.device import Runtime
from fastsimclr.training.feed import ship


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
            shipment = ship(batch, Crops(policy=policy, seed=0, views=1), runtime)
            with runtime.autocast():
                values.append(network(shipment.render(runtime.view_dtype)).float())
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
            shipment = ship(batch, Crops(policy=policy, seed=0, views=1), runtime)
            with runtime.autocast():
                encoder(shipment.render(runtime.view_dtype))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    encoder.eval()
