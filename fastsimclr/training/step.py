"""An objective on many ranks: what BN and the loss see is the global batch, and gradients are averaged."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastsimclr.methods import Objective, Outcome
from fastsimclr.models import batch_groups, set_groups
from fastsimclr.runtime.device import Runtime
from fastsimclr.training.gradient_cache import Scale, average_gradients, backward_in_micro_batches

Step = Callable[[Tensor, Tensor, Scale], Outcome]
"""(this rank's views, its labels, what scales a loss) -> the outcome; gradients of the whole batch are then there."""


def parallel(
    objective: Objective,
    *,
    groups: int,
    runtime: Runtime,
    timeout_s: float,
    micro: int | None = None,
    bucket_mb: int = 25,
) -> Step:
    """A step of `objective`, whose BN takes statistics over `groups` parts of what goes through the network at once.

    Every rank calls it, at the same place. timeout_s: how long a rank waits for the others in one exchange of BN.
    micro: images that a rank takes through the network at once (see gradient_cache.py); None: all of its batch.
    bucket_mb: gradients that DDP averages in one all-reduce.
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
    if micro is not None:
        return _in_micro_batches(objective, micro, runtime)
    network: nn.Module = _Forward(objective)
    if ranks.world > 1:
        # BN's statistics differ between the ranks until they are averaged, before anybody reads them, so DDP must leave
        # them alone. Its option for that was renamed in torch 2.13, and the new one still broadcasts them at the start.
        buffers = [name for name, _ in network.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, buffers)  # type: ignore[no-untyped-call]
        network = DistributedDataParallel(
            network,
            device_ids=[runtime.device] if runtime.device.type == "cuda" else None,
            process_group=ranks.group,
            gradient_as_bucket_view=True,
            static_graph=True,
            bucket_cap_mb=bucket_mb,
        )
    return _at_once(network, runtime)


def _at_once(network: nn.Module, runtime: Runtime) -> Step:
    def step(images: Tensor, labels: Tensor, scale: Scale) -> Outcome:
        with runtime.autocast():
            loss, metrics = network(images, labels)
        scale(loss).backward()  # type: ignore[no-untyped-call]
        return Outcome(loss=loss.detach(), metrics=metrics)

    return step


def _in_micro_batches(objective: Objective, micro: int, runtime: Runtime) -> Step:
    def step(images: Tensor, labels: Tensor, scale: Scale) -> Outcome:
        outcome = backward_in_micro_batches(objective, images, labels, micro, scale, runtime.autocast)
        average_gradients(objective)
        return outcome

    return step


class _Forward(nn.Module):
    """The objective as DistributedDataParallel needs it: tensors out, in containers that torch knows."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        outcome = self.objective(images, labels)
        return outcome.loss, outcome.metrics
