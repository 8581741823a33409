"""Encoders against torchvision, the SimCLRv2 paper's sizes, TensorFlow's padding in plain loops; initial values."""

import math

import pytest
import torch
import torchvision
from torch import Tensor, nn

from fastsimclr.models import BatchNorm, ModelConfig, ResNet, build_encoder, count_parameters, load_torchvision
from fastsimclr.models.resnet import Basic, Bottleneck, base_channels
from fastsimclr.models.selective_kernel import Conv, SelectiveKernel, ShortcutPool

ARCHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet200")
PUBLISHED = ARCHS[:5]


def on_meta(arch: str, **options: object) -> ResNet:
    """A network without storage: shapes and counts only."""
    with torch.device("meta"):
        return ResNet(arch, **options)  # type: ignore[arg-type]


def torchvision_network(arch: str, seed: int) -> nn.Module:
    """torchvision's network without classifier, with BN parameters and statistics that are not the initial ones."""
    torch.manual_seed(seed)
    theirs: nn.Module = getattr(torchvision.models, arch)(weights=None)
    theirs.fc = nn.Identity()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.get_buffer("running_mean"), std=0.1)
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 1.5)
    return theirs


@pytest.mark.parametrize("arch", PUBLISHED)
def test_state_has_torchvisions_names_and_shapes(arch: str) -> None:
    with torch.device("meta"):
        theirs = getattr(torchvision.models, arch)(weights=None).state_dict()
    ours = on_meta(arch).state_dict()
    assert [(key, value.shape) for key, value in ours.items()] == [
        (key, value.shape) for key, value in theirs.items() if not key.startswith("fc.")
    ]


@pytest.mark.parametrize(
    ("arch", "training"),
    [
        ("resnet18", True),
        *(pytest.param("resnet50", training, marks=pytest.mark.slow) for training in (False, True)),
        pytest.param("resnet18", False, marks=pytest.mark.slow),
    ],
)
def test_torchvisions_weights_give_torchvisions_outputs(arch: str, training: bool) -> None:
    theirs, ours = torchvision_network(arch, 1).train(training), ResNet(arch).train(training)  # type: ignore[arg-type]
    load_torchvision(ours, theirs.state_dict())
    images = torch.randn(3, 3, 65, 72)
    expected, got = theirs(images), ours(images)
    assert expected.std() > 0.01
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-5, atol=1e-5, msg=key)


# Table 1 and D.1 of arXiv 2006.10029, millions; they count BN's moving statistics too.
@pytest.mark.parametrize(
    ("arch", "width", "plain", "selective"),
    [
        ("resnet50", 1, 24, 35),
        ("resnet50", 2, 94, 140),
        ("resnet101", 1, 43, 65),
        pytest.param("resnet101", 2, 170, 257, marks=pytest.mark.slow),
        pytest.param("resnet152", 1, 58, 89, marks=pytest.mark.slow),
        pytest.param("resnet152", 2, 233, 354, marks=pytest.mark.slow),
        pytest.param("resnet152", 3, None, 795, marks=pytest.mark.slow),
    ],
)
def test_sizes_are_those_of_the_paper(arch: str, width: float, plain: int | None, selective: int) -> None:
    for selective_kernels, millions in ((False, plain), (True, selective)):
        if millions is None:
            continue
        encoder = on_meta(arch, width=width, selective_kernels=selective_kernels)
        statistics = sum(buffer.numel() for name, buffer in encoder.named_buffers() if "running" in name)
        assert round((count_parameters(encoder) + statistics) / 1e6) == millions


@pytest.mark.parametrize(
    ("arch", "selective_kernels"),
    [
        *((arch, selective) for arch in ARCHS[:3] for selective in (False, True)),
        *(pytest.param(arch, selective, marks=pytest.mark.slow) for arch in ARCHS[3:] for selective in (False, True)),
    ],
)
def test_every_depth_gives_features_of_its_width(arch: str, selective_kernels: bool) -> None:
    encoder = on_meta(arch, width=0.5, selective_kernels=selective_kernels)
    assert encoder.out_channels == (256 if arch in ("resnet18", "resnet34") else 1024)
    assert encoder(torch.empty(2, 3, 96, 96, device="meta")).shape == (2, encoder.out_channels)


@pytest.mark.parametrize(("width", "channels"), [(0.01, 8), (0.25, 16), (0.3, 16), (0.5, 32), (1, 64), (3, 192)])
def test_width_multiplies_every_channel_count(width: float, channels: int) -> None:
    assert base_channels(width) == channels
    plain, wide = on_meta("resnet50"), on_meta("resnet50", width=width)
    for (name, before), after in zip(plain.named_parameters(), wide.parameters(), strict=True):
        assert after.shape[0] * 64 == before.shape[0] * channels, name


@pytest.mark.parametrize(
    ("stem", "size", "side"), [("auto", 32, 32), ("auto", 33, 9), ("imagenet", 32, 8), ("cifar", 48, 48)]
)
def test_stem_follows_the_view_size_unless_it_is_chosen(stem: str, size: int, side: int) -> None:
    encoder = build_encoder(ModelConfig(arch="resnet18", width=0.125, stem=stem), size)  # type: ignore[arg-type]
    sides: list[torch.Size] = []
    encoder.layer1.register_forward_pre_hook(lambda _, inputs: sides.append(inputs[0].shape[2:]))
    encoder(torch.randn(2, 3, size, size))
    assert sides == [(side, side)]


def test_selective_kernel_stem_and_shortcuts() -> None:
    encoder = on_meta("resnet50", width=2, selective_kernels=True)
    convs = [module for module in encoder.conv1.modules() if isinstance(module, Conv)]
    assert [(c.in_channels, c.out_channels, c.kernel_size, c.stride) for c in convs] == [
        (3, 64, (3, 3), (2, 2)),
        (64, 64, (3, 3), (1, 1)),
        (64, 128, (3, 3), (1, 1)),
    ]
    pools = {name: module.stride for name, module in encoder.named_modules() if isinstance(module, ShortcutPool)}
    assert pools == {f"layer{k}.0.downsample.0": 1 if k == 1 else 2 for k in (1, 2, 3, 4)}
    middles = [block.conv2 for block in encoder.modules() if isinstance(block, Bottleneck)]
    assert len(middles) == 16 and all(isinstance(conv, SelectiveKernel) for conv in middles)
    assert isinstance(on_meta("resnet50", selective_kernels=True, cifar_stem=True).conv1, Conv)
    basic = on_meta("resnet18", selective_kernels=True)
    assert not any(isinstance(module, SelectiveKernel) for module in basic.modules())
    assert sum(isinstance(module, ShortcutPool) for module in basic.modules()) == 4


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(4, 6), (5, 3), (1, 1)])
def test_shortcut_pool_pads_as_tensorflow_does(stride: int, size: tuple[int, int]) -> None:
    height, width = size
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    rows, columns = math.ceil(height / stride), math.ceil(width / stride)
    expected = torch.empty(2, 3, rows, columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            window = x[:, :, i * stride : i * stride + 2, j * stride : j * stride + 2]
            # Stride 1 is SAME: only what lies inside counts. Stride 2 pads zeros first and counts them.
            expected[:, :, i, j] = window.sum((2, 3)) / (window[0, 0].numel() if stride == 1 else 4)
    torch.testing.assert_close(ShortcutPool(stride)(x), expected)


@pytest.mark.parametrize(("filters", "squeezed"), [(16, 32), (640, 40)])
@pytest.mark.parametrize("stride", [1, 2])
def test_selective_kernel_against_its_formula(filters: int, squeezed: int, stride: int) -> None:
    torch.manual_seed(2)
    sk = SelectiveKernel(8, filters, stride).double()
    nn.init.normal_(sk.expand.weight)  # so that the mixing is far from one half
    assert sk.reduce.out_channels == squeezed
    x = torch.randn(4, 8, 7, 6, dtype=torch.float64)

    def normalised(y: Tensor) -> Tensor:
        mean, var = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), keepdim=True, unbiased=False)
        return (y - mean) / (var + 1e-5).sqrt()

    u = normalised(nn.functional.conv2d(x, sk.conv.weight, stride=stride, padding=1)).clamp_min(0)
    streams = torch.stack([u[:, :filters], u[:, filters:]])
    pooled = streams.sum(0).mean((2, 3))
    hidden = normalised((pooled @ sk.reduce.weight[:, :, 0, 0].T)[:, :, None, None])[:, :, 0, 0].clamp_min(0)
    mixing = torch.stack((hidden @ sk.expand.weight[:, :, 0, 0].T).chunk(2, 1)).softmax(0)
    assert mixing[0].max() > 0.7
    torch.testing.assert_close(sk(x), (streams * mixing[..., None, None]).sum(0))


def test_initial_values() -> None:
    torch.manual_seed(3)
    encoder = ResNet("resnet50", width=0.5, selective_kernels=True)
    for name, module in encoder.named_modules():
        if isinstance(module, Conv) and module.weight.numel() > 30_000:
            fan_in = module.in_channels * module.kernel_size[0] ** 2
            scaled = module.weight.detach() * math.sqrt(fan_in)
            # 30,000 draws: the deviation's standard error is below 0.005, the mean's below 0.006.
            assert abs(float(scaled.std()) - 1) < 0.025 and abs(float(scaled.mean())) < 0.03, name
            assert float(scaled.abs().max()) <= 2 / 0.87962566103423978 + 1e-4, name
    last = {id(block.bn3) for block in encoder.modules() if isinstance(block, Bottleneck)}
    assert len(last) == 16
    for module in encoder.modules():
        if isinstance(module, BatchNorm):
            assert torch.all(module.weight == (0 if id(module) in last else 1)) and torch.all(module.bias == 0)
            assert (module.eps, module.momentum) == (1e-5, 0.1)


@pytest.mark.parametrize("zero_gamma", [True, False])
def test_zero_gamma_makes_a_block_its_shortcut(zero_gamma: bool) -> None:
    x = torch.rand(2, 32, 5, 5)
    for block in (Basic(32, 32, 1, None, False, zero_gamma), Bottleneck(32, 8, 1, None, True, zero_gamma)):
        assert torch.equal(block(x), x) == zero_gamma


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("arch", "selective"), [("resnet18", False), ("resnet18", True), ("resnet50", True)])
def test_maps_and_weight_gradients_stay_channels_last(arch: str, selective: bool, dtype: torch.dtype) -> None:
    config = ModelConfig(arch=arch, width=0.125, selective_kernels=selective, stem="imagenet")  # type: ignore[arg-type]
    encoder = build_encoder(config, 48)
    strays: list[str] = []
    for name, module in encoder.named_modules():
        # ShortcutPool's stride 1 gives a window of a channels-last map, whose order of strides is what counts.
        if not isinstance(module, ShortcutPool | ResNet):
            module.register_forward_hook(
                lambda _, __, y, name=name: (
                    None if y.is_contiguous(memory_format=torch.channels_last) else strays.append(name)
                )
            )
    images = torch.randn(4, 3, 48, 48).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        features = encoder(images)
    features.float().square().sum().backward()
    assert strays == [] and features.dtype == dtype
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        assert parameter.grad.stride() == parameter.stride(), name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("make", [lambda: Basic(3, 3, 1, None, False, False), lambda: SelectiveKernel(3, 2, 2)])
def test_gradients_in_double_precision(make: type[nn.Module]) -> None:
    torch.manual_seed(4)
    module = make().double()
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in module.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))
        return y

    assert torch.autograd.gradcheck(run, (x, *module.parameters()))
