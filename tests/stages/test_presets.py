"""The recipes in configs/: each is read, and the published ones have the numbers of the papers, worked out by hand."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastsimclr.cli.main import main
from fastsimclr.optim import Schedule
from fastsimclr.recipe import Recipe, parse_recipe

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
IMAGENET, ONE_PERCENT, CIFAR, STL = 1_281_167, 12_811, 50_000, 105_000


@functools.cache
def recipe(name: str) -> Recipe:
    return parse_recipe((CONFIGS / f"{name}.yaml").read_text())


def schedule(config: Any, n: int) -> Schedule:
    optim = config.optim
    return Schedule.from_epochs(n, config.epochs, config.batch, optim.warmup_epochs, optim.peak_lr(config.batch))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_read_and_says_how_to_start_it(path: Path) -> None:
    assert isinstance(recipe(path.stem), Recipe)
    head = path.read_text().split("\ndata:")[0]
    words = " ".join(head.replace("#", " ").split())  # a command may take several lines
    assert re.search(
        r"Commands?[:,].*?(fastsimclr|torchrun( --\S+ [^-]\S*)+ -m fastsimclr) (run|demo|pretrain) ", words
    )
    named = re.findall(r"--config (\S+)", head)
    assert set(named) <= {path.name, path.stem}
    # Its accuracy and speed: where they stand, or that there are none yet.
    assert re.search(
        r"(images/s)[^.]* here: not measured|images/s[^.]*: docs/results\.md|images/s: [^.]*not measured", words
    )


FAST = ("cifar10_r18_1000",)
"""Trained in the fast tests: global BN and another architecture; tests/methods/test_memory.py has v2-paper."""


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[] if path.stem in FAST else [pytest.mark.slow], id=path.stem)
        for path in sorted(CONFIGS.glob("*.yaml"))
    ],
)
def test_every_recipe_trains(path: Path, tmp_path: Path) -> None:
    """At smoke size, on noise."""
    noise = ["--data.source", "synthetic", "--data.root", "null", "--data.synthetic_size", "32"]
    assert main(["pretrain", "--config", str(path), "--smoke", "--device", "cpu", *noise, "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "result.json").read_text())["training"]["steps"] == 64 // 16 + 1


# Peak rate, steps, warm-up steps. 1,281,167·1,000 // 4,096 + 1 = 312,784 + 1 and so on; 12,811,670 / 4,096 = 3,127.8.
@pytest.mark.parametrize(
    ("name", "stage", "n", "peak", "steps", "warmup"),
    [
        ("v1-paper", "pretrain", IMAGENET, 4.8, 312_785, 3_127),  # .3 · 16
        ("v2-nomemory", "pretrain", IMAGENET, 6.4, 250_228, 12_511),  # .1 · 64
        ("google-readme", "pretrain", IMAGENET, 4.8, 31_279, 3_127),  # .075 · 64
        ("cifar10_r18_1000", "pretrain", CIFAR, 2.0, 97_657, 976),  # 1 · 2
        ("imagenet_r152_3x_sk", "pretrain", IMAGENET, 6.4, 250_228, 12_511),
        ("imagenet100_r18", "pretrain", 126_000, 0.6, 98_438, 2_460),  # .3 · 2
        ("stl10_r18", "pretrain", STL, 1.6970562748477143, 20_508, 2_050),  # .075 · sqrt(512)
        ("cifar10_r18_fast", "pretrain", CIFAR, 2.0, 48_829, 976),
        ("imagenet_r152_3x_sk", "linear", IMAGENET, 1.6, 28_151, 0),
        ("imagenet_r152_3x_sk", "finetune", ONE_PERCENT, 0.16, 751, 0),
        ("imagenet_r152_3x_sk", "distill", IMAGENET, 6.4, 125_114, 6_255),
        ("v1-paper", "linear", IMAGENET, 1.6, 28_151, 0),  # .1 · 16
        ("v2-nomemory", "linear", IMAGENET, 1.6, 28_151, 0),
        ("google-readme", "linear", IMAGENET, 1.6, 28_151, 0),
        ("cifar10_r18_1000", "linear", CIFAR, 0.2, 9_766, 0),  # .1 · 2
        ("v1-paper", "finetune", ONE_PERCENT, 0.8, 188, 0),  # .05 · 16
        ("v2-nomemory", "finetune", ONE_PERCENT, 0.16, 751, 0),  # .005 · 32
        ("google-readme", "finetune", ONE_PERCENT, 0.16, 751, 0),
        ("v1-paper", "distill", IMAGENET, 4.8, 125_114, 3_127),
        ("v2-nomemory", "distill", IMAGENET, 6.4, 125_114, 6_255),  # 5 % of 400 epochs
        ("google-readme", "distill", IMAGENET, 4.8, 125_114, 3_127),
    ],
)
def test_rates_and_steps(name: str, stage: str, n: int, peak: float, steps: int, warmup: int) -> None:
    made = schedule(getattr(recipe(name), stage), n)
    assert made.peak == pytest.approx(peak, rel=1e-12)
    assert (made.total_steps, made.warmup_steps) == (steps, warmup)
    assert made(0) == (0.0 if warmup else pytest.approx(peak))
    assert made(warmup) == pytest.approx(peak)


@pytest.mark.parametrize(
    ("name", "decay", "layers", "temperature", "brightness", "scaling"),
    [
        ("v1-paper", 1e-6, 2, 0.1, "add", "paper"),
        ("v2-nomemory", 1e-4, 3, 0.1, "multiply", "paper"),
        ("google-readme", 1e-4, 3, 0.1, "multiply", "google"),
        ("cifar10_r18_1000", 1e-4, 2, 0.5, "multiply", "paper"),
    ],
)
def test_what_tells_the_versions_apart(
    name: str, decay: float, layers: int, temperature: float, brightness: str, scaling: str
) -> None:
    made = recipe(name)
    assert made.pretrain.optim.weight_decay == made.distill.optim.weight_decay == decay
    assert made.pretrain.optim.name == made.distill.optim.name == "lars"
    assert (made.model.head_layers, made.model.head_dim, made.model.width) == (layers, 128, 1.0)
    assert (made.pretrain.temperature, made.pretrain.scaling) == (temperature, scaling)
    assert (made.views.semantics, made.views.brightness) == ("tensorflow", brightness)
    assert made.trainer.bn_groups == "global"
    assert made.linear.method == "sgd" and made.linear.labels == "all" and made.linear.optim.nesterov
    assert made.linear.optim.weight_decay == (0.0 if name.startswith("cifar") else 1e-6)
    assert made.finetune.optim.weight_decay == 0.0 and made.data.label_fraction == 0.01


@pytest.mark.parametrize("name", ["v1-paper", "v2-paper", "v2-nomemory", "google-readme", "imagenet_r152_3x_sk"])
def test_published_distillation_leaves_the_temperature_to_the_networks(name: str) -> None:
    """.1 into the same network, 1 into another: a number here would hold for both."""
    assert recipe(name).distill.temperature is None


def test_the_largest_network_is_that_of_the_paper() -> None:
    """All else is v2-paper's; blocks are computed again for the GPU's memory."""
    large, small = recipe("imagenet_r152_3x_sk"), recipe("v2-paper")
    assert (large.pretrain.memory, large.pretrain.momentum) == (65_536, 0.999)
    assert (large.model.arch, large.model.width, large.model.selective_kernels) == ("resnet152", 3.0, True)
    assert large.trainer == replace(small.trainer, checkpoint_activations=True)
    assert large.distill == replace(small.distill, student=replace(large.model, head_layers=0))
    model = replace(large.model, arch="resnet50", width=1.0, selective_kernels=False)
    assert replace(large, model=model, trainer=small.trainer, distill=small.distill) == small


def test_the_fast_recipe_notes_time_and_accuracy_at_the_same_steps() -> None:
    fast = recipe("cifar10_r18_fast")
    every = fast.pretrain.probe_every_epochs
    assert every is not None and (every * CIFAR // fast.pretrain.batch) % fast.trainer.log_every_steps == 0


def test_views_of_the_published_recipes() -> None:
    cifar, paper = recipe("cifar10_r18_1000").views, recipe("v1-paper").views
    assert (cifar.size, cifar.strength, cifar.blur) == (32, 0.5, 0.0)
    assert (paper.size, paper.strength, paper.blur, paper.scale, paper.grey) == (224, 1.0, 0.5, (0.08, 1.0), 0.2)


def test_fine_tuning_starts_from_the_layer_of_each_paper() -> None:
    layers = {name: recipe(name).finetune.head_layer for name in ("v1-paper", "v2-nomemory", "google-readme")}
    assert layers == {"v1-paper": 0, "v2-nomemory": 1, "google-readme": 1}
    assert recipe("v1-paper").finetune.optim.name == "sgd" and recipe("v2-nomemory").finetune.optim.name == "lars"
