"""Folders for timm and Hugging Face give the logits of our own evaluation, and say how an image becomes the input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from fastsimclr.deploy import load_pretrained
from fastsimclr.deploy.export import ExportConfig, export
from fastsimclr.deploy.images import open_images
from fastsimclr.deploy.weights import torchvision_state
from fastsimclr.evaluation.features import extract
from fastsimclr.loaders import DataConfig, EvalLoader
from fastsimclr.models import ModelConfig, build_classifier
from fastsimclr.recipe import parse_recipe
from fastsimclr.stages import Setting
from fastsimclr.stages.networks import load_classifier, load_encoder

MakeRun = Callable[..., Path]
CLASSES = ("cat, tabby", 'dog "x"', "new\nline", "ä", "e")
EIGHTH = ModelConfig(arch="resnet18", width=0.125)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three smooth PNGs of several sizes."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for index, side in enumerate([(144, 96), (160, 200), (144, 144)]):
        coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize(side, Image.Resampling.BICUBIC).save(root / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def wide(make_run: MakeRun) -> Path:
    """A classifier that every library has: ResNet-18 of width 1, 56 px."""
    return make_run("distill", ModelConfig(arch="resnet18"), 56, CLASSES)


def views(run: Path, photos: Path) -> Tensor:
    """The evaluation views of a run, [3, 3, S, S], normalised."""
    setting = Setting(parse_recipe((run / "recipe.yaml").read_text()))
    loader = EvalLoader(open_images(photos), DataConfig(), batch=5)
    return extract(lambda images: images, loader, setting.evaluation_policy, setting.runtime).values


def exported(run: Path, form: str, out: Path, **options: Any) -> dict[str, object]:
    return export(ExportConfig(run=str(run), format=form, out=str(out), **options))  # type: ignore[arg-type]


def close(found: Tensor, expected: Tensor) -> None:
    """Within 1e-4 of the largest number, and not all alike."""
    scale = expected.abs().max().item()
    assert found.shape == expected.shape
    assert len(expected) == 1 or expected.std(dim=0).max().item() > 1e-3 * scale, "the outputs do not depend on images"
    assert (found - expected).abs().max().item() <= 1e-4 * scale


def images(size: int) -> Tensor:
    return torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@torch.no_grad()
def test_timm_gives_the_same_logits_and_nearly_the_same_views(wide: Path, photos: Path, tmp_path: Path) -> None:
    assert (
        exported(wide, "timm", tmp_path / "t")["load"]
        == f'timm.create_model("local-dir:{tmp_path}/t", pretrained=True)'
    )
    network = timm.create_model(f"local-dir:{tmp_path}/t", pretrained=True).eval()
    ours = load_classifier(wide)[0].eval()
    for rows in (1, 5):
        close(network(images(56)[:rows]), ours(images(56)[:rows]))
    assert tuple(network.pretrained_cfg["label_names"]) == CLASSES
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    found = torch.stack([transform(Image.open(path).convert("RGB")) for path in sorted(photos.iterdir())])
    # timm resizes the uncropped image, in 8 bits; here to whole pixels with a margin of whole pixels. Units of [0, 1].
    difference = (found - views(wide, photos)).abs() * torch.tensor(network.pretrained_cfg["std"]).view(3, 1, 1)
    assert difference.mean() < 0.002 and difference.max() < 0.02


@pytest.mark.slow
@torch.no_grad()
def test_timm_takes_encoders_alone_and_small_views_whole(make_run: MakeRun, photos: Path, tmp_path: Path) -> None:
    run = make_run("pretrain", ModelConfig(arch="resnet18", stem="imagenet"), 32)
    exported(run, "timm", tmp_path / "t")
    network = timm.create_model(f"local-dir:{tmp_path}/t", pretrained=True).eval()
    close(network(images(32)), load_encoder(run)[0].eval()(images(32)))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    found = torch.stack([transform(Image.open(path).convert("RGB")) for path in sorted(photos.iterdir())])
    # The whole image, resized in 8 bits: a step and a half of 1/255, over the smallest deviation.
    assert (found - views(run, photos)).abs().max() < 1.5 / 255 / 0.224


@pytest.mark.slow
@torch.no_grad()
def test_timm_has_bottlenecks(randomise: Any) -> None:
    ours = randomise(build_classifier(ModelConfig(), 64, 5), 2).eval()
    state = torchvision_state(ours, _card(ModelConfig()), "runs/a", "timm")
    with torch.device("meta"):
        network = timm.create_model("resnet50", num_classes=5)
        deepest = timm.create_model("resnet200", num_classes=5)
        model = ModelConfig(arch="resnet200")
        deep = torchvision_state(build_classifier(model, 64, 5), _card(model), "runs/a", "timm")
    network.load_state_dict(state, strict=True, assign=True)
    close(network.eval()(images(64)), ours(images(64)))
    deepest.load_state_dict(deep, strict=True, assign=True)


def _card(model: ModelConfig, head_layer: int = 0) -> Any:
    from fastsimclr.deploy import Card

    return Card(
        part="classifier",
        stage="finetune",
        config=model,
        size=64,
        head_layer=head_layer,
        classes=CLASSES,
        preprocessing={},
        metrics={},
        version="0",
    )


@pytest.mark.parametrize(
    ("model", "head_layer", "reasons"),
    [
        (replace(EIGHTH, selective_kernels=True, maxpool="tf_same"), 0, ["selective", "width 0.125", "max-pool"]),
        (
            replace(EIGHTH, width=1, stem="cifar", project_first=True),
            1,
            ["stem cifar", "project_first", "head layer 1"],
        ),
        (replace(EIGHTH, width=1), 1, ["head layer 1", "--part encoder"]),
    ],
)
def test_timm_refuses_by_name(model: ModelConfig, head_layer: int, reasons: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^runs/a does not fit timm: .* safetensors or onnx") as error:
        torchvision_state(build_classifier(model, 64, 5, head_layer), _card(model, head_layer), "runs/a", "timm")
    assert all(reason in str(error.value) for reason in reasons)
    assert ("--part encoder" in str(error.value)) == ("--part encoder" in reasons)


def forward(folder: Path, x: Tensor) -> Tensor:
    """What transformers' ResNet computes (modeling_resnet.py, 5.23), from config.json and the names."""
    config, state = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    body = "resnet." if config["architectures"] == ["ResNetForImageClassification"] else ""
    used = {name for name in state if name.endswith("num_batches_tracked")}

    def take(name: str) -> Tensor:
        used.add(name)
        return state[name]

    def unit(x: Tensor, name: str, kernel: int, stride: int = 1) -> Tensor:
        weight = take(f"{name}.convolution.weight")
        assert weight.shape[2:] == (kernel, kernel)
        x = F.conv2d(x, weight, stride=stride, padding=kernel // 2)
        values = [take(f"{name}.normalization.{key}") for key in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *values)

    x = F.max_pool2d(F.relu(unit(x, f"{body}embedder.embedder", 7, 2)), 3, 2, 1)
    assert x.shape[1] == config["embedding_size"]
    bottleneck = config["layer_type"] == "bottleneck"
    for stage, (depth, channels) in enumerate(zip(config["depths"], config["hidden_sizes"], strict=True)):
        for layer in range(depth):
            name = f"{body}encoder.stages.{stage}.layers.{layer}"
            stride = 2 if stage and not layer else 1
            y = F.relu(unit(x, f"{name}.layer.0", *((1, 1) if bottleneck else (3, stride))))
            y = (
                unit(F.relu(unit(y, f"{name}.layer.1", 3, stride)), f"{name}.layer.2", 1)
                if bottleneck
                else unit(y, f"{name}.layer.1", 3)
            )
            if stride != 1 or x.shape[1] != channels:
                x = unit(x, f"{name}.shortcut", 1, stride)
            x = F.relu(x + y)
    x = x.mean((2, 3))
    if body:
        assert list(config["id2label"].values()) == list(CLASSES)
        x = F.linear(x, take("classifier.1.weight"), take("classifier.1.bias"))
    assert used == state.keys()
    return x


_TRANSFORMERS = """
import sys, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification
folder, inputs, outputs, *photos = sys.argv[1:]
kind = AutoModel if outputs.endswith("features") else AutoModelForImageClassification
model, loaded = kind.from_pretrained(folder, output_loading_info=True)
assert not any(loaded.values()), loaded
with torch.no_grad():
    found = model.eval()(torch.load(inputs))
processor = AutoImageProcessor.from_pretrained(folder)
seen = processor([Image.open(path) for path in photos], return_tensors="pt")["pixel_values"]
torch.save([found.logits if kind is not AutoModel else found.pooler_output[:, :, 0, 0], seen], outputs)
"""


def by_transformers(folder: Path, x: Tensor, photos: Path, outputs: Path) -> tuple[Tensor, Tensor]:
    """Outputs and views of transformers itself, in a process elsewhere: here it takes kernels/ for a library."""
    torch.save(x, outputs.with_suffix(".in"))
    words = [folder, outputs.with_suffix(".in"), outputs, *sorted(photos.iterdir())]
    done = subprocess.run(
        [sys.executable, "-c", _TRANSFORMERS, *map(str, words)], cwd=outputs.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found, seen = torch.load(outputs, weights_only=True)
    return found, seen


of_transformers = pytest.mark.parametrize(
    ("model", "part"),
    [(replace(EIGHTH, width=0.25), "classifier"), (replace(EIGHTH, arch="resnet50"), "encoder")],
    ids=["r18", "r50-encoder"],
)


@torch.no_grad()
@of_transformers
def test_hugging_face_gives_the_same_outputs(make_run: MakeRun, tmp_path: Path, model: ModelConfig, part: str) -> None:
    run = make_run("finetune", model, 56, CLASSES)
    said = exported(run, "huggingface", tmp_path / "h", part=part)
    assert str(said["load"]).startswith("AutoModel")
    whole = load_classifier(run)[0].eval()
    ours = whole if part == "classifier" else whole.encoder
    for rows in (1, 5):
        close(forward(tmp_path / "h", images(64)[:rows]), ours(images(64)[:rows]))
    network, card = load_pretrained(tmp_path / "h")
    assert card.config == model and not network.training
    expected = ours.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.needs("transformers")
@of_transformers
def test_transformers_gives_the_same_outputs_and_nearly_the_same_views(
    make_run: MakeRun, photos: Path, tmp_path: Path, model: ModelConfig, part: str
) -> None:
    run = make_run("finetune", model, 56, CLASSES)
    exported(run, "huggingface", tmp_path / "h", part=part)
    network = load_classifier(run)[0].eval()
    found, seen = by_transformers(tmp_path / "h", images(64), photos, tmp_path / part.replace("encoder", "features"))
    close(found, (network if part == "classifier" else network.encoder)(images(64)))
    difference = (seen - views(run, photos)).abs() * 0.225
    assert difference.mean() < 0.002 and difference.max() < 0.02


@torch.no_grad()
def test_what_transformers_lacks_comes_back_by_load_pretrained(make_run: MakeRun, tmp_path: Path) -> None:
    model = replace(EIGHTH, arch="resnet50", selective_kernels=True)
    run = make_run("finetune", model, 32, CLASSES, 1)
    said = exported(run, "huggingface", tmp_path / "h")
    assert said["load"] == f'fastsimclr.deploy.load_pretrained("{tmp_path}/h")'
    network, card = load_pretrained(tmp_path / "h")
    expected = load_classifier(run)[0].state_dict()
    assert card.classes == CLASSES and all(torch.equal(v, expected[k]) for k, v in network.state_dict().items())
    text = (tmp_path / "h" / "README.md").read_text()
    assert "selective_kernels" in text and "stem cifar" in text and "head layer 1" in text and "AutoModel" not in text


def test_folders_are_written_whole_and_not_over_others(make_run: MakeRun, wide: Path, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "config.json").write_text("mine")
    with pytest.raises(FileExistsError, match=r"config\.json exists; .*--overwrite"):
        exported(wide, "timm", tmp_path / "t")
    with pytest.raises(ValueError, match=r"stem cifar"):
        exported(make_run("pretrain"), "timm", tmp_path / "t", overwrite=True)
    assert [path.read_text() for path in (tmp_path / "t").iterdir()] == ["mine"]
    with pytest.raises(ValueError, match=r"stem cifar"):
        exported(make_run("pretrain"), "timm", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file; --format timm writes a folder"):
        exported(wide, "timm", tmp_path / "file", overwrite=True)


def test_load_pretrained_refuses_foreign_and_damaged_folders(make_run: MakeRun, tmp_path: Path) -> None:
    folder = tmp_path / "h"
    with pytest.raises(ValueError, match="cannot be read as a model folder"):
        load_pretrained(folder)
    exported(make_run("pretrain"), "huggingface", folder)
    config = json.loads((folder / "config.json").read_text())
    for change, said in [
        ({"fastsimclr": config["fastsimclr"] | {"size": 64}}, "does not fit the model"),
        ({"fastsimclr": {}}, "lacks the metadata"),
        ({}, "has no entry 'fastsimclr'"),
    ]:
        (folder / "config.json").write_text(json.dumps(change))
        with pytest.raises(ValueError, match=said) as error:
            load_pretrained(folder)
        assert str(folder) in str(error.value)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-5])
    with pytest.raises(ValueError, match="cannot be read as a model folder"):
        load_pretrained(folder)
