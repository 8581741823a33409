"""Detection and segmentation learn made scenes from files in COCO's and VOC's form, score exactly, and go on."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image, ImageDraw

from fastsimclr.dense.coco import Annotations, Boxes, read_coco
from fastsimclr.dense.command import add_dense, run_dense
from fastsimclr.dense.detect import DetectConfig, average_precision, detect
from fastsimclr.dense.fit import split
from fastsimclr.dense.networks import Body, Segmenter, detector
from fastsimclr.dense.segment import SegmentConfig, confusion, read_pairs, scores, segment
from fastsimclr.loaders import DataError
from fastsimclr.models import ModelConfig
from fastsimclr.stages.networks import load_encoder
from fastsimclr.stopping import StopFlag, Stopped

MakeRun = Callable[..., Path]
SIDE, KINDS = 64, ("square", "disc")


@pytest.fixture(scope="module")
def run(make_run: MakeRun) -> Path:
    """A pretraining run of the smallest encoder that torchvision has."""
    return make_run("pretrain", ModelConfig(arch="resnet18"), 64)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/N.jpg, noise with a red square and a blue disc; masks/N.png (0, 1, 2; outlines 255); boxes.json."""
    root = tmp_path_factory.mktemp("scenes")
    (root / "images").mkdir()
    (root / "masks").mkdir()
    generator = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(4):
        noise = generator.integers(60, 200, (SIDE // 8, SIDE // 8, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        mask = Image.new("P", image.size)
        mask.putpalette(list(range(256)) * 3)  # a shorter one has fewer bits a pixel, which cut 255
        for kind, colour, left in ((1, (230, 20, 20), 2), (2, (20, 20, 230), 34)):
            side = int(generator.integers(20, 27))
            x, y = left + int(generator.integers(0, 28 - side)), int(generator.integers(2, SIDE - side - 2))
            corners = (x, y, x + side - 1, y + side - 1)
            for canvas, fill, line in ((image, colour, colour), (mask, kind, 255)):
                draw = ImageDraw.Draw(canvas)
                (draw.rectangle if kind == 1 else draw.ellipse)(corners, fill=fill, outline=line)
            box = {"image_id": 10 + number, "category_id": 7 * kind, "bbox": [x, y, side, side], "iscrowd": 0}
            annotations.append(box | {"id": len(annotations) + 1, "area": side**2})
        image.save(root / "images" / f"{number}.jpg", quality=95)
        mask.save(root / "masks" / f"{number}.png")
        images.append({"id": 10 + number, "file_name": f"{number}.jpg", "width": SIDE, "height": SIDE})
    categories = [{"id": 14, "name": "disc"}, {"id": 7, "name": "square"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "boxes.json").write_text(json.dumps(content))
    return root


def detection(run: Path, scenes: Path, out: Path, **changes: Any) -> DetectConfig:
    options: dict[str, Any] = {
        "run": str(run),
        "images": str(scenes / "images"),
        "annotations": str(scenes / "boxes.json"),
        "val_annotations": str(scenes / "boxes.json"),
        "out": str(out),
        "init": "random",
        "epochs": 12,
        "batch": 2,
        "regions": 32,
        "lr": 0.05,
        "size": SIDE,
        "device": "cpu",
        "workers": 0,
    }
    return DetectConfig(**(options | changes))


def segmentation(run: Path, scenes: Path, out: Path, **changes: Any) -> SegmentConfig:
    options: dict[str, Any] = {
        "run": str(run),
        "images": str(scenes / "images"),
        "masks": str(scenes / "masks"),
        "out": str(out),
        "init": "random",
        "epochs": 24,
        "batch": 3,
        "lr": 0.4,
        "size": 2 * SIDE,
        "device": "cpu",
        "workers": 0,
    }
    return SegmentConfig(**(options | changes))


def test_detection_learns_its_images(run: Path, scenes: Path, tmp_path: Path) -> None:
    metrics = detect(detection(run, scenes, tmp_path))["metrics"]
    assert metrics["map50"] > 0.7 and metrics["map"] > 0.2  # an untrained network: 0
    assert json.loads((tmp_path / "result.json").read_text())["metrics"] == metrics
    found = json.loads((tmp_path / "predictions.json").read_text())
    assert average_precision(read_coco(scenes / "boxes.json", scenes / "images"), found) == metrics
    swapped = [entry | {"category_id": 21 - entry["category_id"]} for entry in found]
    assert average_precision(read_coco(scenes / "boxes.json", scenes / "images"), swapped)["map50"] < 0.1


def test_segmentation_learns_what_it_also_finds_in_a_new_image(run: Path, scenes: Path, tmp_path: Path) -> None:
    result = segment(segmentation(run, scenes, tmp_path))
    assert result["data"] == {"images": 3, "val": 1, "classes": 3}
    assert result["metrics"]["miou"] > 0.45  # background everywhere: below .3
    assert result["metrics"]["pixel_accuracy"] > 0.78


@torch.no_grad()
def test_the_body_is_the_encoder_of_the_run_and_its_norms_are_frozen(run: Path) -> None:
    body = Body(run, "run", "auto")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = load_encoder(run)[0].eval()(images)
    network = body.resnet().train()  # frozen: training changes nothing
    assert (network(images) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not [name for name, _ in network.named_parameters() if "bn" in name]
    assert body.mean == [0.485, 0.456, 0.406]
    trained = Body(run, "run", "batch").resnet().train()
    assert (trained(images) - expected).abs().max() > 1e-2 * expected.abs().max()
    fresh = Body(run, "random", "auto").resnet().state_dict()
    assert not torch.equal(fresh["conv1.weight"], network.state_dict()["conv1.weight"])
    assert "bn1.num_batches_tracked" in fresh
    held = detector(body, 2, 64).state_dict()
    assert torch.equal(held["backbone.body.layer4.1.conv2.weight"], network.state_dict()["layer4.1.conv2.weight"])
    normalised = Segmenter(body, 3).fcn.backbone.state_dict()
    assert torch.equal(normalised["layer4.1.conv2.weight"], network.state_dict()["layer4.1.conv2.weight"])


def test_encoders_that_torchvision_lacks_are_refused(make_run: MakeRun, scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not fit torchvision: .*stem cifar.*width 0\.125"):
        segment(segmentation(make_run("pretrain"), scenes, tmp_path))


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(
    run: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"epochs": 3, "size": 32, "lr": 0.05}
    segment(segmentation(run, scenes, tmp_path / "whole", **short))
    with monkeypatch.context() as patch:
        patch.setattr(
            StopFlag, "signum", property(lambda flag: signal.SIGTERM, lambda flag, value: None), raising=False
        )
        with pytest.raises(Stopped, match="is of step 1 of 3") as stop:
            segment(segmentation(run, scenes, tmp_path / "parts", **short))
    assert stop.value.exit_code == 143 and not (tmp_path / "parts" / "result.json").exists()
    with pytest.raises(FileExistsError, match="--resume auto"):
        segment(segmentation(run, scenes, tmp_path / "parts", **short))
    with pytest.raises(ValueError, match=r"--lr 0\.05 -> 0\.1"):
        segment(segmentation(run, scenes, tmp_path / "parts", **short | {"lr": 0.1, "resume": "auto"}))
    segment(segmentation(run, scenes, tmp_path / "parts", **short, resume="auto"))
    whole, parts = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["network"] for name in ("whole", "parts")
    )
    assert all(torch.equal(value, whole[name]) for name, value in parts.items())


def test_average_precision_and_overlap_by_hand() -> None:
    image = Boxes(3, Path("a"), 100, 100, [[10, 10, 40, 40], [60, 60, 20, 20]], [5, 5], [False, False])
    truth = Annotations([image], {5: "thing"})
    right = {"image_id": 3, "category_id": 5, "bbox": [10, 10, 40, 40], "score": 0.9}
    # 40 x 30 of 40 x 40 is an overlap of .75: a hit at .5, .55, ... .75, which is 6 of the 10 thresholds.
    short = right | {"bbox": [10, 10, 40, 30]}
    both = [right, {"image_id": 3, "category_id": 5, "bbox": [60, 60, 20, 20], "score": 0.8}]
    assert average_precision(truth, both) == pytest.approx({"map": 1, "map50": 1})
    half = 51 / 101  # one of two boxes: precision 1 at the recalls 0, .01, ... .5 of the 101 that COCO asks at
    assert average_precision(truth, [right]) == pytest.approx({"map": half, "map50": half})
    assert average_precision(truth, [short]) == pytest.approx({"map": 0.6 * half, "map50": half})
    assert average_precision(truth, []) == {"map": 0, "map50": 0}
    mask, found = torch.tensor([[0, 0, 1], [1, 255, 1]]), torch.tensor([[0, 1, 1], [1, 2, 0]])
    counts = confusion(mask, found, 4)
    assert counts.sum() == 5 and counts[0, 1] == 1 and counts[1, 0] == 1 and counts[1, 1] == 2
    assert scores(counts) == pytest.approx({"miou": (1 / 3 + 2 / 4) / 2, "pixel_accuracy": 3 / 5})


def test_a_split_is_whole_and_repeats() -> None:
    training, held = split(range(10), 0.3, 1)
    assert len(held) == 3 and sorted(training + held) == list(range(10)) and split(range(10), 0.3, 1)[1] == held
    assert len(split(range(3), 0.001, 0)[1]) == 1 and len(split(range(2), 0.99, 0)[0]) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["images"][1].update(file_name="none.jpg"), r"1 images are not in .*: none\.jpg"),
        (lambda c: c["annotations"][0].update(bbox=[50, 10, 20, 20]), r"reach out of their image.*0\.jpg \[50"),
        (lambda c: c["annotations"][0].update(bbox=[5, 10, 0, 20]), "are empty"),
        (lambda c: c["annotations"][0].update(image_id=99), "name no image"),
        (lambda c: c["annotations"][0].update(category_id=99), "name no category"),
        (lambda c: c["images"].append(c["images"][0]), "1 image ids stand twice"),
        (lambda c: c.pop("categories"), "is no COCO annotation file"),
    ],
)
def test_annotations_are_checked(scenes: Path, tmp_path: Path, change: Callable[[Any], Any], said: str) -> None:
    content = json.loads((scenes / "boxes.json").read_text())
    change(content)
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=said) as error:
        read_coco(tmp_path / "boxes.json", scenes / "images")
    assert str(tmp_path / "boxes.json") in str(error.value)


def test_images_of_another_size_than_annotated_are_named(run: Path, scenes: Path, tmp_path: Path) -> None:
    content = json.loads((scenes / "boxes.json").read_text())
    for image in content["images"]:
        image["width"] = SIDE + 1
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"\.jpg is 64 x 64 px, its annotations say 65 x 64"):
        detect(detection(run, scenes, tmp_path / "out", annotations=str(tmp_path / "boxes.json"), val_annotations=None))


def test_masks_are_checked(run: Path, scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no PNG"):
        read_pairs(scenes / "images", tmp_path)
    with pytest.raises(DataError, match=r"has no image for 4 of 4 masks .*0\.png"):
        read_pairs(tmp_path, scenes / "masks")
    with pytest.raises(DataError, match="holds class 2, --classes=2; use 3 or more"):
        segment(segmentation(run, scenes, tmp_path, classes=2))
    (tmp_path / "val.txt").write_text("1\nnine\n")
    with pytest.raises(DataError, match="1 names have no mask: nine"):
        segment(segmentation(run, scenes, tmp_path, val_list=str(tmp_path / "val.txt")))
    for image, said in [
        (Image.new("L", (SIDE, 9)), "is 64 x 9 px, its image .* 64 x 64"),
        (Image.new("RGB", (SIDE, SIDE)), "is of mode RGB"),
        (Image.new("L", (SIDE, SIDE)), "holds class 0 alone"),
    ]:
        image.save(tmp_path / "0.png")
        with pytest.raises(DataError, match=said):
            segment(segmentation(run, scenes, tmp_path, masks=str(tmp_path)))


def test_the_command_line(run: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--from", str(run), "--images", str(scenes / "images"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    more = ["--masks", str(scenes / "masks"), "--epochs", "1", "--batch", "3", "--size", "32", "--workers", "0"]
    parser = ArgumentParser(exit_on_error=False)
    add_dense("segment", parser)
    run_dense("segment", parser.parse_args([*words, *more]))
    assert f"result: {tmp_path / 'out' / 'result.json'}\n" in capsys.readouterr().out
    for name in ("detect", "segment"):
        parser = ArgumentParser(exit_on_error=False)
        add_dense(name, parser)
        for option in parser.format_help().split("\n  --")[1:]:
            assert len(option.split()) > 4, f"no help: {option}"
    for changes, said in [
        ({"batch": 0}, "--batch=0"),
        ({"val_fraction": 1.0}, "--val_fraction=1.0"),
        ({"lr": 0}, "--lr=0"),
    ]:
        with pytest.raises(ValueError, match=said):
            segmentation(run, scenes, tmp_path, **changes)
    with pytest.raises(ValueError, match="--batch=9, but there are 3 training images"):
        segment(segmentation(run, scenes, tmp_path / "more", batch=9))
