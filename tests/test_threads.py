"""Threads that work ahead: in order, not too far, and gone when something goes wrong."""

import threading
import time
from collections.abc import Iterator

import pytest

from elit.threads import map_ahead


def test_results_come_in_the_order_of_the_items() -> None:
    def slow_first(i: int) -> int:
        time.sleep(0.02 if i % 4 == 0 else 0)
        return i * i

    assert list(map_ahead(slow_first, range(20), workers=3, ahead=5)) == [i * i for i in range(20)]


def test_items_are_made_in_the_callers_thread_and_not_too_many_in_advance() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(20):
            assert threading.current_thread() is threading.main_thread()
            made.append(i)
            yield i

    for done, _ in enumerate(map_ahead(lambda i: threading.get_ident(), items(), workers=2, ahead=3)):
        assert len(made) <= done + 1 + 3
    assert len(made) == 20


def test_making_items_and_the_function_overlap() -> None:
    """Each waits for the other: one after the other they would never end."""
    begun = threading.Barrier(2, timeout=10)

    def items() -> Iterator[int]:
        yield 0
        begun.wait()

    assert list(map_ahead(lambda i: begun.wait() * 0, items(), workers=1, ahead=1)) == [0]


@pytest.mark.parametrize("where", ["function", "items"])
def test_an_error_ends_it_and_nothing_is_left_running(where: str) -> None:
    done: list[int] = []

    def work(i: int) -> None:
        time.sleep(0.01)
        if where == "function" and i == 2:
            raise ValueError("broken")
        done.append(i)

    def items() -> Iterator[int]:
        yield from range(10)
        if where == "items":
            raise ValueError("broken")
        yield from range(10, 100)

    with pytest.raises(ValueError, match="broken"):
        list(map_ahead(work, items(), workers=2, ahead=8))
    finished = list(done)
    time.sleep(0.05)
    assert done == finished
    assert len(done) < 20
