"""`fastsimclr predict`: the classes of images, with their probabilities, as CSV."""

# N images of a batch, K classes written

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from fastsimclr.deploy.files import atomic_outputs
from fastsimclr.deploy.sinks import Csv
from fastsimclr.deploy.stream import Pass, StreamConfig


@dataclass(frozen=True, kw_only=True)
class PredictConfig(StreamConfig):
    """Write path,class,probability of images; also print the accuracy where their labels are the run's classes."""

    top: int = 1
    """Classes an image, most probable first: further columns class_2,probability_2 and so on."""


def predict(config: PredictConfig) -> dict[str, object]:
    """Write the file, and return counts and accuracy. Stopped after a signal: it then holds the images done by then."""
    with atomic_outputs(Path(config.out), overwrite=config.overwrite, read=Path(config.images)) as (part,):
        run = Pass(config)
        classifier, classes = run.origin.classifier(), run.origin.classes
        if not 1 <= config.top <= len(classes):
            raise ValueError(f"--top={config.top} must be 1 to {len(classes)}, the classes of {config.run}")
        numbers = ["", *(f"_{rank}" for rank in range(2, config.top + 1))]
        header = ["path", *(f"{what}{number}" for number in numbers for what in ("class", "probability"))]
        labelled, right = 0, 0
        with closing(Csv(part, header)) as table:
            for ids, logits in run.outputs(classifier):
                found = logits.softmax(1).topk(config.top, dim=1)
                named = [[classes[k] for k in row] for row in found.indices.tolist()]
                table.rows(
                    [
                        [path, *(cell for name, p in zip(names, row, strict=True) for cell in (name, f"{p:.6f}"))]
                        for path, names, row in zip(run.paths(ids), named, found.values.tolist(), strict=True)
                    ]
                )
                labels = run.labels(ids)
                labelled += sum(label is not None for label in labels)
                right += sum(label == names[0] for label, names in zip(labels, named, strict=True))
    run.end(config.out)
    known = run.source.classes and set(run.source.classes) <= set(classes)
    accuracy = {"top1": right / labelled} if known and labelled else {}
    return {"images": run.done, "damaged": run.damaged, **accuracy, "file": config.out}
