"""The command line: one command a stage, one recipe for all of them."""

from __future__ import annotations

import functools
import logging
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn

from jsonargparse import ArgumentParser, Namespace

import fastsimclr
from fastsimclr import stages
from fastsimclr.cli.arguments import COMMANDS, FROM_NOTHING, TOOLS, normalise_argv, prepend_recipes
from fastsimclr.cli.arguments import CONFIGS as CONFIGS
from fastsimclr.distributed.torchrun import Launch, launched
from fastsimclr.loaders.data import LoaderName
from fastsimclr.models.foreign import is_foreign
from fastsimclr.models.resnet import Arch
from fastsimclr.recipe import Recipe, add_recipe_arguments, parse_recipe, recipe_from, recipe_keys
from fastsimclr.runs.stop import Stopped
from fastsimclr.runs.text import write_text

_CONFIG_HELP = (
    "Recipe: a file, or the name of an installed one; later options override it. Without it: the recipe of --from or"
    " --teacher, else folder.yaml where --data.root is given, else digits.yaml."
)

_TEACHER_HELP = (
    "Teacher's run; its recipe holds, but for distill.into_itself. Several: their mean. timm:NAME, torchvision:NAME: a"
    " library's network, with its own weights or those of NAME@FILE."
)


class _Parser(ArgumentParser):
    """A wrong command line is one line, too; options are written out, or --fro would pass for --from."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        command = parser.prog.replace(" [options]", "")
        message = re.sub(r"^Group '(.+?)' does not accept option '(.+)'$", r"there is no option \1.\2", message)
        message = re.sub(r"^Subcommand '.+?' does not accept option '(.+)'$", r"there is no option \1", message)
        text = f"{_one_line(message)}; see {command} --help"
        said = launched().blame(ValueError(message), text)  # of several ranks one says it
        self.exit(2, f"error: {said}\n" if said else None)


class _StageParser(_Parser):
    """--print_config prints the recipe alone, so that its output is a recipe file for any command."""

    def dump(self, namespace: Namespace, *args: Any, **kwargs: Any) -> str:
        recipe = namespace.clone()
        for key in [key for key in vars(recipe) if key not in recipe_keys()]:
            recipe.pop(key)
        return str(super().dump(recipe, *args, **kwargs))


def _command_list() -> ArgumentParser:
    """The parser of a command line that does not begin with a command: --help, --version, or an error."""
    parser = _Parser(
        prog="fastsimclr",
        description="From unlabelled images and a few labels to a compact classifier: SimCLR v1 and v2.",
    )
    parser.add_argument("--version", action="version", version=f"fastsimclr {fastsimclr.__version__}")
    commands = parser.add_subcommands(metavar="COMMAND")
    for name, summary in COMMANDS.items():
        commands.add_subcommand(name, _Parser(description=summary), help=summary)
    return parser


@functools.lru_cache
def _command_parser(command: str, study: str | None) -> ArgumentParser:
    """The parser of one command, kept for the next call of `main`; study: which one's options `study` gets.

    It stands alone: as a subcommand of another parser it would take twice the time for each of 200 options.
    """
    summary, name = COMMANDS[command], f"fastsimclr {command}"
    if command not in (*TOOLS, "study"):
        return _stage_parser(command, _StageParser(prog=name, description=summary, print_config="--print_config"))
    parser = _Parser(prog=name, description=summary)
    if command in TOOLS:
        _tool(command)[0](parser)
        return parser
    from fastsimclr.cli.studies import add_studies

    make = partial(_StageParser, print_config="--print_config")
    add_studies(parser, make, study, _CONFIG_HELP)
    return parser


def _parse(words: list[str]) -> tuple[str, Namespace]:
    """(command, its options) of a command line; ends the process after --help and after an error."""
    if not words or words[0] not in COMMANDS:
        parser = _command_list()
        if words:
            parser.parse_args(words)
        parser.error(f"give a command first, one of {', '.join(COMMANDS)}")
    command = words[0]
    parser = _command_parser(command, next(iter(words[1:]), None) if command == "study" else None)
    vars(parser).pop("print_config", None)  # jsonargparse leaves it there where an error follows --print_config
    return command, parser.instantiate(parser.parse_args(prepend_recipes(words)[1:]))


def _tool(name: str) -> tuple[Callable[[ArgumentParser], None], Callable[[Namespace], int | None]]:
    """What gives a tool's parser its options, and what runs it: modules that no other command needs."""
    if name == "bench":
        from fastsimclr.cli.bench import add_benches, run_bench

        return lambda parser: add_benches(parser, _Parser), run_bench
    if name == "plan":
        from fastsimclr.cli.planning import add_plan, run_plan

        return add_plan, run_plan
    if name in ("pack", "inspect", "index"):
        from fastsimclr.cli.packing import add_packing, run_packing

        return partial(add_packing, name), partial(run_packing, name)
    if name == "import-tf":
        from fastsimclr.stages.imported import add_import_arguments, run_import

        return add_import_arguments, run_import
    if name in ("detect", "segment"):
        from fastsimclr.cli.dense import add_dense, run_dense

        return partial(add_dense, name), partial(run_dense, name)
    from fastsimclr.cli.deploy import add_deploy, run_deploy

    return partial(add_deploy, name), partial(run_deploy, name)


def _run_tool(name: str, options: Namespace) -> int:
    if launched().ranks.world > 1:
        raise ValueError(f"fastsimclr {name} runs in one process; start it without torchrun")
    return _tool(name)[1](options) or 0


def _stage_parser(name: str, parser: ArgumentParser) -> ArgumentParser:
    """`parser` with the options of a command that has a recipe."""
    parser.add_argument("--config", action="config", help=_CONFIG_HELP)
    if name in _FROM_RUN:
        parser.add_argument("--from", type=str, required=True, help="Pretraining run; its recipe holds.")
    if name == "distill":
        parser.add_argument("--teacher", type=str, nargs="+", required=True, help=_TEACHER_HELP)
        parser.add_argument(
            "--student",
            type=Arch | Literal["same"],
            help="Architecture, short for --distill.student.arch; same: the teacher's, for --distill.into_itself true.",
        )
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
    parser.add_argument("--loader", type=LoaderName, help="How images are read, short for --data.loader.")
    parser.add_argument("--traceback", action="store_true", help="Show Python's traceback with an error.")
    add_recipe_arguments(parser)
    return parser


def _default_out(command: str, start: str | None) -> str:
    return f"runs/{command}" if start is None or command in (*FROM_NOTHING, "run", "demo") else f"{start}-{command}"


_FROM_RUN = (*(name for name, stage in stages.STAGES.items() if stage.start == "run"), "evaluate")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Errors are one line, with --traceback also Python's trace."""
    words = normalise_argv(sys.argv[1:] if argv is None else argv)
    launch = Launch()
    try:
        launch = launched()
        mine = "" if launch.ranks.is_first else f"[rank {launch.ranks.rank}] "
        level = logging.WARNING if mine else logging.INFO
        logging.basicConfig(format=f"{mine}%(message)s", stream=sys.stderr, level=level)
        launch.enter()
        command, options = _parse(words)
        run = _run_tool if command in TOOLS else _run_study if command == "study" else _run_stages
        code = run(command, options)
        launch.wait()
    except Stopped as stop:
        goes_on = words[0] in ("run", "demo", "study") or ("--resume", "auto") in pairwise(words)
        again = "" if goes_on else " with --resume auto"
        if launch.ranks.is_first:
            print(f"\n{stop}; give the same command{again} to go on", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        if launch.ranks.is_first:
            print("\ninterrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if "--traceback" in words:
            traceback.print_exc()
        kind = "" if isinstance(error, ValueError | OSError | ArithmeticError) else f"{type(error).__name__}: "
        trace = " (--traceback shows where)" if kind and "--traceback" not in words else ""
        if said := launch.blame(error, f"{kind}{_one_line(str(error))}{trace}"):
            print(f"error: {said}", file=sys.stderr)
        return 1
    finally:
        launch.leave()
    return code


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _run_study(command: str, options: Namespace) -> int:
    from fastsimclr.cli.studies import run_studies

    return run_studies(options)


def _run_stages(command: str, options: Namespace) -> int:
    first = launched().ranks.is_first
    recipe = recipe_from(options)
    teachers = options.get("teacher") or []
    start = options.get("from") or next((name for name in teachers if not is_foreign(name)), None)
    run = start and str(Path(start).parent.parent if Path(start).is_file() else Path(start))  # a file is a checkpoint
    out = Path(options.out or _default_out(command, run))
    if command in ("run", "demo"):
        runs = stages.run_seeds(recipe, out, options.seeds)
        table = stages.summary(runs)
        if first:
            write_text(out / "summary.txt", table + "\n")
            print(f"\n{table}\nresults: {out}")
        return 0
    if start is not None:
        _check_model(recipe, Path(start))
    if command == "evaluate" and start is not None:
        evaluation = stages.evaluate(recipe, Path(start), out, options.resume == "auto")
        if first:
            print("\n".join([*stages.evaluation_lines(evaluation), f"evaluation: {out / 'evaluation.json'}"]))
        return 0
    student = options.get("student")
    if student is not None:
        same = student == "same"
        arch = recipe.distill.student.arch if same else student
        shape = replace(recipe.distill.student, arch=arch)
        recipe = replace(recipe, distill=replace(recipe.distill, student=shape, into_itself=same))
    starts = teachers or ([] if start is None else [start])
    result = stages.STAGES[command].run(stages.Setting(recipe), starts, out, options.resume == "auto")
    if first:
        print("\n".join([*stages.result_lines(result), f"result: {out / 'result.json'}"]))
    return 0


def _check_model(recipe: Recipe, start: Path) -> None:
    made = asdict(parse_recipe(stages.recipe_path(start).read_text()).model)
    for key, value in asdict(recipe.model).items():
        if value != made[key]:
            raise ValueError(
                f"model.{key}={value!r} cannot change the network of {start}, made with {made[key]!r};"
                " leave the option out, or pretrain with it"
            )
