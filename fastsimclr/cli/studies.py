"""`fastsimclr study`: its options, and what it prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from fastsimclr.distributed.torchrun import launched
from fastsimclr.recipe import add_recipe_arguments, recipe_from
from fastsimclr.studies.augment import AugmentStudy
from fastsimclr.studies.base import Study
from fastsimclr.studies.batch import BatchStudy
from fastsimclr.studies.head import HeadStudy
from fastsimclr.studies.labels import LabelsStudy
from fastsimclr.studies.run import run_study
from fastsimclr.studies.size import SizeStudy
from fastsimclr.studies.transfer import TransferStudy

STUDIES: dict[str, type[Study]] = {
    study.name: study for study in (LabelsStudy, AugmentStudy, BatchStudy, HeadStudy, SizeStudy, TransferStudy)
}


def add_studies(parser: ArgumentParser, make: Callable[..., ArgumentParser], chosen: str | None, config: str) -> None:
    """Gives the parser of `fastsimclr study` its subcommands, built by `make`; options only to the chosen one.

    config: the help of --config.
    """
    commands = parser.add_subcommands(metavar="STUDY")
    for name, study in STUDIES.items():
        summary = " ".join(str(study.__doc__).split())
        each = make(description=summary)
        if name == chosen:
            each.add_argument("--config", action="config", help=config)
            if study is TransferStudy:
                each.add_argument("--from", type=str, required=True, help="Pretraining run; its recipe holds.")
            each.add_argument("--out", type=str, default=f"runs/study-{name}", help="Folder of the study.")
            each.add_argument("--traceback", action="store_true", help="Show Python's traceback with an error.")
            add_recipe_arguments(each)
            each.add_class_arguments(study, as_group=False, skip={"start"})
        commands.add_subcommand(name, each, help=summary)


def run_studies(options: Namespace) -> int:
    """Run the chosen study, print its table, and return the exit code: 1 where a training failed."""
    chosen = options[options.subcommand]
    kind = STUDIES[options.subcommand]
    settings: dict[str, Any] = {f.name: chosen[f.name] for f in fields(kind) if f.name != "start"}
    if kind is TransferStudy:
        settings["start"] = chosen["from"]
    out, ranks = Path(chosen.out), launched().ranks
    text, outcomes = run_study(kind(**settings), recipe_from(chosen), out, world=ranks.world, is_first=ranks.is_first)
    if ranks.is_first:
        print(f"\n{text}\n")
        for name, reason in outcomes.failed.items():
            print(f"failed: {name}: {reason}")
        if (out / "study.json").is_file():
            print(f"files: {out}/table.md, rows.csv, plot.png, study.json")
    return 1 if outcomes.failed else 0
