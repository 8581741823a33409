"""Which labelled images are held out for validation, and which labels the few-label stages may use."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastsimclr.loaders.arrays import Ints
from fastsimclr.loaders.order import epoch_order
from fastsimclr.loaders.sets.basic import Subset
from fastsimclr.loaders.sets.lists import read_label_list, some
from fastsimclr.loaders.source import DataError, Source

# Epochs no run reaches, so that a split and an order of the same seed have nothing in common.
HELD_OUT_EPOCH, LABELS_EPOCH = 0xFFFF_FFFE, 0xFFFF_FFFF


def counts_of(source: Source) -> Ints:
    """How many labelled images each class has, int64 [classes]."""
    labels = source.labels
    return np.bincount(labels[labels >= 0], minlength=len(source.classes)).astype(np.int64)


def stratified(labels: Ints, counts: Ints, seed: int, epoch: int) -> Ints:
    """Positions of counts[c] images of each class c, drawn by the permutation of (seed, epoch); sorted int64 [sum].

    Draws are nested: fewer of a class are a part of more of it.
    """
    order = epoch_order(len(labels), seed, epoch)
    shuffled = labels[order]
    by_class = order[np.argsort(shuffled, kind="stable")]
    first = np.searchsorted(labels[by_class], np.arange(len(counts)))
    chosen = [by_class[start : start + count] for start, count in zip(first, counts, strict=True)]
    return np.sort(np.concatenate([np.empty(0, np.int64), *chosen]))


def hold_out(source: Source, fraction: float, seed: int) -> tuple[Source, Source]:
    """(the rest, the held-out labelled images): `fraction` of each class, at least one of two; one of one stays."""
    counts = counts_of(source)
    held = np.minimum(np.maximum(np.rint(fraction * counts).astype(np.int64), 1), np.maximum(counts - 1, 0))
    chosen = stratified(source.labels, held, seed, HELD_OUT_EPOCH)
    rest = np.setdiff1d(np.arange(len(source)), chosen)
    return Subset(source, rest, f"{source.name}:train"), Subset(source, chosen, f"{source.name}:val")


def few_labels(
    train: Source, *, fraction: float | None, per_class: int | None, listed: Path | None, seed: int
) -> Source:
    """The labelled images of `train` that a few-label stage may use; all of them where nothing is asked for.

    fraction of each class, rounded, at least one; or per_class of each; or those in the file `listed`. The first two
    are drawn by `seed`. Raises DataError for a class without a label, or with fewer than per_class.
    """
    counts = counts_of(train)
    if not counts.size:
        raise DataError(f"{train.name} has no labels; give class folders or data.labels")
    _each_class(train, counts, "the training images")
    few = f"{train.name}:few"
    if listed is not None:
        subset = Subset(train, read_label_list(listed, [train.describe(i) for i in range(len(train))]), few)
        _each_class(train, counts_of(subset), str(listed))
        return subset
    if per_class is not None:
        short = int(np.argmin(counts))
        if counts[short] < per_class:
            raise DataError(
                f"data.labels_per_class={per_class}, but class {train.classes[short]} has {counts[short]} labelled "
                f"training images; use at most {counts[short]}"
            )
        wanted = np.full_like(counts, per_class)
    elif fraction is not None:
        wanted = np.maximum(np.rint(fraction * counts).astype(np.int64), 1)
    else:
        return train
    return Subset(train, stratified(train.labels, wanted, seed, LABELS_EPOCH), few)


def _each_class(train: Source, counts: Ints, where: str) -> None:
    if len(without := np.flatnonzero(counts == 0)):
        names = some([train.classes[label] for label in without])
        raise DataError(
            f"{where}: {counts.sum()} labels for {len(train.classes)} classes, none for {names}; label an image of each"
        )
