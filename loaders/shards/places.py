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
    places: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for place in _braces(pattern):
            places += _look_up(place.removeprefix("file://"), retries)
            if len(places) > MOST:
                raise DataError(f"{pattern} names more than {MOST} files; correct the range")
    if len(set(places)) < len(places):
        twice = Counter(places).most_common(1)[0][0]
        raise DataError(f"{twice} is named twice in {patterns}; name each shard once")
    if not places:
        raise DataError("no shard is named; give paths or URLs, as in train-{000..127}.tar")
    return places


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


def _look_up(place: str, retries: int) -> list[str]:
    scheme, mark, path = place.partition("://")
    if mark and scheme in ("http", "https"):
        if "*" in path:
            raise DataError(f"{place}: a web server has no listing; write the names out, as in train-{{000..127}}.tar")
        return [place]
    if not mark and os.path.isdir(place):
        place = os.path.join(place, "*.tar")
    if not re.search(r"[*?\[]", place):
        return [place if mark else os.path.abspath(place)]
    if mark:
        found = [f"{scheme}://{name}" for name in retry(place, retries, lambda: filesystem(place).glob(path))]
    else:
        found = [os.path.abspath(name) for name in glob.glob(place, recursive=True)]
    if not found:
        raise DataError(f"{place} matches no file; correct it")
    return sorted(found)
