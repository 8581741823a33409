"""Part 1: every Triton kernel against a float64 reference, forward and gradient; fresh memory starts as NaN."""

# M rows, both views    D dimensions    K rows of the bank

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsimclr.bench.gpu.record import Entry, Job, Size
from fastsimclr.kernels.batch_norm import batch_norm
from fastsimclr.kernels.gather import gather_views
from fastsimclr.kernels.lars import lars_step
from fastsimclr.kernels.nt_xent import nt_xent
from fastsimclr.kernels.nt_xent.state import Inputs
from fastsimclr.kernels.views import make_views

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
Options = dict[str, Any]
ROUNDING = {F32: 0.0, F16: 2.0**-11, BF16: 2.0**-7}
"""One rounding of a result. For bfloat16 two half units, as Triton's interpreter truncates."""


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill every fresh tensor with NaN, or with the largest integer: an element that is never written is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check(error: float, tolerance: float, reason: str) -> Entry:
    """One line of a case. An error of NaN fails."""
    return {"error": error, "tolerance": tolerance, "reason": reason, "ok": error <= tolerance}


def case(checks: dict[str, Entry], **details: Any) -> Entry:
    """The entry of a case."""
    return {"ok": all(line["ok"] for line in checks.values()), **details, "checks": checks}


def largest(got: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """The largest error relative to the largest expected value, which counts as `least` at least; NaN counts."""
    error = (got.double() - expected.double()).abs()
    return float(error.max() / expected.double().abs().max().clamp(min=least)) if error.numel() else 0.0


def frobenius(got: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """|got - expected| beyond `floor`, relative to |expected|; NaN counts."""
    beyond = float((got.double() - expected).norm()) - floor
    return 0.0 if beyond <= 0 else beyond / float(expected.norm())


def worst(errors: Iterable[float]) -> float:
    """The largest of several errors; NaN counts, which Python's max may pass over."""
    return float(torch.tensor([0.0, *errors]).max())


def generator_for(device: torch.device, seed: int) -> Any:
    """A function (*shape) -> normal float32 numbers on the device; the same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator).to(device)


def nt_xent_case(
    device: torch.device, rows: int, dim: int, dtype: torch.dtype, t: float, *, noise: float = 0.5, bank: int = 0,
    keys: bool = False, weights: bool = False, tensor: bool = False, rounded: bool = True,
) -> Entry:  # fmt: skip
    """The loss, top-1, the gradient and, of a tensor, the temperature's gradient.

    rounded: against float64 autograd of the whole matrix on the fp16 vectors that the kernels hold; the error against
    vectors that were not rounded is recorded too. Otherwise, for many rows, against the latter alone.
    """
    from fastsimclr.kernels.nt_xent import fused

    normal = generator_for(device, rows + dim)
    shared = normal(rows // 2, dim)
    x = torch.cat((shared, shared + noise * normal(rows // 2, dim))).mul_(3).to(dtype)
    options: Options = {"keys": (x + normal(rows, dim) / 2).to(dtype)} if keys else {}
    options |= {"bank": normal(bank, dim).to(dtype)} if bank else {}
    options |= {"weights": torch.linspace(0, 2, rows, device=device)} if weights else {}
    temperature = torch.tensor(t, device=device, requires_grad=True) if tensor else t
    leaf = x.clone().requires_grad_()
    with poisoned():
        out = nt_xent(leaf, temperature, backend="fused", **options)
        out.loss.backward()  # type: ignore[no-untyped-call]
    exact = x.double().requires_grad_()
    wide = {name: value.double() for name, value in options.items()}
    reference = nt_xent(exact, t, backend="reference", **wide)
    reference.loss.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None and exact.grad is not None
    unrounded = frobenius(leaf.grad, exact.grad)
    loss_off = float((out.loss.double() - reference.loss).abs() / reference.loss.abs().clamp(min=1e-6))
    if not rounded:
        return case(
            {
                "loss": check(loss_off, 1e-3, "vectors rounded to fp16, against vectors that are not"),
                "gradient": check(unrounded, 3e-3, "vectors rounded to fp16, against vectors that are not"),
            }
        )
    with torch.no_grad():
        held = fused.forward(Inputs(x, 0.5, bank=options.get("bank"), keys=options.get("keys")))[3].z[:, :dim]
    start = -(-rows // 128) * 128
    z = (held[-rows:] if keys else held[:rows]).double().requires_grad_()
    heat = torch.tensor(t, dtype=torch.float64, device=device, requires_grad=True)
    loss, top1 = _whole_matrix(z, held[:rows].double() if keys else z, held[start : start + bank].double(), heat, wide)
    dz, dt = torch.autograd.grad(loss, (z, heat))
    z = z.detach()
    norms = x.double().norm(dim=1, keepdim=True)
    dx = (dz - z * (z * dz).sum(1, keepdim=True) / (z * z).sum(1, keepdim=True)) / norms
    floor = 1e-6 * float((dz / norms).norm()) + (6e-8 * dx.numel() ** 0.5 if dtype == F16 else 0)
    own = {F32: 0.0, F16: 5e-4, BF16: 4e-3}[dtype]
    found = {
        "loss": check(largest(out.loss, loss, 5e-5), 2e-5, "sums in float32, in another order"),
        "top1": check(abs(float(out.top1 - top1)), 1.01 / rows, "a similarity within 5e-6 of the positive is a tie"),
        "gradient": check(frobenius(leaf.grad, dx, floor), 1e-3 + own, "coefficients in fp16, one rounding of dx"),
    }
    if isinstance(temperature, Tensor):
        assert temperature.grad is not None
        found["temperature"] = check(largest(temperature.grad, dt, 1e-2), 1e-4, "a sum of M M products in float32")
    return case(found, unrounded={"loss": loss_off, "gradient": unrounded})


def _whole_matrix(q: Tensor, k: Tensor, bank: Tensor, t: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """mean(w_i log(1 + sum over negatives exp(s_ij - s_ip))) of vectors as they are, and top-1."""
    m = len(q)
    itself = torch.eye(m, dtype=torch.bool, device=q.device)
    left_out = torch.cat((itself | itself.roll(m // 2, 1), itself.new_zeros(m, len(bank))), 1)
    c = q @ torch.cat((k, bank)).T
    positive = (q * k.roll(m // 2, 0)).sum(1, keepdim=True)
    losses = ((c - positive) / t).exp().masked_fill(left_out, 0).sum(1).log1p()
    harder = ((c >= positive - 5e-6) & ~left_out).any(1)
    return (options.get("weights", torch.ones_like(losses)) * losses).mean(), (~harder).double().mean()


def batch_norm_case(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, *, residual: bool = True, relu: bool = True
) -> Entry:
    """The result, all gradients and the running statistics."""
    normal, c = generator_for(device, shape[0] + shape[1]), shape[1]
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    x, dy, added = (normal(*shape).to(dtype).contiguous(memory_format=layout) for _ in range(3))
    vectors = {"weight": 1 + normal(c) / 4, "bias": normal(c) / 4}

    def run(wide: bool, relu: bool) -> dict[str, Tensor]:
        given = {"x": 2 * x + 1, **vectors} | ({"residual": added} if residual else {})
        leaves = {n: (v.double() if wide else v.clone()).requires_grad_() for n, v in given.items()}
        single = torch.float64 if wide else F32
        running = torch.zeros(c, device=device, dtype=single), torch.ones(c, device=device, dtype=single)
        backend: Any = "reference" if wide else "fused"
        y = batch_norm(
            leaves["x"], leaves["weight"], leaves["bias"], residual=leaves.get("residual"), relu=relu, running=running,
            backend=backend,
        )  # fmt: skip
        gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
        found = {"y": y.detach()} | {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}
        return found | {"running mean": running[0], "running var": running[1]}

    with poisoned():
        got = run(False, relu)
    expected = run(True, relu)
    # Next to 0 float32 and float64 may fall on different sides of ReLU; these elements of two gradients are left out.
    sure = run(True, False)["y"].abs() > 1e-5
    checks = {}
    for name, value in expected.items():
        masked = relu and name in ("dx", "dresidual")
        a, b = (got[name] * sure, value * sure) if masked else (got[name], value)
        # NaN times False stays NaN, so that an element that was not written is seen.
        own = ROUNDING[got[name].dtype]
        checks[name] = check(largest(a, b, 1e-3), 1e-5 + own, "sums in float32, in another order; one rounding")
    return case(checks)


def lars_case(device: torch.device, shapes: list[tuple[int, ...]], dtype: torch.dtype, variant: Any) -> Entry:
    """Weights, momenta and copies after three steps with every option. dtype: of the gradients."""
    normal, n = generator_for(device, len(shapes)), len(shapes)
    fine = [normal(*shape) for shape in shapes]
    exact = [w.double() for w in fine]
    momenta = [torch.zeros_like(w) for w in fine], [torch.zeros_like(w) for w in exact]
    copies = [torch.full_like(w, math.nan, dtype=F16 if i % 2 else BF16) for i, w in enumerate(fine)]
    options: Options = {"weight_decay": [(0.0, 1e-4, 0.5)[i % 3] for i in range(n)], "variant": variant}
    options |= {"excluded": [i % 4 == 1 for i in range(n)], "l2": [0.1 * (i % 3 == 2) for i in range(n)]}
    options |= {"lr_scale": [1 + i % 2 / 2 for i in range(n)]}
    for step in range(3):
        grads = [normal(*shape).to(dtype) for shape in shapes]
        with poisoned():
            rate, scale = torch.tensor(0.5 + step, device=device), torch.tensor(0.125, device=device)
            lars_step(
                fine, grads, momenta[0], lr=rate if step else 0.5, inverse_scale=scale, copies=copies, backend="fused",
                **options,
            )  # fmt: skip
        small = [g.double() / 8 for g in grads]
        lars_step(exact, small, momenta[1], lr=0.5 + step, backend="reference", **options)
    most = max(w.numel() for w in fine)
    tolerance, reason = (2e-6, "sums of few squares") if most < 5000 else (1e-5, "sums of up to 2.4 million squares")
    pairs = {"weights": (fine, exact), "momenta": (momenta[0], momenta[1])}
    found = {
        name: check(worst(largest(a, b, 1e-3) for a, b in zip(*pair, strict=True)), tolerance, f"float32, {reason}")
        for name, pair in pairs.items()
    }
    for kind in (F16, BF16):
        errors = [largest(c, w, 1e-3) for c, w in zip(copies, fine, strict=True) if c.dtype == kind]
        found[f"copies {kind}"] = check(worst(errors), ROUNDING[kind], "one rounding")
    return case(found)


def views_case(
    device: torch.device,
    size: int,
    sides: list[tuple[int, int]],
    dtype: torch.dtype,
    semantics: Any,
    *,
    gather: int = 0,
) -> Entry:
    """Views with every op against torch operations in float32. gather: images of a data set to gather by id."""
    from fastsimclr.loaders.batch import Ragged
    from fastsimclr.loaders.draw import Policy, draw

    policy = dataclasses.replace(Policy(size=size, semantics=semantics), normalise="none")
    if not gather:
        policy = dataclasses.replace(policy, rotate=15.0, rotate90=0.2, sobel=0.1, noise=0.1, cutout=0.3)
    generator = torch.Generator().manual_seed(size)
    count = gather or len(sides)
    sizes = torch.tensor([sides[i % len(sides)] for i in range(count)], dtype=torch.int32)
    pieces = []
    for height, width in sizes.tolist():
        coarse = torch.rand(1, 3, height // 4 + 1, width // 4 + 1, generator=generator) * 1.6 - 0.3
        image = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)[0]
        pieces.append((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).flatten())
    ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0)
    images = Ragged(
        buffer=torch.cat(pieces), offsets=torch.cat((torch.zeros(1, dtype=torch.int64), ends[:-1])),
        heights=sizes[:, 0], widths=sizes[:, 1],
    ).to(device)  # fmt: skip
    ids = torch.randint(count, (min(count, 64),), generator=generator) if gather else torch.arange(count)
    params = draw(policy, 3, torch.zeros(len(ids)), ids, 2, sizes[ids]).to(device)

    def run(backend: Any) -> Tensor:
        if gather:
            dataset = images.buffer.view(count, *sides[0], 3)
            return gather_views(dataset, ids.to(device), params, **policy.rendering, dtype=dtype, backend=backend)
        return make_views(images, params, **policy.rendering, dtype=dtype, backend=backend)

    with poisoned():
        got = run("fused")
    off = (got.float() - run("reference").float()).abs()
    tolerance = {F32: 1e-4, F16: 1e-3, BF16: 5e-3}[dtype]
    share = float((~(off <= tolerance)).double().mean()) if got.isfinite().all() else math.inf
    why = f"values farther than {tolerance} off: positions rounded in another order, times a slope of up to 1 per pixel"
    mean = "positions rounded in another order; digits of the dtype, and of float16 in scratch memory"
    return case({"share": check(share, 1e-5, why), "mean": check(float(off.mean()), tolerance / 4, mean)})


def jobs(device: torch.device, tiny: bool) -> list[Job]:
    """All cases, the most important first. tiny: at a size for Triton's interpreter."""
    many, wide, some = (62, 40, 34) if tiny else (4098, 128, 1026)
    bank = 33 if tiny else 1000
    shapes = [(6, 13, 3, 7), (9, 5), (5, 16, 1, 1), (70, 1)] + ([] if tiny else [(32, 64, 56, 56), (16, 2048, 7, 7)])
    loss = partial(nt_xent_case, device, many, wide)
    runs_of: dict[str, Any] = {
        "nt_xent fp32": partial(loss, F32, 0.1),
        "views 224 fp16": partial(views_case, device, 24 if tiny else 224, [(23, 31)] if tiny else
                                  [(256, 256), (300, 411), (97, 64), (1, 30)] * 4, F16, "torchvision"),
        "views 32 fp16": partial(views_case, device, 16 if tiny else 32, [(12, 14)] if tiny else [(32, 32)] * 64, F16,
                                 "torchvision"),
        "gather_views fp16": partial(views_case, device, 16 if tiny else 32, [(12, 14)] if tiny else [(32, 32)], F16,
                                     "torchvision", gather=9 if tiny else 5000),
        "lars google fp32": partial(lars_case, device, SMALL, F32, "google"),
        "batch_norm bf16 + residual": partial(batch_norm_case, device, shapes[-2], BF16),
        "nt_xent keys, bank, weights, tensor": partial(
            loss, F32, 0.1, keys=True, bank=bank, weights=True, tensor=True
        ),
    }  # fmt: skip
    for dtype, name in ((F16, "fp16"), (BF16, "bf16")):
        runs_of[f"nt_xent {name}"] = partial(loss, dtype, 0.1)
    runs_of |= {
        "nt_xent bank": partial(loss, F32, 0.1, bank=bank),
        "nt_xent keys": partial(loss, F32, 0.5, keys=True),
        "nt_xent weights": partial(loss, F32, 0.5, weights=True),
        "nt_xent tensor temperature": partial(loss, F32, 0.05, tensor=True),
        "nt_xent temperature .02, online maximum": partial(loss, F32, 0.02),
        "nt_xent M 4 D 5": partial(nt_xent_case, device, 4, 5, F32, 0.1),
        "nt_xent M 62 D 100, tight": partial(nt_xent_case, device, 62, 100, F32, 0.1, noise=0.1),
        "nt_xent D 300": partial(nt_xent_case, device, some, 300, F32, 0.1),
        "nt_xent bf16 keys, bank D 130": partial(nt_xent_case, device, some, 130, BF16, 0.2, keys=True, bank=bank),
    }
    for dtype, name in ((F32, "fp32"), (F16, "fp16"), (BF16, "bf16")):
        for shape in shapes:
            word = f"batch_norm {name} {' x '.join(map(str, shape))}"
            runs_of[f"{word} + residual"] = partial(batch_norm_case, device, shape, dtype)
            if shape in (shapes[0], shapes[-2]):
                runs_of[word] = partial(batch_norm_case, device, shape, dtype, residual=False)
                runs_of[f"{word}, no ReLU"] = partial(batch_norm_case, device, shape, dtype, residual=False, relu=False)
        for variant in ("google", "lightly"):
            runs_of[f"lars {variant} {name}"] = partial(lars_case, device, SMALL, dtype, variant)
        for semantics in ("torchvision", "tensorflow"):
            sides = [(12, 14), (7, 5)] if tiny else [(256, 256), (97, 64), (500, 375)] * 4
            for size in (16,) if tiny else (32, 96, 224):
                runs_of[f"views {size} {semantics} {name}"] = partial(views_case, device, size, sides, dtype, semantics)
    if not tiny:
        runs_of["lars google, ResNet-50's sizes"] = partial(lars_case, device, LARGE, F32, "google")
        runs_of["nt_xent D 2048"] = partial(nt_xent_case, device, 514, 2048, F32, 0.1)
    cases = [
        Job(name=name, sizes=[Size(name="tiny" if tiny else "full", expected_s=5.0, run=run)])
        for name, run in runs_of.items()
    ]
    if not tiny:
        runs = [(m, partial(nt_xent_case, device, m, 128, F32, 0.1, rounded=False)) for m in (65536, 16384)]
        sizes = [Size(name=f"M {m}", expected_s=10.0, run=run) for m, run in runs]
        cases.append(Job(name="nt_xent, many rows", sizes=sizes))
    return cases


SMALL: list[tuple[int, ...]] = [(1,), (63,), (10, 10), (2000,), (4097,), (16, 4, 3, 3), (5, 7)]
LARGE: list[tuple[int, ...]] = [(64, 3, 7, 7), (512, 512, 3, 3), (2048, 1024, 1, 1), (2048,), (2048, 2048), (2048, 128)]
