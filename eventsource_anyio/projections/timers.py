"""Timers: events that are appended to their process's stream when they are due, each of them once.

- A timer is two documents, written and deleted together: one whose key begins with the moment it is
  due at, so that the earliest ones are the first of their collection; and one under its process and
  its own key, which says where the former is, and at which revision.
- A timer is taken away by deleting the former at its revision: by whoever fires it, in the
  transaction of the append; by whoever cancels or replaces it. So one of them wins, and the event
  is there or not.
- The event has its id from the beginning. Firing done again stores nothing twice.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import UTC, datetime
from time import monotonic
from typing import cast
from uuid import UUID

import anyio
from attrs import frozen

from ..codec import PayloadError
from ..errors import DocumentConflictError, EventEncodeError, StorageError, StoreClosedError
from ..events import DomainEvent, NewEvent, decode_event, registered
from ..ids import AggregateId, normalize_aggregate_id, stream_id_of, uuid7
from ..metadata import decode_metadata, encode_metadata, merge_metadata
from ..repositories.document import Document
from ..stores.interface import ANY, EventStore, Transaction

_logger = logging.getLogger("eventsource_anyio.projections")
_PAGE = 100
_SOON, _FIRST_PAUSE, _LONGEST_PAUSE, _LONGEST_RETRY = 0.005, 0.05, 5.0, 60.0


class Clock(ABC):
    """What time it is, for timers."""

    @abstractmethod
    def now(self) -> datetime:
        """Now, with a time zone."""

    @abstractmethod
    async def wait_until(self, moment: datetime) -> None:
        """Return once it is that moment, or a little earlier."""


class SystemClock(Clock):
    """The time of this machine, in UTC."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    async def wait_until(self, moment: datetime) -> None:
        await anyio.sleep(max((moment - self.now()).total_seconds(), 0))


@frozen
class PendingTimer:
    """A timer that is set and has not fired: what is appended to which process, and when.

    `event_id` is the one that the event will have, of type `event_type`. `key` is the timer's name
    in its process.
    """

    process_id: AggregateId
    stream_id: str
    key: str
    due: datetime
    event_type: str
    event_id: UUID


class Timers:
    """The timers of one process manager: set and cancelled in transactions, fired by `run`.

    Those of other processes are looked for every `look_every` seconds, which are the machine's.
    """

    def __init__(
        self, store: EventStore, name: str, aggregate_type: str, clock: Clock, look_every: float
    ) -> None:
        self._store = store
        self._name = name
        self._aggregate_type = aggregate_type
        self._clock = clock
        self._look_every = look_every
        self._by_moment = f"projections/{name}/timers"
        self._by_key = f"projections/{name}/timers/keys"
        self._watches: set[_Watch] = set()
        self._failing: dict[str, tuple[float, int]] = {}

    async def set(
        self,
        tx: Transaction,
        process_id: AggregateId,
        key: str,
        event: DomainEvent,
        due: datetime,
    ) -> None:
        """Set a timer, in place of the one that its process has under this key, if it has."""
        kind = registered(type(event))
        try:
            payload = kind.codec.encode(event).decode()
        except PayloadError as error:
            raise EventEncodeError(kind.name, error.path, error.reason) from error
        event_id = uuid7()
        value = {
            "process": str(process_id),
            "key": key,
            "event_id": str(event_id),
            "event_type": kind.name,
            "schema_version": kind.schema_version,
            "payload": payload,
            "metadata": encode_metadata(merge_metadata(None)),
        }
        await self.cancel(tx, process_id, key)
        timer_key = _timer_key(due, event_id)
        revision = await tx.documents.add(self._by_moment, timer_key, value)
        where = {"timer": timer_key, "revision": str(revision)}
        await tx.documents.add(self._by_key, _name(process_id, key), where)
        for watch in self._watches:
            watch.look_soon(due)

    async def cancel(self, tx: Transaction, process_id: AggregateId, key: str) -> None:
        """Take a timer away; one that is not there, or has fired, is fine."""
        name = _name(process_id, key)
        document = await tx.documents.get(self._by_key, name)
        if document is not None:
            where = cast("dict[str, str]", document.value)
            revision = UUID(where["revision"])
            await tx.documents.delete(self._by_moment, where["timer"], expected=revision)
            await tx.documents.delete(self._by_key, name, expected=document.revision)

    async def pending(self, limit: int, after: PendingTimer | None) -> Sequence[PendingTimer]:
        """The first ones that are due after another one, by when they are."""
        key = "" if after is None else _timer_key(after.due, after.event_id)
        page = await self._store.documents.list(self._by_moment, after=key, limit=limit)
        return [self._pending(one) for one in page]

    async def pending_of(self, process_id: AggregateId) -> Sequence[PendingTimer]:
        """All of one process, by when they are due."""
        after = prefix = _name(process_id, "")
        keys: list[str] = []
        while after:
            page = await self._store.documents.list(self._by_key, after=after, limit=_PAGE)
            own = [one for one in page if one.key.startswith(prefix)]
            keys += [cast("dict[str, str]", one.value)["timer"] for one in own]
            after = own[-1].key if len(own) == _PAGE else ""
        found = await self._store.documents.get_all(self._by_moment, sorted(keys))
        return [self._pending(one) for one in found.values()]

    def _pending(self, timer: Document) -> PendingTimer:
        value = cast("dict[str, str]", timer.value)
        process_id = normalize_aggregate_id(value["process"])
        return PendingTimer(
            process_id,
            stream_id_of(self._aggregate_type, process_id),
            value["key"],
            _due(timer),
            value["event_type"],
            UUID(value["event_id"]),
        )

    # Firing --------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Fire each when it is due, and at once what was due before; until it is cancelled."""
        watch = _Watch(self._clock, self._look_every)
        self._watches.add(watch)
        pauses = 0
        try:
            while True:
                try:
                    watch.due = await self._fire_due()
                except StorageError as error:
                    seconds = min(_FIRST_PAUSE * 2 ** min(pauses, 10), _LONGEST_PAUSE)
                    pauses += 1
                    _logger.warning("timers of %s: again in %.2g s: %s", self._name, seconds, error)
                    await anyio.sleep(seconds)
                else:
                    pauses = 0
                    await watch.wait()
        finally:
            self._watches.discard(watch)

    async def _fire_due(self) -> datetime | None:
        """Fire what is due; when the next one will be."""
        after = ""
        while True:
            now = self._clock.now()
            page = await self._store.documents.list(self._by_moment, after=after, limit=_PAGE)
            due = [one for one in page if _due(one) <= now]
            try:
                await self._fire_all(due)
            except DocumentConflictError:
                continue  # somebody else fires them, or cancels one: what is left is looked for
            if len(due) < len(page):
                return _due(page[len(due)])
            if len(page) < _PAGE:
                return None
            after = page[-1].key

    async def _fire_all(self, due: Sequence[Document]) -> None:
        now = monotonic()
        timers = [one for one in due if self._failing.get(one.key, (now, 0))[0] <= now]
        try:
            await self._fire(timers)
        except (StorageError, StoreClosedError, DocumentConflictError):
            raise
        except Exception:  # noqa: BLE001  (one of them cannot be appended: the others can)
            for timer in timers:
                await self._fire_alone(timer)

    async def _fire_alone(self, timer: Document) -> None:
        try:
            await self._fire((timer,))
        except (StorageError, StoreClosedError, DocumentConflictError):
            raise
        except Exception:
            failures = self._failing.get(timer.key, (0.0, 0))[1] + 1
            seconds = min(self._look_every * 2 ** min(failures - 1, 20), _LONGEST_RETRY)
            self._failing[timer.key] = (monotonic() + seconds, failures)
            _logger.exception(
                "timers of %s: %s cannot be fired, again in %.2g s", self._name, timer.key, seconds
            )

    async def _fire(self, timers: Sequence[Document]) -> None:
        async with self._store.transaction() as tx:
            for timer in timers:
                value = cast("dict[str, str]", timer.value)
                event = NewEvent(
                    decode_event(
                        value["event_type"], int(value["schema_version"]), value["payload"]
                    ),
                    event_id=UUID(value["event_id"]),
                    metadata=decode_metadata(value["metadata"]),
                    occurred_at=_due(timer),
                )
                await tx.append_events(value["process"], self._aggregate_type, [event], ANY)
                await tx.documents.delete(self._by_moment, timer.key, expected=timer.revision)
                await tx.documents.delete(self._by_key, _name(value["process"], value["key"]))
        for timer in timers:
            self._failing.pop(timer.key, None)


class _Watch:
    """How one `Timers.run` waits for the next timer.

    A timer that was set here is not to be seen before its transaction has ended, and nobody tells
    when that is. So it is looked for soon, and then after longer and longer pauses.
    """

    def __init__(self, clock: Clock, look_every: float) -> None:
        self.due: datetime | None = None
        self._clock = clock
        self._look_every = look_every
        self._pause = look_every
        self._waiting: anyio.CancelScope | None = None

    def look_soon(self, due: datetime) -> None:
        if self.due is None or due < self.due:
            self._pause = min(_SOON, self._look_every)
            if self._waiting is not None:
                self._waiting.cancel()

    async def wait(self) -> None:
        pause, self._pause = self._pause, min(self._pause * 2, self._look_every)
        with anyio.move_on_after(pause) as self._waiting:
            if self.due is None:
                await anyio.sleep_forever()
            else:
                await self._clock.wait_until(self.due)
        self._waiting = None


def _name(process_id: AggregateId, key: str) -> str:
    process = str(process_id)
    return f"{len(process)}/{process}/{key}"  # no two of them the same, whatever is in an id


def _timer_key(due: datetime, event_id: UUID) -> str:
    moment = due.astimezone(UTC).isoformat(timespec="microseconds")
    return f"{moment}/{event_id}"


def _due(timer: Document) -> datetime:
    return datetime.fromisoformat(timer.key.partition("/")[0])
