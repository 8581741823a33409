"""Part 3: SimCLR on CIFAR-like images, which continues from call to call: images/s, and kNN on validation images."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastsimclr.bench.gpu.record import Entry, Job, Sheet, Size
from fastsimclr.bench.ours import HEAD_DIM, HEAD_LAYERS, TEMPERATURE, job_of, policy_for
from fastsimclr.evaluation.features import extract
from fastsimclr.evaluation.knn import knn
from fastsimclr.loaders import Batch, Crops, DataConfig, EvalLoader, Source, TrainLoader, choose_placement, open_data
from fastsimclr.methods import Contrastive
from fastsimclr.models import ModelConfig, build_simclr
from fastsimclr.optim import OptimConfig, Schedule, build_optimizer
from fastsimclr.runs import checkpoint
from fastsimclr.runs.stop import Stopped
from fastsimclr.runtime.device import Runtime
from fastsimclr.training.config import TrainerConfig
from fastsimclr.training.hooks import Hook
from fastsimclr.training.trainer import Trainer

CIFAR = ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))  # mean and deviation of the channels
SPARE_S = 30.0  # for the checkpoint and the last kNN


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained: configs/cifar10_r18.yaml in 100 epochs, or a rehearsal of it."""

    batch: int = 512
    epochs: float = 100
    width: float = 1.0
    probe_epochs: float = 5
    optim: OptimConfig = OptimConfig(lr=1.0, warmup_epochs=10)  # noqa: RUF009  # frozen


def data_of(images: str | None) -> DataConfig:
    """A folder of images, a .beton file or a folder of them; scikit-learn's digits where there is none."""
    if images is None:
        return DataConfig(source="digits", loader="resident")
    path = Path(images)
    packed = path.suffix == ".beton" or any(path.glob("*.beton"))
    return DataConfig(source="beton" if packed else "folder", root=images, loader="resident")


class Probe(Hook):
    """kNN every few steps, written to the sheet, and a stop when the time is used up."""

    def __init__(self, sheet: Sheet, every_steps: int, measure: Any) -> None:
        super().__init__(every_steps)
        self._sheet, self._measure = sheet, measure
        self.history: list[Entry] = []

    def due(self, step: int) -> bool:
        """Whether to measure after this step. Asks the trainer to stop cleanly when little time is left."""
        if self._sheet.left_s < SPARE_S:
            signal.raise_signal(signal.SIGTERM)
            return False
        return super().due(step)

    def __call__(self, step: int) -> None:
        """Measure and write."""
        self.history.append({"step": step, **self._measure()})
        self._sheet.put("probes", status="ok", history=self.history)


def train(sheet: Sheet, runtime: Runtime, run: Path, images: str | None, recipe: Recipe, loop: TrainerConfig) -> Entry:
    """Train from the newest checkpoint in `run`, or from the start, until the end or until the time is used up."""
    data = data_of(images)
    splits = open_data(data)
    resident = {
        id(source): choose_placement(source, data, runtime.device).fill() for source in (splits.unlabelled, splits.val)
    }
    torch.manual_seed(0)
    model = ModelConfig(arch="resnet18", width=recipe.width, head_layers=HEAD_LAYERS, head_dim=HEAD_DIM)
    network = build_simclr(model, 32)
    objective = Contrastive(network, temperature=TEMPERATURE, scaling="paper")
    runtime.to_device(objective)
    count, optim = len(splits.unlabelled), recipe.optim
    schedule = Schedule.from_epochs(
        count, recipe.epochs, recipe.batch, optim.warmup_epochs, optim.peak_lr(recipe.batch)
    )
    policy, pin = replace(policy_for(32), normalise=CIFAR), runtime.device.type == "cuda"
    flat = replace(policy.plain(), crop="centre", flip=0.0)

    def batches(start: int, stop: int, crops: Crops) -> Iterable[Batch]:
        held = resident[id(splits.unlabelled)]
        return TrainLoader(
            splits.unlabelled,
            data,
            batch=recipe.batch,
            seed=0,
            start=start,
            stop=stop,
            crops=crops,
            resident=held,
            pin=pin,
        )

    def features(source: Source) -> Any:
        network.encoder.eval()
        held = resident.get(id(source))
        return extract(network.encoder, EvalLoader(source, data, batch=500, resident=held, pin=pin), flat, runtime)

    def accuracy() -> Entry:
        if not len(splits.train) or not len(splits.val):
            return {"knn_top1": None, "why": "the images have no labels, or none are for validation"}
        bank, test, classes = features(splits.train), features(splits.val), len(splits.val.classes)
        found = knn(bank, test, classes, ks=[200], temperatures=[0.1], ranks=runtime.ranks)
        return {"knn_top1": next(iter(found.values())).top1}

    def probe_entry() -> Entry:
        return {"images_per_s": trainer.last.get("images_per_s"), **accuracy()}

    begun = checkpoint.saved(run)
    probe = Probe(sheet, max(1, round(recipe.probe_epochs * count / recipe.batch)), probe_entry)
    if (earlier := sheet.entries.get("probes")) is not None:
        probe.history = earlier["history"]
    job = job_of(
        objective, build_optimizer(optim, objective, global_batch=recipe.batch), batches, schedule,
        policy=policy, batch=recipe.batch, seed=0, run=run,
    )  # fmt: skip
    fingerprint = splits.unlabelled.fingerprint
    job = replace(job, stage="gpu-check", hooks=[probe], resume=True, recipe="", fingerprint=fingerprint)
    trainer = Trainer(loop, runtime, job)
    stopped = False
    try:
        trainer.fit()
    except Stopped:
        stopped = True
    return {
        "continued from": begun[-1].name if begun else None,
        "stopped by the budget": stopped,
        "step": trainer.step,
        "steps in all": schedule.total_steps,
        "epochs": round(trainer.step * recipe.batch / count, 2),
        "trained_s": round(trainer.trained_s, 2),
        "images_per_s": round(trainer.step * recipe.batch / max(trainer.trained_s, 1e-9), 1),
        "last": trainer.last,
        **accuracy(),
        "data": {"name": splits.unlabelled.name, "images": count, "validation": len(splits.val)},
        "precision": runtime.precision,
        "channels_last": runtime.channels_last,
        "recipe": asdict(recipe),
        "trainer": asdict(loop),
    }


def jobs(sheet: Sheet, device: torch.device, tiny: bool, out: Path, images: str | None) -> list[Job]:
    """The training: with fused kernels and a CUDA graph; without the graph or the fused BN where these fail."""
    cuda = device.type == "cuda"
    runtime = Runtime(device=device, precision="bf16" if cuda else "fp32", channels_last=True)
    if cuda:
        torch.backends.cudnn.benchmark = True
    small = OptimConfig(lr=0.5, warmup_epochs=0.05)
    recipe = Recipe(batch=64, epochs=0.3, width=0.125, probe_epochs=0.2, optim=small) if tiny else Recipe()
    loop = TrainerConfig(
        checkpoint_every_steps=5 if tiny else 250, log_every_steps=2 if tiny else 50, keep_checkpoints=1
    )
    graph, fused = replace(loop, fused_bn=True, cuda_graph=True), replace(loop, fused_bn=True)
    ways = {"fused, graph": graph, "fused, eager": fused, "eager": loop} if cuda else {"eager": loop}
    run = out / f"{'rehearsal-' * tiny}training"
    earlier = [sheet.entries.pop(name) for name in list(sheet.entries) if name.startswith("training ")]
    if earlier:
        sheet.put("earlier calls", status="ok", calls=sheet.entries.get("earlier calls", {}).get("calls", []) + earlier)
    names = [f"training {name}" for name in ways]
    runs = [partial(train, sheet, runtime, run, images, recipe, settings) for settings in ways.values()]
    expected_s = 2 * SPARE_S if cuda else 1.0
    return [
        Job(name=name, sizes=[Size(name=f"batch {recipe.batch}", expected_s=expected_s, run=start)], unless=names[:i])
        for i, (name, start) in enumerate(zip(names, runs, strict=True))
    ]
