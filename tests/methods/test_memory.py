"""SimCLRv2's memory: queue, momentum encoder and loss against plain loops; on many ranks, in parts, and resumed."""

# N images, D dimensions

from __future__ import annotations

import copy
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastsimclr.cli.main import CONFIGS, main
from fastsimclr.distributed.ranks import Ranks
from fastsimclr.kernels.nt_xent import fused, packing
from fastsimclr.methods import MomentumContrast
from fastsimclr.methods.config import PretrainConfig
from fastsimclr.models import ModelConfig, average_running_statistics, build_simclr
from fastsimclr.optim import OptimConfig, build_optimizer
from fastsimclr.recipe import Recipe, parse_recipe
from fastsimclr.runs import checkpoint
from fastsimclr.runtime.device import Precision, Runtime
from fastsimclr.stages.networks import load_encoder
from fastsimclr.training.config import TrainerConfig
from fastsimclr.training.step import parallel
from fastsimclr.training.trainer import Trainer, TrainingJob
from tests.methods.test_methods_ranks import Pool
from tests.training.test_trainer import (
    BATCH,
    CPU,
    TINY,
    TOTAL,
    At,
    Syncs,
    assert_bitwise_equal,
    final,
    fit,
    job,
    one_step,
)

SIZE, STEPS, TEMPERATURE, MOMENTUM, RATE = 16, 4, 0.2, 0.9, 0.01
LIMIT = 1e-9  # the steps magnify rounding: after six, a run whose images are 1e-15 off ends 1e-10 away
NETWORK = ModelConfig(arch="resnet18", width=0.125, stem="cifar", head_layers=2, head_dim=6, zero_gamma=False)


def momentum_contrast(memory: int, momentum: float = MOMENTUM, model: ModelConfig = NETWORK) -> MomentumContrast:
    torch.manual_seed(3)
    return MomentumContrast(
        build_simclr(model, SIZE), temperature=TEMPERATURE, scaling="paper", memory=memory, momentum=momentum
    )


def views(images: int, step: int) -> Tensor:
    """[2, images, 3, S, S]."""
    generator = torch.Generator().manual_seed(step)
    return torch.rand(2, images, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)


def train(
    ranks: Ranks, memory: int, images: int, groups: int, micro: int | None = None, runs: bool = False
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of the steps and the state at the end, of SGD as the trainer makes it.

    runs: each rank has such images that the micro-batches of all ranks are runs of the global batch.
    """
    objective = momentum_contrast(memory).double().train()
    runtime = Runtime(device=torch.device("cpu"), precision="fp64", ranks=ranks)
    step = parallel(objective, groups=groups, runtime=runtime, timeout_s=60, micro=micro)
    optimizer = torch.optim.SGD(objective.network.parameters(), lr=RATE)
    at_once = micro if runs and micro else images // ranks.world
    own = torch.arange(images).view(-1, ranks.world, at_once)[:, ranks.rank].flatten()
    losses = []
    for index in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        outcome = step(views(images, index)[:, own].flatten(0, 1), torch.full((len(own),), -1), lambda loss: loss)
        optimizer.step()
        objective.updated()
        losses.append(float(ranks.total(outcome.loss.detach().view(1))) / ranks.world)
    average_running_statistics(objective, ranks.group)
    return losses, {key: value.clone() for key, value in objective.state_dict().items()}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, in units of the largest number of its tensor."""
    assert found.keys() == expected.keys()
    errors = [
        float((found[key].double() - value).abs().max() / value.double().abs().max().clamp(min=1e-3))
        for key, value in expected.items()
    ]
    assert all(map(math.isfinite, errors))
    return max(errors)


@pytest.mark.parametrize("memory", [5, 16, 20])
def test_queue_momentum_and_loss_are_plain_loops(memory: int) -> None:
    """Eight keys a step: fewer than a step's, a multiple of them, and one that a step's keys straddle."""
    images = 4
    losses, state = train(Ranks(), memory, images, 1)
    query = momentum_contrast(memory).double().train().network
    follower = copy.deepcopy(query)
    slots: dict[int, Tensor] = {}
    seen = 0
    for index in range(STEPS):
        x = views(images, index).flatten(0, 1)
        q = F.normalize(query(x)[1])
        k = F.normalize(follower(x)[1]).detach()
        loss = torch.zeros((), dtype=torch.float64)
        for i in range(2 * images):
            positive = (i + images) % (2 * images)
            others = [k[j] for j in range(2 * images) if j != i] + list(slots.values())
            total = sum(torch.exp(q[i] @ other / TEMPERATURE) for other in others)
            loss = loss - torch.log(torch.exp(q[i] @ k[positive] / TEMPERATURE) / total) / (2 * images)
        assert losses[index] == pytest.approx(loss.item(), rel=1e-10)
        for p, gradient in zip(query.parameters(), torch.autograd.grad(loss, list(query.parameters())), strict=True):
            p.data -= RATE * gradient
        for p, mine in zip(follower.parameters(), query.parameters(), strict=True):
            p.data = MOMENTUM * p.data + (1 - MOMENTUM) * mine.data
        for key in k:
            slots[seen % memory] = key
            seen += 1
    expected = {f"network.{key}": value for key, value in query.state_dict().items()}
    expected |= {f"momentum_network.{key}": value for key, value in follower.state_dict().items()}
    queue = torch.stack([slots[slot] for slot in range(memory)])
    assert distance(state, {**expected, "queue": queue, "_extra_state": torch.tensor(seen)}) < LIMIT
    moved = [
        key for key in follower.state_dict() if not torch.equal(follower.state_dict()[key], query.state_dict()[key])
    ]
    assert {key.rpartition(".")[2] for key in moved} == {"weight", "bias", "running_mean", "running_var"}


@pytest.mark.parametrize(("world", "groups"), [(2, 2), *(pytest.param(n, 1, marks=pytest.mark.slow) for n in (2, 4))])
def test_ranks_are_one_process(ranks_pool: Pool, world: int, groups: int) -> None:
    """Also with a queue that a step's keys straddle, which is where an order by ranks would show."""
    losses, state = train(Ranks(), 37, 16, groups)
    found = ranks_pool(world, train, 37, 16, groups)
    worst = max(distance(one, state) for _, one in found)
    print(f"{world} ranks, {groups} groups: {worst:.1e}")  # docs/training.md has the largest
    assert worst < LIMIT
    assert found[0][0] == pytest.approx(losses, rel=1e-10)
    for _, other in found[1:]:
        assert torch.equal(other["queue"], found[0][1]["queue"])


@pytest.mark.slow
def test_micro_batches_are_groups_of_one_batch(ranks_pool: Pool) -> None:
    losses, state = train(Ranks(), 37, 16, 4)
    parts, cached = train(Ranks(), 37, 16, 1, micro=4)
    assert parts == pytest.approx(losses, rel=1e-10)
    assert distance(cached, state) < LIMIT
    # On ranks, images that share a micro-batch enter in another order within their step: all of it fits the queue.
    _, whole = train(Ranks(), 64, 16, 2)
    for _, other in ranks_pool(2, train, 64, 16, 1, 4, True):
        for one in (whole, other):
            one["queue"] = one["queue"][one["queue"][:, 0].argsort()]
        assert distance(other, whole) < LIMIT


def memory_job(run: Path, memory: int = 24, optim: OptimConfig | None = None, **changes: Any) -> TrainingJob:
    """The trainer's tiny job with a memory: sixteen keys a step, so that the queue of 24 wraps."""
    optim = optim or OptimConfig(lr=2.0, warmup_epochs=0)
    objective = momentum_contrast(memory, model=TINY)
    optimizer = build_optimizer(optim, objective, global_batch=BATCH)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(objective.network.parameters()))
    return job(run, objective=objective, optimizer=optimizer, optim=optim, **changes)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "micro"), [("fp16", None), ("fp32", 4)])
def test_stopped_and_resumed_is_left_alone(tmp_path: Path, precision: Precision, micro: int | None) -> None:
    runtime = replace(CPU, precision=precision)
    fit(memory_job(tmp_path / "alone"), runtime, micro_batch=micro)
    half = tmp_path / "half"

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(memory_job(half, hooks=(At(6, interrupt),)), runtime, micro_batch=micro)
    assert int(final(half)["objective"]["_extra_state"]) == 4 * 2 * BATCH
    fit(memory_job(half, resume=True), runtime, micro_batch=micro)
    assert_bitwise_equal(final(tmp_path / "alone"), final(half))


def test_a_step_whose_gradients_overflow(tmp_path: Path) -> None:
    """fp16's scaler leaves it out: no trained weight changes; the copy moves, and the keys enter the queue."""
    before: dict[str, Any] = {}

    def raise_the_scale() -> None:
        trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 2.0**120})
        before.update(copy.deepcopy(trainer.job.objective.state_dict()))

    given = memory_job(tmp_path, memory=512, hooks=(At(TOTAL - 1, raise_the_scale),))
    trainer = Trainer(TrainerConfig(), replace(CPU, precision="fp16"), given)
    trainer.fit()
    assert trainer.scaler.get_scale() == 2.0**119, "the scale of a step that was left out is halved"
    after = given.objective.state_dict()
    for key, parameter in given.objective.network.named_parameters():
        mine, follower = f"network.{key}", f"momentum_network.{key}"
        assert torch.equal(after[mine], before[mine]) and torch.equal(parameter, after[mine])
        moved = MOMENTUM * before[follower] + (1 - MOMENTUM) * before[mine]
        torch.testing.assert_close(after[follower], moved, rtol=1e-6, atol=1e-7)
    first = "momentum_network.encoder.conv1.weight"
    assert not torch.equal(after[first], before[first])
    rows = (TOTAL - 1) * 2 * BATCH
    assert (int(before["_extra_state"]), int(after["_extra_state"])) == (rows, rows + 2 * BATCH)
    torch.testing.assert_close(after["queue"][rows : rows + 2 * BATCH].norm(dim=1), torch.ones(2 * BATCH))
    assert torch.equal(after["queue"][:rows], before["queue"][:rows])


def test_the_loss_is_compiled_for_the_types_that_training_gives() -> None:
    """Rows in autocast's half precision, keys in float32."""
    objective, images = momentum_contrast(8), views(4, 0).flatten(0, 1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows, keys = objective.embed(images), objective.contrasts(images)
    assert (rows.dtype, keys.dtype) == (torch.bfloat16, torch.float32)
    packed = [one.signature for one in fused.variants() if one.kernel is packing.pack_with_keys]
    assert [(one["x"], one["keys"]) for one in packed] == [("*bf16", "*fp32")]


def test_a_step_never_waits_for_the_device(tmp_path: Path) -> None:
    step = one_step(memory_job(tmp_path), CPU)
    with Syncs() as syncs:
        step()
    assert syncs.ops == []
    assert syncs.seen > 100, "the operations of a step must pass through the mode"


def test_values_that_break_a_rule() -> None:
    with pytest.raises(ValueError, match=r"pretrain.memory=-1 must be 0 \(no queue\) or more"):
        PretrainConfig(memory=-1)
    for momentum in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=rf"pretrain.momentum={momentum} must be 0 or more and below 1"):
            PretrainConfig(momentum=momentum)
    with pytest.raises(ValueError, match="memory=0 must be at least 1; use Contrastive"):
        momentum_contrast(0)
    with pytest.raises(ValueError, match=r"^momentum=1.0 must be 0 or more and below 1, .*; use 0.999"):
        momentum_contrast(8, momentum=1.0)
    memory, graph = PretrainConfig(memory=64), TrainerConfig(cuda_graph=True)
    assert Recipe(trainer=graph).trainer.cuda_graph and Recipe(pretrain=memory).pretrain.memory == 64
    with pytest.raises(ValueError, match=r"is for steps of one shape, not for pretrain.memory=64, whose queue grows"):
        Recipe(pretrain=memory, trainer=graph)


def test_the_papers_recipe_is_that_without_memory_but_for_the_memory() -> None:
    paper, plain = (parse_recipe((CONFIGS / f"{name}.yaml").read_text()) for name in ("v2-paper", "v2-nomemory"))
    assert (paper.pretrain.memory, paper.pretrain.momentum, plain.pretrain.memory) == (65_536, 0.999, 0)
    assert replace(paper, pretrain=replace(paper.pretrain, memory=0)) == plain


SMOKE = "pretrain --config v2-paper --smoke --device cpu --data.source digits --data.root null --model.arch resnet18"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The paper's recipe at smoke size: five steps of 32 keys into a queue of 64."""
    folder = tmp_path_factory.mktemp("memory") / "run"
    assert main([*SMOKE.split(), "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize(("memory", "told"), [(2076, False), (2077, True)])
def test_a_queue_longer_than_the_data_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, memory: int, told: bool
) -> None:
    """1,438 digits, 400 a step: two views of the other 1,038."""

    def stop(*_: Any, **__: Any) -> None:
        stopped.append(True)
        raise ValueError

    stopped: list[bool] = []
    monkeypatch.setattr(sys.modules["fastsimclr.stages.pretrain"], "train", stop)
    words = f"pretrain --config digits --device cpu --model.width 0.125 --pretrain.batch 400 --pretrain.memory {memory}"
    assert main([*words.split(), "--out", str(tmp_path / "run")]) == 1 and stopped
    assert (f"--pretrain.memory {memory} is more than two views of the 1438 images" in caplog.text) is told
    assert ("use at most 2076" in caplog.text) is told


def test_what_a_run_leaves_is_the_query_network(run: Path) -> None:
    result, state = json.loads((run / "result.json").read_text()), final(run)
    objective, facts = state["objective"], state["facts"]
    assert result["training"]["steps"] == state["step"] == 5
    assert objective["queue"].shape == (64, 128) and int(objective["_extra_state"]) == 5 * 32
    torch.testing.assert_close(objective["queue"].norm(dim=1), torch.ones(64))
    assert (facts["pretrain.memory"], facts["pretrain.momentum"]) == (64, 0.999)
    encoder = load_encoder(run)[0].state_dict()
    assert all(torch.equal(value, objective[f"network.encoder.{key}"]) for key, value in encoder.items())
    assert not torch.equal(encoder["conv1.weight"], objective["momentum_network.encoder.conv1.weight"])
    network = {key for key in objective if key.startswith("network.")}
    parameters = sum(objective[key].numel() for key in network if key.endswith(("weight", "bias")))
    assert result["parameters"] == parameters, "the momentum encoder is no part of the trained network"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--pretrain.memory 32", "was made with pretrain.memory=64, this run has pretrain.memory=32; a resume"),
        ("--pretrain.memory 0", "was made with pretrain.memory=64, this run has pretrain.memory=None; a resume"),
        ("--pretrain.momentum 0.99", "was made with pretrain.momentum=0.999, this run has pretrain.momentum=0.99;"),
    ],
)
def test_what_a_resume_refuses(run: Path, capsys: pytest.CaptureFixture[str], options: str, said: str) -> None:
    before = checkpoint.newest(run).read_bytes()
    assert main([*SMOKE.split(), "--out", str(run), "--resume", "auto", *options.split()]) == 1
    assert said in capsys.readouterr().err
    assert checkpoint.newest(run).read_bytes() == before
