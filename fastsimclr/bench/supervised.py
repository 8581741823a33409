"""The baselines of the stages with one view of an image: torchvision's ResNet in plain torch, with torch's SGD."""

# N images, K classes, S side

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsimclr.bench.baseline import Mark, Rival, resnet
from fastsimclr.bench.ours import LR, MOMENTUM, SOFTNESS, WEIGHT_DECAY
from fastsimclr.bench.training_configs import StageBench
from fastsimclr.models import ClassifierNet, count_parameters

NOTE = "the baseline steps by torch's SGD, which is cheaper than the LARS of ours"


def classifier(arch: str, size: int, classes: int) -> nn.Module:
    """torchvision's ResNet with its classifier, which starts as ours does: views [N, 3, S, S] -> logits [N, K]."""
    net, features = resnet(arch, size)
    net.fc = nn.Linear(features, classes)
    nn.init.normal_(net.fc.weight, std=0.01)
    nn.init.zeros_(net.fc.bias)
    return net


def supervised(config: StageBench) -> Rival:
    """A batch is views float [N, 3, S, S] and labels int64 [N]. Weights from torch's global generator."""
    net = classifier(config.arch, config.size, config.classes).train()
    if config.stage == "distill":
        return _distillation(net, config)
    if config.stage == "linear":
        net.eval().requires_grad_(False)
        assert isinstance(net.fc, nn.Linear)
        net.fc.requires_grad_(True)

    def forward(batch: Sequence[Tensor], mark: Mark) -> Sequence[Tensor]:
        views, labels = batch
        return net(views), labels

    return Rival(
        networks=[net],
        forward=forward,
        loss=lambda logits, labels: F.cross_entropy(logits.float(), labels),
        optimizer=_sgd(net, 0.0 if config.stage == "linear" else WEIGHT_DECAY),
        optimizer_name="SGD",
        views=1,
    )


def _distillation(student: nn.Module, config: StageBench) -> Rival:
    teacher = classifier(config.teacher, config.size, config.classes).eval().requires_grad_(False)

    def forward(batch: Sequence[Tensor], mark: Mark) -> Sequence[Tensor]:
        views, _ = batch
        with torch.no_grad():
            taught = teacher(views)
        mark("teacher")
        return student(views), taught

    def loss(logits: Tensor, taught: Tensor) -> Tensor:
        return F.cross_entropy(logits.float() / SOFTNESS, (taught.float() / SOFTNESS).softmax(dim=1))

    optimizer = _sgd(student, WEIGHT_DECAY)
    return Rival(
        networks=[student, teacher], forward=forward, loss=loss, optimizer=optimizer, optimizer_name="SGD", views=1
    )


def _sgd(net: nn.Module, decay: float) -> torch.optim.Optimizer:
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    return torch.optim.SGD(trained, lr=LR, momentum=MOMENTUM, weight_decay=decay)


def same_classifier(ours: ClassifierNet, size: int, arch: str) -> dict[str, Any]:
    """Both networks on the same weights and views, in float32 on the CPU: what a comparison rests on.

    Raises ArithmeticError where parameters differ in shape, or logits by over 1e-3 of their size (float32 sums in
    another order, through all layers).
    """
    theirs = classifier(arch, size, ours.classifier.out_features).train()
    shapes = [sorted(tuple(p.shape) for p in net.parameters()) for net in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise ArithmeticError("the baseline's parameters have other shapes than ours: it does not do the same work")
    head = {f"fc.{name}": value for name, value in ours.classifier.state_dict().items()}
    theirs.load_state_dict(ours.encoder.state_dict() | head)
    with torch.no_grad():
        views = torch.randn((16, 3, size, size), generator=torch.Generator().manual_seed(0))
        mine, others = ours.train()(views), theirs(views)
    far = float((mine - others).norm() / others.norm())
    if far > 1e-3:
        raise ArithmeticError(f"same weights and views, but logits differ by {far:.2g}")
    return {
        "parameters of equal shape": len(shapes[0]),
        "numbers in them": count_parameters(ours),
        "same weights and views: relative difference of logits": far,
    }
