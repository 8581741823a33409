"""`fastsimclr bench`: its options, and what each of its commands does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from fastsimclr.bench.calls_table import table_of_calls
from fastsimclr.bench.compare import compare
from fastsimclr.bench.configs import (
    BenchConfig,
    CurveBench,
    LarsBench,
    LoaderBench,
    LossBench,
    MicroBench,
    NormBench,
    ViewsBench,
)
from fastsimclr.bench.curve import bench_curve, table_of_curves
from fastsimclr.bench.e2e import bench_e2e
from fastsimclr.bench.grid import GridBench, bench_grid
from fastsimclr.bench.lars import bench_lars
from fastsimclr.bench.loader import bench_loader
from fastsimclr.bench.loss import bench_loss
from fastsimclr.bench.micro import bench_micro
from fastsimclr.bench.norm import bench_norm
from fastsimclr.bench.plot import plot
from fastsimclr.bench.record import Report, write
from fastsimclr.bench.scaling import bench_scaling
from fastsimclr.bench.step import bench_step
from fastsimclr.bench.table import table
from fastsimclr.bench.training_configs import E2eBench, ScalingBench, StepBench
from fastsimclr.bench.views import bench_views

_BENCHES: dict[str, tuple[type[BenchConfig], Callable[[Any], Report]]] = {
    "loader": (LoaderBench, bench_loader),
    "step": (StepBench, bench_step),
    "e2e": (E2eBench, bench_e2e),
    "scaling": (ScalingBench, bench_scaling),
    "loss": (LossBench, bench_loss),
    "views": (ViewsBench, bench_views),
    "lars": (LarsBench, bench_lars),
    "norm": (NormBench, bench_norm),
    "curve": (CurveBench, bench_curve),
    "micro": (MicroBench, bench_micro),
    "grid": (GridBench, bench_grid),
}


def add_benches(parser: ArgumentParser, make: Callable[..., ArgumentParser]) -> None:
    """Gives the parser of `fastsimclr bench` its subcommands, each built by `make`."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    commands = parser.add_subcommands(metavar="BENCH")
    for name, (config, _) in _BENCHES.items():
        summary = str(config.__doc__)
        each = make(description=summary)
        each.add_argument("--traceback", action="store_true", help="Show Python's traceback with an error.")
        each.add_class_arguments(config, as_group=False)
        commands.add_subcommand(name, each, help=summary)
    pair = make(description="The ratio of each variant in two reports of one bench, device and settings.")
    pair.add_argument("--traceback", action="store_true", help="Show Python's traceback with an error.")
    pair.add_argument("first", type=str, help="A report written with --json.")
    pair.add_argument("second", type=str, help="Another.")
    commands.add_subcommand("compare", pair, help="The ratio of each variant in two reports.")


def run_bench(options: Namespace) -> None:
    """Run what the parsed options name and print its table."""
    name = options.subcommand
    chosen = options[name]
    if name == "compare":
        print(compare(Path(chosen.first), Path(chosen.second)))
        return
    config, bench = _BENCHES[name]
    settings = config(**{key: chosen[key] for key in config.__dataclass_fields__})
    result = bench(settings)
    tell = table_of_calls if "works" in result else table_of_curves if "curves" in result else table
    print(tell(result))
    if settings.json is not None:
        write(Path(settings.json), result)
        print(f"report: {settings.json}")
    if picture := chosen.get("plot"):
        plot(result, Path(picture))
        print(f"picture: {picture}")
