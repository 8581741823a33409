"""Files on web servers and in object stores, through fsspec: listed, described, and fetched whole or not at all."""

from __future__ import annotations

import base64
import hashlib
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from fastsimclr.loaders.log import LOG
from fastsimclr.loaders.source import DataError

T = TypeVar("T")

PIECE = 8 << 20  # bytes of one request to an object store; a broken download goes on after the last whole piece
FIRST_S, LONGEST_S = 0.5, 30.0  # back-off: doubled from the first wait to the longest, times 0.5 to 1.5
SILENCE_S = 60.0  # without a byte a connection counts as broken
_NEEDS = {
    "http": '"fsspec[http]"',
    "https": '"fsspec[http]"',
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
}
_AGAIN = (408, 425, 429)  # of the answers 400..499 those that a later attempt may not get
_HOPELESS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "ParamValidationError",
    "InvalidURL",
    "InvalidUrlClientError",
)
_JITTER = random.Random()  # of its own: what a run draws must not depend on the network


class FetchError(ValueError):
    """A file that could not be fetched: it stops the run, as no image is at fault. Names URL, cause, remedy."""


class CacheError(FetchError):
    """A fetched file that the disk does not take."""


@dataclass(frozen=True)
class Remote:
    """One version of a remote file of `size` bytes.

    tag: what the server calls this version (generation, ETag, else the time of its last change), "" where nothing.
    md5, sha256: hex digests of the content, "" where unknown: md5 from the server, sha256 from index.json.
    """

    url: str
    size: int
    tag: str = ""
    md5: str = ""
    sha256: str = ""

    @cached_property
    def key(self) -> str:
        """The name of this version in a cache: another URL, size or content gives another one."""
        version = f"{self.url}\n{self.size}\n{self.sha256 or self.tag}"
        readable = re.sub(r"[^\w.-]", "_", self.url.partition("?")[0].rpartition("/")[2])[-60:]
        return f"{hashlib.sha256(version.encode()).hexdigest()[:20]}-{readable}"


def is_remote(location: str) -> bool:
    """Whether a location is a URL; file:// is local, as are paths."""
    return "://" in location and not location.startswith("file://")


def filesystem(url: str) -> Any:
    """fsspec's file system for `url`. DataError with the install command where a package is missing."""
    scheme = url.partition("://")[0]
    try:
        import fsspec

        if scheme in ("http", "https"):
            import aiohttp

            # fsspec's own limit of 5 minutes a request would end each download of a large shard on a slow line.
            patience = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S)
            return fsspec.filesystem(scheme, client_kwargs={"timeout": patience, "trust_env": True})
        return fsspec.filesystem(scheme)
    except ImportError as error:
        needed = _NEEDS.get(scheme, "the package that fsspec names")
        raise DataError(f"{url} needs a package that is not installed ({error}); run: pip install {needed}") from error
    except ValueError as error:
        raise DataError(f"{url}: {error}; use a path, http(s)://, s3:// or gs://") from error


def retry(location: str, retries: int, attempt: Callable[[], T]) -> T:
    """What `attempt` returns, repeated after failures that may pass, with exponential back-off and jitter.

    Raises FetchError, naming `location`, the number of attempts and the last cause.
    """
    for number in range(retries + 1):
        try:
            return attempt()
        except (DataError, FetchError):
            raise
        except Exception as error:  # every store has its own exceptions
            cause = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            if status := _status(error):
                cause = f"HTTP {status}, {cause}"
            if not _may_pass(error):
                remedy = "correct the URL, or your rights and credentials"
                raise FetchError(f"{location} cannot be fetched ({cause}); {remedy}") from error
            if number == retries:
                raise FetchError(
                    f"{location} could not be fetched in {retries + 1} attempts, the last ended with {cause};"
                    " check the network and the server, or raise data.fetch_retries"
                ) from error
            wait = min(LONGEST_S, FIRST_S * 2**number) * _JITTER.uniform(0.5, 1.5)
            LOG.warning(
                "%s: attempt %d of %d failed (%s); again in %.1f s", location, number + 1, retries + 1, cause, wait
            )
            time.sleep(wait)
    raise AssertionError("unreachable")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error: fsspec turns some 500s into FileNotFoundError, with the answer as its cause."""
    for link in _chain(error):
        answer = getattr(link, "response", None)  # botocore's
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(answer, dict) else None
        status = status or getattr(link, "status", None)
        if type(link).__name__ == "HttpError":  # gcsfs's; aiohttp's errors of a cut body have a code of their own, 400
            status = getattr(link, "code", None)
        if isinstance(status, int) and 100 <= status < 600:
            return status
    return None


def _may_pass(error: BaseException) -> bool:
    if any(type(link).__name__ in _HOPELESS for link in _chain(error)):
        return False
    if (status := _status(error)) is not None:
        return not 400 <= status < 500 or status in _AGAIN
    return not isinstance(
        list(_chain(error))[-1], FileNotFoundError | PermissionError | NotImplementedError | TypeError
    )


def describe(url: str, retries: int) -> Remote:
    """Size and version of a remote file, from its headers. Raises FetchError, or DataError where no size is given."""

    def ask() -> dict[str, Any]:
        files = filesystem(url)
        files.invalidate_cache()  # a listing that a glob left behind may be old
        return dict(files.info(url))

    info = retry(url, retries, ask)
    if info.get("type") == "directory":
        raise FetchError(f"{url} is a folder; name the shards in it")
    if info.get("size") is None:
        raise DataError(f"{url}: the server does not say its size, so no download could be checked; use another server")
    # Google's ETags change with an object's description too, its generation only with its content.
    names = ("generation", "ETag", "etag", "Last-Modified", "LastModified", "mtime")
    tags = (str(info[name]) for name in names if info.get(name))
    digest = str(info.get("md5Hash") or info.get("Content-MD5") or "")  # ETags of S3 are an MD5 at times only
    try:
        md5 = base64.b64decode(digest, validate=True).hex()
    except ValueError:
        md5 = ""
    return Remote(url, int(info["size"]), next(tags, ""), md5 if len(md5) == 32 else "")


def read_small(url: str, retries: int) -> bytes | None:
    """The content of a small remote file; None where there is none, or where it may not be read."""
    try:
        return retry(url, retries, lambda: bytes(filesystem(url).cat_file(url)))
    except FetchError as error:
        # A store that may not be listed answers 403 for what it does not have.
        status = error.__cause__ and _status(error.__cause__)
        if status in (403, 404, 410) or isinstance(error.__cause__, FileNotFoundError | PermissionError):
            return None
        raise


def download(remote: Remote, fd: int, path: Path, retries: int) -> None:
    """Fill the file `path`, open as `fd`, with `remote`, from where it ends on; then check size, version and digests.

    What an attempt brought is kept for the next one. Raises FetchError: for the network after all attempts, at once
    where the file is gone or another one than was listed, or where it cannot be written.
    """
    if not (remote.tag or remote.sha256) or os.fstat(fd).st_size > remote.size:
        os.ftruncate(fd, 0)  # of what version these bytes are cannot be known

    def attempt() -> None:
        if os.fstat(fd).st_size < remote.size:
            _fill(remote, fd, path)
        _verify(remote, fd, path, retries)

    retry(remote.url, retries, attempt)


def _fill(remote: Remote, fd: int, path: Path) -> None:
    stream, have = _open(remote, os.fstat(fd).st_size)
    with closing(stream):
        os.ftruncate(fd, have)
        while have < remote.size and (data := stream.read(min(PIECE, remote.size - have))):
            have += _write(remote, fd, data, have, path)
    if have < remote.size:
        raise ConnectionError(f"the connection ended after {have} of {remote.size} bytes")


def _write(remote: Remote, fd: int, data: bytes, at: int, path: Path) -> int:
    done = 0
    try:
        while done < len(data):
            done += os.pwrite(fd, data[done:], at + done)
    except OSError as error:
        raise unwritable(remote, path.parent, error) from error
    return done


def unwritable(remote: Remote, folder: Path, error: OSError) -> CacheError:
    """The error for a file that the disk does not take."""
    return CacheError(
        f"{remote.url} ({remote.size} bytes) cannot be kept in {folder}: {error.strerror};"
        " free space there, lower data.cache_gib, or name another folder in data.cache"
    )


def _open(remote: Remote, start: int) -> tuple[Any, int]:
    """(a file to read from, the byte it begins at): `start`, or 0 where a web server does not give parts of files."""
    files = filesystem(remote.url)
    if not remote.url.startswith(("http://", "https://")):
        file = files.open(remote.url, "rb", block_size=PIECE, cache_type="none")
        file.seek(start)
        return file, start
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    file = files.open(remote.url, "rb", block_size=0, size=remote.size or 1, headers=headers)
    if file.r.status != 206:
        return file, 0
    if not file.r.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        file.close()
        raise OSError(f"asked for bytes from {start} on, the server gave {file.r.headers.get('Content-Range')}")
    return file, start


def _verify(remote: Remote, fd: int, path: Path, retries: int) -> None:
    """FetchError where the server has another version by now; OSError, to fetch it anew, for a wrong digest."""
    if not remote.sha256:
        now = describe(remote.url, retries)
        if (now.size, now.tag) != (remote.size, remote.tag):
            os.ftruncate(fd, 0)
            raise FetchError(
                f"{remote.url} changed since it was listed: {remote.size} bytes, {remote.tag or 'no ETag'}; now"
                f" {now.size} bytes, {now.tag or 'no ETag'}; start again"
            )
    for kind, expected in (("sha256", remote.sha256), ("md5", remote.md5)):
        if expected:
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, kind).hexdigest()
            if found != expected:
                os.ftruncate(fd, 0)
                raise OSError(f"its {kind} is {found}, not {expected} as index.json or the server says")
