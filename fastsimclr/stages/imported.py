"""`fastsimclr import-tf`: a checkpoint of google-research/simclr becomes run folders that every other command takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from jsonargparse import ArgumentParser, Namespace
from torch import nn

from fastsimclr.loaders import Policy
from fastsimclr.methods.config import FinetuneConfig, PretrainConfig
from fastsimclr.models import ModelConfig, count_parameters
from fastsimclr.models.google import GoogleNet, Weights, read_google
from fastsimclr.recipe import Recipe, dump_recipe
from fastsimclr.runs import checkpoint
from fastsimclr.runs.text import write_text
from fastsimclr.stages.networks import digest, network_facts

CLASSIFIER = "classifier"  # the folder of the classifier's run, within that of the import


def import_tf(source: Path, out: Path, weights: Weights = "auto", head_layer: int | None = None) -> dict[str, Any]:
    """Write encoder and projection head of a TensorFlow checkpoint as the pretraining run `out`; returns its result.

    A classifier becomes the fine-tuning run out/classifier, its classes named "0", "1", …, if head_layer says on which
    layer of the projection head it sits, or if only one layer is as wide as its input. The recipe has Google's views:
    TensorFlow's semantics, images in [0, 1], 224 px, or 32 under a CIFAR stem. source, weights: see read_google.
    Raises ValueError for a checkpoint that cannot be read or does not fit, before anything is written, and
    FileExistsError where `out` holds a run.
    """
    for run in (out, out / CLASSIFIER):
        if checkpoint.saved(run) or (run / "recipe.yaml").exists():
            raise FileExistsError(f"{run} already holds a run; give another --out")
    found = read_google(source, weights)
    layers = found.classifier_layers
    if head_layer is None and len(layers) == 1:
        head_layer = layers[0]
    network = found.simclr()
    classifier = None if head_layer is None else found.classifier_net(head_layer)
    recipe = _recipe(found.config)
    record = {
        "source": str(found.prefix),
        "step": found.step,
        "weights": "ema" if found.averaged else "raw",
        "averages": "none" if not found.doubles else "taken" if found.averaged else "left out",
        "variables": len(found.state) - _counters(found) + len(found.classifier),
        "optimizer_variables_left_out": found.slots,
        "model": network_facts(found.config, recipe.views.size)["model"],
        "digest": digest(network),
        "classifier": None,
    }
    if found.classifier:
        record["classifier"] = {
            "classes": len(found.classifier["bias"]),
            "features": found.classifier["weight"].shape[1],
            "head_layer": head_layer,
            "head_layers_of_that_width": layers,
            "run": None if classifier is None else str(out / CLASSIFIER),
        }
    result = _write(out, "pretrain", recipe, found, network, network_facts(found.config, recipe.views.size), record)
    if classifier is not None and head_layer is not None:
        names = tuple(str(index) for index in range(len(found.classifier["bias"])))
        facts = network_facts(found.config, recipe.views.size, names, head_layer)
        tuned = replace(recipe, finetune=FinetuneConfig(head_layer=head_layer))
        _write(out / CLASSIFIER, "finetune", tuned, found, classifier, facts, record)
    return result


def add_import_arguments(parser: ArgumentParser) -> None:
    """The options of `fastsimclr import-tf`."""
    parser.add_argument("checkpoint", type=str, help="PREFIX of PREFIX.index and PREFIX.data-…, or its folder.")
    parser.add_argument("--out", type=str, default="runs/import-tf", help="Run folder. Default: runs/import-tf.")
    parser.add_argument(
        "--weights",
        type=str,
        choices=list(get_args(Weights)),
        default="auto",
        help="Where the checkpoint has moving averages beside the weights: ema takes them, raw leaves them; auto: ema.",
    )
    parser.add_argument(
        "--head-layer",
        type=int,
        default=None,
        help="Head layer on which the checkpoint's classifier sits (ft_proj_selector): 0 is the encoder's output.",
    )
    parser.add_argument("--traceback", action="store_true", help="Show Python's traceback with an error.")


def run_import(options: Namespace) -> None:
    """Import what the parsed options name, and say what came of it."""
    out = Path(options.out)
    found = import_tf(Path(options.checkpoint), out, options.weights, options.head_layer)["imported"]
    model = found["model"]
    kind = f"{model['arch']}, width {model['width']:g}{', selective kernels' if model['selective_kernels'] else ''}"
    print(f"{found['source']}: {kind}, {model['stem']} stem, {model['head_layers']} head layers, step {found['step']}")
    averages = {"none": "the checkpoint has no moving averages", "taken": "the moving averages of the checkpoint"}
    print(f"weights: {found['weights']} ({averages.get(found['averages'], 'its moving averages are left out')})")
    print(f"variables: {found['variables']}; of the optimizer, left out: {found['optimizer_variables_left_out']}")
    if (classifier := found["classifier"]) is not None:
        text = f"classifier: {classifier['classes']} classes on {classifier['features']} features"
        if classifier["run"] is None:
            fits = classifier["head_layers_of_that_width"]
            text += (
                f"; not imported: head layers {fits} are so wide, give --head-layer with another --out to choose one"
            )
        else:
            text += f" of head layer {classifier['head_layer']}: {classifier['run']}"
        print(text)
    print(f"result: {out / 'result.json'}")


def _recipe(model: ModelConfig) -> Recipe:
    """Google's views and network; what it does not settle are the defaults."""
    views = Policy(semantics="tensorflow", normalise="none")
    if model.stem == "cifar":
        views = replace(views, size=32, strength=0.5, blur=0.0)
    second = model.head_layers > 2  # SimCLRv2: three layers and 800 epochs; v1: two and 1000
    return Recipe(
        model=model,
        views=views,
        pretrain=PretrainConfig(epochs=800 if second else 1000),
        finetune=FinetuneConfig(head_layer=1 if model.head_layers > 1 else 0),
    )


def _counters(google_net: GoogleNet) -> int:
    return sum(key.endswith("num_batches_tracked") for key in google_net.state)


def _write(
    run: Path,
    stage: str,
    recipe: Recipe,
    google_net: GoogleNet,
    network: nn.Module,
    metadata: dict[str, Any],
    record: dict[str, Any],
) -> dict[str, Any]:
    """A run folder as the trainer leaves one, of a training that is over."""
    run.mkdir(parents=True, exist_ok=True)
    text, step = dump_recipe(recipe), google_net.step or 0
    write_text(run / "recipe.yaml", text)
    checkpoint.save(
        run,
        {
            "stage": stage,
            "recipe": text,
            "step": step,
            "total_steps": step,
            "objective": {f"network.{key}": value for key, value in network.state_dict().items()},
            "optimizer": {},
            "scaler": {},
            "rng": {},
            "fingerprint": "imported",
            "facts": metadata,
            "trained_s": 0.0,
            "last": {},
        },
        keep=1,
    )
    result = {"stage": stage, "metrics": {}, "imported": record, "parameters": count_parameters(network)}
    write_text(run / "result.json", json.dumps(result, indent=2) + "\n")
    return result
