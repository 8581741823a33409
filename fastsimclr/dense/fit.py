"""One loop for both tasks: SGD in one process, in fp32; an image's draws and the order depend on (seed, step) alone."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from fastsimclr.dense.networks import Init, Norm
from fastsimclr.loaders import DataError
from fastsimclr.loaders.whole import whole_file
from fastsimclr.runs import checkpoint
from fastsimclr.runs.log import logger
from fastsimclr.runs.stop import StopFlag, Stopped
from fastsimclr.runs.text import write_text
from fastsimclr.runtime.device import choose_runtime
from fastsimclr.runtime.environment import environment

LOG_EVERY_STEPS = 20
T = TypeVar("T")
Item = tuple[Tensor, Any]
"""An image, float32 [3, H, W] in [0, 1], and what is to be learnt of it."""


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Which encoder, which images, and how to fine-tune. Raises ValueError where a value breaks its rule."""

    run: str
    """Run folder of a stage that trains, or a checkpoint in one."""
    images: str
    """Folder of the images."""
    out: str
    """Folder for checkpoint.pt and result.json."""
    init: Init = "run"
    """run: the run's weights. random: the same architecture from scratch, the baseline to compare with; give both the
    same --norm then."""
    norm: Norm = "auto"
    """BatchNorm of the encoder. frozen: statistics, scale and shift stay. batch: trained. auto: frozen with --init run,
    batch with --init random, whose statistics mean nothing."""
    epochs: int = 12
    """Passes over the training images."""
    batch: int = 16
    """Images of a step."""
    lr: float = 0.02
    """Learning rate for 16 images; scaled by batch / 16 (arXiv 1706.02677)."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 1e-4
    """Of SGD, on all parameters."""
    val_fraction: float = 0.1
    """Part of the images held out for validation, where no validation images are given."""
    seed: int = 0
    """Of the split, the order, the draws and the new layers' weights."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    workers: int = 2
    """Threads that read images."""
    checkpoint_steps: int = 500
    """Steps from one checkpoint to the next."""
    resume: Literal["never", "auto"] = "never"
    """auto: go on from the checkpoint in --out, if there is one."""

    def __post_init__(self) -> None:
        for key, least in (("epochs", 1), ("batch", 1), ("checkpoint_steps", 1), ("workers", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"--{key}={getattr(self, key)} must be {least} or more")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"--val_fraction={self.val_fraction} must lie between 0 and 1; use 0.1")
        if self.lr <= 0:
            raise ValueError(f"--lr={self.lr} must be above 0; use the default")


class Task(Protocol):
    """What differs between detection and segmentation."""

    @property
    def network(self) -> nn.Module:
        """Its network, new layers freshly drawn."""

    @property
    def train(self) -> Sequence[Any]:
        """The training images."""

    def item(self, index: int, generator: torch.Generator) -> Item:
        """Training image `index`, with draws from `generator`."""

    def loss(self, items: Sequence[Item]) -> Tensor:
        """The loss of a batch, its tensors on the device."""

    def rate(self, step: int, total: int) -> float:
        """The learning rate of a step as a part of the highest."""

    def evaluate(self, device: torch.device, out: Path) -> dict[str, float]:
        """Metrics on the validation images; files beside them go to `out`."""

    def facts(self) -> dict[str, Any]:
        """Counts of the data, for result.json."""


def fit(name: str, task: Task, config: FitConfig) -> dict[str, Any]:
    """Train `task`, write out/result.json and return it. Stopped after a signal: the checkpoint is then of that step.

    FileExistsError for a checkpoint that is there and not asked for, and where config.out is the folder of another
    command; ValueError for a checkpoint that was made with other settings; ArithmeticError where the loss is no number.
    """
    started = time.monotonic()
    out = Path(config.out)
    others = [name for name in ("recipe.yaml", "checkpoints", "result.json") if (out / name).exists()]
    if others and not (out / "checkpoint.pt").exists():
        raise FileExistsError(f"{out} holds {others[0]}, but no checkpoint.pt to go on from; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    runtime = choose_runtime(config.device, "fp32", False)
    network = task.network.to(runtime.device).train()
    optimizer = torch.optim.SGD(
        [value for value in network.parameters() if value.requires_grad],
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    if config.batch > len(task.train):
        raise ValueError(f"--batch={config.batch}, but there are {len(task.train)} training images; use fewer")
    total = config.epochs * (len(task.train) // config.batch)
    first, seconds, last = _resume(out, config, network, optimizer)
    started -= seconds
    losses: list[Tensor] = []
    with StopFlag() as stop:
        for step, items in enumerate(_batches(task, config, first, total), first):
            # torchvision's samplers of boxes draw from the global generator.
            torch.manual_seed(_mixed(config.seed, step))
            for group in optimizer.param_groups:
                group["lr"] = config.lr * config.batch / 16 * task.rate(step, total)
            loss = task.loss([(image.to(runtime.device), _moved(target, runtime.device)) for image, target in items])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.detach())
            done = step + 1
            stopped = stop.signum is not None and done < total
            if done % LOG_EVERY_STEPS == 0 or done % config.checkpoint_steps == 0 or done == total or stopped:
                last = _report(losses, done, total)
            if done % config.checkpoint_steps == 0 or done == total or stopped:
                progress = {"step": done, "seconds": time.monotonic() - started, "loss": last}
                _save(out, config, progress, network, optimizer)
            if stopped:
                assert stop.signum is not None
                raise Stopped(stop.signum, f"stopped: {out / 'checkpoint.pt'} is of step {done} of {total}")
    metrics = task.evaluate(runtime.device, out)
    result = {
        "stage": name,
        "metrics": metrics,
        "training": {"steps": total, "loss": last},
        "seconds": round(time.monotonic() - started, 2),
        "data": task.facts(),
        "settings": asdict(config),
        "environment": environment(runtime) | {"torchvision": _torchvision()},
    }
    write_text(out / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def read_image(path: Path) -> Tensor:
    """float32 [3, H, W] in [0, 1], as stored: EXIF does not turn it. DataError naming a file that is no image."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{path} cannot be read as an image ({error}); repair it or take it out") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def split(everything: Sequence[T], fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """(training, validation), at least one each, in the given order; the same for a seed."""
    count = min(len(everything) - 1, max(1, round(fraction * len(everything))))
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed)).tolist()
    held = set(order[: max(0, count)])
    return (
        [item for index, item in enumerate(everything) if index not in held],
        [item for index, item in enumerate(everything) if index in held],
    )


def _batches(task: Task, config: FitConfig, first: int, total: int) -> Iterator[list[Item]]:
    """The batches of steps `first` to `total`, read ahead by threads: decoding lets go of Python's lock."""
    each = len(task.train) // config.batch
    ahead = 1 + -(-config.workers // config.batch)

    @lru_cache(maxsize=1)
    def order(epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(_mixed(config.seed, epoch))
        indices: list[int] = torch.randperm(len(task.train), generator=generator).tolist()
        return indices

    def item(step: int, index: int) -> Item:
        return task.item(index, torch.Generator().manual_seed(_mixed(config.seed, step, index)))

    pool = ThreadPoolExecutor(config.workers)
    waiting: deque[list[Future[Item]]] = deque()
    try:
        for step in range(first, total + ahead):
            if step < total:
                epoch, position = divmod(step, each)
                chosen = order(epoch)[position * config.batch :][: config.batch]
                waiting.append([pool.submit(item, step, index) for index in chosen])
            if step >= first + ahead:
                yield [read.result() for read in waiting.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)


def _mixed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _moved(target: Any, device: torch.device) -> Any:
    if isinstance(target, dict):
        return {key: value.to(device) for key, value in target.items()}
    return target.to(device)


def _report(losses: list[Tensor], done: int, total: int) -> float:
    """Log the mean of the losses since the last report, forget them, and return the last one."""
    values = torch.stack(losses)
    if not bool(values.isfinite().all()):
        raise ArithmeticError(f"the loss is no finite number at or before step {done}; use a lower --lr")
    logger.info("step %d of %d: loss %.4f", done, total, values.mean().item())
    losses.clear()
    return values[-1].item()


def _torchvision() -> str:
    import torchvision

    return str(torchvision.__version__)


_FREE = ("out", "device", "workers", "checkpoint_steps", "resume")  # may differ between a run and its resumption


def _kept(config: FitConfig) -> dict[str, Any]:
    return {key: value for key, value in asdict(config).items() if key not in _FREE}


def _save(
    out: Path, config: FitConfig, progress: dict[str, Any], network: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """progress: the steps done, the seconds they took and the last loss."""
    state = progress | {"settings": _kept(config), "network": network.state_dict()}
    with whole_file(out / "checkpoint.pt") as file:
        torch.save(state | {"optimizer": optimizer.state_dict()}, file)


def _resume(
    out: Path, config: FitConfig, network: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, float, float | None]:
    """Steps done, seconds they took, and the last loss."""
    path = out / "checkpoint.pt"
    if not path.is_file():
        return 0, 0.0, None
    if config.resume == "never":
        raise FileExistsError(f"{path} exists; give --resume auto to go on, or another --out")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        made, step, seconds, loss = (state[key] for key in ("settings", "step", "seconds", "loss"))
    except Exception as error:  # damaged bytes can raise anything
        raise checkpoint.CheckpointError(f"{path} cannot be read ({error}); delete it to begin anew") from error
    now = _kept(config)
    if other := [f"--{key} {made.get(key)} -> {now[key]}" for key in now if made.get(key) != now[key]]:
        raise ValueError(f"{path} was made with other settings: {', '.join(other)}; give those, or another --out")
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    logger.info("going on from step %d", step)
    return step, seconds, loss
