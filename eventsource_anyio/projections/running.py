"""Running one shard of a projection: read, handle, commit, one batch after another.

- A batch is handled in the transaction in which the shard's document moves, so an event counts once
  whatever dies when. Nothing is kept in memory that a batch done again could find changed.
- A batch that fails is taken apart until the event that fails is alone; its neighbours are
  committed. An error of the storage is nobody's fault: the same batch is tried until it works, or
  until the storage has shown that it takes anything but this batch. Nor is a conflict with a writer
  who got ahead: the event is handled anew, as often as it takes.
- Stopping cancels the waiting and never the handling; a hard cancellation anywhere causes a batch
  to be done again.
- What belongs to a parked stream is not handled, and is counted in its document, in the same
  transaction.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from math import inf
from time import monotonic
from typing import TypeVar

import anyio
from anyio.abc import TaskStatus
from attrs import evolve

from ..errors import ConcurrencyError, DocumentConflictError, EventDecodeError, StorageError
from ..events import StoredEvent
from ..stores.interface import EventStore, Subscription, Transaction
from .base import Projection, overrides, reacts
from .parked import ParkedRepository, ParkedStream, parked_at
from .progress import Progress
from .shards import Shard, ShardRepository

_logger = logging.getLogger("eventsource_anyio.projections")
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 5.0
_LONGEST_RETRY = 30.0
# Where many events come in, more of them make one transaction, so that the writers, who share the
# machine with it, have more of the machine.
_MANY, _GATHER_FOR = 50, 0.01
_SKIPPED_FOR = 1.0  # seconds after which a checkpoint that only moved over others' events is saved

_Read = StoredEvent | EventDecodeError
T = TypeVar("T")


class _LeaseLostError(Exception):
    """Somebody else has written the shard's document."""


class _GaveUpError(Exception):
    """An event failed for the last time; it is the cause."""


class ShardRun:
    """One shard, from when its lease was taken to when it is given back or lost."""

    def __init__(
        self,
        store: EventStore,
        projection: Projection[Transaction],
        shard: Shard,
        shards: ShardRepository,
        parked: ParkedRepository,
        progress: Progress,
        *,
        serving: bool,
        ended: Callable[[ShardRun], None],
    ) -> None:
        self.shard = shard
        self.position = shard.position  # everything up to it is handled, or not for this shard
        self._store = store
        self._projection = projection
        self._shards = shards
        self._parked_repository = parked
        self._parked: dict[str, ParkedStream] = {}
        self._progress = progress
        self._reacts = serving and reacts(projection)
        self._batched = overrides(projection, "handle_batch")
        self._ended = ended
        self._attempted: Shard | None = None
        self._saved = monotonic()
        self._pauses = 0
        self._refusals = 0
        self._stopping = False
        self._waiting: anyio.CancelScope | None = None
        self._reading: anyio.CancelScope | None = None
        self._scope = anyio.CancelScope()

    def stop(self) -> None:
        """Finish the batch at hand, and give the lease back."""
        self._stopping = True
        if self._waiting is not None:
            self._waiting.cancel()

    def save_soon(self) -> None:
        """Somebody elsewhere waits for a position: save what was skipped up to there at once."""
        if self._reading is not None and self._unsaved_for() <= 0:
            self._reading.cancel()

    def cancel(self) -> None:
        """End at once."""
        self._scope.cancel()

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Until it is stopped, or loses its lease, or an event cannot be handled."""
        begun = False

        def started() -> None:
            nonlocal begun
            if not begun:
                begun = True
                task_status.started()

        try:
            with self._scope:
                try:
                    await self._follow(started)
                    await self._release()
                except _LeaseLostError:
                    _logger.info("%s: shard %s has another owner", self._name, self.shard.key)
                except _GaveUpError as given_up:
                    self._progress.give_up(given_up.__cause__ or given_up)
                    await self._release()
        finally:
            self._ended(self)
        started()

    @property
    def _name(self) -> str:
        return f"{self._projection.name}, version {self._projection.version}"

    async def _follow(self, started: Callable[[], None]) -> None:
        options = evolve(self._projection.filters(), slices=self.shard.slices)
        async with self._store.subscribe(after=self.position, options=options) as subscription:
            self._parked = await self._parked_repository.of(self.shard.slices)
            started()
            while not self._stopping:
                until = self.shard.until
                if until is not None and self.position >= until:
                    await self._pause(anyio.sleep_forever)
                    continue
                events = await self._next(subscription)
                position = subscription.position
                if until is not None and position > until:
                    events, position = [one for one in events if one.position <= until], until
                if events or until == position:
                    await self._process(events, position)
                    if _MANY <= len(events) < options.batch_size:
                        await self._pause(partial(anyio.sleep, _GATHER_FOR))
                else:
                    self._passed(position)
                    await self._save_skipped()

    async def _next(self, subscription: Subscription) -> Sequence[_Read]:
        """What there is; nothing if it is stopped, or time to save what was passed over."""
        events: Sequence[_Read] = ()

        async def read() -> None:
            nonlocal events
            try:
                if self._pauses:  # the next event may be long in coming
                    await self._store.last_position()
                    self._pauses = 0
                    self._progress.recovered()
                with anyio.move_on_after(self._unsaved_for()) as self._reading:
                    events = await subscription.next_batch()
            except StorageError as error:
                await self._back_off(error)

        await self._pause(read)
        self._reading = None
        return events

    async def _pause(self, wait: Callable[[], Awaitable[object]]) -> None:
        """Wait for something, or until it is stopped."""
        with anyio.CancelScope() as self._waiting:
            if not self._stopping:
                await wait()
        self._waiting = None

    async def _back_off(self, error: BaseException) -> None:
        self._progress.failure(error)
        seconds = min(_FIRST_PAUSE * 2**self._pauses, _LONGEST_PAUSE)
        self._pauses = min(self._pauses + 1, 10)
        _logger.warning("%s: again in %.2g s, after %s", self._name, seconds, error)
        await anyio.sleep(seconds)

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T | None:
        """Its result, as soon as the storage works; None if it is stopped before."""
        while not self._stopping:
            try:
                return await call()
            except StorageError as error:
                failure: BaseException = error
            await self._pause(partial(self._back_off, failure))
        return None

    # One batch -----------------------------------------------------------------------------------

    async def _process(self, events: Sequence[_Read], position: int) -> None:
        left = [(events, position)]
        failures = 0
        conflicts: dict[object, object] = {}
        parking: ParkedStream | None = None
        while left and not self._stopping:
            part, end = left.pop()
            try:
                count = await self._commit(part, end, parking)
            except Exception as error:
                left.append((part, end))
                if self._is_of_parked(error):
                    parking = None
                    await self._load_parked()
                    continue
                outage = self._is_outage(error)
                if outage or await self._is_of_storage(error):
                    await self._pause(partial(self._back_off, error))
                    if await self._was_committed():
                        failures, conflicts, parking = 0, {}, None
                        left[-1:] = self._not_yet(part, end)
                        continue
                    if not part or outage or not await self._is_refused():
                        continue
                if not part:
                    raise
                if len(part) > 1:
                    middle = len(part) // 2
                    left[-1:] = [
                        (part[middle:], end),
                        (part[:middle], part[middle - 1].position),
                    ]
                elif not _got_ahead(error, conflicts):
                    failures += 1
                    parking = await self._failed(part[0], error, failures)
                continue
            failures, conflicts, parking = 0, {}, None
            self._pauses = self._refusals = 0
            if count < len(part):
                left.append((part[count:], end))

    async def _commit(
        self, part: Sequence[_Read], end: int, parking: ParkedStream | None = None
    ) -> int:
        """Handle the first events of a part and commit; how many."""
        parked: dict[str, ParkedStream] = {}
        count = len(part)
        self._attempted = None
        try:
            async with self._store.transaction() as tx:
                if parking is None:
                    count = await self._handle(part, tx, parked)
                else:
                    parked[parking.stream_id] = parking
                position = end if count == len(part) else part[count - 1].position
                moved = evolve(self.shard, position=position)
                self._attempted = moved = await self._shards.save(tx.documents, moved)
                for stream_id, one in parked.items():
                    parked[stream_id] = await self._parked_repository.save(tx.documents, one)
        except DocumentConflictError as error:
            if error.collection == self._shards.collection:
                raise _LeaseLostError from error
            raise
        self.shard = moved
        self._progress.saved()
        self._saved = monotonic()
        self._parked |= parked
        last = part[count - 1] if part else None
        self._progress.batch(count, last.recorded_at if isinstance(last, StoredEvent) else None)
        self._passed(position)
        return count

    async def _handle(
        self, part: Sequence[_Read], tx: Transaction, parked: dict[str, ParkedStream]
    ) -> int:
        projection = self._projection
        handle, react, quiet = projection.handle, projection.react, self.shard.quiet
        together: list[StoredEvent] = []
        over = monotonic() + projection.batch_seconds
        for number, event in enumerate(part, 1):
            if self._parked and (behind := self._parked.get(event.stream_id)):
                parked[behind.stream_id] = parked.get(behind.stream_id, behind).extended(event)
            elif isinstance(event, EventDecodeError):
                raise event
            elif self._batched:
                together.append(event)
            else:
                await handle(event, tx)
                if self._reacts and event.position > quiet:
                    await react(event, tx)
                if monotonic() > over:
                    return number
        if together:
            await projection.handle_batch(together, tx)
            if self._reacts:
                for event in together:
                    if event.position > quiet:
                        await react(event, tx)
        return len(part)

    def _passed(self, position: int) -> None:
        if position > self.position:
            self.position = position
            self._progress.moved()

    async def _save_skipped(self) -> None:
        if self._unsaved_for() <= 0:
            await self._process((), self.position)

    def _unsaved_for(self) -> float:
        """For how many seconds what was skipped may wait to be saved: others may wait for it."""
        if self.position == self.shard.position:
            return inf
        wanted = self._progress.wanted
        if wanted and wanted.within(self.shard.position, self.position):
            return 0.0
        return self._saved + _SKIPPED_FOR - monotonic()

    # Failures ------------------------------------------------------------------------------------

    def _is_of_parked(self, error: Exception) -> bool:
        return (
            isinstance(error, DocumentConflictError)
            and error.collection == self._parked_repository.collection
        )

    def _is_outage(self, error: Exception) -> bool:
        ours = isinstance(error, _LeaseLostError | EventDecodeError)
        return not ours and self._projection.is_outage(error)

    async def _is_of_storage(self, error: Exception) -> bool:
        if isinstance(error, _LeaseLostError):
            raise error
        if isinstance(error, StorageError) or getattr(error, "connection_invalidated", False):
            return True
        try:  # SQLAlchemy has many ways to say that a connection is gone
            await self._store.last_position()
        except StorageError:
            return True
        return False

    async def _is_refused(self) -> bool:
        """Whether the storage does not take this batch again and again, but takes others."""
        self._refusals += 1
        if self._refusals < self._projection.attempts or self._stopping:
            return False
        try:
            await self._commit((), self.position)
        except StorageError:
            return False
        self._pauses = 0
        return True

    async def _was_committed(self) -> bool:
        """Whether what was tried last is stored after all."""
        found = await self._patiently(self._shards.all)
        if found is None:
            return False
        for shard in found:
            if shard.key == self.shard.key:
                if shard.revision == self.shard.revision:
                    return False
                if self._attempted is not None and shard.revision == self._attempted.revision:
                    self.shard = shard
                    self._progress.saved()
                    await self._load_parked()
                    self._passed(shard.position)
                    return True
        raise _LeaseLostError

    def _not_yet(self, part: Sequence[_Read], end: int) -> list[tuple[Sequence[_Read], int]]:
        """What is left of a part: a commit may have had only its first events."""
        rest = [event for event in part if event.position > self.position]
        return [(rest, end)] if rest else []

    async def _failed(self, event: _Read, error: Exception, failures: int) -> ParkedStream | None:
        """What is to be parked, if it was for the last time."""
        await self._was_committed()  # a shard that was lost is no failure: others have handled it
        projection = self._projection
        where = f"{event.stream_id}, version {event.version}, position {event.position}"
        if failures < projection.attempts and not isinstance(error, EventDecodeError):
            self._progress.failure(error)
            seconds = min(projection.retry_after * 2 ** min(failures - 1, 20), _LONGEST_RETRY)
            _logger.warning(
                "%s: attempt %d at %s failed, again in %.2g s",
                *(self._name, failures, where, seconds),
                exc_info=error,
            )
            await self._pause(lambda: anyio.sleep(seconds))
            return None
        _logger.error(
            "%s: %s %s after %d attempts",
            self._name,
            "set aside" if projection.on_failure == "park" else "stopped at",
            *(where, failures),
            exc_info=error,
        )
        if projection.on_failure == "stop":
            raise _GaveUpError from error
        return parked_at(event, error)

    async def _load_parked(self) -> None:
        found = await self._patiently(lambda: self._parked_repository.of(self.shard.slices))
        self._parked = found or {}

    async def _release(self) -> None:
        shard = evolve(self.shard, position=self.position, owner=None)
        try:
            await self._shards.save(self._store.documents, shard)
        except (DocumentConflictError, StorageError) as error:
            _logger.info("%s: shard %s was not given back: %s", self._name, shard.key, error)


def _got_ahead(error: Exception, conflicts: dict[object, object]) -> bool:
    """Whether it is a conflict with somebody who has written since the last one, if there was."""
    what: object
    actual: object
    if isinstance(error, ConcurrencyError):
        what, actual = error.stream_id, error.actual
    elif isinstance(error, DocumentConflictError):
        what, actual = (error.collection, error.key), error.actual
    else:
        return False
    known = what in conflicts and conflicts[what] == actual
    conflicts[what] = actual
    return not known
