"""What others have asked a projection for, for a while: whoever still waits asks again."""

from __future__ import annotations

from time import monotonic

_WAITING_AT_MOST = 1000
_WAITED_FOR = 5.0


class Wanted:
    """Positions that somebody elsewhere waits for."""

    def __init__(self) -> None:
        self._until: dict[int, float] = {}

    def __bool__(self) -> bool:
        return bool(self._until)

    def add(self, position: int) -> None:
        if len(self._until) < _WAITING_AT_MOST or position in self._until:
            self._until[position] = monotonic() + _WAITED_FOR

    def within(self, after: int, last: int) -> bool:
        return any(after < one <= last for one in self._until)

    def take(self, last: int) -> bool:
        """Forget those up to a position, and those that are not asked for again; whether there was
        one up to it."""
        now = monotonic()
        reached = any(one <= last for one in self._until)
        self._until = {
            one: until for one, until in self._until.items() if one > last and until > now
        }
        return reached
