"""The folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` reads: config.json and model.safetensors.

The format of timm's models on the Hugging Face hub (timm/models/_hub.py, push_to_hf_hub).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastsimclr.deploy.card import Card
from fastsimclr.deploy.files import need
from fastsimclr.deploy.weights import torchvision_state
from fastsimclr.models import ClassifierNet, ResNet

FILES = ("config.json", "model.safetensors")


def write(network: ClassifierNet | ResNet, card: Card, origin: str, out: Path, paths: Sequence[Path]) -> str:
    """Write FILES of the folder `out` to `paths`; returns the line that loads it.

    ValueError where timm has no such network, with every reason, or safetensors is not installed.
    """
    need("--format timm", "export", "safetensors")
    from safetensors.torch import save

    state = torchvision_state(network, card, origin, "timm")
    encoder = network if isinstance(network, ResNet) else network.encoder
    paths[0].write_text(json.dumps(_config(card, encoder.out_channels), indent=2, ensure_ascii=False) + "\n")
    paths[1].write_bytes(save(state, {"format": "pt"}))
    return f'timm.create_model("local-dir:{out}", pretrained=True)'


def _config(card: Card, features: int) -> dict[str, Any]:
    """timm's config.json. An encoder has 0 classes: its network ends in the pooled features."""
    made = card.preprocessing
    side = made["size"]
    bicubic = made["resize"].endswith("bicubic")
    classes = len(card.classes)
    return {
        "architecture": card.config.arch,
        "num_classes": classes,
        "num_features": features,
        "global_pool": "avg",
        **({"label_names": list(card.classes)} if classes else {}),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, side, side],
            "fixed_input_size": False,
            "interpolation": "bicubic" if bicubic else "bilinear",
            "crop_pct": made["centre_fraction"] or 1.0,
            "crop_mode": "center" if made["centre_fraction"] else "squash",
            "mean": made["mean"] or [0.0, 0.0, 0.0],
            "std": made["std"] or [1.0, 1.0, 1.0],
            "num_classes": classes,
            "pool_size": [-(-side // 32)] * 2,
            "first_conv": "conv1",
            "classifier": "fc",
        },
    }
