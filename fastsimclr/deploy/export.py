"""`fastsimclr export`: the network of a run as one file for other programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fastsimclr.deploy.files import whole
from fastsimclr.deploy.graph import write_onnx
from fastsimclr.deploy.origin import open_run
from fastsimclr.deploy.weights import torchvision_state, write_safetensors
from fastsimclr.models import count_parameters


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write the network of a run for torchvision, as safetensors or as ONNX."""

    run: str
    """Run folder of a stage that trains, or a checkpoint in one."""
    format: Literal["torchvision", "safetensors", "onnx"]
    """torchvision: a state dict for its ResNets. safetensors: weights with all that is needed to build the network
    again. onnx: a graph that takes images in [0, 1]."""
    out: str
    """The file to write."""
    part: Literal["auto", "encoder", "classifier"] = "auto"
    """encoder: images to features. classifier: images to logits. auto: the classifier where the run has one."""
    overwrite: bool = False
    """Replace the file where it exists."""


def export(config: ExportConfig) -> dict[str, object]:
    """Write the file, whole or not at all; returns what it holds, for people. ValueError where the format cannot."""
    with whole(Path(config.out), overwrite=config.overwrite, read=Path(config.run)) as (path,):
        origin = open_run(Path(config.run), "cpu", None)
        network, card = origin.part(None if config.part == "auto" else config.part)
        match config.format:
            case "torchvision":
                torch.save(torchvision_state(network, card, config.run), path)
            case "safetensors":
                write_safetensors(network, card, path)
            case "onnx":
                write_onnx(network, card, path)
    classes = {"classes": len(card.classes)} if card.classes else {}
    return {
        "part": f"{card.part} of {card.config.arch}, {count_parameters(network):,} parameters",
        **classes,
        "input": card.input(normalised=config.format == "onnx"),
        "file": config.out,
    }
