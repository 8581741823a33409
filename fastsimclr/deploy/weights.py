"""Weights for the ResNets of other libraries, and weights with all that is needed to use them as safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from fastsimclr.deploy.card import Card
from fastsimclr.deploy.files import need
from fastsimclr.models import ClassifierNet, ResNet, build_classifier, build_encoder, load_weights

Library = Literal["torchvision", "timm", "transformers"]
_REMEDY = "use --format huggingface, safetensors or onnx"


def torchvision_state(
    network: ClassifierNet | ResNet,
    card: Card,
    origin: str,
    library: Library = "torchvision",
    remedy: str = _REMEDY,
) -> dict[str, Tensor]:
    """A state dict for the ResNet `card.config.arch` of torchvision or timm, which share their names.

    The encoder, and `fc` where network is a classifier. ValueError, calling the weights `origin`, with every reason why
    the library has no such network, and the remedy.
    """
    encoder = network if isinstance(network, ResNet) else network.encoder
    of_body, of_head = misfits(encoder, card, library)
    if of_body or of_head:
        alone = ", or --part encoder for the encoder alone" if not of_body else ""
        raise ValueError(f"{origin} does not fit {library}: {'; '.join(of_body + of_head)}; {remedy}{alone}")
    state = dict(encoder.state_dict())
    if isinstance(network, ClassifierNet):
        state |= {f"fc.{name}": value for name, value in network.classifier.state_dict().items()}
    return {name: value.contiguous() for name, value in state.items()}


def misfits(encoder: ResNet, card: Card, library: Library) -> tuple[list[str], list[str]]:
    """Every reason why the ResNets of `library` cannot hold the network: those of the encoder, and of the classifier.

    timm has torchvision's networks and ResNet-200 (timm/models/resnet.py); transformers' ResNetConfig also takes other
    widths (transformers/models/resnet).
    """
    config = card.config
    cifar = isinstance(encoder.maxpool, nn.Identity)
    basic = config.arch in ("resnet18", "resnet34")
    stem_only = "widen the 3x3 convolutions only" if library == "torchvision" else "keep a stem of 64 channels"
    of_body = {
        "it has no resnet200": config.arch == "resnet200" and library == "torchvision",
        "it has no selective kernels of SimCLRv2 (model.selective_kernels)": config.selective_kernels,
        "it has no 3x3 stem without max-pool (model.stem cifar)": cifar,
        f"its networks of other widths than 1 {stem_only} (model.width {config.width:g})": (
            encoder.bn1.num_features != 64 and library != "transformers"
        ),
        "it pads the max-pool on both sides (model.maxpool tf_same)": config.maxpool == "tf_same" and not cifar,
        "its first block has no projection (model.project_first)": config.project_first and basic,
    }
    of_head = {f"its fc stands on the encoder, this classifier on head layer {card.head_layer}": card.head_layer > 0}
    return ([reason for reason, holds in of_body.items() if holds], [why for why, holds in of_head.items() if holds])


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
    network = empty_network(card)
    load_weights(network, state, str(path))
    return network.eval(), card


def empty_network(card: Card) -> ClassifierNet | ResNet:
    """The network that a card tells of, with fresh weights."""
    if card.part == "classifier":
        return build_classifier(card.config, card.size, len(card.classes), card.head_layer)
    return build_encoder(card.config, card.size)
