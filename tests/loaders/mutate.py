"""Damaged JPEGs through every backend: `python -m tests.loaders.mutate COUNT [--real FOLDER] [--loaders a,b]`.

As files, in shards, in a .beton as they are, and packed. What must hold is worked out in a plain loop with strict
decoding.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import multiprocessing
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image

from fastsimclr.loaders.beton.pack import Packing, pack
from fastsimclr.loaders.beton.reader import BetonSource
from fastsimclr.loaders.beton.recode import Recoding
from fastsimclr.loaders.beton.writer import BetonWriter
from fastsimclr.loaders.cut import Crops
from fastsimclr.loaders.data import DataConfig, LoaderName
from fastsimclr.loaders.decode import decode, read_header
from fastsimclr.loaders.draw import Policy, draw
from fastsimclr.loaders.loader import EvalLoader, TrainLoader
from fastsimclr.loaders.sets.basic import FileSource
from fastsimclr.loaders.shards.cache import ShardCache
from fastsimclr.loaders.shards.source import ShardSource, open_shards
from fastsimclr.loaders.source import DataError, Source
from tests.loaders.tars import write_tar

Pixels = npt.NDArray[np.uint8]

KINDS = ("truncated", "flipped", "magic", "empty", "huge", "png", "header", "sound")
LIMIT = 2_000_000  # pixels
SIDE = 24
PATIENCE_S = 1200  # for one backend


class Deadly(FileSource):
    """Files of which reading one kills the process, if that is a worker."""

    deadly = -1

    def read(self, index: int) -> bytes:
        if index == self.deadly and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index)


def smooth(height: int, width: int, seed: int) -> Pixels:
    """An image of soft gradients, as photographs have them."""
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 255
    fine = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    return np.ascontiguousarray(fine[0].permute(1, 2, 0).clamp(0, 255).round().to(torch.uint8).numpy())


def drawn(count: int) -> list[bytes]:
    """JPEGs of several sizes, some grey, progressive or of other sampling."""
    files = []
    for k in range(count):
        file, picture = io.BytesIO(), Image.fromarray(smooth(40 + 3 * (k % 17), 90 - 2 * (k % 23), k))
        picture = picture.convert("L") if k % 5 == 4 else picture
        picture.save(file, "JPEG", quality=85, progressive=k % 7 == 6, subsampling=k % 3)
        files.append(file.getvalue())
    return files


def mutated(data: bytes, kind: str, random: np.random.Generator) -> bytes:
    """`data`, a JPEG, damaged as `kind` of KINDS says."""

    def draw_one(low: int, high: int) -> int:
        return int(random.integers(low, max(high, low + 1)))

    match kind:
        case "truncated":
            return data[: draw_one(3, len(data))]
        case "flipped" | "header":
            changed = bytearray(data)
            start, stop = (2, min(600, len(data))) if kind == "header" else (300, len(data))
            for _ in range(draw_one(1, 12)):
                changed[draw_one(min(start, len(data) - 1), stop)] ^= 1 << draw_one(0, 8)
            return bytes(changed)
        case "magic":
            return random.bytes(2).replace(b"\xff", b"\xfe") + data[2:]
        case "empty":
            return b""
        case "huge":
            at = next(i for i in range(2, len(data)) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC1, 0xC2))
            return data[: at + 5] + (60_000).to_bytes(2, "big") * 2 + data[at + 9 :]
        case "png":
            file = io.BytesIO()
            Image.fromarray(simplejpeg.decode_jpeg(data)).save(file, "PNG")
            return file.getvalue()
    return data


def make_files(folder: Path, count: int, real: Sequence[bytes], seed: int = 0) -> FileSource:
    """`count` files, of which every eighth is sound, in `folder`; out of `real` JPEGs and drawn ones in turn."""
    random = np.random.default_rng(seed)
    mine = drawn(40)
    names, sizes = [], []
    for k in range(count):
        kind = KINDS[k % len(KINDS)]
        turn = k // len(KINDS)
        data = real[turn // 2 % len(real)] if real and turn % 2 else mine[turn % len(mine)]
        names.append(f"{k:05}-{kind}.JPEG")
        (folder / names[-1]).write_bytes(mutated(data, kind, random))
        sizes.append((folder / names[-1]).stat().st_size)
    return FileSource("mutated", folder, names, sizes, np.arange(count), [str(k) for k in range(count)])


def make_beton(path: Path, source: FileSource) -> BetonSource:
    """The same bytes, damaged as they are, in a .beton without checksums."""
    writer = BetonWriter(path, len(source), 2**21)
    for k in range(len(source)):
        data, (height, width) = source.read(k), (8, 8)
        with contextlib.suppress(DataError):  # else a size that the tables can hold
            height, width = read_header(data, "", LIMIT).size
        writer.add(k, data or b"\0", height, width, False)  # the format has no empty blobs
    writer.finish(source.labels)
    writer.close()
    return BetonSource(path)


def make_shards(folder: Path, source: FileSource) -> ShardSource:
    """The same files in three tars, in the same order."""
    bounds = np.linspace(0, len(source), 4).astype(int).tolist()
    for shard, (start, stop) in enumerate(pairwise(bounds)):
        images = [(source.names[k], source.read(k)) for k in range(start, stop)]
        labels = [(f"{Path(source.names[k]).stem}.cls", b"%d" % source.labels[k]) for k in range(start, stop)]
        write_tar(folder / f"{shard}.tar", images + labels)
    return open_shards(str(folder), ShardCache(folder / "cache"), classes=source.classes)


def make_packed(path: Path, source: FileSource) -> BetonSource:
    """What `fastsimclr pack` makes of them. AssertionError unless it leaves out and names what it must, and no more."""
    bad, _ = expected(source)
    how = Packing(recoding=Recoding(max_pixels=LIMIT), threads=2, max_bad_fraction=0.999)
    packed = pack(source, path, how)
    assert packed.sidecar is not None
    assert [name for name, _ in packed.sidecar.left_out] == [source.names[k] for k in sorted(bad)], "left out"
    assert all(name in reason for name, reason in packed.sidecar.left_out), "named"
    assert packed.labels.tolist() == [k for k in range(len(source)) if k not in bad], "kept"
    return packed


def expected(source: Source) -> tuple[set[int], list[int]]:
    """(ids that strict decoding refuses, the id of the image that is shown for each id), in a plain loop."""
    n, bad = len(source), set[int]()
    for k in range(n):
        try:
            data = source.read(k)
            assert not isinstance(data, np.ndarray)
            decode(data, "", LIMIT)
        except DataError:
            bad.add(k)
    shown = [next((k + step) % n for step in range(n) if (k + step) % n not in bad) for k in range(n)]
    return bad, shown


def check(source: Source, loader: LoaderName, threads: int = 2) -> int:
    """AssertionError unless one epoch and one evaluation of `loader` are as they must be; how many are damaged.

    The labels of `source` are all different, and so tell which image is shown.
    """
    n = len(source)
    bad, shown = expected(source)
    config = DataConfig(loader=loader, threads=threads, max_bad_fraction=0.999, max_pixels=LIMIT)
    policy = Policy(size=SIDE, normalise="none")
    batch = max(1, min(50, n // 3))
    crops = Crops(policy=policy, seed=3, views=2)
    with TrainLoader(source, config, batch=batch, seed=3, stop=-(-n // batch), crops=crops) as train:
        ids = []
        for each in train:
            ids += each.ids.tolist()
            assert each.labels.tolist() == [source.labels[shown[k]] for k in each.ids.tolist()], "stand-ins"
            if loader == "ffcv":
                continue
            params = draw(policy, 3, each.epochs, each.ids, 2, each.sizes)
            for row in (0, len(each) - 1):
                data = source.read(shown[int(each.ids[row])])
                assert not isinstance(data, np.ndarray)
                whole = torch.from_numpy(decode(data, "", LIMIT).copy()).permute(2, 0, 1)[None].float()
                top, left, height, width = params.crop[row].tolist()
                window = whole[..., top : top + height, left : left + width]
                exact = F.interpolate(window, size=(SIDE, SIDE), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
                far = (each.images.image(row) - exact).abs().mean()
                assert far < 4, f"pixels of {source.describe(int(each.ids[row]))} are {far} levels away"
        assert set(ids) == set(range(n)), "each once"
        assert set(train.bad) == bad, f"named: {sorted(set(train.bad) ^ bad)}"
        for k, reason in train.bad.items():
            assert source.describe(k) in reason, f"{reason} does not name {source.describe(k)}"
    crops = Crops(policy=Policy(size=SIDE, crop="centre", flip=0, normalise="none"), seed=0, views=1)
    with EvalLoader(source, config, batch=batch, crops=crops) as test:
        assert [k for each in test for k in each.ids.tolist()] == [k for k in range(n) if k not in bad], "left out"
    return len(bad)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--real", type=Path, help="A folder of JPEG files to damage, beside drawn ones.")
    parser.add_argument("--loaders", default="native,resident,dali,torchvision,ffcv")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    real = [path.read_bytes() for path in sorted(options.real.glob("*.[Jj]*"))[:60]] if options.real else []
    real = [data for data in real if len(data) < 200_000]
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        (root / "files").mkdir()
        files = make_files(root / "files", options.count, real, options.seed)
        sources: dict[str, Source] = {
            "files": files,
            "shards": make_shards(root / "shards", files),
            "beton": make_beton(root / "mutated.beton", files),
            "packed": make_packed(root / "packed.beton", files),
        }
        print(f"packed: {options.count - len(sources['packed'])} of {options.count} files left out and named")
        for name, source in sources.items():
            for loader in options.loaders.split(","):
                if loader == "ffcv" and not isinstance(source, BetonSource):
                    continue
                faulthandler.dump_traceback_later(PATIENCE_S, exit=True)  # what hangs is shown, and is a failure
                bad = check(source, loader)
                faulthandler.cancel_dump_traceback_later()
                print(f"{name}, {loader}: {len(source)} images, {bad} refused and named, the others shown", flush=True)


if __name__ == "__main__":
    sys.exit(main())
