"""`fastsimclr detect` and `segment`: their options, and what each prints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from fastsimclr.dense.detect import DetectConfig, detect
from fastsimclr.dense.segment import SegmentConfig, segment

_COMMANDS: dict[str, tuple[type[Any], Callable[[Any], dict[str, Any]]]] = {
    "detect": (DetectConfig, detect),
    "segment": (SegmentConfig, segment),
}


def add_dense(name: str, parser: ArgumentParser) -> None:
    """Gives the parser of command `name` its options."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser.add_argument("--from", type=str, required=True, help="Run folder of a stage that trains, or a checkpoint.")
    parser.add_class_arguments(_COMMANDS[name][0], as_group=False, skip={"run"})  # `from` is a word of Python
    parser.add_argument("--traceback", action="store_true", help="Show Python's traceback with an error.")


def run_dense(name: str, options: Namespace) -> None:
    """Run command `name` and print its metrics."""
    config, run = _COMMANDS[name]
    chosen = {key: options[key] for key in config.__dataclass_fields__ if key != "run"}
    result = run(config(run=options["from"], **chosen))
    for key, value in result["metrics"].items():
        print(f"{key}: {value:.4f}")
    print(f"result: {Path(options.out) / 'result.json'}")
