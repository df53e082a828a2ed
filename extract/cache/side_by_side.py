"""Reads of a cache side by side: a disk answers several at once, and checksums are taken on several cores."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from whisper_at_cli.extract.machine import cores

Item = TypeVar("Item")
MOST_THREADS = 8
WORTH_BYTES = 4 << 20  # of one call, below which handing over takes longer than it gains

_within = threading.local()
_pools: dict[int, ThreadPoolExecutor] = {}  # by process: a forked one has none of its parent's threads
_guard = threading.Lock()


def side_by_side(function: Callable[[Item], object], items: Sequence[Item], bytes_in_all: int) -> None:
    """Call a function for every item, from several threads where there is much to read."""
    threads = min(MOST_THREADS, cores(), len(items))
    if threads < 2 or bytes_in_all < WORTH_BYTES or in_pool():
        for item in items:
            function(item)
        return

    def some(first: int) -> None:
        for item in items[first::threads]:
            function(item)

    futures = [_pool().submit(some, first) for first in range(1, threads)]
    try:
        some(0)
    finally:
        for future in futures:  # none may write into the caller's array after this
            future.exception()
    for future in futures:
        future.result()


def _pool() -> ThreadPoolExecutor:
    with _guard:
        if os.getpid() not in _pools:
            _pools.clear()
            _pools[os.getpid()] = ThreadPoolExecutor(
                MOST_THREADS, thread_name_prefix="read cache", initializer=mark_pool_thread
            )
        return _pools[os.getpid()]


def mark_pool_thread() -> None:
    """Say that this thread is one of a pool that reads: what it asks for is done one by one, or it might wait for
    itself."""
    _within.pool = True


def in_pool() -> bool:
    """Whether this thread is one of a pool that reads."""
    return getattr(_within, "pool", False)
