"""ResNet encoders, v1.5 (stride on the 3x3), of any depth and width, with torchvision's parameter names."""

# N images, C channels, H height, W width

from __future__ import annotations

import contextlib
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastsimclr.models.norm import BatchNorm, statistics_of
from fastsimclr.models.selective_kernel import Conv, SelectiveKernel, ShortcutPool

Arch = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet200"]

DEPTHS: dict[str, tuple[int, int, int, int]] = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
    "resnet200": (3, 24, 36, 3),
}


class Basic(nn.Module):
    """relu(bn(conv3x3(relu(bn(conv3x3(x))))) + shortcut(x)), the block of depths 18 and 34. He et al. 2015, Fig. 5.

    [N, channels, H, W] -> [N, filters, ceil(H / stride), ceil(W / stride)]. Google's code has no selective kernel in
    this block (tf2/resnet.py, ResidualBlock): with selective_kernels only the shortcuts change.
    """

    expansion = 1

    def __init__(
        self, channels: int, filters: int, stride: int, downsample: nn.Module | None, sk: bool, zero_gamma: bool
    ) -> None:
        super().__init__()
        self.conv1 = Conv(channels, filters, 3, stride)
        self.bn1 = BatchNorm(filters)
        self.conv2 = Conv(filters, filters, 3)
        self.bn2 = BatchNorm(filters, zero_gamma=zero_gamma)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] -> [N, filters, H', W']."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.bn1.with_relu(self.conv1(x))
        return self.bn2.with_relu(self.conv2(y), shortcut)


class Bottleneck(nn.Module):
    """1x1 to `filters`, 3x3 with the stride (or a selective kernel), 1x1 to 4 * filters, plus the shortcut.

    [N, channels, H, W] -> [N, 4 * filters, ceil(H / stride), ceil(W / stride)]. He et al. 2015, Fig. 5.
    """

    expansion = 4

    def __init__(
        self, channels: int, filters: int, stride: int, downsample: nn.Module | None, sk: bool, zero_gamma: bool
    ) -> None:
        super().__init__()
        self.conv1 = Conv(channels, filters, 1)
        self.bn1 = BatchNorm(filters)
        # The selective kernel ends in its own mixing, so no norm or ReLU follows it.
        self.conv2 = SelectiveKernel(filters, filters, stride) if sk else Conv(filters, filters, 3, stride)
        self.bn2 = None if sk else BatchNorm(filters)
        self.conv3 = Conv(filters, 4 * filters, 1)
        self.bn3 = BatchNorm(4 * filters, zero_gamma=zero_gamma)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] -> [N, 4 * filters, H', W']."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.conv2(self.bn1.with_relu(self.conv1(x)))
        if self.bn2 is not None:
            y = self.bn2.with_relu(y)
        return self.bn3.with_relu(self.conv3(y), shortcut)


class MaxPoolSame(nn.Module):
    """3x3 stride 2 as TensorFlow's SAME pads it: at even sizes one row below and one column to the right, at odd sizes
    one on each side. What is padded never counts."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, ceil(H / 2), ceil(W / 2)]."""
        # Unpadded, ceil_mode lets the last window of an even size reach one beyond the edge.
        return F.max_pool2d(x_NCHW, 3, 2, padding=(x_NCHW.shape[2] % 2, x_NCHW.shape[3] % 2), ceil_mode=True)


def base_channels(width: float) -> int:
    """Channels of the first stage: 64 * width, rounded to a multiple of 8, at least 8. The later have 2, 4, 8 times."""
    return max(8, 8 * round(8 * width))


class ResNet(nn.Module):
    """Images [N, 3, H, W], floating point -> features [N, out_channels]: the last map's mean over its positions.

    arch: depth. width: multiplies every channel count, the stem's too (see base_channels). selective_kernels: as in
    SimCLRv2 (arXiv 2006.10029), with the ResNet-D stem and shortcuts. cifar_stem: 3x3 stride 1 and no max-pool.
    checkpoint_blocks: keep the input of each block only, and compute the rest again in the backward pass.
    zero_gamma: the last BN of each block starts at 0. maxpool: "tf_same" is MaxPoolSame. project_first: a projection in
    the first block of the first group even where the shape stays. Input of a memory format gives maps of that format.
    Without selective_kernels and project_first the state is that of torchvision's networks, less `fc`.
    """

    def __init__(
        self,
        arch: Arch,
        *,
        width: float = 1.0,
        selective_kernels: bool = False,
        cifar_stem: bool = False,
        zero_gamma: bool = True,
        maxpool: Literal["torch", "tf_same"] = "torch",
        project_first: bool = False,
    ) -> None:
        super().__init__()
        block = Basic if arch in ("resnet18", "resnet34") else Bottleneck
        base = base_channels(width)
        self.conv1 = stem(base, selective_kernels, cifar_stem)
        self.bn1 = BatchNorm(base)
        pool = MaxPoolSame() if maxpool == "tf_same" else nn.MaxPool2d(3, 2, padding=1)
        self.maxpool = nn.Identity() if cifar_stem else pool
        channels = base
        groups: list[nn.Sequential] = []
        for index, depth in enumerate(DEPTHS[arch]):
            filters, stride = base * 2**index, 1 if index == 0 else 2
            out = filters * block.expansion
            blocks: list[nn.Module] = []
            for position in range(depth):
                step = stride if position == 0 else 1
                # Google projects in the first block of every group; torchvision only where the shape changes.
                project = position == 0 and (selective_kernels or project_first or step != 1 or channels != out)
                downsample = shortcut(channels, out, step, selective_kernels) if project else None
                blocks.append(block(channels, filters, step, downsample, selective_kernels, zero_gamma))
                channels = out
            groups.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = groups
        self.out_channels = channels
        self.checkpoint_blocks = False

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, out_channels]."""
        x: Tensor = self.maxpool(self.bn1.with_relu(self.conv1(x_NCHW)))
        again = self.checkpoint_blocks and self.training and torch.is_grad_enabled()
        for group in (self.layer1, self.layer2, self.layer3, self.layer4):
            for module in group if again else (group,):
                x = _twice(module, x) if again else module(x)
        return x.mean((2, 3))


def _twice(block: nn.Module, x: Tensor) -> Tensor:
    """The block's output, computed again in the backward pass: BN's running statistics follow the first of the two."""

    def contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        return contextlib.nullcontext(), statistics_of(None)

    y: Tensor = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    return y


def stem(base: int, selective_kernels: bool, cifar: bool) -> nn.Module:
    """The first convolutions without the last BN, [N, 3, H, W] -> [N, base, H', W']; H' = H (CIFAR) or ceil(H / 2)."""
    if cifar:
        return Conv(3, base, 3)
    if not selective_kernels:
        return Conv(3, base, 7, 2)
    half = base // 2
    return nn.Sequential(
        Conv(3, half, 3, 2),
        BatchNorm(half),
        nn.ReLU(inplace=True),
        Conv(half, half, 3),
        BatchNorm(half),
        nn.ReLU(inplace=True),
        Conv(half, base, 3),
    )


def shortcut(channels: int, out: int, stride: int, selective_kernels: bool) -> nn.Module:
    """1x1 and BN, after a pool in SK networks: [N, channels, H, W] -> [N, out, ceil(H / stride), ceil(W / stride)]."""
    if selective_kernels:
        return nn.Sequential(ShortcutPool(stride), Conv(channels, out, 1), BatchNorm(out))
    return nn.Sequential(Conv(channels, out, 1, stride), BatchNorm(out))
