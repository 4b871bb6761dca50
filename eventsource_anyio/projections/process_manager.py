"""Process managers: what is done because something has happened, once for each event.

- Everything an event leads to is in the transaction in which the checkpoint moves: the process's
  own events, the commands to other aggregates, messages, timers. So it happens once or, if the
  batch fails, not at all.
- A transaction shows what was committed before it. So the aggregates that it has changed already
  are kept beside it, for the later events of its batch, and forgotten with it.
- Streams are appended to at the exact version that was decided at. A conflict is the whole batch's:
  it is loaded and decided anew.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from functools import cached_property
from inspect import isabstract
from typing import Any, Concatenate, Generic, ParamSpec, TypeAlias, TypeVar, cast, overload
from uuid import UUID
from weakref import WeakKeyDictionary

from attrs import define, field

from ..aggregates.decider import C, Decider, DeciderAggregate, E, S
from ..aggregates.root import Aggregate, AggregateRoot, TRoot
from ..events import DomainEvent, NewEvent, StoredEvent, caused_by, names_under, registered
from ..ids import AggregateId, check_name, normalize_aggregate_id, stream_id_of
from ..repositories.outbox import OutboxMessage
from ..stores.interface import EventStore, EventStream, ReadOptions, Transaction
from .base import Projection
from .timers import Clock, PendingTimer, SystemClock, Timers

TProcess = TypeVar("TProcess", bound=AggregateRoot)
P = ParamSpec("P")
_AnyDecider: TypeAlias = Decider[Any, Any, Any]
_LONGEST_KEY = 100


class ProcessManager(Projection[Transaction], Generic[TProcess]):
    """Events in, commands out: a projection whose read model is what is to be done next.

    A subclass says by `correlate` which process an event belongs to, and has a method for each kind
    of event it reacts to:

        @handles(OrderPlaced)
        async def placed(self, event, order, act):
            order.begin(event.event.total)
            await act.execute(Account, order.account_id, Account.reserve, event.event.total)
            await act.schedule(PaymentOverdue(), after=timedelta(days=60))

    `order` is the process: an aggregate of the class `process`, new if it has no events yet, which
    keeps what the manager has to remember. `act` is a `Reaction`. **Exactly once**: the events that
    the process applies and all that is done by `act` are stored with the checkpoint or not at all.

    Events of the process's own streams come back to the manager like all others, those of timers
    among them, and belong to the process in whose stream they are.

    Where another writer gets ahead on one of the streams, what was decided is given up, and the
    method is called again. Only streams that are appended to are guarded so: let the process record
    by an event of its own what was decided by its state.

    A new version goes on where the one before stands once it takes over: what was reacted to is not
    reacted to again, not in a rebuild either. The first one begins with the store's first event.
    """

    process: type[TProcess]
    clock: Clock = SystemClock()
    look_every: float = 2.0
    """Seconds after which timers that were set by other processes are noticed at the latest."""
    batch_size: int = 100

    def __init__(self, store: EventStore) -> None:
        self._store = store
        self._batches = WeakKeyDictionary[Transaction, _Batch]()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        process = getattr(cls, "process", None)
        if process is None and isabstract(cls):
            return
        if not (isinstance(process, type) and issubclass(process, AggregateRoot)):
            raise TypeError(
                f"{cls.__name__}.process must be the class of its processes, a subclass of "
                f"AggregateRoot, not {process!r}"
            )

    @abstractmethod
    def correlate(self, event: StoredEvent) -> AggregateId | None:
        """The id of the process that an event belongs to; None if it concerns none."""

    async def handle(self, event: StoredEvent, tx: Transaction) -> None:
        """Nothing: what is done for an event is done once, by `react`."""

    async def react(self, event: StoredEvent, tx: Transaction) -> None:
        """Find the event's process, and have its `@handles` method decide."""
        method = self._method_for(type(event.event))
        process_id = None if method is None else self._process_of(event)
        if method is None or process_id is None:
            return
        batch = self._batches.get(tx)
        if batch is None:
            batch = self._batches[tx] = _Batch(self._store)
        with caused_by(event):
            loaded = await batch.load(self.process, process_id)
            act = Reaction(event, loaded, tx, batch, self._timers)
            await getattr(self, method)(event, loaded.aggregate, act)
            await loaded.append(tx)

    async def pending_timers(
        self,
        process_id: AggregateId | None = None,
        *,
        limit: int = 100,
        after: PendingTimer | None = None,
    ) -> Sequence[PendingTimer]:
        """The timers that are set and have not fired, the one that is due first coming first.

        All of one process; or the first ones of all processes, those after another one to page on.
        As they are stored: what another transaction has set is there once it is committed. One that
        is due and still pending is about to be fired, or cannot be (see the log).
        """
        if process_id is not None:
            return await self._timers.pending_of(normalize_aggregate_id(process_id))
        return await self._timers.pending(limit, after)

    async def reset(self, tx: Transaction) -> None:
        """Nothing: its processes are streams, which stay."""

    async def background(self) -> None:
        """Fire the timers."""
        await self._timers.run()

    def filters(self) -> ReadOptions:
        """What it reads of the store: by default, what its methods are for."""
        return ReadOptions(
            event_types=tuple(self.event_types)
            or names_under(cast("dict[type[DomainEvent], str]", self._methods)),
            aggregate_types=tuple(self.aggregate_types),
            batch_size=self.batch_size,
        )

    @cached_property
    def _timers(self) -> Timers:
        return Timers(
            self._store, self.name, self.process.aggregate_type, self.clock, self.look_every
        )

    def _process_of(self, event: StoredEvent) -> AggregateId | None:
        if event.aggregate_type == self.process.aggregate_type:
            return event.aggregate_id
        found = self.correlate(event)
        if found is not None and not isinstance(found, UUID | str):
            raise TypeError(
                f"{type(self).__name__}.correlate must return the id of a process, a UUID or a "
                f"string, or None, not {found!r}"
            )
        return found


class Reaction:
    """What one event leads to; stored with the checkpoint, all of it or nothing."""

    def __init__(
        self, event: StoredEvent, process: _Loaded, tx: Transaction, batch: _Batch, timers: Timers
    ) -> None:
        self._event = event
        self._process = process
        self._tx = tx
        self._batch = batch
        self._timers = timers

    @property
    def tx(self) -> Transaction:
        """The transaction, for documents, or for SQL where it is one that has it.

        Append to streams by `execute`, which knows what this transaction has appended already.
        """
        return self._tx

    @overload
    async def execute(
        self, aggregate: Decider[S, C, E], aggregate_id: AggregateId, command: C
    ) -> None: ...
    @overload
    async def execute(
        self,
        aggregate: type[TRoot],
        aggregate_id: AggregateId,
        command: Callable[Concatenate[TRoot, P], object],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> None: ...
    async def execute(
        self,
        aggregate: type[AggregateRoot] | Decider[S, C, E],
        aggregate_id: AggregateId,
        command: object,
        *args: object,
        **kwargs: object,
    ) -> None:
        """Carry out a command on an aggregate of this store, as `AggregateRepository.execute` does.

        What it raises has changed nothing of the aggregate, so the method may catch it and decide
        otherwise. If it does not, the event has failed.
        """
        loaded = await self._batch.load(aggregate, aggregate_id)
        if loaded is self._process:
            raise ValueError(
                f"{loaded.aggregate.stream_id} is the process that reacts: call its methods, "
                "without execute()"
            )
        try:
            loaded.aggregate.perform(command, *args, **kwargs)
            await loaded.append(self._tx)
        except Exception:
            loaded.renew()
            raise

    async def send(self, *messages: OutboxMessage) -> None:
        """Leave messages for the world outside in the outbox."""
        await self._tx.outbox.add(*messages)

    async def schedule(
        self,
        event: DomainEvent,
        *,
        after: timedelta | None = None,
        at: datetime | None = None,
        key: str | None = None,
    ) -> None:
        """Set a timer: at a moment, the event is appended to the process's own stream, once.

        The moment is `at`, or so long `after` the event at hand occurred. One that is over already
        is now. The event will have `occurred_at` the moment it was due, however late it fires.

        `key` is the timer's name in its process, the event's type if none is given. A timer that
        has it is replaced.
        """
        process = self._process.aggregate
        cast("AggregateRoot", process).check_applies(type(event))
        if (after is None) == (at is None):
            raise TypeError("give a timer either `after` or `at`")
        if at is None:
            at = self._event.occurred_at + cast("timedelta", after)
        elif at.tzinfo is None:
            raise ValueError(f"at must be a datetime with a time zone, not {at!r}")
        key = _timer_key(type(event) if key is None else key)
        await self._timers.set(self._tx, process.aggregate_id, key, event, at)

    async def cancel(self, key: str | type[DomainEvent]) -> None:
        """Take back a timer of the process, by its key, or by its event's class if it has none.

        One that has fired, or was never set, is fine.
        """
        process_id = self._process.aggregate.aggregate_id
        await self._timers.cancel(self._tx, process_id, _timer_key(key))


def _timer_key(key: str | type[DomainEvent]) -> str:
    if isinstance(key, type):
        return registered(key).name
    return check_name("key", key, _LONGEST_KEY)


@define
class _Loaded:
    """An aggregate as it is with what a transaction has appended to its stream."""

    kind: type[AggregateRoot] | _AnyDecider
    stored: EventStream
    appended: list[NewEvent] = field(factory=list[NewEvent], init=False)
    aggregate: Aggregate = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Without anything that is not appended."""
        kind, aggregate_id = self.kind, self.stored.aggregate_id
        self.aggregate = (
            DeciderAggregate(aggregate_id, decider=kind)
            if isinstance(kind, Decider)
            else kind(aggregate_id)
        )
        self.aggregate.replay(self.stored)
        for event in self.appended:
            self.aggregate.apply(event)
        self.aggregate.mark_committed(self.appended)

    async def append(self, tx: Transaction) -> None:
        aggregate, events = self.aggregate, self.aggregate.uncommitted_events
        if events:
            await tx.append_events(
                aggregate.aggregate_id,
                self.kind.aggregate_type,
                events,
                aggregate.version - len(events),
            )
            aggregate.mark_committed(events)
            self.appended += events


class _Batch:
    """What a transaction has loaded and changed so far; it does not hold the transaction."""

    def __init__(self, store: EventStore) -> None:
        self._store = store
        self._loaded: dict[str, _Loaded] = {}

    async def load(
        self, kind: type[AggregateRoot] | _AnyDecider, aggregate_id: AggregateId
    ) -> _Loaded:
        stream_id = stream_id_of(kind.aggregate_type, normalize_aggregate_id(aggregate_id))
        loaded = self._loaded.get(stream_id)
        if loaded is None:
            stored = await self._store.get_events(aggregate_id, kind.aggregate_type)
            loaded = self._loaded[stream_id] = _Loaded(kind, stored)
        elif loaded.kind is not kind:
            loaded.kind = kind
            loaded.renew()
        return loaded
