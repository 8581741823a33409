"""What stands on the encoder: the projection head of the contrastive loss, and the linear classifier."""

# N images, C encoder channels, D projection dimension, K classes

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fastsimclr.models.norm import BatchNorm


class Dense(nn.Linear):
    """A linear map whose weight starts as N(0, 0.01) and whose bias, if any, starts at 0 (Google's model_util.py)."""

    def reset_parameters(self) -> None:
        """Draws the weight anew from torch's global generator."""
        nn.init.normal_(self.weight, std=0.01)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class HeadLayer(nn.Module):
    """Dense without bias, then BN with shift and ReLU; the last layer of a head has neither shift nor ReLU."""

    def __init__(self, in_features: int, out_features: int, last: bool) -> None:
        super().__init__()
        self.last = last
        self.dense = Dense(in_features, out_features, bias=False)
        self.bn = BatchNorm(out_features, bias=not last)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_features] -> [N, out_features]."""
        y: Tensor = self.bn(self.dense(x))
        return y if self.last else F.relu(y, inplace=True)


class ProjectionHead(nn.Module):
    """g(h) of SimCLR: `layers` dense layers with BN, hidden width that of h. Chen et al. 2020, 2006.10029, section 3.

    in_features: C. layers: 0 (z = h) to any number. out_features: D, the width of the last layer.
    """

    def __init__(self, in_features: int, layers: int, out_features: int = 128) -> None:
        super().__init__()
        self.in_features = in_features
        self.layers = nn.ModuleList(
            HeadLayer(in_features, out_features if last else in_features, last)
            for last in (index == layers - 1 for index in range(layers))
        )

    @property
    def out_features(self) -> int:
        """D, or C where the head has no layer."""
        return self.width_at(len(self.layers))

    def width_at(self, layer: int) -> int:
        """Features after `layer` layers; ValueError where there are not so many."""
        if not 0 <= layer <= len(self.layers):
            raise ValueError(f"head layer={layer} is not in 0..{len(self.layers)}, the layers of this head; choose one")
        if layer == 0:
            return self.in_features
        dense = self.layers[layer - 1].get_submodule("dense")
        assert isinstance(dense, Dense)
        return dense.out_features

    def forward(self, h_NC: Tensor) -> Tensor:
        """[N, C] -> [N, D]."""
        return self.forward_to(h_NC, len(self.layers))

    def forward_to(self, h_NC: Tensor, layer: int) -> Tensor:
        """[N, C] -> [N, width_at(layer)]: h for 0, else the output of that layer (after its ReLU, if it has one)."""
        self.width_at(layer)
        y = h_NC
        for module in self.layers[:layer]:
            y = module(y)
        return y

    def truncated(self, layer: int) -> ProjectionHead:
        """A head of the first `layer` layers, which it shares with this one: where fine-tuning starts from."""
        self.width_at(layer)
        head = ProjectionHead(self.in_features, 0)
        head.layers.extend(self.layers[:layer])
        return head


class Classifier(Dense):
    """Logits [N, K] of features [N, in_features], with bias.

    init: "zero" starts weight and bias at 0 (linear evaluation, fine-tuning: Google's zero_init_logits_layer),
    "normal" the weight at N(0, 0.01) (supervised training from scratch).
    """

    def __init__(self, in_features: int, classes: int, init: Literal["zero", "normal"] = "zero") -> None:
        super().__init__(in_features, classes)
        if init == "zero":
            nn.init.zeros_(self.weight)
