"""Weights for torchvision's ResNets, and weights with all that is needed to use them as safetensors."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from fastsimclr.deploy.card import Card
from fastsimclr.deploy.files import need
from fastsimclr.models import ClassifierNet, ResNet, build_classifier, build_encoder, load_weights


def torchvision_state(network: ClassifierNet | ResNet, card: Card, origin: str) -> dict[str, Tensor]:
    """A state dict for torchvision.models.<arch>(num_classes=K): the encoder, and `fc` where network is a classifier.

    ValueError, calling the weights `origin`, with every reason why torchvision has no such network.
    """
    encoder = network if isinstance(network, ResNet) else network.encoder
    _refuse_what_torchvision_lacks(encoder, card, origin)
    state = dict(encoder.state_dict())
    if isinstance(network, ClassifierNet):
        state |= {f"fc.{name}": value for name, value in network.classifier.state_dict().items()}
    return {name: value.contiguous() for name, value in state.items()}


def _refuse_what_torchvision_lacks(encoder: ResNet, card: Card, origin: str) -> None:
    config = card.config
    cifar = isinstance(encoder.maxpool, nn.Identity)
    basic = config.arch in ("resnet18", "resnet34")
    of_body = {
        "it has no resnet200": config.arch == "resnet200",
        "it has no selective kernels (model.selective_kernels)": config.selective_kernels,
        "it has no 3x3 stem without max-pool (model.stem cifar)": cifar,
        f"its networks of other widths than 1 widen the 3x3 convolutions only (model.width {config.width:g})": (
            encoder.bn1.num_features != 64
        ),
        "it pads the max-pool on both sides (model.maxpool tf_same)": config.maxpool == "tf_same" and not cifar,
        "its first block has no projection (model.project_first)": config.project_first and basic,
    }
    of_head = {f"its fc stands on the encoder, this classifier on head layer {card.head_layer}": card.head_layer > 0}
    reasons = [reason for reason, holds in {**of_body, **of_head}.items() if holds]
    if reasons:
        alone = ", or --part encoder for the encoder alone" if not any(of_body.values()) else ""
        raise ValueError(
            f"{origin} does not fit torchvision: {'; '.join(reasons)}; use --format safetensors or onnx{alone}"
        )


def write_safetensors(network: nn.Module, card: Card, path: Path) -> None:
    """The state of `network`, with its card as metadata. ValueError where safetensors is not installed."""
    need("--format safetensors", "export", "safetensors")
    from safetensors.torch import save

    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    path.write_bytes(save(state, card.metadata()))  # save_file makes a file that only its owner can read


def load_safetensors(path: str | Path) -> tuple[ClassifierNet | ResNet, Card]:
    """The network of a file written by `fastsimclr export`, on the CPU in evaluation mode, and its card.

    Its weights are those exported, to the bit. ValueError for a file that is missing, damaged or foreign, or where
    safetensors is not installed.
    """
    need("a safetensors file", "export", "safetensors")
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file; give one written by fastsimclr export --format safetensors")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}); export it again") from error
    card = Card.parse(metadata, str(path))
    network: ClassifierNet | ResNet
    if card.part == "classifier":
        network = build_classifier(card.config, card.size, len(card.classes), card.head_layer)
    else:
        network = build_encoder(card.config, card.size)
    load_weights(network, state, str(path))
    return network.eval(), card
