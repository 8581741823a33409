"""The usual training loop, around the baseline of a stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsimclr.bench import baseline, ours, supervised
from fastsimclr.bench.flops import flops_per_image
from fastsimclr.bench.record import LAST, Contestant, Round, Stopwatch
from fastsimclr.bench.training_configs import StageBench, TrainingStage
from fastsimclr.models import count_parameters
from fastsimclr.runtime.device import Runtime

Tensors = Sequence[Tensor]
_COMPILING = 2  # steps before the first round


def title(stage: TrainingStage) -> str:
    """Whose baseline runs in a stage."""
    return baseline.title() if stage == "pretrain" else "torchvision"


def notes(stage: TrainingStage) -> list[str]:
    """What a reader must know of it."""
    return baseline.notes() if stage == "pretrain" else [supervised.NOTE] if stage != "linear" else []


def same_work(config: StageBench) -> dict[str, Any]:
    """That both sides do the same on the same weights and views; ArithmeticError where they do not."""
    size, arch = config.size, config.arch
    if config.stage == "pretrain":
        return baseline.same_work(ours.network(arch, size, config.seed), size, arch)
    return supervised.same_classifier(ours.classifier(arch, size, config.classes, config.seed), size, arch)


def trained(
    name: str,
    runtime: Runtime,
    config: StageBench,
    batches: Callable[[], Iterable[Tensors]],
    *,
    compiled: bool = False,
    details: dict[str, Any],
) -> Contestant:
    """A contestant whose round is one pass over batches(): two views float [N, 3, S, S], or one and labels int64 [N].

    compiled: its networks by torch.compile, before the first round.
    """
    torch.manual_seed(config.seed)
    if config.stage == "pretrain":
        rival = baseline.pretraining(config.arch, config.size)
    else:
        rival = supervised.supervised(config)
    flops = flops_per_image(rival.networks, config.size, rival.views)
    for net in rival.networks:
        runtime.to_device(net)
        if compiled:
            net.compile()
    watch = Stopwatch(runtime.device)

    def to_device(tensor: Tensor) -> Tensor:
        tensor = tensor.to(runtime.device, non_blocking=True)
        views = runtime.channels_last and tensor.ndim == 4
        return tensor.contiguous(memory_format=torch.channels_last) if views else tensor

    def one_pass(steps: Iterable[Tensors]) -> Round:
        losses = []
        watch.start()
        for batch in steps:
            watch.mark("wait")
            placed = [to_device(tensor) for tensor in batch]
            watch.mark("views")
            with runtime.autocast():
                outputs = rival.forward(placed, watch.mark)
                watch.mark("forward")
                loss = rival.loss(*outputs)
            watch.mark("loss")
            loss.backward()  # type: ignore[no-untyped-call]
            watch.mark("backward")
            rival.optimizer.step()
            watch.mark("optimizer")
            rival.optimizer.zero_grad()
            losses.append(loss.detach())
            watch.mark(LAST)
        return watch.round(config.batch, losses)

    def prepare() -> float:
        start = time.perf_counter()
        one_pass([batch for batch, _ in zip(batches(), range(_COMPILING), strict=False)])
        return time.perf_counter() - start

    known = {
        "precision": runtime.precision,
        "channels_last": runtime.channels_last,
        "mode": "compile" if compiled else "eager",
        "parameters": count_parameters(rival.networks[0]),
        "optimizer": rival.optimizer_name,
    }
    return Contestant(
        name=name,
        ours=False,
        views=rival.views,
        run=lambda: one_pass(batches()),
        details=known | details,
        flops=flops,
        prepare=prepare if compiled else None,
    )
