"""Studies: many trainings that differ in one thing, as a table and a picture with the spread over seeds."""

from fastsimclr.studies.base import Study
from fastsimclr.studies.cells import Cell
from fastsimclr.studies.jobs import StudyJob
from fastsimclr.studies.run import run_study

__all__ = ["Cell", "Study", "StudyJob", "run_study"]
