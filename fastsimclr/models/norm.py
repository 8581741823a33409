"""Batch normalisation for feature maps and vectors, with a scale, and a shift that may be left out."""

# N images, C channels, H height, W width

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class BatchNorm(_BatchNorm):
    """y = (x - mean) / sqrt(var + 1e-5) * weight + bias over [N, C] or [N, C, H, W]; momentum 0.1 (Google's decay .9).

    One module serves the encoder and the heads. Statistics and parameters stay float32 under autocast, the output
    has the input's dtype and memory format. State names are torch's, so torch's and torchvision's states load.

    channels: C. bias: False leaves out the shift (last layer of the projection head). zero_gamma: the weight starts
    at 0, so that a residual block starts as its shortcut (Goyal et al. 2017, arXiv 1706.02677, section 5.1).
    Raises ValueError for an input of another rank, and, in training, for one value per channel.
    """

    def __init__(self, channels: int, *, bias: bool = True, zero_gamma: bool = False) -> None:
        super().__init__(channels, eps=1e-5, momentum=0.1)
        if not bias:
            self.register_parameter("bias", None)
        if zero_gamma:
            nn.init.zeros_(self.weight)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 4):
            raise ValueError(f"BatchNorm takes [N, C] or [N, C, H, W], not {list(input.shape)}; reshape the input")
