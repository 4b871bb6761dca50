"""Loading and saving aggregates."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from functools import partial
from itertools import takewhile
from typing import Concatenate, Generic, ParamSpec, TypeVar, cast, overload

from anyio.lowlevel import checkpoint

from ..bus.interface import EventBus
from ..errors import AggregateNotFoundError, ConcurrencyError
from ..events import StoredEvent
from ..ids import AggregateId, stream_id_of
from ..stores.interface import AppendHandler, AppendResult, EventStore, ReadOptions
from ..stores.reading import readable
from .decider import C, Decider, DeciderAggregate, E, S
from .root import Aggregate, AggregateRoot, TRoot

TAggregate = TypeVar("TAggregate", bound=Aggregate)
P = ParamSpec("P")

_BATCH_SIZE = 1000


def _occurred_until(moment: datetime, stored: StoredEvent) -> bool:
    return stored.occurred_at <= moment


class AggregateRepository(Generic[TAggregate]):
    """Loads aggregates of one kind from a store, and saves what they have decided.

    `aggregate` is a subclass of `AggregateRoot`, or a `Decider`. `inline`, such as an `Inline` with
    projections, is called with the events in the transaction in which they are stored: see
    `Transaction.on_append`. What is saved is published to the `bus` afterwards, if there is one.
    """

    @overload
    def __init__(
        self: AggregateRepository[TRoot],
        store: EventStore,
        aggregate: type[TRoot],
        *,
        inline: AppendHandler | None = None,
        bus: EventBus | None = None,
    ) -> None: ...
    @overload
    def __init__(
        self: AggregateRepository[DeciderAggregate[S, C, E]],
        store: EventStore,
        aggregate: Decider[S, C, E],
        *,
        inline: AppendHandler | None = None,
        bus: EventBus | None = None,
    ) -> None: ...
    def __init__(
        self,
        store: EventStore,
        aggregate: type[AggregateRoot] | Decider[S, C, E],
        *,
        inline: AppendHandler | None = None,
        bus: EventBus | None = None,
    ) -> None:
        self._store = store
        self._inline = inline
        self._bus = bus
        self._aggregate_type = aggregate.aggregate_type
        self._new = cast(
            "Callable[[AggregateId], TAggregate]",
            aggregate
            if isinstance(aggregate, type)
            else partial(DeciderAggregate, decider=aggregate),
        )

    async def load(
        self, aggregate_id: AggregateId, *, version: int | None = None, at: datetime | None = None
    ) -> TAggregate:
        """The aggregate as it is now, or as it was.

        `version` stops after that version; `at` before the first event that occurred later than
        that moment. An aggregate of the past can be looked at; saving changes to it is a conflict.

        Raises:
            AggregateNotFoundError: there is no such aggregate, or it was not there yet.
            EventDecodeError: one of its events cannot be read.
        """
        if version is not None and version < 1:
            raise ValueError(f"version must be a number from 1, not {version}")
        if at is not None and at.tzinfo is None:
            raise ValueError(f"at must be a datetime with a time zone, not {at!r}")
        aggregate = await self._rebuilt(aggregate_id, version, at)
        reached = aggregate.version
        if not reached or (version is not None and at is None and reached < version):
            as_of = f" at {at.isoformat()}" if at else ""
            as_of += f" at version {version}" if version is not None else ""
            raise AggregateNotFoundError(stream_id_of(self._aggregate_type, aggregate_id), as_of)
        return aggregate

    async def _rebuilt(
        self, aggregate_id: AggregateId, version: int | None = None, at: datetime | None = None
    ) -> TAggregate:
        """It, as it was; at version 0 if it was not there. Its events are let go one by one."""
        aggregate = self._new(aggregate_id)
        stream_id = stream_id_of(self._aggregate_type, aggregate.aggregate_id)
        options = ReadOptions(to_version=version, batch_size=_BATCH_SIZE)
        batches = self._store.read_stream(stream_id, options)
        while batch := await batches.next_batch():
            events = readable(batch)
            if at is not None:
                events = takewhile(partial(_occurred_until, at), events)
            before = aggregate.version
            aggregate.replay(events)
            if aggregate.version - before < len(batch):
                break
        return aggregate

    async def save(self, aggregate: TAggregate) -> AppendResult | None:
        """Append the aggregate's uncommitted events; None if there are none.

        It is at the version that it was loaded at, or `ConcurrencyError` is raised and it keeps
        its events. As it is, it may be saved again after any failure or cancellation: the events
        have their ids, so nothing is stored twice. A bus that fails raises its own error, with a
        note that the events are stored.
        """
        if aggregate.stream_id != stream_id_of(self._aggregate_type, aggregate.aggregate_id):
            raise TypeError(
                f"{aggregate.stream_id} cannot be saved here: this is the repository of "
                f"{self._aggregate_type}, and the events belong in a stream of their own type"
            )
        result = await self._append(aggregate)
        await self._publish(result)
        return result

    @overload
    async def execute(
        self: AggregateRepository[DeciderAggregate[S, C, E]], aggregate_id: AggregateId, command: C
    ) -> AppendResult | None: ...
    @overload
    async def execute(
        self,
        aggregate_id: AggregateId,
        command: Callable[Concatenate[TAggregate, P], object],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> AppendResult | None: ...
    async def execute(
        self, aggregate_id: AggregateId, command: object, *args: object, **kwargs: object
    ) -> AppendResult | None:
        """Load, decide, save; on a conflict load and decide anew, as often as it takes.

        `command` is a method of the aggregate, called with the arguments (`Account.withdraw, 10`),
        or a decider's command. It is called again after a conflict, so it changes nothing but the
        aggregate. A conflict means that another writer has got ahead; bound the waiting with a
        cancel scope, if at all. An aggregate without events is a new one. None is returned if
        nothing was decided.
        """
        while True:
            aggregate = await self._rebuilt(aggregate_id)
            aggregate.perform(command, *args, **kwargs)
            try:
                result = await self._append(aggregate)
            except ConcurrencyError:
                continue
            await self._publish(result)
            return result

    async def _append(self, aggregate: TAggregate) -> AppendResult | None:
        uncommitted = aggregate.uncommitted_events
        if not uncommitted:
            await checkpoint()
            return None
        append = (
            aggregate.aggregate_id,
            self._aggregate_type,
            uncommitted,
            aggregate.version - len(uncommitted),
        )
        if self._inline is None:
            result = await self._store.append_events(*append)
        else:
            async with self._store.transaction() as tx:
                tx.on_append(self._inline)
                await tx.append_events(*append)
            (result,) = tx.results
        aggregate.mark_committed(uncommitted)
        return result

    async def _publish(self, result: AppendResult | None) -> None:
        if result is None or self._bus is None:
            return
        try:
            await self._bus.publish(result.events)
        except Exception as error:
            last = result.events[-1]
            error.add_note(
                f"The events are stored ({last.stream_id} is at version {last.version}); "
                "only publishing them has failed. Do not save them again."
            )
            raise
