"""NT-Xent with a momentum encoder's keys against plain float64 loops, on 1 to 4 ranks, and what the entry refuses."""

# N images, M = 2N rows, D dimensions, K rows of the bank

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastsimclr.distributed.ranks import Ranks
from fastsimclr.kernels.nt_xent import nt_xent, reference
from fastsimclr.kernels.nt_xent.op import nt_xent_backward_op, nt_xent_op
from fastsimclr.kernels.nt_xent.state import Inputs
from tests.exchanges import Exchanges
from tests.kernels.nt_xent_oracle import pairs

Pool = Callable[..., list[Any]]


def case(images: int, dim: int, bank_rows: int, weighted: bool) -> dict[str, Any]:
    """x, its keys, a bank and weights; float64. A key lies near its row, as after little training."""
    x = pairs(images, dim).double()
    generator = torch.Generator().manual_seed(images)
    noise, bank = torch.randn(2 * images, dim, generator=generator), torch.randn(bank_rows, dim, generator=generator)
    weights = torch.rand(2 * images, generator=generator, dtype=torch.float64)
    weights[1] = 0
    return {
        "x": x,
        "keys": 3 * (normalize(x) + 0.4 * noise.double() / math.sqrt(dim)),
        "bank": bank.double() if bank_rows else None,
        "weights": weights if weighted else None,
    }


def loops(
    x: Tensor, t: Tensor, keys: Tensor, bank: Tensor | None = None, weights: Tensor | None = None
) -> tuple[Tensor, float, float]:
    """The loss, with graph, and the shares of rows with no, and fewer than five, negatives above the positive."""
    m = len(x)
    q, k, b = normalize(x), normalize(keys), [] if bank is None else normalize(bank)
    loss, first, five = x.new_zeros(()), 0, 0
    for i in range(m):
        p = (i + m // 2) % m
        positive = q[i] @ k[p] / t
        negatives = [q[i] @ k[j] / t for j in range(m) if j not in (i, p)] + [q[i] @ row / t for row in b]
        weight = 1.0 if weights is None else weights[i]
        # -log(e^p / (e^p + sum e^n)) as log(1 + sum e^(n - p)), which keeps its digits near 0.
        loss = loss + weight * (torch.stack(negatives) - positive).exp().sum().log1p() / m
        rank = sum(bool(s >= positive) for s in negatives)
        first, five = first + (rank < 1), five + (rank < 5)
    return loss, first / m, five / m


def expected(given: dict[str, Any], temperature: float) -> tuple[Tensor, float, float, Tensor, Tensor]:
    """Loss, top1, top5, dx and dL/dt by autograd through the loops."""
    given = dict(given)
    leaf = given.pop("x").clone().requires_grad_()
    t = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    loss, top1, top5 = loops(leaf, t, **given)
    return loss.detach(), top1, top5, *torch.autograd.grad(loss, (leaf, t))


def found(given: dict[str, Any], temperature: float, tensor: bool = True, **options: Any) -> Any:
    """As `expected`, of nt_xent; the keys ask for a gradient and must get none."""
    given = dict(given)
    leaf, keys = given.pop("x").clone().requires_grad_(), given.pop("keys").clone().requires_grad_()
    t = torch.tensor(temperature, dtype=torch.float64, requires_grad=tensor)
    out = nt_xent(leaf, t if tensor else temperature, keys=keys, **given, **options)
    out.loss.backward()
    assert leaf.grad is not None and keys.grad is None
    return out.loss.detach(), float(out.top1), float(out.top5), leaf.grad, t.grad


def assert_equal(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-10, atol=1e-14)
    assert got[1:3] == pytest.approx(wanted[1:3], abs=1e-6)
    torch.testing.assert_close(got[3], wanted[3], rtol=1e-9, atol=1e-10 * float(wanted[3].abs().max()))
    if got[4] is not None:
        torch.testing.assert_close(got[4], wanted[4], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
@pytest.mark.parametrize(
    "images, dim, bank, weighted", [(2, 2, 0, False), (7, 5, 0, True), (11, 3, 9, False), (6, 8, 1, True)]
)
def test_loss_accuracy_and_gradients_equal_the_loops(
    images: int, dim: int, bank: int, weighted: bool, temperature: float, tensor: bool
) -> None:
    given = case(images, dim, bank, weighted)
    wanted = expected(given, temperature)
    for block_rows in (None, 1, 5):
        assert_equal(found(given, temperature, tensor, block_rows=block_rows), wanted)
    google = found(given, temperature, tensor, scaling="google")
    assert_equal((google[0] / 2, *google[1:3], google[3] / 2, None), wanted)


def test_the_rows_as_their_own_keys_give_the_loss_of_the_rows_and_less_of_its_gradient() -> None:
    given = case(9, 4, 5, False) | {"keys": pairs(9, 4).double()}
    got, plain = found(given, 0.2), nt_xent(given["x"], 0.2, bank=given["bank"])
    assert float(got[0]) == pytest.approx(float(plain.loss), rel=1e-13)
    assert got[1:3] == pytest.approx((float(plain.top1), float(plain.top5)))
    leaf = given["x"].clone().requires_grad_()
    nt_xent(leaf, 0.2, bank=given["bank"]).loss.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None and float((leaf.grad - got[3]).norm()) > 0.1 * float(leaf.grad.norm())


def own_rows(ranks: Ranks, images: int) -> Tensor:
    n = images // ranks.world
    first = torch.arange(ranks.rank * n, (ranks.rank + 1) * n)
    return torch.cat((first, first + images))


def on_a_rank(ranks: Ranks, given: dict[str, Any], temperature: float) -> Any:
    """The results of this rank's rows, and the exchanges of both operators' bodies."""
    own = own_rows(ranks, len(given["x"]) // 2)
    mine = {name: value if name == "bank" else value[own] for name, value in given.items()}
    result = found(mine, temperature, block_rows=3, group=ranks.group)
    with Exchanges() as forward:
        inputs = Inputs(mine["x"], temperature, bank=mine["bank"], keys=mine["keys"], group=ranks.group)
        loss, _, _, state = reference.forward(inputs)
    with Exchanges() as backward:
        reference.backward(
            torch.ones_like(loss), state, temperature, 1.0, 0, ranks.rank * len(own), loss.dtype, keyed=True
        )
    return result, len(forward.names), len(backward.names)


@pytest.mark.parametrize("temperature", [0.02, 0.3])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_give_the_whole_batch_with_one_exchange(ranks_pool: Pool, world: int, temperature: float) -> None:
    given = case(12, 5, 7, True)
    wanted = expected(given, temperature)
    answers = ranks_pool(world, on_a_rank, given, temperature)
    assert {answer[1:] for answer in answers} == {(1, 0)}
    results = [answer[0] for answer in answers]
    gradient = torch.empty_like(wanted[3])
    for rank, result in enumerate(results):
        gradient[own_rows(Ranks(rank=rank, world=world), 12)] = result[3] / world
    loss, top1, top5, slope = (sum(result[k] for result in results) / world for k in (0, 1, 2, 4))
    assert_equal((loss, top1, top5, gradient, slope), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_worked_on_in_float32_also_under_autocast(dtype: torch.dtype) -> None:
    given = {key: value.to(dtype) for key, value in case(8, 6, 5, True).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = found(given, 0.1, tensor=False)
    single = found({key: value.float() for key, value in given.items()}, 0.1, tensor=False)
    assert got[0].dtype == torch.float32 and torch.equal(got[0], single[0])
    assert got[3].dtype == dtype and torch.equal(got[3], single[3].to(dtype))
    exact = expected({key: value.double() for key, value in given.items()}, 0.1)
    assert float((single[3].double() - exact[3]).abs().max()) <= 1e-5 * float(exact[3].abs().max())


def test_zero_rows_and_a_single_pair() -> None:
    given = case(5, 4, 3, False)
    given["x"][2], given["keys"][6] = 0, 0
    got = found(given, 0.1)
    assert not got[3][2].any() and got[3].isfinite().all() and got[3][:2].any()
    wanted = expected(given, 0.1)
    wanted[3][2] = 0  # autograd divides by the 1e-12 that `normalize` puts in place of the length
    assert_equal((*got[:4], None), wanted)
    pair = found(case(1, 4, 0, False), 0.1)
    assert float(pair[0]) == 0 and pair[1] == 1 and not pair[3].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_nan_and_infinity_reach_the_loss(bad: float) -> None:
    for name in ("x", "keys", "bank"):
        given = {key: value if value is None else value.float() for key, value in case(4, 3, 2, False).items()}
        given[name][1, 1] = bad
        loss, _, _, dx, dt = found(given, 0.1)
        assert loss.isnan() and dt.isnan()
        # A row of x is nobody's column: the other rows' gradients do not know of it.
        assert dx.isnan().all(1).tolist() == ([False, True] + 6 * [False] if name == "x" else 8 * [True])


@pytest.mark.parametrize(
    "keys, message",
    [
        (torch.ones(4, 3), r"keys has shape \[4, 3\], not \[8, 3\]"),
        (torch.ones(8, 4), r"keys has shape \[8, 4\], not \[8, 3\]"),
        (torch.ones(8, 3, dtype=torch.int64), r"keys has dtype torch.int64.*keys.float"),
        (torch.ones(8, 3, device="meta"), r"keys is on meta and x on cpu; use keys.to"),
    ],
)
def test_bad_keys_are_named(keys: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nt_xent(torch.ones(8, 3), 0.1, keys=keys)


# opcheck looks at the gradients of copies.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_the_operators_are_well_formed_and_compile_in_one_graph() -> None:
    x, keys, bank = (pairs(5, 4, seed=seed) for seed in range(3))
    torch.library.opcheck(
        nt_xent_op, (x.clone().requires_grad_(), bank, keys, "reference", 1, 0.1, None, None, 1.0, 0, "")
    )
    state = nt_xent_op(x, None, keys, "reference", 1, 0.1, None, None, 1.0, 0, "")[3:]
    options = (None, 4, torch.float32, 0, True, "reference", 1, 0.1, 1.0, 0, "")
    torch.library.opcheck(nt_xent_backward_op, (torch.ones(()), list(state), *options))
    compiled = torch.compile(lambda y: nt_xent(2 * y, 0.1, keys=keys).loss, backend="aot_eager", fullgraph=True)
    leaf = x.clone().requires_grad_()
    compiled(leaf).backward()  # type: ignore[no-untyped-call]
    wanted = found({"x": 2 * x, "keys": keys}, 0.1, tensor=False)[3]
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, 2 * wanted)
