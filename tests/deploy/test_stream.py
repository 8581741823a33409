"""embed and predict: the right rows, in flat memory over 10,000 images, and valid files after a signal."""

from __future__ import annotations

import csv
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image

from fastsimclr.cli.deploy import add_deploy, run_deploy
from fastsimclr.deploy import sinks
from fastsimclr.deploy.embed import EmbedConfig, embed
from fastsimclr.deploy.images import open_images
from fastsimclr.deploy.predict import PredictConfig, predict
from fastsimclr.loaders import DataError
from fastsimclr.models import ModelConfig
from fastsimclr.stages.networks import load_classifier, load_simclr

MakeRun = Callable[..., Path]
ROOT = Path(__file__).parents[2]
CLASSES = ("cat, tabby", 'dog "x"', "new\nline")
IMAGES, AT = 10_000, 1_000


def pictures(count: int, seed: int) -> list[Image.Image]:
    """Smooth pictures of 32 x 32 pixels."""
    generator = np.random.default_rng(seed)
    coarse = [Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)) for _ in range(count)]
    return [picture.resize((32, 32), Image.Resampling.BICUBIC) for picture in coarse]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six PNGs in folders of two classes, one in each with a name that CSV must quote."""
    root = tmp_path / "images"
    names = ["cat, tabby/0.png", "cat, tabby/1,5.png", "cat, tabby/2.png", 'dog "x"/0.png', 'dog "x"/a\nb.png']
    for name, picture in zip([*names, 'dog "x"/ä.png'], pictures(6, 1), strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(root / name)
    return root


def seen(folder: Path, names: list[str]) -> torch.Tensor:
    """What a network of 32 px sees of PNGs of that size: their normalised pixels, by Pillow and plain arithmetic."""
    pixels = np.stack([np.asarray(Image.open(folder / name)) for name in names])
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return torch.from_numpy(((pixels / 255 - mean) / std).astype(np.float32)).permute(0, 3, 1, 2)


def table(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def embedded(run: Path, images: Path, out: Path, **options: Any) -> dict[str, object]:
    return embed(EmbedConfig(run=str(run), images=str(images), out=str(out), device="cpu", **options))


def predicted(run: Path, images: Path, out: Path, **options: Any) -> dict[str, object]:
    return predict(PredictConfig(run=str(run), images=str(images), out=str(out), device="cpu", **options))


def close(found: npt.NDArray[Any], expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert found.shape == expected.shape
    assert np.abs(found.astype(np.float32) - expected.numpy()).max() <= tolerance * expected.abs().max().item()


@pytest.mark.parametrize("layer", ["encoder", "0", "2", "projection"])
def test_npy_holds_the_layer_asked_for_in_the_order_of_the_paths(
    make_run: MakeRun, folder: Path, tmp_path: Path, layer: str
) -> None:
    run = make_run("pretrain", ModelConfig(arch="resnet18", width=0.125, head_dim=16, head_layers=3))
    done = embedded(run, folder, tmp_path / "out" / "e.npy", layer=layer, batch=4)
    header, *rows = table(tmp_path / "out" / "e.csv")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    assert header == ["path", "label"] and rows == [[name, name.split("/")[0]] for name in names]
    network = load_simclr(run)[0].eval()
    with torch.no_grad():
        h, z = network(seen(folder, names))
        expected = {"2": network.head.forward_to(h, 2), "projection": z}.get(layer, h)
    found = np.load(tmp_path / "out" / "e.npy", mmap_mode="r")
    assert found.dtype == np.float32 and found.offset == 128
    close(found, expected)
    assert done == {
        "images": 6,
        "damaged": 0,
        "features": expected.shape[1],
        "file": str(tmp_path / "out" / "e.npy"),
    }
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["e.csv", "e.npy"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parquet_and_half_precision(make_run: MakeRun, folder: Path, tmp_path: Path, dtype: str) -> None:
    run = make_run("finetune", classes=CLASSES, head_layer=1)
    (folder / "labels.csv").write_text('path,label\n"cat, tabby/2.png",tom\n', encoding="utf-8")
    embedded(run, folder, tmp_path / "e.parquet", dtype=dtype, layer="1", batch=4)
    embedded(run, folder, tmp_path / "e.npy", dtype=dtype, layer="1", batch=4)
    found = pyarrow.parquet.read_table(tmp_path / "e.parquet")
    assert str(found.schema.field("embedding").type).startswith("fixed_size_list<")
    assert pyarrow.parquet.ParquetFile(tmp_path / "e.parquet").num_row_groups == 2
    rows = np.array(found.column("embedding").to_pylist(), dtype=dtype)
    array = np.load(tmp_path / "e.npy")
    assert np.array_equal(rows, array) and array.dtype == dtype
    names, labels = found.column("path").to_pylist(), found.column("label").to_pylist()
    assert [[name, label or ""] for name, label in zip(names, labels, strict=True)] == table(tmp_path / "e.csv")[1:]
    assert labels == [None, None, "tom", None, None, None]
    network = load_classifier(run)[0].eval()
    with torch.no_grad():
        expected = network.head.forward_to(network.encoder(seen(folder, names)), 1)
    close(rows, expected, 1e-4 if dtype == "float32" else 1e-3)


def test_layers_that_a_run_lacks_are_named(make_run: MakeRun, folder: Path, tmp_path: Path) -> None:
    run = make_run("finetune", classes=CLASSES, head_layer=1)
    with pytest.raises(ValueError, match=r"--layer=projection: .* no whole projection head; use 0\.\.1"):
        embedded(run, folder, tmp_path / "x.npy", layer="projection")
    with pytest.raises(ValueError, match=r"--layer=2 is no layer of .*; use encoder or 0\.\.1"):
        embedded(run, folder, tmp_path / "x.npy", layer="2")


def test_lists_of_images(make_run: MakeRun, folder: Path, tmp_path: Path) -> None:
    run = make_run("pretrain")
    outside = folder.parent / "elsewhere.png"
    pictures(1, 2)[0].save(outside)
    plain = folder / "list.txt"
    plain.write_text(f'{outside}\n\ndog "x"/0.png\ncat, tabby/2.png\n')
    labelled = folder / "some.csv"
    labelled.write_text('path,label\n"dog ""x""/0.png",dog\n"cat, tabby/2.png","a, b"\n')
    embedded(run, plain, tmp_path / "plain.npy")
    embedded(run, labelled, tmp_path / "labelled.npy")
    assert table(tmp_path / "plain.csv")[1:] == [[str(outside), ""], ["cat, tabby/2.png", ""], ['dog "x"/0.png', ""]]
    assert table(tmp_path / "labelled.csv")[1:] == [["cat, tabby/2.png", "a, b"], ['dog "x"/0.png', "dog"]]
    with torch.no_grad():
        expected = load_simclr(run)[0].eval()(seen(folder, [str(outside), "cat, tabby/2.png", 'dog "x"/0.png']))[0]
    close(np.load(tmp_path / "plain.npy"), expected)
    close(np.load(tmp_path / "labelled.npy"), expected[1:])
    plain.write_text("a.png\na.png\n")
    with pytest.raises(DataError, match=r"list\.txt:2: a\.png is listed twice"):
        open_images(plain)
    plain.write_text("\n")
    with pytest.raises(DataError, match=r"list\.txt names no image"):
        open_images(plain)
    with pytest.raises(DataError, match="is no list of images"):
        open_images(outside)
    with pytest.raises(DataError, match="does not exist; give a folder"):
        embedded(run, tmp_path / "none", tmp_path / "x.npy")
    with pytest.raises(FileExistsError, match=r"some\.csv would replace what is read"):
        embedded(run, labelled, folder / "some.npy", overwrite=True)


def test_predictions_their_quoting_and_the_accuracy(make_run: MakeRun, folder: Path, tmp_path: Path) -> None:
    run = make_run("supervised", classes=CLASSES)
    done = predicted(run, folder, tmp_path / "p.csv", top=2, batch=4)
    header, *rows = table(tmp_path / "p.csv")
    assert header == ["path", "class", "probability", "class_2", "probability_2"]
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    with torch.no_grad():
        chances = load_classifier(run)[0].eval()(seen(folder, names)).softmax(1)
    ranked = chances.argsort(dim=1, descending=True)[:, :2]
    assert [row[0] for row in rows] == names
    assert [row[1::2] for row in rows] == [[CLASSES[k] for k in row] for row in ranked.tolist()]
    close(np.array([row[2::2] for row in rows], dtype=np.float32), chances.gather(1, ranked))
    right = [CLASSES[k] == name.split("/")[0] for k, name in zip(ranked[:, 0].tolist(), names, strict=True)]
    assert done == {"images": 6, "damaged": 0, "top1": sum(right) / 6, "file": str(tmp_path / "p.csv")}
    (folder / 'dog "x"').rename(folder / "mouse")
    assert "top1" not in predicted(run, folder, tmp_path / "p.csv", overwrite=True)
    assert table(tmp_path / "p.csv")[0] == ["path", "class", "probability"]
    with pytest.raises(ValueError, match="--top=4 must be 1 to 3"):
        predicted(run, folder, tmp_path / "q.csv", top=4)
    with pytest.raises(ValueError, match="stage pretrain, which has no classifier"):
        predicted(make_run("pretrain"), folder, tmp_path / "q.csv")


def test_damaged_images_are_left_out_and_named(
    make_run: MakeRun, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run("supervised", classes=CLASSES)  # its recipe allows a quarter
    embedded(run, folder, tmp_path / "whole.npy")
    bad = folder / "cat, tabby" / "1,5.png"
    bad.write_bytes(bad.read_bytes()[:200])
    with caplog.at_level(logging.WARNING):
        done = embedded(run, folder, tmp_path / "rest.npy", batch=2)
    assert (done["images"], done["damaged"]) == (5, 1)
    assert str(bad) in caplog.text and "1 of 6 images are damaged and left out" in caplog.text
    whole = np.load(tmp_path / "whole.npy")
    close(np.load(tmp_path / "rest.npy"), torch.from_numpy(np.delete(whole, 1, axis=0)))
    names = [row[0] for row in table(tmp_path / "rest.csv")]
    assert len(names) == 6 and "cat, tabby/1,5.png" not in names
    with pytest.raises(DataError, match=r"over data\.max_bad_fraction=0\.1"):
        predicted(run, folder, tmp_path / "p.csv", max_bad_fraction=0.1)
    assert not list(tmp_path.glob("p.csv*"))


def test_bad_requests_are_named(
    make_run: MakeRun, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("pretrain", ModelConfig(arch="resnet18", width=0.125, head_layers=0))
    with pytest.raises(ValueError, match=r"must end in \.npy or \.parquet"):
        embedded(run, folder, tmp_path / "e.npz")
    with pytest.raises(ValueError, match="--batch=0 must be 1 or more"):
        predicted(run, folder, tmp_path / "p.csv", batch=0)
    with pytest.raises(ValueError, match="--layer=projection"):
        embedded(run, folder, tmp_path / "e.npy", layer="projection")
    (tmp_path / "e.csv").write_text("mine")
    with pytest.raises(FileExistsError, match=r"e\.csv exists; .*--overwrite"):
        embedded(run, folder, tmp_path / "e.npy")
    assert (tmp_path / "e.csv").read_text() == "mine"
    monkeypatch.setattr("fastsimclr.deploy.files.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'needs pyarrow; run: pip install "fastsimclr\[parquet\]"'):
        embedded(run, folder, tmp_path / "f.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.csv", "images"]


def test_a_feature_beyond_half_precision_is_refused(make_run: MakeRun, folder: Path, tmp_path: Path) -> None:
    run = make_run("pretrain")
    (path,) = (run / "checkpoints").iterdir()
    state = torch.load(path, weights_only=True)
    state["objective"]["network.encoder.layer4.1.bn2.weight"] *= 1e6
    torch.save(state, path)
    embedded(run, folder, tmp_path / "e.npy")
    with pytest.raises(ValueError, match=r"over float16's 65504; use float32"):
        embedded(run, folder, tmp_path / "h.npy", dtype="float16")
    assert not list(tmp_path.glob("h*"))


def test_the_command_line(make_run: MakeRun, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run("supervised", classes=CLASSES)
    words = {
        "predict": ["--images", str(folder), "--out", str(tmp_path / "p.csv"), "--top", "2", "--device", "cpu"],
        "embed": ["--images", str(folder), "--out", str(tmp_path / "e.npy"), "--precision", "bf16"],
        "export": ["--format", "safetensors", "--out", str(tmp_path / "w.safetensors"), "--part", "encoder"],
    }
    for name, given in words.items():
        for more in ([], ["--overwrite"]) if name == "predict" else ([],):
            parser = ArgumentParser(exit_on_error=False)
            add_deploy(name, parser)
            assert run_deploy(name, parser.parse_args(["--from", str(run), *given, *more])) == 0
            assert f"file: {given[given.index('--out') + 1]}\n" in capsys.readouterr().out
        for option in parser.format_help().split("\n  --")[1:]:
            assert len(option.split()) > 4, f"no help: {option}"


@pytest.mark.parametrize(
    ("name", "out", "signum"),
    [
        ("embed", "part.npy", signal.SIGINT),
        ("embed", "part.parquet", signal.SIGTERM),
        ("predict", "part.csv", signal.SIGTERM),
    ],
)
def test_after_a_signal_the_file_holds_the_batches_that_were_done(
    make_run: MakeRun,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    out: str,
    signum: int,
) -> None:
    parser = ArgumentParser(exit_on_error=False)
    add_deploy(name, parser)
    words = ["--from", str(make_run("supervised", classes=CLASSES)), "--images", str(folder), "--device", "cpu"]

    def rows(file: str) -> list[Any]:
        """Write `file` and return its rows, each with its path."""
        codes.append(run_deploy(name, parser.parse_args([*words, "--batch", "2", "--out", str(tmp_path / file)])))
        if file.endswith("parquet"):
            return list(pyarrow.parquet.read_table(tmp_path / file).to_pylist())
        named = table((tmp_path / file).with_suffix(".csv"))[1:]
        if name == "predict":
            return named
        return list(zip(named, np.load(tmp_path / file).tolist(), strict=True))

    codes = list[int]()
    complete = rows(out.replace("part", "complete"))
    sink, method = {".npy": (sinks.Npy, "write"), ".parquet": (sinks.Parquet, "write"), ".csv": (sinks.Csv, "rows")}[
        Path(out).suffix
    ]
    write, calls = getattr(sink, method), list[int]()

    def watched(self: Any, first: Any, *rest: Any) -> None:
        write(self, first, *rest)
        calls.append(len(first))
        if len(calls) == 2:
            signal.raise_signal(signum)

    monkeypatch.setattr(sink, method, watched)
    capsys.readouterr()
    assert rows(out) == complete[:4] and len(complete) == 6
    assert codes == [0, 128 + signum] and calls == [2, 2]
    said = f"stopped: {tmp_path / out} holds 4 of 6 images, in the order of their paths"
    assert capsys.readouterr().err.splitlines()[-1] == said
    assert not list(tmp_path.glob("*.part"))


# One process a command, as in use: it notes its memory as rows are written, and sends itself a signal on the way.
_SCRIPT = """
import json, os, sys
from jsonargparse import ArgumentParser
from fastsimclr.deploy import sinks
from fastsimclr.cli.deploy import add_deploy, run_deploy

name, at, signum, *words = sys.argv[1:]
rows, resident = 0, []

def watched(method):
    def write(self, first, *rest):
        global rows
        method(self, first, *rest)
        rows += len(first)
        resident.append((rows, int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")))
        if rows >= int(at) > 0 and rows - len(first) < int(at):
            os.kill(os.getpid(), int(signum))
    return write

sinks.Npy.write, sinks.Parquet.write = watched(sinks.Npy.write), watched(sinks.Parquet.write)
if name == "predict":
    sinks.Csv.rows = watched(sinks.Csv.rows)
parser = ArgumentParser()
add_deploy(name, parser)
code = run_deploy(name, parser.parse_args(words))
print(json.dumps(resident))
sys.exit(code)
"""


@dataclass(frozen=True)
class Many:
    """10,000 files (50 different JPEGs) in ten class folders, a run, and a place for what is written."""

    images: Path
    run: Path
    out: Path

    def call(self, name: str, out: str, at: int = 0, signum: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a command over all images in a process of its own, with a signal once `at` rows are written."""
        words = [name, str(at), str(signum), "--from", str(self.run), "--images", str(self.images), "--device", "cpu"]
        return subprocess.run(
            [sys.executable, "-c", _SCRIPT, *words, "--out", str(self.out / out), "--threads", "1"],
            cwd=ROOT,
            # Blocks of 64 KiB and more go back to the system once freed, so that what is resident is what is in use.
            env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
            capture_output=True,
            text=True,
            timeout=300,
        )


@pytest.fixture(scope="module")
def many(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Many:
    root = tmp_path_factory.mktemp("many")
    for index, picture in enumerate(pictures(50, 3)):
        picture.save(root / f"{index}.jpg")
    images = root / "images"
    for index in range(IMAGES):
        place = images / f"class{index % 10}"
        place.mkdir(parents=True, exist_ok=True)
        os.link(root / f"{index % 50}.jpg", place / f"{index:05d}.jpg")
    return Many(images, make_run("supervised", size=16, classes=tuple(f"class{k}" for k in range(10))), root)


# Measured 0.1 to 2.0 MB, and one step of 3.9 MB where one more batch of crops was in the making than before: the loader
# keeps that buffer for the next. Were anything kept of each, 8,000 images would add 25 MB decoded and 25 MB as views.
ONE_BATCH = 256 * 3 * 64 * 64 * 9 // 8
FLAT = 3e6 + ONE_BATCH


def growth(stdout: str) -> int:
    """Bytes of resident memory that came between the 2,000th and the last row."""
    resident = json.loads(stdout.splitlines()[-1])
    assert resident[-1][0] == IMAGES
    return int(resident[-1][1] - next(size for rows, size in resident if rows >= 2000))


@pytest.mark.slow
def test_embed_of_10_000_images_in_flat_memory_and_stopped_on_the_way(many: Many) -> None:
    whole = many.call("embed", "whole.npy")
    assert whole.returncode == 0, whole.stderr
    assert growth(whole.stdout) < FLAT
    every, rows = np.load(many.out / "whole.npy", mmap_mode="r"), table(many.out / "whole.csv")
    assert every.shape == (IMAGES, 64) and len(rows) == IMAGES + 1
    assert rows[1:] == [[f"class{k}/{i:05d}.jpg", f"class{k}"] for k in range(10) for i in range(k, IMAGES, 10)]
    source = np.array([int(name[-9:-4]) % 50 for name, _ in rows[1:]])
    assert np.abs(every - every[[np.flatnonzero(source == k)[0] for k in range(50)]][source]).max() < 1e-4

    for out, signum, code in [("part.npy", signal.SIGINT, 130), ("part.parquet", signal.SIGTERM, 143)]:
        stopped = many.call("embed", out, AT, signum)
        assert stopped.returncode == code, stopped.stderr
        done = -(-AT // 256) * 256
        said = f"stopped: {many.out / out} holds {done:,} of {IMAGES:,} images, in the order of their paths"
        assert stopped.stderr.splitlines()[-1] == said and "Traceback" not in stopped.stderr
        if out.endswith("npy"):
            part = np.load(many.out / out, mmap_mode="r")
            assert table(many.out / "part.csv") == rows[: done + 1]
        else:
            found = pyarrow.parquet.read_table(many.out / out)
            part = np.array(found.column("embedding").to_pylist(), dtype=np.float32)
            assert found.column("path").to_pylist() == [name for name, _ in rows[1 : done + 1]]
        assert np.array_equal(part, every[:done])
    assert not list(many.out.glob("*.part"))


@pytest.mark.slow
def test_predict_of_10_000_images_in_flat_memory_and_stopped_on_the_way(many: Many) -> None:
    whole = many.call("predict", "whole-p.csv")
    assert whole.returncode == 0, whole.stderr
    assert growth(whole.stdout) < FLAT
    rows = table(many.out / "whole-p.csv")
    assert len(rows) == IMAGES + 1
    right = sum(name.partition("/")[0] == found for name, found, _ in rows[1:])
    assert f"top1: {right / IMAGES:.4f}\n" in whole.stdout
    stopped = many.call("predict", "part-p.csv", AT, signal.SIGINT)
    assert stopped.returncode == 130, stopped.stderr
    assert table(many.out / "part-p.csv") == rows[: len(table(many.out / "part-p.csv"))]
    assert AT < len(table(many.out / "part-p.csv")) <= AT + 256 + 1
    assert not list(many.out.glob("*.part"))
