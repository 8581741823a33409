"""The LARS bench: one step over a network's parameters, ours beside lightly's, plain torch, and SGD for scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from fastsimclr.bench import baseline
from fastsimclr.bench.calls import Candidate, Form, OpCase, report_of_calls
from fastsimclr.bench.configs import LarsBench
from fastsimclr.bench.memory import Call
from fastsimclr.bench.ours import HEAD_DIM, HEAD_LAYERS, LR, MOMENTUM, WEIGHT_DECAY
from fastsimclr.bench.record import Report
from fastsimclr.kernels.lars import lars_step
from fastsimclr.models import ModelConfig, build_simclr
from fastsimclr.optim import LARS
from fastsimclr.runtime.device import choose_runtime

TRUST = 0.001
# The check's rate moves weights by half a percent, so that their rounding to float32, 6e-8 of them, is 1e-5 of the way.
CHECK_STEPS, CHECK_LR, CHECK_WIDTH = 3, 1.0, 0.125
BOUND = 1e-3  # relative error of the way that a tensor went
# float32: w and g are read for the norms; w, g and v read and w and v written for the update.
BYTES_A_PARAMETER = 28
Step = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """What an optimizer steps: parameters with their gradients, momenta, and which have no decay."""

    params: list[torch.nn.Parameter]
    grads: list[Tensor]
    momenta: list[Tensor]
    excluded: list[bool]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Kernels, and what has no decay."""
        return [
            {"params": [p for p, out in zip(self.params, self.excluded, strict=True) if out is flag]}
            for flag in (False, True)
        ]


def tensors(arch: str, width: float, device: str, seed: int) -> Tensors:
    """The parameters of SimCLR's network with random gradients; equal for equal arguments."""
    torch.manual_seed(seed)
    config = ModelConfig(arch=arch, width=width, head_layers=HEAD_LAYERS, head_dim=HEAD_DIM)  # type: ignore[arg-type]
    params = [torch.nn.Parameter(p.detach().to(device)) for p in build_simclr(config, 224).parameters()]
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).mul_(0.01).to(device)
    grads = [p.grad for p in params if p.grad is not None]
    momenta = [torch.zeros_like(p) for p in params]
    return Tensors(params=params, grads=grads, momenta=momenta, excluded=[p.ndim == 1 for p in params])


Formula = Literal["google", "lightly"]


def ours(t: Tensors, variant: Formula, lr: float) -> Step:
    """The optimizer that the trainer uses."""
    kernels, others = t.groups
    groups = [kernels, others | {"excluded": True}]
    return LARS(groups, lr=lr, weight_decay=WEIGHT_DECAY, momentum=MOMENTUM, trust=TRUST, variant=variant).step


def ours_reference(t: Tensors, variant: Formula, lr: float) -> Step:
    """Ours in foreach operations."""
    settings = {"lr": lr, "weight_decay": WEIGHT_DECAY, "momentum": MOMENTUM, "trust": TRUST, "variant": variant}
    return partial(lars_step, t.params, t.grads, t.momenta, excluded=t.excluded, backend="reference", **settings)  # type: ignore[arg-type]


def lightly(t: Tensors, variant: Formula, lr: float) -> Step:
    """lightly's LARS, which leaves out what has no decay."""
    kernels, others = t.groups
    groups = [kernels | {"weight_decay": WEIGHT_DECAY}, others | {"weight_decay": 0.0}]
    optimizer = baseline.from_lightly("utils.lars", "LARS")(groups, lr=lr, momentum=MOMENTUM, trust_coefficient=TRUST)
    step: Step = optimizer.step
    return step


def plain(t: Tensors, variant: Formula, lr: float) -> Step:
    """The formula in plain torch, tensor after tensor."""

    @torch.no_grad()
    def step() -> None:
        for p, g, v, out in zip(t.params, t.grads, t.momenta, t.excluded, strict=True):
            update(p, g, v, out, variant, lr)

    return step


def sgd(t: Tensors, variant: Formula, lr: float) -> Step:
    """torch's SGD with momentum: fused where there is such a kernel."""
    kernels, others = t.groups
    groups = [kernels | {"weight_decay": WEIGHT_DECAY}, others]
    step: Step = torch.optim.SGD(groups, lr=lr, momentum=MOMENTUM, fused=True).step
    return step


def sgd_foreach(t: Tensors, variant: Formula, lr: float) -> Step:
    """The same in foreach operations."""
    kernels, others = t.groups
    groups = [kernels | {"weight_decay": WEIGHT_DECAY}, others]
    step: Step = torch.optim.SGD(groups, lr=lr, momentum=MOMENTUM, foreach=True).step
    return step


def update(w: Tensor, g: Tensor, v: Tensor, excluded: bool, variant: Formula, lr: float) -> None:
    """One tensor's LARS step in place on w and v: You et al. 2017 (arXiv 1708.03888), as Google or lightly have it."""
    if not excluded:
        w_norm, g_norm = w.norm(), g.norm()
        g = g + WEIGHT_DECAY * w
        if variant == "google":
            g_norm = g.norm()
            ratio = torch.where((w_norm > 0) & (g_norm > 0), TRUST * w_norm / g_norm, 1.0)
        else:
            ratio = TRUST * w_norm / (g_norm + WEIGHT_DECAY * w_norm + 1e-8)
        g = g * ratio
    if variant == "google":
        v.mul_(MOMENTUM).add_(g, alpha=lr)
        w.sub_(v)
    else:
        v.mul_(MOMENTUM).add_(g)
        w.sub_(v, alpha=lr)


@dataclass(frozen=True, kw_only=True)
class LarsForm(Form):
    """One way to make the step. lars: whether it is LARS; else it stands for scale and is not checked."""

    build: Callable[[Tensors, Formula, float], Step]
    lars: bool = True
    formula: Formula | None = None


FORMS = {
    "ours": LarsForm(family="ours", build=ours),
    "ours, launched one by one": LarsForm(family="ours", build=ours, timed="events", cuda_only=True),
    "ours, foreach": LarsForm(family="ours", build=ours_reference, cuda_only=True),
    # It reads norms on the host, which a CUDA graph does not allow.
    "lightly": LarsForm(family="lightly", build=lightly, timed="events", formula="lightly"),
    "plain torch, tensor after tensor": LarsForm(family="plain torch", build=plain),
    "SGD fused (no LARS)": LarsForm(family="torch's SGD", build=sgd, lars=False),
    "SGD foreach (no LARS)": LarsForm(family="torch's SGD", build=sgd_foreach, lars=False),
}


def bench_lars(config: LarsBench) -> Report:
    """Measure and return the report."""
    config = config.at_smoke_size()
    runtime = choose_runtime(config.device, "fp32", False)
    device = runtime.device
    forms = {name: form for name, form in FORMS.items() if device.type == "cuda" or not form.cuda_only}
    if not find_spec("lightly"):
        del forms["lightly"]
    verdicts = {name: _verdict(name, form, config, device) for name, form in forms.items() if form.lars}
    whole = tensors(config.arch, config.width, "cpu", config.seed)
    count = sum(p.numel() for p in whole.params)
    candidates = []
    for name, form in forms.items():
        made = partial(make, name, variant=config.variant, device=str(device), seed=config.seed)
        candidates.append(
            Candidate(
                name=name,
                family=form.family,
                make=partial(made, config.arch, config.width),
                make_small=partial(made, "resnet18", CHECK_WIDTH),
                items=1,
                timed=form.timed,
                rival=form.lars,
                fault=verdicts[name][1] if form.lars else None,
            )
        )
    work = OpCase(
        name=f"{config.arch}, {count / 1e6:.2f} M parameters in {len(whole.params)} tensors",
        unit="steps",
        items=1,
        bound=lambda ceilings: (
            ceilings.bytes_s(BYTES_A_PARAMETER * count),
            f"{BYTES_A_PARAMETER} bytes a parameter at the rate of a copy",
        ),
        candidates=tuple(candidates),
    )
    checks = {f"{name} against float64, {CHECK_STEPS} steps": words for name, (words, _) in verdicts.items()}
    notes = ["peak memory is what a step adds to parameters, gradients and momenta", *baseline.notes()]
    return report_of_calls(
        "lars", asdict(config), runtime, [work], round_ms=config.round_ms, checks=checks, notes=notes
    )


def make(name: str, arch: str, width: float, *, variant: Formula, device: str, seed: int) -> Call:
    """The step of a form, after a first one that has made the momenta."""
    step = FORMS[name].build(tensors(arch, width, device, seed), variant, LR)
    step()
    return step


def _verdict(name: str, form: LarsForm, config: LarsBench, device: torch.device) -> tuple[str, str | None]:
    """The error of the weights after three steps of a narrow network in words, and the fault if above the bound."""
    formula = form.formula or config.variant
    tried = tensors(config.arch, CHECK_WIDTH, str(device), config.seed)
    step = form.build(tried, config.variant, CHECK_LR)
    for _ in range(CHECK_STEPS):
        step()
    off = 0.0
    given = tensors(config.arch, CHECK_WIDTH, "cpu", config.seed)
    for p, first, g, out in zip(tried.params, given.params, given.grads, given.excluded, strict=True):
        start = first.detach().double()
        w, v = start.clone(), torch.zeros_like(start)
        for _ in range(CHECK_STEPS):
            update(w, g.double(), v, out, formula, CHECK_LR)
        off = max(off, float((p.detach().double().cpu() - w).norm() / (w - start).norm()))
    words = f"weights {off:.1e} of their way off, bound {BOUND:.0e}"
    return words, None if off <= BOUND else words
