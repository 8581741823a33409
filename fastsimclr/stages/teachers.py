"""Teachers of a distillation: networks of runs or of a library, and what they say of every image, kept in a file."""

# A all images, K classes

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsimclr.loaders import DataError, Relabelled, Source
from fastsimclr.loaders.draw import Rendering
from fastsimclr.loaders.whole import whole_file
from fastsimclr.models import ModelConfig
from fastsimclr.models.foreign import ForeignNet, Stats, is_foreign, load_foreign
from fastsimclr.recipe import parse_recipe
from fastsimclr.runs import checkpoint
from fastsimclr.runs.log import logger
from fastsimclr.stages.networks import classifier_and_facts, digest, recipe_path
from fastsimclr.stages.setting import Setting

RECORD = "teacher-logits.pt"


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """One teacher, which takes this run's views. model: its architecture; None for a library's network. name: as it was
    given."""

    name: str
    network: nn.Module
    model: ModelConfig | None


def load_teachers(setting: Setting, names: Sequence[str]) -> tuple[Teacher, ...]:
    """The classifiers of runs, or of libraries, which all know the data's classes in the data's order.

    A run that learned from views of another size or normalisation is shown this run's resized and normalised as those.
    DataError naming the teacher and the data, or two teachers, whose classes differ. Every rank calls it.
    """
    val = setting.splits.val
    known: list[tuple[str, tuple[str, ...]]] = []
    teachers = []
    for name in names:
        if is_foreign(name):
            teachers.append(setting.ranks.on_first(lambda name=name: _foreign(setting, name)))  # type: ignore[misc]
            continue
        teacher, its_classes = setting.ranks.on_first(lambda name=name: _of_run(setting, name))  # type: ignore[misc]
        known.append((name, its_classes))
        teachers.append(teacher)
    for name, classes in known:
        if classes != known[0][1]:
            raise DataError(
                f"the teachers {known[0][0]} and {name} do not know the same classes in the same order, but"
                f" {_some(known[0][1])} and {_some(classes)}; give teachers that learned from the same data"
            )
    for name, classes in known:
        if classes != val.classes:
            raise DataError(
                f"the teacher {name} knows {_some(classes)}, the data {val.name} has {_some(val.classes, '')};"
                " use the data that the teacher learned from"
            )
    return tuple(teachers)


def _of_run(setting: Setting, name: str) -> tuple[Teacher, tuple[str, ...]]:
    """The classifier of a run, and its classes."""
    network: nn.Module
    network, facts = classifier_and_facts(Path(name))
    ours = setting.evaluation_policy.rendering
    theirs = parse_recipe(recipe_path(Path(name)).read_text()).views.rendering
    seen, own = _stats(ours), _stats(theirs)
    if seen != own or ours["size"] != theirs["size"]:
        network = ForeignNet(network, seen=seen, network_stats=own, size=theirs["size"]).eval()
    told = [f"{view['size']} px, {view['semantics']}, (mean, std) {_stats(view)}" for view in (theirs, ours)]
    if told[0] != told[1]:
        logger.warning(
            "the teacher %s learned from views of %s; this run's, of %s, are resized and normalised for it,"
            " not cropped and resampled as its own",
            *(name, *told),
        )
    return Teacher(name=name, network=network, model=ModelConfig(**facts["model"])), tuple(facts["classes"])


def _stats(rendering: Rendering) -> Stats | None:
    """(mean, std) with which views are normalised; None: not at all."""
    mean, std = rendering["mean"], rendering["std"]
    return None if mean is None or std is None else (mean, std)


def _some(classes: Sequence[str], noun: str = " classes") -> str:
    return f"{len(classes)}{noun} ({', '.join(classes[:3])}, …)"


def _foreign(setting: Setting, name: str) -> Teacher:
    val, rendering = setting.splits.val, setting.evaluation_policy.rendering
    if not val.classes:
        raise DataError(f"{val.name} names no classes, so the outputs of {name} mean nothing; give class folders")
    network = load_foreign(name, val.classes, val.name, seen=_stats(rendering), size=rendering["size"])
    logger.info("%s: its outputs are %s, …, %s", name, ", ".join(val.classes[:2]), val.classes[-1])
    return Teacher(name=name, network=network, model=None)


def numbered(source: Source) -> Relabelled:
    """`source` with the number of each image for its label, so that a batch says which rows of a record are its."""
    return Relabelled(source, range(len(source)))


def recorded_logits(
    setting: Setting, teacher: nn.Module, source: Relabelled, run: Path, metadata: dict[str, Any]
) -> tuple[Tensor, float]:
    """What `teacher` says of each image of the `numbered` source, float32 [A, K] on the CPU, and the seconds it took.

    Every rank computes its part; an image that cannot be decoded has a row of NaN, which nobody asks for. The result is
    kept in run/teacher-logits.pt with `metadata` and the view; a later call takes it from there, in 0 seconds.
    FileExistsError where that file has other metadata or cannot be read. Every rank calls it.
    """
    path = run / RECORD
    policy = setting.evaluation_policy
    view = {**policy.rendering, "centre_fraction": policy.centre_fraction}
    metadata = {**metadata, "images": len(source), "fingerprint": source.fingerprint, "view": view}
    kept = setting.ranks.on_first(lambda: _read(path, metadata))
    if kept is not None:
        logger.info("the teacher's logits are those in %s", path)
        return kept, 0.0
    begun = time.perf_counter()
    setting.runtime.to_device(teacher)
    found = setting.features(teacher.eval(), source)
    rows, values = setting.ranks.gather_rows(found.labels), setting.ranks.gather_rows(found.values)
    logits_AK = torch.full((len(source), values.shape[1]), torch.nan)
    logits_AK[rows.cpu()] = values.cpu()
    seconds = time.perf_counter() - begun

    def write() -> None:
        run.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            torch.save({"facts": metadata, "logits": logits_AK}, file)

    setting.ranks.on_first(write)
    return logits_AK, seconds


def _read(path: Path, metadata: dict[str, Any]) -> Tensor | None:
    if not path.is_file():
        return None
    remedy = "give the settings and teachers it was made with, delete it, or give another --out"
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
        found, logits = dict(held["facts"]), held["logits"]
    except Exception as error:  # damaged bytes can raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise FileExistsError(f"{path} cannot be read as a teacher's logits ({reason}); {remedy}") from error
    for key, value in metadata.items():
        if found.get(key) != value:
            raise FileExistsError(f"{path} was made with {key}={found.get(key)!r}, this run has {value!r}; {remedy}")
    if logits.shape != (len(logits), len(metadata["classes"])) or len(logits) != metadata["images"]:
        raise FileExistsError(f"{path} holds {list(logits.shape)} logits; {remedy}")
    return torch.as_tensor(logits)


def joint_digest(teachers: Sequence[Teacher]) -> str:
    """The digest of one teacher's weights, or one of those of several, in their order."""
    each = [digest(teacher.network) for teacher in teachers]
    return each[0] if len(each) == 1 else hashlib.sha256("\0".join(each).encode()).hexdigest()[:16]


def refuse_begun(run: Path, resume: bool) -> None:
    """FileExistsError, before the teacher has seen all images, where the trainer would refuse the folder later on."""
    if not resume and (existing := checkpoint.saved(run)):
        raise FileExistsError(
            f"run folder {run} already holds {existing[-1].name}; give --resume auto to continue it, or another --out"
        )
