"""A folder as Hugging Face keeps models: config.json, model.safetensors, preprocessor_config.json and README.md.

Where the ResNet of `transformers` can hold the network, config and weights are in its form, else in ours;
load_pretrained reads both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastsimclr.deploy.card import Card
from fastsimclr.deploy.files import need
from fastsimclr.deploy.model_card import model_card
from fastsimclr.deploy.weights import empty_network, misfits
from fastsimclr.models import ClassifierNet, ResNet, load_weights
from fastsimclr.models.resnet import DEPTHS

FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "README.md")


def write(
    network: ClassifierNet | ResNet, card: Card, run: Path, weights: str, out: Path, paths: Sequence[Path]
) -> str:
    """Write FILES of the folder `out` to `paths`, from run folder or checkpoint `run`; returns the line that loads it.

    weights: the digest of the run's whole network, by which its evaluation is known.
    ValueError where safetensors is not installed.
    """
    need("--format huggingface", "export", "safetensors")
    from safetensors.torch import save

    encoder = network if isinstance(network, ResNet) else network.encoder
    of_body, of_head = misfits(encoder, card, "transformers")
    reasons = of_body + of_head
    config = {"fastsimclr": asdict(card)}
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    if not reasons:
        config = _transformers_config(card, encoder) | config
        state = {_transformers_name(name): value for name, value in state.items()}
    paths[0].write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    paths[1].write_bytes(save(state, {"format": "pt"}))
    paths[2].write_text(json.dumps(_processor(card.preprocessing), indent=2) + "\n")
    paths[3].write_text(model_card(card, sum(p.numel() for p in network.parameters()), run, weights, reasons))
    kind = "AutoModelForImageClassification" if card.part == "classifier" else "AutoModel"
    return f'fastsimclr.deploy.load_pretrained("{out}")' if reasons else f'{kind}.from_pretrained("{out}")'


def load_pretrained(folder: str | Path) -> tuple[ClassifierNet | ResNet, Card]:
    """The network of a folder written by `fastsimclr export --format huggingface`, on the CPU in evaluation mode.

    Its weights are those exported, to the bit; with its card. ValueError for a folder that is missing, damaged or
    foreign, or where safetensors is not installed.
    """
    need("a model folder", "export", "safetensors")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config_file, weights_file = (Path(folder) / name for name in FILES[:2])
    remedy = "give a folder written by fastsimclr export --format huggingface"
    try:
        config = json.loads(config_file.read_text())
        state = load_file(weights_file)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be read as a model folder ({error}); {remedy}") from error
    if not isinstance(config, dict) or not isinstance(config.get("fastsimclr"), dict):
        raise ValueError(f"{config_file} has no entry 'fastsimclr'; {remedy}")
    metadata = {name: json.dumps(value) for name, value in config["fastsimclr"].items()}
    card = Card.parse(metadata, str(config_file))
    network = empty_network(card)
    if "model_type" in config:
        state = _ours(network, state)
    load_weights(network, state, str(weights_file))
    return network.eval(), card


def _ours(network: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in transformers' names under ours; names of neither are kept, for load_weights to refuse."""
    names = {_transformers_name(name): name for name in network.state_dict()}
    return {names.get(name, name): value for name, value in state.items()}


_RENAMED = (
    (r"^encoder\.", "resnet."),  # of a classifier
    (r"^classifier\.", "classifier.1."),
    (r"(^|resnet\.)(conv|bn)1\.", r"\1embedder.embedder.\g<2>."),
    (r"layer(\d)\.(\d+)\.(conv|bn)(\d)\.", r"encoder.stages.\1.layers.\2.layer.\4.\3."),
    (r"layer(\d)\.(\d+)\.downsample\.0\.", r"encoder.stages.\1.layers.\2.shortcut.conv."),
    (r"layer(\d)\.(\d+)\.downsample\.1\.", r"encoder.stages.\1.layers.\2.shortcut.bn."),
    (r"\.conv\.", ".convolution."),
    (r"\.bn\.", ".normalization."),
)


def _transformers_name(name: str) -> str:
    """The name of one of our tensors in transformers' ResNet, whose stages and layers count from 0."""
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"(stages|layer)\.(\d+)\.", lambda found: f"{found[1]}.{int(found[2]) - 1}.", name)


def _transformers_config(card: Card, encoder: ResNet) -> dict[str, Any]:
    basic = card.config.arch in ("resnet18", "resnet34")
    base = encoder.bn1.num_features
    classifier = card.part == "classifier"
    config: dict[str, Any] = {
        "architectures": ["ResNetForImageClassification" if classifier else "ResNetModel"],
        "model_type": "resnet",
        "num_channels": 3,
        "embedding_size": base,
        "hidden_sizes": [base * 2**index * (1 if basic else 4) for index in range(4)],
        "depths": list(DEPTHS[card.config.arch]),
        "layer_type": "basic" if basic else "bottleneck",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
        "dtype": "float32",
    }
    if classifier:
        config["id2label"] = {str(index): name for index, name in enumerate(card.classes)}
        config["label2id"] = {name: index for index, name in enumerate(card.classes)}
    return config


def _processor(preprocessing: dict[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json of the class in transformers that resizes the shorter side and cuts its centre.

    We cut first and resize then; docs/deploy.md has the difference.
    """
    side, fraction = preprocessing["size"], preprocessing["centre_fraction"]
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(side / fraction)} if fraction else {"height": side, "width": side},
        "resample": 3 if preprocessing["resize"].endswith("bicubic") else 2,
        "do_center_crop": bool(fraction),
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": bool(preprocessing["mean"]),
        "image_mean": preprocessing["mean"] or [0.0, 0.0, 0.0],
        "image_std": preprocessing["std"] or [1.0, 1.0, 1.0],
    }
