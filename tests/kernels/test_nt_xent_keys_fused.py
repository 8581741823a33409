"""The fused NT-Xent with a momentum encoder's keys against float64 on the same fp16 vectors; fresh memory is NaN."""

# M rows    D dimensions    K rows of the bank

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from fastsimclr.distributed.ranks import Ranks
from fastsimclr.kernels.nt_xent import fused, nt_xent
from fastsimclr.kernels.nt_xent.op import nt_xent_backward_op, nt_xent_op
from fastsimclr.kernels.nt_xent.state import Inputs
from tests.exchanges import Exchanges
from tests.kernels.nt_xent_oracle import pairs

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


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 32 x 16 and 16 x 32, of which few rows already need many."""
    for name, tile in (("FORWARD", (32, 16)), ("FORWARD_WIDE", (16, 32)), ("BACKWARD", (16, 32))):
        monkeypatch.setattr(fused, name, {80: fused.Tile(*tile, 4, 2)})


def case(images: int, dim: int, bank_rows: int = 0, noise: float = 0.4) -> dict[str, Any]:
    """x, keys near it, a bank and weights; float32."""
    x = pairs(images, dim, noise=noise)
    generator = torch.Generator().manual_seed(images)
    keys = 3 * normalize(x) + noise * torch.randn(2 * images, dim, generator=generator) / math.sqrt(dim)
    given = {"x": x, "keys": keys, "weights": torch.linspace(0, 2, 2 * images)}
    if bank_rows:
        given["bank"] = pairs(bank_rows, dim, seed=1)[:bank_rows]
    return {name: value.to(DEVICE) for name, value in given.items()}


def kernel(given: dict[str, Any], temperature: float | Tensor, **options: Any) -> tuple[Any, Tensor]:
    """The outputs and dx of the fused kernels, by way of the entry."""
    given = dict(given)
    leaf = given.pop("x").clone().requires_grad_()
    out = nt_xent(leaf, temperature, backend="fused", **given, **options)
    out.loss.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype
    return out, leaf.grad


def whole_matrix(q_MD: Tensor, k_MD: Tensor, t: Tensor, weights_M: Tensor, bank_KD: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and each row's number of negatives no less similar than its positive, within 5e-6."""
    m = len(q_MD)
    itself = torch.eye(m, dtype=torch.bool, device=q_MD.device)
    left_out = torch.cat((itself | itself.roll(m // 2, 1), itself.new_zeros(m, len(bank_KD))), 1)
    c_MC = q_MD @ torch.cat((k_MD, bank_KD)).T
    c_M1 = (q_MD * k_MD.roll(m // 2, 0)).sum(1, keepdim=True)
    losses_M = ((c_MC - c_M1) / t).exp().masked_fill(left_out, 0).sum(1).log1p()
    return (weights_M * losses_M).mean(), ((c_MC >= c_M1 - 5e-6) & ~left_out).sum(1)


def oracle(given: dict[str, Any], temperature: float) -> dict[str, Tensor]:
    """float64 autograd on the fp16 vectors that the kernels hold: keys, bank and this rank's rows."""
    x, bank, m = given["x"], given.get("bank"), len(given["x"])
    packed = fused.forward(Inputs(x, 0.5, bank=bank, keys=given["keys"]))[3].z[:, : x.shape[1]].double()
    start = -(-m // 128) * 128
    z, keys = packed[-m:].clone().requires_grad_(), packed[:m]
    z_bank = packed[start : start + (0 if bank is None else len(bank))]
    t = torch.tensor(temperature, dtype=torch.float64, device=x.device, requires_grad=True)
    weights = given.get("weights", torch.ones(m, device=x.device)).double()
    loss, rank = whole_matrix(z, keys, t, weights, z_bank)
    dz, dt = torch.autograd.grad(loss, (z, t))
    z, norms = z.detach(), x.double().norm(dim=1, keepdim=True)
    dx = (dz - z * (z * dz).sum(1, keepdim=True) / (z * z).sum(1, keepdim=True)) / norms
    top1, top5 = (rank < 1).double().mean(), (rank < 5).double().mean()
    return {"loss": loss.detach(), "top1": top1, "top5": top5, "dx": dx, "dt": dt, "dz": dz / norms}


def assert_close(got: tuple[Any, Tensor], wanted: dict[str, Tensor]) -> None:
    """As without keys: G is rounded to fp16, 5e-4 at most; below a loss of 1e-7, or of a radial dz, the bound is
    absolute."""
    out, gradient = got
    torch.testing.assert_close(out.loss.double(), wanted["loss"], rtol=2e-5, atol=1e-9)
    error = float((gradient.double() - wanted["dx"]).norm())
    floor = 1e-6 * float(wanted["dz"].norm()) + (0 if wanted["loss"] > 1e-7 else 1e-7)
    # What comes back is rounded to x's dtype, of 11 or 8 bits; fp16 gradients also end at 6e-8.
    own = {torch.float32: 0.0, torch.float16: 5e-4, torch.bfloat16: 4e-3}[gradient.dtype]
    floor += 6e-8 * gradient.numel() ** 0.5 if gradient.dtype == torch.float16 else 0
    assert error <= (1e-3 + own) * float(wanted["dx"].norm()) + floor, (error, float(wanted["dx"].norm()), floor)


@pytest.mark.parametrize(
    "images, dim, bank, noise, temperature",
    [
        (2, 5, 0, 0.7, 0.1),
        (31, 100, 33, 0.1, 0.05),
        pytest.param(15, 2, 3, 0.7, 0.5, marks=pytest.mark.slow),
        pytest.param(20, 130, 32, 0.4, 0.5, marks=pytest.mark.slow),
    ],
)
def test_loss_accuracy_and_gradient(
    images: int, dim: int, bank: int, noise: float, temperature: float, small_tiles: None
) -> None:
    given = case(images, dim, bank, noise)
    (out, dx), wanted = kernel(given, temperature), oracle(given, temperature)
    assert_close((out, dx), wanted)
    assert float(out.top1) == pytest.approx(float(wanted["top1"]), abs=1e-6)
    assert float(out.top5) == pytest.approx(float(wanted["top5"]), abs=1e-6)


def test_in_the_tiles_of_the_gpu() -> None:
    given = case(65, 128, 40)
    assert_close(kernel(given, 0.1), oracle(given, 0.1))


@settings(max_examples=settings().max_examples // 6)  # each takes up to a second in the interpreter
@given(
    images=st.integers(2, 20),
    dim=st.integers(2, 20),
    bank=st.integers(0, 20),
    temperature=st.sampled_from([0.01, 0.06, 0.3]),
)
def test_any_shape(images: int, dim: int, bank: int, temperature: float) -> None:
    given = case(images, dim, bank)
    assert_close(kernel(given, temperature), oracle(given, temperature))


@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_online_maximum_and_the_temperatures_gradient(temperature: float, small_tiles: None) -> None:
    given, t = case(31, 24, 10, 0.9), torch.tensor(temperature, device=DEVICE, requires_grad=True)
    wanted = oracle(given, temperature)
    assert_close(kernel(given, t), wanted)
    assert t.grad is not None
    # Sums of float32 that cancel to a tenth.
    torch.testing.assert_close(t.grad.double(), wanted["dt"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_in_half_precision_also_not_contiguous_under_autocast(dtype: torch.dtype, small_tiles: None) -> None:
    """The keys float32, as the momentum encoder gives them."""
    given = {name: value if name == "keys" else value.to(dtype) for name, value in case(15, 10, 4).items()}
    wanted, straight = oracle(given, 0.1), kernel(given, 0.1)
    turned = given | {name: given[name].T.contiguous().T for name in ("x", "keys")}
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        got = kernel(turned, 0.1)
    assert_close(got, wanted)
    assert torch.equal(got[1], straight[1]) and got[0].loss.dtype == torch.float32


def test_packing_puts_keys_bank_and_rows_in_their_places() -> None:
    given = case(9, 33, 3)
    given["x"][4], given["keys"][7] = 0, 0
    z = fused.forward(Inputs(given["x"], 0.5, bank=given["bank"], keys=given["keys"]))[3].z
    assert z.shape == (256 + 18, 64) and z.dtype == torch.float16
    for rows, start in ((given["keys"], 0), (given["bank"], 128), (given["x"], 256)):
        exact = normalize(rows.double())
        torch.testing.assert_close(z[start : start + len(rows), :33].double(), exact, rtol=2**-11 * 1.001, atol=2**-25)
    assert not z[:, 33:].any() and not z[18:128].any() and not z[131:256].any()
    out, dx = kernel(given, 0.1)
    assert out.loss.isfinite() and dx.isfinite().all() and not dx[4].any() and dx[:4].any()


@pytest.mark.parametrize("bad", [math.nan, 1e30])
@pytest.mark.parametrize("name", ["x", "keys", "bank"])
def test_nan_and_infinity_reach_the_loss(name: str, bad: float, small_tiles: None) -> None:
    given = case(20, 3, 2)
    given[name][1, 1] = bad
    out, dx = kernel(given, 0.1)
    assert out.loss.isnan()
    # A row of x is nobody's column: the other rows' gradients do not know of it.
    assert dx.isnan().all(1).tolist() == ([False, True] + 38 * [False] if name == "x" else 40 * [True])


def test_a_single_pair() -> None:
    given = {name: value for name, value in case(1, 4).items() if name != "weights"}
    out, dx = kernel(given, 0.1)
    assert out.loss.item() == 0 and float(out.top1) == 1 and not dx.any()


def test_the_operators_say_the_shapes_they_give(small_tiles: None) -> None:
    """What torch.compile relies on: the fake implementations against the real ones."""
    given = case(5, 4, 3)
    arguments = (given["x"], given["bank"], given["keys"], "fused", 1, 0.1, None, None, 1.0, 0, "")
    torch.library.opcheck(nt_xent_op, arguments, test_utils="test_faketensor")
    state = nt_xent_op(*arguments)[3:]
    options = (None, 4, torch.float32, 3, True, "fused", 1, 0.1, 1.0, 0, "")
    torch.library.opcheck(
        nt_xent_backward_op, (torch.ones((), device=DEVICE), list(state), *options), test_utils="test_faketensor"
    )


def own_rows(ranks: Ranks, images: int) -> Tensor:
    n = images // ranks.world
    first = torch.arange(ranks.rank * n, (ranks.rank + 1) * n)
    return torch.cat((first, first + images))


def on_a_rank(ranks: Ranks, given: dict[str, Any], temperature: float) -> Any:
    own = own_rows(ranks, len(given["x"]) // 2)
    mine = {name: value if name == "bank" else value[own] for name, value in given.items()}
    t = torch.tensor(temperature, requires_grad=True)
    with np.errstate(all="ignore"):
        out, dx = kernel(mine, t, group=ranks.group)
        with Exchanges() as forward:
            loss, _, _, state = fused.forward(Inputs(mine["x"], 0.1, keys=mine["keys"], group=ranks.group))
        with Exchanges() as backward:
            sizes = ranks.world, mine["x"].shape[1], 0
            fused.backward(torch.ones_like(loss), state, 0.1, 1.0, ranks.rank * len(own), dx.dtype, *sizes, keyed=True)
    assert t.grad is not None
    return *(float(value.detach()) for value in out), float(t.grad), dx, len(forward.names), len(backward.names)


def test_ranks_equal_one_with_one_exchange(ranks_pool: Pool) -> None:
    given, t = case(20, 10, 7), torch.tensor(0.1, device=DEVICE, requires_grad=True)
    out, dx = kernel(given, t)
    assert t.grad is not None
    alone = *(float(value.detach()) for value in out), float(t.grad), dx.cpu()
    given = {name: value.cpu() for name, value in given.items()}
    results = ranks_pool(2, on_a_rank, given, 0.1)
    for k, value in enumerate(alone[:4]):
        # float32 sums in another order.
        assert sum(result[k] for result in results) / 2 == pytest.approx(value, rel=1e-5, abs=1e-6)
    gradient = torch.empty_like(given["x"])
    for rank, result in enumerate(results):
        gradient[own_rows(Ranks(rank=rank, world=2), 20)] = result[4] / 2
        assert result[5:] == (1, 0)
    # exp2 and the sums differ in the last bit, so that some G round to the other fp16 neighbour.
    assert float((gradient - alone[4]).norm()) <= 1e-4 * float(alone[4].norm())
