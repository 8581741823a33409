"""Exported weights give the logits of our own evaluation in torchvision and ONNX Runtime, and come back to the bit."""

from __future__ import annotations

import itertools
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as T

from fastsimclr.deploy import Card, load_safetensors
from fastsimclr.deploy.export import ExportConfig, export
from fastsimclr.deploy.graph import _exportable, write_onnx
from fastsimclr.deploy.images import open_images
from fastsimclr.deploy.weights import torchvision_state
from fastsimclr.evaluation.features import extract
from fastsimclr.loaders import DataConfig, EvalLoader
from fastsimclr.models import ClassifierNet, ModelConfig, ResNet, build_classifier
from fastsimclr.models.selective_kernel import ShortcutPool
from fastsimclr.recipe import parse_recipe
from fastsimclr.stages import Setting
from fastsimclr.stages.imported import import_tf
from fastsimclr.stages.networks import load_classifier, load_encoder

MakeRun = Callable[..., Path]
CLASSES = ("cat, tabby", 'dog "x"', "new\nline", "ä", "e")
EIGHTH = ModelConfig(arch="resnet18", width=0.125)
SELECTIVE = replace(EIGHTH, arch="resnet50", selective_kernels=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five smooth PNGs of several sizes."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for index, side in enumerate([(64, 48), (120, 100), (80, 160), (101, 99), (64, 64)]):
        coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize(side, Image.Resampling.BICUBIC).save(root / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def wide(make_run: MakeRun) -> Path:
    """A pretraining run of the smallest encoder that torchvision has."""
    return make_run("pretrain", ModelConfig(arch="resnet18"), 64)


def views(run: Path, photos: Path, normalise: str) -> Tensor:
    """The evaluation views of a run, [5, 3, S, S], normalised or not."""
    return ours(lambda images: images, run, photos, normalise)


def ours(network: Callable[[Tensor], Tensor], run: Path, photos: Path, normalise: str = "auto") -> Tensor:
    """Outputs of `network` on the evaluation path of the stages."""
    setting = Setting(parse_recipe((run / "recipe.yaml").read_text()))
    loader = EvalLoader(open_images(photos), DataConfig(), batch=5)
    policy = replace(setting.evaluation_policy, normalise=normalise)  # type: ignore[arg-type]
    return extract(network, loader, policy, setting.runtime).values


def exported(run: Path, form: str, out: Path, **options: Any) -> Path:
    export(ExportConfig(run=str(run), format=form, out=str(out), **options))  # type: ignore[arg-type]
    return out


def card(model: ModelConfig, size: int, head_layer: int) -> Card:
    """The card of a classifier on CLASSES."""
    return Card(
        part="classifier",
        stage="finetune",
        config=model,
        size=size,
        head_layer=head_layer,
        classes=CLASSES,
        preprocessing={},
        metrics={},
        version="0",
    )


def close(found: Tensor, expected: Tensor, rows: int) -> None:
    """Within 1e-4 of the largest number, and not all alike."""
    assert found.shape == (rows, *expected.shape[1:])
    scale = expected.abs().max().item()
    assert expected.std(dim=0).max().item() > 1e-3 * scale, "the outputs do not depend on the images"
    assert (found - expected[:rows]).abs().max().item() <= 1e-4 * scale


def loaded(arch: str, state: dict[str, Tensor], classes: int = 1000) -> torchvision.models.ResNet:
    """torchvision's network with these weights and no others: without a key in `state` it has none."""
    with torch.device("meta"):
        network = getattr(torchvision.models, arch)(num_classes=classes)
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval()


@pytest.mark.slow
def test_torchvision_gives_the_same_logits(make_run: MakeRun, photos: Path, tmp_path: Path) -> None:
    run = make_run("distill", ModelConfig(arch="resnet18"), 64, CLASSES)
    path = exported(run, "torchvision", tmp_path / "w.pt")
    state = torch.load(path, weights_only=True)
    network = loaded("resnet18", state, len(CLASSES))
    expected = ours(load_classifier(run)[0].eval(), run, photos)
    for rows in (1, 5):
        with torch.no_grad():
            close(network(views(run, photos, "auto")[:rows]), expected, rows)


@pytest.mark.slow
def test_torchvision_gives_the_same_logits_with_bottlenecks(make_run: MakeRun, photos: Path, randomise: Any) -> None:
    run = make_run("pretrain", EIGHTH, 64)  # for its views; a resnet50 in a checkpoint takes seconds
    original = randomise(build_classifier(ModelConfig(), 64, len(CLASSES)), 2).eval()
    network = loaded("resnet50", torchvision_state(original, card(ModelConfig(), 64, 0), ""), len(CLASSES))
    with torch.no_grad():
        close(network(views(run, photos, "auto")), ours(original, run, photos), 5)


def test_torchvision_takes_the_encoder_alone(wide: Path, photos: Path, tmp_path: Path) -> None:
    state = torch.load(exported(wide, "torchvision", tmp_path / "w.pt"), weights_only=True)
    network = torchvision.models.resnet18().eval()
    network.fc = torch.nn.Identity()
    network.load_state_dict(state, strict=True)
    with torch.no_grad():
        close(network(views(wide, photos, "auto")), ours(load_encoder(wide)[0].eval(), wide, photos), 5)


@pytest.mark.parametrize(
    ("changes", "size", "head_layer", "reasons"),
    [
        ({"selective_kernels": True}, 64, 0, ["selective_kernels"]),
        ({"stem": "cifar"}, 64, 0, ["model.stem cifar"]),
        ({}, 32, 0, ["model.stem cifar"]),  # stem=auto at 32 px
        ({"width": 0.5}, 64, 0, ["model.width 0.5"]),
        ({"arch": "resnet200", "width": 0.125}, 64, 0, ["resnet200", "model.width 0.125"]),
        ({"maxpool": "tf_same"}, 64, 0, ["model.maxpool"]),
        ({"project_first": True}, 64, 0, ["model.project_first"]),
        ({}, 64, 1, ["head layer 1", "--part encoder"]),
    ],
)
def test_torchvision_refuses_by_name(changes: dict[str, Any], size: int, head_layer: int, reasons: list[str]) -> None:
    model = ModelConfig(**({"arch": "resnet18"} | changes))
    with torch.device("meta"):
        classifier = build_classifier(model, size, len(CLASSES), head_layer)
    with pytest.raises(ValueError, match=r"^runs/a does not fit torchvision: .* safetensors or onnx") as error:
        torchvision_state(classifier, card(model, size, head_layer), "runs/a")
    for reason in reasons:
        assert reason in str(error.value)
    assert str(error.value).count(";") == len(reasons) - ("--part encoder" in reasons)


class Small(torch.nn.Module):
    """A network whose export takes a moment, with the one module that an export replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = torch.nn.Conv2d(3, 8, 3, padding=1), ShortcutPool(2)
        self.fc = torch.nn.Linear(8, len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.pool(self.conv(images).relu()).mean((2, 3)))
        return logits


@pytest.mark.slow
def test_onnx_normalises_and_takes_any_number_of_images(tmp_path: Path, randomise: Any) -> None:
    network, path = randomise(Small(), 2).eval(), tmp_path / "w.onnx"
    images = torch.rand(5, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    write_onnx(network, replace(card(EIGHTH, 9, 0), preprocessing={"size": 9, "mean": mean, "std": std}), path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [(value.name, value.shape) for value in session.get_inputs()] == [("images", ["N", 3, 9, 9])]
    with torch.no_grad():
        expected = network((images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
    for rows in (1, 5):
        (found,) = session.run(["logits"], {"images": images[:rows].numpy()})
        close(torch.from_numpy(found), expected, rows)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == list(CLASSES)
    assert json.loads(metadata["preprocessing"])["size"] == 9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "size", "head_layer"),
    [
        (EIGHTH, 32, 1),  # CIFAR stem
        (replace(EIGHTH, maxpool="tf_same", project_first=True), 64, 0),
        pytest.param(replace(EIGHTH, arch="resnet50"), 64, 0, marks=pytest.mark.full),
        (SELECTIVE, 65, 1),  # odd maps, whose shortcuts are padded
    ],
    ids=["r18-cifar", "r18-google", "r50", "r50-sk"],
)
def test_onnx_runtime_gives_the_same_logits(
    make_run: MakeRun, photos: Path, tmp_path: Path, model: ModelConfig, size: int, head_layer: int
) -> None:
    run = make_run("finetune", model, size, CLASSES, head_layer)
    path = exported(run, "onnx", tmp_path / "w.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [(value.name, value.shape) for value in session.get_inputs()] == [("images", ["N", 3, size, size])]
    expected = ours(load_classifier(run)[0].eval(), run, photos)
    images = views(run, photos, "none")
    assert images.min() >= 0 and images.max() <= 1
    for rows in (1, 5):
        (found,) = session.run(["logits"], {"images": images[:rows].contiguous().numpy()})
        close(torch.from_numpy(found), expected, rows)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == list(CLASSES)
    assert json.loads(metadata["preprocessing"])["size"] == size
    assert [entry.version for entry in onnx.load(path).opset_import if entry.domain == ""] == [20]


@torch.no_grad()
def test_the_network_that_is_exported_pools_odd_shortcuts_as_the_original(randomise: Any) -> None:
    network = randomise(build_classifier(SELECTIVE, 65, len(CLASSES)), 2).eval()
    images = torch.randn(2, 3, 65, 65, generator=torch.Generator().manual_seed(0))

    def pools(module: torch.nn.Module) -> list[ShortcutPool]:
        return [each for each in module.modules() if isinstance(each, ShortcutPool) and each.stride == 2]

    exportable = _exportable(network)
    assert pools(network) and not pools(exportable)
    close(exportable(images), network(images), 2)


@pytest.mark.slow
def test_onnx_of_an_encoder_without_normalisation(make_run: MakeRun, photos: Path, tmp_path: Path) -> None:
    run = make_run("pretrain", normalise="none")
    session = onnxruntime.InferenceSession(
        exported(run, "onnx", tmp_path / "w.onnx"), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(["features"], {"images": views(run, photos, "none").contiguous().numpy()})
    close(torch.from_numpy(found), ours(load_encoder(run)[0].eval(), run, photos, "none"), 5)


@pytest.mark.slow
def test_onnx_of_an_imported_checkpoint_gives_google_s_own_logits(data_dir: Path, tmp_path: Path) -> None:
    with tarfile.open(data_dir / "tf-checkpoints.tar.xz", "r|xz") as archive:
        # The first of its folders; the others take four seconds to unpack.
        members = itertools.takewhile(lambda member: "r50" not in member.name, archive)
        archive.extractall(tmp_path, members, filter="data")
    (index,) = tmp_path.rglob("r18_cifar/*.index")
    import_tf(index.with_suffix(""), tmp_path / "run", head_layer=1)
    golden = np.load(index.parent / "expected.npz")
    path = exported(tmp_path / "run" / "classifier", "onnx", tmp_path / "w.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"images": golden["images"].transpose(0, 3, 1, 2).copy()})
    close(torch.from_numpy(found), torch.from_numpy(golden["logits"]), len(golden["logits"]))


@pytest.mark.parametrize("part", ["classifier", "encoder"])
def test_safetensors_comes_back_to_the_bit(make_run: MakeRun, tmp_path: Path, part: str) -> None:
    model = replace(EIGHTH, arch="resnet50", selective_kernels=True, head_layers=2)
    run = make_run("finetune", model, 64, CLASSES, 1)
    path = exported(run, "safetensors", tmp_path / "w.safetensors", part=part)
    assert path.stat().st_mode == (run / "recipe.yaml").stat().st_mode  # not its owner's alone
    network, said = load_safetensors(path)
    original = load_classifier(run)[0]
    whole = part == "classifier"
    assert isinstance(network, ClassifierNet if whole else ResNet) and not network.training
    expected = (original if whole else original.encoder).state_dict()
    state = network.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert (said.config, said.size, said.stage, said.metrics) == (model, 64, "finetune", {"top1": 0.5})
    assert (said.part, said.head_layer, said.classes) == ((part, 1, CLASSES) if whole else (part, 0, ()))


def test_the_card_says_how_an_image_becomes_the_input(make_run: MakeRun, photos: Path, tmp_path: Path) -> None:
    run = make_run("pretrain", EIGHTH, 40)
    said = load_safetensors(exported(run, "safetensors", tmp_path / "w.safetensors"))[1].preprocessing
    assert said["resize"] == "bilinear, antialiased"
    expected = []
    for path in (photos / "0.png", photos / "4.png"):  # their crops of .875 are whole pixels
        image = T.pil_to_tensor(Image.open(path)).float() / 255
        side = round(said["centre_fraction"] * min(image.shape[1:]))
        image = T.resize(T.center_crop(image, [side, side]), [said["size"], said["size"]], antialias=True)
        expected.append(T.normalize(image, said["mean"], said["std"]))
    assert (views(run, photos, "auto")[[0, 4]] - torch.stack(expected)).abs().max() < 1e-4


def test_safetensors_refuses_foreign_and_damaged_files(make_run: MakeRun, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = exported(make_run("pretrain"), "safetensors", tmp_path / "w.safetensors")
    data = path.read_bytes()
    (tmp_path / "cut").write_bytes(data[:-9])
    save_file({"w": torch.zeros(2)}, tmp_path / "foreign")
    wider = data.replace(b'\\"width\\": 0.125', b'\\"width\\": 0.250')
    assert wider != data and len(wider) == len(data)
    (tmp_path / "wider").write_bytes(wider)
    for name, said in [
        ("none", "is not a file"),
        ("cut", "cannot be read"),
        ("foreign", "lacks the metadata"),
        ("wider", "does not fit the model"),
    ]:
        with pytest.raises(ValueError, match=said) as error:
            load_safetensors(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)


def test_a_file_is_replaced_only_when_asked_to_and_as_a_whole(make_run: MakeRun, wide: Path, tmp_path: Path) -> None:
    out = tmp_path / "w.pt"
    out.write_text("mine")
    with pytest.raises(FileExistsError, match=r"w\.pt exists; .*--overwrite"):
        exported(wide, "torchvision", out)
    with pytest.raises(ValueError, match=r"model\.stem cifar"):
        exported(make_run("pretrain"), "torchvision", out, overwrite=True)
    assert out.read_text() == "mine" and list(tmp_path.iterdir()) == [out]
    exported(wide, "torchvision", out, overwrite=True)
    assert "conv1.weight" in torch.load(out, weights_only=True) and list(tmp_path.iterdir()) == [out]


def test_bad_requests_are_named(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run("pretrain")
    with pytest.raises(ValueError, match="stage pretrain, which has no classifier; give"):
        exported(run, "onnx", tmp_path / "w", part="classifier")
    with pytest.raises(ValueError, match="not a run folder"):
        exported(tmp_path, "onnx", tmp_path / "w")
    with pytest.raises(FileExistsError, match="is a folder"):
        exported(run, "onnx", tmp_path)
    monkeypatch.setattr("fastsimclr.deploy.graph.MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="an ONNX file holds 1,000; use safetensors"):
        exported(run, "onnx", tmp_path / "w")
    monkeypatch.setattr("fastsimclr.deploy.files.find_spec", lambda name: None)
    for form, package in [("onnx", "onnx and onnxscript"), ("safetensors", "safetensors")]:
        with pytest.raises(ValueError, match=rf'needs {package}; run: pip install "fastsimclr\[export\]"'):
            exported(run, form, tmp_path / "w")
    assert list(tmp_path.iterdir()) == []
