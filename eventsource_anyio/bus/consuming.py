"""One partition of a subscription: read, handle, save where it stands, one page after another.

- What was handled is saved after it was handled, so whoever takes over handles again what was not
  saved, and drops what it finds repeated.
- Before an event is handled it is made sure that the partition still is this one's, if that was not
  done lately. So somebody who was paused handles one event more, at most.
- Stopping cancels the waiting and never the handling.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import TypeVar

import anyio
from anyio import TASK_STATUS_IGNORED
from anyio.abc import TaskStatus
from attrs import frozen
from msgspec.structs import replace

from ..errors import EventDecodeError, FellBehindError, StorageError
from ..stores.interface import EventStore, ReadOptions
from .broker import Broker, EntryConflictError, Reading, ReceivedMessage
from .delivering import CutOffError, Handlers
from .encoding import Envelope, decode, encode, opened, slices_of
from .leases import Lease, LeaseRepository
from .letters import DeadLetterRepository, DeadLetters
from .recent import RecentIds
from .waiting import Backoff

_logger = logging.getLogger("eventsource_anyio.bus")
_PAGE = 250
_WAIT = 5.0
_SAVED_EVERY = 1.0
T = TypeVar("T")


@frozen
class Consuming:
    """What the partitions of a subscription have in common in one process."""

    broker: Broker
    subscription: str
    partitions: int
    leases: LeaseRepository
    letters: DeadLetterRepository
    handlers: Handlers
    remembered: int
    catch_up: EventStore | None
    missed: Callable[[], None]
    page: int = _PAGE


class _LeaseLostError(Exception):
    """Somebody else has written the partition's entry."""


class PartitionRun:
    """From when the lease was taken to when it is given back or lost."""

    def __init__(
        self, shared: Consuming, lease: Lease, ended: Callable[[PartitionRun], None]
    ) -> None:
        self.lease = lease
        self._shared = shared
        self._broker = shared.broker
        self._name = f"{shared.subscription}, partition {lease.partition}"
        self._ended = ended
        self._offset = lease.standing.offset
        self._position = lease.standing.position
        self._recent = RecentIds(shared.remembered)
        self._parked: dict[str, DeadLetters] = {}
        self._backoff = Backoff(self._name)
        self._saved = monotonic()
        self._stopping = False
        self._waiting: anyio.CancelScope | None = None
        self._scope = anyio.CancelScope()

    @property
    def partition(self) -> int:
        return self.lease.partition

    def stop(self) -> None:
        """Finish the event at hand, and give the partition back."""
        self._stopping = True
        if self._waiting is not None:
            self._waiting.cancel()

    def cancel(self) -> None:
        """End at once."""
        self._scope.cancel()

    async def run(self, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        """Until it is stopped, or loses its lease."""
        try:
            with self._scope:
                task_status.started()
                try:
                    await self._follow()
                    await self._release()
                except _LeaseLostError:
                    _logger.info("%s has another owner", self._name)
        finally:
            self._ended(self)

    async def _follow(self) -> None:
        await self._patiently(self._prepare)
        if self.lease.standing.until > self._position and not self._stopping:
            with suppress(CutOffError):
                await self._read_store(self.lease.standing.until)
        while not self._stopping:
            reading = await self._patiently(self._read)
            if reading is None or not reading.messages:
                continue
            try:
                if reading.lost:
                    await self._make_up_for(reading.messages[0])
                for message in reading.messages:
                    await self._take(message)
            except CutOffError:
                break
            await self._save()

    async def _prepare(self) -> None:
        if self._offset:
            last = await self._broker.read_back(
                self.partition, self._offset, self._shared.remembered
            )
            for message in last:
                self._recent.add(message.message_id)
        self._parked = await self._shared.letters.of(self.partition)

    async def _read(self) -> Reading:
        return await self._broker.read({self.partition: self._offset}, self._shared.page, _WAIT)

    # One event -----------------------------------------------------------------------------------

    async def _take(self, message: ReceivedMessage) -> None:
        """Handle a message, or have a dead letter of it, or drop it; `CutOffError`: none of it."""
        envelope = None
        if message.message_id not in self._recent:
            envelope = opened(message)
            if envelope is None:
                _logger.error("%s: %s is no event", self._name, message.offset)
            elif envelope.position > self.lease.standing.skip and self._shared.handlers.want(
                envelope.event_type
            ):
                if self._stopping:
                    raise CutOffError
                if monotonic() > self._saved + _SAVED_EVERY:
                    await self._save()
                await self._handle(envelope, message.payload)
            self._recent.add(message.message_id)
        self._offset = message.offset
        if envelope is not None:
            self._position = max(self._position, envelope.position)

    async def _handle(self, envelope: Envelope, payload: bytes) -> None:
        while (parked := self._parked.get(envelope.stream_id)) is not None:
            if await self._set_aside(parked, envelope, payload):
                return
        stored = decode(envelope)
        done: set[str] = set()
        error: Exception | None
        if isinstance(stored, EventDecodeError):
            error = stored
            _logger.error("%s: set aside: %s", self._name, stored)
        else:
            error = await self._shared.handlers.deliver(stored, done, self._sleep)
        if error is not None:
            await self._save()  # not if somebody else has handled it meanwhile
            if not await self._set_aside(None, envelope, payload, error, sorted(done)):
                await self._handle(envelope, payload)

    async def _set_aside(
        self,
        parked: DeadLetters | None,
        envelope: Envelope,
        payload: bytes,
        error: Exception | None = None,
        done: Sequence[str] = (),
    ) -> bool:
        """Whether it is a dead letter now; False: what was known of its stream has changed."""
        letters, stream_id = self._shared.letters, envelope.stream_id

        async def add() -> DeadLetters | None:
            return await letters.add(parked, envelope, payload, error=error, done=done)

        added = await self._insist(add)
        changed = added or await self._insist(lambda: letters.get(stream_id))
        if changed is None:
            self._parked.pop(stream_id, None)
        else:
            self._parked[stream_id] = changed
        return added is not None

    # What the broker does not have ---------------------------------------------------------------

    async def _make_up_for(self, first: ReceivedMessage) -> None:
        """The broker has dropped what comes before this message, and was not handled."""
        skip = self.lease.standing.skip
        if not self._offset and not skip:
            return  # it begins with what there is
        envelope = opened(first)
        after, until = max(self._position, skip), envelope.position - 1 if envelope else 0
        if until > after and not await self._read_store(until):
            self._shared.missed()
            _logger.error("%s: %s", self._name, FellBehindError(after, until))

    async def _read_store(self, until: int) -> bool:
        """Handle what the store has from where it is up to a position; False: there is no store."""
        store = self._shared.catch_up
        if store is None:
            return False
        options = ReadOptions(slices=slices_of(self.partition, self._shared.partitions))
        after = max(self._position, self.lease.standing.skip)
        async with store.subscribe(after=after, options=options) as subscription:
            while subscription.position < until:
                for stored in await self._insist(subscription.next_batch):
                    if isinstance(stored, EventDecodeError):
                        _logger.error("%s: %s", self._name, stored)
                    elif stored.position <= until:
                        message = encode(stored, self._shared.partitions)
                        await self._take(
                            ReceivedMessage(
                                self.partition, self._offset, message.message_id, message.payload
                            )
                        )
        self._position = max(self._position, until)
        return True

    # Waiting -------------------------------------------------------------------------------------

    async def _sleep(self, seconds: float) -> bool:
        """Whether it is to go on; after a long time it is made sure that it still may."""
        await self._pause(lambda: anyio.sleep(seconds))
        if not self._stopping:
            await self._save()
        return not self._stopping

    async def _pause(self, wait: Callable[[], Awaitable[object]]) -> None:
        """Wait for something, or until it is stopped."""
        with anyio.CancelScope() as self._waiting:
            if not self._stopping:
                await wait()
        self._waiting = None

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T | None:
        """Its result, as soon as the broker works; None if it is stopped before."""
        result: T | None = None

        async def attempt() -> None:
            nonlocal result
            while True:
                try:
                    result = await call()
                except StorageError as error:
                    await self._backoff.wait(error)
                else:
                    self._backoff.reset()
                    return

        await self._pause(attempt)
        return result

    async def _insist(self, call: Callable[[], Awaitable[T]]) -> T:
        """Its result, as soon as the broker works; `CutOffError` if it is stopped before that."""
        while True:
            try:
                result = await call()
            except StorageError as error:
                failure = error
            else:
                self._backoff.reset()
                return result
            await self._pause(partial(self._backoff.wait, failure))
            if self._stopping:
                raise CutOffError

    # The lease -----------------------------------------------------------------------------------

    async def _save(self) -> None:
        """Save how far it has got; it is lost if somebody else has written it.

        While the broker fails nothing is saved, and what runs goes on.
        """
        try:
            await self._write(self.lease.standing.owner)
        except StorageError as error:
            _logger.info("%s: not saved: %s", self._name, error)

    async def _write(self, owner: str | None) -> None:
        standing = replace(
            self.lease.standing, offset=self._offset, position=self._position, owner=owner
        )
        try:
            self.lease = await self._shared.leases.save(self.lease, standing)
        except EntryConflictError:
            found = await self._shared.leases.get(self.partition)
            mine = self.lease.standing.owner
            if found is None or mine is None or found.standing.owner != mine:
                raise _LeaseLostError from None
            # It is what was written here, by a call of which the answer was lost.
            self.lease = await self._shared.leases.save(found, standing)
        self._saved = monotonic()

    async def _release(self) -> None:
        try:
            await self._write(None)
        except (EntryConflictError, StorageError) as error:
            _logger.info("%s was not given back: %s", self._name, error)
