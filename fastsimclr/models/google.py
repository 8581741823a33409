"""Google's SimCLR networks out of their TensorFlow 1 checkpoints: what they are, and their weights in ours.

Layers are numbered in the order in which google-research/simclr (resnet.py, model_util.py) builds them: conv2d,
conv2d_1, … and batch_normalization, …_1, …; in a block with a projection shortcut, the shortcut comes first.
Kernels are stored [height, width, in, out], dense ones [in, out]. Images enter in [0, 1], without mean and deviation.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy.typing as npt
import torch
from torch import Tensor, nn

from fastsimclr.models.convert import load_weights
from fastsimclr.models.heads import Classifier
from fastsimclr.models.network import ClassifierNet, ModelConfig, SimCLRNet, build_simclr
from fastsimclr.models.norm import BatchNorm
from fastsimclr.models.resnet import Arch, ResNet
from fastsimclr.models.selective_kernel import Conv
from fastsimclr.models.tf_bundle import Bundle

Weights = Literal["auto", "ema", "raw"]

_STEM = "base_model/conv2d/kernel"
_AVERAGE = "/ExponentialMovingAverage"
_NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
_CLASSIFIER = {"weight": "head_supervised/linear_layer/dense/kernel", "bias": "head_supervised/linear_layer/dense/bias"}
_HEAD_KERNEL = re.compile(r"head_contrastive/n?l_(\d+)/dense/kernel")
# Of the optimizers of model_util.py (momentum, LARS, Adam) and of the loop.
_SLOT = re.compile(r"(.+)/(Momentum|Adam|Adam_1)")
_COUNTERS = ("global_step", "beta1_power", "beta2_power")
_SHOWN = 4

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class GoogleNet:
    """What a checkpoint holds.

    config: of encoder and head; its stem is not "auto", so that the views' size does not matter. state: of SimCLRNet,
    float32 on the CPU. classifier: weight [K, features] and bias [K], empty where there is none. step: of the training,
    None where it is not stored. averaged: whether the weights are the moving averages. slots: how many variables of the
    optimizer were left out; doubles: how many moving averages, or raw variables where the averages were taken.
    """

    prefix: Path
    config: ModelConfig
    state: dict[str, Tensor]
    classifier: dict[str, Tensor]
    step: int | None
    averaged: bool
    slots: int
    doubles: int

    def simclr(self) -> SimCLRNet:
        """Encoder and projection head with the checkpoint's weights."""
        # From an empty network: initial values would only be drawn to be overwritten.
        network = copy.deepcopy(_on_meta(self.config)).to_empty(device="cpu")
        load_weights(network, self.state, str(self.prefix))
        return network

    @property
    def classifier_layers(self) -> list[int]:
        """The head layers whose width is that of the classifier's input: it sits on one of them. 0 is the encoder."""
        if not self.classifier:
            return []
        features = self.classifier["weight"].shape[1]
        return [layer for layer, width in enumerate(_widths(_on_meta(self.config))) if width == features]

    def classifier_net(self, layer: int) -> ClassifierNet:
        """The classifier on head layer `layer`, with encoder and the layers below it.

        ValueError where there is no classifier, or its input is not as wide as that layer.
        """
        if not self.classifier:
            raise ValueError(f"{self.prefix} has no classifier (head_supervised/…); leave out --head-layer {layer}")
        if layer not in self.classifier_layers:
            raise ValueError(
                f"{self.prefix}: the classifier takes {self.classifier['weight'].shape[1]} features, which --head-layer"
                f" {layer} does not give: layers 0 to {self.config.head_layers} have {_widths(_on_meta(self.config))};"
                f" use one of {self.classifier_layers}"
            )
        network = self.simclr()
        classes, features = self.classifier["weight"].shape
        classifier = Classifier(features, classes)
        load_weights(classifier, self.classifier, str(self.prefix))
        return ClassifierNet(network.encoder, network.head.truncated(layer), classifier)


def read_google(source: str | Path, weights: Weights = "auto") -> GoogleNet:
    """The network of a checkpoint of google-research/simclr, every variable accounted for.

    source: see Bundle. weights: "ema" takes the moving averages of the weights, "raw" the weights, "auto" the averages
    where there are any. Raises BundleError for files that cannot be read; ValueError for variables that are missing, of
    another shape or in no network of Google's, and for "ema" where there are no averages.
    """
    bundle = Bundle(source)
    shapes = {name: bundle.shape(name) for name in bundle.names}
    slots = {name for name in shapes if (found := _SLOT.fullmatch(name)) and found[1] in shapes}
    slots |= {name for name in _COUNTERS if name in shapes}
    doubles = {name for name in shapes if name.endswith(_AVERAGE) and name.removesuffix(_AVERAGE) in shapes}
    plain = {name: shape for name, shape in shapes.items() if name not in slots | doubles}
    if len(plain.get(_STEM, ())) != 4:
        raise ValueError(_foreign(bundle))
    config = _deduce(plain)
    targets = _targets(config, plain)
    _check(bundle.index, plain, targets, config)
    averaged = weights == "ema" or (weights == "auto" and bool(doubles))
    if averaged:
        _check_averages(bundle.index, {name: shapes[name] for name in doubles}, targets)
    state: dict[str, Tensor] = {}
    for name, target in targets.items():
        chosen = name + _AVERAGE if averaged and name + _AVERAGE in doubles else name
        state[target.key] = target.tensor(bundle.read(chosen))
    classifier = {key: state.pop(f"classifier.{key}") for key in _CLASSIFIER if f"classifier.{key}" in state}
    counters = [key for key in _on_meta(config).state_dict() if key.endswith("num_batches_tracked")]
    state |= {key: torch.zeros((), dtype=torch.int64) for key in counters}
    return GoogleNet(
        prefix=bundle.prefix,
        config=config,
        state=state,
        classifier=classifier,
        step=int(bundle.read("global_step")) if "global_step" in bundle else None,
        averaged=averaged,
        slots=len(slots),
        doubles=len(doubles),
    )


def _deduce(plain: Shapes) -> ModelConfig:
    """The configuration whose variables are most like these."""
    stem = plain[_STEM]
    widths = {
        int(found[1]): shape[-1] for name, shape in plain.items() if (found := _HEAD_KERNEL.fullmatch(name)) and shape
    }
    layers, dim = max(widths, default=-1) + 1, widths[max(widths)] if widths else 128
    second = plain.get("base_model/conv2d_1/kernel", ())
    imagenet = ModelConfig(stem="imagenet", maxpool="tf_same", width=stem[-1] / 64, head_layers=layers, head_dim=dim)
    if stem[:1] == (7,):
        kinds = [imagenet]
    elif second[:1] == (3,):
        # Google's TensorFlow 1 code cannot build selective kernels with basic blocks.
        kinds = [replace(imagenet, selective_kernels=True, width=2 * imagenet.width)]
    else:
        plain_cifar = replace(imagenet, stem="cifar", maxpool="torch")
        kinds = [plain_cifar, replace(plain_cifar, selective_kernels=True)]

    best, most = kinds[0], -math.inf
    for arch in get_args(Arch):
        for kind in kinds:
            basic = arch in ("resnet18", "resnet34")
            if basic and kind.selective_kernels:
                continue
            config = replace(kind, arch=arch, project_first=basic)
            targets = _targets(config, plain)
            alike = sum(plain.get(name) == target.shape for name, target in targets.items())
            if alike == len(targets) == len(plain):
                return config
            if (score := 2 * alike - len(targets)) > most:
                best, most = config, score
    return best


@dataclass(frozen=True, kw_only=True)
class _Target:
    """Where a variable goes: the key of ours, the shape that it must have in TensorFlow, and the order of its axes."""

    key: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]

    def tensor(self, values: npt.NDArray[Any]) -> Tensor:
        return torch.tensor(values.transpose(self.axes).astype("float32", order="C"))


def _target(key: str, ours: tuple[int, ...]) -> _Target:
    """ours: [out, in, height, width], [out, in] or [channels]."""
    axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[len(ours)]
    return _Target(key=key, shape=tuple(ours[axes.index(position)] for position in range(len(ours))), axes=axes)


def _targets(config: ModelConfig, plain: Shapes) -> dict[str, _Target]:
    """Every variable of Google's network of this configuration.

    plain: the checkpoint's variables, which say how the layers of the head are called and what the classifier is like.
    """
    network = _on_meta(config)
    targets: dict[str, _Target] = {}

    def add(scope: str, key: str, module: nn.Module) -> None:
        state = module.state_dict()
        names = _NORM if isinstance(module, BatchNorm) else {"kernel": "weight"}
        for theirs, ours in names.items():
            if ours in state:
                targets[f"{scope}/{theirs}"] = _target(f"{key}.{ours}", state[ours].shape)

    counts = {"conv2d": 0, "batch_normalization": 0}
    for key, module in _in_googles_order(network.encoder):
        kind = "batch_normalization" if isinstance(module, BatchNorm) else "conv2d"
        add(f"base_model/{kind}" + (f"_{counts[kind]}" if counts[kind] else ""), f"encoder.{key}", module)
        counts[kind] += 1
    linear = "head_contrastive/l_0/dense/kernel" in plain
    for index, layer in enumerate(network.head.layers):
        scope = f"head_contrastive/{'l' if linear else 'nl'}_{index}"
        add(f"{scope}/dense", f"head.layers.{index}.dense", layer.get_submodule("dense"))
        add(f"{scope}/batch_normalization", f"head.layers.{index}.bn", layer.get_submodule("bn"))
    if any(name in plain for name in _CLASSIFIER.values()):
        kernel = plain.get(_CLASSIFIER["weight"], ())
        features = kernel[0] if len(kernel) == 2 and kernel[0] in _widths(network) else network.encoder.out_channels
        (classes,) = plain.get(_CLASSIFIER["bias"], kernel[-1:])[:1] or (1,)
        for ours, shape in {"weight": (classes, features), "bias": (classes,)}.items():
            targets[_CLASSIFIER[ours]] = _target(f"classifier.{ours}", shape)
    return targets


def _widths(network: SimCLRNet) -> list[int]:
    return [network.head.width_at(layer) for layer in range(len(network.head.layers) + 1)]


@cache
def _on_meta(config: ModelConfig) -> SimCLRNet:
    """The network without storage: names and shapes."""
    with torch.device("meta"):
        return build_simclr(config, 224)


def _in_googles_order(encoder: ResNet) -> Iterator[tuple[str, nn.Module]]:
    """Convolutions and norms, with their names, in the order in which Google's code builds them."""
    for name, part in encoder.named_children():
        blocks = part.named_children() if name.startswith("layer") else [("", part)]
        for position, block in blocks:
            prefix = f"{name}.{position}" if position else name
            layers = [layer for layer in block.named_modules(prefix=prefix) if isinstance(layer[1], Conv | BatchNorm)]
            yield from sorted(layers, key=lambda layer: ".downsample." not in layer[0])


def _check(index: Path, plain: Shapes, targets: dict[str, _Target], config: ModelConfig) -> None:
    wrong = [
        f"{name} {list(plain[name])}, it should be {list(target.shape)}"
        for name, target in targets.items()
        if name in plain and plain[name] != target.shape
    ]
    faults = {
        "missing": [name for name in targets if name not in plain],
        "in no such network": [name for name in plain if name not in targets],
        "of another shape": wrong,
    }
    if any(faults.values()):
        network = f"{config.arch}, width {config.width:g}{', selective kernels' if config.selective_kernels else ''}"
        raise ValueError(
            f"{index} is most like {network}, {config.stem} stem, {config.head_layers} head layers, but"
            f" {_listed(faults)}. Every variable must be there with its shape; give a checkpoint that"
            " google-research/simclr wrote"
        )


def _check_averages(index: Path, doubles: Shapes, targets: dict[str, _Target]) -> None:
    if not doubles:
        raise ValueError(f"{index} has no moving averages (…{_AVERAGE}); use --weights raw")
    trained = {name + _AVERAGE: t.shape for name, t in targets.items() if "running_" not in t.key}
    faults = {
        "missing": [name for name in trained if name not in doubles],
        "of another shape": [
            f"{name} {list(doubles[name])}, it should be {list(target.shape)}"
            for original, target in targets.items()
            if (name := original + _AVERAGE) in doubles and doubles[name] != target.shape
        ],
    }
    if any(faults.values()):
        raise ValueError(f"{index}: of the moving averages {_listed(faults)}; use --weights raw for the weights")


def _listed(faults: Mapping[str, list[str]]) -> str:
    return ", ".join(
        f"{len(names)} {what} ({'; '.join(names[:_SHOWN])}{'; …' if len(names) > _SHOWN else ''})"
        for what, names in faults.items()
        if names
    )


def _foreign(bundle: Bundle) -> str:
    kind = " It is one of TensorFlow 2's object checkpoints." if "_CHECKPOINTABLE_OBJECT_GRAPH" in bundle else ""
    return (
        f"{bundle.index} has no {_STEM} [height, width, 3, channels], where every network of google-research/simclr"
        f" begins; its {len(bundle.names)} names are {', '.join(bundle.names[:_SHOWN])}, ….{kind} Give a checkpoint of"
        " that project's TensorFlow 1 code"
    )
