"""The optimizers and the schedule against Google's numbers, explicit formulas and autograd of an explicit L2 term."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastsimclr.kernels.backend import Backend
from fastsimclr.kernels.lars import lars_step
from fastsimclr.optim import (
    LARS,
    HeadSetting,
    OptimConfig,
    Schedule,
    build_optimizer,
    lars,
    learning_rate,
    parameter_groups,
    set_lr,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "google-simclr-oracle.npz"


class Net(nn.Module):
    """Named so that a rule of exclusion by name would go wrong: the norm is not called bn, the kernel is."""

    def __init__(self) -> None:
        super().__init__()
        self.bn_kernel = nn.Conv2d(3, 4, 3)
        self.scale = nn.BatchNorm2d(4)
        self.shared = nn.Linear(4, 4, bias=False)
        self.again = self.shared
        self.classifier = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.scale(self.bn_kernel(x)).mean((2, 3))
        out: Tensor = self.classifier(self.again(self.shared(h)))
        return out


def train(net: Net, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        set_lr(optimizer, 0.1 * (step + 1))
        optimizer.zero_grad()
        net(torch.randn(6, 3, 5, 5, generator=generator)).square().mean().backward()
        optimizer.step()


def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_twelve_lars_steps_match_google(backend: Backend) -> None:
    """Errors relative to the largest weight of the tensor, or absolute where that is below 1."""
    golden = np.load(GOLDEN)
    init = [torch.from_numpy(golden[f"lars/init/{k}"]) for k in range(5)]
    conv, norm, zero, head = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Linear(4, 4), nn.Linear(8, 5)
    model = nn.ModuleList((conv, norm, zero, head))
    params: list[Any] = [conv.weight, conv.bias, norm.weight, zero.weight, head.weight]
    orders = [(3, 2, 0, 1), (0,), (0,), (1, 0), (1, 0)]
    with torch.no_grad():
        for p, w, order in zip(params, init, orders, strict=True):
            p.data = w.permute(order).contiguous()
    config = OptimConfig(lr=1.0, lr_scaling="none", weight_decay=1e-4)
    optimizer = build_optimizer(config, model, global_batch=512, heads=[head])
    assert isinstance(optimizer, LARS)
    optimizer.backend = backend
    assert optimizer.implementation == {"reference": "lars.foreach", "fused": "lars.fused"}[backend]
    for group in optimizer.param_groups:
        # The recorded gradient of the head's kernel is complete: Google's loss holds its L2 term.
        group["l2"] = 0.0
    for step, lr in enumerate(golden["lars/learning_rate"]):
        set_lr(optimizer, float(lr))
        for k, (p, order) in enumerate(zip(params, orders, strict=True)):
            p.grad = torch.from_numpy(golden[f"lars/grad/{step}/{k}"]).permute(order).contiguous()
        optimizer.step()
        for k, (p, order) in enumerate(zip(params, orders, strict=True)):
            expected = torch.from_numpy(golden[f"lars/weight/{step}/{k}"]).permute(order)
            error = (p.detach() - expected).abs().max().item()
            assert error <= 1e-5 * max(1.0, expected.abs().max().item()), f"step {step}, tensor {k}"


def test_every_step_of_the_schedule_matches_google() -> None:
    """To 1e-6 of the value, plus one float32 rounding of TensorFlow's cosine: 2^-24 of the peak."""
    golden = np.load(GOLDEN)
    expected = golden["schedule/learning_rate"].astype(np.float64)
    n, batch, epochs, warmup_epochs, base = golden["schedule/settings"].tolist()
    config = OptimConfig(lr=base, warmup_epochs=warmup_epochs)
    schedule = Schedule.from_epochs(int(n), int(epochs), int(batch), config.warmup_epochs, config.peak_lr(int(batch)))
    assert (schedule.total_steps, schedule.warmup_steps) == (9766, 976) and len(expected) == 9766
    actual = np.array([schedule(step) for step in range(schedule.total_steps)])
    assert actual[0] == 0
    error = np.abs(actual - expected)
    assert (error <= 1e-6 * expected + 2**-24 * schedule.peak).all()
    assert (error > 1e-6 * expected).sum() <= 1


@pytest.mark.parametrize("warmup, total", [(0, 1), (0, 50), (7, 50), (49, 50)])
def test_schedule_is_a_line_then_half_a_cosine(warmup: int, total: int) -> None:
    for step in range(total + 3):
        if step < warmup:
            expected = 2.0 * step / warmup
        else:
            expected = 1 + math.cos(math.pi * min(1.0, (step - warmup) / (total - warmup)))
        actual = learning_rate(step, peak=2.0, warmup_steps=warmup, total_steps=total)
        assert actual == pytest.approx(expected, abs=3e-7)


def test_step_counts_follow_google() -> None:
    """1,281,167 images, batch 4096, 100 epochs, 10 of warm-up: floor division, then rounding, of the products."""
    schedule = Schedule.from_epochs(1_281_167, 100, 4096, 10, 4.8)
    assert (schedule.total_steps, schedule.warmup_steps) == (12_811_670 * 10 // 4096 + 1, 3127)
    assert Schedule.from_epochs(100, 2, 64, 0, 1.0)(0) == 1.0
    assert Schedule.from_epochs(100, 2, 64, 2, 1.0).warmup_steps == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((100, 5, 10, 6, 1.0), r"warmup_epochs=6 .*epochs=5"),
        ((0, 5, 10, 1, 1.0), "n=0"),
        ((100, 0, 10, 0, 1.0), "epochs=0"),
        ((100, 5, 0, 1, 1.0), "batch=0"),
    ],
)
def test_bad_schedule_is_named(arguments: tuple[int, int, int, int, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule.from_epochs(*arguments)


def test_bad_step_is_named() -> None:
    with pytest.raises(ValueError, match="step=-1"):
        learning_rate(-1, peak=1.0, warmup_steps=0, total_steps=5)
    with pytest.raises(ValueError, match=r"warmup_steps=5 .*total_steps=5"):
        Schedule(peak=1.0, warmup_steps=5, total_steps=5)


def test_parameters_are_sorted_by_module_type() -> None:
    model = net()
    groups = parameter_groups(model, heads=[model.classifier])
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {kind: sorted(names[p] for p in params) for kind, params in groups.items()} == {
        "kernels": ["bn_kernel.weight", "shared.weight"],
        "heads": ["classifier.0.weight"],
        "excluded": ["bn_kernel.bias", "classifier.0.bias", "classifier.1.bias", "classifier.1.weight",
                     "scale.bias", "scale.weight"],
    }  # fmt: skip
    assert "classifier.0.weight" in {names[p] for p in parameter_groups(model)["kernels"]}
    model.bn_kernel.requires_grad_(False)
    assert [names[p] for p in parameter_groups(model)["kernels"]] == ["shared.weight", "classifier.0.weight"]


def test_a_foreign_head_and_a_frozen_model_are_named() -> None:
    with pytest.raises(ValueError, match="head Linear is not part of Net"):
        parameter_groups(net(), heads=[nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="Net has no trainable parameter"):
        parameter_groups(net().requires_grad_(False))


@pytest.mark.parametrize("name", ["lars", "sgd"])
def test_decay_of_the_head_is_an_l2_term_of_the_loss(name: str) -> None:
    """The optimizer's own decay of the head against autograd of loss + decay / 2 |w|^2 with no decay at all."""
    ours, oracle = nn.Linear(4, 3), nn.Linear(4, 3)
    oracle.load_state_dict(ours.state_dict())
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    made = {"name": name, "lr": 0.5, "lr_scaling": "none"}
    first = build_optimizer(OptimConfig(**made, weight_decay=0.1), ours, global_batch=8, heads=[ours])  # type: ignore[arg-type]
    second = build_optimizer(OptimConfig(**made, weight_decay=0.0), oracle, global_batch=8, heads=[oracle])  # type: ignore[arg-type]
    for _ in range(4):
        for optimizer, model, decay in ((first, ours, 0.0), (second, oracle, 0.1)):
            optimizer.zero_grad()
            (model(x).square().mean() + decay / 2 * model.weight.square().sum()).backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, oracle.weight)
    torch.testing.assert_close(ours.bias, oracle.bias)


def test_sgd_with_nesterov_momentum_by_its_formula() -> None:
    """v = m v + g + d w; w -= lr (g + d w + m v), biases without decay. Sutskever et al. 2013, as in torch."""
    model = nn.Linear(3, 2)
    config = OptimConfig(name="sgd", lr=0.1, lr_scaling="linear", weight_decay=0.01, nesterov=True)
    optimizer = build_optimizer(config, model, global_batch=512)
    weights = {"weight": model.weight.detach().clone(), "bias": model.bias.detach().clone()}
    velocity = {key: torch.zeros_like(w) for key, w in weights.items()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for key, decay in (("weight", 0.01), ("bias", 0.0)):
            grad = torch.randn(weights[key].shape, generator=generator)
            getattr(model, key).grad = grad.clone()
            step = grad + decay * weights[key]
            velocity[key] = 0.9 * velocity[key] + step
            weights[key] = weights[key] - 0.2 * (step + 0.9 * velocity[key])
        optimizer.step()
    torch.testing.assert_close(model.weight.detach(), weights["weight"])
    torch.testing.assert_close(model.bias.detach(), weights["bias"])


@pytest.mark.parametrize("config", [OptimConfig(), OptimConfig(lars_variant="lightly"), OptimConfig(name="sgd")])
def test_state_dict_resumes_bitwise(config: OptimConfig, tmp_path: Path) -> None:
    whole = net()
    optimizer = build_optimizer(config, whole, global_batch=64, heads=[whole.classifier])
    train(whole, optimizer, 3)
    torch.save({"net": whole.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed = Net()
    resumed.load_state_dict(saved["net"])
    other = build_optimizer(config, resumed, global_batch=64, heads=[resumed.classifier])
    other.load_state_dict(saved["optimizer"])
    train(whole, optimizer, 3, seed=1)
    train(resumed, other, 3, seed=1)
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_parameters_without_gradient_are_passed_over() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(OptimConfig(weight_decay=1.0), model, global_batch=256)
    model.shared.weight.grad = torch.ones_like(model.shared.weight)
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"shared.weight"} and len(optimizer.state) == 1


def test_a_zero_dim_learning_rate_gives_the_same_step() -> None:
    first, second = net(), net()
    for model, lr in ((first, 0.25), (second, torch.tensor(0.25))):
        optimizer = build_optimizer(OptimConfig(), model, global_batch=256)
        set_lr(optimizer, lr)
        model(torch.ones(2, 3, 5, 5)).square().sum().backward()
        loss = optimizer.step(lambda: 7.0)
        assert loss == 7.0
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_peak_learning_rates_of_the_papers() -> None:
    assert OptimConfig(lr=0.3).peak_lr(4096) == pytest.approx(4.8)
    assert OptimConfig(lr=0.075, lr_scaling="sqrt").peak_lr(4096) == pytest.approx(4.8)
    assert OptimConfig(lr=0.1, lr_scaling="sqrt").peak_lr(4096) == pytest.approx(6.4)
    assert OptimConfig(lr=0.16, lr_scaling="none").peak_lr(1024) == 0.16


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "adam"}, "name='adam' is unknown; use one of lars, sgd"),
        ({"lr_scaling": "square"}, "lr_scaling='square'.*linear, sqrt, none"),
        ({"lars_variant": "apex"}, "lars_variant='apex'.*google, lightly"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"weight_decay": math.nan}, "weight_decay=nan"),
        ({"warmup_epochs": -1}, "warmup_epochs=-1"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"nesterov": True}, "nesterov=True needs name=sgd"),
    ],
)
def test_bad_config_is_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**options)  # type: ignore[arg-type]


def test_lars_alone_takes_plain_parameters() -> None:
    w = nn.Parameter(torch.full((4,), 3.0))
    w.grad = torch.ones(4)
    LARS([w], lr=2.0, weight_decay=0.0).step()
    torch.testing.assert_close(w.detach(), torch.full((4,), 3.0 - 2 * 0.001 * 3.0))


def test_one_call_steps_all_groups_of_one_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels, heads and excluded together; a rate of its own takes a call of its own."""
    calls: list[int] = []

    def counted(params: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(len(params))
        lars_step(params, *args, **kwargs)

    monkeypatch.setattr(lars, "lars_step", counted)
    model = net()
    optimizer = build_optimizer(OptimConfig(), model, global_batch=256, heads=[model.classifier])
    train(model, optimizer, 2)
    assert calls == [9, 9]
    set_lr(optimizer, torch.tensor(0.5))
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.step()
    assert calls == [9, 9, 9, 2, 7]


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_a_scaled_rate_is_that_multiple_of_the_rate(scale: float) -> None:
    """lr_scale in the kernel against the same rate given as such, by LARS and by SGD; a tensor keeps its place."""
    for name in ("lars", "sgd"):
        ends = []
        for setting, lr in ((HeadSetting(lr_scale=scale, weight_decay=0.1), 0.4), (None, 0.4 * scale)):
            torch.manual_seed(0)
            model = nn.Linear(3, 2)
            config = OptimConfig(name=name, weight_decay=0.1)
            settings = [setting] if setting else []
            optimizer = build_optimizer(config, model, global_batch=256, heads=[model], settings=settings)
            for rate in (lr, torch.tensor(lr)):
                set_lr(optimizer, rate)
                optimizer.zero_grad()
                model(torch.ones(4, 3)).square().sum().backward()
                optimizer.step()
            ends.append([p.detach() for p in model.parameters()])
        for a, b in zip(*ends, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_state_of_an_earlier_version_and_of_another_layout_loads() -> None:
    """Groups without lr_scale; momenta that are contiguous where the weights are channels-last now."""
    first, second = net(), net().to(memory_format=torch.channels_last)
    optimizers = [build_optimizer(OptimConfig(), model, global_batch=256) for model in (first, second)]
    train(first, optimizers[0], 2)
    second.load_state_dict(first.state_dict())
    state = copy.deepcopy(optimizers[0].state_dict())
    for group in state["param_groups"]:
        del group["lr_scale"]
    optimizers[1].load_state_dict(state)
    for model, optimizer in zip((first, second), optimizers, strict=True):
        train(model, optimizer, 2, seed=1)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    weight = second.bn_kernel.weight
    assert optimizers[1].state[weight]["momentum"].stride() == weight.stride() != first.bn_kernel.weight.stride()


def test_a_copied_optimizer_keeps_its_backend() -> None:
    optimizer = LARS([nn.Parameter(torch.ones(2))], lr=0.1, weight_decay=0.0, backend="fused")
    assert copy.deepcopy(optimizer).backend == "fused"


class Reads(TorchDispatchMode):
    """Records operators that read a value from the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal"):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("backend", "unscale_first"),
    [("reference", False), ("reference", True), ("fused", False), pytest.param("fused", True, marks=pytest.mark.slow)],
)
def test_the_loss_scaler_waits_for_nothing_and_skips_an_overflow(backend: Backend, unscale_first: bool) -> None:
    """Steps under torch.amp.GradScaler equal steps without; step 1 overflows and halves the scale."""
    scaled, plain = net(), net()
    ours = LARS(scaled.parameters(), lr=0.1, weight_decay=0.1, backend=backend)
    oracle = LARS(plain.parameters(), lr=0.1, weight_decay=0.1, backend="reference")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    x = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    for step in range(3):
        before = [p.detach().clone() for p in scaled.parameters()]
        loss = scaled(x).square().mean()
        scaler.scale(loss).backward()
        if step == 1:
            next(scaled.parameters()).grad.view(-1)[0] = math.inf  # type: ignore[union-attr]
        with Reads() as reads:
            if unscale_first:
                scaler.unscale_(ours)
            scaler.step(ours)
            scaler.update()
        ours.zero_grad()
        assert reads.names == []
        assert not hasattr(ours, "grad_scale") and scaler.get_scale() == (1024.0 if step == 0 else 512.0)
        if step == 1:
            assert all(torch.equal(a, b) for a, b in zip(scaled.parameters(), before, strict=True))
        else:
            plain(x).square().mean().backward()
            oracle.step()
            oracle.zero_grad()
        for a, b in zip(scaled.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # BN's running statistics are not used in training
