"""A bounded queue that is fair between clients: the one with the fewest running requests is next."""

from __future__ import annotations

from collections import Counter, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FullError(Exception):
    """The queue is full: try again later."""


class FairQueue(Generic[T]):
    """First in, first out for each client; between clients, the one with the fewest running requests.

    Of equals it is the one that was served longest ago.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.waiting: dict[str, deque[T]] = {}
        self.running: Counter[str] = Counter()
        self.served: dict[str, int] = {}
        self.turns = 0

    def __len__(self) -> int:
        return sum(map(len, tuple(self.waiting.values())))  # a copy: another thread may ask

    def put(self, client: str, items: list[T]) -> None:
        """All items, or none. Raises FullError."""
        if len(self) + len(items) > self.limit:
            raise FullError
        self.waiting.setdefault(client, deque()).extend(items)

    def take(self) -> tuple[str, T]:
        """The next item and its client, which counts as running until `done`. Raises IndexError for an empty queue."""
        if not self.waiting:
            raise IndexError("the queue is empty")
        client = min(self.waiting, key=lambda name: (self.running[name], self.served.get(name, 0)))
        item = self.waiting[client].popleft()
        if not self.waiting[client]:
            del self.waiting[client]
        self.turns += 1
        self.running[client] += 1
        self.served[client] = self.turns
        return client, item

    def done(self, client: str) -> None:
        """A request of a client has ended."""
        self.running[client] -= 1
        if not self.running[client]:
            del self.running[client]
            if client not in self.waiting:
                self.served.pop(client, None)

    def remove(self, client: str, item: T) -> bool:
        """Remove an item that still waits; whether it did."""
        own = self.waiting.get(client)
        if not own or item not in own:
            return False
        own.remove(item)
        if not own:
            del self.waiting[client]
        return True
