"""`fastsimclr detect`: Faster R-CNN with FPN fine-tuned on boxes, scored by COCO's mean average precision."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsimclr.dense.coco import Annotations, Boxes, read_coco
from fastsimclr.dense.fit import fit
from fastsimclr.dense.networks import Body, detector
from fastsimclr.dense.task import FitConfig, Item, Task, read_image, split
from fastsimclr.deploy.files import need
from fastsimclr.loaders import DataError
from fastsimclr.runs.text import write_text


@dataclass(frozen=True, kw_only=True)
class DetectConfig(FitConfig):
    """Fine-tune Faster R-CNN with FPN from the encoder of a run. Defaults: Detectron2's schedule 1x on COCO."""

    annotations: str
    """COCO's instances_*.json of --images; its boxes alone are read."""
    val_annotations: str | None = None
    """The same of the validation images; none: a part of --annotations is held out."""
    val_images: str | None = None
    """Folder of the validation images; none: --images."""
    size: int = 800
    """To which the shorter side of an image is brought; the longer one is 5/3 of it at most."""
    regions: int = 512
    """Proposed regions of an image that train the box head."""
    warmup_steps: int = 1000
    """Steps in which the learning rate rises to its highest; at most a tenth of all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.val_images and not self.val_annotations:
            raise ValueError(f"--val_images={self.val_images} needs --val_annotations; give both or neither")


class _Detection(Task):
    def __init__(self, config: DetectConfig) -> None:
        super().__init__()
        need("fastsimclr detect", "dense", "pycocotools")
        read = read_coco(Path(config.annotations), Path(config.images))
        if config.val_annotations:
            val = read_coco(Path(config.val_annotations), Path(config.val_images or config.images))
            if val.categories != read.categories:
                raise DataError(
                    f"{config.val_annotations} has other categories than {config.annotations}; give the same"
                )
            training, self.val = read.images, val.images
        else:
            training, self.val = split(read.images, config.val_fraction, config.seed)
        self.categories = read.categories
        self.examples = [
            image for image in training if not all(image.crowd)
        ]  # an image without boxes has no loss of boxes
        if not self.examples or not self.val:
            raise DataError(
                f"{config.annotations}: {len(self.examples)} images with boxes to train on, {len(self.val)} to"
                " validate; it takes one each"
            )
        self._label = {category: label for label, category in enumerate(self.categories, 1)}
        self._warmup = config.warmup_steps
        torch.manual_seed(config.seed)
        body = Body(Path(config.run), config.init, config.norm)
        self.network = detector(body, len(self.categories), config.size, config.regions)

    def item(self, index: int, generator: torch.Generator) -> Item:
        image = self.examples[index]
        pixels, kept = _pixels(image), [place for place, crowd in enumerate(image.crowd) if not crowd]
        boxes = torch.tensor([image.boxes[place] for place in kept])
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2].clamp_(0, image.width)
        boxes[:, 1::2].clamp_(0, image.height)
        if torch.rand((), generator=generator) < 0.5:
            pixels = pixels.flip(2)
            boxes[:, 0::2] = image.width - boxes[:, [2, 0]]
        labels = torch.tensor([self._label[image.categories[place]] for place in kept])
        return pixels, {"boxes": boxes, "labels": labels}

    def loss(self, images: Sequence[Tensor], targets: Sequence[Any]) -> Tensor:
        losses = self.network(images, targets)
        return torch.stack(list(losses.values())).sum()

    def rate(self, step: int, total: int) -> float:
        """Detectron2's schedule_1x: linear warm-up from .001, a tenth after 2/3 of the steps, a hundredth after 8/9."""
        warmup = min(self._warmup, max(1, total // 10))
        drops = sum(step >= total * part for part in (2 / 3, 8 / 9))
        return float(0.1**drops * (0.001 + 0.999 * min(1, step / warmup)))

    @torch.inference_mode()
    def evaluate(self, device: torch.device, out: Path) -> dict[str, float]:
        self.network.eval()
        ids = list(self.categories)
        found: list[dict[str, Any]] = []
        for image in self.val:
            (seen,) = self.network([_pixels(image).to(device)])
            corners = seen["boxes"].cpu()
            sizes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1)
            for box, label, score in zip(sizes.tolist(), seen["labels"].tolist(), seen["scores"].tolist(), strict=True):
                found.append({"image_id": image.id, "category_id": ids[label - 1], "bbox": box, "score": score})
        write_text(out / "predictions.json", json.dumps(found) + "\n")
        return average_precision(Annotations(self.val, self.categories), found)

    def data_summary(self) -> dict[str, Any]:
        boxes = sum(len(image.boxes) for image in self.examples)
        return {
            "images": len(self.examples),
            "boxes": boxes,
            "val": len(self.val),
            "classes": list(self.categories.values()),
        }


def _pixels(image: Boxes) -> Tensor:
    pixels = read_image(image.path)
    if pixels.shape[1:] != (image.height, image.width):
        height, width = pixels.shape[1:]
        raise DataError(
            f"{image.path} is {width} x {height} px, its annotations say {image.width} x {image.height};"
            " repair one of them"
        )
    return pixels


def average_precision(truth: Annotations, detections: Sequence[dict[str, Any]]) -> dict[str, float]:
    """COCO's AP by pycocotools: `map` over IoU .5 to .95 and `map50` at .5, as parts of 1; 0 where nothing is found.

    detections: COCO's results: image_id, category_id, bbox [x, y, width, height], score. NaN where no box is true.
    """
    if not detections:
        return {"map": 0.0, "map50": 0.0}
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    entries = [
        {"image_id": image.id, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": int(crowd)}
        for image in truth.images
        for box, category, crowd in zip(image.boxes, image.categories, image.crowd, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": image.id, "width": image.width, "height": image.height} for image in truth.images],
            "categories": [{"id": key, "name": name} for key, name in truth.categories.items()],
            "annotations": [{"id": number, **entry} for number, entry in enumerate(entries, 1)],
        }
        coco.createIndex()
        scored = COCOeval(coco, coco.loadRes(list(detections)), "bbox")
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    values = [float(value) if value >= 0 else float("nan") for value in scored.stats[:2]]
    return {"map": values[0], "map50": values[1]}


def detect(config: DetectConfig) -> dict[str, Any]:
    """Fine-tune, evaluate and write out/result.json and out/predictions.json (COCO's results); returns the result."""
    return fit("detect", _Detection(config), config)
