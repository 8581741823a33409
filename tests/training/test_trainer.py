"""The training loop: exact resumes, clean stops, no host sync in a step, records at their steps."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastsimclr.loaders import ArraySource, Crops, DataConfig, Policy, TrainLoader
from fastsimclr.methods import Contrastive, CrossEntropy, Objective
from fastsimclr.models import ModelConfig, build_classifier, build_simclr
from fastsimclr.optim import OptimConfig, Schedule, build_optimizer
from fastsimclr.runs import checkpoint
from fastsimclr.runs.checkpoint import CheckpointError
from fastsimclr.runs.log import read_records
from fastsimclr.runs.stop import StopFlag, Stopped
from fastsimclr.runtime.device import Runtime
from fastsimclr.training.config import TrainerConfig
from fastsimclr.training.feed import ship
from fastsimclr.training.hooks import Hook
from fastsimclr.training.meter import Meter
from fastsimclr.training.trainer import Trainer, TrainingJob

CPU = Runtime(device=torch.device("cpu"), precision="fp32")
TINY = ModelConfig(arch="resnet18", width=0.125, head_layers=1, head_dim=8)
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 12, 12, 3), dtype=np.uint8)
SOURCE = ArraySource("noise", PIXELS, np.arange(40) % 4, tuple("abcd"))
TOTAL, BATCH = 9, 8


def job(
    run: Path,
    *,
    kind: str = "pretrain",
    resume: bool = False,
    hooks: tuple[Hook, ...] = (),
    optim: OptimConfig | None = None,
    threads: int = 1,
    **changes: Any,
) -> TrainingJob:
    """A tiny job of nine steps; `changes` are fields of TrainingJob."""
    torch.manual_seed(0)
    objective: Objective
    if kind == "pretrain":
        objective = Contrastive(build_simclr(TINY, 8), temperature=0.2, scaling="paper")
    else:
        objective = CrossEntropy(build_classifier(TINY, 8, 4, init="normal"))
    optim = optim or OptimConfig(lr=2.0, warmup_epochs=0)
    data = DataConfig(loader="native", threads=threads)
    given = TrainingJob(
        stage=kind,
        run=run,
        objective=objective,
        optimizer=build_optimizer(optim, objective, global_batch=BATCH, heads=objective.supervised_heads()),
        schedule=Schedule(peak=optim.peak_lr(BATCH), warmup_steps=2, total_steps=TOTAL),
        batches=lambda start, stop, crops: TrainLoader(
            SOURCE, data, batch=BATCH, seed=0, start=start, stop=stop, crops=crops
        ),
        policy=Policy(size=8),
        batch=BATCH,
        seed=0,
        fingerprint=SOURCE.fingerprint,
        recipe="seed: 0\n",
        metadata={"model": dataclasses.asdict(TINY)},
        resume=resume,
        hooks=hooks,
    )
    return dataclasses.replace(given, **changes)


def fit(given: TrainingJob, runtime: Runtime = CPU, **config: Any) -> Trainer:
    settings = {"log_every_steps": 2, "checkpoint_every_steps": 4, "keep_checkpoints": 9, **config}
    trainer = Trainer(TrainerConfig(**settings), runtime, given)
    trainer.fit()
    return trainer


class At:
    """A hook that acts after one step."""

    kind = "at"

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.step, self.act = step, act

    def due(self, step: int) -> bool:
        return step == self.step

    def __call__(self, step: int) -> None:
        self.act()


def final(run: Path) -> dict[str, Any]:
    return checkpoint.load(checkpoint.newest(run))


def different(left: Any, right: Any, where: str) -> list[str]:
    """Where two nested values differ in any bit or type."""
    if type(left) is not type(right):
        return [where]
    if isinstance(left, dict) and left.keys() == right.keys():
        return [name for key in left for name in different(left[key], right[key], f"{where}.{key}")]
    if isinstance(left, list) and len(left) == len(right):
        return [
            name for i, (a, b) in enumerate(zip(left, right, strict=True)) for name in different(a, b, f"{where}.{i}")
        ]
    if isinstance(left, torch.Tensor):
        same = left.dtype == right.dtype and left.stride() == right.stride() and torch.equal(left, right)
        return [] if same else [where]
    return [] if left == right else [where]


def assert_bitwise_equal(left: dict[str, Any], right: dict[str, Any]) -> None:
    """Everything that decides the next step is the same in every bit."""
    for part in ("objective", "optimizer", "scaler", "rng", "step"):
        assert different(left[part], right[part], part) == []
    assert left["optimizer"]["state"], "the optimizer's momentum is part of the state"


def steps(run: Path, kind: str = "train") -> list[int]:
    return [record["step"] for record in read_records(run / "metrics.jsonl") if record["kind"] == kind]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `fit(job(run))`, to the end."""
    run = tmp_path_factory.mktemp("finished") / "run"
    fit(job(run))
    return run


@pytest.fixture(scope="module")
def each_step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a record of each step."""
    run = tmp_path_factory.mktemp("each") / "run"
    fit(job(run), log_every_steps=1)
    return run


@pytest.mark.parametrize(
    ("kind", "optimizer", "signum"),
    [
        ("pretrain", "lars", signal.SIGTERM),
        ("supervised", "sgd", signal.SIGINT),
        pytest.param("pretrain", "sgd", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("supervised", "lars", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_stopped_and_resumed_is_left_alone(tmp_path: Path, kind: str, optimizer: str, signum: int) -> None:
    optim = OptimConfig(name=optimizer, lr=0.5, warmup_epochs=0)  # type: ignore[arg-type]
    fit(job(tmp_path / "alone", kind=kind, optim=optim))
    run = tmp_path / "stopped"
    with pytest.raises(Stopped, match=r"stopped at step 4 of 9, state saved in .*step-00000004\.pt") as info:
        fit(job(run, kind=kind, optim=optim, hooks=(At(3, lambda: os.kill(os.getpid(), signum)),)))
    assert info.value.exit_code == 128 + signum
    assert [path.name for path in checkpoint.saved(run)] == ["step-00000004.pt"]
    fit(job(run, kind=kind, optim=optim, resume=True))
    assert_bitwise_equal(final(tmp_path / "alone"), final(run))
    assert steps(run) == steps(tmp_path / "alone") == [2, 4, 6, 8, 9]


def test_a_signal_at_the_last_step_is_not_lost(tmp_path: Path) -> None:
    for moment in (TOTAL - 1, TOTAL):  # before the last step, and after it while a hook runs
        run = tmp_path / str(moment)
        with pytest.raises(Stopped, match="stopped at step 9 of 9"):
            fit(job(run, hooks=(At(moment, lambda: os.kill(os.getpid(), signal.SIGTERM)),)))
        assert checkpoint.newest(run).name == "step-00000009.pt"
        assert fit(job(run, resume=True)).last == final(run)["last"]


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(job(tmp_path, hooks=(At(2, twice),)))
    assert checkpoint.saved(tmp_path) == []
    assert signal.getsignal(signal.SIGINT) is before


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    with StopFlag() as flag:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert flag.signum == signal.SIGTERM
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("crash_at", [1, 5, *(pytest.param(step, marks=pytest.mark.slow) for step in (4, 7))])
def test_a_crash_costs_only_the_steps_since_the_last_checkpoint(each_step: Path, tmp_path: Path, crash_at: int) -> None:
    def crash() -> None:
        raise MemoryError("as if")

    run = tmp_path / "crashed"
    with pytest.raises(MemoryError):
        fit(job(run, hooks=(At(crash_at, crash),)), log_every_steps=1)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # the line that was being written
    fit(job(run, resume=True), log_every_steps=1)
    assert_bitwise_equal(final(each_step), final(run))
    assert steps(run) == list(range(1, TOTAL + 1))

    def losses(run: Path) -> list[float]:
        return [record["loss"] for record in read_records(run / "metrics.jsonl")]

    assert losses(run) == losses(each_step)


def test_the_number_of_loader_threads_changes_nothing(finished: Path, tmp_path: Path) -> None:
    fit(job(tmp_path, threads=3))
    assert_bitwise_equal(final(finished), final(tmp_path))


def test_probes_change_nothing_in_the_training(finished: Path, tmp_path: Path) -> None:
    given = job(tmp_path)

    class Probe:
        kind = "probe"

        def due(self, step: int) -> bool:
            return step % 3 == 0

        def __call__(self, step: int) -> dict[str, float]:
            given.objective.eval()
            return {"value": float(step)}

    fit(dataclasses.replace(given, hooks=(Probe(),)))
    assert steps(tmp_path, "probe") == [3, 6, 9]
    # An objective left in evaluation mode would no longer update its BN statistics.
    assert_bitwise_equal(final(finished), final(tmp_path))


def test_records_are_means_since_the_last_one(each_step: Path, tmp_path: Path) -> None:
    fit(job(tmp_path), log_every_steps=3, checkpoint_every_steps=100)
    each, three = (read_records(run / "metrics.jsonl") for run in (each_step, tmp_path))
    assert [record["step"] for record in three] == [3, 6, 9]
    for k, record in enumerate(three):
        for key in ("loss", "contrastive_top1"):
            assert record[key] == pytest.approx(sum(r[key] for r in each[3 * k : 3 * k + 3]) / 3, rel=1e-5)
    schedule = job(tmp_path).schedule
    assert [record["learning_rate"] for record in each] == [schedule(step) for step in range(TOTAL)]
    for record in each + three:
        assert record["images_per_s"] > 0
        assert 0 <= record["data_wait_pct"] <= 100
    trained = [record["trained_s"] for record in each]
    assert trained == sorted(trained)


class Syncs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes each op that makes the host wait for the device."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2", "equal")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[str] = []
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        self.seen += 1
        masked = name in ("index", "index_put_", "index_put") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in self.WAITING or masked:
            self.ops.append(name)
        return func(*args, **(kwargs or {}))


def one_step(given: TrainingJob, runtime: Runtime) -> Callable[[], None]:
    """A train step ready to run, its batch on the device and its optimizer warmed up."""
    trainer = Trainer(TrainerConfig(), runtime, given)
    runtime.to_device(given.objective.train())
    crops = Crops(policy=given.policy, seed=0, views=given.objective.views)
    (batch,) = given.batches(0, 1, crops)
    shipment = ship(batch, crops, runtime)
    meter, step = Meter(runtime), trainer._step_of()
    trainer._train_step(step, shipment, 0.1, meter)
    return lambda: trainer._train_step(step, shipment, 0.1, meter)


@pytest.mark.parametrize("kind", ["pretrain", "supervised"])
@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_a_step_never_waits_for_the_device(tmp_path: Path, kind: str, optimizer: str) -> None:
    every_op = Policy(size=24, rotate=15, solarise=0.5, rotate90=0.5, sobel=0.5, noise=0.5, cutout=0.5)
    optim = OptimConfig(name=optimizer, lr=0.5, warmup_epochs=0)  # type: ignore[arg-type]
    step = one_step(job(tmp_path, kind=kind, optim=optim, policy=every_op), CPU)
    with Syncs() as syncs:
        step()
    assert syncs.ops == []
    assert syncs.seen > 200  # views, loss and LARS are one operator each here; their own tests look inside


def test_the_check_for_waiting_can_fail() -> None:
    with Syncs() as syncs:
        torch.ones(3).sum().item()
        _ = torch.ones(3)[torch.tensor([True, False, True])]
    assert syncs.ops == ["_local_scalar_dense", "index"]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("kind", ["pretrain", "supervised"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_never_waits_for_the_gpu(tmp_path: Path, kind: str, precision: str) -> None:
    runtime = Runtime(device=torch.device("cuda"), precision=precision)  # type: ignore[arg-type]
    given = job(tmp_path, kind=kind, policy=Policy(size=24, rotate=15, solarise=0.5))
    step = one_step(given, runtime)
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_and_resumes_exactly(tmp_path: Path, precision: str) -> None:
    runtime = Runtime(device=torch.device("cpu"), precision=precision)  # type: ignore[arg-type]
    fit(job(tmp_path / "alone"), runtime)
    with pytest.raises(Stopped):
        fit(job(tmp_path / "run", hooks=(At(4, lambda: os.kill(os.getpid(), signal.SIGTERM)),)), runtime)
    fit(job(tmp_path / "run", resume=True), runtime)
    left, right = final(tmp_path / "alone"), final(tmp_path / "run")
    assert_bitwise_equal(left, right)
    assert bool(left["scaler"]) == (precision == "fp16")
    assert all(value.dtype in (torch.float32, torch.int64) for value in left["objective"].values())


def test_a_resume_across_the_loss_scaler_is_refused(finished: Path) -> None:
    with pytest.raises(CheckpointError, match="fp16_scaler=False, this run has fp16_scaler=True"):
        fit(job(finished, resume=True), Runtime(device=torch.device("cpu"), precision="fp16"))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_loss_that_is_no_number_stops_without_a_checkpoint(tmp_path: Path, precision: str) -> None:
    """Also with the scaler, which leaves such steps out one by one."""
    given = job(tmp_path)

    def poison() -> None:
        with torch.no_grad():
            next(given.objective.parameters()).fill_(math.nan)

    with pytest.raises(
        FloatingPointError, match=r"pretrain: the loss became nan( or infinite)? by step 6 .*Lower the learning rate"
    ):
        runtime = Runtime(device=torch.device("cpu"), precision=precision)  # type: ignore[arg-type]
        fit(dataclasses.replace(given, hooks=(At(5, poison),)), runtime, checkpoint_every_steps=2)
    assert [path.name for path in checkpoint.saved(tmp_path)] == ["step-00000002.pt", "step-00000004.pt"]
    assert steps(tmp_path) == [2, 4]


def test_weights_that_the_last_update_broke_are_not_saved(tmp_path: Path) -> None:
    optim = OptimConfig(name="sgd", lr=1e38, warmup_epochs=0, momentum=0.0)
    schedule = Schedule(peak=3e38, warmup_steps=0, total_steps=1)
    with pytest.raises(FloatingPointError, match="by step 1"):
        fit(job(tmp_path, kind="supervised", optim=optim, schedule=schedule))
    assert checkpoint.saved(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "key", "old", "new"),
    [
        ({"fingerprint": "other"}, "fingerprint", repr(SOURCE.fingerprint), "'other'"),
        ({"stage": "linear"}, "stage", "'pretrain'", "'linear'"),
        ({"batch": 16}, "batch", "8", "16"),
        ({"metadata": {"seed": 1}}, "seed", "None", "1"),
        ({"metadata": {"model": {"arch": "resnet34"}}}, "model", "resnet18", "resnet34"),
        ({"schedule": Schedule(peak=1, warmup_steps=0, total_steps=12)}, "total_steps", "9", "12"),
    ],
)
def test_a_resume_of_something_else_is_refused(
    finished: Path, changes: dict[str, Any], key: str, old: str, new: str
) -> None:
    before = (finished / "recipe.yaml").read_text()
    with pytest.raises(CheckpointError) as info:
        fit(job(finished, resume=True, recipe="seed: 1\n", **changes))
    text = str(info.value)
    assert text.count(f"{key}=") == 2 and old in text and new in text and "step-00000009.pt" in text
    assert (finished / "recipe.yaml").read_text() == before


def test_weights_of_another_shape_are_refused_by_name(finished: Path) -> None:
    other = Contrastive(build_simclr(dataclasses.replace(TINY, width=0.25), 8), temperature=0.2, scaling="paper")
    with pytest.raises(ValueError, match=r"step-00000009\.pt does not fit the model: .* of another shape"):
        fit(job(finished, resume=True, objective=other))


def test_a_folder_with_a_run_is_not_overwritten(finished: Path) -> None:
    before = checkpoint.newest(finished).read_bytes()
    with pytest.raises(FileExistsError, match=r"already holds step-00000009\.pt; give --resume auto"):
        fit(job(finished))
    assert checkpoint.newest(finished).read_bytes() == before


def test_changed_settings_are_told_and_hold(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Stopped):
        fit(job(tmp_path, hooks=(At(4, lambda: os.kill(os.getpid(), signal.SIGTERM)),)))
    caplog.set_level("INFO", logger="fastsimclr")
    again = fit(
        job(tmp_path, resume=True, recipe="seed: 0\ndecay: 2\n", optim=OptimConfig(weight_decay=0.5, warmup_epochs=0))
    )
    assert "decay: None -> 2" in caplog.text
    assert {group["weight_decay"] for group in again.job.optimizer.param_groups} == {0.5}


def test_a_metrics_file_damaged_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not JSON"):
        fit(job(tmp_path))


def test_old_metrics_survive_a_crash_at_the_start_of_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Stopped):
        fit(job(tmp_path, hooks=(At(4, lambda: os.kill(os.getpid(), signal.SIGTERM)),)))
    before = (tmp_path / "metrics.jsonl").read_text()

    def crash(self: Path, text: str) -> int:
        raise MemoryError

    monkeypatch.setattr(Path, "write_text", crash)
    with pytest.raises(MemoryError):
        fit(job(tmp_path, resume=True))
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert json.loads(before.splitlines()[-1])["step"] == 5
