"""What must be known of exported weights to build their network and to feed it; it travels in the file's metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from fastsimclr.loaders import Policy
from fastsimclr.models import ModelConfig

Part = Literal["encoder", "classifier"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """Facts of an exported network, each a JSON value in the metadata under its name here."""

    part: Part
    """Which network: the encoder, with outputs `features`, or the classifier, with outputs `logits`."""
    stage: str
    """The stage that trained it."""
    config: ModelConfig
    """Its architecture."""
    size: int
    """Side in pixels of the views it was built for; under stem=auto this decides the stem."""
    head_layer: int
    """Layers of the projection head below the classifier; 0 for the encoder alone."""
    classes: tuple[str, ...]
    """Class names in the order of the logits; () for the encoder."""
    preprocessing: dict[str, Any]
    """From an image to the input, see `preprocessing`."""
    metrics: dict[str, float]
    """What the stage measured on its validation images; {} where it has not."""
    version: str
    """The fastsimclr that wrote the file."""

    def metadata(self) -> dict[str, str]:
        """{name: JSON}."""
        return {name: json.dumps(value) for name, value in asdict(self).items()}

    def input(self, normalised: bool) -> str:
        """The preprocessing in words. normalised: the exported graph itself applies mean and std."""
        made = self.preprocessing
        part, side = made["centre_fraction"], made["size"]
        crop = "the whole image" if part is None else f"a centre square, {part:g} of the shorter side"
        how = " in the graph" if normalised else ""
        stats = f"less {made['mean']}, divided by {made['std']}{how}" if made["mean"] else "not normalised"
        return f"{crop}, resized to {side} x {side} px ({made['resize']}), RGB in [0, 1], {stats}"

    @classmethod
    def parse(cls, metadata: Mapping[str, str], origin: str) -> Card:
        """The card in `metadata`. ValueError, calling the file `origin`, where it is not one."""
        names = [field.name for field in fields(cls)]
        if missing := [name for name in names if name not in metadata]:
            raise ValueError(
                f"{origin} lacks the metadata {', '.join(missing)}; give a file written by fastsimclr export"
            )
        try:
            values = {name: json.loads(metadata[name]) for name in names}
            values |= {"config": ModelConfig(**values["config"]), "classes": tuple(values["classes"])}
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{origin} has metadata that this version does not read ({error}); written by fastsimclr"
                f" {metadata['version']}: use that version, or export again"
            ) from error
        return cls(**values)


def preprocessing(policy: Policy) -> dict[str, Any]:
    """How an image becomes the network's input, in JSON values: the run's own evaluation view.

    A crop of `centre_fraction` of the shorter side (null: the whole image), resized to size x size, RGB in [0, 1],
    less mean, divided by std (null: neither).
    """
    rendering = policy.rendering
    return {
        "centre_fraction": None if policy.size <= 32 else policy.centre_fraction,
        "size": policy.size,
        "resize": "bilinear, antialiased" if policy.semantics == "torchvision" else "tensorflow legacy bicubic",
        "mean": rendering["mean"] and list(rendering["mean"]),
        "std": rendering["std"] and list(rendering["std"]),
    }
