"""An iterator that a thread reads ahead.

Invariants: items come in their order, each once; what fails in the thread is raised where the item is wanted; the
thread ends when this is closed, at the latest with the item that it is making.

Not here: what is read (`loader`, `train.inputs`).
"""

import queue
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

Item = TypeVar("Item")


class ReadAhead(Generic[Item]):
    """The items of an iterator, some of them made before they are asked for; a context manager that ends its thread."""

    def __init__(self, items: Iterator[Item], *, depth: int, name: str) -> None:
        """Starts reading ahead.

        Args:
            items: Used by the thread alone from now on.
            depth: Items made and not yet asked for, at most, beside the one that is being made.
            name: Of the thread.
        """
        self._items = items
        self._ready: queue.Queue[tuple[Item] | BaseException | None] = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, name=name, daemon=True)
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Item:
        while not self._closed.is_set():
            try:
                item = self._ready.get(timeout=0.1)
            except queue.Empty:
                continue
            if isinstance(item, tuple):
                return item[0]
            self.close()
            if item is not None:
                raise item
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the reading; may be called again."""
        self._closed.set()
        self._thread.join()

    def _read(self) -> None:
        try:
            for item in self._items:
                self._hand_over((item,))
                if self._closed.is_set():
                    return
            self._hand_over(None)
        except BaseException as error:  # raised where the item is wanted
            self._hand_over(error)

    def _hand_over(self, item: tuple[Item] | BaseException | None) -> None:
        while not self._closed.is_set():
            try:
                return self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue
