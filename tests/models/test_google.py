"""Google's networks: recorded outputs of real checkpoints, a graph in plain loops for the others, bad checkpoints."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsimclr.models import ModelConfig, ResNet, build_encoder
from fastsimclr.models.google import read_google
from fastsimclr.models.resnet import MaxPoolSame
from fastsimclr.models.tf_bundle import BundleError
from tests.models.google_graph import RELATIVE, Graph, averages, error, outputs, same_max_pool, save, tiny_graph

REAL = {
    "r18_cifar": ModelConfig(arch="resnet18", stem="cifar", project_first=True),
    "r50": ModelConfig(arch="resnet50", stem="imagenet", maxpool="tf_same"),
    "r50_sk": ModelConfig(arch="resnet50", stem="imagenet", maxpool="tf_same", selective_kernels=True),
}


@pytest.fixture(scope="module")
def real(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three checkpoints that Google's own code gave."""
    root = tmp_path_factory.mktemp("tf")
    with tarfile.open(data_dir / "tf-checkpoints.tar.xz", "r|xz") as archive:
        archive.extractall(root, filter="data")
    return root / "tf-checkpoints"


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name == "r50" else []) for name in REAL])
def test_every_endpoint_that_google_recorded(real: Path, name: str) -> None:
    found = read_google(real / name)
    assert found.config == REAL[name]
    assert (found.step, found.averaged, found.slots, found.doubles) == (0, False, 1, 0)
    with np.load(real / name / "expected.npz") as file:
        expected = {key: torch.from_numpy(file[key]) for key in file}
    got = outputs(found, expected.pop("images"), layer=1)
    assert expected.keys() == got.keys() and len(got) == 7
    for key, value in expected.items():
        y = got[key].permute(0, 2, 3, 1)[:, ::4, ::4, ::8] if got[key].dim() == 4 else got[key]
        assert error(y, value) < RELATIVE, key


def test_real_checkpoints_cut_or_damaged(real: Path) -> None:
    folder = real / "r18_cifar"
    data = folder / "model.ckpt-0.data-00000-of-00001"
    whole = data.read_bytes()
    try:
        data.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(BundleError, match=f"{data.name} is truncated: it has {len(whole) // 2} bytes"):
            read_google(folder)
        data.write_bytes(whole[:-100_000] + bytes([whole[-100_000] ^ 1]) + whole[-99_999:])
        with pytest.raises(BundleError, match=r"data-00000-of-00001: head_\S+, bytes .* is damaged"):
            read_google(folder)
    finally:
        data.write_bytes(whole)


# Depths, widths, stems and sizes that the recorded ones leave out; the graph above builds them as Google's code does.
@pytest.mark.parametrize(
    ("arch", "base", "sk", "cifar", "size"),
    [
        ("resnet18", 8, False, False, (33, 46)),
        ("resnet34", 8, False, True, (16, 16)),
        ("resnet34", 8, False, False, (40, 40)),
        pytest.param("resnet50", 16, True, False, (37, 50), marks=pytest.mark.slow),
        pytest.param("resnet50", 8, True, True, (15, 16), marks=pytest.mark.slow),
        pytest.param("resnet50", 8, False, False, (32, 33), marks=pytest.mark.slow),
        pytest.param("resnet101", 8, True, False, (48, 48), marks=pytest.mark.slow),
    ],
)
def test_networks_that_are_not_recorded(
    tmp_path: Path, arch: str, base: int, sk: bool, cifar: bool, size: tuple[int, int]
) -> None:
    graph, images = Graph(arch, base, sk=sk, cifar=cifar), torch.rand(2, *size, 3)
    graph.build(images, classes=5, layer=1)
    found = read_google(save(graph, tmp_path))
    assert (found.config.arch, found.config.width, found.config.selective_kernels) == (arch, base / 64, sk)
    assert (found.config.stem, found.step) == ("cifar" if cifar else "imagenet", 1234)
    for key, value in outputs(found, images, layer=1).items():
        assert error(value, graph.endpoints[key]) < RELATIVE, key


@pytest.mark.parametrize(("head", "linear"), [(0, False), (1, True), (1, False), (2, False), (4, False)])
def test_heads_of_any_depth(tmp_path: Path, head: int, linear: bool) -> None:
    graph, images = Graph("resnet18", 8, cifar=True), torch.rand(3, 8, 8, 3)
    graph.build(images, head=head, linear=linear, classes=3, layer=head)
    found = read_google(save(graph, tmp_path))
    assert found.config.head_layers == head and found.config.head_dim == (24 if head else 128)
    # Only the last layer is 24 wide; the others are as wide as the encoder.
    assert found.classifier_layers == [head]
    got = outputs(found, images, layer=head)
    for key in ("final_avg_pool", "head_layer1", "projection", "logits"):
        assert error(got[key], graph.endpoints[key]) < RELATIVE, key


@pytest.fixture(scope="module")
def tiny() -> Graph:
    return tiny_graph(torch.rand(2, 16, 16, 3))


def refusal(graph: Graph, folder: Path, change: Callable[[dict[str, Tensor]], object], weights: str = "auto") -> str:
    """What is said of the graph's checkpoint after `change`."""
    source = save(graph, folder, change)
    with pytest.raises(ValueError) as caught:
        read_google(source, weights)  # type: ignore[arg-type]
    assert f"{source}.index" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "base_model/conv2d/kernel",
        "head_contrastive/nl_2/batch_normalization/gamma",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "base_model/conv2d_1/kernel",
                "base_model/conv2d_19/kernel",
                "base_model/batch_normalization_7/moving_variance",
                "head_contrastive/nl_1/dense/kernel",
                "head_supervised/linear_layer/dense/bias",
            )
        ),
    ],
)
def test_a_missing_name_is_named(tiny: Graph, tmp_path: Path, name: str) -> None:
    def drop(variables: dict[str, Tensor]) -> None:
        del variables[name]
        variables.pop(f"{name}/Momentum", None)

    assert name in refusal(tiny, tmp_path, drop)


@pytest.mark.parametrize(
    ("name", "has", "should"),
    [
        ("base_model/conv2d_3/kernel", (3, 3, 8, 9), (3, 3, 8, 8)),
        ("base_model/batch_normalization_19/gamma", (32,), (64,)),
        ("head_supervised/linear_layer/dense/kernel", (10,), (64, 10)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("head_contrastive/nl_1/dense/kernel", (64, 63), (64, 64)),
                ("head_supervised/linear_layer/dense/kernel", (65, 10), (64, 10)),
                ("head_supervised/linear_layer/dense/kernel", (64, 11), (64, 10)),
            ]
        ),
    ],
)
def test_a_wrong_shape_is_named_with_both(
    tiny: Graph, tmp_path: Path, name: str, has: tuple[int, ...], should: tuple[int, ...]
) -> None:
    text = refusal(tiny, tmp_path, lambda variables: variables.update({name: torch.zeros(has)}))
    assert f"1 of another shape ({name} {list(has)}, it should be {list(should)})" in text
    assert "most like resnet18, width 0.125" in text and "missing" not in text


def test_extra_names_are_named(tiny: Graph, tmp_path: Path) -> None:
    extra = {"base_model/conv2d_21/kernel": torch.zeros(1, 1, 64, 64), "other/Momentum": torch.zeros(3)}
    text = refusal(tiny, tmp_path, lambda variables: variables.update(extra))
    assert "2 in no such network (base_model/conv2d_21/kernel; other/Momentum)" in text


def test_other_checkpoints_are_refused(tiny: Graph, tmp_path: Path) -> None:
    def rename(variables: dict[str, Tensor]) -> None:
        for name in list(variables):
            variables[f"model/{name}/.ATTRIBUTES/VARIABLE_VALUE"] = variables.pop(name)
        variables["_CHECKPOINTABLE_OBJECT_GRAPH"] = torch.zeros(1)

    text = refusal(tiny, tmp_path, rename)
    assert "has no base_model/conv2d/kernel" in text and "TensorFlow 2's object checkpoints" in text


def test_averages_or_raw_weights_by_choice(tiny: Graph, tmp_path: Path) -> None:
    source = save(tiny, tmp_path, averages)
    found = {weights: read_google(source, weights) for weights in ("auto", "ema", "raw")}  # type: ignore[arg-type]
    assert [found[weights].averaged for weights in found] == [True, True, False]
    kernel = tiny.variables["base_model/conv2d/kernel"].permute(3, 2, 0, 1)
    mean = tiny.variables["base_model/batch_normalization/moving_mean"]
    for weights, factor in (("auto", 2), ("ema", 2), ("raw", 1)):
        state = found[weights].state
        assert torch.equal(state["encoder.conv1.weight"], factor * kernel)
        assert torch.equal(state["encoder.bn1.running_mean"], mean)
        bias = tiny.variables["head_supervised/linear_layer/dense/bias"]
        assert torch.equal(found[weights].classifier["bias"], factor * bias)
        assert found[weights].doubles == sum(
            name.endswith(("kernel", "gamma", "beta", "bias")) for name in tiny.variables
        )


def test_averages_of_the_statistics_are_taken_where_there_are_any(tiny: Graph, tmp_path: Path) -> None:
    name = "base_model/batch_normalization_2/moving_variance"

    def more(variables: dict[str, Tensor]) -> None:
        averages(variables)
        variables[f"{name}/ExponentialMovingAverage"] = variables[name] + 1

    found = read_google(save(tiny, tmp_path, more))
    assert torch.equal(found.state["encoder.layer1.0.bn1.running_var"], tiny.variables[name] + 1)


def test_averages_that_are_missing_in_whole_or_in_part(tiny: Graph, tmp_path: Path) -> None:
    assert "no moving averages" in refusal(tiny, tmp_path, lambda variables: None, "ema")
    assert read_google(save(tiny, tmp_path), "auto").averaged is False
    name = "base_model/conv2d_5/kernel/ExponentialMovingAverage"

    def drop(variables: dict[str, Tensor]) -> None:
        averages(variables)
        del variables[name]

    text = refusal(tiny, tmp_path, drop)
    assert f"1 missing ({name})" in text and "--weights raw" in text
    assert read_google(save(tiny, tmp_path, drop), "raw").averaged is False


@pytest.mark.parametrize("size", [(8, 8), (9, 9), (6, 7), (7, 6), (2, 1), (1, 1)])
def test_max_pool_pads_as_tensorflow_does(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size) - 3  # zeros, were they padded, would win
    assert torch.equal(MaxPoolSame()(x), same_max_pool(x))


def test_config_switches_change_what_they_name_and_nothing_else() -> None:
    plain = ModelConfig(arch="resnet18", width=0.125)
    images = torch.rand(2, 3, 64, 64)
    encoders = {}
    for name, config in {
        "plain": plain,
        "pool": ModelConfig(arch="resnet18", width=0.125, maxpool="tf_same"),
        "project": ModelConfig(arch="resnet18", width=0.125, project_first=True),
    }.items():
        torch.manual_seed(0)
        encoders[name] = build_encoder(config, 64).eval()
    assert isinstance(encoders["pool"].maxpool, MaxPoolSame) and not isinstance(encoders["plain"].maxpool, MaxPoolSame)
    assert encoders["pool"].state_dict().keys() == encoders["plain"].state_dict().keys()
    assert not torch.equal(encoders["pool"](images), encoders["plain"](images))
    extra = encoders["project"].state_dict().keys() - encoders["plain"].state_dict().keys()
    assert extra and all(key.startswith("layer1.0.downsample.") for key in extra)
    bottlenecks = [ResNet("resnet50", width=0.125, project_first=project) for project in (False, True)]
    assert bottlenecks[0].state_dict().keys() == bottlenecks[1].state_dict().keys()
    with pytest.raises(ValueError, match=r"model\.maxpool='same' is unknown; use torch, or tf_same"):
        ModelConfig(maxpool="same")  # type: ignore[arg-type]
