"""Convolutions with Google's initial values, and the selective kernel (Li et al. 2019, arXiv 1903.06586)."""

# N images, C input channels, F filters, S two streams, H height, W width

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsimclr.models.norm import BatchNorm

SK_RATIO = 0.0625
# Standard deviation of a unit normal cut at two deviations; TensorFlow divides by it so that the variance is kept.
TRUNCATED_STD = 0.87962566103423978


class Conv(nn.Conv2d):
    """A square convolution without bias, padded like torchvision's, [N, C, H, W] -> [N, F, ceil(H/s), ceil(W/s)].

    Initial values: a normal cut at two deviations, variance 1 / fan-in (TensorFlow's VarianceScaling(1), not He).
    """

    def __init__(self, channels: int, filters: int, kernel: int, stride: int = 1) -> None:
        super().__init__(channels, filters, kernel, stride, padding=kernel // 2, bias=False)

    def reset_parameters(self) -> None:
        """Draws the weight anew from torch's global generator."""
        std = math.sqrt(1 / self.weight[0].numel()) / TRUNCATED_STD
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)


class ShortcutPool(nn.Module):
    """The 2x2 mean before a projection shortcut (ResNet-D, He et al. 2019, arXiv 1812.01187), as Google pads it.

    Stride 2 counts a zero row and column at odd sizes. Stride 1 keeps the size (TensorFlow's SAME): the last row and
    column are means of what lies inside the map.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, ceil(H / stride), ceil(W / stride)]."""
        if self.stride == 1:
            # torch pads both sides; the first row and column are those of the side that SAME does not pad.
            return F.avg_pool2d(x_NCHW, 2, 1, padding=1, count_include_pad=False)[:, :, 1:, 1:]
        return F.avg_pool2d(x_NCHW, 2, self.stride, ceil_mode=True, divisor_override=4)


class SelectiveKernel(nn.Module):
    """A 3x3 convolution to two streams of F filters, mixed per image and filter by a softmax over the streams.

    u = relu(bn(conv(x))) in halves u_0, u_1;  s = mean_HW(u_0 + u_1);  m = expand(relu(bn(reduce(s))));
    y = sum_i softmax_i(m_0, m_1) u_i. The squeezed width is max(int(F / 16), 32). No biases but BN's.
    """

    def __init__(self, channels: int, filters: int, stride: int = 1) -> None:
        super().__init__()
        squeezed = max(int(filters * SK_RATIO), 32)
        self.conv = Conv(channels, 2 * filters, 3, stride)
        self.bn = BatchNorm(2 * filters)
        self.reduce = Conv(filters, squeezed, 1)
        self.reduce_bn = BatchNorm(squeezed)
        self.expand = Conv(squeezed, 2 * filters, 1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, F, ceil(H / stride), ceil(W / stride)]."""
        u_NCHW = F.relu(self.bn(self.conv(x_NCHW)), inplace=True)
        # The mean of the sum is the sum of the means: the two maps need not be added.
        mean0_NF11, mean1_NF11 = u_NCHW.mean((2, 3), keepdim=True).chunk(2, 1)
        m_NC11 = self.expand(F.relu(self.reduce_bn(self.reduce(mean0_NF11 + mean1_NF11)), inplace=True))
        m0_NF11, m1_NF11 = m_NC11.chunk(2, 1)
        u0_NFHW, u1_NFHW = u_NCHW.chunk(2, 1)
        # A softmax over two is the sigmoid of their difference; then the weighted sum is one interpolation.
        return torch.lerp(u1_NFHW, u0_NFHW, torch.sigmoid(m0_NF11 - m1_NF11))
