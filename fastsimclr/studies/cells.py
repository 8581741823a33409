"""The cells of a study: what is to be measured, and what was."""

from __future__ import annotations

from dataclasses import dataclass

from fastsimclr.studies.jobs import StudyJob

Value = float | int | str | bool


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """One accuracy: where in the study it stands, by which method, with which seed."""

    point: dict[str, Value]
    method: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Cell(Accuracy):
    """An accuracy to be measured, and the job that does it."""

    job: StudyJob


@dataclass(frozen=True, kw_only=True)
class Row(Accuracy):
    """One measured cell. top1 in [0, 1]; seconds: of this stage's steps; whole_seconds: with all it started from."""

    run: str
    top1: float
    top5: float | None
    labels: int
    parameters: int
    seconds: float
    whole_seconds: float
