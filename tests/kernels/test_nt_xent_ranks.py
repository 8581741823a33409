"""NT-Xent over ranks: loss, gradient and accuracy of the whole batch, and how often the ranks exchange."""

# B images of the global batch, N of a rank, D dimensions, W ranks

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from fastsimclr.distributed.ranks import Ranks
from fastsimclr.kernels.gather import all_gather_rows, gather
from fastsimclr.kernels.nt_xent import nt_xent, reference
from fastsimclr.kernels.nt_xent.state import Inputs
from tests.exchanges import Exchanges

Pool = Callable[..., list[Any]]
Scaling = Literal["paper", "google"]


def projections(images: int, dim: int = 6) -> Tensor:
    """[2B, D], both views of all images, with norms far from 1."""
    generator = torch.Generator().manual_seed(images)
    base, noise = torch.randn(2, images, dim, generator=generator, dtype=torch.float64)
    norms = 0.1 + 5 * torch.rand(2 * images, 1, generator=generator, dtype=torch.float64)
    return torch.cat((base, base + 0.6 * noise)) * norms


def formula(x: Tensor, temperature: float, scaling: Scaling) -> tuple[Tensor, float, float]:
    """The loss by the whole matrix and autograd, and the shares of positives in the top 1 and 5."""
    m = len(x)
    z = x / x.norm(dim=1, keepdim=True)
    itself, positive = torch.eye(m, dtype=torch.bool), torch.eye(m, dtype=torch.bool).roll(m // 2, 1)
    s = (z @ z.T / temperature).masked_fill(itself, -math.inf)
    losses = s.logsumexp(1) - s[positive]
    loss = losses.mean() if scaling == "paper" else losses[: m // 2].mean() + losses[m // 2 :].mean()
    rank = (s.masked_fill(positive, -math.inf) >= s[positive][:, None]).sum(1)
    return loss, float((rank < 1).double().mean()), float((rank < 5).double().mean())


def own_rows(ranks: Ranks, images: int) -> Tensor:
    """[2B] -> the rows of this rank, view-major."""
    n = images // ranks.world
    first = torch.arange(ranks.rank * n, (ranks.rank + 1) * n)
    return torch.cat((first, first + images))


def on_a_rank(ranks: Ranks, x: Tensor, temperature: float, scaling: Scaling, block_rows: int | None) -> Any:
    """Loss, top1, top5 and gradient of this rank's rows."""
    own = x[own_rows(ranks, len(x) // 2)].requires_grad_()
    out = nt_xent(own, temperature, scaling=scaling, block_rows=block_rows, group=ranks.group)
    out.loss.backward()
    assert own.grad is not None and own.grad.dtype == x.dtype
    return out.loss.item(), out.top1.item(), out.top5.item(), own.grad


def assembled(results: list[Any], images: int) -> tuple[float, float, float, Tensor]:
    """The means over the ranks, as DDP and the trainer take them, and the gradient of all rows in x's order."""
    world = len(results)
    loss, top1, top5 = (sum(result[k] for result in results) / world for k in range(3))
    gradient = torch.empty(2 * images, results[0][3].shape[1], dtype=results[0][3].dtype)
    for rank, result in enumerate(results):
        gradient[own_rows(Ranks(rank=rank, world=world), images)] = result[3] / world
    return loss, top1, top5, gradient


@pytest.mark.parametrize("scaling", ["paper", "google"])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
@pytest.mark.parametrize(
    ("world", "images", "block_rows"), [(1, 12, 5), (2, 2, None), (2, 12, 5), (3, 12, 1), (4, 8, 3)]
)
def test_ranks_give_the_whole_batch(
    ranks_pool: Pool, world: int, images: int, block_rows: int | None, temperature: float, scaling: Scaling
) -> None:
    x = projections(images)
    leaf = x.clone().requires_grad_()
    expected, top1, top5 = formula(leaf, temperature, scaling)
    expected.backward()
    results = ranks_pool(world, on_a_rank, x, temperature, scaling, block_rows)
    loss, found1, found5, gradient = assembled(results, images)
    assert leaf.grad is not None
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    assert (found1, found5) == pytest.approx((top1, top5), abs=1e-6)
    assert float((gradient - leaf.grad).abs().max()) <= 1e-12 * max(1.0, float(leaf.grad.abs().max()))


def by_autograd(ranks: Ranks, x: Tensor, temperature: float) -> Any:
    """The loss of this rank's rows by the matrix and the autograd gather: the oracle that the fast path replaces."""
    assert ranks.group is not None
    own = x[own_rows(ranks, len(x) // 2)].requires_grad_()
    z = own / own.norm(dim=1, keepdim=True)
    m, first = len(z), ranks.rank * len(z)
    s = (z @ all_gather_rows(z, ranks.group).T / temperature).clone()
    rows = torch.arange(m)
    s = s.index_put((rows, rows + first), torch.tensor(-math.inf, dtype=s.dtype))
    loss = torch.nn.functional.cross_entropy(s, rows.roll(m // 2) + first)
    loss.backward()
    return loss.item(), 0.0, 0.0, own.grad


@pytest.mark.parametrize("world", [2, 4])
def test_the_autograd_gather_agrees(ranks_pool: Pool, world: int) -> None:
    x = projections(8)
    for ours, theirs in zip(
        ranks_pool(world, on_a_rank, x, 0.2, "paper", 3), ranks_pool(world, by_autograd, x, 0.2), strict=True
    ):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-12)
        torch.testing.assert_close(ours[3], theirs[3], rtol=1e-11, atol=1e-14)


def gathered(ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    assert ranks.group is not None
    x = torch.full((2, 3), float(ranks.rank), requires_grad=True)
    rows = all_gather_rows(x, ranks.group)
    (rows * (ranks.rank + 1) * torch.arange(len(rows))[:, None]).sum().backward()
    assert x.grad is not None
    return rows.detach(), gather(torch.tensor([ranks.rank]), ranks.group), x.grad


def test_gather_in_the_order_of_the_ranks_with_the_gradient_of_all(ranks_pool: Pool) -> None:
    for rank, (rows, numbers, gradient) in enumerate(ranks_pool(3, gathered)):
        assert rows[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
        assert numbers.tolist() == [[0], [1], [2]]
        assert gradient[:, 0].tolist() == [6.0 * (2 * rank), 6.0 * (2 * rank + 1)]


def collectives(ranks: Ranks) -> tuple[list[str], list[str]]:
    """Of the operators' bodies: a dispatch mode does not see what runs inside a custom operator."""
    x = projections(8)[own_rows(ranks, 8)]
    with Exchanges() as forward:
        loss, _, _, state = reference.forward(Inputs(x, 0.5, group=ranks.group))
    with Exchanges() as backward:
        reference.backward(torch.ones_like(loss), state, 0.5, 1.0, 0, ranks.rank * len(x), x.dtype)
    return forward.names, backward.names


def test_two_exchanges_forward_and_none_backward(ranks_pool: Pool) -> None:
    for forward, backward in ranks_pool(2, collectives):
        assert len(forward) == 2 and backward == []


def edge_cases(ranks: Ranks) -> dict[str, Any]:
    own = own_rows(ranks, 8)
    zero = projections(8)
    zero[3] = 0  # on rank 0
    broken = projections(8)
    broken[12, 0] = math.nan  # on rank 1
    single = on_a_rank(ranks, projections(8).float(), 0.1, "paper", 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = on_a_rank(ranks, projections(8).float(), 0.1, "paper", 3)
    half = projections(8)[own].bfloat16().requires_grad_()
    nt_xent(half, 0.1, group=ranks.group).loss.backward()  # type: ignore[no-untyped-call]
    assert half.grad is not None
    return {
        "zero": on_a_rank(ranks, zero, 0.1, "paper", 3),
        "broken": on_a_rank(ranks, broken, 0.1, "paper", 3),
        "autocast": (single, cast),
        "half": (half.grad, on_a_rank(ranks, projections(8).bfloat16().float(), 0.1, "paper", None)[3]),
    }


def test_edge_cases_are_those_of_one_process(ranks_pool: Pool) -> None:
    results = ranks_pool(2, edge_cases)
    zero = projections(8)
    zero[3] = 0
    expected = on_a_rank(Ranks(), zero, 0.1, "paper", 3)
    loss, _, _, gradient = assembled([result["zero"] for result in results], 8)
    assert loss == pytest.approx(expected[0], rel=1e-12)
    torch.testing.assert_close(gradient, expected[3], rtol=1e-10, atol=1e-14)
    assert gradient[3].abs().max() == 0
    for result in results:
        assert math.isnan(result["broken"][0]) and result["broken"][3].isnan().all()
        single, cast = result["autocast"]
        assert single[:3] == cast[:3] and torch.equal(single[3], cast[3])
        half, full = result["half"]
        assert half.dtype == torch.bfloat16 and torch.equal(half, full.bfloat16())


def of_different_shapes(ranks: Ranks, dim: int) -> str:
    x = torch.randn(4 + 2 * ranks.rank, dim)
    try:
        nt_xent(x, 0.5, group=ranks.group)
    except ValueError as error:
        return str(error)
    return "no error"


def test_ranks_of_different_shapes_are_refused_by_name(ranks_pool: Pool) -> None:
    for rank, said in enumerate(ranks_pool(2, of_different_shapes, 3)):
        assert f"rank {rank} has projections of shape [{4 + 2 * rank}, 3]" in said
        assert f"rank {1 - rank} of [{4 + 2 * (1 - rank)}, 3]" in said


def test_a_group_of_one_is_the_symmetric_path(ranks_pool: Pool) -> None:
    x = projections(6)
    (alone,) = ranks_pool(1, on_a_rank, x, 0.3, "paper", None)
    expected = on_a_rank(Ranks(), x, 0.3, "paper", None)
    assert alone[0] == expected[0] and torch.equal(alone[3], expected[3])
