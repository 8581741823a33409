"""`fastsimclr export`, `embed` and `predict`: their options, and what each prints."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from fastsimclr.deploy.embed import EmbedConfig, embed
from fastsimclr.deploy.export import ExportConfig, export
from fastsimclr.deploy.predict import PredictConfig, predict
from fastsimclr.runs.stop import Stopped

_COMMANDS: dict[str, tuple[type[Any], Callable[[Any], dict[str, object]]]] = {
    "export": (ExportConfig, export),
    "embed": (EmbedConfig, embed),
    "predict": (PredictConfig, predict),
}
_BY_HAND = {"run", "overwrite"}  # `from` is a word of Python; a switch takes no value


def add_deploy(name: str, parser: ArgumentParser) -> None:
    """Gives the parser of command `name` its options."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser.add_argument("--from", type=str, required=True, help="Run folder of a stage that trains, or a checkpoint.")
    parser.add_class_arguments(_COMMANDS[name][0], as_group=False, skip=_BY_HAND)
    parser.add_argument("--overwrite", action="store_true", help="Replace the files where they exist.")
    parser.add_argument("--traceback", action="store_true", help="Show Python's traceback with an error.")


def run_deploy(name: str, options: Namespace) -> int:
    """Run command `name`, print what it did and return the exit code: 0, or 128 + signal with a partial file."""
    config, run = _COMMANDS[name]
    keys = [key for key in config.__dataclass_fields__ if key not in _BY_HAND]
    chosen = {key: options[key] for key in keys}
    try:
        done = run(config(run=options["from"], overwrite=options.overwrite, **chosen))
    except Stopped as stop:
        print(f"\n{stop}", file=sys.stderr)
        return stop.exit_code
    for key, value in done.items():
        print(f"{key}: {value:.4f}" if isinstance(value, float) else f"{key}: {value}")
    return 0
