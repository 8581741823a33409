"""What every training stage does around the loop: checks, optimizer, schedule, trainer, result file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from fastsimclr.evaluation.scores import ClassifierReport, score
from fastsimclr.kernels.backend import chosen
from fastsimclr.loaders import DataError, Policy, Source
from fastsimclr.methods import Objective
from fastsimclr.models import ClassifierNet, count_parameters
from fastsimclr.optim import OptimConfig, Schedule, build_optimizer
from fastsimclr.recipe import dump_recipe
from fastsimclr.runs import checkpoint
from fastsimclr.runs.text import write_text
from fastsimclr.stages.measured import as_json, measure, put_confusion, report_entries
from fastsimclr.stages.setting import Setting, order_name
from fastsimclr.training.hooks import Hook, steps_of
from fastsimclr.training.trainer import Trainer, TrainingJob

_DEFAULT_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What came of a training. trained_s: time of its steps over all resumes, without decoding, probes, checkpoints."""

    stage: str
    steps: int
    last: dict[str, float]
    trained_s: float
    implementations: dict[str, str]


class Training(Protocol):
    """What the settings of every training stage have in common."""

    @property
    def epochs(self) -> int: ...
    @property
    def batch(self) -> int | None: ...
    @property
    def optim(self) -> OptimConfig: ...


def train(
    setting: Setting,
    *,
    stage: str,
    run: Path,
    objective: Objective,
    source: Source,
    config: Training,
    policy: Policy,
    metadata: dict[str, Any],
    resume: bool,
    hooks: Callable[[int], Sequence[Hook]] = lambda batch: (),
    sizes: Sequence[tuple[float, int]] = (),
) -> Trained:
    """Train `objective` on `source` to the end of the schedule.

    A batch of null is that of the run to be resumed, else 256, or all images where fewer, less what the ranks cannot
    share evenly. hooks(batch): what is called between the steps.
    """
    n, optim, world = len(source), config.optim, setting.ranks.world
    setting.ranks.same(f"the images of {source.name} for {stage}", (n, source.fingerprint))
    if n < world:
        raise ValueError(f"{stage}: {source.name} has {n} images for {world} ranks; start at most {n}")
    batch = config.batch
    begun: dict[str, Any] = {}
    if resume and (batch is None or setting.order_is_open(source)):
        begun = setting.ranks.on_first(lambda: _begun_with(run))
        batch = batch or begun.get("batch")
    if batch is None:
        batch = min(_DEFAULT_BATCH, n)
        batch -= batch % world
    if batch % world:
        raise ValueError(
            f"{stage}.batch={batch} is not divisible by {world} ranks;"
            f" use {max(batch - batch % world, world)}, or another number of ranks"
        )
    if batch > n:
        raise DataError(
            f"{stage}.batch={batch} is larger than the {n} images of {source.name}; use at most --{stage}.batch {n}"
        )
    setting.runtime.to_device(objective)
    heads = objective.supervised_heads()
    optimizer = build_optimizer(optim, objective, global_batch=batch, heads=heads, settings=objective.head_settings())
    data = setting.ordered(source, begun)
    order = {"order": data.order} if data.order == "random" else {"order": data.order, "window": data.window}
    job = TrainingJob(
        stage=stage,
        run=run,
        objective=objective,
        optimizer=optimizer,
        schedule=Schedule.from_epochs(n, config.epochs, batch, optim.warmup_epochs, optim.peak_lr(batch)),
        batches=setting.training_batches(source, batch, data),
        batch=batch,
        policy=policy,
        seed=setting.recipe.seed,
        fingerprint=source.fingerprint,
        recipe=dump_recipe(setting.recipe),
        metadata={**metadata, "seed": setting.recipe.seed, "optimizer": optim.name, **order},
        resume=resume,
        hooks=hooks(batch),
        sizes=sizes,
    )
    trainer = Trainer(setting.recipe.trainer, setting.runtime, job)
    last = trainer.fit()
    return Trained(
        stage=stage,
        steps=trainer.step,
        last=last,
        trained_s=trainer.trained_s,
        implementations={
            "loader": setting.loader_name(source),
            "order": order_name(data),
            "views": chosen("views", setting.runtime.device),
            "loss": objective.loss_name(setting.runtime.device),
            "optimizer": getattr(trainer.job.optimizer, "implementation", f"{optim.name}.torch"),
            "bn": bn_name(trainer.bn_groups, world, trainer.config.fused_bn),
        },
    )


def _begun_with(run: Path) -> dict[str, Any]:
    """The facts of the newest checkpoint in `run`, if there is one: batch and order fitted what there was at first."""
    saved = checkpoint.saved(run)
    facts: dict[str, Any] = checkpoint.load(saved[-1])["facts"] if saved else {}
    return facts


def bn_name(groups: int, world: int, fused: bool) -> str:
    """The implementation of BN in training, and in how many parts of the batch it takes statistics."""
    own = "torch" if groups == world else "fastsimclr"  # each rank has one part, to itself
    if fused and world % groups == 0:  # no rank's batch is cut
        own = "batch_norm.fused"
    return f"{own}, {groups} {'part' if groups == 1 else 'parts'} of the batch"


def classifier_score(setting: Setting, network: nn.Module) -> ClassifierReport:
    """How often `network` is right on the validation images of all ranks, and where not."""
    logits = setting.features(network.eval(), setting.splits.val)
    return measure(setting, score(logits.values, logits.labels, setting.ranks), logits, logits.values)


class Validation(Hook):
    """Top-1 of the validation images, as val_top1."""

    def __init__(self, setting: Setting, network: ClassifierNet, every_steps: int) -> None:
        super().__init__(every_steps)
        self._setting, self._network = setting, network

    def __call__(self, step: int) -> dict[str, float]:
        return {"val_top1": classifier_score(self._setting, self._network).top1}


def validations(
    setting: Setting, network: ClassifierNet, source: Source, every_epochs: int | None
) -> Callable[[int], Sequence[Hook]]:
    """The hooks that validate `network`, trained on `source`, every so many epochs; none for null."""

    def hooks(batch: int) -> Sequence[Hook]:
        if every_epochs is None:
            return ()
        return (Validation(setting, network, steps_of(every_epochs, len(source), batch)),)

    return hooks


def write_result(
    setting: Setting, run: Path, trained: Trained, *, metrics: dict[str, float], network: nn.Module, **entries: Any
) -> dict[str, Any]:
    """Write run/result.json of a training stage and return it."""
    training = {
        "steps": trained.steps,
        **{key: value for key, value in trained.last.items() if key != "trained_s"},
    }
    result = {
        "metrics": metrics,
        "training": training,
        "seconds": round(trained.trained_s, 2),
        "implementations": trained.implementations,
        **entries,
    }
    return _write(setting, run, trained.stage, result, network)


def write_scores(
    setting: Setting,
    run: Path,
    trained: Trained,
    network: nn.Module,
    facts: dict[str, Any],
    *,
    more_metrics: dict[str, float] | None = None,
    **entries: Any,
) -> dict[str, Any]:
    """Score the classifier `network` on the validation images, write run/result.json and return it.

    facts, entries: what stands there before and behind the report on its errors.
    """
    scores = classifier_score(setting, network)
    metrics = scores.metrics | (more_metrics or {})
    entries = facts | report_entries(setting, scores) | entries
    return write_result(setting, run, trained, metrics=metrics, network=network, **entries)


def write_evaluation(
    setting: Setting,
    run: Path,
    stage: str,
    metrics: dict[str, float],
    entries: dict[str, Any],
    network: nn.Module,
    seconds: float,
) -> dict[str, Any]:
    """Write run/result.json of a stage that trains no network, and return it."""

    def claim() -> None:
        if checkpoint.saved(run):
            raise FileExistsError(f"run folder {run} holds the checkpoints of a training; give another --out")
        run.mkdir(parents=True, exist_ok=True)
        write_text(run / "recipe.yaml", dump_recipe(setting.recipe))

    setting.ranks.on_first(claim)
    views = chosen("views", setting.runtime.device)
    implementations = {"loader": setting.loader_name(setting.splits.val), "views": views}
    result = {"metrics": metrics, "seconds": round(seconds, 2), "implementations": implementations, **entries}
    return _write(setting, run, stage, result, network)


def _write(setting: Setting, run: Path, stage: str, result: dict[str, Any], network: nn.Module) -> dict[str, Any]:
    result = {
        "stage": stage,
        **result,
        "parameters": count_parameters(network),
        "data": setting.data_facts(),
        "environment": setting.environment,
    }
    put_confusion(result, run if setting.ranks.is_first else None)
    if setting.ranks.is_first:
        write_text(run / "result.json", as_json(result))
    return result
