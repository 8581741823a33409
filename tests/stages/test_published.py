"""Published accuracies stand beside a result where, and only where, they are comparable; how a result is printed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from torchvision.models import ResNet50_Weights

from fastsimclr.loaders import ArraySource
from fastsimclr.methods.config import Labels
from fastsimclr.models import ModelConfig
from fastsimclr.recipe import Recipe, parse_recipe
from fastsimclr.stages import result_lines
from fastsimclr.stages.published import PUBLISHED, dataset_of, fitting, published_entry

CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SYNSETS = ("n01440764", *(f"n{i:08d}" for i in range(2_000_000, 2_000_998)), "n15075141")


def top1(stage: str, labels: float = 1.0, epochs: int = 1000, **model: Any) -> list[float]:
    """In per cent, as in the papers."""
    config = ModelConfig(**({"arch": "resnet50"} | model))
    return [round(100 * entry.top1, 1) for entry in fitting("ImageNet", stage, config, labels=labels, epochs=epochs)]


def test_the_table_is_that_of_the_papers() -> None:
    v1: dict[str, Any] = {"head_layers": 2}
    v2: dict[str, Any] = {"head_layers": 3}
    assert [top1("linear", width=w, **v1)[0] for w in (1, 2, 4)] == [69.1, 74.2, 76.6]
    assert top1("linear", epochs=100, **v1)[:3] == [64.5, 64.4, 63.2] and top1("knn", epochs=100, **v1) == [44.8]
    assert top1("linear", epochs=800, **v2) == [71.1, 70.4, 71.7]
    big: dict[str, Any] = {"arch": "resnet152", "width": 3, "selective_kernels": True, **v2}
    assert [top1("finetune", labels=share, **big) for share in (0.01, 0.1, 1.0)] == [[74.9], [80.1], [83.1]]
    assert [top1("linear", arch="resnet101", **v2), top1("linear", arch="resnet101", width=2, **v2)] == [[73.6], []]
    assert [top1("distill", labels=share, head_layers=0) for share in (0.01, 0.1, 1.0)] == [[73.9], [77.5], []]
    assert [top1("distill", labels=share, **big) for share in (0.01, 0.1)] == [[76.6], [80.9]]
    assert len(PUBLISHED) == 9 + 8 * 4 + 4 + 6 and all(0.4 < entry.top1 < 0.95 and entry.source for entry in PUBLISHED)


def test_other_networks_stages_and_labels_have_none() -> None:
    assert top1("linear", head_layers=4) == top1("linear", head_layers=2, labels=0.01) == []
    assert top1("finetune", head_layers=3, labels=0.02) == top1("finetune", head_layers=3, labels=0.5) == []
    assert top1("linear", arch="resnet34", head_layers=2) == top1("supervised", head_layers=2) == []
    # Google's lists hold 12,811 and 128,116 of the 1,281,167 images.
    assert top1("finetune", labels=12_811 / 1_281_167, head_layers=3) == [57.9]
    assert top1("finetune", labels=128_116 / 1_281_167, head_layers=3) == [68.4]


def test_a_data_set_is_known_by_its_classes_and_its_validation_images() -> None:
    assert dataset_of(CIFAR, 10_000) == dataset_of(CIFAR[::-1], 10_000) == "CIFAR-10"
    assert dataset_of(CIFAR, 9_000) is None  # a held-out part of it
    assert dataset_of(("car", *CIFAR[1:]), 10_000) is None
    assert dataset_of([str(digit) for digit in range(10)], 10_000) is None
    assert dataset_of(SYNSETS, 50_000) == "ImageNet"
    assert dataset_of(SYNSETS, 10_000) is None and dataset_of(SYNSETS[:100], 50_000) is None
    assert dataset_of(("n00000001", *SYNSETS[1:]), 50_000) is None  # a thousand other synsets
    assert dataset_of(ResNet50_Weights.DEFAULT.meta["categories"], 50_000) == "ImageNet"
    assert dataset_of([f"class {i}" for i in range(1000)], 50_000) is None


class FakeSetting:
    """As much of a Setting as `beside` reads."""

    def __init__(self, recipe: Recipe, classes: tuple[str, ...], train: int, val: int, few: int) -> None:
        self.recipe, self.few = recipe, few
        labels = np.zeros(val, np.int64)
        images = ArraySource("val", np.zeros((val, 1, 1, 3), np.uint8), labels, classes)
        self.splits = SimpleNamespace(train=range(train), val=images)

    def labelled(self, labels: str) -> range:
        return range(self.few if labels == "subset" else len(self.splits.train))


def test_beside_a_result() -> None:
    model = ModelConfig(arch="resnet18", head_layers=2)
    recipe = parse_recipe("pretrain: {epochs: 200}")

    def found(recipe: Recipe, stage: str, labels: Labels, classes: tuple[str, ...] = CIFAR) -> list[float]:
        setting: Any = FakeSetting(recipe, classes, train=50_000, val=10_000, few=500)
        return [entry["top1"] for entry in published_entry(setting, stage, model, labels).get("published", [])]

    assert found(recipe, "knn", "all") == [0.848, 0.879]  # the nearest length first
    assert found(parse_recipe("pretrain: {epochs: 1000}"), "knn", "all") == [0.879, 0.848]
    assert found(recipe, "linear", "all") == [0.907, 0.921, 0.91]
    assert found(recipe, "linear", "subset") == found(recipe, "linear", "all", ("x", *CIFAR[1:])) == []
    assert found(parse_recipe("smoke: true"), "knn", "all") == []


def test_the_lines_of_a_result() -> None:
    model = ModelConfig(arch="resnet50", head_layers=2)
    entries = [vars(entry) for entry in fitting("ImageNet", "linear", model, labels=1.0, epochs=900)]
    counts = [("cat", 50, 5), ("dog", 40, 40), ("emu", 0, 0), ("fox", 50, 20), ("gnu", 10, 9)]
    result = {
        "metrics": {"top1": 0.6012, "top5": 0.83},
        "published": entries,
        "sweep": {
            "held_out": 10_000,
            "tried": [
                {"lr": 0.1, "weight_decay": 0.0, "held_out_top1": 0.59},
                {"lr": 1.0, "weight_decay": 1e-6, "held_out_top1": 0.61},
            ],
            "chosen": {"lr": 1.0, "weight_decay": 1e-6},
        },
        "per_class": [{"name": name, "images": images, "correct": correct} for name, images, correct in counts],
    }
    assert result_lines(result) == [
        "top1: 0.6012 (published 0.691: SimCLR v1, R50, 1000 epochs, arXiv 2002.05709)",
        "top5: 0.8300",
        "chosen on 10,000 held-out training images: lr 1, weight_decay 1e-06",
        "lr   weight_decay  held_out_top1",
        "0.1             0         0.5900",
        "1           1e-06         0.6100",
        "weakest classes: cat 5 of 50, fox 20 of 50, gnu 9 of 10",
    ]


def test_the_lines_of_a_plain_result_are_its_metrics() -> None:
    assert result_lines({"metrics": {"top1": 0.5, "untrained_top1": 0.25}}) == [
        "top1: 0.5000",
        "untrained_top1: 0.2500",
    ]
    assert result_lines({"metrics": {}}) == []
