"""NT-Xent against the paper's Algorithm 1 in plain loops, a materialised float64 version and Google's numbers."""

# M rows, both views    N = M / 2 images    D dimensions

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastsimclr.kernels.nt_xent import nt_xent, reference
from fastsimclr.kernels.nt_xent.state import Inputs

GOLDEN = Path(__file__).parents[1] / "golden" / "google-simclr-oracle.npz"


def projections(
    images: int, dim: int, *, seed: int = 0, noise: float = 0.7, dtype: torch.dtype = torch.float64
) -> Tensor:
    """[2N, D] of pairs that differ by `noise`, with norms far from 1."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(images, dim, generator=generator, dtype=torch.float64)
    views = torch.cat((base, base + noise * torch.randn(images, dim, generator=generator, dtype=torch.float64)))
    return (views * (0.1 + 5 * torch.rand(2 * images, 1, generator=generator, dtype=torch.float64))).to(dtype)


def algorithm_1(x: Tensor, temperature: float) -> tuple[float, float, float]:
    """Chen et al. 2020, Algorithm 1, in plain loops: the loss, and the shares of positives in the top 1 and 5."""
    rows = x.tolist()
    m = len(rows)
    cosine = [[0.0] * m for _ in range(m)]
    for i in range(m):
        for j in range(m):
            dot = sum(a * b for a, b in zip(rows[i], rows[j], strict=True))
            cosine[i][j] = dot / math.sqrt(sum(a * a for a in rows[i])) / math.sqrt(sum(b * b for b in rows[j]))
    loss, top1, top5 = 0.0, 0, 0
    for i in range(m):
        p = (i + m // 2) % m
        total = sum(math.exp(cosine[i][k] / temperature) for k in range(m) if k != i)
        loss -= math.log(math.exp(cosine[i][p] / temperature) / total)
        rank = sum(cosine[i][k] >= cosine[i][p] for k in range(m) if k not in (i, p))
        top1, top5 = top1 + (rank < 1), top5 + (rank < 5)
    return loss / m, top1 / m, top5 / m


def materialised(x: Tensor, temperature: float) -> Tensor:
    """The paper's mean loss by the whole M x M matrix and autograd."""
    m = x.shape[0]
    z = x / x.norm(dim=1, keepdim=True)
    logits = (z @ z.T / temperature).masked_fill(torch.eye(m, dtype=torch.bool), -math.inf)
    return torch.nn.functional.cross_entropy(logits, torch.arange(m).roll(m // 2))


def stable(x: Tensor, temperature: float) -> Tensor:
    """The same loss as log(1 + sum over the negatives of exp(s_ij - s_ip)), which keeps its digits near 0."""
    m = x.shape[0]
    z = x / x.norm(dim=1, keepdim=True)
    s = z @ z.T / temperature
    itself, positive = torch.eye(m, dtype=torch.bool), torch.eye(m, dtype=torch.bool).roll(m // 2, 1)
    negatives_M: Tensor = (s - s[positive][:, None]).exp().masked_fill(itself | positive, 0).sum(1)
    return negatives_M.log1p().mean()


def gradient(x: Tensor, temperature: float, **options: Any) -> Tensor:
    leaf = x.clone().requires_grad_()
    nt_xent(leaf, temperature, **options).loss.backward()
    assert leaf.grad is not None
    return leaf.grad


def oracle_gradient(x: Tensor, temperature: float, oracle: Callable[[Tensor, float], Tensor] = materialised) -> Tensor:
    leaf = x.double().clone().requires_grad_()
    oracle(leaf, temperature).backward()
    assert leaf.grad is not None
    return leaf.grad


def relative(actual: Tensor, expected: Tensor) -> float:
    """The largest error relative to the largest value expected."""
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("temperature", [0.01, 0.02, 0.05, 0.1, 0.5, 5.0])
@pytest.mark.parametrize("images, dim", [(2, 3), (7, 5), (21, 16)])
def test_matches_algorithm_1(images: int, dim: int, temperature: float) -> None:
    x = projections(images, dim)
    expected = algorithm_1(x, temperature)
    actual = nt_xent(x, temperature, block_rows=5)
    for value, wanted in zip(actual, expected, strict=True):
        assert value.item() == pytest.approx(wanted, rel=1e-10 if value is actual.loss else 1e-6, abs=1e-12)


@pytest.mark.parametrize("temperature", [0.01, 0.024, 0.025, 0.1, 1.0])
@pytest.mark.parametrize("images, dim", [(2, 1), (2, 8), (9, 4), (50, 33)])
def test_gradient_matches_autograd_of_the_whole_matrix(images: int, dim: int, temperature: float) -> None:
    x = projections(images, dim)
    expected = oracle_gradient(x, temperature)
    actual = gradient(x, temperature, block_rows=7)
    assert float((actual - expected).abs().max()) <= 1e-10 * max(1.0, float(expected.abs().max()))
    # float32 rounds z to 6e-8, which exp(s / t) magnifies by 1 / t; the float64 oracle sees the same inputs.
    single = gradient(x.float(), temperature, block_rows=7)
    scale = float(oracle_gradient(x.float(), temperature).abs().max())
    error = float((single.double() - oracle_gradient(x.float(), temperature)).abs().max())
    assert error <= 1e-6 / temperature * max(scale, 1e-3)


@pytest.mark.parametrize("temperature", [0.02, 0.2])
def test_gradcheck(temperature: float) -> None:
    x = projections(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: nt_xent(y, temperature, block_rows=3).loss, (x,))


@pytest.mark.parametrize("temperature", ["0.05", "0.1", "0.5"])
def test_matches_googles_loss_and_gradient(temperature: str) -> None:
    """Relative to the loss, and to the largest entry of the gradient: both sides are float32."""
    golden = np.load(GOLDEN)
    x = torch.from_numpy(golden[f"loss/{temperature}/hidden"]).requires_grad_()
    out = nt_xent(x, float(temperature), scaling="google", block_rows=10)
    out.loss.backward()
    assert x.grad is not None
    assert out.loss.item() == pytest.approx(float(golden[f"loss/{temperature}/value"]), rel=1e-6)
    assert relative(x.grad, torch.from_numpy(golden[f"loss/{temperature}/gradient"])) <= 1e-6


@pytest.mark.parametrize("temperature", ["0.05", "0.1", "0.5"])
def test_contrastive_accuracy_from_googles_logits(temperature: str) -> None:
    """logits_ab gives each row's positive and its negatives of the other view; those of its own view are added here."""
    golden = np.load(GOLDEN)
    t, hidden = float(temperature), golden[f"loss/{temperature}/hidden"].astype(np.float64)
    ab, n = golden[f"loss/{temperature}/logits_ab"], len(hidden) // 2
    z = hidden / np.linalg.norm(hidden, axis=1, keepdims=True)
    ranks = []
    for view, cross in ((z[:n], ab), (z[n:], ab.T)):
        same = view @ view.T / t
        for i in range(n):
            others = [j for j in range(n) if j != i]
            ranks.append(sum(cross[i, others] >= cross[i, i]) + sum(same[i, others] >= cross[i, i]))
    out = nt_xent(torch.from_numpy(hidden), t)
    assert out.top1.item() == pytest.approx(np.mean(np.array(ranks) < 1))
    assert out.top5.item() == pytest.approx(np.mean(np.array(ranks) < 5))


@pytest.mark.parametrize("temperature", [0.01, 0.1])
@pytest.mark.parametrize("block_rows", [1, 2, 11, 31, 32, 33, 61, 62, 1000])
def test_block_size_changes_nothing(block_rows: int, temperature: float) -> None:
    x = projections(31, 6)
    whole, blocks = nt_xent(x, temperature), nt_xent(x, temperature, block_rows=block_rows)
    for one, other in zip(whole, blocks, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient(x, temperature, block_rows=block_rows), gradient(x, temperature))


class Spy(TorchDispatchMode):
    """Records the largest tensor made and the operators that were dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators.append(str(func))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_memory_is_streamed_and_nothing_waits_for_the_device(temperature: float) -> None:
    m, rows, dim = 1500, 50, 16
    x = projections(m // 2, dim, dtype=torch.float32)
    # The operator's body itself: a dispatch mode does not see what runs inside a custom operator.
    with Spy() as spy:
        loss, _, _, state = reference.forward(Inputs(x, temperature, block_rows=rows))
        reference.backward(torch.ones_like(loss), state, temperature, 1.0, rows, 0, x.dtype)
    assert spy.operators.count("aten.addmm_.default") > 3 * m // rows
    assert m * dim <= spy.largest <= rows * m < m * m // 2
    waiting = {
        "aten._local_scalar_dense.default",
        "aten.is_nonzero.default",
        "aten.nonzero.default",
        "aten.item.default",
    }
    assert not waiting & set(spy.operators)


@pytest.mark.parametrize("temperature", [0.02, 0.05, 0.1])
def test_near_duplicates_keep_their_gradient(temperature: float) -> None:
    """Tight, well separated pairs: 1 - p cancels where it is formed, which the materialised float32 version shows."""
    generator = torch.Generator().manual_seed(1)
    base = torch.linalg.qr(torch.randn(32, 32, generator=generator, dtype=torch.float64)).Q
    x = torch.cat((base, base + 1e-3 * torch.randn(32, 32, generator=generator, dtype=torch.float64))).float()
    expected = oracle_gradient(x, temperature, stable)
    assert relative(gradient(x, temperature), expected) <= 2e-5
    loss = nt_xent(x, temperature).loss.item()
    assert loss == pytest.approx(stable(x.double(), temperature).item(), rel=2e-5)
    assert 0 < loss < 0.01
    if temperature == 0.05:
        leaf = x.clone().requires_grad_()
        materialised(leaf, temperature).backward()
        assert leaf.grad is not None and relative(leaf.grad, expected) > 1e-3


def test_opposite_vectors_at_the_lowest_temperatures_stay_finite() -> None:
    direction = torch.randn(8, generator=torch.Generator().manual_seed(2))
    x = torch.stack((direction, direction, -direction, -direction))
    for temperature in (0.001, 0.0249, 0.025, 0.03):
        out = nt_xent(x, temperature)
        # Each positive is the farthest row and the other negative coincides: the loss is 2 / t.
        assert out.loss.item() == pytest.approx(2 / temperature, rel=1e-5)
        assert out.top1.item() == 0 and torch.isfinite(gradient(x, temperature)).all()


def test_zero_vector_has_zero_gradient_and_counts_as_orthogonal() -> None:
    x = projections(6, 4)
    x[3] = 0
    actual = gradient(x, 0.1)
    assert torch.equal(actual[3], torch.zeros(4, dtype=torch.float64))
    assert torch.isfinite(actual).all() and float(actual.abs().max()) > 0
    # In one more dimension, which no other row uses, a unit vector is orthogonal to all rows as well.
    padded = torch.cat((x, torch.zeros(12, 1, dtype=torch.float64)), dim=1)
    padded[3, 4] = 1
    assert nt_xent(x, 0.1).loss.item() == pytest.approx(algorithm_1(padded, 0.1)[0], rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bank", [False, True])
def test_collapsed_projections_are_no_success(seed: int, dtype: torch.dtype, bank: bool) -> None:
    """In a direction whose values round, so that products in different orders differ in the last digit."""
    one = torch.randn(1, 128, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    out = nt_xent(one.expand(64, 128), 0.1, bank=one.expand(9, 128) if bank else None)
    assert out.loss.item() == pytest.approx(math.log(72 if bank else 63), rel=1e-5)
    assert out.top1.item() == out.top5.item() == 0


def test_one_pair_has_no_negatives() -> None:
    x = projections(1, 4)
    assert nt_xent(x, 0.1).loss.item() == 0
    assert torch.equal(gradient(x, 0.1), torch.zeros_like(x))
    assert nt_xent(x, 0.1).top1.item() == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_nan_and_infinity_reach_the_loss(bad: float) -> None:
    x = projections(4, 3, dtype=torch.float32)
    x[5, 1] = bad
    assert math.isnan(nt_xent(x, 0.1).loss.item())
    assert nt_xent(x, 0.1).top1.item() == 0
    assert gradient(x, 0.1).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_worked_on_in_float32(dtype: torch.dtype) -> None:
    x = projections(20, 8, dtype=dtype)
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = nt_xent(leaf, 0.1)
        out.loss.backward()
    assert out.loss.dtype == torch.float32 and leaf.grad is not None and leaf.grad.dtype == dtype
    assert torch.equal(leaf.grad, gradient(x.float(), 0.1).to(dtype))
    assert out.loss.item() == pytest.approx(float(materialised(x.double(), 0.1)), rel=1e-6)


def test_autocast_changes_no_bit_of_float32() -> None:
    x = projections(20, 8, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = nt_xent(x, 0.1)
        out.loss.backward()
    assert x.grad is not None and torch.equal(x.grad, gradient(x.detach(), 0.1))


def test_google_is_twice_the_paper_and_the_upstream_gradient_is_respected() -> None:
    x = projections(5, 3)
    assert nt_xent(x, 0.1, scaling="google").loss.item() == pytest.approx(2 * nt_xent(x, 0.1).loss.item(), rel=1e-14)
    torch.testing.assert_close(gradient(x, 0.1, scaling="google"), 2 * gradient(x, 0.1))
    leaf = x.clone().requires_grad_()
    (3.5 * nt_xent(leaf, 0.1).loss).backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, 3.5 * gradient(x, 0.1))


def test_metrics_and_the_gradient_carry_no_graph() -> None:
    x = projections(4, 3).requires_grad_()
    out = nt_xent(x, 0.1)
    (first,) = torch.autograd.grad(out.loss, x, create_graph=True)
    assert not out.top1.requires_grad and not out.top5.requires_grad and not first.requires_grad


def test_non_contiguous_projections() -> None:
    x = projections(6, 8)
    torch.testing.assert_close(gradient(x.T.contiguous().T, 0.1), gradient(x, 0.1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "x, options, message",
    [
        (torch.ones(3, 4), {}, r"shape \[3, 4\].*torch.cat"),
        (torch.ones(0, 4), {}, r"shape \[0, 4\]"),
        (torch.ones(4), {}, r"shape \[4\]"),
        (torch.ones(4, 0), {}, r"shape \[4, 0\]"),
        (torch.ones(4, 4, dtype=torch.int64), {}, r"torch.int64.*x.float"),
        (torch.ones(4, 4), {"temperature": 0.0}, "temperature=0.0"),
        (torch.ones(4, 4), {"temperature": math.nan}, "temperature=nan"),
        (torch.ones(4, 4), {"scaling": "mean"}, "scaling='mean'.*'google'"),
        (torch.ones(4, 4), {"block_rows": 0}, "block_rows=0"),
        (torch.ones(4, 4), {"backend": "cuda"}, "backend='cuda'.*auto"),
    ],
)
def test_bad_input_is_named(x: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nt_xent(x, **{"temperature": 0.1, **options})
