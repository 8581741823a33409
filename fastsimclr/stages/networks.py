"""Networks out of earlier runs: what a stage starts from."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastsimclr.models import (
    ClassifierNet,
    ModelConfig,
    ResNet,
    SimCLRNet,
    build_classifier,
    build_encoder,
    build_simclr,
    load_weights,
)
from fastsimclr.runs import checkpoint
from fastsimclr.runs.log import logger

# Under which name a stage's objective holds the network that it trained.
_TRAINED = {
    "pretrain": "network.",
    "linear": "network.",
    "finetune": "network.",
    "supervised": "network.",
    "distill": "student.",
}


def network_facts(model: ModelConfig, size: int, classes: tuple[str, ...] = (), head_layer: int = 0) -> dict[str, Any]:
    """What must be known to build a network again; a checkpoint carries it."""
    return {"model": asdict(model), "size": size, "classes": list(classes), "head_layer": head_layer}


def digest(network: nn.Module) -> str:
    """A short hash of all weights: a resumed run must start from the same ones."""
    whole = hashlib.sha256()
    for value in network.state_dict().values():
        whole.update(value.contiguous().cpu().numpy().tobytes())
    return whole.hexdigest()[:16]


def load_simclr(run: Path) -> tuple[SimCLRNet, dict[str, Any]]:
    """Encoder and head of a pretraining run, and its `network_facts`. CheckpointError for a run of another stage."""
    path, state = _load(run)
    return _simclr(path, state), _network_facts_of(state)


def _simclr(path: Path, state: dict[str, Any]) -> SimCLRNet:
    if state["stage"] != "pretrain":
        raise checkpoint.CheckpointError(
            f"{path} is of stage {state['stage']}, which has no projection head; give the folder of a pretrain run"
        )
    facts = state["facts"]
    network = build_simclr(ModelConfig(**facts["model"]), facts["size"])
    load_weights(network, _below(state["objective"], "network."), str(path))
    return network


def load_encoder(run: Path) -> tuple[ResNet, dict[str, Any]]:
    """The encoder that a run of any training stage trained, and its `network_facts`."""
    path, state = _load(run)
    facts = state["facts"]
    encoder = build_encoder(ModelConfig(**facts["model"]), facts["size"])
    load_weights(encoder, _below(state["objective"], _TRAINED[state["stage"]] + "encoder."), str(path))
    return encoder, _network_facts_of(state)


def load_classifier(run: Path) -> tuple[ClassifierNet, tuple[str, ...]]:
    """The classifier of a linear (sgd), finetune, supervised or distill run, and its class names."""
    network, facts = classifier_and_facts(run)
    return network, tuple(facts["classes"])


def classifier_and_facts(run: Path) -> tuple[ClassifierNet, dict[str, Any]]:
    """The classifier of a run that has one, and its `network_facts`."""
    path, state = _load(run)
    return _classifier(path, state), _network_facts_of(state)


def _classifier(path: Path, state: dict[str, Any]) -> ClassifierNet:
    facts = state["facts"]
    if not facts["classes"]:
        raise checkpoint.CheckpointError(
            f"{path} is of stage {state['stage']}, which has no classifier; give the folder of a finetune, supervised"
            " or distill run"
        )
    model = ModelConfig(**facts["model"])
    network = build_classifier(model, facts["size"], len(facts["classes"]), facts["head_layer"])
    load_weights(network, _below(state["objective"], _TRAINED[state["stage"]]), str(path))
    return network


def load_trained(run: Path) -> tuple[SimCLRNet | ClassifierNet, str, dict[str, Any]]:
    """What a run of any training stage trained: the classifier where it has one, its stage, and its facts."""
    path, state = _load(run)
    build = _classifier if state["facts"]["classes"] else _simclr
    return build(path, state), state["stage"], state["facts"]


def _load(run: Path) -> tuple[Path, dict[str, Any]]:
    path = checkpoint.newest(run)
    state = checkpoint.load(path)
    if state["stage"] not in _TRAINED:
        raise checkpoint.CheckpointError(f"{path} is of an unknown stage {state['stage']!r}")
    if state["step"] < state["total_steps"]:
        logger.warning("%s is of step %d of %d: that run has not finished", path, state["step"], state["total_steps"])
    return path, state


def _network_facts_of(state: dict[str, Any]) -> dict[str, Any]:
    return {key: state["facts"][key] for key in ("model", "size", "classes", "head_layer")}


def _below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def recipe_path(run: Path) -> Path:
    """The recipe that a run was made with. CheckpointError if `run` is not a run folder or a checkpoint in one."""
    folder = run.parent.parent if run.is_file() else run
    path = folder / "recipe.yaml"
    if not path.is_file() or not checkpoint.folder(folder).is_dir():
        inside = [place.parent.name for place in sorted(run.glob("*/recipe.yaml"))] if run.is_dir() else []
        remedy = f"give one of the runs in it: {', '.join(inside)}" if inside else "give the --out of an earlier stage"
        lacking = path if not path.is_file() else checkpoint.folder(folder)
        raise checkpoint.CheckpointError(f"{run} is not a run folder: {lacking} does not exist; {remedy}")
    if (command := path.read_text().partition(":")[0]) in ("detect", "segment"):
        raise checkpoint.CheckpointError(
            f"{run} is a run of {command}, whose network no other command reads; give the run that it started from"
        )
    return path
