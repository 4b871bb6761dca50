"""The bus over a broker, the same for all of them: see `broker` for what one supplies.

- The streams of events are divided into partitions, each kept in order by the broker.
- All handlers of one bus object are one subscription, which processes share: each partition has one
  reader at a time, so each stream is handled in order, whoever reads it.
- Nothing that the broker has is the only copy: it can be filled again from the store. So what is
  published again is sent again, and dropped by those who receive it: the broker may have lost it.
"""

from __future__ import annotations

from collections.abc import Sequence

import anyio
from anyio import TASK_STATUS_IGNORED
from anyio.abc import TaskStatus
from anyio.lowlevel import checkpoint, checkpoint_if_cancelled
from attrs import frozen
from msgspec.json import Decoder, Encoder

from ..cleanup import shielded_cleanup
from ..errors import EventDecodeError, StoreClosedError
from ..events import DomainEvent, StoredEvent
from ..exception_groups import only_error
from ..ids import SLICES, check_name
from ..stores.interface import EventStore, ReadOptions
from .broker import Broker, EntryConflictError, Message
from .delivering import Handlers
from .encoding import encode
from .filtering import EventFilter
from .interface import EventBus, EventHandler, FailurePolicy
from .letters import DeadLetterRepository, DeadLetters, discard, retry
from .receiving import BrokerStream
from .sending import SENT_AT_ONCE, Outgoing
from .sharing import Sharing, Start

_LOG = "log"
_encode, _decode = Encoder().encode, Decoder(dict[str, int]).decode


@frozen
class BrokerBusStatistics:
    """Of one bus object since it was made: `published` events, sent to the broker; `queued` ones,
    not sent yet; `handled` ones; `partitions` that it runs now, of its subscription; `streams` that
    are open. `missed` is how often the broker had dropped events that handlers were to have."""

    published: int
    queued: int
    handled: int
    missed: int
    partitions: Sequence[int]
    streams: int


class BrokerEventBus(EventBus):
    """Events between processes, through a broker.

    `subscription` names what the handlers of this object are one part of: every process that gives
    the same name shares the work, and has to register the same handlers. Where it is new it begins
    with what is published from now on (`start="new"`), with what the broker still has (`"first"`),
    or after a position of the store (a number). A handler is called with the events of one
    partition one after another, and with those of different ones at the same time.

    `attempts` are how often a handler is called with an event before the event, and what comes
    after it in its stream, is set aside as dead letters; the pauses between begin with
    `retry_after` seconds and double, and hold up one partition. `on_failure` is told of each event
    that is set aside. `lease` is for how many seconds a process may be silent before the others
    take it for dead. `catch_up` is the store to read what the broker has dropped before the
    handlers got to it. `buffer` bounds what waits to be sent in the background. `partitions` has to
    be the same wherever the broker is used.
    """

    def __init__(
        self,
        broker: Broker,
        *,
        subscription: str | None = None,
        partitions: int = 8,
        start: Start = "new",
        catch_up: EventStore | None = None,
        lease: float = 5.0,
        attempts: int = 5,
        retry_after: float = 0.1,
        on_failure: FailurePolicy | None = None,
        buffer: int = 1024,
        remembered: int = 4096,
    ) -> None:
        for name, value in (("buffer", buffer), ("remembered", remembered)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a number of events from 1, not {value!r}")
        check_partitions(partitions)
        if not lease > 0:
            raise ValueError(f"lease must be a number of seconds above 0, not {lease!r}")
        if start not in ("new", "first") and not (type(start) is int and start >= 0):
            raise ValueError(f"start must be 'new', 'first' or a position from 0, not {start!r}")
        if subscription is not None:
            check_name("subscription", subscription)
        self._broker = broker
        self._partitions = partitions
        self._subscription = subscription
        self._start: Start = start
        self._catch_up = catch_up
        self._lease = lease
        self._remembered = remembered
        self._handlers = Handlers(attempts, retry_after, on_failure)
        self._outgoing = Outgoing(broker, buffer)
        self._streams: set[BrokerStream] = set()
        self._sharing: Sharing | None = None
        self._missed = 0
        self._opened = False
        self._stop = anyio.Event()
        self._stopped: anyio.Event | None = None

    async def publish(self, events: Sequence[StoredEvent], background: bool = False) -> None:
        await checkpoint_if_cancelled()
        self._check_open()
        if background:
            self._outgoing.check_running()
        messages = [encode(one, self._partitions) for one in events]
        if not messages:
            await checkpoint()
        await self._send(messages, background)

    async def _send(self, messages: Sequence[Message], background: bool = False) -> None:
        for start in range(0, len(messages), SENT_AT_ONCE):
            chunk = messages[start : start + SENT_AT_ONCE]
            if background:
                await self._outgoing.queue(chunk)
            else:
                await self._outgoing.send(chunk)

    def register(self, handler: EventHandler, *event_types: str | type[DomainEvent]) -> None:
        if self._stopped is not None:
            raise RuntimeError("register handlers before run() is started")
        self._letters()
        self._handlers.register(handler, event_types)

    def subscribe(
        self,
        *event_types: str | type[DomainEvent],
        catch_up: EventStore | None = None,
        after: int | None = None,
    ) -> BrokerStream:
        """With `after`, what is after that position of the store comes first.

        It is read from the store that is given as `catch_up`, or else as far as the broker has it.
        """
        if after is not None and (type(after) is not int or after < 0):
            raise ValueError(f"after must be a position from 0, not {after!r}")
        return BrokerStream(
            self._broker,
            self._partitions,
            EventFilter(event_types),
            catch_up,
            after,
            self._remembered,
            self._check_open,
            self._streams,
        )

    async def run(self, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        self._check_open()
        if self._stopped is not None:
            raise RuntimeError("this bus is running already")
        self._stop, self._stopped = anyio.Event(), anyio.Event()
        self._outgoing.running = True
        sharing = self._sharing = self._share() if len(self._handlers) else None
        try:
            async with anyio.create_task_group() as tasks:
                if sharing is not None:
                    await sharing.look(tasks)
                tasks.start_soon(self._outgoing.run)
                task_status.started()
                if sharing is not None:
                    await sharing.run(tasks)
                await self._stop.wait()
        except BaseExceptionGroup as group:
            raise only_error(group) from None
        finally:
            self._outgoing.stop()
            try:
                if sharing is not None:
                    with shielded_cleanup():
                        await sharing.leave()
            finally:
                if sharing is not None:
                    self._missed += sharing.missed
                self._sharing = None
                self._stopped.set()
                self._stopped = None

    def stop(self) -> None:
        self._stop.set()
        self._outgoing.stop()
        if self._sharing is not None:
            self._sharing.stop()

    async def wait_stopped(self) -> None:
        if self._stopped is None:
            await checkpoint()
        else:
            await self._stopped.wait()

    def statistics(self) -> BrokerBusStatistics:
        sharing = self._sharing
        return BrokerBusStatistics(
            self._outgoing.sent,
            self._outgoing.queued,
            self._handlers.handled,
            self._missed + (sharing.missed if sharing is not None else 0),
            sharing.owned if sharing is not None else (),
            len(self._streams),
        )

    # Operations ----------------------------------------------------------------------------------

    async def dead_letters(self) -> Sequence[DeadLetters]:
        """The streams of which the subscription has set events aside, by their ids."""
        self._check_open()
        return await self._letters().all()

    async def retry_dead_letters(self, stream_id: str) -> int:
        """Have the handlers of this object handle what is set aside of a stream, in order.

        Returns how many events that were; 0 if the stream is not set aside. What a handler raises
        comes out; then the stream is set aside from the event that it was raised at. While this
        runs the subscription may go on, and set aside more of the stream, which is handled too.
        """
        self._check_open()
        return await retry(self._letters(), self._handlers, stream_id)

    async def discard_dead_letters(self, stream_id: str) -> int:
        """Never handle those events; how many. The later ones of the stream are handled again."""
        self._check_open()
        return await discard(self._letters(), stream_id)

    async def refill(self, store: EventStore, *, after: int = 0) -> int:
        """Publish everything again that a store has after a position; how many events that were.

        For a broker that has lost its data. What was lost with it is begun again: subscriptions
        that are run meanwhile begin with the first message that is there. Receivers drop what they
        remember, and handle the rest again.

        What cannot be read is left out, and ends the call with its `EventDecodeError` only after
        everything else was published.
        """
        self._check_open()
        await self._agree_on_partitions()
        published = 0
        failure: EventDecodeError | None = None
        messages: list[Message] = []
        events = store.read_all(ReadOptions(from_position=after + 1))
        while True:
            try:
                stored = await anext(events, None)
            except EventDecodeError as error:
                failure = failure or error
                continue
            if stored is not None:
                messages.append(encode(stored, self._partitions))
            if messages and (stored is None or len(messages) >= SENT_AT_ONCE):
                await self._send(messages)
                published += len(messages)
                messages.clear()
            if stored is None:
                break
        if failure is not None:
            raise failure
        return published

    # The rest ------------------------------------------------------------------------------------

    def _letters(self) -> DeadLetterRepository:
        if self._subscription is None:
            raise ValueError(
                "Handlers of a bus over a broker are a subscription, and this bus was given no "
                "name for one.\n"
                "  The broker keeps under it how far they have got, for all processes.\n"
                f"  Name it: {type(self).__name__}(…, subscription='invoicing')."
            )
        return DeadLetterRepository(self._broker, self._subscription, self._partitions)

    def _share(self) -> Sharing:
        return Sharing(
            self._broker,
            self._subscription or "",
            self._partitions,
            self._handlers,
            self._letters(),
            start=self._start,
            lease=self._lease,
            remembered=self._remembered,
            catch_up=self._catch_up,
        )

    def _check_open(self) -> None:
        if not self._opened:
            raise StoreClosedError(type(self).__name__)

    async def _open(self) -> None:
        await self._broker.open()
        try:
            await self._agree_on_partitions()
        except BaseException:
            await self._broker.close()
            raise
        self._opened = True

    async def _close(self) -> None:
        self._opened = False
        for stream in tuple(self._streams):
            stream.end()
        await self._broker.close()

    async def _agree_on_partitions(self) -> None:
        entry = await self._broker.get(_LOG)
        if entry is None:
            try:
                await self._broker.put(_LOG, _encode({"partitions": self._partitions}), None)
            except EntryConflictError:
                entry = await self._broker.get(_LOG)
        there = _decode(entry.value)["partitions"] if entry else self._partitions
        if there != self._partitions:
            raise ValueError(
                f"{type(self).__name__} was given partitions={self._partitions}, and the broker's "
                f"log has {there}.\n"
                "  Streams are assigned to partitions by their number, so all have to use the same."
                f"\n  Give it partitions={there}, or another prefix, and fill that from the store "
                "by refill()."
            )


def check_partitions(partitions: int) -> None:
    if type(partitions) is not int or not 1 <= partitions <= SLICES:
        raise ValueError(f"partitions must be a number from 1 to {SLICES}, not {partitions!r}")
