"""Waiting out a broker that fails."""

from __future__ import annotations

import logging

import anyio

from ..errors import StorageError

_logger = logging.getLogger("eventsource_anyio.bus")
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0


class Backoff:
    """Pauses that double, until something works again."""

    __slots__ = ("_failures", "_what")

    def __init__(self, what: str) -> None:
        self._what = what
        self._failures = 0

    async def wait(self, error: StorageError) -> None:
        seconds = min(_FIRST_PAUSE * 2 ** min(self._failures, 10), _LONGEST_PAUSE)
        level = logging.INFO if self._failures else logging.WARNING
        _logger.log(level, "%s; again in %.2g s, after %s", self._what, seconds, error)
        self._failures += 1
        await anyio.sleep(seconds)

    def reset(self) -> None:
        self._failures = 0
