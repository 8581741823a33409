"""`fastsimclr plan`: predicted speed, hours and memory of a recipe on GPUs that are not here, with what was assumed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from fastsimclr.loaders.shards.cache import GIB
from fastsimclr.planning.check import check
from fastsimclr.planning.estimate import StepPlan, at_once, counted_for, memory, shares_of
from fastsimclr.planning.hardware import GpuName, PlanOptions
from fastsimclr.planning.published import prior_of
from fastsimclr.planning.rates import Rates, rates_of, read_reports
from fastsimclr.planning.schedule import Images, Span, images_of, pretraining, spans
from fastsimclr.recipe import Recipe, add_recipe_arguments, check_sections, recipe_from
from fastsimclr.runs.text import aligned

_NOTES = (
    "not in it: probes, checkpoints, decoding before the first step, L-BFGS, starts and ends of stages",
    "not counted: making the views (read once, written once: under 1 % of the network's bytes at 224 px)",
    "compile, cuda_graph, channels_last and bucket_mb change no prior: nothing published here says by how much",
)


def add_plan(parser: ArgumentParser) -> None:
    """Gives the parser of `fastsimclr plan` its options."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    what = "check: predictions beside measurements that the fit left out (--measured), and beside published speeds."
    parser.add_argument("what", type=str, nargs="?", choices=["check"], help=what)
    parser.add_argument("--config", action="config", help="Recipe: a file, or the name of an installed one.")
    parser.add_argument(
        "--measured",
        type=str,
        nargs="+",
        default=[],
        help="Reports of bench step or bench grid on such a GPU (--json): four or more configurations give the rates,"
        " fewer scale the prior. Default: the prior alone.",
    )
    parser.add_argument("--traceback", action="store_true", help="Show Python's traceback with an error.")
    parser.add_class_arguments(PlanOptions, as_group=False)
    add_recipe_arguments(parser)


def run_plan(options: Namespace) -> int:
    """Print the plan, or with "check" the residuals; returns 1 where those of our own measurements are too large."""
    measured = read_reports(options.measured)
    if options.what == "check":
        text, good = check(measured)
        print(text)
        return 0 if good else 1
    if not options.config:
        raise ValueError("plan needs --config; name a recipe, as in --config v1-paper")
    for given in options.config:
        check_sections(Path(str(given)).read_text(), f"recipe {given}")
    chosen = PlanOptions(**{key: options[key] for key in PlanOptions.__dataclass_fields__})
    recipe = recipe_from(options)
    precision = precision_of(recipe, chosen)
    rates = prior_of(chosen)
    if measured:
        for one in measured:
            if one.kind != "cuda" or chosen.gpu.lower().removeprefix("rtx") not in one.device.lower():
                raise ValueError(
                    f"--measured: {one.device} is no {chosen.gpu}, and says nothing of one; give a report of one, or"
                    f" --gpu {'|'.join(get_args(GpuName))} as it was measured"
                )
        mode = "graph" if recipe.trainer.cuda_graph else "compile" if recipe.trainer.compile else "eager"
        alike = [one for one in measured if (one.precision, one.mode) == (precision, mode)]
        if not alike:
            raise ValueError(
                f"--measured: no row of ours in {precision}, {mode}, as the recipe's trainer has it; measure that"
            )
        rates = rates_of(alike, rates)
    print(plan(recipe, chosen, rates, precision))
    return 0


def precision_of(recipe: Recipe, options: PlanOptions) -> str:
    """That of a GPU. ValueError for fp32 and fp64 without their peak: data sheets here are those of halves."""
    precision = recipe.trainer.precision
    if precision == "auto":
        return "bf16"
    if precision in ("fp32", "fp64") and options.peak_tflops is None:
        raise ValueError(
            f"trainer.precision={precision}: the rates known here are those of bf16 and fp16;"
            " give --peak_tflops for it, or leave the precision out"
        )
    return precision


def plan(recipe: Recipe, options: PlanOptions, rates: Rates, precision: str) -> str:
    """The plan as text."""
    cluster, images = options.cluster, images_of(recipe, options)
    loader_images_s = options.loader_cores * options.core_images_s
    found = spans(recipe, images, cluster, rates, precision, loader_images_s)
    size = max([span.size for span in found if span.stage == "pretrain"])
    step = pretraining(recipe, precision, size)
    return "\n".join(
        [
            f"plan for {options.gpus} {options.gpu}, {options.gpus_per_node} a machine: predicted, not measured",
            "",
            *_stages(found),
            "",
            *_parts(found),
            "",
            *_memory(step, recipe, options),
            "",
            "counted",
            *_counted(step, recipe, options),
            "",
            "assumed; each with its key, where it has one",
            *_assumed(rates, recipe, options, images, loader_images_s),
            *(f"  {note}" for note in _NOTES),
        ]
    )


def _stages(stage_spans: Sequence[Span]) -> list[str]:
    rows = [("stage", "px", "images a step", "steps", "step ms", "images/s", "views/s", "hours", "bound")]
    for span in stage_spans:
        rate = span.time.images / span.time.seconds
        views = rate * (2 if span.stage == "pretrain" else 1)
        rows.append(
            (
                span.stage,
                str(span.size),
                f"{span.time.images:,}",
                f"{span.steps:,}",
                f"{1e3 * span.time.seconds:,.1f}",
                f"{rate:,.0f}",
                f"{views:,.0f}",
                f"{span.hours:,.3g}",
                span.time.bound,
            )
        )
    total = sum(span.hours for span in stage_spans)
    rows.append(("all of them", "", "", "", "", "", "", f"{total:,.3g}", ""))
    return aligned(rows)


def _parts(stage_spans: Sequence[Span]) -> list[str]:
    rows: list[tuple[str, ...]] = [("ms of a pretraining step", "compute", "all-reduce", "BN", "gather", "input")]
    for span in stage_spans:
        if span.stage == "pretrain":
            time = span.time
            parts = (time.compute_s, time.all_reduce_s, time.norm_s, time.gather_s, time.input_s)
            rows.append((f"  {span.size} px", *(f"{1e3 * part:,.2f}" for part in parts)))
    overlapped = next(span.time.overlapped for span in stage_spans if span.stage == "pretrain")
    how = "max(compute, all-reduce)" if overlapped else "compute + all-reduce"
    return [*aligned(rows), f"  step = max({how} + BN + gather, input)"]


def _memory(step: StepPlan, recipe: Recipe, options: PlanOptions) -> list[str]:
    cluster = options.cluster
    held = memory(step, recipe.trainer, cluster, options.workspace_gib)
    rows = [("memory of a GPU in pretraining", "GiB")]
    rows += [(f"  {key.replace('_', ' ')}", f"{getattr(held, key) / GIB:,.2f}") for key in held.__dataclass_fields__]
    rows.append(("  all of it", f"{held.total / GIB:,.2f}"))
    there = cluster.device.memory_gib
    fits = held.total / GIB <= there
    remedy = "" if fits else "; use more GPUs, trainer.micro_batch or trainer.checkpoint_activations"
    return [*aligned(rows), f"  {'fits' if fits else 'DOES NOT FIT'} in {there:g} GiB{remedy}"]


def _counted(step: StepPlan, recipe: Recipe, options: PlanOptions) -> list[str]:
    micro, passes = at_once(step, recipe.trainer, options.cluster)
    counted = counted_for(step, micro)
    views = 2 * micro
    both = counted.forward + counted.backward
    trained = both.flops / views
    return [
        f"  {counted.parameters / 1e6:,.2f} M parameters, {counted.norms} BN layers of {counted.channels:,} channels,"
        f" shared by {shares_of(recipe.trainer, options.cluster)} GPUs",
        f"  {counted.forward.flops / views / 2e9:,.3f} GMAC a view forward, {trained / 1e9:,.2f} GFLOP trained (forward"
        f" and backward, 2 a multiply-add), {both.bytes / views / 1e6:,.0f} MB read and written op by op",
        f"  {both.ops:,.0f} operations a pass, {passes} {'pass' if passes == 1 else 'passes'} of {views:,} views a GPU",
    ]


def _assumed(rates: Rates, recipe: Recipe, options: PlanOptions, images: Images, loader_images_s: float) -> list[str]:
    cluster = options.cluster
    device = cluster.device
    reading = (
        "the set lies decoded in memory, input is never waited for"
        if images.held
        else f"{loader_images_s:,.0f} images/s a machine: {options.loader_cores} cores (loader_cores) of"
        f" {options.core_images_s:g} (core_images_s)"
    )
    world = cluster.bytes_per_s(options.gpus) / 1e9
    lines = [
        f"compute: {rates.origin} (measured, mfu)",
        f"  {rates.s_per_flop * 1e15:.3f} ms a TFLOP + {rates.s_per_byte * 1e12:.3f} ms a GB +"
        f" {rates.s_per_op * 1e6:.2f} us an operation",
        f"{options.gpu}: {device.peak_tflops:g} TFLOP/s (peak_tflops), {device.memory_tb_s:g} TB/s (memory_tb_s),"
        f" {device.memory_gib:g} GiB (memory_gib)",
        f"links {device.link_gb_s:g} GB/s a GPU within a machine (link_gb_s), {device.network_gb_s:g} between"
        f" (network_gb_s), of which {options.ring_efficiency:.0%} (ring_efficiency): {world:,.0f} GB/s a rank here",
        f"{options.collective_us:g} us a collective that is waited for (collective_us)",
        f"input: {reading}",
        f"{images.unlabelled:,} training images (images), {images.labelled:,} labelled (labelled), {images.few:,} in"
        " the few-label stages (few)",
        f"{options.workspace_gib:g} GiB of context, workspaces and what the allocator cannot use (workspace_gib)",
        "gradient buckets, weights and momentum float32; the backward pass holds gradients of two largest maps",
    ]
    return [f"  {line}" for line in lines]
