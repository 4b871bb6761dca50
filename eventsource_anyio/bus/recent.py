"""What was seen lately, to drop repetitions of it."""

from __future__ import annotations

from collections import deque
from uuid import UUID


class RecentIds:
    """The last `size` ids that were added: UUIDs, or what a broker made of them."""

    __slots__ = ("_ids", "_order")

    def __init__(self, size: int) -> None:
        # As numbers: a UUID's hash is computed in Python, each time.
        self._order: deque[int | str] = deque(maxlen=size)
        self._ids: set[int | str] = set()

    def __contains__(self, event_id: UUID | str) -> bool:
        return (event_id if isinstance(event_id, str) else event_id.int) in self._ids

    def add(self, event_id: UUID | str) -> bool:
        """Whether it is new."""
        number = event_id if isinstance(event_id, str) else event_id.int
        if number in self._ids:
            return False
        if len(self._order) == self._order.maxlen:
            self._ids.discard(self._order[0])
        self._order.append(number)
        self._ids.add(number)
        return True

    def forget(self, event_id: UUID) -> None:
        """Have it be new again."""
        self._ids.discard(event_id.int)
