"""Classifiers that were made for other views: how they see ours, and those of timm and torchvision by name."""

# N images, K classes, S side in pixels

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsimclr.models.convert import KEYS_SHOWN, load_weights, read_state

Stats = tuple[Sequence[float], Sequence[float]]
LIBRARIES = ("timm", "torchvision")
_AS_PIXELS = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


class ForeignNet(nn.Module):
    """Views as the student sees them, [N, 3, S, S] -> logits [N, K] of a network that wants others.

    A pixel v of a view means v·std + mean of `seen`, within [0, 1]. It is normalised again with the network's own mean
    and std, and where size is given the view is resized to it, bilinear and antialiased.
    seen, network_stats: (mean, std); None for pixels within [0, 1]. order, which may be set: int64 [K], which output is
    each class; None: they are in order.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        seen: Stats | None,
        network_stats: Stats | None,
        size: int | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.size = size
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in seen or _AS_PIXELS)
        own_mean, own_std = (torch.tensor(values).view(3, 1, 1) for values in network_stats or _AS_PIXELS)
        self.register_buffer("gain", std / own_std)
        self.register_buffer("shift", (mean - own_mean) / own_std)
        self.register_buffer("order", None)
        self.order: Tensor | None

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, K]. images: [N, 3, S, S], any float dtype; half precision is widened for the arithmetic here."""
        x = images.to(torch.promote_types(images.dtype, torch.float32))
        if self.size is not None and x.shape[-1] != self.size:
            x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        logits_NK: Tensor = self.network(x * self.get_buffer("gain") + self.get_buffer("shift"))
        return logits_NK if self.order is None else logits_NK[:, self.order]


def is_foreign(teacher: str) -> bool:
    """Whether it names a network of a library, "timm:NAME" or "torchvision:NAME[@FILE]", and no run."""
    return teacher.partition(":")[0] in LIBRARIES and ":" in teacher


def load_foreign(teacher: str, classes: Sequence[str], data: str, *, seen: Stats | None, size: int) -> ForeignNet:
    """The network LIBRARY:NAME with the library's own weights, or LIBRARY:NAME@FILE with those of a file; on the CPU.

    FILE: safetensors, or a state dict, which is read with weights_only. Its outputs are the classes in sorted order of
    their names, unless FILE.classes.txt beside it names them, one a line, in another. The library's own weights are
    taken for ImageNet-1k's classes by WordNet id or by torchvision's names only. classes: those of the data, each with
    a name of its own, in any order, which is that of the logits. data: what errors call it. seen: (mean, std) with
    which views are normalised. size: their side, which is kept unless the network has a fixed one.

    ValueError for a library or name that is not there, weights that cannot be had or read, and outputs that are not the
    data's classes.
    """
    name, _, file = teacher.partition("@")
    library, _, name = name.partition(":")
    make = _timm if library == "timm" else _torchvision
    network, own, fixed = make(teacher, name, None if file else "own", len(classes))
    if file:
        _load(network, Path(file), teacher, classes, data)
    wrapped = ForeignNet(network, seen=seen, network_stats=own, size=fixed).eval()
    outputs = _outputs(wrapped, teacher, size)
    if outputs != len(classes):
        raise ValueError(_unfit(teacher, outputs, classes, data))
    names = _names(Path(f"{file}.classes.txt"), classes, data) if file else _imagenet(teacher, classes, data)
    if tuple(names) != tuple(classes):
        wrapped.order = torch.tensor([names.index(name) for name in classes])
    return wrapped


def wordnet_ids(classes: Sequence[str]) -> bool:
    """Whether they are ImageNet's thousand classes by WordNet id, in any order, as far as their two ends tell."""
    ids = sorted(classes)
    named = len(ids) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in ids)
    return named and (ids[0], ids[-1]) == ("n01440764", "n15075141")


Made = tuple[nn.Module, Stats, int | None]


def _timm(teacher: str, name: str, weights: str | None, classes: int) -> Made:
    try:
        timm: Any = import_module("timm")
    except ImportError as error:
        raise ValueError(f"--teacher {teacher} needs timm; run: pip install fastsimclr[timm]") from error
    if not timm.is_model(name.partition(".")[0]):
        near = timm.list_models(f"*{name.partition('.')[0]}*")[:KEYS_SHOWN]
        raise ValueError(f"--teacher {teacher}: timm has no {name!r}{_like(near)}; timm.list_models() names all")
    try:
        network: nn.Module = timm.create_model(name, pretrained=weights is not None, **_heads(weights, classes))
    except Exception as error:  # of timm, the hub or the network
        raise ValueError(_no_weights(teacher, error)) from error
    config: Any = network.pretrained_cfg
    size = config["input_size"][-1] if config.get("fixed_input_size") else None
    return network, (config["mean"], config["std"]), size


def _torchvision(teacher: str, name: str, weights: str | None, classes: int) -> Made:
    models: Any = import_module("torchvision.models")
    known = models.list_models(module=models)
    if name not in known:
        near = [other for other in known if name in other][:KEYS_SHOWN]
        raise ValueError(
            f"--teacher {teacher}: torchvision has no classifier {name!r}{_like(near)};"
            " torchvision.models.list_models() names all"
        )
    default = models.get_model_weights(name).DEFAULT
    auxiliary = {"init_weights": False} if name in ("googlenet", "inception_v3") and weights is None else {}
    try:
        network: nn.Module = models.get_model(
            name, weights=default if weights else None, **_heads(weights, classes), **auxiliary
        )
    except Exception as error:  # of the hub or the network
        raise ValueError(_no_weights(teacher, error)) from error
    shown = default.transforms()
    fixed = shown.crop_size[0] if isinstance(network, models.MaxVit) else getattr(network, "image_size", None)
    return network, (shown.mean, shown.std), fixed


def _heads(weights: str | None, classes: int) -> dict[str, int]:
    return {} if weights else {"num_classes": classes}


def _like(near: Sequence[str]) -> str:
    return f" (but {', '.join(near)})" if near else ""


def _no_weights(teacher: str, error: Exception) -> str:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return f"--teacher {teacher} cannot be had ({reason}); give a file of its weights: {teacher.partition('@')[0]}@FILE"


def _load(network: nn.Module, file: Path, teacher: str, classes: Sequence[str], data: str) -> None:
    state = _read(file)
    own = network.state_dict()
    unlike = {key: len(state[key]) for key in own if key in state and state[key].shape != own[key].shape}
    heads = {rows for key, rows in unlike.items() if own[key].shape[1:] == state[key].shape[1:]}
    if len(heads) == 1 and all(len(own[key]) == len(classes) for key in unlike):
        raise ValueError(_unfit(teacher, heads.pop(), classes, data))
    try:
        load_weights(network, state, str(file))
    except ValueError as error:
        raise ValueError(f"{str(error).partition('. ')[0]}; give the weights of {teacher.partition('@')[0]}") from None


def _read(file: Path) -> Mapping[str, Tensor]:
    if file.suffix != ".safetensors":
        return read_state(file)
    if not file.is_file():
        raise ValueError(f"{file} is not a file; give a .safetensors file or a state dict")
    try:
        load: Any = import_module("safetensors.torch").load_file
    except ImportError as error:
        raise ValueError(f"{file} needs safetensors; run: pip install fastsimclr[export]") from error
    try:
        state: dict[str, Tensor] = load(str(file))
    except Exception as error:  # safetensors has a class of its own
        raise ValueError(f"{file} cannot be read as safetensors ({error}); write it again, or give another") from error
    return state


def _names(file: Path, classes: Sequence[str], data: str) -> Sequence[str]:
    """Which class each output of a file's weights is: as `file` lists them, else in the sorted order of their names."""
    if not file.is_file():
        return sorted(classes)
    listed = file.read_text().splitlines()
    if sorted(listed) != sorted(classes):
        unlike = sorted(set(listed) ^ set(classes))
        raise ValueError(
            f"{file} names {len(listed)} classes, {data} has {len(classes)}; they differ in"
            f" {', '.join(unlike[:KEYS_SHOWN]) or 'how often one is named'}: it must name the data's classes, one a"
            " line, in the order of the outputs"
        )
    return listed


def _outputs(network: nn.Module, teacher: str, size: int) -> int:
    try:
        with torch.no_grad():
            logits = network(torch.zeros(1, 3, size, size))
    except Exception as error:  # whatever a foreign network does with a view that does not suit it
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"--teacher {teacher} cannot take views of {size} px ({reason}); use larger views.size, or another teacher"
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ValueError(f"--teacher {teacher} gives no logits [images, classes]; give a classifier")
    return logits.shape[1]


def _unfit(teacher: str, outputs: int, classes: Sequence[str], data: str) -> str:
    return (
        f"--teacher {teacher} has {outputs} outputs, {data} has {len(classes)} classes ({', '.join(classes[:3])}, …);"
        " give a teacher of these classes, whose outputs are in the sorted order of their names"
    )


def _imagenet(teacher: str, classes: Sequence[str], data: str) -> Sequence[str]:
    """Which class each output of a library's own weights is; nothing but the names tells."""
    if wordnet_ids(classes):
        return sorted(classes)
    weights: Any = import_module("torchvision.models").ResNet50_Weights
    names: list[str] = weights.DEFAULT.meta["categories"]
    if sorted(classes) != sorted(names):
        raise ValueError(
            f"--teacher {teacher} knows ImageNet's thousand classes in the order of their WordNet ids, {data} has"
            f" {', '.join(classes[:3])}, …; name the class folders by id, or give FILE and FILE.classes.txt"
        )
    return names
