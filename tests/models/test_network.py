"""Batch norm, heads, classifiers, configuration and the loading of weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastsimclr.models import (
    BatchNorm,
    Classifier,
    ModelConfig,
    ProjectionHead,
    ResNet,
    build_classifier,
    build_simclr,
    classifier_from,
    count_parameters,
    load_torchvision,
    load_weights,
)

TINY = ModelConfig(arch="resnet18", width=0.125, head_layers=3, head_dim=12)


def normalised(x: Tensor, weight: Tensor, bias: Tensor | float) -> Tensor:
    """BN of [N, C] with the batch's own statistics."""
    return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() * weight + bias


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3, 4)])
def test_batch_norm_is_torchs(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    ours = BatchNorm(5, bias=bias).double()
    theirs = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(5).double()
    nn.init.normal_(theirs.weight)
    load_weights(ours, {key: value for key, value in theirs.state_dict().items() if bias or key != "bias"}, "torch")
    for training in (True, True, False):
        x = torch.randn(shape, dtype=torch.float64)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = ours.train(training)(a), theirs.train(training)(b)
        torch.testing.assert_close(y, expected)
        weights = torch.randn_like(y)
        for output in (y, expected):
            (output * weights).sum().backward()
        torch.testing.assert_close(a.grad, b.grad)
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    assert int(ours.get_buffer("num_batches_tracked")) == 2
    assert (ours.bias is None) == (not bias)


def test_batch_norm_keeps_float32_statistics_of_bfloat16_maps() -> None:
    bn = BatchNorm(4)
    x = torch.randn(64, 4, 8, 8).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    y = bn(x)
    assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
    assert bn.running_mean is not None and bn.running_mean.dtype == torch.float32
    torch.testing.assert_close(bn.running_mean, 0.1 * x.double().mean((0, 2, 3)).float(), rtol=1e-4, atol=1e-6)


def test_batch_norm_refuses_other_ranks() -> None:
    with pytest.raises(ValueError, match=r"not \[2, 3, 4\]"):
        BatchNorm(3)(torch.zeros(2, 3, 4))


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_head_layer_by_layer(layers: int) -> None:
    torch.manual_seed(1)
    head = ProjectionHead(7, layers, out_features=5).double()
    state = head.state_dict()
    for key in state:
        if key.endswith("bn.weight") or key.endswith("bn.bias"):
            nn.init.normal_(state[key])
    h = torch.randn(9, 7, dtype=torch.float64)
    expected = h
    torch.testing.assert_close(head.forward_to(h, 0), h)
    for k in range(1, layers + 1):
        dense, gamma = state[f"layers.{k - 1}.dense.weight"], state[f"layers.{k - 1}.bn.weight"]
        assert dense.shape == (5 if k == layers else 7, 7)
        expected = expected @ dense.T
        if k < layers:
            expected = normalised(expected, gamma, state[f"layers.{k - 1}.bn.bias"]).clamp_min(0)
        else:
            expected = normalised(expected, gamma, 0.0)
        torch.testing.assert_close(head.forward_to(h, k), expected)
        torch.testing.assert_close(head.truncated(k)(h), expected)
        assert head.width_at(k) == head.truncated(k).out_features == expected.shape[1]
    torch.testing.assert_close(head(h), expected)
    # No dense has a bias, and only the last BN has none.
    assert [key for key in state if key.endswith("bias")] == [f"layers.{k}.bn.bias" for k in range(layers - 1)]
    with pytest.raises(ValueError, match=rf"layer={layers + 1} is not in 0..{layers}"):
        head.forward_to(h, layers + 1)


def test_no_head_is_the_identity() -> None:
    head = ProjectionHead(7, 0)
    h = torch.randn(2, 7)
    assert torch.equal(head(h), h) and head.out_features == 7 and not list(head.parameters())


def test_head_and_classifier_initial_values() -> None:
    torch.manual_seed(2)
    dense = ProjectionHead(512, 2).state_dict()["layers.0.dense.weight"]
    # 262,144 draws: the deviation's standard error is 1.4e-5.
    assert abs(float(dense.std()) - 0.01) < 1e-4 and abs(float(dense.mean())) < 1e-4
    assert float(dense.abs().max()) > 0.035  # not cut at two deviations
    zero, normal = Classifier(512, 100), Classifier(512, 100, init="normal")
    assert not zero.weight.any() and not zero.bias.any() and not normal.bias.any()
    assert abs(float(normal.weight.detach().std()) - 0.01) < 5e-4


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_classifier_starts_from_the_pretrained_layer(layer: int) -> None:
    torch.manual_seed(3)
    net = build_simclr(TINY, 32)
    images = torch.randn(4, 3, 32, 32)
    net(images)
    net.eval()
    classifier = classifier_from(net, layer, 10).eval()
    h, z = net(images)
    assert h.shape == (4, 64) and z.shape == (4, 12)
    expected = h if layer == 0 else net.head.forward_to(h, layer)
    torch.testing.assert_close(classifier.features(images), expected)
    assert torch.equal(classifier(images), torch.zeros(4, 10))
    assert not {p.data_ptr() for p in classifier.parameters()} & {p.data_ptr() for p in net.parameters()}
    fresh = build_classifier(TINY, 32, 10, layer)
    load_weights(fresh, classifier.state_dict(), "the classifier")
    torch.testing.assert_close(fresh.eval().features(images), expected)


def test_supervised_network_trains_every_parameter() -> None:
    torch.manual_seed(4)
    net = build_classifier(TINY, 32, 3, layer=1, init="normal")
    loss = nn.functional.cross_entropy(net(torch.randn(6, 3, 32, 32)), torch.arange(6) % 3)
    torch.autograd.backward(loss)
    assert all(parameter.grad is not None for parameter in net.parameters())
    # Encoder, one head layer (64 x 64 dense, BN weight and bias), 64 x 3 classifier with bias.
    assert count_parameters(net) == count_parameters(net.encoder) + 64 * 64 + 2 * 64 + 64 * 3 + 3


def test_same_seed_same_network() -> None:
    states = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        states.append(build_simclr(TINY, 32).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["encoder.conv1.weight"], states[2]["encoder.conv1.weight"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arch": "resnet51"}, "resnet50"),
        ({"width": 0.0}, "width=0.0 must be a positive"),
        ({"width": float("nan")}, "width=nan"),
        ({"stem": "small"}, "auto, imagenet or cifar"),
        ({"head_layers": 5}, "head_layers=5 must be 0 to 4"),
        ({"head_dim": 0}, "head_dim=0"),
    ],
)
def test_config_refuses_bad_values(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**values)  # type: ignore[arg-type]


def test_weights_of_another_shape_are_named_and_nothing_is_copied() -> None:
    torch.manual_seed(7)
    net, other = build_simclr(TINY, 32), build_simclr(ModelConfig(arch="resnet18", width=0.25, head_dim=12), 32)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state = other.state_dict()
    state["extra"] = state.pop("encoder.bn1.bias")
    with pytest.raises(ValueError) as caught:
        load_weights(net, state, "runs/a/last.pt")
    message = str(caught.value)
    for part in (
        "runs/a/last.pt does not fit",
        "1 missing (encoder.bn1.bias)",
        "1 unexpected (extra)",
        "encoder.conv1.weight [16, 3, 3, 3], the model has [8, 3, 3, 3]",
        "set model.arch",
    ):
        assert part in message
    assert len(message) < 800
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_torchvision_file(tmp_path: Path) -> None:
    source = ResNet("resnet18", width=0.125)
    state = {key: value for key, value in source.state_dict().items() if not key.endswith("num_batches_tracked")}
    path = tmp_path / "resnet18.pth"
    torch.save(state | {"fc.weight": torch.zeros(1000, 64), "fc.bias": torch.zeros(1000)}, path)
    encoder = ResNet("resnet18", width=0.125)
    load_torchvision(encoder, path)
    assert all(torch.equal(value, encoder.state_dict()[key]) for key, value in state.items())
    with pytest.raises(ValueError, match=r"resnet18\.pth does not fit the model: .*missing \(layer1\.2\.conv1"):
        load_torchvision(ResNet("resnet34", width=0.125), path)


def cut(path: Path) -> None:
    """A file whose writing stopped half-way."""
    torch.save({"a": torch.zeros(999)}, path)
    path.write_bytes(path.read_bytes()[:700])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: None, "is not a file"),
        (lambda path: path.write_bytes(b""), "cannot be read as weights"),
        (lambda path: path.write_bytes(b"\xff\xd8\xff not weights"), "cannot be read as weights"),
        (lambda path: torch.save([1, 2], path), "holds list, not a flat mapping"),
        (lambda path: torch.save({"state_dict": {"a": torch.zeros(1)}}, path), "holds dict, not a flat mapping"),
        (lambda path: torch.save(nn.ReLU(), path), "cannot be read as weights"),
        (cut, "cannot be read as weights"),
    ],
    ids=["missing", "empty", "foreign", "list", "nested", "pickled", "cut"],
)
def test_bad_weight_files_are_named(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    path = tmp_path / "weights.pth"
    damage(path)
    with pytest.raises(ValueError, match=message) as caught:
        load_torchvision(ResNet("resnet18", width=0.125), path)
    assert str(path) in str(caught.value) and "torch.save" in str(caught.value)
