"""The handlers of a bus, and how one event is given to them."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from ..errors import StorageError
from ..events import DomainEvent, StoredEvent
from .filtering import EventFilter
from .interface import EventHandler, FailurePolicy

_logger = logging.getLogger("eventsource_anyio.bus")
_LONGEST_PAUSE = 30.0


class _Registered:
    __slots__ = ("call", "name", "wanted")

    def __init__(self, call: EventHandler, wanted: EventFilter, name: str) -> None:
        self.call = call
        self.wanted = wanted
        self.name = name


class Handlers:
    """Those that are registered, and what is done where one fails.

    `attempts` are how often a handler is called with an event before it is given up, with pauses
    between that begin with `retry_after` seconds and double.
    """

    def __init__(self, attempts: int, retry_after: float, policy: FailurePolicy | None) -> None:
        if not isinstance(attempts, int) or isinstance(attempts, bool) or attempts < 1:
            raise ValueError(f"attempts must be a number from 1, not {attempts!r}")
        if not retry_after >= 0:
            raise ValueError(f"retry_after must be a number of seconds, not {retry_after!r}")
        self._attempts = attempts
        self._retry_after = retry_after
        self._policy = policy
        self._registered: list[_Registered] = []
        self.handled = 0

    def __len__(self) -> int:
        return len(self._registered)

    def register(
        self, call: EventHandler, event_types: tuple[str | type[DomainEvent], ...]
    ) -> None:
        if not callable(call):
            raise TypeError(f"a handler is an async function of a stored event, not {call!r}")
        name: str = getattr(call, "__qualname__", repr(call))
        same = sum(one.name.partition("#")[0] == name for one in self._registered)
        name = f"{name}#{same + 1}" if same else name
        self._registered.append(_Registered(call, EventFilter(event_types), name))

    def want(self, event_type: str) -> bool:
        return any(one.wanted.wants_name(event_type) for one in self._registered)

    async def call(self, stored: StoredEvent, done: set[str]) -> None:
        """Each that wants it and is not in `done`, where it is put; the first error, at the end."""
        failure: Exception | None = None
        for one in self._registered:
            if one.name in done or not one.wanted.wants(stored):
                continue
            try:
                await one.call(stored)
            except Exception as error:  # noqa: BLE001 - raised below
                error.add_note(f"in handler {one.name} of {told(stored)}")
                failure = failure or error
            else:
                done.add(one.name)
        if failure is not None:
            raise failure
        self.handled += 1

    async def deliver(
        self,
        stored: StoredEvent,
        done: set[str],
        pause: Callable[[float], Awaitable[bool]],
    ) -> Exception | None:
        """Have it handled, in several attempts; what the last of them failed with.

        `pause` returns False where there is to be no further attempt; then `CutOffError`. An error
        of a storage is nobody's fault, and costs no attempt.
        """
        failures = outages = 0
        while True:
            try:
                await self.call(stored, done)
            except StorageError as error:
                outages += 1
                seconds = min(0.05 * 2 ** min(outages, 10), 5.0)
                _logger.warning("%s: again in %.2g s, after %s", told(stored), seconds, error)
            except Exception as error:
                failures += 1
                if failures >= self._attempts:
                    _logger.error(
                        "%s is set aside, after %d attempts",
                        told(stored),
                        failures,
                        exc_info=error,
                    )
                    await self._tell(stored, error)
                    return error
                seconds = min(self._retry_after * 2 ** min(failures - 1, 20), _LONGEST_PAUSE)
                _logger.warning(
                    "%s: attempt %d failed, again in %.2g s",
                    *(told(stored), failures, seconds),
                    exc_info=error,
                )
            else:
                return None
            if not await pause(seconds):
                raise CutOffError

    async def _tell(self, stored: StoredEvent, error: Exception) -> None:
        if self._policy is not None:
            try:
                await self._policy(stored, error)
            except Exception:
                _logger.exception("on_failure has failed for %s", told(stored))


class CutOffError(Exception):
    """Internal: it is to stop, and the event is not handled."""


def told(stored: StoredEvent) -> str:
    return f"{stored.event_type}, {stored.stream_id}, version {stored.version}"
