"""The settings of the evaluations, each a section of the recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from fastsimclr.methods.config import Labels, check_positive
from fastsimclr.optim import OptimConfig


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """Linear evaluation: a classifier on the frozen encoder."""

    method: Literal["lbfgs", "sgd"] = "lbfgs"
    """lbfgs: logistic regression to convergence on features of the plain images, computed once. sgd: the published
    protocol, minibatches with crop and flip."""
    labels: Labels = "subset"
    """Train on the few labels (subset; all if data names no subset) or on all training labels."""
    l2: float = 1e-3
    """lbfgs: weight of the squared L2 norm of the classifier's kernel, on features of length sqrt(C)."""
    epochs: int = 90
    """sgd: passes over the labelled images."""
    batch: int | None = None
    """sgd: images a step; null: 256, or all labelled images where fewer."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(name="sgd", lr=0.1, nesterov=True, weight_decay=0.0, warmup_epochs=0)
    )
    """sgd: optimizer and schedule. 0.1·B/256 with Nesterov momentum (google-research/simclr)."""
    sweep_l2: tuple[float, ...] = ()
    """lbfgs: try these instead of l2. The best on held-out training labels is fitted again on all of them."""
    sweep_lr: tuple[float, ...] = ()
    """sgd: train one classifier with each of these instead of optim.lr, side by side on the same features, and keep the
    best on held-out training labels."""
    sweep_weight_decay: tuple[float, ...] = ()
    """sgd: likewise instead of optim.weight_decay; with sweep_lr, every pair."""
    sweep_holdout: float = 0.1
    """Share of each class's training labels that a sweep chooses on, at least one image, at most 10,000 in all."""

    def __post_init__(self) -> None:
        check_positive("linear", self, "epochs", "batch", "l2")
        for key, method in (("sweep_l2", "lbfgs"), ("sweep_lr", "sgd"), ("sweep_weight_decay", "sgd")):
            values = getattr(self, key)
            if values and method != self.method:
                raise ValueError(
                    f"linear.{key}={list(values)} is for linear.method={method}, not {self.method}; leave it out"
                )
            lowest = 0.0 if key == "sweep_weight_decay" else math.ulp(0.0)
            if not all(lowest <= value < math.inf for value in values):
                rule = "at least 0" if lowest == 0 else "greater than 0"
                raise ValueError(f"linear.{key}={list(values)}: each must be {rule} and finite")
            if len(set(values)) < len(values):
                raise ValueError(f"linear.{key}={list(values)} has a value twice; give each once")
        if not 0 < self.sweep_holdout < 1:
            raise ValueError(f"linear.sweep_holdout={self.sweep_holdout} must be between 0 and 1")

    @property
    def swept(self) -> tuple[tuple[float, float], ...]:
        """sgd: the (learning rate, weight decay) of each classifier of the sweep; () without one."""
        if not (self.sweep_lr or self.sweep_weight_decay):
            return ()
        rates, decays = self.sweep_lr or (self.optim.lr,), self.sweep_weight_decay or (self.optim.weight_decay,)
        return tuple((lr, decay) for lr in rates for decay in decays)


@dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """Weighted k-nearest-neighbour evaluation on cosine similarity. Wu et al. 2018, Sec. 3.4."""

    k: int | tuple[int, ...] = 200
    """Neighbours; all labelled images where fewer. Of several, each with each temperature, the first gives top1."""
    temperature: float | tuple[float, ...] = 0.1
    """A neighbour's vote weighs exp(similarity / temperature). One or several, as k."""
    labels: Labels = "all"
    """Which training labels vote."""
    baselines: bool = True
    """Also measure raw pixels and the untrained network with calibrated BN statistics."""

    def __post_init__(self) -> None:
        for key, values in (("k", self.ks), ("temperature", self.temperatures)):
            if not values or not all(0 < value < math.inf for value in values):
                raise ValueError(f"knn.{key}={getattr(self, key)} must be greater than 0 and finite, one or several")

    @property
    def ks(self) -> tuple[int, ...]:
        """k as a tuple."""
        return self.k if isinstance(self.k, tuple) else (self.k,)

    @property
    def temperatures(self) -> tuple[float, ...]:
        """temperature as a tuple."""
        return self.temperature if isinstance(self.temperature, tuple) else (self.temperature,)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Which protocols `fastsimclr evaluate` runs on a pretraining, with the settings of knn, linear and finetune."""

    protocols: tuple[Literal["knn", "logistic", "linear", "finetune"], ...] = ("knn", "logistic", "linear", "finetune")
    """knn; logistic: linear by lbfgs; linear: by sgd, the published one; each on all labels. finetune: on fractions."""
    fractions: tuple[float, ...] = (0.01, 0.1)
    """Shares of the training labels to fine-tune on; add 1 for all of them. A share that leaves a class without a label
    is left out. All labels are fine-tuned on from head layer 0, fewer from finetune.head_layer (SimCLRv2, Sec. 3.1)."""
    lists: tuple[str | None, ...] = ()
    """For each of the fractions the file that lists its images, as data.label_list, or null to draw them; empty: draw
    all. Google's are 1percent.txt and 10percent.txt."""
    epochs: tuple[int, ...] = ()
    """Epochs of fine-tuning for each of the fractions. Empty: 60 below 10 %, 30 from there on (SimCLRv2, Sec. 3.1)."""

    def __post_init__(self) -> None:
        if not all(0 < fraction <= 1 for fraction in self.fractions):
            raise ValueError(f"evaluate.fractions={list(self.fractions)}: each must be above 0 and up to 1")
        for key in ("protocols", "fractions"):
            if len(set(values := getattr(self, key))) < len(values):
                raise ValueError(f"evaluate.{key}={list(values)} has a value twice; give each once")
        for key in ("lists", "epochs"):
            if (values := getattr(self, key)) and len(values) != len(self.fractions):
                raise ValueError(
                    f"evaluate.{key}={list(values)} must have one for each of evaluate.fractions={list(self.fractions)}"
                )
        if not all(epochs >= 1 for epochs in self.epochs):
            raise ValueError(f"evaluate.epochs={list(self.epochs)}: each must be 1 or more")
