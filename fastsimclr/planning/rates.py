"""Seconds of a step from its work: t = a·flops + b·bytes + c·ops, fitted to measured steps, no rate below 0.

The fit minimises the squares of the relative errors, so that a short step counts as much as a long one.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastsimclr.models import ModelConfig
from fastsimclr.planning.work import Counted, Work, count

LARS_BYTES = 28  # a parameter: the norms read weight and gradient, the update both and the momentum, and writes two
EMA_BYTES = 12  # a parameter: both networks' are read, the momentum encoder's written
TERMS = 3


@dataclass(frozen=True, kw_only=True)
class Rates:
    """s_per_flop, s_per_byte, s_per_op: a, b and c. origin: where they come from, in words."""

    s_per_flop: float
    s_per_byte: float
    s_per_op: float
    origin: str

    def seconds(self, work: Work) -> float:
        """Predicted."""
        return self.s_per_flop * work.flops + self.s_per_byte * work.bytes + self.s_per_op * work.ops

    def times(self, factor: float, origin: str) -> Rates:
        """All three `factor` times."""
        return Rates(
            s_per_flop=factor * self.s_per_flop,
            s_per_byte=factor * self.s_per_byte,
            s_per_op=factor * self.s_per_op,
            origin=origin,
        )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One configuration of a report of `bench step` or `bench grid`: median seconds of our step, one device.

    On a CPU of one thread, where the report has it, processor time: others may have used the machine, too.
    mode: eager, compile or graph. held_out: whether a fit must leave it out.
    """

    model: ModelConfig
    size: int
    batch: int
    precision: str
    seconds: float
    device: str
    kind: str
    mode: str
    held_out: bool

    @property
    def name(self) -> str:
        """In words, without the device."""
        return f"{self.model.arch} x{self.model.width:g}, {self.size} px, batch {self.batch}"

    def work(self) -> Work:
        """Of one step, two views an image."""
        counted = count(self.model, size=self.size, views=2 * self.batch, precision=self.precision, stem_size=self.size)
        return step_work(counted, self.batch, self.batch)


def step_work(counted: Counted, images: int, all_images: int) -> Work:
    """A contrastive step of a rank's `images` of `all_images`: network, NT-Xent on local rows, LARS."""
    return counted.forward + counted.backward + loss_work(images, all_images, counted.dim) + lars_work(counted)


def loss_work(images: int, all_images: int, dim: int, memory: int = 0) -> Work:
    """NT-Xent of 2·images rows against 2·all_images columns and a memory of more: products of 2 and 4 mMD operations,
    forward and back."""
    return Work(flops=6.0 * (2 * images) * (2 * all_images + memory) * dim, ops=4)


def lars_work(counted: Counted) -> Work:
    """An update of every parameter, in two launches."""
    return Work(bytes=float(LARS_BYTES * counted.parameters), ops=2)


def momentum_work(counted: Counted) -> Work:
    """The momentum encoder's step towards the network, in one launch."""
    return Work(bytes=float(EMA_BYTES * counted.parameters), ops=1)


def fit(works: Sequence[Work], seconds: Sequence[float], origin: str) -> Rates:
    """The rates that fit the measured seconds best. ValueError for fewer configurations than terms."""
    if len(works) < TERMS or len(works) != len(seconds):
        raise ValueError(
            f"{len(works)} configurations and {len(seconds)} times cannot give {TERMS} rates; measure more"
        )
    features = np.array([[work.flops, work.bytes, work.ops] for work in works])
    a, b, c = nonnegative(features / np.array(seconds)[:, None], np.ones(len(works)))
    return Rates(s_per_flop=a, s_per_byte=b, s_per_op=c, origin=origin)


def nonnegative(features_NK: np.ndarray, targets_N: np.ndarray) -> list[float]:
    """The coefficients of least squared error among those not below 0, by trying every set of features."""
    scale_K = np.linalg.norm(features_NK, axis=0)
    scale_K = np.where(scale_K > 0, scale_K, 1.0)
    best, least = np.zeros(features_NK.shape[1]), float(targets_N @ targets_N)
    for many in range(1, features_NK.shape[1] + 1):
        for chosen in map(list, itertools.combinations(range(features_NK.shape[1]), many)):
            found, *_ = np.linalg.lstsq((features_NK / scale_K)[:, chosen], targets_N, rcond=None)
            error = float(np.square((features_NK / scale_K)[:, chosen] @ found - targets_N).sum())
            if (found >= 0).all() and error < least:
                best, least = np.zeros(features_NK.shape[1]), error
                best[chosen] = found
    return [float(value) for value in best / scale_K]


def read_reports(paths: Sequence[str]) -> list[Measured]:
    """Our rows of the reports that `bench step` and `bench grid` wrote with --json. ValueError for any other file."""
    return [row for path in paths for row in _read(Path(path))]


def _read(path: Path) -> list[Measured]:
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        bench, kind = report["bench"], report["kind"]
        if bench not in ("step", "grid"):
            raise ValueError(f"--measured {path} is a report of bench {bench}; give one of bench step or bench grid")
        device, threads = str(report["environment"]["device"]), report["environment"]["threads"]
        config = report["config"]
        if (stage := config.get("stage", "pretrain")) != "pretrain":
            raise ValueError(f"--measured {path} is of stage {stage}; the plan is made from steps of pretrain")
        ours = [row for row in report["rows"] if row["ours"] and row.get("rival", True)]
        alone = kind == "cpu" and threads == 1
        rows = [_measured(row, config, device, kind, alone) for row in ours]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"--measured {path} cannot be read as a report ({type(error).__name__}: {error});"
            " give what bench step or bench grid wrote with --json"
        ) from error
    return rows


def _measured(row: dict[str, Any], config: dict[str, Any], device: str, kind: str, alone: bool) -> Measured:
    facts = row["facts"]
    cpu_ms = facts.get("cpu_ms", [])[1:] if alone else []
    where = facts if "arch" in facts else config
    return Measured(
        model=ModelConfig(arch=where["arch"], width=where.get("width", 1.0), head_layers=2),  # as the benches train
        size=where["size"],
        batch=where["batch"],
        precision=facts["precision"],
        seconds=(statistics.median(cpu_ms) if cpu_ms else row["step_ms"]["p50"]) / 1e3,
        device=device,
        kind=kind,
        mode=str(facts.get("mode", "eager")),
        held_out=bool(facts.get("held_out", False)),
    )


def rates_of(measurements: Sequence[Measured], prior: Rates | None) -> Rates:
    """Rates from measurements of one device and precision: all three terms, or the prior's times one factor.

    Three terms need four configurations. Fewer scale the prior by the geometric mean of measured over predicted.
    ValueError without a prior in that case, or for several devices.
    """
    devices = {(one.device, one.precision) for one in measurements}
    if len(devices) != 1:
        raise ValueError(f"reports of {len(devices)} devices and precisions ({sorted(devices)}); give those of one")
    ((device, precision),) = devices
    configurations = {(one.model, one.size, one.batch) for one in measurements}
    works, seconds = [one.work() for one in measurements], [one.seconds for one in measurements]
    if len(configurations) > TERMS:
        return fit(works, seconds, f"fitted on {len(measurements)} configurations measured on {device}, {precision}")
    if prior is None:
        raise ValueError(
            f"{len(configurations)} configurations measured are too few for a fit;"
            f" measure {TERMS + 1} or more by bench grid"
        )
    ratios = [t / prior.seconds(work) for work, t in zip(works, seconds, strict=True)]
    factor = float(np.exp(np.mean(np.log(ratios))))
    return replace(
        prior.times(factor, ""),
        origin=f"{prior.origin}, times {factor:.3f} by {len(measurements)} steps measured on {device}, {precision}",
    )
