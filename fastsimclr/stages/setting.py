"""A recipe made concrete: the device, the opened data, and the loaders of every stage."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from fastsimclr.evaluation.features import Features, extract
from fastsimclr.loaders import (
    Batch,
    Crops,
    Damage,
    DataConfig,
    DataError,
    EvalLoader,
    OrderName,
    Policy,
    Relabelled,
    Resident,
    Source,
    Splits,
    Subset,
    TrainLoader,
    choose_order,
    choose_placement,
    label_subset,
    open_data,
    thread_count,
)
from fastsimclr.methods.config import Labels
from fastsimclr.recipe import Recipe, dump_recipe
from fastsimclr.runs.log import logger
from fastsimclr.runs.text import differences
from fastsimclr.runtime.device import choose_runtime
from fastsimclr.runtime.environment import environment

_SMOKE_IMAGES = 64
_EVALUATION_BATCH = 256


class Setting:
    """One recipe, as one rank sees it. A source held in memory is decoded once and serves every stage that uses it."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe.at_smoke_size()
        loop = recipe.trainer
        self.runtime = choose_runtime(recipe.device, loop.precision, loop.channels_last, loop.timeout_s)
        self.ranks = self.runtime.ranks
        here = self.ranks.local_world
        threads = recipe.data.threads or max(1, thread_count(0) // here)
        self.data = replace(recipe.data, threads=threads)
        self.environment = environment(self.runtime)  # now: the checkout may change while this process runs
        self._held: dict[tuple[str, str], tuple[Resident | None, str]] = {}  # and why
        self._damaged: dict[tuple[str, str], Damage] = {}
        self._agree()

    def with_recipe(self, recipe: Recipe) -> Setting:
        """The setting of another recipe; where it opens the same images, they stay opened and decoded."""
        other = Setting(recipe)
        if other.runtime.device == self.runtime.device and _opened(other.recipe) == _opened(self.recipe):
            other._held = self._held
            if "splits" in self.__dict__:
                other.__dict__["splits"] = self.splits
        return other

    def _agree(self) -> None:
        """ValueError where a rank was given another recipe or chose another precision than rank 0."""
        texts = self.ranks.gather(dump_recipe(self.recipe))
        for rank, text in enumerate(texts):
            if changes := differences(texts[0], text):
                raise ValueError(
                    f"rank {rank} was given another recipe than rank 0 ({'; '.join(changes[:3])});"
                    " give the same options and files on every machine"
                )
        self.ranks.same("the precision", self.runtime.precision)

    @cached_property
    def splits(self) -> Splits:
        """The sources, cut to a few images under --smoke."""
        splits = self.ranks.host_by_host(lambda: open_data(self.data))
        for source in (splits.unlabelled, splits.train, splits.val):
            self.ranks.same(f"the images of {source.name}", (len(source), source.fingerprint))
        if not self.recipe.smoke:
            return splits
        return replace(
            splits,
            unlabelled=self.spread_subset(splits.unlabelled, _SMOKE_IMAGES),
            val=self.spread_subset(splits.val, _SMOKE_IMAGES),
            subgroups=tuple(splits.subgroups[i] for i in _spread(len(splits.subgroups), _SMOKE_IMAGES)),
        )

    @cached_property
    def subgroups(self) -> tuple[tuple[str, ...], Tensor] | None:
        """(names, sorted; which of them each validation image is of, int64 [n]), or None without data.subgroup."""
        of_each = self.splits.subgroups
        self.ranks.same("the subgroups of the validation images", hashlib.sha256(repr(of_each).encode()).hexdigest())
        if not of_each:
            return None
        names = tuple(sorted(set(of_each)))
        index = {name: i for i, name in enumerate(names)}
        return names, torch.tensor([index[name] for name in of_each])

    def spread_subset(self, source: Source, images: int) -> Source:
        """`source`, or `images` of it spread evenly, where it has more."""
        return source if len(source) <= images else Subset(source, _spread(len(source), images))

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
        return self.spread_subset(few, _SMOKE_IMAGES) if self.recipe.smoke else few

    def with_few_labels(self) -> Source:
        """Every image for training, of which only the few labels of the data settings are kept."""
        every = self.splits.unlabelled
        few = self.labelled("subset")
        label = {few.describe(i): few.labels[i] for i in range(len(few))}
        return Relabelled(every, [label.get(every.describe(i), -1) for i in range(len(every))])

    def crop_flip_policy(self, scale: tuple[float, float] | None = None) -> Policy:
        """Crop and flip of the pretraining views (and their rotation, where there is one), with crops of `scale`."""
        views = self.recipe.views
        return replace(views.plain(), scale=scale or views.scale, flip=views.flip, rotate=views.rotate)

    @property
    def evaluation_policy(self) -> Policy:
        """One fixed view an image: the centre, or the whole image where small."""
        return replace(self.recipe.views.plain(), crop="centre")

    def order_is_open(self, source: Source) -> bool:
        """Whether the order of a training on `source` is for `ordered` to choose."""
        return self.data.order == "auto" and source.blocks is not None

    def ordered(self, source: Source, begun: Mapping[str, Any]) -> DataConfig:
        """The data settings with the order of a training on `source`: that of the run to go on with, else chosen.

        begun: the facts of that run's checkpoint. One answer on all ranks: room may differ from machine to machine.
        """
        asked, window = self.data.order, self.data.window
        order: OrderName
        if self.order_is_open(source) and begun:
            order, window = begun.get("order", "random"), begun.get("window", window)
            reason = "as the run began"
        else:
            fits = all(self.ranks.gather(source.whole_fits))
            order, reason = choose_order(source, asked, fits=fits)
        data = replace(self.data, order=order, window=window)
        if asked != "auto" or self.order_is_open(source) or not source.whole_fits:
            logger.info("%s: data.order=%s: %s, %s", source.name, asked, order_name(data), reason)
        return data

    def training_batches(
        self, source: Source, batch: int, data: DataConfig
    ) -> Callable[[int, int, Crops], Iterable[Batch]]:
        """(start, stop, crops) -> the batches of those steps, in the order of `data`, as `ordered` gives it."""
        resident, runtime, ranks = self._resident(source), self.runtime, self.ranks

        def batches(start: int, stop: int, crops: Crops) -> Iterable[Batch]:
            return TrainLoader(
                source,
                data,
                batch=batch,
                seed=self.recipe.seed,
                start=start,
                stop=stop,
                rank=ranks.rank,
                world=ranks.world,
                resident=resident,
                damage=self._damage(source),
                crops=crops,
                cut=runtime.cuts,
                pin=runtime.pins,
            )

        return batches

    def passes(self, source: Source, *, sharded: bool = True) -> Iterable[Batch]:
        """One pass over this rank's part of the images in order, or over all of them; damaged ones left out.

        A loader that makes nothing but finished crops makes those of `evaluation_policy`; others leave it to `extract`.
        """
        return EvalLoader(
            source,
            self.data,
            batch=_EVALUATION_BATCH,
            rank=self.ranks.rank if sharded else 0,
            world=self.ranks.world if sharded else 1,
            resident=self._resident(source),
            damage=self._damage(source),
            crops=Crops(policy=self.evaluation_policy, seed=0, views=1),
            cut=False,
            pin=self.runtime.pins,
        )

    def features(self, network: Callable[[Tensor], Tensor], source: Source) -> Features:
        """The outputs of `network`, without gradient, for this rank's part of `source` under `evaluation_policy`."""
        return extract(network, self.passes(source), self.evaluation_policy, self.runtime)

    def loader_name(self, source: Source) -> str:
        """Which loader serves `source`; where it was chosen, the reason too."""
        self._resident(source)
        return self._held[_key(source)][1]

    def data_facts(self) -> dict[str, Any]:
        """Sizes, classes, fingerprint and the damaged images that any rank found, for result files. Every rank asks.

        DataError where all ranks together found more damaged images than data.max_bad_fraction allows.
        """
        splits = self.splits
        mine = {key: (damage.name, damage.n, damage.bad) for key, damage in self._damaged.items()}
        reasons: dict[str, set[str]] = {}
        everywhere: dict[tuple[str, str], Damage] = {}
        for found in self.ranks.gather(mine):
            for key, (name, n, bad) in found.items():
                everywhere.setdefault(key, Damage(name, n, self.data.max_bad_fraction)).merge(bad)
                reasons.setdefault(name, set()).update(bad.values())
        return {
            "source": splits.unlabelled.name,
            "images": len(splits.unlabelled),
            "labelled": len(splits.train),
            "val": len(splits.val),
            "classes": len(splits.val.classes),
            "fingerprint": splits.unlabelled.fingerprint,
            "damaged": {name: sorted(found) for name, found in reasons.items() if found},
        }

    def _resident(self, source: Source) -> Resident | None:
        key = _key(source)
        if key not in self._held:
            placement = choose_placement(source, self.data, self.runtime.device, self.ranks)
            logger.info("%s: %d images, loaded by %s", source.name, len(source), placement.why)
            # None: where there is a terminal.
            shown = None if self.ranks.is_first and placement.decoding_ranks else True
            with tqdm(desc=f"decoding {source.name}", unit="image", disable=shown, leave=False) as bar:
                self._held[key] = placement.fill(lambda done, n: _show(bar, done, n)), placement.why
        return self._held[key][0]

    def _damage(self, source: Source) -> Damage:
        """The one list of the damaged images of `source`, for all of its loaders."""
        resident = self._resident(source)
        damage = Damage(source.name, len(source), self.data.max_bad_fraction) if resident is None else resident.damage
        return self._damaged.setdefault(_key(source), damage)


def _opened(recipe: Recipe) -> tuple[DataConfig, bool]:
    """What decides which images a recipe opens: all data settings but the choice of the few labels."""
    few = replace(recipe.data, label_fraction=None, labels_per_class=None, label_list=None, label_seed=0)
    return few, recipe.smoke


def _spread(n: int, most: int) -> npt.NDArray[np.int64]:
    """All positions 0..n - 1 where there are at most `most`, else as many spread evenly."""
    return np.linspace(0, n - 1, most).astype(np.int64) if n > most else np.arange(n)


def order_name(data: DataConfig) -> str:
    """The order of a training in words, for result files."""
    return data.order if data.order != "quasi" else f"quasi, {data.window} blocks at a time"


def _key(source: Source) -> tuple[str, str]:
    """What a source is known by: a fingerprint knows names below the root only, which two folders may share."""
    return source.fingerprint, source.describe(0) if len(source) else source.name


def _show(bar: tqdm[NoReturn], done: int, n: int) -> None:
    bar.total = n
    bar.update(done - bar.n)
