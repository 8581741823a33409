"""Files of ours read by FFCV itself, and files that FFCV wrote read by us."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from PIL import Image

from fastsimclr.loaders.beton.reader import BetonSource
from fastsimclr.loaders.beton.writer import BetonWriter
from fastsimclr.loaders.decode import decode
from tests.loaders.betons import PAGE

pytestmark = [pytest.mark.needs("ffcv"), pytest.mark.slow]  # FFCV compiles for seconds
Exchange = tuple[Path, list[npt.NDArray[np.uint8]], list[bytes]]

FFCV = """
import sys, warnings
warnings.simplefilter("ignore")
import numpy as np
from ffcv.fields import BytesField, FloatField, IntField, JSONField, NDArrayField, RGBImageField
from ffcv.fields.decoders import IntDecoder
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.writer import DatasetWriter

folder = sys.argv[1]
images = np.load(folder + "/images.npz")
images = [images[key] for key in images.files]

class Data:
    def __len__(self):
        return len(images)
    def __getitem__(self, i):
        i = int(i)
        note, array = np.frombuffer(b"x" * (i % 3), np.uint8), np.full((3, 2), i, np.float32)
        return note, images[i], i / 2, {"a": i}, i % 7, array

fields = {
    "note": BytesField(), "picture": RGBImageField(write_mode="proportion", jpeg_quality=95), "x": FloatField(),
    "json": JSONField(), "label": IntField(), "array": NDArrayField(np.dtype("float32"), (3, 2)),
}
writer = DatasetWriter(folder + "/theirs.beton", fields, page_size=2**21, num_workers=2)
writer.from_indexed_dataset(Data(), chunksize=7)

pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
for cached in (True, False):
    loader = Loader(
        folder + "/ours.beton", batch_size=4, num_workers=1, order=OrderOption.SEQUENTIAL, drop_last=False,
        os_cache=cached, pipelines=pipelines,
    )
    read = [(np.array(x), np.array(y)) for x, y in loader]
    np.savez(f"{folder}/read-{cached}.npz", images=np.concatenate([x for x, _ in read]),
             labels=np.concatenate([y for _, y in read])[:, 0])
"""


@pytest.fixture(scope="module")
def both_ways(tmp_path_factory: pytest.TempPathFactory) -> Exchange:
    """A folder in which FFCV wrote three files of the images, and read a file of ours with the blobs."""
    folder = tmp_path_factory.mktemp("ffcv")
    random = np.random.default_rng(5)
    images = [random.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in random.integers(20, 300, (40, 2)).tolist()]
    np.savez(folder / "images.npz", *images)
    colours = random.integers(0, 256, (9, 6, 8, 3), dtype=np.uint8)
    plain = [np.kron(each, np.ones((8, 8, 1), np.uint8)) for each in colours]
    blobs, writer = [], BetonWriter(folder / "ours.beton", 9, PAGE)
    for row, pixels in enumerate(plain):
        file = io.BytesIO()
        picture = Image.fromarray(pixels)
        (picture.convert("L") if row == 4 else picture).save(file, "JPEG", quality=95)  # one is grey, one is raw
        blobs.append(pixels.tobytes() if row == 5 else file.getvalue())
        writer.add(row, blobs[row], 48, 64, row == 5)
    writer.finish([row % 4 - 1 for row in range(9)])
    writer.close()
    # Its own process: FFCV warns at import, compiles for seconds, and a test that fails must not leave its threads.
    run = subprocess.run([sys.executable, "-c", FFCV, str(folder)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return folder, images, blobs


def test_ffcv_reads_what_we_write(both_ways: Exchange) -> None:
    folder, _, blobs = both_ways
    for cached in (True, False):
        read = np.load(folder / f"read-{cached}.npz")
        assert read["labels"].tolist() == [row % 4 - 1 for row in range(9)]
        for row, blob in enumerate(blobs):
            raw = row == 5
            # FFCV decodes with libjpeg-turbo too, and asks for its fast DCT; one level for another version of it.
            own = (
                np.frombuffer(blob, np.uint8).reshape(48, 64, 3) if raw else simplejpeg.decode_jpeg(blob, fastdct=True)
            )
            assert np.abs(own.astype(int) - read["images"][row]).max() <= (0 if raw else 1)


def test_we_read_what_ffcv_writes(both_ways: Exchange) -> None:
    folder, images, _ = both_ways
    source = BetonSource(folder / "theirs.beton")
    assert source.labels.tolist() == [row % 7 for row in range(40)] and source.classes == tuple("0123456")
    assert source.pixel_sizes.tolist() == [list(pixels.shape[:2]) for pixels in images]
    assert 0 < source.raw.sum() < 40  # FFCV chose by chance: some are JPEG, some are not
    for row, pixels in enumerate(images):
        data = source.read(row)
        if isinstance(data, bytes):
            assert decode(data, "").shape == pixels.shape
            assert abs(decode(data, "").mean() - pixels.mean()) < 2
        else:
            np.testing.assert_array_equal(data, pixels)
