"""BatchNorm over groups of the global batch, on one rank and on many, against a plain loop over the groups."""

# B images of the global batch, V views, W ranks

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from fastsimclr.distributed.ranks import Ranks
from fastsimclr.models import (
    BatchGroups,
    BatchNorm,
    average_running_statistics,
    batch_groups,
    norm_functions,
    set_groups,
)
from fastsimclr.models import norm as norm_module
from tests.exchanges import Exchanges

Pool = Callable[..., list[Any]]
CHANNELS, STEPS = 5, 2
SHAPES = {"maps": (CHANNELS, 4, 3), "vectors": (CHANNELS,)}


def inputs(images: int, views: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """x and the loss's weights of each step, [STEPS, V, B, ...], the mean far from 0."""
    generator = torch.Generator().manual_seed(images)
    x, weights = torch.randn(2, STEPS, views, images, *shape, generator=generator, dtype=torch.float64)
    return 3 * x + 20 + torch.arange(images, dtype=torch.float64).view(-1, *[1] * len(shape)), weights


def module(bias: bool) -> BatchNorm:
    torch.manual_seed(7)
    bn = BatchNorm(CHANNELS, bias=bias).double()
    torch.nn.init.normal_(bn.weight)
    if bias:
        torch.nn.init.normal_(bn.bias)
    return bn


def oracle(images: int, views: int, shape: tuple[int, ...], groups: int, bias: bool) -> dict[str, Tensor]:
    """F.batch_norm group by group on the whole batch, autograd, and running statistics by hand."""
    bn = module(bias)
    x, weights = inputs(images, views, shape)
    leaf = x.clone().requires_grad_()
    mean, var = torch.zeros(CHANNELS, dtype=torch.float64), torch.ones(CHANNELS, dtype=torch.float64)
    y = torch.empty_like(x)
    size = images // groups
    for step in range(STEPS):
        found = []
        for g in range(groups):
            own = slice(g * size, (g + 1) * size)
            part = leaf[step, :, own].flatten(0, 1)
            y[step, :, own] = F.batch_norm(part, None, None, bn.weight, bn.bias, True).view(views, size, *shape)
            values = part.detach().transpose(0, 1).flatten(1)
            found.append((values.mean(1), values.var(1, unbiased=True)))
        mean = 0.9 * mean + 0.1 * torch.stack([m for m, _ in found]).mean(0)
        var = 0.9 * var + 0.1 * torch.stack([v for _, v in found]).mean(0)
    (y * weights).sum().backward()
    return collected(bn, y, leaf.grad, mean, var)


def collected(
    bn: BatchNorm, y: Tensor, dx: Tensor | None, mean: Tensor | None, var: Tensor | None
) -> dict[str, Tensor]:
    assert dx is not None and mean is not None and var is not None and bn.weight.grad is not None
    result = {"y": y.detach(), "dx": dx, "dweight": bn.weight.grad, "mean": mean, "var": var}
    return result | ({"dbias": bn.bias.grad} if bn.bias is not None and bn.bias.grad is not None else {})


def ours(ranks: Ranks, images: int, views: int, shape: tuple[int, ...], groups: int, bias: bool) -> dict[str, Tensor]:
    """This rank's part of y and dx, its sums of the parameters' gradients, the averaged running statistics."""
    bn = module(bias)
    x, weights = inputs(images, views, shape)
    n = images // ranks.world
    own = slice(ranks.rank * n, (ranks.rank + 1) * n)
    set_groups(bn, batch_groups(groups, views=views, rank=ranks.rank, world=ranks.world, group=ranks.group))
    leaf = x[:, :, own].clone().requires_grad_()
    y = []
    for step in range(STEPS):
        rows = leaf[step].flatten(0, 1)
        if len(shape) == 3 and step:
            rows = rows.contiguous(memory_format=torch.channels_last)
        out = bn(rows)
        assert out.stride() == rows.stride() and out.dtype == rows.dtype
        y.append(out.view(views, n, *shape))
    (torch.stack(y) * weights[:, :, own]).sum().backward()
    average_running_statistics(bn, ranks.group)
    assert int(bn.get_buffer("num_batches_tracked")) == STEPS
    return collected(bn, torch.stack(y), leaf.grad, bn.running_mean, bn.running_var)


def worst_error(results: list[dict[str, Tensor]], expected: dict[str, Tensor]) -> float:
    """Largest error of any number, in units of the largest number of its tensor."""
    joined = {key: torch.cat([result[key] for result in results], dim=2) for key in ("y", "dx")}
    joined |= {key: sum(r[key] for r in results) for key in expected if key in ("dweight", "dbias")}  # type: ignore[misc]
    errors = [float((joined[key] - expected[key]).abs().max() / expected[key].abs().max()) for key in joined]
    for key in ("mean", "var"):
        assert all(torch.equal(result[key], results[0][key]) for result in results)
        errors.append(float((results[0][key] - expected[key]).abs().max() / expected[key].abs().max()))
    assert all(map(math.isfinite, errors))  # max overlooks NaN
    return max(errors)


# No group of two values: their gradient vanishes, and its digits with it.
@pytest.mark.parametrize(
    ("kind", "groups"), [(kind, groups) for kind in SHAPES for groups in (1, 2, 3, 4)] + [("maps", 12)]
)
@pytest.mark.parametrize("views", [1, 2])
def test_one_process_with_groups_is_the_plain_loop(kind: str, views: int, groups: int) -> None:
    case = (12, views, SHAPES[kind], groups, views == 1)
    assert worst_error([ours(Ranks(), *case)], oracle(*case)) <= 1e-12


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(
    ("world", "groups"),
    # global, per rank, node-sized, groups in a rank; then groups that cross ranks
    [(2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (4, 4), (3, 3), (2, 3), (3, 4), (3, 2), (4, 3), (4, 6)],
)
def test_many_ranks_are_the_plain_loop(ranks_pool: Pool, kind: str, world: int, groups: int) -> None:
    case = (12, 2, SHAPES[kind], groups, kind == "maps")
    assert worst_error(ranks_pool(world, ours, *case), oracle(*case)) <= 1e-12


def test_small_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = (12, 2, SHAPES["maps"], 2, True)
    monkeypatch.setattr(norm_functions, "PIECE_ELEMENTS", 1)
    assert worst_error([ours(Ranks(), *case)], oracle(*case)) <= 1e-12


def collectives(ranks: Ranks, groups: int) -> tuple[list[str], list[str]]:
    """Names of the exchanges of one forward and one backward."""
    bn = module(bias=True)
    set_groups(bn, batch_groups(groups, views=1, rank=ranks.rank, world=ranks.world, group=ranks.group))
    x = torch.randn(6, CHANNELS, 2, 2, dtype=torch.float64, requires_grad=True)
    with Exchanges() as forward:
        y = bn(x)
    with Exchanges() as backward:
        y.sum().backward()
    bn.eval()
    with Exchanges() as evaluation:
        bn(x)
    assert evaluation.names == []
    return forward.names, backward.names


@pytest.mark.parametrize(("groups", "count"), [(1, 1), (2, 0), (3, 1), (4, 0)])
def test_one_exchange_each_way_and_none_where_ranks_hold_whole_groups(
    ranks_pool: Pool, groups: int, count: int
) -> None:
    for forward, backward in ranks_pool(2, collectives, groups):
        assert (len(forward), len(backward)) == (count, count)


def in_half(ranks: Ranks, dtype: torch.dtype, images: int, groups: int) -> tuple[Tensor, Tensor]:
    """y and dx [2, N, C, 6, 6] of this rank, one step in half precision with float32 parameters."""
    bn = module(bias=True).float()
    set_groups(bn, batch_groups(groups, views=2, rank=ranks.rank, world=ranks.world, group=ranks.group))
    n = images // ranks.world
    x, dy = (t[:, ranks.rank * n : (ranks.rank + 1) * n].flatten(0, 1) for t in half_inputs(dtype, images))
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    y = bn(x)
    y.backward(dy)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad is not None
    return y.detach().unflatten(0, (2, n)), x.grad.unflatten(0, (2, n))


def half_inputs(dtype: torch.dtype, images: int) -> tuple[Tensor, Tensor]:
    x, dy = torch.randn(2, 2, images, CHANNELS, 6, 6, generator=torch.Generator().manual_seed(1))
    return (x + 3).to(dtype), dy.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("world", "groups"), [(1, 2), (2, 1), (3, 4)])
def test_half_maps_are_worked_on_in_float32(ranks_pool: Pool, dtype: torch.dtype, world: int, groups: int) -> None:
    results = ranks_pool(world, in_half, dtype, 12, groups)
    bn = module(bias=True)
    x, dy = (t.double() for t in half_inputs(dtype, 12))
    x.requires_grad_()
    parts = [
        F.batch_norm(part.flatten(0, 1), None, None, bn.weight, bn.bias, True).unflatten(0, (2, -1))
        for part in x.split(12 // groups, dim=1)
    ]
    expected = torch.cat(parts, dim=1)
    expected.backward(dy)
    assert x.grad is not None
    # One rounding to the format at the end: half a unit in the last place of the larger values.
    unit = torch.finfo(dtype).eps
    for index, wanted in enumerate((expected, x.grad)):
        found = torch.cat([result[index] for result in results], dim=1).double()
        torch.testing.assert_close(found, wanted, rtol=0.51 * unit, atol=0.1 * unit)


def test_float32_variance_of_a_far_mean_keeps_its_digits() -> None:
    bn = BatchNorm(2)
    set_groups(bn, batch_groups(2, views=1))
    x = torch.randn(32, 2, 32, 32) + 1000
    bn(x)
    halves = x.double().transpose(0, 1).reshape(2, 2, -1)
    expected = 0.9 + 0.1 * halves.var(2).mean(1)
    assert bn.running_var is not None
    torch.testing.assert_close(bn.running_var.double(), expected, rtol=1e-5, atol=0)


def test_a_copy_keeps_the_groups_and_no_gradient_is_no_obstacle() -> None:
    bn = module(bias=True)
    groups = batch_groups(2, views=1)
    set_groups(bn, groups)
    twin = copy.deepcopy(bn)
    assert twin.groups is groups
    x = torch.randn(4, CHANNELS, dtype=torch.float64)
    with torch.no_grad():
        y = twin(x)
    torch.testing.assert_close(y, bn(x))
    set_groups(bn, None)
    torch.testing.assert_close(bn(x), F.batch_norm(x, None, None, bn.weight, bn.bias, True))


def test_cumulative_averages() -> None:
    bn = module(bias=True)
    set_groups(bn, batch_groups(2, views=1))
    bn.momentum = None
    xs = torch.randn(3, 4, CHANNELS, dtype=torch.float64)
    for x in xs:
        bn(x)
    torch.testing.assert_close(bn.running_mean, xs.mean((0, 1)))
    torch.testing.assert_close(bn.running_var, xs.view(6, 2, CHANNELS).var(1).mean(0))


def keep_equal(ranks: Ranks, start: Tensor) -> bool:
    bn = BatchNorm(len(start))
    assert bn.running_mean is not None
    bn.running_mean.copy_(start)
    average_running_statistics(bn, ranks.group)
    return torch.equal(bn.running_mean, start)


def test_equal_statistics_stay_equal_to_the_bit(ranks_pool: Pool) -> None:
    assert all(ranks_pool(3, keep_equal, torch.rand(1000)))


def test_bad_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="groups=0 must be at least 1"):
        batch_groups(0, views=1)
    with pytest.raises(ValueError, match=r"groups=1 over world=2 .* give group="):
        batch_groups(1, views=2, world=2)
    bn = BatchNorm(3)
    set_groups(bn, batch_groups(4, views=1))
    with pytest.raises(ValueError, match=r"global batch 6 is not divisible by BatchNorm's groups=4; use 4 images"):
        bn(torch.zeros(6, 3))
    with pytest.raises(ValueError, match="one value per channel in each of groups=4"):
        bn(torch.zeros(4, 3))
    set_groups(bn, batch_groups(2, views=2))
    with pytest.raises(ValueError, match="7 rows, which views=2 does not divide"):
        bn(torch.zeros(7, 3))


def of_synchronised_kernels(ranks: Ranks) -> dict[str, Tensor]:
    """`ours` by the path of CUDA, its five kernels replaced by what they are documented, or seen, to compute."""

    def channels(value: Tensor) -> Tensor:
        return value.view(1, -1, 1, 1)

    def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return x.mean((0, 2, 3)), (x.var((0, 2, 3), correction=0) + eps).rsqrt()

    def gather_stats(
        x: Tensor,
        mean: Tensor,
        inverse: Tensor,
        run_mean: Tensor,
        run_var: Tensor,
        momentum: float,
        eps: float,
        n: Tensor,
    ) -> tuple[Tensor, Tensor]:
        n = n[:, None]
        total = (n * mean).sum(0) / n.sum()
        var = (n * (inverse**-2 - eps + (mean - total) ** 2)).sum(0) / n.sum()
        run_mean += momentum * (total - run_mean)
        run_var += momentum * (var * n.sum() / (n.sum() - 1) - run_var)
        return total, (var + eps).rsqrt()

    def elemt(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, eps: float) -> Tensor:
        return (x - channels(mean)) * channels(inverse * weight) + channels(bias)

    def backward_reduce(dy: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor, *_: bool) -> list[Tensor]:
        sum_dy, sum_dy_xmu = dy.sum((0, 2, 3)), (dy * (x - channels(mean))).sum((0, 2, 3))
        return [sum_dy, sum_dy_xmu, sum_dy_xmu * inverse, sum_dy]

    def backward_elemt(
        dy: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor, s_dy: Tensor, s_xmu: Tensor, n: Tensor
    ) -> Tensor:
        centred = channels(inverse**2 * s_xmu / n.sum()) * (x - channels(mean))
        return (dy - channels(s_dy / n.sum()) - centred) * channels(inverse * weight)

    kernels = {
        "batch_norm_stats": stats,
        "batch_norm_gather_stats_with_counts": gather_stats,
        "batch_norm_elemt": elemt,
        "batch_norm_backward_reduce": backward_reduce,
        "batch_norm_backward_elemt": backward_elemt,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, kernel in kernels.items():
            patch.setattr(torch, name, kernel)
        patch.setattr(norm_module, "NormInGroups", norm_module.NormOfOneGroupOnCuda)
        return ours(ranks, 12, 2, SHAPES["maps"], 2, True)


def test_the_path_of_cuda_calls_its_kernels_rightly(ranks_pool: Pool) -> None:
    expected = oracle(12, 2, SHAPES["maps"], 2, True)
    assert worst_error(ranks_pool(4, of_synchronised_kernels), expected) <= 1e-12


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(CHANNELS, 4, 3), (CHANNELS,)])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_on_a_gpu(shape: tuple[int, ...], groups: int, bias: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """1 group: the kernels of SyncBatchNorm, in a process group of one. 3: groups within a rank. Maps channels-last."""
    x, dy = torch.randn(2, 24, *shape, dtype=torch.float64).to(dtype).double()
    if len(shape) == 3:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    expected = module(bias=bias)
    set_groups(expected, batch_groups(groups, views=2))
    half = dtype != torch.float64
    found = module(bias=bias).cuda()
    found = found.float() if half else found
    mine = batch_groups(groups, views=2)
    if groups == 1:
        store = dist.FileStore(str(tmp_path / "store"), 1)
        dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
        mine = BatchGroups(groups=1, views=2, rank=0, world=1, exchange=dist.group.WORLD, peers=1)
    try:
        outputs = []
        for bn, device in ((expected, "cpu"), (found, "cuda")):
            leaf = (x if bn is expected else x.to(device, dtype)).detach().requires_grad_()
            if bn is expected:
                y = bn(leaf)
            else:
                path = norm_module.NormOfOneGroupOnCuda if groups == 1 else norm_module.NormInGroups
                running = norm_functions.Running(bn.running_mean, bn.running_var, 0.1)
                y = path.apply(leaf, bn.weight, bn.bias, running, bn.eps, mine)
                assert y.dtype == dtype and y.is_contiguous(memory_format=norm_functions._layout(leaf))
            y.backward(dy.to(device, y.dtype))
            assert leaf.grad is not None
            grads = [bn.weight.grad, *([bn.bias.grad] if bias else [])]
            outputs.append([t.detach().cpu().double() for t in (y, leaf.grad, bn.running_mean, bn.running_var, *grads)])
        for one, other in zip(*outputs, strict=True):
            # bf16 keeps 8 bits of what it writes; its sums are in float32.
            limit = (2.0**-7 if half else 1e-9) * float(one.abs().max())
            assert float((one - other).abs().max()) <= limit
    finally:
        if groups == 1:
            dist.destroy_process_group()
