"""Runs made of Google's checkpoints: what is written, and that the other stages take them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser

from fastsimclr.cli.main import main
from fastsimclr.models import ModelConfig, SimCLRNet
from fastsimclr.recipe import parse_recipe
from fastsimclr.runs import checkpoint
from fastsimclr.stages.imported import add_import_arguments, import_tf, run_import
from fastsimclr.stages.networks import load_classifier, load_encoder, load_simclr
from tests.models.google_graph import RELATIVE, Graph, averages, error, save, tiny_graph


@pytest.fixture(scope="module")
def tiny() -> Graph:
    return tiny_graph(torch.rand(2, 16, 16, 3))


def test_imported_runs_load_as_any_other(tiny: Graph, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = import_tf(save(tiny, tmp_path), out, "raw", head_layer=1)
    assert result == json.loads((out / "result.json").read_text())
    assert result["imported"]["weights"] == "raw" and result["imported"]["averages"] == "none"
    assert result["imported"]["step"] == 1234 and result["imported"]["variables"] == len(tiny.variables) - 1
    assert result["imported"]["classifier"]["run"] == str(out / "classifier")
    recipe = parse_recipe((out / "recipe.yaml").read_text())
    assert (recipe.views.semantics, recipe.views.normalise, recipe.views.size) == ("tensorflow", "none", 32)
    assert recipe.model == ModelConfig(
        arch="resnet18", width=0.125, stem="cifar", project_first=True, head_layers=3, head_dim=24
    )
    assert checkpoint.newest(out).name == "step-00001234.pt"
    torch.manual_seed(0)
    images = torch.rand(2, 16, 16, 3)
    graph = tiny_graph(images)
    network: SimCLRNet = load_simclr(out)[0].eval()
    classifier, classes = load_classifier(out / "classifier")
    assert classes == tuple("0123456789")
    with torch.inference_mode():
        h, z = network(images.permute(0, 3, 1, 2))
        assert error(h, graph.endpoints["final_avg_pool"]) < RELATIVE
        assert error(z, graph.endpoints["projection"]) < RELATIVE
        assert (
            error(load_encoder(out)[0].eval()(images.permute(0, 3, 1, 2)), graph.endpoints["final_avg_pool"]) < RELATIVE
        )
        assert error(classifier.eval()(images.permute(0, 3, 1, 2)), graph.endpoints["logits"]) < RELATIVE
    with pytest.raises(FileExistsError, match="already holds a run; give another --out"):
        import_tf(tmp_path / "model.ckpt-1234", out)


def test_the_classifiers_layer_is_asked_for_where_it_cannot_be_known(tiny: Graph, tmp_path: Path) -> None:
    source = save(tiny, tmp_path)
    found = import_tf(source, tmp_path / "without")["imported"]["classifier"]
    assert found == {
        "classes": 10,
        "features": 64,
        "head_layer": None,
        "head_layers_of_that_width": [0, 1, 2],
        "run": None,
    }
    assert not (tmp_path / "without" / "classifier").exists()
    with pytest.raises(ValueError, match=r"takes 64 features.* have \[64, 64, 64, 24\]; use one of \[0, 1, 2\]"):
        import_tf(source, tmp_path / "wrong", head_layer=3)
    assert not (tmp_path / "wrong").exists()
    graph = Graph("resnet18", 8, cifar=True)
    graph.build(torch.rand(1, 8, 8, 3), head=2)
    bare = save(graph, tmp_path)
    with pytest.raises(ValueError, match="has no classifier"):
        import_tf(bare, tmp_path / "none", head_layer=1)
    assert import_tf(bare, tmp_path / "none")["imported"]["classifier"] is None


QUICK = ("--smoke", "--device", "cpu", "--trainer.precision", "fp32")


@pytest.mark.slow
def test_an_imported_run_can_be_fine_tuned(tiny: Graph, tmp_path: Path) -> None:
    run = tmp_path / "run"
    import_tf(save(tiny, tmp_path), run)
    tuned = ("--finetune.optim.lr", "0", "--data.labels_per_class", "2")
    assert main(["finetune", "--from", str(run), "--out", str(tmp_path / "finetune"), *QUICK, *tuned]) == 0
    before = checkpoint.load(checkpoint.newest(run))["objective"]
    after = checkpoint.load(checkpoint.newest(tmp_path / "finetune"))["objective"]
    kept = [key for key in after if key.endswith("weight") and "classifier" not in key]
    assert len(kept) > 40 and all(torch.equal(before[key], after[key]) for key in kept)


def test_an_imported_run_can_be_evaluated(tiny: Graph, tmp_path: Path) -> None:
    run = tmp_path / "run"
    import_tf(save(tiny, tmp_path), run)
    assert main(["knn", "--from", str(run), "--out", str(tmp_path / "knn"), *QUICK]) == 0
    assert json.loads((tmp_path / "knn" / "result.json").read_text())["metrics"]["top1"] > 0


def test_the_command_says_what_it_imported(tiny: Graph, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, parser = save(tiny, tmp_path, averages), ArgumentParser()
    add_import_arguments(parser)
    run_import(parser.parse_args([str(source), "--out", str(tmp_path / "a")]))
    first = capsys.readouterr().out
    assert f"{source}: resnet18, width 0.125, cifar stem, 3 head layers, step 1234\n" in first
    assert "weights: ema (the moving averages of the checkpoint)\n" in first
    assert f"variables: {len(tiny.variables) - 1}; of the optimizer, left out: 26\n" in first
    assert "10 classes on 64 features; not imported: head layers [0, 1, 2] are so wide" in first
    run_import(
        parser.parse_args([str(tmp_path), "--out", str(tmp_path / "b"), "--weights", "raw", "--head-layer", "2"])
    )
    second = capsys.readouterr().out
    assert "weights: raw (its moving averages are left out)\n" in second
    assert f"10 classes on 64 features of head layer 2: {tmp_path / 'b' / 'classifier'}\n" in second
    assert f"result: {tmp_path / 'b' / 'result.json'}\n" in second
