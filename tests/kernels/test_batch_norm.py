"""Batch norm with residual and ReLU, both implementations, against autograd in float64; scratch memory is NaN."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import fastsimclr.kernels.gather as gathering
from fastsimclr.distributed.ranks import Ranks
from fastsimclr.kernels.backend import Backend
from fastsimclr.kernels.batch_norm import batch_norm, fused, implementation
from fastsimclr.kernels.batch_norm.op import batch_norm_backward_op, batch_norm_op, statistics_op
from fastsimclr.models import BatchNorm, average_running_statistics, batch_groups, set_fused, set_groups, statistics_of
from fastsimclr.models.resnet import Basic, Bottleneck, shortcut
from tests.captured import captured

Pool = Callable[..., list[Any]]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS: tuple[Backend, ...] = ("reference", "fused")
SHAPES = [(6, 13, 3, 7), (9, 5), (5, 16, 1, 1), (3, 70, 2, 3), (70, 1)]
# Of the largest number. float32 sums of up to 126 values; one rounding to 11 or 8 bits, which Triton's interpreter
# cuts off for bfloat16: two half ones.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
# What the interpreter reckons with where a branch is not taken.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and scratch memory start as NaN, bits as ones."""
    empty = torch.empty

    def poisoned(*arguments: Any, **options: Any) -> Tensor:
        tensor = empty(*arguments, **options)
        return tensor.fill_(math.nan if tensor.is_floating_point() else 255)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 8 rows and 16 channels, so that few rows make many runs, and few runs many parts."""
    for name, value in (("TILE", 128), ("MOST_CHANNELS", 16), ("PARTS", 2), ("INTERPRETED_PROGRAMS", 12)):
        monkeypatch.setattr(fused, name, value)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, residual: bool = True, bias: bool = True) -> dict[str, Any]:
    """x, residual, weight, bias and dy; maps channels-last."""
    generator = torch.Generator().manual_seed(len(shape) + shape[1])

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def maps() -> Tensor:
        made = normal(*shape).to(DEVICE, dtype)
        return made.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else made

    x, dy, added = 2 * maps() + 1, maps(), maps()
    vectors = {"weight": normal(shape[1]).to(DEVICE), "bias": normal(shape[1]).to(DEVICE) if bias else None}
    return {"x": x, "residual": added if residual else None, **vectors, "dy": dy}


def found(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, dy: Tensor, **options: Any
) -> dict[str, Tensor]:
    """y and the gradients, by `batch_norm`."""
    leaves = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    there = {name: t.detach().clone().requires_grad_() for name, t in leaves.items() if t is not None}
    y = batch_norm(there["x"], there["weight"], there.get("bias"), residual=there.get("residual"), **options)
    assert y.dtype == x.dtype and y.shape == x.shape
    y.backward(dy)  # type: ignore[no-untyped-call]
    return {"y": y.detach()} | {f"d{name}": t.grad for name, t in there.items() if t.grad is not None}


def oracle(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, dy: Tensor, relu: bool = False
) -> dict[str, Tensor]:
    """The same in float64, by autograd of the formula."""
    leaves = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    there = {name: t.detach().double().requires_grad_() for name, t in leaves.items() if t is not None}
    wide = there["x"]
    over = [d for d in range(wide.dim()) if d != 1]
    shape = [1, -1, *[1] * (wide.dim() - 2)]
    var, mean = torch.var_mean(wide, over, correction=0, keepdim=True)
    y = (wide - mean) / torch.sqrt(var + 1e-5) * there["weight"].view(shape)
    y = y + there["bias"].view(shape) if bias is not None else y
    y = y + there["residual"] if residual is not None else y
    y = torch.where(y > 0, y, 0) if relu else y
    y.backward(dy.double())  # type: ignore[no-untyped-call]
    return {"y": y.detach()} | {f"d{name}": t.grad for name, t in there.items() if t.grad is not None}


def assert_near(got: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        single = got[name].dtype == torch.float32
        limit = 5 * TOLERANCE[torch.float32] if single else TOLERANCE[dtype]
        error = float((got[name].double() - value).abs().max())
        assert error <= limit * float(value.abs().max()), f"{name}: {error}"


# Every shape, type and form (residual, ReLU) of the fused kernels; all their products are slow in the interpreter.
FEW = [
    ((6, 13, 3, 7), torch.float32, True, True),
    pytest.param((3, 70, 2, 3), torch.bfloat16, False, True, marks=pytest.mark.slow),
    ((70, 1), torch.float16, True, False),
    ((9, 5), torch.float32, False, False),
    ((5, 16, 1, 1), torch.float16, True, True),
]


@pytest.mark.parametrize(("shape", "dtype", "residual", "relu"), FEW)
def test_fused_values_and_gradients(
    shape: tuple[int, ...], dtype: torch.dtype, residual: bool, relu: bool, small: None
) -> None:
    given = inputs(shape, dtype, residual, bias=residual is relu)
    assert_near(found(**given, relu=relu, backend="fused"), oracle(**given, relu=relu), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["reference", pytest.param("fused", marks=pytest.mark.slow)])
def test_values_and_gradients(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype, small: None) -> None:
    for residual, relu in itertools.product((False, True), repeat=2):
        given = inputs(shape, dtype, residual, bias=residual is relu)
        assert_near(found(**given, relu=relu, backend=backend), oracle(**given, relu=relu), dtype)


@pytest.mark.parametrize(
    "dtype", [pytest.param(dtype, marks=[] if dtype == torch.bfloat16 else pytest.mark.slow) for dtype in TOLERANCE]
)
def test_tiles_of_the_gpu(dtype: torch.dtype) -> None:
    """304 channels are two blocks; 126 rows are eight tiles of 16, the last not full, in runs of two."""
    given = inputs((2, 304, 7, 9), dtype)
    assert_near(found(**given, relu=True, backend="fused"), oracle(**given, relu=True), dtype)


@pytest.mark.parametrize("backend", ["reference", pytest.param("fused", marks=pytest.mark.slow)])
def test_far_means_keep_their_digits(backend: Backend, small: None) -> None:
    """1000 + N(0, 1): x itself has 6e-5 between two values, and so has the mean."""
    given = inputs((8, 5, 6, 6), torch.float32)
    given["x"] = given["x"].div(2) + 1000
    running = torch.zeros(5, device=DEVICE), torch.zeros(5, device=DEVICE)
    got = found(**given, relu=True, running=running, factor=1.0, backend=backend)
    for name, value in oracle(**given, relu=True).items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-4, atol=2e-4 * float(value.abs().max()))
    values = given["x"].double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(running[0].double(), values.mean(1), rtol=1e-7, atol=0)
    # The means of runs of 8 rows are off by up to 3e-5 of a deviation, and far apart.
    torch.testing.assert_close(running[1].double(), values.var(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("factor", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_running_statistics(backend: Backend, factor: float, small: None) -> None:
    given = inputs((5, 13, 3, 3), torch.bfloat16)
    start = torch.linspace(1, 2, 13, device=DEVICE)
    running = start.clone(), 2 * start
    batch_norm(given["x"], given["weight"], running=running, factor=factor, backend=backend)
    values = given["x"].double().transpose(0, 1).flatten(1)
    for now, before, new in zip(running, (start, 2 * start), (values.mean(1), values.var(1)), strict=True):
        torch.testing.assert_close(now.double(), (1 - factor) * before.double() + factor * new, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_layouts_are_copied(backend: Backend) -> None:
    given = inputs((4, 6, 3, 5), torch.float32)
    expected = found(**given, relu=True, backend=backend)
    plain = {key: t.contiguous() if key in ("x", "residual", "dy") else t for key, t in given.items()}
    plain["dy"] = plain["dy"].transpose(2, 3).contiguous().transpose(2, 3)
    for name, value in found(**plain, relu=True, backend=backend).items():
        assert torch.equal(value, expected[name]), name
    y = batch_norm(plain["x"], plain["weight"], backend=backend)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_channel(backend: Backend, residual: bool) -> None:
    given = inputs((4, 9, 3, 3), torch.float32, residual)
    given["x"][1, 2, 0, 1] = math.nan
    for name, value in found(**given, relu=True, backend=backend).items():
        if name not in ("dresidual", "dbias"):  # these are of dy alone, which NaN lets pass
            channels = value if value.dim() == 1 else value.transpose(0, 1).flatten(1).T
            bad = channels.isnan() if value.dim() == 1 else channels.isnan().all(0)
            assert bad.nonzero().flatten().tolist() == [2], name
            assert int(channels.isnan().sum()) == channels.numel() // 9


def test_what_does_not_fit_is_refused() -> None:
    x, weight = torch.zeros(4, 3, 2, 2), torch.ones(3)
    for one in (torch.zeros(1, 3), torch.zeros(1, 3, 1, 1), torch.zeros(0, 3)):
        with pytest.raises(ValueError, match="fewer than two values a channel, which have no variance; use a larger"):
            batch_norm(one, weight)
    with pytest.raises(ValueError, match=r"x is torch.float32 \[2, 3, 4\]; batch_norm takes floats \[N, C\] or"):
        batch_norm(torch.zeros(2, 3, 4), weight)
    with pytest.raises(ValueError, match=r"weight is torch.float32 \[4\] on cpu; x needs it torch.float32 \[3\]"):
        batch_norm(x, torch.ones(4))
    with pytest.raises(ValueError, match=r"running variance is torch.float64 \[3\]"):
        batch_norm(x, weight, running=(weight, weight.double()))
    with pytest.raises(ValueError, match=r"residual is torch.float16 .*; x needs it torch.float32"):
        batch_norm(x, weight, residual=x.half())
    with pytest.raises(ValueError, match=r"backend=fused does not take x of torch.float64"):
        batch_norm(x.double(), weight.double(), backend="fused")
    assert implementation(x.double()) == implementation(x) == "reference"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck looks at its own copies
@pytest.mark.slow
@pytest.mark.parametrize("which", BACKENDS)
def test_the_operators_keep_their_promises(which: str) -> None:
    """Schema, gradient, shapes without values: torch's own checks; whole under torch.compile."""
    for residual in (None, torch.randn(3, 5, 2, 2, device=DEVICE)):
        x, dy = torch.randn(2, 3, 5, 2, 2, device=DEVICE)
        weight, bias = torch.randn(2, 5, device=DEVICE)
        running = [torch.zeros(5, device=DEVICE), torch.ones(5, device=DEVICE)]
        state = statistics_op(x, running, 0.1, which, "", 1)
        torch.library.opcheck(statistics_op, (x, running, 0.1, which, "", 1))
        options, norm = (True, which, "", 1), (weight, bias, state)
        leaf = x.clone().requires_grad_()
        torch.library.opcheck(batch_norm_op, (leaf, residual, *options, *norm, 1e-5))
        bits = batch_norm_op(x, residual, *options, *norm, 1e-5)[1]
        torch.library.opcheck(batch_norm_backward_op, (dy, x, *norm, bits, 1e-5, *options))

        def y(x: Tensor, mean: Tensor, var: Tensor, residual: Tensor | None = residual) -> Tensor:
            weight = torch.ones(5, device=DEVICE)
            running, backend = (mean, var), "fused" if which == "fused" else "reference"
            return 2 * batch_norm(x * 2, weight, residual=residual, relu=True, running=running, backend=backend)  # type: ignore[arg-type]

        results = []
        for function in (y, torch.compile(y, backend="aot_eager", fullgraph=True)):
            leaf, mean, var = x.clone().requires_grad_(), *(t.clone() for t in running)
            out = function(leaf, mean, var)
            out.backward(dy)  # type: ignore[no-untyped-call]
            results.append((out.detach(), leaf.grad, mean, var))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        torch.compiler.reset()


def block(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "basic":
        made: nn.Module = Basic(6, 10, 2, shortcut(6, 10, 2, False), False, False)
    else:
        made = Bottleneck(12, 3, 1, None, False, False)
    for module in made.modules():
        if isinstance(module, BatchNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return made.to(DEVICE).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", [pytest.param("basic", marks=pytest.mark.slow), "bottleneck"])
def test_a_residual_block_is_the_unfused_one(kind: str) -> None:
    """Outputs, gradients and running statistics of two steps, micro-batches, and evaluation, which is torch's."""
    plain, quick = block(kind), block(kind)
    set_fused(quick, True)
    results = []
    for module in (plain, quick):
        generator = torch.Generator().manual_seed(1)
        seen = []
        for part, parts in ((0, 1), (0, 2), (1, 2), (None, 1)):
            x = torch.randn(4, 6 if kind == "basic" else 12, 7, 5, generator=generator).to(DEVICE).requires_grad_()
            with statistics_of(part, parts):
                y = module(x.contiguous(memory_format=torch.channels_last))
            (y * torch.linspace(0, 1, y.shape[-1], device=DEVICE)).sum().backward()
            seen += [y.detach(), x.grad]
        grads = [p.grad for p in module.parameters()]
        state = list(module.state_dict().values())
        results.append([*seen, *grads, *state, module.eval()(x).detach()])
    for one, other in zip(*results, strict=True):
        assert float((other - one).abs().max()) <= 1e-4 * max(float(one.abs().max()), 0.1)  # some gradients cancel


def test_the_kernels_are_what_a_fused_module_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """And torch's operations are what others run: to the bit, in the order of He et al.'s block."""
    calls: list[int] = []
    apply = fused.apply

    def counted(*given: Any) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return apply(*given)

    monkeypatch.setattr(fused, "apply", counted)
    bn = BatchNorm(5).to(DEVICE)
    x, added = torch.randn(2, 4, 5, 3, 3, device=DEVICE)
    expected = F.relu(F.batch_norm(x, None, None, bn.weight, bn.bias, True) + added)
    assert torch.equal(bn.with_relu(x, added), expected) and not calls
    set_fused(bn, True)
    torch.testing.assert_close(bn.with_relu(x, added), expected)
    bn(x)
    assert len(calls) == 2
    set_groups(bn, batch_groups(2, views=1))  # two groups cut this rank's batch
    bn.with_relu(x, added)
    twin = copy.deepcopy(bn).eval()
    twin.with_relu(x, added)
    assert len(calls) == 2 and twin.fused
    with pytest.raises(ValueError, match=r"BatchNorm takes \[N, C\] or \[N, C, H, W\], not \[2, 5, 4\]"):
        BatchNorm(5).with_relu(torch.zeros(2, 5, 4))


def shared(ranks: Ranks, groups: int, on: bool) -> tuple[dict[str, Tensor], list[int]]:
    """One step of this rank's images of 8, and the number of exchanges forward and backward."""
    bn = BatchNorm(5)
    set_fused(bn, on)
    set_groups(bn, batch_groups(groups, views=1, rank=ranks.rank, world=ranks.world, group=ranks.group))
    given = {name: t.cpu() for name, t in inputs((8, 5, 3, 3), torch.float32).items()}
    n = 8 // ranks.world
    x, residual, dy = (given[name][ranks.rank * n :][:n].clone() for name in ("x", "residual", "dy"))
    x.requires_grad_()
    with torch.no_grad():
        bn.weight.copy_(given["weight"])
    sent: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((gathering, "all_gather_single"), (dist, "all_reduce")):
            exchange = getattr(module, name)
            patch.setattr(module, name, lambda *a, exchange=exchange, **k: sent.append("sent") or exchange(*a, **k))  # type: ignore[func-returns-value]
        y = bn.with_relu(x, residual)
        forward = len(sent)
        y.backward(dy)  # type: ignore[no-untyped-call]
    average_running_statistics(bn, ranks.group)
    assert bn.weight.grad is not None and x.grad is not None
    assert bn.running_mean is not None and bn.running_var is not None
    tensors = {"y": y.detach(), "dx": x.grad, "dweight": bn.weight.grad, "mean": bn.running_mean, "var": bn.running_var}
    return tensors, [forward, len(sent) - forward]


@pytest.mark.parametrize(("world", "groups"), [(2, 1), (4, 2), (2, 2), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_ranks_that_share_statistics(ranks_pool: Pool, world: int, groups: int) -> None:
    plain, quick = (ranks_pool(world, shared, groups, on) for on in (False, True))
    for (expected, count), (tensors, exchanges) in zip(plain, quick, strict=True):
        assert exchanges == count == ([0, 0] if groups == world else [1, 1])
        for name, value in expected.items():
            torch.testing.assert_close(tensors[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(64, 64, 56, 56), (32, 2048, 7, 7), (7, 24, 33, 31), (512, 128)])
def test_large_maps_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for residual, relu in itertools.product((False, True), repeat=2):
        given = inputs(shape, dtype, residual)
        expected, got = oracle(**given, relu=relu), found(**given, relu=relu, backend="fused")
        for name, value in expected.items():
            # float32 sums of up to 200,000 values. Of 13 million, some within 1e-6 of 0 may fall on the other side of
            # ReLU, with a gradient of one of 6 million each: 4 of them are 8e-4 of the norm.
            error = float((got[name].double() - value).norm() / value.norm())
            assert error <= max(3e-3 if relu else 1e-4, TOLERANCE[dtype]), f"{name}: {error}"
        again = found(**given, relu=relu, backend="fused")
        assert all(torch.equal(got[name], again[name]) for name in got)


@pytest.mark.gpu
def test_it_runs_in_a_cuda_graph() -> None:
    given = inputs((16, 64, 14, 14), torch.bfloat16)
    x, running = given["x"].requires_grad_(), [torch.zeros(64, device=DEVICE), torch.ones(64, device=DEVICE)]

    def step() -> tuple[Tensor, ...]:
        y = batch_norm(
            x, given["weight"], given["bias"], residual=given["residual"], relu=True, running=(running[0], running[1]),
            backend="fused",
        )  # fmt: skip
        return y, *torch.autograd.grad(y, x, given["dy"])

    graph, found = captured(step)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        before = [t.clone() for t in running]
    graph.replay()
    replayed = [t.clone() for t in running]
    for now, start in zip(running, before, strict=True):
        now.copy_(start)
    assert all(torch.equal(one, other) for one, other in zip(found, step(), strict=True))
    assert all(torch.equal(one, other) for one, other in zip(replayed, running, strict=True))
