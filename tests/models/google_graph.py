"""Google's network as a graph in plain torch: variables by their TensorFlow names, and what they give."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsimclr.models.google import GoogleNet
from tests.models.tf_writer import write_bundle

DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
RELATIVE = 1e-4  # of an endpoint's largest value: float32 sums in another order give some 1e-6


class Graph:
    """Google's network built as their code builds it: each layer makes its variables, numbered as they come.

    Random variables by their TensorFlow names, and what the network gives for images [N, H, W, 3] in evaluation.
    """

    def __init__(self, arch: str, base: int, *, sk: bool = False, cifar: bool = False, seed: int = 0) -> None:
        self.arch, self.base, self.sk, self.cifar = arch, base, sk, cifar
        self.random = torch.Generator().manual_seed(seed)
        self.variables: dict[str, Tensor] = {"global_step": torch.tensor(1234)}
        self.counts: dict[str, int] = {}
        self.endpoints: dict[str, Tensor] = {}

    def name(self, kind: str) -> str:
        self.counts[kind] = self.counts.get(kind, -1) + 1
        return f"base_model/{kind}" + (f"_{self.counts[kind]}" if self.counts[kind] else "")

    def normal(self, name: str, *shape: int, std: float, mean: float = 0.0) -> Tensor:
        self.variables[name] = mean + std * torch.randn(shape, generator=self.random)
        return self.variables[name]

    def conv(self, x: Tensor, filters: int, size: int, stride: int = 1) -> Tensor:
        kernel = self.normal(
            f"{self.name('conv2d')}/kernel", size, size, x.shape[1], filters, std=math.sqrt(1.5 / x.shape[1]) / size
        )
        before = (size - 1) // 2
        x = F.pad(x, (before, size - 1 - before) * 2)
        return F.conv2d(x, kernel.permute(3, 2, 0, 1), stride=stride)

    def norm(self, x: Tensor, scope: str | None = None, relu: bool = True, center: bool = True) -> Tensor:
        scope, channels = scope or self.name("batch_normalization"), x.shape[1]
        shape = (-1,) + (1,) * (x.dim() - 2)
        mean = self.normal(f"{scope}/moving_mean", channels, std=0.2).view(shape)
        var = self.normal(f"{scope}/moving_variance", channels, std=0.05, mean=1).view(shape)
        y = (x - mean) / (var + 1e-5).sqrt() * self.normal(f"{scope}/gamma", channels, std=0.2, mean=0.7).view(shape)
        y = y + self.normal(f"{scope}/beta", channels, std=0.2).view(shape) if center else y
        return y.clamp_min(0) if relu else y

    def selective(self, x: Tensor, filters: int, stride: int) -> Tensor:
        x = self.norm(self.conv(x, 2 * filters, 3, stride))
        streams = torch.stack(x.split(filters, 1))
        pooled = streams.sum(0).mean((2, 3), keepdim=True)
        hidden = self.norm(self.conv(pooled, max(int(filters * 0.0625), 32), 1))
        mixing = torch.stack(self.conv(hidden, 2 * filters, 1).split(filters, 1)).softmax(0)
        return (streams * mixing).sum(0)

    def block(self, x: Tensor, filters: int, stride: int, project: bool) -> Tensor:
        basic = self.arch in ("resnet18", "resnet34")
        shortcut = x
        if project:
            out = filters if basic else 4 * filters
            if self.sk:
                padded = F.pad(x, (0, 1, 0, 1))
                ones = F.pad(torch.ones_like(x), (0, 1, 0, 1)) if stride == 1 else torch.ones_like(padded)
                shortcut = F.avg_pool2d(padded, 2, stride) / F.avg_pool2d(ones, 2, stride)
                shortcut = self.conv(shortcut, out, 1)
            else:
                shortcut = self.conv(x, out, 1, stride)
            shortcut = self.norm(shortcut, relu=False)
        if basic:
            x = self.norm(self.conv(x, filters, 3, stride))
            x = self.norm(self.conv(x, filters, 3), relu=False)
        else:
            x = self.norm(self.conv(x, filters, 1))
            x = self.selective(x, filters, stride) if self.sk else self.norm(self.conv(x, filters, 3, stride))
            x = self.norm(self.conv(x, 4 * filters, 1), relu=False)
        return (x + shortcut).clamp_min(0)

    def build(self, images: Tensor, *, head: int = 3, linear: bool = False, classes: int = 0, layer: int = 0) -> None:
        x = images.permute(0, 3, 1, 2)
        if self.cifar:
            x = self.norm(self.conv(x, self.base, 3))
        else:
            if self.sk:
                x = self.norm(self.conv(x, self.base // 2, 3, 2))
                x = self.norm(self.conv(x, self.base // 2, 3))
                x = self.conv(x, self.base, 3)
            else:
                x = self.conv(x, self.base, 7, 2)
            x = same_max_pool(self.norm(x))
        self.endpoints["initial_max_pool"] = x
        for group, depth in enumerate(DEPTHS[self.arch]):
            for position in range(depth):
                stride = 2 if group and position == 0 else 1
                x = self.block(x, self.base * 2**group, stride, project=position == 0)
            self.endpoints[f"block_group{group + 1}"] = x
        hidden = [x.mean((2, 3))]
        for index in range(head):
            last = index == head - 1
            scope, width = f"head_contrastive/{'l' if linear else 'nl'}_{index}", hidden[0].shape[1]
            out = 24 if last else width
            kernel = self.normal(f"{scope}/dense/kernel", width, out, std=1 / math.sqrt(width))
            hidden.append(
                self.norm(hidden[-1] @ kernel, f"{scope}/batch_normalization", relu=not last, center=not last)
            )
        self.endpoints |= {"final_avg_pool": hidden[0], "head_layer1": hidden[min(1, head)], "projection": hidden[-1]}
        if classes:
            scope = "head_supervised/linear_layer/dense"
            kernel = self.normal(f"{scope}/kernel", hidden[layer].shape[1], classes, std=0.2)
            self.endpoints["logits"] = hidden[layer] @ kernel + self.normal(f"{scope}/bias", classes, std=1)


def same_max_pool(x: Tensor) -> Tensor:
    """TensorFlow's SAME 3x3 stride 2 in plain loops: ceil(n / 2) windows, the odd pixel of padding comes last."""
    height, width = (math.ceil(size / 2) for size in x.shape[2:])
    tops, lefts = (-(max((math.ceil(n / 2) - 1) * 2 + 3 - n, 0) // 2) for n in x.shape[2:])
    y = x.new_empty(*x.shape[:2], height, width)
    for i in range(height):
        for j in range(width):
            top, left = tops + 2 * i, lefts + 2 * j
            y[:, :, i, j] = x[:, :, max(top, 0) : top + 3, max(left, 0) : left + 3].amax((2, 3))
    return y


def save(graph: Graph, folder: Path, change: Callable[[dict[str, Tensor]], object] | None = None) -> Path:
    """The graph's variables as a checkpoint, with an optimizer's slots beside them."""
    variables = dict(graph.variables)
    variables |= {f"{name}/Momentum": torch.ones_like(v) for name, v in variables.items() if name.endswith("kernel")}
    if change is not None:
        change(variables)
    return write_bundle(folder / "model.ckpt-1234", {name: v.numpy() for name, v in variables.items()}, shards=2)


def outputs(found: GoogleNet, images: Tensor, layer: int) -> dict[str, Tensor]:
    """Every endpoint of the imported network, maps as [N, C, H, W]. images: [N, H, W, 3]."""
    network, got = found.simclr().eval(), dict[str, Tensor]()
    encoder = network.encoder
    parts = {"initial_max_pool": encoder.maxpool, "block_group1": encoder.layer1, "block_group4": encoder.layer4}
    for name, part in parts.items():
        part.register_forward_hook(lambda _, __, y, name=name: got.__setitem__(name, y))
    x = images.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        got["final_avg_pool"], got["projection"] = network(x)
        got["head_layer1"] = network.head.forward_to(got["final_avg_pool"], min(1, found.config.head_layers))
        if found.classifier:
            got["logits"] = found.classifier_net(layer).eval()(x)
    return got


def error(got: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


def tiny_graph(images: Tensor) -> Graph:
    """A tenth of a megabyte: ResNet-18 of an eighth of the width, CIFAR stem, classifier of 10 classes on layer 1.

    The variables are the same for all images [N, H, W, 3].
    """
    graph = Graph("resnet18", 8, cifar=True, seed=3)
    graph.build(images, classes=10, layer=1)
    return graph


def averages(variables: dict[str, Tensor]) -> None:
    """Moving averages of everything that is trained, each the variable's double."""
    trained = [name for name in variables if name.endswith(("kernel", "gamma", "beta", "bias"))]
    variables.update({f"{name}/ExponentialMovingAverage": 2 * variables[name] for name in trained})
