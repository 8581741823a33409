"""NT-Xent's weights, bank and temperature tensor in the reference, on 1 to 4 ranks, and what the entry refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsimclr.distributed.ranks import Ranks
from fastsimclr.kernels.nt_xent import nt_xent, reference
from fastsimclr.kernels.nt_xent.op import nt_xent_backward_op, nt_xent_op
from fastsimclr.kernels.nt_xent.state import Inputs
from tests.kernels.nt_xent_oracle import normalised, pairs, whole_matrix

Pool = Callable[..., list[Any]]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def case(images: int, dim: int, kinds: str) -> dict[str, Any]:
    """x and the extras named in `kinds`: w, v (one weight an image), b, t; float64."""
    generator = torch.Generator().manual_seed(images)
    x = pairs(images, dim).double().to(DEVICE)
    weights = torch.rand(images if "v" in kinds else 2 * images, generator=generator, dtype=torch.float64)
    weights[1] = 0
    bank = torch.randn(9, dim, generator=generator, dtype=torch.float64)
    bank[3] = 0
    return {
        "x": x,
        "weights": weights.to(DEVICE) if "w" in kinds or "v" in kinds else None,
        "bank": bank.to(DEVICE) if "b" in kinds else None,
        "tensor": "t" in kinds,
    }


def expected(
    x: Tensor, temperature: float, weights: Tensor | None, bank: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, dx and dL/dt by float64 autograd."""
    leaf = x.double().clone().requires_grad_()
    t = torch.tensor(temperature, dtype=torch.float64, device=x.device, requires_grad=True)
    rows = weights.repeat(len(x) // len(weights)) if weights is not None else None
    bank = None if bank is None else torch.nn.functional.normalize(bank.double())
    loss = whole_matrix(normalised(leaf), t, rows, bank)
    dx, dt = torch.autograd.grad(loss, (leaf, t))
    return loss.detach(), dx, dt


def found(x: Tensor, temperature: float, tensor: bool, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    t = torch.tensor(temperature, dtype=torch.float64, device=x.device, requires_grad=tensor)
    loss = nt_xent(leaf, t if tensor else temperature, **options).loss
    loss.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return loss.detach(), leaf.grad, t.grad if t.grad is not None else torch.zeros_like(t)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("kinds", ["w", "v", "b", "t", "wb", "vbt"])
def test_extras_equal_autograd(kinds: str, temperature: float) -> None:
    given = case(11, 5, kinds)
    loss, dx, dt = expected(given["x"], temperature, given["weights"], given["bank"])
    got, gradient, slope = found(given.pop("x"), temperature, given.pop("tensor"), block_rows=4, **given)
    torch.testing.assert_close(got, loss, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(gradient, dx, rtol=1e-9, atol=1e-10 * float(dx.abs().max()))
    if "t" in kinds:
        torch.testing.assert_close(slope, dt, rtol=1e-9, atol=1e-12)


def test_weights_of_one_change_nothing_and_google_doubles() -> None:
    x = pairs(6, 4).double().to(DEVICE)
    plain, google = found(x, 0.2, True), found(x, 0.2, True, scaling="google")
    for ones in (torch.ones(6, device=DEVICE), torch.ones(12, device=DEVICE)):
        for one, other in zip(found(x, 0.2, True, weights=ones), plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-15)
    for twice, one in zip(google, plain, strict=True):
        torch.testing.assert_close(twice, 2 * one)


def test_a_bank_counts_in_the_accuracy_and_makes_one_pair_a_task() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64, device=DEVICE)
    bank = torch.tensor([[0.0, 1.0], [2.0, 0.1], [-1.0, 0.0]], dtype=torch.float64, device=DEVICE)
    alone, beside = nt_xent(x, 0.5), nt_xent(x, 0.5, bank=bank)
    assert float(alone.loss) == 0 and float(beside.loss) > 0.5
    # Row 0 is nearer to bank[1] than to its positive (cosine .9988 against .7071), row 1 as well (.7416).
    assert float(alone.top1) == 1 and float(beside.top1) == 0 and float(beside.top5) == 1


def test_gradcheck_of_the_temperature_too() -> None:
    x = pairs(3, 3).double().requires_grad_()
    t, bank = torch.tensor(0.3, dtype=torch.float64, requires_grad=True), torch.randn(4, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda y, s: nt_xent(y, s, bank=bank, block_rows=4).loss, (x, t))


def own_rows(ranks: Ranks, images: int) -> Tensor:
    n = images // ranks.world
    first = torch.arange(ranks.rank * n, (ranks.rank + 1) * n)
    return torch.cat((first, first + images))


def on_a_rank(ranks: Ranks, given: dict[str, Any], temperature: float) -> Any:
    given = dict(given)
    x = given.pop("x")
    own = own_rows(ranks, len(x) // 2)
    if given["weights"] is not None:
        given["weights"] = given["weights"][own]
    return found(x[own], temperature, given.pop("tensor"), block_rows=3, group=ranks.group, **given)


@pytest.mark.parametrize("temperature", [0.02, 0.3])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_give_the_whole_batch(ranks_pool: Pool, world: int, temperature: float) -> None:
    given = {key: v.cpu() if isinstance(v, Tensor) else v for key, v in case(12, 5, "wbt").items()}
    loss, dx, dt = expected(given["x"], temperature, given["weights"], given["bank"])
    results = ranks_pool(world, on_a_rank, given, temperature)
    torch.testing.assert_close(sum(r[0] for r in results) / world, loss, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(sum(r[2] for r in results) / world, dt, rtol=1e-9, atol=1e-12)
    gradient = torch.empty_like(dx)
    for rank, result in enumerate(results):
        gradient[own_rows(Ranks(rank=rank, world=world), 12)] = result[1] / world
    torch.testing.assert_close(gradient, dx, rtol=1e-9, atol=1e-10 * float(dx.abs().max()))


@pytest.mark.parametrize("temperature", [0.0, -0.1, math.nan])
def test_a_temperature_tensor_not_above_zero(temperature: float) -> None:
    x, t = pairs(3, 4), torch.tensor(temperature)
    with pytest.raises(ValueError, match=r"temperature holds .* not above 0"):
        nt_xent(x, t)
    # On a device nobody looks: the operator's body gives NaN.
    loss, _, _, state = reference.forward(Inputs(x, t))
    dx, dt = reference.backward(torch.ones(()), state, t, 1.0, 0, 0, x.dtype)
    assert loss.isnan() and dx.isnan().all() and dt.isnan()


def test_a_negative_weight() -> None:
    x, weights = pairs(3, 4), torch.tensor([1.0, -1.0, 1.0])
    with pytest.raises(ValueError, match=r"weights holds -1.0, which is not 0 or more"):
        nt_xent(x, 0.1, weights=weights)
    assert reference.forward(Inputs(x, 0.1, weights.repeat(2)))[0].isnan()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"weights": torch.ones(5)}, r"weights has shape \[5\], not \[8\] or \[4\]"),
        ({"weights": torch.ones(8, dtype=torch.int64)}, r"weights has dtype torch.int64.*weights.float"),
        ({"weights": torch.ones(8, device="meta")}, r"weights is on meta and x on cpu; use weights.to"),
        ({"bank": torch.ones(3, 4)}, r"bank has shape \[3, 4\], not \[3, 3\]"),
        ({"bank": torch.ones(0, 3)}, r"bank has shape \[0, 3\], not \[1, 3\]"),
        ({"bank": torch.tensor(1.0)}, r"bank has shape \[\], not \[1, 3\]"),
        ({"temperature": torch.ones(1)}, r"temperature has shape \[1\], not \[\]"),
        ({"temperature": torch.tensor(1)}, r"temperature has dtype torch.int64"),
        ({"backend": "triton"}, "backend='triton'.*auto, fused or reference"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nt_xent(torch.ones(8, 3), **{"temperature": 0.1, **options})


# opcheck looks at the gradients of copies.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.slow
def test_the_operators_are_well_formed_and_compile_in_one_graph() -> None:
    x, weights, bank = pairs(5, 4), torch.rand(10), torch.randn(3, 4)
    t = torch.tensor(0.2, requires_grad=True)
    arguments = (x.clone().requires_grad_(), bank, None, "reference", 1, 1.0, t, weights, 1.0, 0, "")
    torch.library.opcheck(nt_xent_op, arguments)
    state = nt_xent_op(x, None, None, "reference", 1, 0.1, None, None, 1.0, 0, "")[3:]
    options = (None, 4, torch.float32, 0, False, "reference", 1, 0.1, 1.0, 0, "")
    torch.library.opcheck(nt_xent_backward_op, (torch.ones(()), list(state), *options))

    def loss(y: Tensor, s: Tensor) -> Tensor:
        return nt_xent(y * 2, s, weights=weights, bank=bank).loss * 3

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    leaves = [(x.clone().requires_grad_(), t.detach().clone().requires_grad_()) for _ in range(2)]
    for function, (y, s) in zip((loss, compiled), leaves, strict=True):
        function(y, s).backward()  # type: ignore[no-untyped-call]
    for one, other in zip(*leaves, strict=True):
        assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad)
