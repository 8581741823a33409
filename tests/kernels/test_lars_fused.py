"""The fused LARS step, and the reference with all that it takes, against both formulas in float64 plain loops."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastsimclr.kernels.backend import Backend
from fastsimclr.kernels.lars import Variant, _lars_step, fused, implementation, lars_step, table
from fastsimclr.kernels.lars.inputs import check_scalar, check_tensors

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS: tuple[Backend, ...] = ("reference", "fused")
SHAPES = [(1,), (3,), (63,), (10, 10), (2000,), (4097,), (16, 4, 3, 3), (0,), (5, 7), (9,)]
ZERO_WEIGHT, ZERO_GRADIENT = 8, 9
# float32 sums of up to 4097 squares, then a handful of roundings a step.
TOLERANCE = 2e-6
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scratch memory starts as NaN, and no table is left from another test."""
    empty = torch.empty

    def filled(*args: Any, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", filled)
    yield
    table._kept.cache_clear()
    table._layout.cache_clear()


def randoms(shapes: Sequence[tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def plain(
    w: Tensor, grad: Tensor, v: Tensor, *, lr: float, decay: float, l2: float, excluded: bool, variant: Variant
) -> tuple[Tensor, Tensor, float]:
    """w and v of one tensor after a step, float64; momentum 0.9, trust 0.001, eps 1e-8.

    And the largest sum of the summands of v without their signs: where they cancel, float32 keeps only their digits.
    """
    g = grad + l2 * w
    ratio, u = 1.0, g
    if not excluded:
        u = g + decay * w
        w_norm, g_norm, u_norm = (math.sqrt(sum(x * x for x in t.flatten().tolist())) for t in (w, g, u))
        if variant == "google":
            ratio = 0.001 * w_norm / u_norm if w_norm > 0 and u_norm > 0 else 1.0
        elif g_norm == 0:
            ratio = 0.0
        elif w_norm > 0:
            ratio = 0.001 * w_norm / (g_norm + decay * w_norm + 1e-8)
    rate = (lr if variant == "google" else 1.0) * ratio
    summands = 0.9 * v.abs() + rate * (grad.abs() + (l2 + (0.0 if excluded else decay)) * w.abs())
    v = 0.9 * v + rate * u
    return w - (v if variant == "google" else lr * v), v, summands.max().item() if summands.numel() else 0.0


def assert_near(got: Tensor, expected: Tensor, name: str, tolerance: float = TOLERANCE, summands: float = 0.0) -> None:
    """Relative to the tensor's largest value, or that of its summands; below 1e-3 absolute."""
    if got.numel():
        error = (got.cpu().double() - expected).abs().max().item()
        assert error <= tolerance * max(1e-3, expected.abs().max().item(), summands), f"{name}: {error}"


def compare_steps(
    shapes: Sequence[tuple[int, ...]], variant: Variant, backend: Backend, dtype: torch.dtype, *, steps: int, seed: int
) -> None:
    """Steps with every option, against `plain`; the gradients must stay as they are."""
    n = len(shapes)
    params = randoms(shapes, seed)
    momenta = [torch.zeros_like(p) for p in params]
    if n > ZERO_GRADIENT:
        params[ZERO_WEIGHT].zero_()
    excluded = [i % 4 == 1 for i in range(n)]
    decays = [(0.0, 1e-4, 0.5)[i % 3] for i in range(n)]
    l2 = [0.1 * (i % 3 == 2) for i in range(n)]
    scales = [1.0 + 0.5 * (i % 2) for i in range(n)]
    kinds = (None, torch.float16, torch.bfloat16)
    copies = [
        None if (kind := kinds[i % 3]) is None else torch.full_like(p, math.nan, dtype=kind)
        for i, p in enumerate(params)
    ]
    exact = [(p.cpu().double(), m.cpu().double()) for p, m in zip(params, momenta, strict=True)]
    for step in range(steps):
        grads = randoms(shapes, seed + step + 1, dtype)
        if n > ZERO_GRADIENT:
            grads[ZERO_GRADIENT].zero_()
        before, lr = [g.clone() for g in grads], 0.5 + step
        lars_step(
            params, grads, momenta, lr=torch.tensor(lr, device=DEVICE) if step % 2 else lr, weight_decay=decays,
            excluded=excluded, l2=l2, lr_scale=scales, variant=variant, copies=copies, backend=backend,
            inverse_scale=torch.tensor(0.125, device=DEVICE),
        )  # fmt: skip
        assert all(torch.equal(g, b) for g, b in zip(grads, before, strict=True)), "the gradients were changed"
        for i, grad in enumerate(grads):
            weight, momentum, summands = plain(
                exact[i][0], grad.cpu().double() / 8, exact[i][1], lr=lr * scales[i], decay=decays[i], l2=l2[i],
                excluded=excluded[i], variant=variant,
            )  # fmt: skip
            exact[i] = weight, momentum
            assert_near(params[i], exact[i][0], f"step {step}, weight {i}")
            assert_near(momenta[i], exact[i][1], f"step {step}, momentum {i}", summands=summands)
            if (copy := copies[i]) is not None:
                # One rounding to 11 or 8 bits; Triton's interpreter cuts bfloat16 off, which is two half ones.
                allowed = 2**-11 if copy.dtype == torch.float16 else 2**-7
                assert_near(copy, params[i].cpu().double(), f"copy {i}", allowed)


# Each variant with one type of gradient; the other pairs are slow in the interpreter.
FEW = [("google", torch.bfloat16), ("lightly", torch.float32)]


@pytest.mark.parametrize(
    "backend, variant, dtype",
    [
        pytest.param(
            backend,
            variant,
            dtype,
            marks=[] if (variant, dtype) in FEW else pytest.mark.slow,
        )
        for backend, variant, dtype in itertools.product(BACKENDS, ("google", "lightly"), DTYPES)
    ],
)
def test_all_options_match_the_plain_loops(backend: Backend, variant: Variant, dtype: torch.dtype) -> None:
    compare_steps(SHAPES, variant, backend, dtype, steps=3, seed=0)


@pytest.mark.slow
@settings(max_examples=settings().max_examples // 6)  # each takes up to a second in the interpreter
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), min_size=0, max_size=3).map(tuple), min_size=1, max_size=9),
    variant=st.sampled_from(["google", "lightly"]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shapes(shapes: list[tuple[int, ...]], variant: Variant, dtype: torch.dtype) -> None:
    compare_steps(shapes, variant, "fused", dtype, steps=2, seed=len(shapes))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["google", "lightly"])
def test_chunks_of_many_blocks(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of tensors above a million elements: chunks are bounded, and each has several blocks."""
    for module in (fused, table):
        monkeypatch.setattr(module, "BLOCK", 16)
        monkeypatch.setattr(module, "MAX_CHUNKS", 4)
    compare_steps(
        [(32,), (65,), (127,), (130,), (64,), (1,), (256,), (203,)], variant, "fused", torch.float32, steps=2, seed=3
    )


@pytest.mark.parametrize("offset, aligned", [(1, False), (4, True)])
def test_views_of_a_buffer_and_nothing_beside_them(offset: int, aligned: bool) -> None:
    """As the gradients in DDP's buckets: at any address; what lies between the tensors must stay NaN."""
    sizes, flat = [5, 64, 1, 2051], {}
    starts = [offset + 4 * (sum(sizes[:i]) // 4 + 2 * i) for i in range(len(sizes))]
    values = {"params": randoms([(n,) for n in sizes], 0), "grads": randoms([(n,) for n in sizes], 1)}
    values["momenta"] = randoms([(n,) for n in sizes], 2)
    views: dict[str, list[Tensor]] = {}
    for name, tensors in values.items():
        flat[name] = torch.full((starts[-1] + sizes[-1] + 9,), math.nan, device=DEVICE)
        views[name] = [flat[name][start : start + n] for start, n in zip(starts, sizes, strict=True)]
        for view, tensor in zip(views[name], tensors, strict=True):
            view.copy_(tensor)
    settings = {"lr": 0.5, "weight_decay": 0.1, "excluded": [False] * 4}
    lars_step(views["params"], views["grads"], views["momenta"], **settings, backend="fused")  # type: ignore[arg-type]
    lars_step(values["params"], values["grads"], values["momenta"], **settings, backend="reference")  # type: ignore[arg-type]
    for name, tensors in values.items():
        assert int(flat[name].isnan().sum()) == flat[name].numel() - sum(sizes), name
        for view, tensor in zip(views[name], tensors, strict=True):
            torch.testing.assert_close(view, tensor, rtol=1e-5, atol=1e-7)
    words = table._kept.cache_info()
    assert words.misses == 1
    addresses = [tuple(t.data_ptr() for t in views[name]) for name in ("params", "grads", "momenta")]
    scalars = tuple((x,) * 4 for x in (0.1, 0.0, 0.0, 1.0))
    made = table.table([*addresses, (0,) * 4], tuple(sizes), (0,) * 4, scalars, DEVICE)
    assert made.aligned == aligned and table._kept.cache_info().misses == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_last_weights(backend: Backend) -> None:
    """Sums know no order; a gradient in another layout is brought into its weight's."""
    results = []
    for last in (False, True):
        w, g = randoms([(8, 6, 3, 3)], 0)[0], randoms([(8, 6, 3, 3)], 1)[0]
        one, other = randoms([(8, 6, 1, 1)], 2)[0], randoms([(8, 6, 1, 1)], 3)[0]
        params = [p.to(memory_format=torch.channels_last) if last else p for p in (w, one, w.clone())]
        params[2] = params[2].clone(memory_format=torch.preserve_format)
        grads = [params[0].clone().copy_(g), other, g]  # the last is contiguous, or not as its weight
        momenta = [torch.zeros_like(p) for p in params]
        lars_step(params, grads, momenta, lr=0.5, weight_decay=0.1, excluded=[False] * 3, backend=backend)
        results.append(params)
        torch.testing.assert_close(params[0], params[2], rtol=0, atol=0)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_overflow_changes_nothing(backend: Backend) -> None:
    shapes = [(5,), (2100,)]
    params, grads, momenta = randoms(shapes, 0), randoms(shapes, 1), randoms(shapes, 2)
    copies = [None, torch.full((2100,), 7.0, dtype=torch.float16, device=DEVICE)]
    expected = [t.clone() for t in (*params, *momenta)]
    grads[1][3] = math.inf
    common: dict[str, Any] = {"lr": 0.5, "weight_decay": 0.1, "excluded": [False, True], "backend": backend}
    found = torch.ones((), device=DEVICE)
    lars_step(params, grads, momenta, copies=copies, found_inf=found, **common)
    assert all(torch.equal(a, b) for a, b in zip((*params, *momenta), expected, strict=True))
    assert copies[1] is not None and bool((copies[1] == 7).all())
    grads[1][3] = 1.0
    lars_step(params, grads, momenta, copies=copies, found_inf=found * 0, **common)
    others, buffers = [t.clone() for t in expected[:2]], [t.clone() for t in expected[2:]]
    lars_step(others, grads, buffers, **common)
    assert all(torch.equal(a, b) for a, b in zip((*params, *momenta), (*others, *buffers), strict=True))
    assert torch.equal(copies[1], params[1].half())


@pytest.mark.parametrize("variant", ["google", "lightly"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_gradient_is_nan_in_its_weight(backend: Backend, variant: Variant) -> None:
    w, g, v = randoms([(100,)], 0), randoms([(100,)], 1), [torch.zeros(100, device=DEVICE)]
    g[0][7] = math.nan
    lars_step(w, g, v, lr=0.5, weight_decay=0.1, excluded=[False], variant=variant, backend=backend)
    assert w[0].isnan().nonzero().tolist() == v[0].isnan().nonzero().tolist() == [[7]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_six_steps_equal_those_of_lightly(backend: Backend) -> None:
    """lightly's own class; what it excludes has decay 0 there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lightly.utils.lars import LARS
    shapes = [(8, 4, 3, 3), (8,), (33, 8), (2500,)]
    theirs = [nn.Parameter(p) for p in randoms(shapes, 0)]
    ours, momenta = randoms(shapes, 0), [torch.zeros(shape, device=DEVICE) for shape in shapes]
    groups = [{"params": theirs[::2], "weight_decay": 1e-3}, {"params": theirs[1::2], "weight_decay": 0.0}]
    optimizer = LARS(groups, lr=0.4, momentum=0.9)
    for step in range(6):
        grads = randoms(shapes, step + 1)
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        flags = [False, True, False, True]
        lars_step(ours, grads, momenta, lr=0.4, weight_decay=1e-3, excluded=flags, variant="lightly", backend=backend)
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_near(a, b.detach().cpu().double(), f"step {step}, tensor {i}")


def test_the_same_bits_each_time() -> None:
    ends = []
    for _ in range(2):
        params, momenta = randoms([(9001,), (3, 5)], 0), [torch.zeros(9001, device=DEVICE), randoms([(3, 5)], 1)[0]]
        for step in range(2):
            grads = randoms([(9001,), (3, 5)], 2 + step)
            lars_step(params, grads, momenta, lr=0.5, weight_decay=0.1, excluded=[False] * 2, backend="fused")
        ends.append([*params, *momenta])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_table_is_made_once_for_the_same_addresses() -> None:
    w, v = torch.ones(10, device=DEVICE), torch.zeros(10, device=DEVICE)
    first, second = torch.ones(10, device=DEVICE), torch.full((10,), 3.0, device=DEVICE)
    misses = []
    for g in (first, first, second, second, first):
        v.zero_()
        before = w.clone()
        lars_step([w], [g], [v], lr=1.0, weight_decay=0.0, excluded=[True], backend="fused")
        assert torch.equal(w, before - g)
        misses.append(table._kept.cache_info().misses)
    assert misses == [1, 1, 2, 2, 2]
    lars_step([w], [first], [v], lr=2.0, weight_decay=0.0, excluded=[True], backend="fused")
    assert table._kept.cache_info().misses == 2, "a learning rate is no part of the table"
    lars_step([w], [first], [v], lr=2.0, weight_decay=0.1, excluded=[True], backend="fused")
    assert table._kept.cache_info().misses == 3


def test_a_table_of_tensors_beyond_32_bits() -> None:
    """Each chunk knows its tensor, and the chunks of a tensor cover it; no memory of that size is touched."""
    lengths = (3, 2**33 + 5, 0, 2048, 2049, 2048 * 512, 2048 * 512 + 1)
    T = len(lengths)
    scalars = ((0.1,) * T, (0.0,) * T, (False, True) + (False,) * (T - 2), (1.0,) * T)
    made = table.table([(16,) * T] * 4, lengths, (0,) * T, scalars, torch.device("cpu"))
    rows, chunks = made.tensors_T8.tolist(), made.chunks_C.tolist()
    for i, (length, row) in enumerate(zip(lengths, rows, strict=True)):
        span, count = row[6] * table.BLOCK, chunks.count(i)
        assert row[4] == length and count <= table.MAX_CHUNKS
        assert count * span >= length > (count - 1) * span
        assert chunks[row[5] : row[5] + count] == [i] * count
    assert len(chunks) == sum(chunks.count(i) for i in range(T)) and made.scalars_T4[1].tolist() == [0, 0, 1, 1]
    assert float(made.one) == 1 and float(made.zero) == 0


def test_bad_input_is_named() -> None:
    w, v = [torch.ones(4, 3, device=DEVICE)], [torch.zeros(4, 3, device=DEVICE)]
    last = torch.zeros(3, 4, device=DEVICE).T
    common: dict[str, Any] = {"lr": 1.0, "weight_decay": 0.0, "excluded": [False]}

    def refuse(message: str, params: Any = w, grads: Any = w, momenta: Any = v, **more: Any) -> None:
        for backend in BACKENDS:
            with pytest.raises(ValueError, match=message):
                lars_step(params, grads, momenta, **(common | {"backend": backend} | more))

    refuse(r"grads\[0\] is \(3, 4\), params\[0\] \(4, 3\)", grads=[w[0].view(3, 4)])
    refuse(r"momenta\[0\] has strides \(1, 4\), params\[0\] \(3, 1\).*empty_like", momenta=[last])
    refuse(r"params\[0\] .*is not dense", params=[torch.ones(4, 6, device=DEVICE)[:, ::2]])
    refuse(r"params\[0\] is torch.float16.*float32 masters", params=[w[0].half()], backend="reference")
    refuse(r"momenta\[0\] is torch.float16", momenta=[v[0].half()])
    refuse(r"grads\[0\] is torch.int32", grads=[w[0].int()])
    refuse(r"copies\[0\] is torch.float32", copies=[v[0]])
    refuse(r"lr is a tensor of shape \(1,\)", lr=torch.ones(1, device=DEVICE))
    refuse(r"inverse_scale is a tensor", inverse_scale=torch.ones(2, device=DEVICE))
    refuse(r"2 l2", l2=[0.0, 0.0])
    refuse(r"weight_decay=-1.0 must be finite and at least 0", weight_decay=-1.0)
    refuse(r"lr=nan must be finite", lr=math.nan)
    refuse(r"lr_scale=inf", lr_scale=[math.inf])
    double = [t.double() for t in (*w, *v)]
    refuse(r"backend=fused needs float32 params", double[:1], double[:1], double[1:], backend="fused")
    assert implementation(double[0]) == "reference"
    # By themselves: an operator that is given one tensor without memory computes nothing and asks for nothing.
    with pytest.raises(ValueError, match=r"grads\[0\] is on meta, params\[0\] on .*move all to one device"):
        check_tensors(w, [torch.ones(4, 3, device="meta")], v, [None])
    with pytest.raises(ValueError, match=r"found_inf is a tensor of shape \(\) on meta; .*on cpu"):
        check_scalar("found_inf", torch.ones((), device="meta"), torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_operator_that_compiles(backend: Backend) -> None:
    def step(params: list[Tensor], grads: list[Tensor], momenta: list[Tensor], half: Tensor, lr: Tensor) -> Tensor:
        lars_step(
            params,
            grads,
            momenta,
            lr=lr,
            weight_decay=0.1,
            excluded=[False, True],
            copies=[None, half],
            backend=backend,
        )
        return params[0].sum() + half.sum()

    ends = []
    for run in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        params, momenta = randoms([(5, 3), (7,)], 0), randoms([(5, 3), (7,)], 1)
        half = torch.zeros(7, dtype=torch.float16, device=DEVICE)
        total = [run(params, randoms([(5, 3), (7,)], seed), momenta, half, torch.tensor(0.5, device=DEVICE))
                 for seed in (2, 3)]  # fmt: skip
        ends.append([*params, *momenta, half, *total])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    torch.compiler.reset()
    params, grads, momenta = (randoms([(5, 3), (7,)], seed) for seed in range(3))
    half, number = torch.zeros(7, dtype=torch.float16, device=DEVICE), torch.tensor(0.5, device=DEVICE)
    torch.library.opcheck(
        _lars_step,
        (
            params, grads, momenta, [half], [1], number, number, None,
            1.0, [0.1] * 2, [0.0] * 2, [1.0] * 2, [False, True], 0.9, 0.001, 1e-8, "google", backend,
        ),
    )  # fmt: skip


def test_a_changed_parameter_is_noticed_by_autograd() -> None:
    w = torch.ones(3, device=DEVICE, requires_grad=True)
    loss = (w * w).sum()
    lars_step([w], [torch.ones(3, device=DEVICE)], [torch.zeros(3, device=DEVICE)], lr=1.0, weight_decay=0.0,
              excluded=[False], backend="fused")  # fmt: skip
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]
