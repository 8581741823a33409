"""From patterns to paths and URLs: braces written out, wildcards looked up, a folder as the tars in it."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from fastsimclr.loaders.shards.remote import filesystem, retry
from fastsimclr.loaders.source import DataError

MOST = 1_000_000  # places that one pattern may name


def expand(patterns: str | Sequence[str], retries: int = 0) -> list[str]:
    """The places that patterns name, in order: {000..127} and {a,b} written out, * ? and [ ] looked up and sorted.

    A local folder stands for its *.tar. On web servers, which have no listings, only braces are looked at.
    Raises DataError for a pattern that matches nothing and for a place named twice.
    """
    locations: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for location in _braces(pattern):
            locations += _look_up(location.removeprefix("file://"), retries)
            if len(locations) > MOST:
                raise DataError(f"{pattern} names more than {MOST} files; correct the range")
    if len(set(locations)) < len(locations):
        twice = Counter(locations).most_common(1)[0][0]
        raise DataError(f"{twice} is named twice in {patterns}; name each shard once")
    if not locations:
        raise DataError("no shard is named; give paths or URLs, as in train-{000..127}.tar")
    return locations


def _braces(pattern: str) -> Iterator[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    inside, head = match[1], pattern[: match.start()]
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = int(span[1]), int(span[2])
        if not first <= last < first + MOST:
            raise DataError(f"{pattern}: the range {match[0]} must rise, over at most {MOST} files; correct it")
        width = len(span[1]) if span[1].startswith("0") else 0
        words: Sequence[str] | Iterator[str] = (f"{number:0{width}d}" for number in range(first, last + 1))
    elif "," in inside:
        words = inside.split(",")
    else:
        raise DataError(f"{pattern}: {match[0]} is neither a range such as {{000..127}} nor a list such as {{a,b}}")
    for word in words:
        for tail in _braces(pattern[match.end() :]):
            yield head + word + tail


def _look_up(location: str, retries: int) -> list[str]:
    scheme, mark, path = location.partition("://")
    if mark and scheme in ("http", "https"):
        if "*" in path:
            raise DataError(
                f"{location}: a web server has no listing; write the names out, as in train-{{000..127}}.tar"
            )
        return [location]
    if not mark and os.path.isdir(location):
        location = os.path.join(location, "*.tar")
    if not re.search(r"[*?\[]", location):
        return [location if mark else os.path.abspath(location)]
    if mark:
        found = [f"{scheme}://{name}" for name in retry(location, retries, lambda: filesystem(location).glob(path))]
    else:
        found = [os.path.abspath(name) for name in glob.glob(location, recursive=True)]
    if not found:
        raise DataError(f"{location} matches no file; correct it")
    return sorted(found)
