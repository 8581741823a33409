"""What a step may be set to: micro-batches, checkpointed activations, a compiled encoder, sizes that grow."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import gc
import math
import resource
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsimclr.methods import Contrastive
from fastsimclr.methods.config import PretrainConfig
from fastsimclr.models import BatchNorm, ModelConfig, ResNet, build_simclr, statistics_of
from fastsimclr.optim import OptimConfig
from fastsimclr.runs.checkpoint import CheckpointError
from fastsimclr.runtime.device import Runtime
from fastsimclr.runtime.malloc import freed_memory_kept
from fastsimclr.training.config import TrainerConfig
from fastsimclr.training.gradient_cache import BUCKET_BYTES, _buckets, backward_in_micro_batches
from fastsimclr.training.trainer import Trainer, TrainingJob
from tests.methods.test_memory import memory_job
from tests.training.test_trainer import BATCH, CPU, TOTAL, At, different, final, fit, job


def gradients(objective: Contrastive, images: Tensor, micro: int | None) -> list[Tensor]:
    objective.zero_grad(set_to_none=True)
    labels = torch.full((len(images) // 2,), -1)
    if micro is None:
        objective(images, labels).loss.backward()
    else:
        backward_in_micro_batches(objective, images, labels, micro, lambda loss: loss)
    return [p.grad.clone() for p in objective.parameters() if p.grad is not None]


def contrastive() -> Contrastive:
    torch.manual_seed(0)
    config = ModelConfig(arch="resnet18", width=0.125, head_layers=2, head_dim=8, zero_gamma=False)
    return Contrastive(build_simclr(config, 8), temperature=0.2, scaling="paper").double()


def far(found: list[Tensor], expected: list[Tensor]) -> float:
    """Norm of the difference, relative."""
    one, other = (torch.cat([g.flatten() for g in side]) for side in (found, expected))
    return float((one - other).norm() / other.norm())


def test_gradients_are_exact_where_bn_allows() -> None:
    """With BN in evaluation mode the images meet in the loss alone; in training mode the difference is BN's."""
    objective, images = contrastive(), torch.randn(32, 3, 8, 8, dtype=torch.float64)
    objective(images, torch.zeros(16))  # running statistics of something
    objective.eval()
    whole = gradients(objective, images, None)
    for micro in (1, 2, 8, 16):
        assert far(gradients(objective, images, micro), whole) < 1e-12
    objective.train()
    whole = gradients(objective, images, None)
    assert far(gradients(objective, images, 16), whole) < 1e-12
    assert far(gradients(objective, images, 8), whole) > 0.05, "BN over half of the batch is another function"


def test_running_statistics_follow_the_mean_of_the_parts() -> None:
    whole, parts, untouched = BatchNorm(3), BatchNorm(3), BatchNorm(3)
    x = torch.randn(12, 3, 4, 4)
    means = x.view(4, 3, 3, 4, 4).mean((1, 3, 4))
    for k in range(4):
        with statistics_of(k, 4):
            parts(x[3 * k : 3 * k + 3])
    whole(x)
    assert whole.running_mean is not None and parts.running_mean is not None
    torch.testing.assert_close(parts.running_mean, 0.1 * means.mean(0))
    torch.testing.assert_close(parts.running_mean, whole.running_mean)
    assert parts.num_batches_tracked == whole.num_batches_tracked == 1
    before = {key: value.clone() for key, value in untouched.state_dict().items()}
    with statistics_of(None):
        untouched(x)
    assert all(torch.equal(value, before[key]) for key, value in untouched.state_dict().items())


def test_buckets_hold_every_gradient_once() -> None:
    small = [torch.zeros(5), torch.zeros(7), torch.zeros(3, dtype=torch.float64), torch.zeros(2)]
    assert [len(bucket) for bucket in _buckets(small)] == [2, 1, 1]
    large = [torch.empty(BUCKET_BYTES // 4 - 2, device="meta"), torch.empty(2, device="meta")]
    assert [len(bucket) for bucket in _buckets([*large, *large])] == [2, 2]
    assert [len(bucket) for bucket in _buckets([large[0], large[0], large[1]])] == [1, 2]


@pytest.mark.slow  # one kind of it, with a memory: tests/methods/test_memory.py
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_in_micro_batches_resumes_to_the_bit(tmp_path: Path, precision: str) -> None:
    runtime = Runtime(device=torch.device("cpu"), precision=precision)  # type: ignore[arg-type]
    fit(job(tmp_path / "whole"), runtime, micro_batch=2)
    half = tmp_path / "half"
    with pytest.raises(KeyboardInterrupt):
        fit(job(half, hooks=(At(6, interrupt),)), runtime, micro_batch=2)
    fit(job(half, resume=True), runtime, micro_batch=2)
    assert different(final(half)["objective"], final(tmp_path / "whole")["objective"], "objective") == []


def test_a_resume_with_another_micro_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(job(tmp_path, hooks=(At(2, interrupt),)), micro_batch=2, checkpoint_every_steps=1)
    with pytest.raises(CheckpointError, match="micro_batch=2, this run has micro_batch=4"):
        fit(job(tmp_path, resume=True), micro_batch=4)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_settings_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"micro_batch=3 does not divide the 8 images .* pretrain.batch=8; use a divisor"
    ):
        fit(job(tmp_path), micro_batch=3)
    config = TrainerConfig(micro_batch=9)
    assert Trainer(config, CPU, job(tmp_path / "few")).micro is None, "no more images than that: all at once"
    config = TrainerConfig(micro_batch=5)
    assert Trainer(config, CPU, job(tmp_path / "some", kind="supervised")).micro == 4, "the largest divisor"
    with pytest.raises(ValueError, match=r"compile=True and trainer.checkpoint_activations=True exclude each other"):
        TrainerConfig(compile=True, checkpoint_activations=True)
    for key in ("compile", "cuda_graph"):
        with pytest.raises(ValueError, match=rf"trainer.{key}=True is for a whole batch at once"):
            TrainerConfig(micro_batch=4, **{key: True})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cuda_graph=True is for CUDA devices, not cpu"):
        fit(job(tmp_path), cuda_graph=True)
    for sizes in (((0.5, 16), (0.5, 32)), ((0.5, 16), (0.2, 32)), ((1.0, 16),), ((-0.1, 16),), ((0.1, 0),)):
        with pytest.raises(ValueError, match=r"pretrain.sizes=\[\[.* must be pairs of a share"):
            PretrainConfig(sizes=sizes)


def made(run: Path, kind: str) -> TrainingJob:
    """The tiny job of a kind; memory: pretraining with a queue that wraps."""
    return memory_job(run) if kind == "memory" else job(run, kind=kind)


@pytest.mark.parametrize(
    "kind", ["supervised", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("pretrain", "memory"))]
)
def test_checkpointed_activations_change_no_bit(tmp_path: Path, kind: str) -> None:
    """Weights, momentum and BN's running statistics after nine steps; queue and momentum copy."""
    fit(made(tmp_path / "kept", kind))
    again = made(tmp_path / "again", kind)
    seen = blocks_run(again)
    fit(again, checkpoint_activations=True)
    copied = seen.pop("momentum_network.encoder", None)
    assert copied == (TOTAL if kind == "memory" else None), "the copy has no way back"
    assert list(seen.values()) == [2 * TOTAL], "each block runs once forward, and once more going back"
    for key in ("objective", "optimizer"):
        assert different(final(tmp_path / "again")[key], final(tmp_path / "kept")[key], key) == []


def blocks_run(given: TrainingJob) -> Counter[str]:
    """How often a block runs, by encoder."""
    seen: Counter[str] = Counter()
    for name, module in given.objective.named_modules():
        if isinstance(module, ResNet):
            module.layer2[0].register_forward_pre_hook(lambda *_, name=name: seen.update([name]))
    return seen


def test_compile_reaches_the_encoder_and_its_momentum_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[ResNet] = []
    monkeypatch.setattr(ResNet, "compile", lambda module: compiled.append(module))
    given = memory_job(tmp_path)
    fit(given, compile=True)
    assert compiled == [module for module in given.objective.modules() if isinstance(module, ResNet)]
    assert len(compiled) == 2


@pytest.mark.slow
def test_a_compiled_encoder_and_its_momentum_copy_train_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a small rate, as training amplifies rounding; traced and split as always, without a minute of C++."""
    monkeypatch.setattr(ResNet, "compile", functools.partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    optim = OptimConfig(lr=0.05, warmup_epochs=0)
    plain = fit(memory_job(tmp_path / "plain", optim=optim))
    compiled = fit(memory_job(tmp_path / "compiled", optim=optim), compile=True)
    assert compiled.last["loss"] == pytest.approx(plain.last["loss"], rel=1e-4)
    for key, value in final(tmp_path / "plain")["objective"].items():
        torch.testing.assert_close(final(tmp_path / "compiled")["objective"][key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_views_grow_as_the_schedule_says(tmp_path: Path) -> None:
    sizes: list[int] = []

    def watched(run: Path, **changes: Any) -> TrainingJob:
        given = job(run, sizes=((0.0, 4), (0.3, 6), (0.7, 8)), **changes)
        given.objective.register_forward_pre_hook(lambda _m, inputs: sizes.append(inputs[0].shape[-1]))
        return given

    fit(watched(tmp_path / "whole"))
    expected = [4, 4, 4, 6, 6, 6, 6, 8, 8]
    assert sizes == expected and len(sizes) == TOTAL
    sizes.clear()
    with pytest.raises(KeyboardInterrupt):
        fit(watched(tmp_path / "half", hooks=(At(5, interrupt),)))
    fit(watched(tmp_path / "half", resume=True))
    assert sizes == expected[:5] + expected[4:], "the checkpoint is of step 4"
    assert different(final(tmp_path / "half")["objective"], final(tmp_path / "whole")["objective"], "objective") == []
    with pytest.raises(CheckpointError, match=r"sizes=\[\[0.0, 4\], .*this run has sizes=\[\]"):
        fit(job(tmp_path / "half", resume=True))


def test_a_schedule_of_sizes_that_begins_late() -> None:
    given = job(Path("unused"), sizes=((0.5, 16),))
    assert [(stop, policy.size) for stop, policy in given.spans(0)] == [(5, 8), (TOTAL, 16)]
    assert [(stop, policy.size) for stop, policy in given.spans(5)] == [(TOTAL, 16)]
    assert [(stop, policy.size) for stop, policy in dataclasses.replace(given, sizes=()).spans(3)] == [(TOTAL, 8)]


@pytest.mark.parametrize("micro", [None, BATCH // 2])
def test_a_loss_that_is_no_number_stops_before_the_update(tmp_path: Path, micro: int | None) -> None:
    given = job(tmp_path)

    def poison() -> None:
        with torch.no_grad():
            next(given.objective.parameters()).fill_(math.nan)

    given = dataclasses.replace(given, hooks=(At(2, poison),))
    with pytest.raises(
        FloatingPointError, match=r"pretrain: the loss became nan or infinite by step 3 \(learning rate"
    ):
        fit(given, log_every_steps=9, micro_batch=micro)
    momentum = [state["momentum"] for state in given.optimizer.state.values()]
    assert momentum and all(torch.isfinite(one).all() for one in momentum)


def test_other_errors_pass_through(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("out of something")

    with pytest.raises(RuntimeError, match=r"^out of something$"):
        fit(job(tmp_path, hooks=(At(2, fail),)))


def test_garbage_waits_for_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []
    monkeypatch.setattr(gc, "get_freeze_count", gc.get_freeze_count.__wrapped__)
    gc.unfreeze()  # of conftest.py
    try:
        fit(job(tmp_path, hooks=(At(3, lambda: seen.append((gc.isenabled(), gc.get_freeze_count() > 0))),)))
        assert seen == [(False, True)] and gc.isenabled() and gc.get_freeze_count() == 0
    finally:
        gc.freeze()


@pytest.fixture
def small_pages() -> Iterator[None]:
    """Pages of 4 KiB only: where the kernel takes huge ones, as it sees fit, faults cannot be counted on."""
    pr_set_thp_disable = 41
    ctypes.CDLL(None).prctl(pr_set_thp_disable, 1, 0, 0, 0)
    yield
    ctypes.CDLL(None).prctl(pr_set_thp_disable, 0, 0, 0, 0)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_freed_memory_is_kept_within_the_loop_only(tmp_path: Path, small_pages: None) -> None:
    """By page faults: 48 MiB, freed and taken again five times."""

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(5):
            torch.ones(12 * 2**20)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    libc = ctypes.CDLL(None)
    if not libc.mallopt(-3, 2**30):
        pytest.skip("glibc before 2.35 keeps blocks of up to 32 MiB only")
    libc.mallopt(-3, 2**25)
    libc.malloc_trim(0)
    usual, within = faults(), list[int]()
    fit(job(tmp_path, hooks=(At(2, faults), At(3, faults), At(4, lambda: within.append(faults())))))
    assert within[0] < usual / 10
    assert faults() > usual / 6, "given back: one of the five comes anew"


@pytest.mark.parametrize(("device", "calls"), [("cpu", 4), ("meta", 0)])
def test_memory_is_kept_on_a_cpu_only(device: str, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = list[tuple[int, int]]()

    class Libc:
        def mallopt(self, parameter: int, value: int) -> int:
            settings.append((parameter, value))
            return 1

        def malloc_trim(self, pad: int) -> int:
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Libc())
    with freed_memory_kept(torch.device(device)):
        assert len(settings) == calls / 2
    assert len(settings) == calls
