"""Work begun in a pool of threads some steps before its use."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def ahead(pool: ThreadPoolExecutor, items: Iterable[T], n: int) -> Iterator[Iterator[T]]:
    """The items in their order, each given out when n more are taken from `items`, which begins their work in `pool`.

    At the end of the block the pool is shut down: what has not begun is cancelled, and what has begun is waited for.
    """
    try:
        yield delayed(items, n)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def delayed(items: Iterable[T], n: int) -> Iterator[T]:
    """The items in their order, each when n more have been taken from `items`, or all."""
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > n:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()
