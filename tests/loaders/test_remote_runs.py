"""Processes that read remote shards and are killed: a download is gone on with, a run is resumed from elsewhere."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastsimclr.cli.main import main
from fastsimclr.loaders.shards.cache import ShardCache
from fastsimclr.runs.log import read_records
from tests.loaders.tars import PER_SHARD, SIZE, noise, tar
from tests.loaders.web import ALL, Web, assert_whole, cut, kept, listed, of, status, until

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("quick")


READ_ALL = """
import hashlib, sys
from pathlib import Path
from fastsimclr.loaders.shards.cache import ShardCache
from fastsimclr.loaders.shards.source import open_shards
source = open_shards(sys.argv[1] + "/t-{0..3}.tar", ShardCache(Path(sys.argv[2])))
print("open", flush=True)
print(hashlib.sha256(b"".join(source.read(i) for i in range(len(source)))).hexdigest())
"""


def reader(web: Web, cache: ShardCache) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", READ_ALL, web.url, str(cache.folder)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
def test_a_killed_download_is_gone_on_with_and_shared(web: Web, cache: ShardCache, tmp_path: Path) -> None:
    listed(web, tmp_path)
    web.pause_s = 0.05  # 0.4 s a shard
    first = reader(web, cache)
    half = "*t-1.tar.*.part"
    until(lambda: any(path.stat().st_size >= 16384 for path in cache.folder.glob(half)) or first.poll() is not None)
    first.kill()
    _, said = first.communicate()
    assert first.returncode == -signal.SIGKILL, said
    (part,) = cache.folder.glob("*.part")
    assert 0 < (had := part.stat().st_size) < SIZE
    web.asked.clear()
    second = reader(web, cache)
    assert second.stdout is not None
    assert second.stdout.readline() == "open\n"
    assert_whole(of(web, cache))  # here, at the same time
    out, said = second.communicate(timeout=60)
    assert out.strip() == hashlib.sha256(b"".join(noise(i) for i in range(4 * PER_SHARD))).hexdigest(), said
    assert web.gets("/t-0.tar") == []
    assert web.gets("/t-1.tar") == [f"bytes={had}-"]
    assert web.gets("/t-2.tar") == web.gets("/t-3.tar") == [""]
    assert kept(cache) == ALL


def images() -> dict[str, bytes]:
    """Four shards of 24 images of 12 x 12 pixels."""
    rng = np.random.default_rng(0)
    shards = {}
    for k in range(4):
        files = []
        for i in range(24):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(buffer, "PNG")
            files += [(f"{k}{i:02d}.png", buffer.getvalue()), (f"{k}{i:02d}.cls", b"%d" % (i % 2))]
        shards[f"i-{k}.tar"] = tar(files)
    return shards


def pretrain(root: str, out: Path, cache: Path, *options: str) -> list[str]:
    """The command."""
    words = (
        "pretrain --config folder.yaml --device cpu --trainer.precision fp32 --views.size 8 --model.arch resnet18"
        " --model.width 0.125 --data.source shards --data.loader native --data.val_fraction 0.01"
        f" --data.root {root} --data.cache {cache} --pretrain.batch 16 --pretrain.epochs 3"
        " --pretrain.optim.warmup_epochs 0 --trainer.log_every_steps 1 --trainer.checkpoint_every_steps 3"
    )
    return [*words.split(), "--out", str(out), *options]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_records(run / "metrics.jsonl") if r["kind"] == "train"]


def killed_after(step: int, words: list[str], run: Path) -> None:
    """The command in its own process, until it has logged `step`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fastsimclr", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics = run / "metrics.jsonl"
    until(lambda: (metrics.is_file() and f'"step": {step},' in metrics.read_text()) or process.poll() is not None)
    process.kill()
    said, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, said


@pytest.mark.slow
def test_a_run_over_http_and_s3_killed_and_resumed_is_the_run_from_the_disk(
    web: Web, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes have: the order of every sum is given
    shards = images()
    (tmp_path / "disk").mkdir()
    for name, data in shards.items():
        (tmp_path / "disk" / name).write_bytes(data)
        s3.pipe_file(f"bucket/run/{name}", data)
    web.files = {f"/{name}": data for name, data in shards.items()}
    web.faults = {f"/{name}": [cut(9_000), status(500)] for name in shards}
    assert main(pretrain(f"{tmp_path}/disk/i-*.tar", tmp_path / "alone", tmp_path / "c0")) == 0
    run = tmp_path / "run"
    # Room for three shards of four, so that some are fetched again and again.
    options = ["--data.cache_gib", str(3 * len(shards["i-0.tar"]) / 2**30), "--resume", "auto"]
    http, in_s3 = f"{web.url}/i-{{0..3}}.tar", "s3://bucket/run/i-{0..3}.tar"
    killed_after(4, pretrain(http, run, tmp_path / "c1", *options), run)
    assert 4 <= losses(run)[-1][0] < len(losses(tmp_path / "alone"))
    killed_after(10, pretrain(in_s3, run, tmp_path / "c2", *options), run)
    assert 10 <= losses(run)[-1][0] < len(losses(tmp_path / "alone"))
    assert main(pretrain(http, run, tmp_path / "c1", *options)) == 0
    assert losses(run) == losses(tmp_path / "alone")
    assert [step for step, _ in losses(run)] == list(range(1, 94 * 3 // 16 + 2))
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "fetch"])
    assert len(kept(ShardCache(tmp_path / "c1"))) <= 3
    torch.set_num_threads(threads)
