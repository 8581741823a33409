"""torchvision's Faster R-CNN with FPN (arXiv 1612.03144) and FCN (arXiv 1411.4038) on the encoder of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.segmentation import FCN
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from fastsimclr.deploy.origin import open_run
from fastsimclr.deploy.weights import torchvision_state
from fastsimclr.models import ResNet

Init = Literal["run", "random"]
Norm = Literal["auto", "frozen", "batch"]
_REMEDY = (
    "pretrain an encoder with --model.arch resnet18 to resnet152, --model.stem imagenet, --model.width 1,"
    " --model.selective_kernels false, --model.maxpool torch and --model.project_first false"
)


class Body:
    """The encoder of run folder or checkpoint `run` as torchvision's ResNet, and how images enter it.

    init: random keeps the architecture and starts its weights anew, for a baseline. norm: frozen keeps statistics and
    affine parameters as they are (FrozenBatchNorm2d), batch trains them; auto: frozen with init run, batch with random;
    to compare the two, give both the same.
    mean, std: of the run's own views. ValueError where torchvision has no such ResNet, with every reason.
    """

    def __init__(self, run: Path, init: Init, norm: Norm) -> None:
        origin = open_run(run, "cpu", None)
        encoder, card = origin.network_and_card("encoder")
        assert isinstance(encoder, ResNet)
        state = torchvision_state(encoder, card, str(run), remedy=_REMEDY)
        self.arch, self.basic = card.config.arch, card.config.arch in ("resnet18", "resnet34")
        self.norm = norm if norm != "auto" else "frozen" if init == "run" else "batch"
        self.mean: list[float] = card.preprocessing["mean"] or [0.0] * 3
        self.std: list[float] = card.preprocessing["std"] or [1.0] * 3
        self._state = state if init == "run" else None

    def resnet(self, dilated: bool = False) -> nn.Module:
        """The network without its classifier; dilated: stride 8 instead of 32, which basic blocks lack in torchvision.

        Random weights: He's initial values, the last BN of each block 0.
        """
        options: dict[str, Any] = {"norm_layer": FrozenBatchNorm2d} if self.norm == "frozen" else {}
        if dilated and not self.basic:
            options["replace_stride_with_dilation"] = [False, True, True]
        zero = self._state is None and self.norm == "batch"
        network: nn.Module = getattr(torchvision.models, self.arch)(zero_init_residual=zero, **options)
        network.fc = nn.Identity()
        if self._state is not None:
            network.load_state_dict(self._state)
        return network


def detector(body: Body, classes: int, size: int, regions: int = 512) -> nn.Module:
    """Faster R-CNN with FPN. Training: (images, targets) -> losses; evaluation: images -> boxes, labels and scores.

    classes: without the background. size: to which the shorter side of an image is brought, the longer one at most 5/3
    of it (800 and 1333 in torchvision, Detectron2 and most papers). regions: of an image that train the box head.
    """
    features = 512 if body.basic else 2048
    layers = {f"layer{index + 1}": str(index) for index in range(4)}
    channels = [features // 2**index for index in (3, 2, 1, 0)]
    backbone = BackboneWithFPN(body.resnet(), layers, channels, 256, LastLevelMaxPool())
    network: nn.Module = FasterRCNN(
        backbone,
        classes + 1,
        min_size=size,
        max_size=round(size * 5 / 3),
        image_mean=body.mean,
        image_std=body.std,
        box_batch_size_per_image=regions,
    )
    return network


class Segmenter(nn.Module):
    """FCN: images [N, 3, H, W] in [0, 1] -> logits [N, classes, H, W]. Stride 8 with bottlenecks, 32 without."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, body: Body, classes: int) -> None:
        super().__init__()
        backbone = IntermediateLayerGetter(body.resnet(dilated=True), {"layer4": "out"})
        self.fcn = FCN(backbone, FCNHead(512 if body.basic else 2048, classes))
        self.register_buffer("mean", torch.tensor(body.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(body.std).view(1, 3, 1, 1))

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Logits [N, classes, H, W]."""
        logits: torch.Tensor = self.fcn((images_NCHW - self.mean) / self.std)["out"]
        return logits
