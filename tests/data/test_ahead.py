import threading
import time
from collections.abc import Iterator

import pytest

from data.ahead import ReadAhead


def test_items_come_in_order_and_are_made_before_they_are_asked_for() -> None:
    made: list[int] = []
    two_more = threading.Event()

    def items() -> Iterator[int]:
        for number in range(10):
            made.append(number)
            if number == 3:
                two_more.set()
            yield number

    with ReadAhead(items(), depth=2, name="ahead") as ahead:
        assert next(ahead) == 0
        assert two_more.wait(5)  # two are ready, the next one is in the making
        time.sleep(0.05)
        assert made == [0, 1, 2, 3]
        assert list(ahead) == list(range(1, 10))
        assert list(ahead) == []


def test_what_fails_is_raised_where_the_item_is_wanted() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise KeyError("no item")

    with ReadAhead(items(), depth=1, name="ahead") as ahead:
        assert next(ahead) == 1
        with pytest.raises(KeyError, match="no item"):
            next(ahead)
        with pytest.raises(StopIteration):
            next(ahead)


def test_closing_ends_the_thread_and_the_wait_for_an_item() -> None:
    slow = threading.Event()

    def items() -> Iterator[int]:
        slow.wait(10)
        yield 1

    ahead = ReadAhead(items(), depth=1, name="ahead")
    waiter = threading.Thread(target=lambda: list(ahead))
    waiter.start()
    threading.Timer(0.05, slow.set).start()
    ahead.close()
    waiter.join(5)
    assert not waiter.is_alive()
    assert not any(thread.name == "ahead" for thread in threading.enumerate())
