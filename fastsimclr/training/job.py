"""The input of a Trainer: what it trains, on what, and where the state goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastsimclr.loaders import Crops, Policy
from fastsimclr.methods import Objective
from fastsimclr.optim import Schedule
from fastsimclr.training.feed import Feed
from fastsimclr.training.hooks import Hook


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """What is trained, on what, and where its state goes. Everything the loop needs that is not a setting of the loop.

    batches(start, stop, crops): the rank's batches for those steps; crops: their views, None where policy is None.
    batch: images per step, over all ranks.
    policy: how views are made; None where the feed delivers images that need no views.
    feed: builds the iterator over the shipments of `batches`; called with the arguments of Feed. A replacement is a
    context manager with `waited_s`. Its shipments have `ids`, `render` and `labels`, as a Shipment has; the objective
    is called with what `render` returns and the labels.
    metadata: what must be equal for a resume to be exact; the `facts` of a checkpoint.
    sizes: (share of the steps, side): from there on views are that large, instead of policy.size; rising shares.
    resume: continue from the newest checkpoint in `run`, if there is one; False refuses a folder that has one.
    """

    stage: str
    run: Path
    objective: Objective
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    batches: Callable[[int, int, Any], Iterable[Any]]
    policy: Policy | None
    batch: int
    seed: int
    fingerprint: str
    recipe: str
    metadata: dict[str, Any]
    resume: bool
    hooks: Sequence[Hook] = ()
    sizes: Sequence[tuple[float, int]] = ()
    feed: Callable[..., Any] = Feed

    def spans(self, step: int) -> Iterator[tuple[int, Policy | None]]:
        """The runs of steps of one size of views from `step` on: where each ends, and its policy."""
        total = self.schedule.total_steps
        if self.policy is None:
            yield total, None
            return
        starts = [(0, self.policy.size), *((math.ceil(share * total), size) for share, size in self.sizes)]
        for (_, size), (stop, _) in zip(starts, [*starts[1:], (total, 0)], strict=True):
            if step < stop:
                yield stop, replace(self.policy, size=size)

    def crops(self, policy: Policy | None) -> Any:
        """The Crops of a policy of `spans`; None for None."""
        return None if policy is None else Crops(policy=policy, seed=self.seed, views=self.objective.views)
