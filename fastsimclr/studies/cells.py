"""The cells of a study: what is to be measured, and what was."""

from __future__ import annotations

from dataclasses import dataclass

from fastsimclr.studies.jobs import StudyJob

Value = float | int | str | bool


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One accuracy: where in the study it stands, by which method, with which seed, and the job that measures it."""

    point: dict[str, Value]
    method: str
    seed: int
    job: StudyJob


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured cell. top1 in [0, 1]; seconds: of this stage's steps; whole_seconds: with all it started from."""

    point: dict[str, Value]
    method: str
    seed: int
    run: str
    top1: float
    top5: float | None
    labels: int
    parameters: int
    seconds: float
    whole_seconds: float
