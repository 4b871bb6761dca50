# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""What type checkers have to find in the public API: checked by them, never run.

Each `ignore` is a mistake that they have to see: they report one where there is nothing to ignore.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import assert_type
from uuid import UUID

import attrs

from eventsource_anyio import (
    ANY,
    NO_STREAM,
    AggregateRepository,
    AggregateRoot,
    AppendResult,
    CheckpointRepository,
    Decider,
    DeciderAggregate,
    DomainEvent,
    EventStore,
    EventStream,
    InMemoryEventStore,
    NewEvent,
    OutboxMessage,
    OutboxRepository,
    ProjectionCoordinator,
    ReadOptions,
    SQLiteEventStore,
    StoredEvent,
    Subscription,
    SyncRunner,
    Transaction,
    applies,
    upcaster,
)
from eventsource_anyio.bus.interface import EventBus
from eventsource_anyio.errors import EventDecodeError
from eventsource_anyio.projections import Inline, Projection, SingleStreamView, evolves, handles
from eventsource_anyio.relay import EventRelay, OutboxRelay, OutboxStatistics, ParkedKey
from eventsource_anyio.repositories.document import Document, DocumentRepository
from eventsource_anyio.repositories.outbox import StoredMessage
from eventsource_anyio.stores.interface import EventIterator
from eventsource_anyio.stores.sql_transaction import SQLTransaction
from eventsource_anyio.testing import cancel_at_every_checkpoint, given


@attrs.frozen
class Filled(DomainEvent):
    litres: int


@attrs.frozen
class Drained(DomainEvent):
    litres: int


class Tank(AggregateRoot):
    def __init__(self, aggregate_id: UUID | str) -> None:
        super().__init__(aggregate_id)
        self.litres = 0

    def fill(self, litres: int, *, slowly: bool = False) -> None:
        self.apply(Filled(litres))

    @applies(Filled, Drained)
    def _changed(self, event: Filled | Drained) -> None:
        self.litres += event.litres


@attrs.frozen
class Fill:
    litres: int


def decide(command: Fill, litres: int) -> list[Filled | Drained]:
    return [Filled(command.litres)]


def evolve(litres: int, event: Filled | Drained) -> int:
    return litres + event.litres


tank = Decider("Tank", initial=int, decide=decide, evolve=evolve)
assert_type(tank, Decider[int, Fill, Filled | Drained])


async def of_a_root(store: EventStore) -> None:
    tanks = AggregateRepository(store, Tank)
    assert_type(tanks, AggregateRepository[Tank])
    loaded = await tanks.load("t", version=2)
    assert_type(loaded, Tank)
    assert_type(loaded.uncommitted_events, tuple[NewEvent, ...])
    assert_type(await tanks.save(loaded), AppendResult | None)
    assert_type(await tanks.execute("t", Tank.fill, 5), AppendResult | None)
    assert_type(await tanks.execute("t", Tank.fill, 5, slowly=True), AppendResult | None)
    await tanks.execute("t", Tank.fill, "5")  # type: ignore[arg-type]
    await tanks.execute("t", Tank.fill)  # type: ignore[call-arg]
    await tanks.save(tank)  # type: ignore[arg-type]
    await tanks.load(7)  # type: ignore[arg-type]


async def of_a_decider(store: EventStore) -> None:
    tanks = AggregateRepository(store, tank)
    assert_type(tanks, AggregateRepository[DeciderAggregate[int, Fill, Filled | Drained]])
    loaded = await tanks.load("t")
    assert_type(loaded, DeciderAggregate[int, Fill, Filled | Drained])
    assert_type(loaded.state, int)
    assert_type(await tanks.execute("t", Fill(5)), AppendResult | None)
    await tanks.execute("t", 5)  # type: ignore[call-overload]
    loaded.decide(5)  # type: ignore[arg-type]


async def of_a_store(store: EventStore) -> None:
    result = await store.append_events("t", "Tank", [Filled(5), NewEvent(Drained(2))], NO_STREAM)
    assert_type(result, AppendResult)
    assert_type(result.events, tuple[StoredEvent, ...])
    stream = await store.get_events("t", "Tank")
    assert_type(stream, EventStream)
    assert_type(stream[0], StoredEvent[DomainEvent])
    assert_type(stream[1:], tuple[StoredEvent, ...])
    for stored in stream:
        assert_type(stored, StoredEvent)
        assert_type(stored.event, DomainEvent)
        if isinstance(stored.event, Filled):
            assert_type(stored.event.litres, int)
    assert_type(store.read_stream("Tank-t"), EventIterator)
    batch = await store.read_stream("Tank-t").next_batch()
    assert_type(batch, Sequence[StoredEvent | EventDecodeError])
    assert_type(
        store.read_all(ReadOptions(event_types=(Filled, "Drained"))), AsyncIterator[StoredEvent]
    )
    async with store.subscribe(after=3) as subscription:
        assert_type(subscription, Subscription)
        assert_type(await anext(subscription), StoredEvent)
    async with store.transaction() as transaction:
        assert_type(transaction, Transaction)
        assert_type(transaction.checkpoints, CheckpointRepository)
        assert_type(transaction.outbox, OutboxRepository)
        assert_type(transaction.documents, DocumentRepository)
        assert_type(await transaction.documents.save("leases", "a", 1), UUID)
    await store.append_events("t", "Tank", [5], ANY)  # type: ignore[list-item]
    await store.append_events("t", "Tank", [Filled(5)])  # type: ignore[call-arg]
    await store.append_events("t", "Tank", [Filled(5)], "ANY")  # type: ignore[arg-type]


async def of_repositories(store: EventStore) -> None:
    assert_type(store.checkpoints, CheckpointRepository)
    assert_type(await store.checkpoints.get("reader"), int)
    await store.checkpoints.save("reader", 7, expected=5)
    await store.checkpoints.save("reader", 7, 5)  # type: ignore[call-arg]
    await store.checkpoints.save("reader", "7")  # type: ignore[arg-type]
    assert_type(store.outbox, OutboxRepository)
    for stored in await store.outbox.pending(10):
        assert_type(stored.message, OutboxMessage)
        assert_type(stored.message.payload, bytes)
        await store.outbox.delivered([stored.message.message_id])
    await store.outbox.add(OutboxMessage("topic", b"", key="k", metadata={"user": "ann"}))
    await store.outbox.add(OutboxMessage("topic", "text"))  # type: ignore[arg-type]
    await store.outbox.add("text")  # type: ignore[arg-type]
    await store.outbox.delivered(["7"])  # type: ignore[list-item]


async def of_documents(store: EventStore) -> None:
    documents = store.documents
    assert_type(documents, DocumentRepository)
    revision = await documents.add("leases", "a", {"until": 7.5, "by": ["me", None]})
    assert_type(revision, UUID)
    assert_type(await documents.save("leases", "a", None, expected=revision), UUID)
    found = await documents.get("leases", "a")
    assert_type(found, Document | None)
    if found is not None:
        assert_type(found.key, str)
        assert_type(found.value, object)
        assert_type(found.revision, UUID)
        found.value = 7  # type: ignore[misc]
    assert_type(await documents.get_all("leases", ["a"]), Mapping[str, Document])
    assert_type(await documents.list("leases", after="a", limit=7), Sequence[Document])
    await documents.save_all("leases", {"a": 1, "b": [2]})
    await documents.delete("leases", "a", expected=revision)
    await documents.save("leases", "a", 1, revision)  # type: ignore[call-arg]
    await documents.save("leases", "a", 1, expected="7")  # type: ignore[arg-type]
    await documents.get("leases", 7)  # type: ignore[arg-type]
    await documents.save_all("leases", {1: "a"})  # type: ignore[dict-item]


@attrs.frozen
class Level:
    litres: int = 0


class Levels(SingleStreamView[Level]):
    name = "levels"
    aggregate_type = "Tank"

    @evolves(Filled)
    def filled(self, view: Level | None, event: StoredEvent[Filled]) -> Level:
        return Level((view or Level()).litres + event.event.litres)

    @evolves(Drained)
    def drained(self, view: Level, event: StoredEvent[Drained]) -> Level | None:
        return Level(view.litres - event.event.litres)


class Overall(SingleStreamView[Level]):
    name = "overall"
    aggregate_type = "Tank"

    def evolve(self, view: Level | None, event: StoredEvent) -> Level | None:
        assert_type(super().evolve(view, event), Level | None)
        return view


class Sums(Projection[SQLTransaction]):
    name = "sums"

    @handles(Filled)
    async def filled(self, event: StoredEvent[Filled], tx: SQLTransaction) -> None: ...

    async def reset(self, tx: SQLTransaction) -> None: ...


async def of_views(store: EventStore) -> None:
    levels = Levels()
    assert_type(await levels.get(store, "t"), Level | None)
    assert_type(await levels.list(store, after="t", limit=7), Mapping[UUID | str, Level])
    await levels.get("t")  # type: ignore[call-arg, arg-type]
    await levels.list(store, "t")  # type: ignore[call-arg]


async def of_inline_projections(store: EventStore) -> None:
    inline = Inline(Levels(), Sums())
    tanks = AggregateRepository(store, Tank, inline=inline)
    assert_type(tanks, AggregateRepository[Tank])
    AggregateRepository(store, tank, inline=inline)
    async with store.transaction() as tx:
        tx.on_append(inline)
        tx.on_append(count)
        tx.on_append(Levels())  # type: ignore[arg-type]
    await inline.rebuild(store)
    Inline(Levels)  # type: ignore[arg-type]
    AggregateRepository(store, Tank, inline=Levels())  # type: ignore[call-overload]


async def count(events: Sequence[StoredEvent], tx: Transaction) -> None: ...


async def of_relays(store: EventStore, bus: EventBus) -> None:
    async def send(messages: Sequence[StoredMessage]) -> None: ...
    async def send_events(events: Sequence[StoredEvent]) -> int:
        return len(events)

    ProjectionCoordinator(
        store,
        [
            EventRelay(bus, name="bus", after="now", event_types=[Filled, "Drained"]),
            EventRelay(send_events, name="events", after=7, on_failure="stop"),
        ],
    )
    relay = OutboxRelay(store, send, outages=(OSError, KeyError))
    assert_type(await relay.parked(), Sequence[ParkedKey])
    assert_type(await relay.parked_messages((await relay.parked())[0]), Sequence[StoredMessage])
    assert_type(relay.statistics(), OutboxStatistics)
    assert_type(await store.outbox.pending(10, after=5), Sequence[StoredMessage])


async def of_opening() -> None:
    async with InMemoryEventStore() as in_memory:
        assert_type(in_memory, InMemoryEventStore)
    async with SQLiteEventStore("events.db") as sqlite:
        assert_type(sqlite, SQLiteEventStore)


def of_stored_events(
    filled: StoredEvent[Filled], either: StoredEvent[Filled | Drained], some: StoredEvent
) -> None:
    assert_type(filled.event, Filled)
    assert_type(either.event, Filled | Drained)
    assert_type(some.event, DomainEvent)
    wider: Sequence[StoredEvent] = [filled, either]  # a handler of any event takes one of these
    narrower: StoredEvent[Filled] = either  # type: ignore[assignment]
    filled.version = 7  # type: ignore[misc]
    del wider, narrower


def of_scenarios() -> None:
    given(Tank, Filled(5)).when(Tank.fill, 5, slowly=True).then(Filled(5))
    given(Tank).when(Tank.fill, 5).then_raises(ValueError, "too much")
    assert_type(given(Tank).aggregate, Tank)
    assert_type(given(Tank).when(Tank.fill, 5).aggregate, Tank)
    given(Tank).when(Tank.fill, "5")  # type: ignore[arg-type]
    assert_type(given(tank).aggregate, DeciderAggregate[int, Fill, Filled | Drained])
    assert_type(given(tank, Filled(5)).when(Fill(5)).then(Filled(5)).aggregate.state, int)
    given(tank).when(5)  # type: ignore[call-overload]


def of_sync_use(store: EventStore) -> None:
    with SyncRunner(store) as runner:
        assert_type(runner, SyncRunner)
        assert_type(runner.call(store.last_position), int)
        tanks = AggregateRepository(store, Tank)
        assert_type(runner.call(tanks.load, "t", version=3), Tank)
        assert_type(runner.iterate(store.read_all()), Iterator[StoredEvent])
        with runner.context(store.transaction()) as transaction:
            assert_type(transaction, Transaction)
            runner.call(transaction.append_events, "t", "Tank", [Filled(5)], ANY)
        runner.call(store.last_position, 7)  # type: ignore[call-arg]
        runner.call(len, "7")  # type: ignore[arg-type]


async def of_cancelling(store: EventStore) -> None:
    async def look(position: int | None) -> None: ...

    assert_type(await cancel_at_every_checkpoint(store.last_position, look), int)


@upcaster(Filled, from_version=1)
def in_litres(payload: dict[str, object]) -> dict[str, object]:
    return payload


assert_type(in_litres({}), dict[str, object])
