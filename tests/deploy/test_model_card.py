"""A model card tells what the files of the run tell, of the exported weights and of no others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fastsimclr.deploy import load_pretrained
from fastsimclr.deploy.export import ExportConfig, export
from fastsimclr.models import ModelConfig
from fastsimclr.recipe import parse_recipe
from fastsimclr.runs import checkpoint
from fastsimclr.stages.evaluation import evaluate_knn
from fastsimclr.stages.networks import digest, load_trained
from fastsimclr.stages.protocols import Protocol, _row
from fastsimclr.stages.published import PUBLISHED

MakeRun = Callable[..., Path]
CLASSES = ("cat", "new\nline")
EIGHTH = ModelConfig(arch="resnet18", width=0.125, stem="imagenet")


def exported(run: Path, out: Path) -> None:
    export(ExportConfig(run=str(run), format="huggingface", out=str(out), overwrite=True))


def evaluation_of(run: Path) -> dict[str, Any]:
    """An evaluation.json of that run as `fastsimclr evaluate` writes it, its rows by stages.protocols."""
    recipe = parse_recipe((run / "recipe.yaml").read_text())
    known = asdict(next(entry for entry in PUBLISHED if entry.stage == "knn"))

    def row(name: str, labels: int, metrics: dict[str, float], published: list[dict[str, Any]]) -> dict[str, Any]:
        protocol = Protocol(name=name, folder=name, stage=evaluate_knn, recipe=recipe)
        return _row(protocol, {"labels": labels, "metrics": metrics, "published": published, "seconds": 1.5})

    rows = [
        row("kNN", 321, {"top1": 0.25}, [known]),
        row("fine-tuned on 10 %", 32, {"top1": 0.5, "top5": 0.75, "ece": 0.1, "nll": 2.0}, []),
    ]
    network = {"run": str(run), "stage": "finetune", "classes": len(CLASSES), "weights": digest(load_trained(run)[0])}
    return {"network": network, "environment": {}, "protocols": rows}


def test_the_model_card_tells_what_the_run_s_files_tell(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("finetune", EIGHTH, 32, CLASSES)
    monkeypatch.chdir(run)
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("root: null", "root: /home/somebody/secret/birds"))
    data = {"source": "birds:train", "images": 5000, "labelled": 321, "val": 77}
    result = {
        "metrics": {"top1": 0.4321},
        "data": data,
        "labels": 123,
        "seconds": 9.4,
        "environment": {"device": "Chip"},
    }
    (run / "result.json").write_text(json.dumps(result))
    evaluation = evaluation_of(run)
    path = run.with_name(f"{run.name}-evaluate") / "evaluation.json"
    path.parent.mkdir()
    path.write_text(json.dumps(evaluation))
    exported(Path(), tmp_path / "h")
    text = (tmp_path / "h" / "README.md").read_text()
    for said in (
        "| top1 | 0.4321 |",
        "`birds:train`: 5,000 images for training, 321 of them with a label that was available, 77 for validation",
        "Labels used: 123. Trained in 9 s on Chip.",
        "| protocol | labels | top1 | top5 | ece | published top1 |",
        "| kNN | 321 | 0.2500 | - | - | 0.4480 (SimCLR v1, R50, 100 epochs, B 256, lightly) |",
        "| fine-tuned on 10 % | 32 | 0.5000 | 0.7500 | 0.1000 | - |",
        "root: birds\n",
        "AutoModelForImageClassification",
        "# license: choose one",
        '"new\\nline"',
    ):
        assert said in text, said
    assert "somebody" not in text
    evaluation["network"]["weights"] = "0123456789abcdef"
    path.write_text(json.dumps(evaluation))
    exported(Path(), tmp_path / "h")
    assert "| kNN" not in (tmp_path / "h" / "README.md").read_text(), "another network's numbers"
    (run / "result.json").unlink()
    path.unlink()
    exported(Path(), tmp_path / "h")
    bare = (tmp_path / "h" / "README.md").read_text()
    assert "## Data" not in bare and "## Metrics" not in bare and "Evaluation" not in bare


def test_metrics_are_those_of_the_exported_checkpoint(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("finetune", EIGHTH, 32, CLASSES)
    (newest,) = checkpoint.saved(run)
    earlier = newest.with_name("step-00000002.pt")
    shutil.copy(newest, earlier)
    for source, metrics in [(newest, {"top1": 0.5}), (earlier, {})]:
        exported(source, tmp_path)
        assert load_pretrained(tmp_path)[1].metrics == metrics
        assert ("## Metrics" in (tmp_path / "README.md").read_text()) == bool(metrics)
