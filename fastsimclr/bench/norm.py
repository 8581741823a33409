"""The norm bench: BN, sum with the shortcut and ReLU, forward and backward, at the shapes of ResNet-50's stages."""

# N images    C channels    H height    W width

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsimclr.bench.calls import Candidate, OpCase, Timed, report_of_calls
from fastsimclr.bench.configs import Dtype, NormBench
from fastsimclr.bench.memory import Call
from fastsimclr.bench.record import Report
from fastsimclr.kernels.batch_norm import batch_norm
from fastsimclr.runtime.device import choose_runtime

DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MAPS = (
    ("stem", 2, 64, False), ("stage 1", 4, 64, False), ("stage 1, end of a block", 4, 256, True),
    ("stage 2", 8, 128, False), ("stage 2, end of a block", 8, 512, True),
    ("stage 3", 16, 256, False), ("stage 3, end of a block", 16, 1024, True),
    ("stage 4", 32, 512, False), ("stage 4, end of a block", 32, 2048, True),
)  # fmt: skip
"""The kinds of maps in a ResNet-50 that BN and ReLU follow on: what the view's side is divided by, C, residual."""
CHECK_IMAGES, CHECK_SIDE, CHECK_CHANNELS = 8, 7, 64
# Norm of the error over that of the result. float32 sums in another order. In 11 and 8 bits torch rounds before it adds
# the residual, so that some values fall on the other side of ReLU, and their gradients with them.
BOUNDS: dict[Dtype, float] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 5e-2}
Function = Callable[..., Tensor]


def ours(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Our kernels."""
    return batch_norm(x, weight, bias, residual=residual, relu=True, running=(mean, var), backend="fused")


def eager(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """torch's batch norm, sum and ReLU, the latter two in place: what the network runs by default."""
    y = F.batch_norm(x, mean, var, weight, bias, True)
    if residual is not None:
        y += residual
    return F.relu(y, inplace=True)


def compiled() -> Function:
    """The same under torch.compile, which would give up after eight shapes if it kept those of earlier calls."""
    torch.compiler.reset()
    function: Function = torch.compile(eager, dynamic=False)
    return function


@dataclass(frozen=True, kw_only=True)
class NormForm:
    """One way to compute it. absent: why not on a CPU."""

    family: str
    build: Callable[[], Function]
    timed: Timed = "graph"
    absent: str | None = None


NO_KERNELS = "its Triton kernels run on CUDA only"
FORMS = {
    "ours": NormForm(family="ours", build=lambda: ours, absent=NO_KERNELS),
    "ours, launched one by one": NormForm(family="ours", build=lambda: ours, timed="events", absent=NO_KERNELS),
    "torch": NormForm(family="torch", build=lambda: eager),
    "torch, compiled": NormForm(family="torch", build=compiled, absent="not tried on a CPU"),
}


def bench_norm(config: NormBench) -> Report:
    """Measure and return the report."""
    config = config.at_smoke_size()
    runtime = choose_runtime(config.device, "fp32", False)
    device = runtime.device
    cuda = device.type == "cuda"
    verdicts = {
        name: _verdict(name, config.dtype, str(device), config.seed)
        for name, form in FORMS.items()
        if cuda or not form.absent
    }
    checks = {f"{name} against float64, {CHECK_IMAGES} images": words for name, (words, _) in verdicts.items()}
    works = [_work(config, *kind, verdicts=verdicts, device=device) for kind in MAPS]
    notes = [
        "peak memory is what a call adds to its inputs: all results, and what waits for the backward",
        "maps of one call may stay in a GPU's L2 cache: small ones can exceed the roofline",
    ]
    if not cuda:
        notes.append("no CUDA device: only torch's operations ran, none of our kernels")
    return report_of_calls("norm", asdict(config), runtime, works, round_ms=config.round_ms, checks=checks, notes=notes)


def _work(
    config: NormBench,
    name: str,
    divisor: int,
    channels: int,
    residual: bool,
    *,
    verdicts: dict[str, tuple[str, str | None]],
    device: torch.device,
) -> OpCase:
    side = -(-config.size // divisor)
    shape = (config.batch, channels, side, side)
    candidates = []
    for label, form in FORMS.items():
        made = partial(make, label, residual=residual, dtype=config.dtype, device=str(device), seed=config.seed)
        candidates.append(
            Candidate(
                name=label,
                family=form.family,
                make=partial(made, shape),
                make_small=partial(made, (CHECK_IMAGES, CHECK_CHANNELS, CHECK_SIDE, CHECK_SIDE)),
                items=config.batch,
                timed=form.timed,
                fault=verdicts[label][1] if label in verdicts else None,
                absent=None if device.type == "cuda" else form.absent,
            )
        )
    maps = 10 if residual else 8
    count = maps * config.batch * channels * side * side * DTYPES[config.dtype].itemsize
    return OpCase(
        name=f"{name}: {config.batch} x {channels} x {side} x {side} {config.dtype}{' + residual' if residual else ''}",
        unit="views",
        items=config.batch,
        bound=lambda ceilings: (ceilings.bytes_s(count), f"{maps} maps read or written, at the rate of a copy"),
        candidates=tuple(candidates),
    )


def make(name: str, shape: tuple[int, int, int, int], *, residual: bool, dtype: Dtype, device: str, seed: int) -> Call:
    """The call of a form: () -> (y, the gradients of x, weight, bias and residual), on the same numbers in all."""
    *inputs, dy = drawn(shape, residual, DTYPES[dtype], device, seed)
    leaves = [t.requires_grad_() for t in inputs if t is not None]
    mean, var = torch.zeros(shape[1], device=device), torch.ones(shape[1], device=device)
    function = FORMS[name].build()

    def call() -> tuple[Tensor, ...]:
        x, added, weight, bias = inputs
        y = function(x, added, weight, bias, mean, var)
        return (y.detach(), *torch.autograd.grad(y, leaves, dy))

    return call


def drawn(
    shape: tuple[int, int, int, int], residual: bool, dtype: torch.dtype, device: str, seed: int
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """x, residual, weight, bias and dy; maps channels-last, of `dtype`, weight and bias float32."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    def maps() -> Tensor:
        return normal(*shape).to(dtype).contiguous(memory_format=torch.channels_last)

    x = maps()
    return x, maps() if residual else None, 1 + normal(shape[1]) / 4, normal(shape[1]) / 4, maps()


def _verdict(name: str, dtype: Dtype, device: str, seed: int) -> tuple[str, str | None]:
    """The largest error of a form at a small size, with residual and without, and the fault if above the bound."""
    shape = (CHECK_IMAGES, CHECK_CHANNELS, CHECK_SIDE, CHECK_SIDE)
    worst = 0.0
    for residual in (False, True):
        try:
            found: Any = make(name, shape, residual=residual, dtype=dtype, device=device, seed=seed)()
        except Exception as error:  # a compiler's, which must not cost the other rows
            if FORMS[name].family == "ours":
                raise
            return f"failed: {error}", f"failed: {type(error).__name__}"
        given: Any = (None if t is None else t.double() for t in drawn(shape, residual, DTYPES[dtype], device, seed))
        for one, other in zip(found, exact(*given), strict=True):
            worst = max(worst, float((one.double() - other).norm() / other.norm()))
    words = f"{worst:.1e} off, bound {BOUNDS[dtype]:.0e}"
    return words, None if worst <= BOUNDS[dtype] else words


def exact(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """y and the gradients of x, residual, weight and bias by autograd of the formula."""
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias) if t is not None]
    var_C, mean_C = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    y = (x - mean_C) / torch.sqrt(var_C + 1e-5) * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
    y = torch.relu(y if residual is None else y + residual)
    return (y.detach(), *torch.autograd.grad(y, leaves, dy))
