"""The other side of a bench: lightly's SimCLR as its documentation trains it, or plain torch where it is missing."""

# N images, M = 2N views, C channels, D dimension of the projections, S side

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from torchvision.transforms import v2

from fastsimclr.bench.ours import HEAD_DIM, LR, MOMENTUM, TEMPERATURE, WEIGHT_DECAY, policy_for
from fastsimclr.kernels.nt_xent import nt_xent
from fastsimclr.loaders import Policy
from fastsimclr.models import SimCLRNet, count_parameters

Loss = Callable[[Tensor, Tensor], Tensor]
Mark = Callable[[str], None]
MISSING = 'lightly is not installed, the baseline is plain torch; pip install "fastsimclr[bench]"'


@dataclass(frozen=True, kw_only=True)
class Rival:
    """What a baseline trains, on the CPU.

    networks: the trained one first. forward: the tensors of a batch to what the loss takes; marks a phase that ends
    within. views: of each image.
    """

    networks: Sequence[nn.Module]
    forward: Callable[[Sequence[Tensor], Mark], Sequence[Tensor]]
    loss: Loss
    optimizer: torch.optim.Optimizer
    optimizer_name: str
    views: int


def pretraining(arch: str, size: int) -> Rival:
    """SimCLR's pretraining: a batch is two views float [N, 3, S, S]. Weights from torch's global generator."""
    net = Net(arch, size).train()
    return Rival(
        networks=[net],
        forward=lambda batch, mark: [net(views) for views in batch],
        loss=loss_function(),
        optimizer=_optimizer(net),
        optimizer_name="LARS (lightly)" if find_spec("lightly") else "SGD",
        views=2,
    )


def title() -> str:
    """Whose baseline runs here."""
    return "lightly" if find_spec("lightly") else "plain torch"


def notes() -> list[str]:
    """What a reader must know of the baseline."""
    return [] if find_spec("lightly") else [MISSING]


def resnet(arch: str, size: int) -> tuple[nn.Module, int]:
    """torchvision's ResNet with a CIFAR stem up to 32 px and without classifier, and how many features it gives."""
    net: nn.Module = getattr(models, arch)(zero_init_residual=True)
    if size <= 32:
        net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    assert isinstance(net.fc, nn.Linear)
    features = net.fc.in_features
    net.fc = nn.Identity()
    return net, features


def from_lightly(module: str, name: str) -> Any:
    """`name` of lightly.`module`."""
    with warnings.catch_warnings(action="ignore"):  # what lightly's imports warn of is not ours to mend
        return getattr(import_module(f"lightly.{module}"), name)


class Net(nn.Module):
    """torchvision's ResNet (CIFAR stem up to 32 px) with SimCLR's head: views [N, 3, S, S] -> z [N, D]."""

    def __init__(self, arch: str, size: int) -> None:
        super().__init__()
        self.encoder, channels = resnet(arch, size)
        self.head = _head(channels)

    def forward(self, views: Tensor) -> Tensor:
        """Projections, not normalised."""
        projections: Tensor = self.head(self.encoder(views))
        return projections


def _head(channels: int) -> nn.Module:
    if find_spec("lightly"):
        head: nn.Module = from_lightly("models.modules", "SimCLRProjectionHead")(channels, channels, HEAD_DIM)
        return head
    first = (nn.Linear(channels, channels, bias=False), nn.BatchNorm1d(channels), nn.ReLU())
    return nn.Sequential(*first, nn.Linear(channels, HEAD_DIM, bias=False), nn.BatchNorm1d(HEAD_DIM))


def loss_function() -> Loss:
    """NT-Xent of two sets of projections [N, D]: lightly's, or cross-entropy over the whole matrix."""
    if find_spec("lightly"):
        loss: Loss = from_lightly("loss", "NTXentLoss")(temperature=TEMPERATURE)
        return loss

    def plain(z0: Tensor, z1: Tensor) -> Tensor:
        z = F.normalize(torch.cat((z0, z1)), dim=1)
        logits = (z @ z.T / TEMPERATURE).float().fill_diagonal_(float("-inf"))
        return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z0)))

    return plain


def _optimizer(net: nn.Module) -> torch.optim.Optimizer:
    if find_spec("lightly"):
        parameters = list(net.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
        lars: torch.optim.Optimizer = from_lightly("utils.lars", "LARS")(groups, lr=LR, momentum=MOMENTUM)
        return lars
    return torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def transform(size: int) -> Callable[[Any], Any]:
    """PIL image -> two views float [3, S, S], with the settings of our policy of that size."""
    policy = policy_for(size)
    return lightly_transform(policy) if find_spec("lightly") else TwoViews(plain_transform(policy))


def lightly_transform(policy: Policy) -> Callable[[Any], list[Any]]:
    """lightly's: PIL image -> two views float [3, S, S] with the settings of `policy`."""
    views: Callable[[Any], list[Any]] = from_lightly("transforms", "SimCLRTransform")(
        input_size=policy.size, cj_strength=policy.strength, gaussian_blur=policy.blur
    )
    return views


def plain_transform(policy: Policy) -> Callable[[Any], Any]:
    """torchvision's: PIL image or uint8 tensor [3, H, W] -> one view float [3, S, S] with the settings of `policy`."""
    s, size = policy.strength, policy.size
    stages: list[Any] = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
    if policy.jitter:
        stages.append(v2.RandomApply([v2.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)], p=policy.jitter))
    if policy.grey:
        stages.append(v2.RandomGrayscale(policy.grey))
    if policy.blur:
        stages.append(v2.RandomApply([v2.GaussianBlur(size // 10 // 2 * 2 + 1, policy.sigma)], p=policy.blur))
    stages += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    composed: Callable[[Any], Any] = v2.Compose([*stages, v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    return composed


class TwoViews:
    """Applies one random transform twice. A class, so that worker processes of any start method can have it."""

    def __init__(self, one: Callable[[Any], Any]) -> None:
        self._one = one

    def __call__(self, image: Any) -> list[Any]:
        return [self._one(image), self._one(image)]


def same_work(ours: SimCLRNet, size: int, arch: str) -> dict[str, Any]:
    """Both networks and losses on the same weights and views, in float32 on the CPU: what a comparison rests on.

    Raises ArithmeticError where kernels differ in shape, or projections or losses by over 1e-3 of their size
    (float32 sums in another order, through all layers).
    """
    theirs = Net(arch, size).train()
    ours = ours.train()
    kernels = [sorted(tuple(p.shape) for p in net.parameters() if p.ndim > 1) for net in (ours, theirs)]
    if kernels[0] != kernels[1]:
        raise ArithmeticError("the baseline's kernels have other shapes than ours: it does not do the same work")
    theirs.encoder.load_state_dict(ours.encoder.state_dict())
    mine, others = list(ours.head.parameters()), list(theirs.head.parameters())
    with torch.no_grad():
        # Theirs has one parameter more, the shift of the last BN, which starts at 0 and stays last in the list.
        for target, value in zip(others, mine, strict=False):
            target.copy_(value)
        generator = torch.Generator().manual_seed(0)
        views = torch.randn((16, 3, size, size), generator=generator)
        z_ours, z_theirs = ours(views)[1].float(), theirs(views).float()
        losses = float(nt_xent(z_ours, TEMPERATURE).loss), float(loss_function()(*z_theirs.chunk(2)))
    far = float((z_ours - z_theirs).norm() / z_theirs.norm())
    if far > 1e-3 or abs(losses[0] - losses[1]) > 1e-3 * losses[1]:
        raise ArithmeticError(f"same weights and views, but projections differ by {far:.2g}, losses are {losses}")
    return {
        "kernels of equal shape": len(kernels[0]),
        "parameters, ours and baseline (it has a shift in the last BN)": [count_parameters(n) for n in (ours, theirs)],
        "same weights and views: relative difference of projections": far,
        "same weights and views: losses": list(losses),
    }
