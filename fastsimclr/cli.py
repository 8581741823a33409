"""The command line: one command a stage, one recipe for all of them."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

import fastsimclr
from fastsimclr import stages
from fastsimclr.recipe import Recipe, add_recipe_arguments, recipe_from, recipe_keys
from fastsimclr.stopping import Stopped

CONFIGS = Path(__file__).resolve().parent / "configs"

_COMMANDS = {
    "pretrain": "Contrastive pretraining on all images.",
    "linear": "Linear evaluation of a pretrained network.",
    "knn": "Nearest-neighbour evaluation of a pretrained network.",
    "finetune": "Fine-tune a pretrained network on the labels.",
    "supervised": "The baseline: the same network from scratch on the same labels.",
    "distill": "Distill a fine-tuned network into a student.",
    "run": "All of them in a row; the same command again goes on where it stopped.",
    "demo": "The whole chain on embedded images, in a few minutes on a CPU.",
}


class _StageParser(ArgumentParser):
    """--print_config prints the recipe alone, so that its output is a recipe file for any command."""

    def dump(self, namespace: Namespace, *args: Any, **kwargs: Any) -> str:
        recipe = namespace.clone()
        for key in [key for key in vars(recipe) if key not in recipe_keys()]:
            recipe.pop(key)
        return str(super().dump(recipe, *args, **kwargs))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="fastsimclr",
        description="From unlabelled images and a few labels to a compact classifier: SimCLR v1 and v2.",
    )
    parser.add_argument("--version", action="version", version=f"fastsimclr {fastsimclr.__version__}")
    commands = parser.add_subcommands(metavar="COMMAND")
    for name, summary in _COMMANDS.items():
        commands.add_subcommand(name, _stage_parser(name, summary), help=summary)
    return parser


def _stage_parser(name: str, summary: str) -> ArgumentParser:
    parser = _StageParser(description=summary, print_config="--print_config")
    parser.add_argument("--config", action="config", help="Recipe file; later options override it.")
    if name in ("linear", "knn", "finetune"):
        parser.add_argument("--from", dest="start", type=str, required=True, help="Pretraining run; its recipe holds.")
    if name == "distill":
        parser.add_argument("--teacher", dest="start", type=str, required=True, help="Teacher's run; its recipe holds.")
        parser.add_argument("--student", type=str, help="Architecture, short for --distill.student.arch.")
    parser.add_argument("--out", type=str, help=f"Run folder. Default: {_default_out(name, 'RUN')}.")
    if name in ("run", "demo"):
        parser.add_argument("--seeds", type=int, default=1, help="Repeat with as many seeds; report mean and spread.")
    else:
        parser.add_argument(
            "--resume",
            type=str,
            choices=["never", "auto"],
            default="never",
            help="auto: go on from the newest checkpoint of the run folder, if there is one.",
        )
    parser.add_argument("--traceback", action="store_true", help="Show Python's traceback with an error.")
    add_recipe_arguments(parser)
    return parser


def _default_out(command: str, start: str | None) -> str:
    return f"runs/{command}" if start is None or command not in _CHAINED else f"{start}-{command}"


_CHAINED = ("linear", "knn", "finetune", "distill")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Errors are one line, with --traceback also Python's trace."""
    words = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.INFO)
    try:
        parser = _parser()
        parsed = parser.parse_args(_with_recipes(words))
        _execute(parsed.subcommand, parser.instantiate(parsed)[parsed.subcommand])
    except Stopped as stop:
        print(f"\n{stop}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if "--traceback" in words:
            traceback.print_exc()
        kind = "" if isinstance(error, ValueError | OSError | ArithmeticError) else f"{type(error).__name__}: "
        print(f"error: {kind}{error}", file=sys.stderr)
        return 1
    return 0


def _with_recipes(words: list[str]) -> list[str]:
    """Recipes by name looked up in configs/; the recipe of the run to start from, or the demo's, put first."""
    words = [_known(word) if i and words[i - 1] == "--config" else word for i, word in enumerate(words)]
    if not words or words[0] not in _COMMANDS or "--help" in words or "-h" in words:
        return words
    first: list[str] = ["--config", str(CONFIGS / "digits.yaml")] if words[0] == "demo" else []
    flags = ("--from", "--teacher")
    for i, word in enumerate(words):
        run = words[i + 1] if word in flags and i + 1 < len(words) else word.partition("=")[2]
        if word.partition("=")[0] in flags and run:
            first = ["--config", str(stages.recipe_path(Path(run)))]
    return [words[0], *first, *words[1:]]


def _known(name: str) -> str:
    path = Path(name)
    if path.exists():
        return name
    packaged = CONFIGS / path.name
    if packaged.is_file() and path.parent in (Path(), Path("configs")):
        return str(packaged)
    known = ", ".join(path.name for path in sorted(CONFIGS.glob("*.yaml")))
    raise FileNotFoundError(f"--config {name} does not exist; give a file, or one of {known}")


def _execute(command: str, options: Namespace) -> None:
    recipe = recipe_from(options)
    start = options.get("start")
    out = Path(options.out or _default_out(command, start and start.rstrip("/")))
    if command in ("run", "demo"):
        runs = stages.run_seeds(recipe, out, options.seeds)
        print(f"\n{stages.summary(runs)}\nresults: {out}")
        return
    student = options.get("student")
    if student is not None:
        recipe = replace(recipe, distill=replace(recipe.distill, student=replace(recipe.distill.student, arch=student)))
    result = _stage(command, recipe, start and Path(start), out, options.resume == "auto")
    for key, value in result["metrics"].items():
        print(f"{key}: {value:.4f}")
    print(f"result: {out / 'result.json'}")


def _stage(command: str, recipe: Recipe, start: Path | None, out: Path, resume: bool) -> dict[str, Any]:
    setting = stages.Setting(recipe)
    match command:
        case "pretrain":
            return stages.pretrain(setting, out, resume)
        case "supervised":
            return stages.supervised(setting, out, resume)
    assert start is not None  # a required option of the other commands
    stage = {
        "linear": stages.evaluate_linear,
        "knn": stages.evaluate_knn,
        "finetune": stages.finetune,
        "distill": stages.distill,
    }[command]
    return stage(setting, start, out, resume)
