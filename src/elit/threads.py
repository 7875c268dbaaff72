"""Threads that work ahead of whoever wants their results."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int
) -> Generator[Result, None, None]:
    """Yields ``function(item)`` of each item, in order, which threads compute at most ``ahead`` items in advance.

    Items are taken in the caller's thread. So where making them is work, that work and the function's overlap, and the
    slower one sets the pace.

    When the function or the items raise an error, or the caller stops early, what has not begun is dropped, and what
    has begun is finished first: nothing is left running.
    """
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
