"""`fastsimclr segment`: FCN fine-tuned on masks of classes, scored by mean intersection over union."""

# H height, W width, K classes

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as T

from fastsimclr.dense.fit import fit
from fastsimclr.dense.networks import Body, Segmenter
from fastsimclr.dense.task import FitConfig, Item, Task, read_image, split
from fastsimclr.loaders import DataError

IGNORED = 255
_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
Pair = tuple[Path, Path]


@dataclass(frozen=True, kw_only=True)
class SegmentConfig(FitConfig):
    """Fine-tune FCN from the encoder of a run. Defaults: torchvision's references/segmentation/train.py."""

    masks: str
    """Folder of PNGs NAME.png for images NAME.jpg or .png: class indices as grey or palette; 255 is left out."""
    val_list: str | None = None
    """Text file with the names of the validation images, one a line without ending (VOC's ImageSets); none: a part is
    held out."""
    classes: int = 0
    """Number of classes, the background's among them; 0: one more than the highest index in the masks."""
    base: int = 520
    """Shorter side to which images are brought: in validation this, in training .5 to 2 times as much."""
    size: int = 480
    """Side of the training crops."""
    epochs: int = 30
    """Passes over the training images."""
    lr: float = 0.01
    """Learning rate for 16 images; scaled by batch / 16 (arXiv 1706.02677)."""


class _Segmentation(Task):
    def __init__(self, config: SegmentConfig) -> None:
        super().__init__()
        pairs = read_pairs(Path(config.images), Path(config.masks))
        highest = max(_checked(pair) for pair in pairs)
        if config.classes and highest >= config.classes:
            raise DataError(
                f"{config.masks} holds class {highest}, --classes={config.classes}; use {highest + 1} or more"
            )
        self.classes, self.base, self.size = config.classes or highest + 1, config.base, config.size
        if self.classes < 2:
            raise DataError(
                f"{config.masks} holds class 0 alone; masks are PNGs of class indices, 255 for what is left out"
            )
        if config.val_list:
            self.examples, self.val = _listed(pairs, Path(config.val_list))
        else:
            self.examples, self.val = split(pairs, config.val_fraction, config.seed)
        if not self.examples or not self.val:
            raise DataError(
                f"{config.masks}: {len(self.examples)} images to train on, {len(self.val)} to validate;"
                " it takes one each"
            )
        torch.manual_seed(config.seed)
        self.network = Segmenter(Body(Path(config.run), config.init, config.norm), self.classes)

    def item(self, index: int, generator: torch.Generator) -> Item:
        """RandomResize, flip and RandomCrop as in torchvision's references; what is padded is grey and left out."""
        image_CHW, mask_HW = read_image(self.examples[index][0]), _mask(self.examples[index][1])
        first, flip, down, right = torch.rand(4, generator=generator).tolist()
        side = round(self.base * (0.5 + 1.5 * first))
        image_CHW = T.resize(image_CHW, [side], antialias=True)
        mask_HW = F.interpolate(mask_HW[None, None].float(), image_CHW.shape[1:], mode="nearest-exact")[0, 0].long()
        if flip < 0.5:
            image_CHW, mask_HW = image_CHW.flip(2), mask_HW.flip(1)
        height, width = (max(0, self.size - length) for length in mask_HW.shape)
        image_CHW = F.pad(image_CHW, (0, width, 0, height), value=0.5)
        mask_HW = F.pad(mask_HW, (0, width, 0, height), value=IGNORED)
        top, left = (int(part * (n - self.size + 1)) for part, n in zip((down, right), mask_HW.shape, strict=True))
        cut = (slice(top, top + self.size), slice(left, left + self.size))
        return image_CHW[:, cut[0], cut[1]], mask_HW[cut]

    def loss(self, images: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Cross-entropy per pixel; 0 where every pixel is left out."""
        logits, masks = self.network(torch.stack(list(images))), torch.stack(list(targets))
        summed = F.cross_entropy(logits, masks, ignore_index=IGNORED, reduction="sum")
        return summed / (masks != IGNORED).sum().clamp(min=1)

    def rate(self, step: int, total: int) -> float:
        """The "poly" schedule of DeepLab (arXiv 1606.00915, section 4.1.2)."""
        return float((1 - step / total) ** 0.9)

    @torch.inference_mode()
    def evaluate(self, device: torch.device, out: Path) -> dict[str, float]:
        self.network.eval()
        confusion_KK = torch.zeros(self.classes, self.classes, dtype=torch.int64)
        for pair in self.val:
            mask_HW = _mask(pair[1])
            logits = self.network(T.resize(read_image(pair[0]), [self.base], antialias=True)[None].to(device))
            found_HW = F.interpolate(logits, mask_HW.shape, mode="bilinear").argmax(1)[0].cpu()
            confusion_KK += confusion(mask_HW, found_HW, self.classes)
        return scores(confusion_KK)

    def data_summary(self) -> dict[str, Any]:
        return {"images": len(self.examples), "val": len(self.val), "classes": self.classes}


def confusion(mask_HW: Tensor, found_HW: Tensor, classes: int) -> Tensor:
    """Pixels of each true (row) and found (column) class, int64 [K, K]; those of class 255 are left out."""
    kept = mask_HW != IGNORED
    return torch.bincount(mask_HW[kept] * classes + found_HW[kept], minlength=classes**2).view(classes, classes)


def scores(confusion_KK: Tensor) -> dict[str, float]:
    """`miou`: the mean over classes of hits / (hits + misses + false alarms), classes seen nowhere left out;
    `pixel_accuracy`: hits of all pixels."""
    counts_KK = confusion_KK.double()
    hits_K = counts_KK.diagonal()
    union_K = counts_KK.sum(0) + counts_KK.sum(1) - hits_K
    seen_K = union_K > 0
    return {
        "miou": (hits_K[seen_K] / union_K[seen_K]).mean().item(),
        "pixel_accuracy": (hits_K.sum() / counts_KK.sum()).item(),
    }


def read_pairs(images: Path, masks: Path) -> list[Pair]:
    """(image, mask) for every mask, sorted by name. DataError for no mask, or masks without an image."""
    found = sorted(masks.glob("*.png")) if masks.is_dir() else []
    if not found:
        raise DataError(f"{masks} holds no PNG; give the folder of masks NAME.png for images NAME.jpg or NAME.png")
    pairs, missing = [], []
    for mask in found:
        image = next((p for s in _SUFFIXES if (p := images / (mask.stem + s)).is_file()), None)
        if image is None:
            missing.append(mask.name)
        else:
            pairs.append((image, mask))
    if missing:
        some = ", ".join(missing[:3])
        raise DataError(f"{images} has no image for {len(missing)} of {len(found)} masks in {masks}: {some}; give both")
    return pairs


def _listed(pairs: Sequence[Pair], path: Path) -> tuple[list[Pair], list[Pair]]:
    try:
        names = {name for line in path.read_text().splitlines() if (name := line.strip())}
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); give a text file with one name a line") from error
    if missing := sorted(names - {mask.stem for _, mask in pairs}):
        raise DataError(f"{path}: {len(missing)} names have no mask: {', '.join(missing[:3])}; give names of masks")
    return [pair for pair in pairs if pair[1].stem not in names], [pair for pair in pairs if pair[1].stem in names]


def _mask(path: Path) -> Tensor:
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L"):
                raise DataError(f"{path} is of mode {image.mode}; masks hold a class index a pixel, as grey or palette")
            return torch.from_numpy(np.array(image)).long()
    except OSError as error:
        raise DataError(f"{path} cannot be read as an image ({error}); repair it or take it out") from error


def _checked(pair: Pair) -> int:
    """The highest class of a mask, -1 for none. DataError where its size is not that of its image."""
    mask_HW = _mask(pair[1])
    with Image.open(pair[0]) as image:
        if image.size != (mask_HW.shape[1], mask_HW.shape[0]):
            raise DataError(
                f"{pair[1]} is {mask_HW.shape[1]} x {mask_HW.shape[0]} px, its image {pair[0]}"
                f" {image.width} x {image.height}; give masks of the images' size"
            )
    kept = mask_HW[mask_HW != IGNORED]
    return int(kept.max()) if len(kept) else -1


def segment(config: SegmentConfig) -> dict[str, Any]:
    """Fine-tune, evaluate and write out/result.json; returns the result."""
    return fit("segment", _Segmentation(config), config)
