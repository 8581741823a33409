"""How far each backend's crops are from exact ones: `python -m fastsimclr.bench.crop_errors FOLDER|FILE.beton`.

Exact: the image decoded strictly, its window resized in float32, bilinear and antialiased, as torchvision does on
tensors. In levels of 255, of both views of every image; the windows are those that `draw` gives.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsimclr.kernels.views import make_views
from fastsimclr.loaders import Crops, DataConfig, DataError, Policy, Source, TrainLoader, draw, open_data
from fastsimclr.loaders.data import LoaderName
from fastsimclr.loaders.decode import decode

VIEWS, SEED = 2, 0


def exact_crop(pixels: Tensor, box: list[int], size: int) -> Tensor:
    """The crop `box` (top, left, height, width) of `pixels` (uint8 [H, W, 3]), float32 [S, S, 3] in 0..255."""
    top, left, height, width = box
    window = pixels[top : top + height, left : left + width].permute(2, 0, 1)[None].float()
    return F.interpolate(window, size=(size, size), mode="bilinear", antialias=True)[0].permute(1, 2, 0)


def crop_errors(source: Source, loader: LoaderName, size: int = 224, batch: int = 50) -> dict[str, float]:
    """Mean, largest mean of one crop, and largest difference of the crops of one epoch, in levels of 255."""
    policy = Policy(size=size, normalise="none").plain()
    config = DataConfig(loader=loader)
    means, largest = list[float](), 0.0
    crops, stop = Crops(policy=policy, seed=SEED, views=VIEWS), -(-len(source) // batch)
    with TrainLoader(source, config, batch=batch, seed=SEED, stop=stop, crops=crops) as loaded:
        for each in loaded:
            params = draw(policy, SEED, each.epochs, each.ids, VIEWS, each.sizes)
            for row in range(VIEWS * len(each)):
                data = source.read(int(each.ids[row % len(each)]))
                pixels = torch.from_numpy((data if isinstance(data, np.ndarray) else decode(data, "")).copy())
                far = (each.images.image(row) - exact_crop(pixels, params.crop[row].tolist(), size)).abs()
                means.append(float(far.mean()))
                largest = max(largest, float(far.max()))
    return {"mean": float(np.mean(means)), "largest mean": max(means), "max": largest}


def photometric_errors(source: Source, policy: Policy, batch: int = 50) -> dict[str, float]:
    """photometric=dali against the kernel on the same windows and draws: levels of 255, over one epoch."""
    runs: dict[str, list[Tensor]] = {"kernel": [], "dali": []}
    crops, stop = Crops(policy=policy, seed=SEED, views=VIEWS), -(-len(source) // batch)
    for photometric, views in runs.items():
        config = DataConfig(loader="dali", photometric="dali" if photometric == "dali" else "kernel")
        with TrainLoader(source, config, batch=batch, seed=SEED, stop=stop, crops=crops) as loaded:
            for each in loaded:
                assert each.params is not None
                views.append(make_views(each.images, each.params, **policy.rendering).mul(255).to(torch.uint8))
    pairs = zip(runs["dali"], runs["kernel"], strict=True)
    means = torch.cat([(a.float() - b.float()).abs().mean(dim=(1, 2, 3)) for a, b in pairs])
    return {"mean": float(means.mean()), "median": float(means.median()), "largest mean": float(means.max())}


def main() -> None:
    """The command: a table of every backend that can be had here."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    root = parser.parse_args().root
    source = open_data(DataConfig(source="folder" if root.is_dir() else "beton", root=str(root))).unlabelled
    loaders: tuple[LoaderName, ...] = ("native", "dali", "torchvision")
    for loader in loaders:
        try:
            print(loader, {key: round(value, 3) for key, value in crop_errors(source, loader).items()})
        except DataError as error:  # a package that is not here
            print(error)
    plain = replace(Policy(normalise="none").plain(), flip=0.5)
    for name, policy in {
        "SimCLR's views": Policy(normalise="none"),
        "crop and flip": plain,
        "those and grey": replace(plain, grey=1),
        "those and blur": replace(plain, blur=1),
        "those and jitter": replace(plain, jitter=1),
    }.items():
        try:
            errors = photometric_errors(source, policy)
            print(f"photometric=dali, {name}", {key: round(value, 3) for key, value in errors.items()})
        except DataError as error:
            print(error)
            return


if __name__ == "__main__":
    main()
