"""The loss bench: NT-Xent forward and backward, ours beside plain torch in several forms and lightly's."""

# M rows, both views of N = M / 2 images    D dimensions

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsimclr.bench import baseline
from fastsimclr.bench.calls import Candidate, Form, OpCase, report_of_calls
from fastsimclr.bench.configs import Dtype, LossBench
from fastsimclr.bench.memory import Call
from fastsimclr.bench.record import Report
from fastsimclr.kernels.nt_xent import nt_xent
from fastsimclr.runtime.device import choose_runtime

Loss = Callable[[Tensor, float], Tensor]
DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CHECK_ROWS = 256
# Relative errors of loss and gradient. float32 sums in another order; z rounded to fp16, 11 bits, as our kernels keep
# it; bf16 similarities, of 8 bits, divided by the temperature.
FULL, ROUNDED, HALF = 1e-4, 5e-3, 5e-2
MATRICES = 5  # of M x M float32 that a materialised loss holds at its peak: 4.2 measured, and some air


def ours(x: Tensor, temperature: float) -> Tensor:
    """Ours as it runs by default."""
    return nt_xent(x, temperature).loss


def ours_reference(x: Tensor, temperature: float) -> Tensor:
    """Ours in torch operations."""
    return nt_xent(x, temperature, backend="reference").loss


def plain(x: Tensor, temperature: float) -> Tensor:
    """Cross-entropy over the whole matrix of similarities in float32."""
    z = F.normalize(x.float(), dim=1)
    return _cross_entropy(z @ z.T, temperature)


def plain_half(x: Tensor, temperature: float) -> Tensor:
    """The same with the matrix product in bf16."""
    z = F.normalize(x.float(), dim=1).bfloat16()
    return _cross_entropy(z @ z.T, temperature)


def _cross_entropy(similarities: Tensor, temperature: float) -> Tensor:
    m = len(similarities)
    logits = (similarities / temperature).float().fill_diagonal_(-math.inf)
    return F.cross_entropy(logits, torch.arange(m, device=logits.device).roll(m // 2))


def plain_half_compiled() -> Loss:
    """The same under torch.compile."""
    compiled: Loss = torch.compile(plain_half, dynamic=False)
    return compiled


def lightly(x: Tensor, temperature: float) -> Tensor:
    """lightly's NTXentLoss in float32."""
    loss: Tensor = baseline.from_lightly("loss", "NTXentLoss")(temperature=temperature)(*x.float().chunk(2))
    return loss


def lightly_autocast(x: Tensor, temperature: float) -> Tensor:
    """lightly's NTXentLoss under autocast to bf16."""
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        loss: Tensor = baseline.from_lightly("loss", "NTXentLoss")(temperature=temperature)(*x.chunk(2))
    return loss


@dataclass(frozen=True, kw_only=True)
class LossForm(Form):
    """One way to compute the loss. build: makes the function. bound: on its relative error at the small size."""

    build: Callable[[], Loss]
    bound: float
    materialised: bool = True


FORMS = {
    "ours": LossForm(family="ours", build=lambda: ours, bound=ROUNDED, materialised=False),
    "ours, launched one by one": LossForm(
        family="ours", build=lambda: ours, bound=ROUNDED, timed="events", cuda_only=True, materialised=False
    ),
    "ours, torch operations": LossForm(
        family="ours", build=lambda: ours_reference, bound=FULL, cuda_only=True, materialised=False
    ),
    "plain torch float32": LossForm(family="plain torch", build=lambda: plain, bound=FULL),
    "plain torch bf16 product": LossForm(family="plain torch", build=lambda: plain_half, bound=HALF),
    "plain torch bf16 product, compiled": LossForm(
        family="plain torch", build=plain_half_compiled, bound=HALF, cuda_only=True
    ),
    # Its boolean masks wait for the device, which a CUDA graph does not allow.
    "lightly float32": LossForm(family="lightly", build=lambda: lightly, bound=FULL, timed="events"),
    "lightly bf16 autocast": LossForm(family="lightly", build=lambda: lightly_autocast, bound=HALF, timed="events"),
}


def bench_loss(config: LossBench) -> Report:
    """Measure and return the report."""
    config = config.at_smoke_size()
    runtime = choose_runtime(config.device, "fp32", False)
    cuda = runtime.device.type == "cuda"
    forms = {name: form for name, form in FORMS.items() if cuda or not form.cuda_only}
    if not find_spec("lightly"):
        forms = {name: form for name, form in forms.items() if form.family != "lightly"}
    checks: dict[str, Any] = {}
    verdicts = {name: _verdict(name, form, config, runtime.device) for name, form in forms.items()}
    for name, (words, _) in verdicts.items():
        checks[f"{name} against float64, {CHECK_ROWS} rows"] = words
    works = [_work(config, rows, forms, verdicts, runtime.device) for rows in config.all_rows]
    notes = [f"inputs, {config.dtype} projections, are not in peak memory; the gradient is", *baseline.notes()]
    return report_of_calls("loss", asdict(config), runtime, works, round_ms=config.round_ms, checks=checks, notes=notes)


def _work(
    config: LossBench,
    rows: int,
    forms: dict[str, LossForm],
    verdicts: dict[str, tuple[str, str | None]],
    device: torch.device,
) -> OpCase:
    candidates = []
    for name, form in forms.items():
        made = partial(make, name, dim=config.dim, temperature=config.temperature, dtype=config.dtype)
        made = partial(made, device=str(device), seed=config.seed)
        candidates.append(
            Candidate(
                name=name,
                family=form.family,
                make=partial(made, rows),
                make_small=partial(made, CHECK_ROWS),
                items=rows // 2,
                timed=form.timed,
                needs=4 * MATRICES * rows * rows if form.materialised else 0,
                fault=verdicts[name][1],
            )
        )
    return OpCase(
        name=f"M {rows:,}, D {config.dim}, {config.dtype}",
        unit="images",
        items=rows // 2,
        bound=lambda ceilings: ceilings.loss_s(rows, config.dim),
        candidates=tuple(candidates),
    )


def make(name: str, rows: int, *, dim: int, temperature: float, dtype: Dtype, device: str, seed: int) -> Call:
    """The call of a form: () -> (loss, gradient) of `rows` projections that are the same in every form."""
    x = projections(rows, dim, seed).to(device, DTYPES[dtype]).requires_grad_()
    function = FORMS[name].build()

    def call() -> tuple[Tensor, Tensor]:
        loss = function(x, temperature)
        (gradient,) = torch.autograd.grad(loss, x)
        return loss.detach(), gradient

    return call


def projections(rows: int, dim: int, seed: int) -> Tensor:
    """float32 [M, D]: the two views of an image are alike, as in training."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn((rows // 2, dim), generator=generator).repeat(2, 1)
    return shared + torch.randn((rows, dim), generator=generator)


def _verdict(name: str, form: LossForm, config: LossBench, device: torch.device) -> tuple[str, str | None]:
    """The errors of a form at a small size in words, and the fault if they are above its bound."""
    settings = {"dim": config.dim, "temperature": config.temperature, "dtype": config.dtype}
    try:
        call = make(name, CHECK_ROWS, device=str(device), seed=config.seed, **settings)  # type: ignore[arg-type]
        result: Any = call()
    except Exception as error:  # somebody else's code, which must not cost the other rows
        if form.family == "ours":
            raise
        return f"failed: {error}", f"failed: {type(error).__name__}"
    x = projections(CHECK_ROWS, config.dim, config.seed).to(DTYPES[config.dtype])
    loss, gradient = result
    true_loss, true_gradient = exact(x, config.temperature)
    loss_off = float((loss.double().cpu() - true_loss).abs() / true_loss)
    gradient_off = float((gradient.double().cpu() - true_gradient).norm() / true_gradient.norm())
    # On a CPU ours is float32 throughout. A gradient in half precision has been rounded to it.
    bound = FULL if form.bound == ROUNDED and device.type != "cuda" else form.bound
    bound = max(bound, FULL if config.dtype == "fp32" else ROUNDED)
    words = f"loss {loss_off:.1e} off, gradient {gradient_off:.1e}, bound {bound:.0e}"
    sound = loss_off <= bound and gradient_off <= bound
    return words, None if sound else words


def exact(x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Loss and gradient [M, D] by autograd in float64 on the CPU: Chen et al. 2020, Eq. 1."""
    x = x.detach().cpu().double().requires_grad_()
    z = x / x.norm(dim=1, keepdim=True)
    s = z @ z.T / temperature
    others = ~torch.eye(len(x), dtype=torch.bool)
    partner = torch.arange(len(x)).roll(len(x) // 2)
    positive = s.gather(1, partner[:, None]).squeeze(1)
    loss = (torch.log((s.exp() * others).sum(1)) - positive).mean()
    (gradient,) = torch.autograd.grad(loss, x)
    return loss.detach(), gradient
