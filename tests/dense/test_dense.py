"""Detection and segmentation learn made scenes from files in COCO's and VOC's form, score exactly, and go on."""

from __future__ import annotations

import json
import logging
import multiprocessing
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from PIL import Image, ImageDraw

from fastsimclr.cli.dense import add_dense, run_dense
from fastsimclr.dense.coco import Annotations, Boxes, read_coco
from fastsimclr.dense.detect import DetectConfig, _Detection, average_precision, detect
from fastsimclr.dense.fit import fit
from fastsimclr.dense.networks import Body, Segmenter, detector
from fastsimclr.dense.segment import SegmentConfig, _Segmentation, confusion, read_pairs, scores, segment
from fastsimclr.dense.task import FitConfig, Task, split
from fastsimclr.deploy.origin import open_run
from fastsimclr.deploy.weights import misfits
from fastsimclr.loaders import DataError
from fastsimclr.models import ModelConfig, build_encoder
from fastsimclr.runs import checkpoint
from fastsimclr.runs.stop import Stopped
from fastsimclr.stages.networks import load_encoder

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
        "epochs": 6,
        "batch": 2,
        "regions": 32,
        "lr": 0.1,
        "size": SIDE,
        "device": "cpu",
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
        "base": 2 * SIDE,
        "size": 2 * SIDE,
        "device": "cpu",
    }
    return SegmentConfig(**(options | changes))


def stop_after(monkeypatch: pytest.MonkeyPatch, task: type, last: int) -> None:
    """Sends SIGTERM in step `last`, counted from 1. Images are read by threads, which no signal ends."""
    plain = task.rate  # type: ignore[attr-defined]

    def rate(self: Any, step: int, total: int) -> float:
        if step == last - 1:
            assert not multiprocessing.active_children()
            signal.raise_signal(signal.SIGTERM)
        return float(plain(self, step, total))

    monkeypatch.setattr(task, "rate", rate)


@pytest.mark.slow
def test_detection_scores_what_it_writes(run: Path, scenes: Path, tmp_path: Path) -> None:
    result = detect(detection(run, scenes, tmp_path, epochs=1, batch=4, size=SIDE // 2, regions=8))
    assert json.loads((tmp_path / "result.json").read_text())["metrics"] == result["metrics"]
    found = json.loads((tmp_path / "predictions.json").read_text())
    assert found and {entry["image_id"] for entry in found} <= {10, 11, 12, 13}
    assert average_precision(read_coco(scenes / "boxes.json", scenes / "images"), found) == result["metrics"]


@pytest.mark.slow
def test_detection_learns_its_images(run: Path, scenes: Path, tmp_path: Path) -> None:
    metrics = detect(detection(run, scenes, tmp_path))["metrics"]
    assert metrics["map50"] > 0.7 and metrics["map"] > 0.2  # an untrained network: 0
    assert json.loads((tmp_path / "result.json").read_text())["metrics"] == metrics
    found = json.loads((tmp_path / "predictions.json").read_text())
    assert average_precision(read_coco(scenes / "boxes.json", scenes / "images"), found) == metrics
    swapped = [entry | {"category_id": 21 - entry["category_id"]} for entry in found]
    assert average_precision(read_coco(scenes / "boxes.json", scenes / "images"), swapped)["map50"] < 0.1


@pytest.mark.slow
def test_segmentation_learns_what_it_also_finds_in_a_new_image(
    run: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, _Segmentation, 5)
        with pytest.raises(Stopped, match="segment: stopped at step 5 of 24, state saved in "):
            segment(segmentation(run, scenes, tmp_path))
    result = segment(segmentation(run, scenes, tmp_path, resume="auto"))
    assert result["data"] == {"images": 3, "val": 1, "classes": 3}
    assert result["metrics"]["miou"] > 0.45  # background everywhere: below .3
    assert result["metrics"]["pixel_accuracy"] > 0.78


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_detector_and_the_segmenter_hold_the_body(run: Path) -> None:
    body = Body(run, "run", "auto")
    network = body.resnet()
    held = detector(body, 2, 64).state_dict()
    assert torch.equal(held["backbone.body.layer4.1.conv2.weight"], network.state_dict()["layer4.1.conv2.weight"])
    normalised = Segmenter(body, 3).fcn.backbone.state_dict()
    assert torch.equal(normalised["layer4.1.conv2.weight"], network.state_dict()["layer4.1.conv2.weight"])


def test_encoders_that_torchvision_lacks_are_refused(make_run: MakeRun, scenes: Path, tmp_path: Path) -> None:
    refused = ModelConfig(arch="resnet18", width=0.125, maxpool="tf_same", project_first=True)
    run = make_run("pretrain", refused)
    with pytest.raises(ValueError, match=r"does not fit torchvision: .*stem cifar.*width 0\.125") as error:
        segment(segmentation(run, scenes, tmp_path))
    said = str(error.value)
    assert "--format" not in said, "no option of detect and segment"
    remedy = {key: yaml.safe_load(value) for key, value in re.findall(r"--model\.(\w+) (\S+?)(?:,|$| and| to)", said)}
    assert set(remedy) == {"arch", "stem", "width", "selective_kernels", "maxpool", "project_first"}
    card = open_run(run, "cpu", None).network_and_card("encoder")[1]
    with torch.device("meta"):
        remedied = replace(refused, **remedy)
        assert misfits(build_encoder(remedied, 32), replace(card, config=remedied), "torchvision") == ([], [])


class Line(Task):
    """A task of a moment, whose loss draws from the global generator as torchvision's samplers of boxes do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network, self.examples = torch.nn.Linear(1, 1), range(7)

    def item(self, index: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        x = index / 7 + torch.rand(1, generator=generator)
        return x, 2 * x

    def loss(self, images: Sequence[torch.Tensor], targets: Sequence[Any]) -> torch.Tensor:
        pairs = zip(images, targets, strict=True)
        return torch.stack([(self.network(x) * torch.rand(()) - y) ** 2 for x, y in pairs]).mean()

    def rate(self, step: int, total: int) -> float:
        return 1 - step / total

    def evaluate(self, device: torch.device, out: Path) -> dict[str, float]:
        return {"slope": self.network.weight.item()}

    def data_summary(self) -> dict[str, Any]:
        return {}


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def line(out: str, **changes: Any) -> dict[str, Any]:
        options = {"batch": 2, "epochs": 3, "device": "cpu"} | changes  # three steps an epoch
        return fit("line", Line(), FitConfig(run="", images="", out=str(tmp_path / out), **options))

    whole, saved = line("whole"), tmp_path / "parts" / "checkpoints"
    with monkeypatch.context() as patch:
        stop_after(patch, Line, 5)  # the middle of an epoch
        with pytest.raises(Stopped, match="line: stopped at step 5 of 9") as stop:
            line("parts")
    assert stop.value.exit_code == 143 and not (tmp_path / "parts" / "result.json").exists()
    with pytest.raises(FileExistsError, match="--resume auto"):
        line("parts")
    with pytest.raises(ValueError, match=r"made with lr=0\.02, this run has lr=0\.1"):
        line("parts", lr=0.1, resume="auto")
    (path,) = saved.iterdir()
    state = torch.load(path, weights_only=True)
    assert 0 < state["trained_s"] < 1000
    torch.save(state | {"trained_s": 1000.0}, path)
    parts = line("parts", resume="auto")
    ends = [checkpoint.load(checkpoint.newest(tmp_path / out)) for out in ("whole", "parts")]
    assert ends[0]["objective"] == ends[1]["objective"] and ends[0]["optimizer"] == ends[1]["optimizer"]
    assert ends[0]["step"] == ends[1]["step"] == 9
    assert parts["training"] == whole["training"] and parts["metrics"] == whole["metrics"]
    assert 1000 < parts["seconds"] < 1100
    (tmp_path / "parts" / "result.json").unlink()  # as after a stop in the evaluation
    assert line("parts", resume="auto")["training"] == whole["training"] and whole["training"]["loss"] > 0
    assert line("more", workers=5)["training"] == whole["training"]


def test_a_run_that_ended_before_its_first_checkpoint_starts_anew(tmp_path: Path) -> None:
    config = FitConfig(run="", images="", out=str(tmp_path), batch=2, epochs=3, device="cpu")
    whole = fit("line", Line(), config)
    (tmp_path / "result.json").unlink()
    for path in (tmp_path / "checkpoints").iterdir():
        path.unlink()
    assert fit("line", Line(), config)["training"] == whole["training"]


def test_a_checkpoint_of_the_earlier_loop_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"step": 1, "settings": {}, "network": {}, "optimizer": {}, "seconds": 1.0, "loss": 1.0}, path)
    for resume in ("never", "auto"):
        with pytest.raises(checkpoint.CheckpointError, match=rf"{path} is of an earlier version.* another --out"):
            fit("line", Line(), FitConfig(run="", images="", out=str(tmp_path), resume=resume))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == [path]


def test_the_checkpoints_of_another_command_are_left_alone(tmp_path: Path) -> None:
    config = FitConfig(run="", images="", out=str(tmp_path), batch=2, epochs=1, device="cpu")
    fit("line", Line(), config)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match=r"already holds step-00000003\.pt"):
        fit("curve", Line(), config)
    with pytest.raises(checkpoint.CheckpointError, match="made with stage='line', this run has stage='curve'"):
        fit("curve", Line(), replace(config, resume="auto"))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["recipe.yaml", "checkpoints", "result.json"])
def test_a_folder_of_another_command_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    for resume in ("never", "auto"):
        with pytest.raises(FileExistsError, match=rf"holds {name}, but no checkpoint of line"):
            fit("line", Line(), FitConfig(run="", images="", out=str(tmp_path), resume=resume))  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_learning_rates() -> None:
    schedule = _Detection.__new__(_Detection)
    schedule._warmup = 50
    # Detectron2: from .001 of the rate to all of it; a tenth from step 60,000 of 90,000, a hundredth from 80,000.
    expected = {0: 0.001, 25: 0.5005, 50: 1, 599: 1, 600: 0.1, 799: 0.1, 800: 0.01, 899: 0.01}
    assert [schedule.rate(step, 900) for step in expected] == pytest.approx(list(expected.values()))
    assert schedule.rate(2, 30) == pytest.approx(0.001 + 0.999 * 2 / 3)  # a tenth of all steps at most
    poly = _Segmentation.__new__(_Segmentation)
    assert [poly.rate(step, 4) for step in (0, 2)] == pytest.approx([1, 0.5358867])


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
        (lambda c: c["annotations"][0].update(bbox=[5, 10, float("nan"), 20]), "reach out of their image"),
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


def test_boxes_without_area_are_left_out(scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """COCO's instances_train2017.json has two without height; what reaches out by a pixel may have none inside."""
    content = json.loads((scenes / "boxes.json").read_text())
    kept = len(content["annotations"])
    for box in (
        [26.65, 38.33, 1.03, 0.0],
        [-1, 5, 1, 10],
        [SIDE, 5, 1, 10],
        [5, SIDE - 0.001, 10, 1],
        [-1, 5, 1.5, 10],
    ):
        content["annotations"].append(content["annotations"][0] | {"bbox": box})
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        images = read_coco(tmp_path / "boxes.json", scenes / "images").images
    assert f"4 of {kept + 5} boxes have no area" in caplog.text
    assert sum(len(image.boxes) for image in images) == kept + 1 and images[0].boxes[-1] == [-1, 5, 1.5, 10]


def test_images_of_another_size_than_annotated_are_named(run: Path, scenes: Path, tmp_path: Path) -> None:
    content = json.loads((scenes / "boxes.json").read_text())
    for image in content["images"]:
        image["width"] = SIDE + 1
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"^\S+\.jpg is 64 x 64 px, its annotations say 65 x 64"):
        detect(detection(run, scenes, tmp_path / "out", annotations=str(tmp_path / "boxes.json"), val_annotations=None))


def test_masks_are_checked(run: Path, scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no PNG"):
        read_pairs(scenes / "images", tmp_path)
    with pytest.raises(DataError, match=r"has no image for 4 of 4 masks .*0\.png"):
        read_pairs(tmp_path, scenes / "masks")
    with pytest.raises(DataError, match="holds class 2, --classes=2; use 3 or more"):
        segment(segmentation(run, scenes, tmp_path, classes=2))
    (tmp_path / "val.txt").write_text("1\n\nnine lives \n")
    with pytest.raises(DataError, match="1 names have no mask: nine lives;"):
        segment(segmentation(run, scenes, tmp_path, val_list=str(tmp_path / "val.txt")))
    for image, said in [
        (Image.new("L", (SIDE, 9)), "is 64 x 9 px, its image .* 64 x 64"),
        (Image.new("RGB", (SIDE, SIDE)), "is of mode RGB"),
        (Image.new("L", (SIDE, SIDE)), "holds class 0 alone"),
    ]:
        image.save(tmp_path / "0.png")
        with pytest.raises(DataError, match=said):
            segment(segmentation(run, scenes, tmp_path, masks=str(tmp_path)))


def test_the_command_line(
    run: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--from", str(run), "--images", str(scenes / "images"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    more = ["--masks", str(scenes / "masks"), "--epochs", "1", "--batch", "3", "--size", "32", "--base", "64"]
    forward, seen = Segmenter.forward, []
    monkeypatch.setattr(Segmenter, "forward", lambda self, x: (seen.append(tuple(x.shape)), forward(self, x))[1])
    parser = ArgumentParser(exit_on_error=False)
    add_dense("segment", parser)
    run_dense("segment", parser.parse_args([*words, *more]))
    assert f"result: {tmp_path / 'out' / 'result.json'}\n" in capsys.readouterr().out
    assert seen == [(3, 3, 32, 32), (1, 3, 64, 64)]  # a crop in training, the whole image in validation
    with pytest.raises(checkpoint.CheckpointError, match=r"out is a run of segment, .*; give the run that it started"):
        open_run(tmp_path / "out", "cpu", None)
    for name in ("detect", "segment"):
        parser = ArgumentParser(exit_on_error=False)
        add_dense(name, parser)
        for option in parser.format_help().split("\n  --")[1:]:
            assert len(option.split()) > 4, f"no help: {option}"
    for changes, said in [
        ({"batch": 0}, "--batch=0"),
        ({"val_fraction": 1.0}, "--val_fraction=1.0"),
        ({"lr": 0}, "--lr=0"),
        ({"workers": 0}, "--workers=0"),
    ]:
        with pytest.raises(ValueError, match=said):
            segmentation(run, scenes, tmp_path, **changes)
    with pytest.raises(ValueError, match="--val_images=there needs --val_annotations"):
        detection(run, scenes, tmp_path, val_images="there", val_annotations=None)
    with pytest.raises(ValueError, match="--batch=9, but there are 3 training images"):
        segment(segmentation(run, scenes, tmp_path / "more", batch=9))
