"""A relay of the outbox while it has the lease: look, deliver, remove, again and again.

- It keeps no position: what is in the outbox is what has to be delivered, the oldest first. So a
  message whose transaction was slow to commit is not missed, though others came before it.
- Delivered messages are removed, and failed ones set aside, in a transaction that also writes the
  lease. So a relay that was paused, and taken for dead, can take nothing out of the outbox.
- While a key fails, its later messages wait, and nobody else's. That state is in memory: whoever
  takes over tries anew.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from functools import partial
from math import inf
from typing import TypeAlias
from uuid import UUID

import anyio
from attrs import frozen

from ..errors import DocumentConflictError, StorageError
from ..projections.progress import Progress
from ..stores.interface import EventStore, StoredMessage, Transaction
from .lease import Lease, nothing
from .parked_messages import ParkedKey, ParkedMessages, key_id, parked_at

DeliverMessages: TypeAlias = Callable[[Sequence[StoredMessage]], Awaitable[object]]

_logger = logging.getLogger("eventsource_anyio.relay")
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 5.0
_LONGEST_RETRY = 30.0


@frozen
class Settings:
    """As `OutboxRelay` is given them."""

    lease: float
    poll_every: float
    batch_size: int
    attempts: int
    retry_after: float
    outages: tuple[type[Exception], ...]


@frozen
class _Failing:
    attempts: int
    due: float


@frozen
class _Found:
    """What is in the outbox: what to deliver, in which parts, and what waits until when."""

    parts: Sequence[Sequence[StoredMessage]]
    behind: Sequence[StoredMessage]  # messages of parked keys
    due: float


class Waiting:
    """Pauses, which `stop` cuts short, and what they are made for."""

    def __init__(self) -> None:
        self.stopping = False
        self.error: str | None = None
        self.pauses = 0
        self._scope: anyio.CancelScope | None = None

    def stop(self) -> None:
        self.stopping = True
        if self._scope is not None:
            self._scope.cancel()

    async def pause(self, wait: Callable[[], Awaitable[object]]) -> None:
        """Wait for something, or until it is stopped."""
        with anyio.CancelScope() as self._scope:
            if not self.stopping:
                await wait()
        self._scope = None

    async def back_off(self, error: Exception) -> None:
        self.error = f"{type(error).__name__}: {error}"
        seconds = min(_FIRST_PAUSE * 2**self.pauses, _LONGEST_PAUSE)
        self.pauses = min(self.pauses + 1, 10)
        _logger.warning("outbox: again in %.2g s, after %s", seconds, self.error)
        await self.pause(partial(anyio.sleep, seconds))


class Delivering:
    def __init__(
        self,
        store: EventStore,
        deliver: DeliverMessages,
        settings: Settings,
        lease: Lease,
        waiting: Waiting,
        progress: Progress,
    ) -> None:
        self.parked: dict[str, ParkedKey] | None = None  # None: it is not known
        self.failing: dict[str, _Failing] = {}
        self.oldest: datetime | None = None
        self._store = store
        self._deliver = deliver
        self._settings = settings
        self._lease = lease
        self._waiting = waiting
        self._progress = progress
        self._messages = ParkedMessages(store)

    async def run(self) -> None:
        """Until it is stopped; `LeaseLostError` if another relay has taken over."""
        hint = self._store.outbox.hint
        while not self._waiting.stopping:
            count = hint.count
            try:
                found = await self._look()
                if found.behind:
                    await self._set_behind(found.behind)
                for part in found.parts:
                    await self._deliver_part(part)
                self._works()
            except StorageError as error:
                await self._waiting.back_off(error)
            except DocumentConflictError as error:  # somebody retries or discards
                _logger.info("outbox: looking again: %s", error)
                self.parked = None
            else:
                if not found.parts and not found.behind:
                    due = found.due - anyio.current_time()
                    with anyio.move_on_after(min(self._settings.poll_every, due)):
                        await self._waiting.pause(partial(hint.wait, count))

    async def _look(self) -> _Found:
        if self.parked is None:
            self.parked = {one.id: one for one in await self._messages.keys()}
        size, now, due, after = self._settings.batch_size, anyio.current_time(), inf, 0
        healthy: list[StoredMessage] = []
        behind: list[StoredMessage] = []
        again: dict[str, StoredMessage] = {}
        seen: set[str] = set()
        oldest: datetime | None = None
        while len(healthy) < size and len(behind) < size:
            page = await self._store.outbox.pending(size, after=after)
            for one in page:
                key = key_id(one)
                if key in self.parked:
                    behind.append(one)
                    continue
                oldest = oldest or one.recorded_at
                failing = self.failing.get(key)
                if failing is None:
                    healthy.append(one)
                elif failing.due <= now:
                    again.setdefault(key, one)  # alone, and its later ones after it
                else:
                    due = min(due, failing.due)
                seen.add(key)
            if len(page) < size:
                for key in self.failing.keys() - seen:  # somebody has taken them out
                    del self.failing[key]
                break
            after = page[-1].position
        self.oldest = oldest
        parts = [[one] for one in again.values()]
        return _Found([healthy, *parts] if healthy else parts, behind, due)

    async def _deliver_part(self, messages: Sequence[StoredMessage]) -> None:
        """Deliver them, and take them apart if that fails, until what fails is alone."""
        left = deque([messages])
        failed: set[str] = set()
        while left and not self._waiting.stopping:
            part = [one for one in left.popleft() if key_id(one) not in failed]
            if not part:
                continue
            if self._lease.age > self._settings.lease / 2:  # it may have been paused since
                await self._lease.commit(nothing)
            try:
                await self._deliver(part)
            except self._settings.outages as error:
                await self._waiting.back_off(error)
                left.appendleft(part)
            except Exception as error:  # noqa: BLE001  (it is logged, and tried again)
                if len(part) > 1:
                    middle = len(part) // 2
                    left.extendleft((part[middle:], part[:middle]))
                else:
                    failed.add(key_id(part[0]))
                    await self._failed(part[0], error)
            else:
                await self._remove(part)

    async def _remove(self, delivered: Sequence[StoredMessage]) -> None:
        ids: list[UUID] = [one.message.message_id for one in delivered]
        await self._commit(lambda tx: tx.outbox.delivered(ids))
        for one in delivered:
            self.failing.pop(key_id(one), None)
        self._progress.batch(len(delivered), None)
        self._works()

    def _works(self) -> None:
        self._waiting.pauses = 0
        if not self.failing:
            self._waiting.error = None

    async def _failed(self, stored: StoredMessage, error: Exception) -> None:
        message, key = stored.message, key_id(stored)
        failing = self.failing.get(key)
        attempts = failing.attempts + 1 if failing else 1
        what = f"message {message.message_id} of key {message.key!r} of {message.topic!r}"
        self._waiting.error = f"{type(error).__name__}: {error}"
        if attempts < self._settings.attempts:
            seconds = self._settings.retry_after * 2 ** min(attempts - 1, 20)
            seconds = min(seconds, _LONGEST_RETRY)
            self.failing[key] = _Failing(attempts, anyio.current_time() + seconds)
            _logger.warning(
                "outbox: attempt %d at %s failed, again in %.2g s",
                *(attempts, what, seconds),
                exc_info=error,
            )
            return
        _logger.error("outbox: %s set aside after %d attempts", what, attempts, exc_info=error)
        await self._set_aside([(parked_at(stored, error), [stored])])
        self.failing.pop(key, None)

    async def _set_behind(self, messages: Sequence[StoredMessage]) -> None:
        """Set messages of parked keys aside."""
        parked = self.parked or {}
        by_key: dict[str, list[StoredMessage]] = {}
        for one in messages:
            by_key.setdefault(key_id(one), []).append(one)
        await self._set_aside([(parked[key], ones) for key, ones in by_key.items()])

    async def _set_aside(self, what: Sequence[tuple[ParkedKey, Sequence[StoredMessage]]]) -> None:
        after: list[ParkedKey] = []

        async def write(tx: Transaction) -> None:
            after[:] = [await self._messages.set_aside(tx, *one) for one in what]

        await self._commit(write)
        if self.parked is not None:
            self.parked |= {one.id: one for one in after}

    async def _commit(self, write: Callable[[Transaction], Awaitable[object]]) -> None:
        """Store it as soon as the storage works: what was delivered is not to come again."""
        while True:
            try:
                await self._lease.commit(write)
                return
            except StorageError as error:
                if self._waiting.stopping:
                    raise
                await self._waiting.back_off(error)
