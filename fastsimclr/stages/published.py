"""Published accuracies, to stand beside a result that was measured on the same data by the same protocol."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fastsimclr.methods.config import Labels
from fastsimclr.models import ModelConfig
from fastsimclr.models.foreign import wordnet_ids
from fastsimclr.recipe import StageName
from fastsimclr.stages.setting import Setting

Dataset = Literal["ImageNet", "CIFAR-10"]
V1, V2, GOOGLE = "arXiv 2002.05709", "arXiv 2006.10029", "google-research/simclr"


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published accuracy.

    version: SimCLR 1 (two head layers) or 2 (three); None: of any. labels: share of the training labels that were used.
    epochs: of pretraining. what: network and setting in words. source: where it stands.
    """

    dataset: Dataset
    stage: StageName
    version: int | None
    arch: str
    width: float
    selective_kernels: bool
    labels: float
    epochs: int
    top1: float
    what: str
    source: str


def _entry(
    stage: StageName,
    network: str,
    top1: float,
    *,
    dataset: Dataset = "ImageNet",
    version: int | None = 1,
    labels: float = 1.0,
    epochs: int = 1000,
    remark: str = "",
    source: str = V1,
) -> Published:
    """network: "R50", "R50 2x", "R152 3x+SK"; remark: what else tells the entry from others of that network."""
    plain, _, sk = network.partition("+")
    depth, _, width = plain.partition(" ")
    tuned = f", {100 * labels:.0f} % of the labels" if stage in ("finetune", "distill") else ""
    trained = "" if stage == "distill" else f", {epochs} epochs"
    name = f"SimCLR v{version}, " if version else ""
    return Published(
        dataset=dataset,
        stage=stage,
        version=version,
        arch=f"resnet{depth[1:]}",
        width=float(width.rstrip("x") or 1),
        selective_kernels=sk == "SK",
        labels=labels,
        epochs=epochs,
        top1=round(top1 / 100, 4),
        what=f"{name}{network}{trained}{tuned}{remark and ', ' + remark}",
        source=source,
    )


# SimCLRv2, Table 1 and appendix: linear, then fine-tuned on 1 %, 10 % and 100 % of the labels.
_V2_TABLE = {
    "R50": (71.7, 57.9, 68.4, 76.3),
    "R50+SK": (74.6, 64.5, 72.1, 78.7),
    "R50 2x+SK": (77.7, 70.6, 77.0, 81.3),
    "R101": (73.6, 62.1, 71.4, 78.2),
    "R101 2x+SK": (79.0, 73.2, 78.8, 82.4),
    "R152": (74.5, 64.0, 73.0, 79.3),
    "R152 2x+SK": (79.4, 74.2, 79.4, 82.9),
    "R152 3x+SK": (79.8, 74.9, 80.1, 83.1),
}


def _simclr_v2() -> Iterator[Published]:
    for network, (linear, *tuned) in _V2_TABLE.items():
        memory = "with memory"
        yield _entry("linear", network, linear, version=2, epochs=800, remark=memory, source=V2)
        for labels, top1 in zip((0.01, 0.1, 1.0), tuned, strict=True):
            yield _entry("finetune", network, top1, version=2, epochs=800, labels=labels, remark=memory, source=V2)
    big, own = "from R152 3x+SK", "from itself"
    for labels, small, same in ((0.01, 73.9, 76.6), (0.1, 77.5, 80.9)):
        yield _entry("distill", "R50", small, version=None, labels=labels, remark=big, source=f"SimCLR v2, {V2}")
        yield _entry("distill", "R152 3x+SK", same, version=None, labels=labels, remark=own, source=f"SimCLR v2, {V2}")


PUBLISHED: tuple[Published, ...] = (
    _entry("linear", "R50", 69.1),
    _entry("linear", "R50 2x", 74.2),
    _entry("linear", "R50 4x", 76.6),
    _entry("linear", "R50", 64.5, epochs=100, remark="B 4096"),
    _entry("linear", "R50", 64.4, epochs=100, remark="B 4096", source="VISSL"),
    _entry("linear", "R50", 63.2, epochs=100, remark="B 256", source="lightly"),
    _entry("knn", "R50", 44.8, epochs=100, remark="B 256", source="lightly"),
    _entry("linear", "R50", 71.1, version=2, epochs=800, remark="without memory", source="its author"),
    _entry("linear", "R50", 70.4, version=2, epochs=800, remark="without memory", source=f"users of {GOOGLE}"),
    *_simclr_v2(),
    _entry("linear", "R50", 94.0, dataset="CIFAR-10", remark="B 1024"),
    _entry("linear", "R18", 90.7, dataset="CIFAR-10", version=None, remark="SimCLR", source="solo-learn"),
    _entry("linear", "R18", 92.1, dataset="CIFAR-10", version=None, remark="SimCLR", source="p3i0t"),
    _entry("linear", "R18", 91.0, dataset="CIFAR-10", version=None, remark="SimCLR", source=f"README of {GOOGLE}"),
    _entry("knn", "R18", 84.8, dataset="CIFAR-10", version=None, epochs=200, remark="B 512", source="lightly"),
    _entry("knn", "R18", 87.9, dataset="CIFAR-10", version=None, epochs=800, remark="B 512", source="lightly"),
)

_CIFAR10 = {"airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"}


def dataset_of(classes: Sequence[str], images: int) -> Dataset | None:
    """Which published data set validation images of these classes are; None where it is another, or a part of it.

    ImageNet's classes are known by their WordNet ids or by torchvision's names for them.
    """
    if set(classes) == _CIFAR10 and images == 10_000:
        return "CIFAR-10"
    if len(classes) != 1000 or images != 50_000:
        return None
    if wordnet_ids(classes):
        return "ImageNet"
    from torchvision.models import ResNet50_Weights  # slow to import, and seldom needed

    return "ImageNet" if set(classes) <= set(ResNet50_Weights.DEFAULT.meta["categories"]) else None


def fitting(dataset: Dataset, stage: str, model: ModelConfig, *, labels: float, epochs: int) -> tuple[Published, ...]:
    """The published accuracies of that stage and network, those of the nearest pretraining length first.

    labels: the share of the training labels that were used. epochs: of pretraining.
    """
    version = {2: 1, 3: 2}.get(model.head_layers)
    found = [
        entry
        for entry in PUBLISHED
        if (entry.dataset, entry.stage, entry.arch) == (dataset, stage, model.arch)
        and (entry.width, entry.selective_kernels) == (model.width, model.selective_kernels)
        and (entry.version is None or entry.version == version)
        and abs(labels / entry.labels - 1) < 0.05
    ]
    return tuple(sorted(found, key=lambda entry: abs(math.log(entry.epochs / epochs))))


def published_entry(setting: Setting, stage: str, model: ModelConfig, labels: Labels) -> dict[str, Any]:
    """What a result file says of it: {"published": [...]}, or nothing where no published accuracy is comparable.

    model: the evaluated network. labels: which labelled images it learned from.
    """
    val = setting.splits.val
    dataset = None if setting.recipe.smoke else dataset_of(val.classes, len(val))
    if dataset is None:
        return {}
    share = len(setting.labelled(labels)) / len(setting.splits.train)
    found = fitting(dataset, stage, model, labels=share, epochs=setting.recipe.pretrain.epochs)
    return {"published": [asdict(entry) for entry in found]} if found else {}


def published_line(result: dict[str, Any]) -> str | None:
    """The nearest one in a result, if any: "published 0.691: SimCLR v1, R50, 1000 epochs, arXiv 2002.05709"."""
    if not result.get("published"):
        return None
    nearest = result["published"][0]
    return f"published {nearest['top1']:.3f}: {nearest['what']}, {nearest['source']}"
