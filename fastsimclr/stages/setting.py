"""A recipe made concrete: the device, the opened data, and the loaders of every stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
from tqdm import tqdm

from fastsimclr.loaders import (
    Batch,
    DataError,
    EvalLoader,
    Loader,
    Policy,
    Relabelled,
    Resident,
    Source,
    Splits,
    Subset,
    TrainLoader,
    hold,
    label_subset,
    open_data,
)
from fastsimclr.recipe import Labels, Recipe
from fastsimclr.runlog import logger
from fastsimclr.runtime import choose_runtime, environment

_SMOKE_IMAGES = 64
_EVALUATION_BATCH = 256


class Setting:
    """One recipe on one machine. A source held in memory is decoded once and serves every stage that uses it."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe.at_smoke_size()
        self.runtime = choose_runtime(recipe.device, recipe.trainer.precision, recipe.trainer.channels_last)
        self.environment = environment(self.runtime)  # now: the checkout may change while this process runs
        self._held: dict[tuple[str, str], Resident | None] = {}
        self._damaged: dict[str, list[dict[int, str]]] = {}

    @cached_property
    def splits(self) -> Splits:
        """The sources, cut to a few images under --smoke."""
        splits = open_data(self.recipe.data)
        if not self.recipe.smoke:
            return splits
        return replace(
            splits,
            unlabelled=self.first(splits.unlabelled, _SMOKE_IMAGES),
            val=self.first(splits.val, _SMOKE_IMAGES),
        )

    def first(self, source: Source, images: int) -> Source:
        """`source`, or `images` of it spread evenly, where it has more."""
        if len(source) <= images:
            return source
        return Subset(source, np.linspace(0, len(source) - 1, images).astype(np.int64))

    def labelled(self, labels: Labels) -> Source:
        """The labelled training images: the few of the data settings, or all. DataError where nothing is labelled."""
        splits = self.splits
        if not len(splits.train) or not len(splits.val):
            what = "labelled training images" if not len(splits.train) else "labelled validation images"
            raise DataError(
                f"{splits.unlabelled.name} has no {what}, which this stage needs; give class folders,"
                " data.labels (a CSV of path,label) or data.val"
            )
        few = label_subset(splits.train, self.recipe.data) if labels == "subset" else splits.train
        return self.first(few, _SMOKE_IMAGES) if self.recipe.smoke else few

    def with_few_labels(self) -> Source:
        """Every image for training, of which only the few labels of the data settings are kept."""
        every = self.splits.unlabelled
        few = self.labelled("subset")
        label = {few.describe(i): few.labels[i] for i in range(len(few))}
        return Relabelled(every, [label.get(every.describe(i), -1) for i in range(len(every))])

    def crop_flip_policy(self, scale: tuple[float, float] | None = None) -> Policy:
        """Crop and flip of the pretraining views (and their rotation, where there is one), with crops of `scale`."""
        views = self.recipe.views
        return replace(views, scale=scale or views.scale, jitter=0.0, grey=0.0, blur=0.0, solarise=0.0)

    @property
    def evaluation_policy(self) -> Policy:
        """One fixed view an image: the centre, or the whole image where small."""
        return replace(self.crop_flip_policy(), crop="centre", rotate=0.0, flip=0.0)

    def training_batches(self, source: Source, batch: int) -> Callable[[int, int], Iterable[Batch]]:
        """(start, stop) -> the batches of those steps."""
        resident, runtime = self._resident(source), self.runtime

        def batches(start: int, stop: int) -> Iterable[Batch]:
            loader = TrainLoader(
                source,
                self.recipe.data,
                batch=batch,
                seed=self.recipe.seed,
                start=start,
                stop=stop,
                rank=runtime.rank,
                world=runtime.world,
                resident=resident,
                pin=runtime.device.type == "cuda",
            )
            return self._noting_damage(loader)

        return batches

    def passes(self, source: Source) -> Iterable[Batch]:
        """One pass over the images in order, damaged ones left out."""
        pin = self.runtime.device.type == "cuda"
        loader = EvalLoader(source, self.recipe.data, batch=_EVALUATION_BATCH, resident=self._resident(source), pin=pin)
        return self._noting_damage(loader)

    def loader_name(self, source: Source) -> str:
        """Which loader serves `source`: resident or native."""
        return "native" if self._resident(source) is None else "resident"

    def data_facts(self) -> dict[str, Any]:
        """Sizes, classes, fingerprint and damaged images, for result files."""
        splits = self.splits
        return {
            "source": splits.unlabelled.name,
            "images": len(splits.unlabelled),
            "labelled": len(splits.train),
            "val": len(splits.val),
            "classes": len(splits.val.classes),
            "fingerprint": splits.unlabelled.fingerprint,
            "damaged": {
                name: sorted({reason for bad in found for reason in bad.values()})
                for name, found in self._damaged.items()
                if any(found)
            },
        }

    def _resident(self, source: Source) -> Resident | None:
        # A fingerprint knows names below the root only: two folders may share it.
        key = (source.fingerprint, source.describe(0) if len(source) else source.name)
        if key not in self._held:
            with tqdm(desc=f"decoding {source.name}", unit="image", disable=None, leave=False) as bar:
                self._held[key] = hold(
                    source, self.recipe.data, self.runtime.device, lambda done, n: _show(bar, done, n)
                )
            where = f"held decoded on {self.runtime.device}" if self._held[key] else "decoded as it is read"
            logger.info("%s: %d images %s", source.name, len(source), where)
        return self._held[key]

    def _noting_damage(self, loader: Loader) -> Iterable[Batch]:
        self._damaged.setdefault(loader.source.name, []).append(loader.bad)
        return loader


def _show(bar: tqdm[NoReturn], done: int, n: int) -> None:
    bar.total = n
    bar.update(done - bar.n)
