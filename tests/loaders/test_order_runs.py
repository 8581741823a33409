"""The order of a run stays with it: resumed where there is more room or less, from a disk or from a server."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastsimclr.cli.main import main
from fastsimclr.runs import checkpoint
from fastsimclr.runs.log import read_records
from tests.loaders.pictures import encoded, put
from tests.loaders.tars import tar
from tests.loaders.web import Web, listed

pytestmark = pytest.mark.usefixtures("quick")
QUASI = "quasi, 2 blocks at a time"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The order of every sum is given."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Runs:
    """Pretraining on six shards of 16 images: on a web server with room for four of them, or on the disk."""

    def __init__(self, web: Web, folder: Path) -> None:
        random, files = np.random.default_rng(0), {}
        for k in range(6):
            names = [f"{k}{i:02d}" for i in range(16)]
            images = [Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8)) for _ in names]
            pairs = zip(names, images, strict=True)
            members = [
                f for name, image in pairs for f in ((f"{name}.png", encoded(image, "PNG")), (f"{name}.cls", b"1"))
            ]
            files[f"/o-{k}.tar"] = tar(members)
        web.files = files
        listed(web, folder)
        put(folder / "disk", {name[1:]: data for name, data in files.items()})
        room = 4 * len(files["/o-0.tar"]) / 2**30
        self.far = ("--data.root", f"{web.url}/o-{{0..5}}.tar", "--data.cache_gib", str(room))
        self.near = ("--data.root", str(folder / "disk"))
        self.folder = folder

    def run(self, name: str, *words: str) -> Path:
        """The folder of a run to its end, of seven steps."""
        assert main(self.words(name, *words)) == 0
        return self.folder / name

    def words(self, name: str, *words: str) -> list[str]:
        fixed = (
            "pretrain --config folder.yaml --device cpu --trainer.precision fp32 --views.size 8 --model.arch resnet18"
            " --model.width 0.125 --data.source shards --data.loader native --data.val_fraction 0.01 --data.window 2"
            f" --data.cache {self.folder}/cache-{name} --pretrain.batch 16 --pretrain.epochs 1"
            " --pretrain.optim.warmup_epochs 0 --trainer.log_every_steps 1 --trainer.checkpoint_every_steps 2"
            " --trainer.keep_checkpoints 9"
        )
        return [*fixed.split(), "--out", str(self.folder / name), *words]

    def cut_off(self, run: Path, name: str, step: int = 2) -> Path:
        """A copy of a run that ended with the checkpoint of `step`."""
        copy = Path(shutil.copytree(run, self.folder / name))
        for path in checkpoint.saved(copy):
            if path.name != f"step-{step:08d}.pt":
                path.unlink()
        return copy


@pytest.fixture
def runs(web: Web, tmp_path: Path) -> Runs:
    return Runs(web, tmp_path)


def losses(run: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_records(run / "metrics.jsonl") if r["kind"] == "train"]


def order_of(run: Path) -> str:
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    return str(found["implementations"]["order"])


@pytest.mark.slow
def test_a_run_begun_with_little_room_goes_on_from_a_disk(runs: Runs, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        whole = runs.run("whole", *runs.far)
    lines = [line for line in caplog.messages if "data.order=auto" in line]
    assert lines == [
        f"shards:o-{{0..5}}.tar:train: data.order=auto: {QUASI}, its shards do not fit data.cache_gib together"
    ]
    assert order_of(whole) == QUASI
    assert checkpoint.load(checkpoint.newest(whole))["facts"].items() >= {"order": "quasi", "window": 2}.items()
    assert len(losses(whole)) == 95 // 16 + 1
    caplog.clear()
    again = runs.cut_off(whole, "again")
    with caplog.at_level(logging.INFO):
        runs.run("again", *runs.near, "--resume", "auto", "--data.window", "5")
    (said,) = [line for line in caplog.messages if "data.order=auto" in line]
    assert said.endswith(f"{QUASI}, as the run began")
    assert losses(again) == losses(whole)
    assert order_of(again) == QUASI


@pytest.mark.slow
def test_another_order_asked_for_by_name_is_another_run(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    whole = runs.run("whole", *runs.far)
    for order, wrong in (
        (("random",), "order='quasi', this run has order='random'"),
        (("quasi", "--data.window", "3"), "window=2, this run has window=3"),
    ):
        runs.cut_off(whole, "other")
        assert main(runs.words("other", *runs.near, "--resume", "auto", "--data.order", *order)) == 1
        assert wrong in capsys.readouterr().err
        shutil.rmtree(runs.folder / "other")


@pytest.mark.slow
def test_a_run_begun_on_a_disk_goes_on_with_little_room(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    whole = runs.run("whole", *runs.near)
    assert order_of(whole) == "random"
    state = checkpoint.load(checkpoint.newest(whole))
    assert state["facts"]["order"] == "random" and "window" not in state["facts"]
    again = runs.cut_off(whole, "again")
    # As an earlier version wrote it, which had no other order.
    early = checkpoint.load(checkpoint.newest(again))
    early["facts"].pop("order")
    checkpoint.save(again, {key: value for key, value in early.items() if key != "format"}, keep=9)
    assert main(runs.words("again", *runs.far, "--resume", "auto", "--data.order", "quasi")) == 1
    assert "order='random', this run has order='quasi'" in capsys.readouterr().err
    runs.run("again", *runs.far, "--resume", "auto")
    assert losses(again) == losses(whole)
    assert order_of(again) == "random"
    # The two orders are not the same by chance.
    assert losses(runs.run("quasi", *runs.near, "--data.order", "quasi"))[:2] != losses(whole)[:2]
