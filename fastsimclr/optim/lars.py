"""Optimizers: what they are set by, which parameters they spare from decay, and LARS as a torch Optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fastsimclr.kernels.backend import Backend
from fastsimclr.kernels.lars import Variant, implementation, lars_step

Name = Literal["lars", "sgd"]
LrScaling = Literal["linear", "sqrt", "none"]
NORMALISATIONS = (_NormBase, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True, kw_only=True)
class HeadSetting:
    """What one of several classifiers trained side by side has of its own.

    lr_scale: its learning rate as a multiple of the schedule's. weight_decay: of its kernel.
    """

    lr_scale: float
    weight_decay: float


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its schedule: linear warm-up from 0, then cosine decay to 0, per step."""

    name: Name = "lars"
    """lars for pretraining, fine-tuning and distillation; sgd with Nesterov momentum for linear evaluation."""
    lr: float = 0.3
    """Base learning rate, before lr_scaling. SimCLR v1: 0.3 linear or 0.075 sqrt; v2: 0.1 sqrt."""
    lr_scaling: LrScaling = "linear"
    """Peak learning rate from the global batch B: linear is lr * B / 256, sqrt is lr * sqrt(B), none is lr."""
    weight_decay: float = 1e-4
    """L2 decay of the kernels; biases and normalisation parameters have none. SimCLR v1: 1e-6; v2: 1e-4."""
    momentum: float = 0.9
    """Momentum of lars and of sgd."""
    nesterov: bool = False
    """Nesterov momentum, for sgd only. Google's linear evaluation uses it."""
    trust_coefficient: float = 0.001
    """LARS: the step's norm relative to the weight's, at learning rate 1. Google's eeta."""
    lars_variant: Variant = "google"
    """LARS as google-research/simclr computes it, or as lightly and solo-learn do, to repeat their runs."""
    warmup_epochs: float = 10
    """Epochs of linear warm-up from 0. SimCLR v1: 10; v2: 5 % of the epochs, that is 40 of 800."""

    def __post_init__(self) -> None:
        choices = {"name": Name, "lr_scaling": LrScaling, "lars_variant": Variant}
        for key, allowed in choices.items():
            if getattr(self, key) not in get_args(allowed):
                raise ValueError(f"{key}={getattr(self, key)!r} is unknown; use one of {', '.join(get_args(allowed))}")
        for key in ("lr", "weight_decay", "momentum", "trust_coefficient", "warmup_epochs"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"{key}={getattr(self, key)} must be finite and at least 0")
        if self.momentum >= 1:
            raise ValueError(f"momentum={self.momentum} must be below 1, or the steps grow without end; use 0.9")
        if self.nesterov and (self.name == "lars" or self.momentum == 0):
            raise ValueError("nesterov=True needs name=sgd and momentum above 0; LARS has no Nesterov form")

    def peak_lr(self, global_batch: int) -> float:
        """The learning rate at the end of the warm-up for a global batch of that many images (not views)."""
        factor = {"linear": global_batch / 256, "sqrt": math.sqrt(global_batch), "none": 1.0}
        return self.lr * factor[self.lr_scaling]


class LARS(torch.optim.Optimizer):
    """LARS as `fastsimclr.kernels.lars.lars_step` computes it: one call for all groups, and no wait for the device.

    params: parameters or groups. A group may set "excluded" (no decay, no trust ratio), "lr_scale" (its learning rate
    as a multiple of "lr") and "l2": a coefficient whose multiple of the weight is added to the gradient first, which is
    the gradient of an L2 term l2 / 2 * |w|^2 in the loss, as Google's supervised head has it. "lr" of a group may be a
    float or a 0-dim tensor on its device; groups that differ in it, or in "momentum", "trust" or "variant", are stepped
    one after the other. backend: as of `lars_step`.
    State: one "momentum" tensor a parameter, zero at first. Parameters without gradient are passed over.
    torch.amp.GradScaler leaves scale and inf check to the step, where both stay on the device: a step with an
    overflow changes nothing, and nobody waits to hear of it. It leaves the gradients scaled.
    """

    _step_supports_amp_scaling = True
    """Read by GradScaler, which then sets `grad_scale` and `found_inf` for the time of a step."""
    backend: Backend = "auto"

    def __init__(
        self,
        params: Any,
        *,
        lr: float | Tensor,
        weight_decay: float,
        momentum: float = 0.9,
        trust: float = 0.001,
        variant: Variant = "google",
        backend: Backend = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "trust": trust,
            "variant": variant,
            "excluded": False,
            "l2": 0.0,
            "lr_scale": 1.0,
        }
        self.backend = backend
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """After unpickling or loading a state: of an earlier version too, and of parameters in another layout."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("lr_scale", 1.0)
        for p, own in self.state.items():
            if own["momentum"].stride() != p.stride():
                own["momentum"] = torch.empty_like(p).copy_(own["momentum"])

    @property
    def implementation(self) -> str:
        """What a step runs: "lars.fused" or "lars.foreach"."""
        which = implementation(self.param_groups[0]["params"][0], self.backend)
        return f"lars.{'fused' if which == 'fused' else 'foreach'}"

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient; returns what `closure` returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale: Tensor | None = getattr(self, "grad_scale", None)
        # In float64, as GradScaler itself: some GPUs' float32 reciprocal is off by more than rounding.
        inverse = None if scale is None else scale.double().reciprocal().float()
        together: dict[tuple[Any, ...], list[tuple[Tensor, dict[str, Any]]]] = {}
        for group in self.param_groups:
            common = (group["lr"], group["momentum"], group["trust"], group["variant"])
            key = (id(common[0]) if isinstance(common[0], Tensor) else common[0], *common[1:])
            together.setdefault(key, []).extend((p, group) for p in group["params"] if p.grad is not None)
        for members in together.values():
            if members:
                self._step(members, inverse)
        return loss

    def _step(self, members: list[tuple[Tensor, dict[str, Any]]], inverse_scale: Tensor | None) -> None:
        """Step parameters, each with its group, that have the same learning rate."""
        params, groups = [p for p, _ in members], [group for _, group in members]
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        lars_step(
            params,
            [p.grad for p in params],  # type: ignore[misc]
            [self.state[p]["momentum"] for p in params],
            lr=groups[0]["lr"],
            weight_decay=[group["weight_decay"] for group in groups],
            momentum=groups[0]["momentum"],
            trust=groups[0]["trust"],
            excluded=[group["excluded"] for group in groups],
            l2=[group["l2"] for group in groups],
            lr_scale=[group["lr_scale"] for group in groups],
            variant=groups[0]["variant"],
            inverse_scale=inverse_scale,
            found_inf=getattr(self, "found_inf", None),
            backend=self.backend,
        )


def parameter_groups(model: nn.Module, heads: Sequence[nn.Module] = ()) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters of `model`, each once, by what the optimizer does with them.

    "kernels": adapted and decayed. "heads": kernels inside the modules `heads`, supervised classifiers, which LARS does
    not adapt and whose decay is an L2 term of the loss. "excluded": biases and all parameters of normalisation
    modules, known by the module's type; neither adapted nor decayed.
    Raises ValueError where a head is not part of the model or nothing is trainable.
    """
    members = set(model.modules())
    for head in heads:
        if head not in members:
            raise ValueError(
                f"head {type(head).__name__} is not part of {type(model).__name__}; pass a submodule of it"
            )
    inside_heads = {module for head in heads for module in head.modules()}
    groups: dict[str, list[nn.Parameter]] = {"kernels": [], "heads": [], "excluded": []}
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            if isinstance(module, NORMALISATIONS) or name == "bias":
                groups["excluded"].append(parameter)
            else:
                groups["heads" if module in inside_heads else "kernels"].append(parameter)
    if not seen:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter; set requires_grad on what is to be trained"
        )
    return groups


def build_optimizer(
    config: OptimConfig,
    model: nn.Module,
    *,
    global_batch: int,
    heads: Sequence[nn.Module] = (),
    settings: Sequence[HeadSetting] = (),
) -> torch.optim.Optimizer:
    """The configured optimizer over the trainable parameters of `model`, its learning rate at the peak.

    heads: the supervised classifiers in `model`, see `parameter_groups`. settings: of each head where they differ; the
    heads must then be all that trains. Each param group carries its "name", and with `settings` its "lr_scale".
    """
    named = [(name, params, config.weight_decay, 1.0) for name, params in parameter_groups(model, heads).items()]
    if settings:
        named = [
            (f"{name}.{i}", params, own.weight_decay, own.lr_scale)
            for i, (head, own) in enumerate(zip(heads, settings, strict=True))
            for name, params in parameter_groups(head, [head]).items()
        ]
    groups: list[dict[str, Any]] = []
    for name, params, decay, scale in named:
        kind, lr = name.partition(".")[0], config.peak_lr(global_batch)
        group = {"name": name, "params": params} | ({"lr_scale": scale} if settings else {})
        if config.name == "sgd":
            # Coupled decay is the same L2 term of the loss for kernels and heads alike.
            group |= {"lr": lr * scale, "weight_decay": 0.0 if kind == "excluded" else decay}
        else:
            group |= {"excluded": kind != "kernels", "l2": decay if kind == "heads" else 0.0}
        if params:
            groups.append(group)
    lr = config.peak_lr(global_batch)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov)
    return LARS(
        groups,
        lr=lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        trust=config.trust_coefficient,
        variant=config.lars_variant,
    )


def set_lr(optimizer: torch.optim.Optimizer, value: float | Tensor) -> None:
    """Sets the learning rate of all groups for the next step, times a group's "lr_scale" where it has one.

    A 0-dim tensor stays on its device.
    """
    scaled_here = not isinstance(optimizer, LARS)  # which scales by itself
    for group in optimizer.param_groups:
        group["lr"] = value * group["lr_scale"] if scaled_here and "lr_scale" in group else value
