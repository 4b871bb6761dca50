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
        now = monotonic()
        if len(self._until) >= _WAITING_AT_MOST:
            self._until = {one: until for one, until in self._until.items() if until > now}
        if len(self._until) < _WAITING_AT_MOST:
            self._until[position] = now + _WAITED_FOR

    def within(self, after: int, last: int) -> bool:
        return any(after < one <= last for one in self._until)

    def take(self, last: int) -> bool:
        """Forget those up to a position; whether there was one."""
        reached = [one for one in self._until if one <= last]
        for one in reached:
            del self._until[one]
        return bool(reached)
