"""The fused NT-Xent against float64 on the same fp16 vectors; all memory that is not written is NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastsimclr.distributed.ranks import Ranks
from fastsimclr.kernels.nt_xent import fused, nt_xent
from fastsimclr.kernels.nt_xent.op import nt_xent_backward_op, nt_xent_op
from fastsimclr.kernels.nt_xent.state import Inputs
from tests.exchanges import Exchanges
from tests.kernels.nt_xent_oracle import pairs, top, whole_matrix

Pool = Callable[..., list[Any]]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Numpy, which the interpreter computes with, warns of what is meant: exp2(-inf), y / 0 in a branch not taken, NaN.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and scratch memory start as NaN."""
    empty = torch.empty

    def poisoned(*arguments: Any, **options: Any) -> Tensor:
        tensor = empty(*arguments, **options)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(params=["small", "real"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 32 x 16 and 16 x 32, of which few rows already need many, and those of the GPU."""
    if request.param == "small":
        for name, tile in (("FORWARD", (32, 16)), ("FORWARD_WIDE", (16, 32)), ("BACKWARD", (16, 32))):
            monkeypatch.setattr(fused, name, {80: fused.Tile(*tile, 4, 2)})


def kernel(x: Tensor, temperature: float | Tensor, **options: Any) -> tuple[Any, Tensor]:
    """The outputs and dx of the fused kernels, by way of the entry."""
    leaf = x.clone().requires_grad_()
    out = nt_xent(leaf, temperature, backend="fused", **options)
    out.loss.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None and leaf.grad.dtype == x.dtype
    return out, leaf.grad


def packed(x: Tensor, bank: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What the kernels hold of x and the bank, as float64: fp16 vectors."""
    z = fused.forward(Inputs(x, 0.5, bank=bank))[3].z[:, : x.shape[1]].double()
    start = -(-len(x) // 128) * 128
    return z[: len(x)], z[start : start + (0 if bank is None else len(bank))]


def oracle(
    x: Tensor, temperature: float, weights: Tensor | None = None, bank: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, dx, dL/dt and dz / |x| of float64 autograd on the vectors that the kernels hold."""
    z, z_bank = packed(x, bank)
    z.requires_grad_()
    t = torch.tensor(temperature, dtype=torch.float64, device=x.device, requires_grad=True)
    loss = whole_matrix(z, t, weights, None if bank is None else z_bank)
    dz, dt = torch.autograd.grad(loss, (z, t))
    z = z.detach()
    norms = x.double().norm(dim=1, keepdim=True)
    dx = (dz - z * (z * dz).sum(1, keepdim=True) / (z * z).sum(1, keepdim=True)) / norms
    return loss.detach(), dx, dt, dz / norms


def assert_close(got: tuple[Any, Tensor], expected: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """G is rounded to fp16, 5e-4 at most; where the loss is below 1e-7 or dz is nearly radial the bound is absolute."""
    (out, gradient), (loss, dx, _, dz) = got, expected
    torch.testing.assert_close(out.loss.double(), loss, rtol=2e-5, atol=1e-9)
    error = float((gradient.double() - dx).norm())
    floor = 1e-6 * float(dz.norm()) + (0 if loss > 1e-7 else 1e-7)
    # What comes back is rounded to x's dtype, of 11 or 8 bits; fp16 gradients also end at 6e-8.
    own = {torch.float32: 0.0, torch.float16: 5e-4, torch.bfloat16: 4e-3}[gradient.dtype]
    floor += 6e-8 * gradient.numel() ** 0.5 if gradient.dtype == torch.float16 else 0
    assert error <= (1e-3 + own) * float(dx.norm()) + floor, (error, float(dx.norm()), floor)


SHAPES = [
    # rows, dim, noise in a pair, spread about a common direction
    (4, 5, 0.7, 1.0),
    (6, 64, 0.01, 1.0),
    (30, 1, 0.7, 1.0),
    (62, 130, 0.7, 0.3),
    (64, 16, 0.0, 0.0),
    (62, 100, 0.1, 1.0),
    (34, 300, 0.02, 1.0),
    (94, 40, 0.5, 0.8),
]
FAST = 5
"""Of these in the fast set."""


def crossed(shapes: Sequence[tuple[Any, ...]], temperatures: Sequence[float]) -> list[Any]:
    """Each shape with each temperature: slow, but for one of them in turn with each of the first shapes."""
    return [
        pytest.param(
            *shape, temperature, marks=[] if row % len(temperatures) == column and row < FAST else pytest.mark.slow
        )
        for row, shape in enumerate(shapes)
        for column, temperature in enumerate(temperatures)
    ]


@pytest.mark.parametrize("rows, dim, noise, spread, temperature", crossed(SHAPES, (0.05, 0.1, 0.5)))
@pytest.mark.parametrize("tiles", ["small"], indirect=True)
def test_loss_and_gradient(rows: int, dim: int, noise: float, spread: float, temperature: float, tiles: None) -> None:
    x = pairs(rows // 2, dim, noise=noise, spread=spread).to(DEVICE)
    got, expected = kernel(x, temperature), oracle(x, temperature)
    assert_close(got, expected)
    z, _ = packed(x)
    assert float(got[0].top1) == pytest.approx(top(z, 1), abs=1e-6)
    assert float(got[0].top5) == pytest.approx(top(z, 5), abs=1e-6)


GPU_SHAPES = [(4, 128, 0.3), (258, 128, 0.7), (258, 257, 0.3), (514, 128, 0.3)]


@pytest.mark.parametrize(
    "rows, dim, noise, temperature",
    [
        *crossed(GPU_SHAPES[:2], (0.05, 0.1, 0.5)),
        *(pytest.param(*case.values, marks=pytest.mark.slow) for case in crossed(GPU_SHAPES[2:], (0.05, 0.1, 0.5))),
    ],
)
def test_loss_and_gradient_in_the_tiles_of_the_gpu(rows: int, dim: int, noise: float, temperature: float) -> None:
    x = pairs(rows // 2, dim, noise=noise).to(DEVICE)
    assert_close(kernel(x, temperature), oracle(x, temperature))


@settings(max_examples=settings().max_examples // 6)  # each takes up to a second in the interpreter
@given(
    images=st.integers(2, 40),
    dim=st.integers(2, 40),
    bank=st.integers(0, 40),
    weighted=st.booleans(),
    temperature=st.sampled_from([0.01, 0.06, 0.3]),
)
def test_any_shape(images: int, dim: int, bank: int, weighted: bool, temperature: float) -> None:
    x = pairs(images, dim).to(DEVICE)
    extras = {
        "weights": torch.rand(2 * images, generator=torch.Generator().manual_seed(0)).to(DEVICE) if weighted else None,
        "bank": pairs(bank, dim, seed=1)[:bank].to(DEVICE) if bank else None,
    }
    assert_close(kernel(x, temperature, **extras), oracle(x, temperature, **extras))


@pytest.mark.parametrize("temperature", [0.01, *(pytest.param(t, marks=pytest.mark.slow) for t in (0.1, 1.0))])
def test_online_maximum_and_the_temperatures_gradient(temperature: float, tiles: None) -> None:
    x, bank = pairs(31, 24, noise=0.9).to(DEVICE), pairs(10, 24, seed=2).to(DEVICE)
    weights = torch.linspace(0, 2, 62, device=DEVICE)
    t = torch.tensor(temperature, device=DEVICE, requires_grad=True)
    expected = oracle(x, temperature, weights, bank)
    assert_close(kernel(x, t, weights=weights, bank=bank), expected)
    assert t.grad is not None
    # Sums of float32 that cancel to a tenth.
    torch.testing.assert_close(t.grad.double(), expected[2], rtol=1e-4, atol=1e-6)
    assert_close(kernel(x, temperature, weights=weights, bank=bank), expected)


@pytest.mark.parametrize("bank_rows", [33, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (1, 32))])
@pytest.mark.parametrize("tiles", ["small"], indirect=True)
def test_weights_of_images_and_a_bank_at_work(bank_rows: int, tiles: None) -> None:
    # In as few dimensions every vector counts.
    x, bank = pairs(20, 3).to(DEVICE), pairs(17, 3, seed=3)[-bank_rows:].to(DEVICE)
    weights = torch.linspace(0, 3, 20, device=DEVICE)
    out, dx = kernel(x, 0.2, weights=weights, bank=bank, scaling="google")
    loss, expected, dt, dz = oracle(x, 0.2, weights.repeat(2), bank)
    assert_close((out, dx), (2 * loss, 2 * expected, dt, 2 * dz))
    z, z_bank = packed(x, bank)
    assert float(out.top1) == pytest.approx(top(z, 1, z_bank), abs=1e-6)
    assert float(out.top5) == pytest.approx(top(z, 5, z_bank), abs=1e-6)


@pytest.mark.parametrize("weight", [1.0, 1e6])
@pytest.mark.parametrize("temperature", [0.03, 0.1])
def test_fp16_weights_keep_their_digits_at_any_size(temperature: float, weight: float) -> None:
    """G is scaled by its own size: far below a loss of 1e-7 it does not vanish, and with large weights not overflow."""
    x = pairs(20, 64, noise=0.05).to(DEVICE)
    weights = torch.full((40,), weight, device=DEVICE)
    _, dx = kernel(x, temperature, weights=weights)
    loss, expected, _, _ = oracle(x, temperature, weights)
    assert float(loss) < 1e-8 * weight or temperature == 0.1
    assert float((dx.double() - expected).norm()) <= 1e-3 * float(expected.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_also_not_contiguous_under_autocast(dtype: torch.dtype) -> None:
    x = pairs(15, 10).to(DEVICE, dtype)
    expected = oracle(x, 0.1)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        got = kernel(x.T.contiguous().T, 0.1)
    assert_close(got, expected)
    assert torch.equal(got[1], kernel(x, 0.1)[1]) and got[0].loss.dtype == torch.float32


def test_packing_rounds_the_normalised_rows() -> None:
    x = pairs(9, 33).to(DEVICE)
    x[4] = 0
    z = fused.forward(Inputs(x, 0.5, bank=x[:3]))[3].z
    assert z.shape == (256, 64) and z.dtype == torch.float16
    exact = torch.nn.functional.normalize(x.double())
    torch.testing.assert_close(z[:18, :33].double(), exact, rtol=2**-11 * 1.001, atol=2**-25)
    torch.testing.assert_close(z[128:131], z[:3], rtol=0, atol=0)
    assert not z[:, 33:].any() and not z[18:128].any() and not z[131:].any()


def test_zero_rows() -> None:
    x = pairs(6, 4).to(DEVICE)
    x[3] = 0
    out, dx = kernel(x, 0.1)
    assert not dx[3].any() and dx.isfinite().all() and dx.any()
    expected = nt_xent(x.double(), 0.1, backend="reference")
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=5e-3)  # fp16 vectors, divided by the temperature


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("temperature", [0.1, torch.tensor(0.1)])
def test_nan_and_infinity_reach_everything(bad: float, temperature: Any) -> None:
    x = pairs(40, 3).to(DEVICE)
    x[5, 1] = bad
    out, dx = kernel(x, temperature.to(DEVICE) if isinstance(temperature, Tensor) else temperature)
    assert out.loss.isnan() and float(out.top1) == 0 and dx.isnan().all()
    bank = torch.full((1, 3), bad, device=DEVICE)
    out, dx = kernel(pairs(3, 3).to(DEVICE), 0.1, bank=bank)
    assert out.loss.isnan() and float(out.top1) == 0 and dx.isnan().all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_bad_temperature_on_the_device_gives_nan(temperature: float) -> None:
    t, x = torch.tensor(temperature, device=DEVICE), pairs(3, 4).to(DEVICE)
    loss, _, _, state = fused.forward(Inputs(x, t))
    dx, dt = fused.backward(torch.ones((), device=DEVICE), state, t, 1.0, 0, x.dtype, 1, 4, 0)
    assert loss.isnan() and dx.isnan().all() and dt.isnan()
    weights = torch.tensor([1.0, -1, 1, 1, 1, 1], device=DEVICE)
    assert fused.forward(Inputs(x, 0.1, weights))[0].isnan()


@pytest.mark.parametrize("temperature", [0.001, 0.0249, 0.025, 0.03])
def test_opposite_vectors_stay_finite(temperature: float) -> None:
    direction = torch.randn(8, generator=torch.Generator().manual_seed(2))
    x = torch.stack((direction, direction, -direction, -direction)).to(DEVICE)
    out, dx = kernel(x, temperature)
    # Each positive is the farthest row, the other negative coincides; the rounded vectors are 1e-3 from unit length.
    assert out.loss.item() == pytest.approx(2 / temperature, rel=2e-3)
    assert float(out.top1) == 0 and dx.isfinite().all()


def test_collapse_ties_and_a_single_pair() -> None:
    one = torch.randn(1, 20, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    out, dx = kernel(one.expand(64, 20).contiguous(), 0.5)
    assert out.loss.item() == pytest.approx(math.log(63), rel=1e-5) and float(out.top5) == 0
    assert float(dx.abs().max()) < 1e-6
    out, dx = kernel(pairs(1, 4).to(DEVICE), 0.1)
    assert out.loss.item() == 0 and float(out.top1) == 1 and not dx.any()


def test_the_same_bits_every_time() -> None:
    x = pairs(70, 20).to(DEVICE)
    (one, first), (other, second) = kernel(x, 0.1), kernel(x, 0.1)
    assert torch.equal(first, second) and torch.equal(one.loss, other.loss)


def test_columns_are_divided_to_fill_the_device() -> None:
    tile = fused.Tile(64, 64, 4, 3)
    for m, columns, bank in ((4, 4, 0), (514, 514, 0), (64, 256, 1000), (8192, 65536, 65536)):
        part = fused._divide(m, columns, bank, 0, tile, 128, DEVICE)
        tiles, bank_tiles = -(-columns // 64), -(-bank // 64)
        bank_splits = part.all_splits - part.splits
        assert (part.splits - 1) * part.tiles < tiles <= part.splits * part.tiles
        assert (bank_splits - 1) * part.bank_tiles < bank_tiles <= bank_splits * part.bank_tiles
        assert part.bank_start % 128 == 0 and part.bank_stop - part.bank_start == bank
    assert fused._divide(256, 256, 0, 0, tile, 128, DEVICE).splits > 1


@pytest.mark.parametrize("x", [torch.ones(4, 3, dtype=torch.float64), torch.ones(4, 2049)])
def test_what_fused_does_not_take(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"backend=fused does not take x of .*backend=reference"):
        nt_xent(x.to(DEVICE), 0.1, backend="fused")
    assert nt_xent(x.to(DEVICE), 0.1).loss.isfinite()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.slow
def test_the_operators_are_well_formed_and_compile_in_one_graph() -> None:
    x, weights, bank = pairs(5, 4).to(DEVICE), torch.rand(10, device=DEVICE), torch.randn(3, 4, device=DEVICE)
    t = torch.tensor(0.2, device=DEVICE, requires_grad=True)
    torch.library.opcheck(nt_xent_op, (x.clone().requires_grad_(), bank, None, "fused", 1, 1.0, t, weights, 1.0, 0, ""))
    state = nt_xent_op(x, None, None, "fused", 1, 0.1, None, None, 1.0, 0, "")[3:]
    options = (None, 4, torch.float32, 0, False, "fused", 1, 0.1, 1.0, 0, "")
    torch.library.opcheck(nt_xent_backward_op, (torch.ones((), device=DEVICE), list(state), *options))
    compiled = torch.compile(
        lambda y: nt_xent(y * 2, 0.1, bank=bank, backend="fused").loss, backend="aot_eager", fullgraph=True
    )
    leaf = x.clone().requires_grad_()
    compiled(leaf).backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, 2 * kernel(2 * x, 0.1, bank=bank)[1])


def own_rows(ranks: Ranks, images: int) -> Tensor:
    n = images // ranks.world
    first = torch.arange(ranks.rank * n, (ranks.rank + 1) * n)
    return torch.cat((first, first + images))


def on_a_rank(ranks: Ranks, x: Tensor, temperature: float, tensor: bool, weights: Tensor, bank: Tensor) -> Any:
    own = own_rows(ranks, len(x) // 2)
    t = torch.tensor(temperature, requires_grad=tensor)
    leaf = x[own].requires_grad_()
    with np.errstate(all="ignore"):
        out = nt_xent(
            leaf, t if tensor else temperature, weights=weights[own], bank=bank, backend="fused", group=ranks.group
        )
        out.loss.backward()  # type: ignore[no-untyped-call]
        with Exchanges() as forward:
            loss, _, _, state = fused.forward(Inputs(x[own], temperature, group=ranks.group))
        with Exchanges() as backward:
            first = ranks.rank * len(own)
            fused.backward(torch.ones_like(loss), state, temperature, 1.0, first, x.dtype, ranks.world, x.shape[1], 0)
    slope = t.grad if t.grad is not None else torch.zeros(())
    return *(float(value.detach()) for value in out), float(slope), leaf.grad, len(forward.names), backward.names


@pytest.mark.parametrize(
    "world, temperature, tensor",
    [
        (2, 0.1, True),
        pytest.param(4, 0.02, False, marks=pytest.mark.slow),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(2, 0.1, False), (2, 0.02, False), (4, 0.1, True)]),
        pytest.param(4, 0.1, False, marks=pytest.mark.slow),
    ],
)
def test_ranks_equal_one(ranks_pool: Pool, world: int, temperature: float, tensor: bool) -> None:
    x, bank, weights = pairs(36, 10), pairs(7, 10, seed=5), torch.linspace(0, 1, 72)
    alone = on_a_rank_alone(x, temperature, tensor, weights, bank)
    results = ranks_pool(world, on_a_rank, x, temperature, tensor, weights, bank)
    for k, value in enumerate(alone[:4]):
        # float32 sums in another order.
        assert sum(r[k] for r in results) / world == pytest.approx(value, rel=1e-5, abs=1e-6)
    gradient = torch.empty_like(x)
    for rank, result in enumerate(results):
        gradient[own_rows(Ranks(rank=rank, world=world), 36)] = result[4] / world
        assert result[5] == 2 and result[6] == []
    # exp2 and the sums differ in the last bit, so that some G round to the other fp16 neighbour.
    assert float((gradient - alone[4]).norm()) <= 1e-4 * float(alone[4].norm())


def on_a_rank_alone(x: Tensor, temperature: float, tensor: bool, weights: Tensor, bank: Tensor) -> Any:
    t = torch.tensor(temperature, device=DEVICE, requires_grad=tensor)
    out, dx = kernel(x.to(DEVICE), t if tensor else temperature, weights=weights.to(DEVICE), bank=bank.to(DEVICE))
    slope = t.grad if t.grad is not None else torch.zeros(())
    return *(float(value.detach()) for value in out), float(slope), dx.cpu()
