"""An objective on many ranks: what BN and the loss see is the global batch, and gradients are averaged."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from datetime import timedelta

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastsimclr.models import batch_groups, set_groups
from fastsimclr.objectives import Objective
from fastsimclr.runtime import Runtime

Parallel = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


def parallel(objective: Objective, *, groups: int, runtime: Runtime, timeout_s: float) -> Parallel:
    """(images, labels) -> (loss, metrics) of `objective`, whose BN takes statistics over `groups` parts of the batch.

    Every rank calls it, at the same place. timeout_s: how long a rank waits for the others in one exchange of BN.
    """
    ranks = runtime.ranks
    objective.group = ranks.group
    alone = ranks.world == 1 and groups == 1
    parts = batch_groups(
        groups,
        views=objective.views,
        rank=ranks.rank,
        world=ranks.world,
        group=ranks.group,
        timeout=timedelta(seconds=timeout_s),
    )
    set_groups(objective, None if alone else parts)
    step = _Step(objective)
    if ranks.world == 1:
        return step
    with warnings.catch_warnings():  # torch 2.15 renamed the option, earlier versions do not know the new name
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(
            step,
            device_ids=[runtime.device] if runtime.device.type == "cuda" else None,
            process_group=ranks.group,
            broadcast_buffers=False,  # BN's statistics are averaged before anybody reads them
            gradient_as_bucket_view=True,
            static_graph=True,
        )


class _Step(nn.Module):
    """The objective as DistributedDataParallel needs it: tensors out, in containers that torch knows."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        outcome = self.objective(images, labels)
        return outcome.loss, outcome.metrics
