"""What the tests of the loaders share: web and object stores, a cache, and a folder that is packed again and again."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from fastsimclr.loaders.beton.pack import Packing, pack
from fastsimclr.loaders.beton.recode import Recoding
from fastsimclr.loaders.shards import remote as remote_module
from fastsimclr.loaders.shards.cache import ShardCache
from tests.loaders.pictures import encoded, folder_source, put
from tests.loaders.tars import shard
from tests.loaders.web import Web


@pytest.fixture
def web() -> Iterator[Web]:
    """Four shards at /t-0.tar to /t-3.tar."""
    server = Web()
    server.files = {f"/t-{k}.tar": shard(k) for k in range(4)}
    yield server
    server.close()


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    """An empty one."""
    return ShardCache(tmp_path / "cache", retries=3)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No long waits between attempts."""
    monkeypatch.setattr(remote_module, "FIRST_S", 0.01)


@pytest.fixture
def files_up_to() -> Callable[[int], AbstractContextManager[None]]:
    """`with files_up_to(n)`: the kernel lets no file grow over n bytes, as a full disk or a quota would not."""

    @contextmanager
    def limited(most: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """moto's S3 server on the loopback with the bucket `bucket`; the environment of whoever is to use it."""
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in keys.items():
            patch.setenv(name, value)
        files = fsspec.filesystem("s3")
        files.makedirs("bucket", exist_ok=True)  # moto keeps it for the whole process
        yield files
        files.clear_instance_cache()  # the next server has another port
    server.stop()


@pytest.fixture(scope="module")
def gcs() -> Iterator[Any]:
    """An emulator of Google Cloud Storage on the loopback with the bucket `bucket`; the environment to use it."""
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    port = server._api._httpd.server_address[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        # Otherwise gcsfs asks by gRPC and TLS, which no emulator has, what kind of bucket it is.
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        patch.setitem(fsspec.config.conf, "gs", {"token": "anon"})  # as FSSPEC_GS_TOKEN=anon has it
        files = fsspec.filesystem("gs")
        yield files
        files.clear_instance_cache()
    server.stop()


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 images in two classes, some 60 KB so that they fill pages; one larger than a page, two damaged."""
    random = np.random.default_rng(1)
    noisy = [Image.fromarray(random.integers(0, 256, (220, 270 + k, 3), dtype=np.uint8)) for k in range(10)]
    files = {f"{'ab'[k % 2]}/{k:03d}.jpg": encoded(noisy[k % 10], quality=90, comment=str(k)) for k in range(150)}
    large = Image.fromarray(random.integers(0, 256, (800, 800, 3), dtype=np.uint8))
    files["a/060.jpg"] = encoded(large, quality=100, subsampling=0)  # more than a page of 2 MiB
    files["a/020.jpg"] = files["a/020.jpg"][:3000]
    files["b/075.jpg"] = b""
    return put(tmp_path_factory.mktemp("many"), files)


@pytest.fixture(scope="session")
def whole(many: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`many`, packed in one go."""
    path = tmp_path_factory.mktemp("whole") / "x.beton"
    pack(folder_source(many), path, Packing(recoding=Recoding(), threads=1, page_bytes=2**21, max_bad_fraction=0.05))
    return path
