"""A step's gradient from micro-batches, for batches whose activations do not fit: the loss stays that of the batch.

A loss that is a mean over images is the mean of its parts'. One that compares the images of a batch needs gradient
caching (Gao et al. 2021, arXiv 2101.06983): all micro-batches are embedded without a graph, the loss of all embeddings
gives the gradient of each, and each micro-batch goes through the network again to meet its own. That is exact, and
costs one forward pass more. What a loss compares embeddings with besides (`Objective.contrasts`) is computed once.

BN takes its statistics over one micro-batch, of all ranks that share them (`trainer.bn_groups` divides it as it would
divide the batch), in both passes the same; its running statistics follow the second, as if the micro-batches were
groups of one batch. So a step equals an uncached one whose BN groups are the micro-batches.
"""

# N images of a rank, V views, D dimension of what is compared

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from fastsimclr.methods import Objective, Outcome
from fastsimclr.models import statistics_of

BUCKET_BYTES = 2**26  # of gradients that one all-reduce averages

Scale = Callable[[Tensor], Tensor]
Autocast = Callable[[], AbstractContextManager[object]]


def backward_in_micro_batches(
    objective: Objective, images: Tensor, labels: Tensor, micro: int, scale: Scale, autocast: Autocast = nullcontext
) -> Outcome:
    """Add the gradient of scale(loss) to that of the parameters; the outcome of the batch, without a graph.

    images: float [V·N, 3, S, S], view-major. labels: int64 [N]. micro: images at a time, a divisor of N.
    autocast: what forward passes run in.
    """
    micro_batches = [(images_of, labels[rows]) for images_of, rows in _micro_batches(images, len(labels), micro)]
    return (_joint if objective.joint else _separate)(objective, micro_batches, labels, scale, autocast)


def average_gradients(objective: Objective) -> None:
    """The mean of the gradients over objective.group, as DDP would leave it."""
    group = objective.group
    if group is None:
        return
    world, waiting = dist.get_world_size(group), list[tuple[list[Tensor], Tensor, dist.Work | None]]()
    for bucket in _buckets([p.grad for p in objective.parameters() if p.grad is not None]):
        flat = torch.cat([gradient.flatten() for gradient in bucket]).div_(world)
        waiting.append((bucket, flat, dist.all_reduce(flat, group=group, async_op=True)))
    for bucket, flat, work in waiting:
        if work is not None:
            work.wait()
        for gradient, mean in zip(bucket, torch.split(flat, [g.numel() for g in bucket]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def _micro_batches(images: Tensor, n: int, micro: int) -> list[tuple[Tensor, slice]]:
    views = len(images) // n
    rows = [slice(start, start + micro) for start in range(0, n, micro)]
    return [(torch.cat([images[v * n + r.start : v * n + r.stop] for v in range(views)]), r) for r in rows]


def _joint(
    objective: Objective, micro_batches: list[tuple[Tensor, Tensor]], labels: Tensor, scale: Scale, autocast: Autocast
) -> Outcome:
    views = len(micro_batches[0][0]) // len(micro_batches[0][1])
    contrasts, embedded = list[Tensor](), list[Tensor]()
    with torch.no_grad(), autocast():
        for k, (images, _) in enumerate(micro_batches):
            with statistics_of(k, len(micro_batches)):
                found = objective.contrasts(images)
            contrasts += [] if found is None else [found.view(views, -1, found.shape[1])]
            with statistics_of(None):
                one = objective.embed(images)
            embedded.append(one.view(views, -1, one.shape[1]))
    leaf_VND = torch.cat(embedded, dim=1).requires_grad_()
    with autocast():
        whole = torch.cat(contrasts, dim=1).flatten(0, 1) if contrasts else None
        outcome = objective.compare(leaf_VND.flatten(0, 1), labels, whole)
    scale(outcome.loss).backward()  # type: ignore[no-untyped-call]
    assert leaf_VND.grad is not None
    wanted = torch.split(leaf_VND.grad, [one.shape[1] for one in embedded], dim=1)
    for k, ((images, _), gradient_VND) in enumerate(zip(micro_batches, wanted, strict=True)):
        with statistics_of(k, len(micro_batches)), autocast():
            again = objective.embed(images)
        again.backward(gradient_VND.flatten(0, 1))  # type: ignore[no-untyped-call]
    return Outcome(loss=outcome.loss.detach(), metrics=outcome.metrics)


def _separate(
    objective: Objective, micro_batches: list[tuple[Tensor, Tensor]], labels: Tensor, scale: Scale, autocast: Autocast
) -> Outcome:
    outcomes = []
    objective.in_micro_batches(labels, len(micro_batches))
    for k, (images, own) in enumerate(micro_batches):
        with statistics_of(k, len(micro_batches)), autocast():
            found: Outcome = objective(images, own)
        scale(found.loss / len(micro_batches)).backward()  # type: ignore[no-untyped-call]
        outcomes.append(Outcome(loss=found.loss.detach(), metrics=found.metrics))
    objective.in_micro_batches(None, 1)
    return Outcome(
        loss=torch.stack([one.loss for one in outcomes]).mean(),
        metrics={key: torch.stack([one.metrics[key] for one in outcomes]).mean() for key in outcomes[0].metrics},
    )


def _buckets(gradients: list[Tensor]) -> list[list[Tensor]]:
    """Runs of gradients of one dtype, of BUCKET_BYTES at most where they are more than one."""
    found: list[list[Tensor]] = []
    room = 0
    for gradient in gradients:
        size = gradient.numel() * gradient.element_size()
        if not found or found[-1][0].dtype != gradient.dtype or size > room:
            found.append([])
            room = BUCKET_BYTES
        found[-1].append(gradient)
        room -= size
    return found
