"""`fastsimclr export`: the network of a run as one file or folder for other programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fastsimclr.deploy import huggingface, timm_format
from fastsimclr.deploy.files import atomic_outputs
from fastsimclr.deploy.graph import write_onnx
from fastsimclr.deploy.origin import open_run
from fastsimclr.deploy.weights import torchvision_state, write_safetensors
from fastsimclr.models import count_parameters
from fastsimclr.stages.networks import digest


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write the network of a run for torchvision, timm or Hugging Face, as safetensors or as ONNX."""

    run: str
    """Run folder of a stage that trains, or a checkpoint in one."""
    format: Literal["torchvision", "safetensors", "onnx", "timm", "huggingface"]
    """torchvision: a state dict for its ResNets. safetensors: weights with all that is needed to build the network
    again. onnx: a graph that takes images in [0, 1]. timm: a folder for timm.create_model("local-dir:FOLDER").
    huggingface: a folder for transformers where its ResNet can hold the network, else for load_pretrained; with a model
    card."""
    out: str
    """The file to write; of timm and huggingface the folder."""
    part: Literal["auto", "encoder", "classifier"] = "auto"
    """encoder: images to features. classifier: images to logits. auto: the classifier where the run has one."""
    overwrite: bool = False
    """Replace the files where they exist."""


_FOLDERS = {"timm": timm_format.FILES, "huggingface": huggingface.FILES}


def export(config: ExportConfig) -> dict[str, object]:
    """Write the files, whole or not at all; returns what they hold, for people. ValueError where the format cannot."""
    out, run = Path(config.out), Path(config.run)
    inside = _FOLDERS.get(config.format)
    if inside and out.is_file():
        raise FileExistsError(f"{out} is a file; --format {config.format} writes a folder, give another --out")
    targets = tuple(out / name for name in inside) if inside else (out,)
    loads: dict[str, object] = {}
    with atomic_outputs(*targets, overwrite=config.overwrite, read=run) as paths:
        origin = open_run(run, "cpu", None)
        network, card = origin.network_and_card(None if config.part == "auto" else config.part)
        match config.format:
            case "torchvision":
                torch.save(torchvision_state(network, card, config.run), paths[0])
            case "safetensors":
                write_safetensors(network, card, paths[0])
            case "onnx":
                write_onnx(network, card, paths[0])
            case "timm":
                loads["load"] = timm_format.write(network, card, config.run, out, paths)
            case "huggingface":
                loads["load"] = huggingface.write(network, card, run, digest(origin.network), out, paths)
    classes = {"classes": len(card.classes)} if card.classes else {}
    return {
        "part": f"{card.part} of {card.config.arch}, {count_parameters(network):,} parameters",
        **classes,
        "input": card.input(normalised=config.format == "onnx"),
        **loads,
        "folder" if inside else "file": config.out,
    }
