"""What one rank of the scaling bench does: its share of each round, and for rank 0 the file of all.

    torchrun ... -m fastsimclr.bench.scaling_rank OUT.json '{"batch": 128, "arch": "resnet50", "size": 224}'

runs it by hand, on several machines too; the keys are those of `fastsimclr bench scaling`.
"""

from __future__ import annotations

import json
import logging
import statistics
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsimclr.bench import watched
from fastsimclr.bench.flops import measure_training
from fastsimclr.bench.record import Contestant, Round
from fastsimclr.bench.step import synthetic
from fastsimclr.bench.training_configs import ScalingBench
from fastsimclr.distributed.ranks import Ranks
from fastsimclr.distributed.torchrun import launched
from fastsimclr.loaders import choose_placement, open_data
from fastsimclr.methods import Outcome
from fastsimclr.models import batch_groups, set_groups
from fastsimclr.runs.text import write_text
from fastsimclr.runtime.device import choose_runtime
from fastsimclr.training.config import TrainerConfig
from fastsimclr.training.cuda_graph import GraphedStep
from fastsimclr.training.gradient_cache import Scale
from fastsimclr.training.step import Step
from fastsimclr.training.trainer import Trainer

ERROR = "error: "
ALL, UNAVERAGED, NONE = "all", "without averaging gradients", "none"


def main(arguments: Sequence[str] | None = None) -> int:
    """Arguments: the file to write and the settings as JSON. Rank 0 writes it."""
    out, settings = sys.argv[1:] if arguments is None else arguments
    launch = launched()
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.INFO if launch.ranks.is_first else 30)
    launch.enter()
    try:
        given = json.loads(settings)
        config = ScalingBench(**given | ({"ranks": tuple(given["ranks"])} if "ranks" in given else {}))
        found = measure_world(config.at_smoke_size())
        if launch.ranks.is_first:
            write_text(Path(out), json.dumps(found) + "\n")
        launch.wait()
    except Exception as error:
        traceback.print_exc()
        if said := launch.blame(error, f"{type(error).__name__}: {error}"):  # of several ranks one says it
            print(f"{ERROR}{said}", file=sys.stderr)
        return 1
    finally:
        launch.leave()
    return 0


def measure_world(config: ScalingBench) -> dict[str, Any]:
    """Rows and reference of this world, the same on every rank: of one rank one row, of several one by exchanges."""
    runtime = choose_runtime(config.device, config.precision, True)
    if runtime.device.type == "cpu" and config.threads:
        torch.set_num_threads(config.threads)
    ranks = runtime.ranks
    alone = replace(runtime, ranks=Ranks())
    data = synthetic(config, config.batch * ranks.world)
    source = open_data(data).unlabelled
    resident = choose_placement(source, data, runtime.device).fill()
    settings = TrainerConfig(bn_groups=config.bn_groups)
    kinds = [(ALL, runtime, None), (UNAVERAGED, runtime, unaveraged), (NONE, alone, None)]
    entries = []
    for exchanges, own, step_of in kinds if ranks.world > 1 else kinds[:1]:
        contestant = watched.trained(
            f"{ranks.world} {'rank' if ranks.world == 1 else 'ranks'}, exchanges: {exchanges}",
            own,
            config,
            watched.loading(source, resident, own, config, data),
            mode=config.mode,
            settings=settings,
            step_of=step_of,
            details={"exchanges": exchanges, "ranks": ranks.world},
        )
        entries.append(_together(contestant, ranks))
    rows, reference = measure_training(entries, config.rounds, runtime.device, devices=ranks.world)
    return {"rows": rows, "reference": reference}


def unaveraged(trainer: Trainer) -> Step:
    """The step of `trainer` without averaging gradients: each rank keeps its own. BN and the loss exchange as ever."""
    objective, runtime = trainer.job.objective, trainer.runtime
    ranks = runtime.ranks
    objective.group = ranks.group
    groups = batch_groups(
        trainer.bn_groups,
        views=objective.views,
        rank=ranks.rank,
        world=ranks.world,
        group=ranks.group,
        timeout=timedelta(seconds=trainer.config.timeout_s),
    )
    set_groups(objective, groups)

    def step(images: Tensor, labels: Tensor, scale: Scale) -> Outcome:
        with runtime.autocast():
            outcome: Outcome = objective(images, labels)
        scale(outcome.loss).backward()  # type: ignore[no-untyped-call]
        return Outcome(loss=outcome.loss.detach(), metrics=outcome.metrics)

    return GraphedStep(step, objective) if trainer.config.cuda_graph else step


def _together(contestant: Contestant, ranks: Ranks) -> Contestant:
    """The contestant of all ranks: they begin together, and a round is that of the slowest with the images of all."""

    def run() -> Round:
        ranks.wait()
        every = ranks.gather(contestant.run())
        slowest = max(every, key=lambda each: each.seconds)
        losses = [each.loss for each in every if each.loss is not None]
        first = [each.first_loss for each in every if each.first_loss is not None]
        return replace(
            slowest,
            images=sum(each.images for each in every),
            loss=statistics.mean(losses),
            first_loss=statistics.mean(first),
        )

    return replace(contestant, run=run)


if __name__ == "__main__":
    sys.exit(main())
