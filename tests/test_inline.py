"""Projections in the transaction of the append, on every store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

import anyio
import attrs
import pytest
from sqlalchemy import Column, Integer, MetaData, String, Table, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from eventsource_anyio import (
    ANY,
    NO_STREAM,
    AggregateRepository,
    AggregateRoot,
    ConcurrencyError,
    DomainEvent,
    DuplicateEventError,
    EventStore,
    InMemoryEventStore,
    NewEvent,
    PostgreSQLEventStore,
    SQLiteEventStore,
    StoredEvent,
    Transaction,
    applies,
)
from eventsource_anyio.errors import DocumentConflictError
from eventsource_anyio.projections import (
    Inline,
    Projection,
    ProjectionCoordinator,
    SingleStreamView,
    evolves,
    handles,
)
from eventsource_anyio.repositories.outbox import OutboxMessage
from eventsource_anyio.stores.sql_transaction import SQLTransaction
from eventsource_anyio.testing import cancel_at_every_checkpoint
from eventsource_anyio.testing.samples import Ended, Happened, append_numbers, numbers
from tests.every_store import make_store, open_store, which_store

__all__ = ["make_store", "open_store", "which_store"]


@attrs.frozen
class Total:
    sum: int = 0
    events: int = 0


class Totals(SingleStreamView[Total]):
    name = "totals"
    aggregate_type = "Thing"

    @evolves(Happened)
    def happened(self, view: Total | None, event: StoredEvent[Happened]) -> Total:
        before = view or Total()
        return Total(before.sum + event.event.number, before.events + 1)


class Heard(Projection[Transaction]):
    """Everything that it was called with, in the order of calls; and as documents."""

    name = "heard"
    event_types = (Happened,)

    def __init__(self) -> None:
        self.events: list[StoredEvent] = []

    async def handle(self, event: StoredEvent, tx: Transaction) -> None:
        self.events.append(event)
        await tx.documents.add("heard", f"{event.position:06}", event.version)

    async def reset(self, tx: Transaction) -> None:
        await tx.documents.delete_all("heard")


class Failing(Heard):
    async def handle(self, event: StoredEvent, tx: Transaction) -> None:
        await super().handle(event, tx)
        if event.event == Happened(13):
            raise KeyError("thirteen")


async def append_inline(
    store: EventStore,
    inline: Inline,
    events: Sequence[DomainEvent | NewEvent],
    aggregate_id: str = "a",
    expected: Any = ANY,
) -> None:
    async with store.transaction() as tx:
        tx.on_append(inline)
        await tx.append_events(aggregate_id, "Thing", events, expected)


async def heard(store: EventStore) -> dict[int, object]:
    return {int(one.key): one.value for one in await store.documents.list("heard", limit=10_000)}


async def test_it_is_called_with_the_events_as_they_are_stored(store: EventStore) -> None:
    await append_numbers(store, 2)
    projection = Heard()
    result = None
    async with store.transaction() as tx:
        tx.on_append(Inline(projection, Totals()))
        await tx.append_events("a", "Thing", [Happened(5), Ended(), Happened(6)], 2)
        await tx.append_events("b", "Other", [Happened(7)], NO_STREAM)
        await tx.checkpoints.save("reader", 3, expected=0)
        await tx.documents.add("own", "a", 1)
        assert projection.events == []
    result = tx.results
    stored = [*(await store.get_events("a"))[2:], *await store.get_events("b")]
    assert [*result[0].events, *result[1].events] == stored
    assert projection.events == [one for one in stored if one.event != Ended()]
    assert await heard(store) == {one.position: one.version for one in projection.events}
    assert await Totals().get(store, "a") == Total(11, 2)
    assert await Totals().get(store, "b") is None
    assert await store.checkpoints.get("reader") == 3
    assert len(await store.documents.list("own")) == 1
    # Nothing to hand on: nobody is called.
    for aggregate_id, event in (("a", Ended()), ("x", Ended())):
        await append_inline(store, Inline(Heard()), [event], aggregate_id)
    async with store.transaction() as tx:
        tx.on_append(Inline(Failing()))
        await tx.documents.save("own", "a", 2)
    assert (await store.documents.list("own"))[0].value == 2


async def test_what_fails_stores_nothing_and_is_raised_as_it_is(store: EventStore) -> None:
    await append_numbers(store, 1)
    last = await store.last_position()
    inline = Inline(Totals(), Failing())

    async def append(*events: DomainEvent, expected: Any = ANY, documents: str = "new") -> None:
        async with store.transaction() as tx:
            tx.on_append(inline)
            await tx.documents.add("own", documents, 1)
            await tx.outbox.add(OutboxMessage("topic", b"7"))
            await tx.append_events("a", "Thing", events, expected)
            await tx.append_events("b", "Thing", [Happened(1)], ANY)

    await store.documents.add("own", "there", 0)
    with pytest.raises(KeyError, match="thirteen"):
        await append(Happened(1), Happened(13))
    with pytest.raises(ConcurrencyError, match="is at version 1, expected 7"):
        await append(Happened(1), expected=7)
    with pytest.raises(DocumentConflictError):
        await append(Happened(1), documents="there")

    async def read_nothing(events: Sequence[StoredEvent], tx: Transaction) -> None:
        await tx.documents.add("own", "there", 1)

    with pytest.raises(DocumentConflictError):
        async with store.transaction() as tx:
            tx.on_append(read_nothing)
            await tx.append_events("a", "Thing", [Happened(1)], ANY)
    assert await store.last_position() == last
    assert [one.key for one in await store.documents.list("own")] == ["there"]
    assert await heard(store) == {}
    assert await Totals().get(store, "a") is None
    assert await store.outbox.pending() == []
    await append(Happened(2))
    assert await Totals().get(store, "a") == Total(2, 1)
    assert len(await store.outbox.pending()) == 1
    assert await store.last_position() >= last + 2


async def test_an_append_that_repeats_another_is_not_handled_again(store: EventStore) -> None:
    projection = Heard()
    events = [NewEvent(Happened(1)), NewEvent(Happened(2))]
    for expected in (NO_STREAM, NO_STREAM, ANY, 0):
        await append_inline(store, Inline(projection), events, expected=expected)
    assert numbers(projection.events) == [1, 2]
    async with store.transaction() as tx:  # also within one
        tx.on_append(Inline(projection, Totals()))
        await tx.append_events("a", "Thing", events, ANY)
        await tx.append_events("a", "Thing", [again := NewEvent(Happened(3))], ANY)
        await tx.append_events("a", "Thing", [again], ANY)
    assert [result.version for result in tx.results] == [2, 3, 3]
    assert numbers(projection.events) == [1, 2, 3]
    assert await Totals().get(store, "a") == Total(3, 1)
    with pytest.raises(DuplicateEventError):
        await append_inline(store, Inline(projection), events, "b")
    assert numbers(projection.events) == [1, 2, 3]


class Thing(AggregateRoot):
    def __init__(self, aggregate_id: UUID | str) -> None:
        super().__init__(aggregate_id)
        self.sum = 0

    def happen(self, number: int) -> None:
        self.apply(Happened(number))

    @applies(Happened)
    def _happened(self, event: Happened) -> None:
        self.sum += event.number


async def test_an_aggregate_is_saved_together_with_its_views(store: EventStore) -> None:
    things = AggregateRepository(store, Thing, inline=Inline(Totals(), Failing()))
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            for number in range(10):
                tasks.start_soon(things.execute, f"t{number % 3}", Thing.happen, number)
    for number in range(3):
        own = list(range(number, 10, 3))
        assert await Totals().get(store, f"t{number}") == Total(sum(own), len(own))
        assert (await things.load(f"t{number}")).sum == sum(own)
    thing = await things.load("t1")
    thing.happen(13)
    with pytest.raises(KeyError):
        await things.save(thing)
    assert [new.event for new in thing.uncommitted_events] == [Happened(13)]
    plain = AggregateRepository(store, Thing)
    await plain.execute("t1", Thing.happen, 1)
    with pytest.raises(ConcurrencyError):
        await things.save(thing)


async def test_many_who_append_at_once_lose_nothing(store: EventStore) -> None:
    """Inline and plain appends to shared streams, transactions that fail, and a coordinator."""
    inline = Inline(Totals(), Failing())
    followed = Totals()
    followed.name = "followed"
    coordinator = ProjectionCoordinator(store, [followed])
    failed: list[int] = []

    async def append(number: int) -> None:
        try:
            await append_inline(store, inline, [Happened(number)], f"s{number % 2}")
        except KeyError:
            failed.append(number)

    with anyio.fail_after(60):
        async with anyio.create_task_group() as running:
            await running.start(coordinator.run)
            async with anyio.create_task_group() as tasks:
                for number in range(30):
                    tasks.start_soon(append, number)
                    tasks.start_soon(append_numbers, store, 1, f"plain{number}")
            await coordinator.wait_for(await store.last_position())
            coordinator.stop()
    assert failed == [13]
    for stream in (0, 1):
        kept = [number for number in range(stream, 30, 2) if number != 13]
        assert sorted(numbers(await store.get_events(f"s{stream}"))) == kept
        assert await Totals().get(store, f"s{stream}") == Total(sum(kept), len(kept))
        assert await followed.get(store, f"s{stream}") == Total(sum(kept), len(kept))
    events = [one async for one in store.read_all() if one.stream_id.startswith("Thing-s")]
    assert await heard(store) == {one.position: one.version for one in events}


async def test_nobody_sees_an_event_before_its_view(store: EventStore) -> None:
    arrived = anyio.Event()
    seen: list[Total | None] = []

    async def look(events: Sequence[StoredEvent], tx: Transaction) -> None:
        assert [one async for one in store.read_all()] == []
        assert await store.last_position() == 0
        await anyio.wait_all_tasks_blocked()
        assert not arrived.is_set()

    async def follow() -> None:
        async for event in subscription:
            seen.append(await Totals().get(store, event.aggregate_id))
            arrived.set()

    with anyio.fail_after(30):
        async with store.subscribe() as subscription, anyio.create_task_group() as tasks:
            tasks.start_soon(follow)
            async with store.transaction() as tx:
                tx.on_append(Inline(Totals()))
                tx.on_append(look)
                await tx.append_events("a", "Thing", [Happened(4)], NO_STREAM)
            await arrived.wait()
            tasks.cancel_scope.cancel()
    assert seen == [Total(4, 1)]


async def test_cancelled_at_any_checkpoint_all_is_stored_or_nothing(store: EventStore) -> None:
    runs = whole = 0
    events: list[NewEvent] = []
    inline = Inline(Totals(), Heard())

    async def append() -> bool:
        nonlocal runs, events
        runs += 1
        events = [NewEvent(Happened(runs)), NewEvent(Happened(1))]
        async with store.transaction() as tx:
            tx.on_append(inline)
            await tx.append_events("a", "Thing", events, ANY)
        return True

    async def check(result: bool | None) -> None:
        nonlocal whole
        stored = await store.get_events("a", "Thing")
        # A cancellation that comes out of the block means that nothing was stored.
        assert len(stored) == (whole + 2 if result else whole)
        whole = len(stored)
        total = sum(numbers(stored))
        view = await Totals().get(store, "a")
        assert view == (Total(total, whole) if whole else None)
        assert len(await heard(store)) == whole
        await append_inline(store, inline, events)
        whole = len(await store.get_events("a", "Thing"))
        assert len(await heard(store)) == whole

    assert await cancel_at_every_checkpoint(append, check) >= 4


async def test_what_is_called_cannot_append_and_cannot_wait_for_itself(store: EventStore) -> None:
    async def append(events: Sequence[StoredEvent], tx: Transaction) -> None:
        await tx.append_events("b", "Thing", [Happened(1)], ANY)

    async def append_beside(events: Sequence[StoredEvent], tx: Transaction) -> None:
        await store.append_events("b", "Thing", [Happened(1)], ANY)

    async def save_beside(events: Sequence[StoredEvent], tx: Transaction) -> None:
        await store.documents.save("own", "a", 1)

    handlers = [(append, "on_append appends nothing")]
    if not isinstance(store, PostgreSQLEventStore):
        handlers += [(append_beside, "wait for itself"), (save_beside, "wait for itself")]
    for handler, why in handlers:
        with pytest.raises(RuntimeError, match=why):
            async with store.transaction() as tx:
                tx.on_append(handler)
                await tx.append_events("a", "Thing", [Happened(1)], ANY)
    assert await store.last_position() == 0
    with pytest.raises(RuntimeError, match="inside its block"):
        tx.on_append(append)
    with pytest.raises(RuntimeError, match="inside its block"):
        await tx.documents.save("own", "a", 1)
    await append_numbers(store, 1)  # nothing is held on to
    with pytest.raises(ValueError, match="no projection"):
        Inline()


async def test_a_rebuild_makes_the_read_models_of_all_events(store: EventStore) -> None:
    totals, projection = Totals(), Heard()
    totals.batch_size = projection.batch_size = 7
    await Inline(totals).rebuild(store)
    await append_numbers(store, 30)
    await append_numbers(store, 3, "b")
    await append_numbers(store, 3, "c", "Other")
    inline = Inline(totals, projection)
    await append_inline(store, inline, [Happened(1)], "b")
    assert await totals.get(store, "b") == Total(1, 1)
    for _ in range(2):
        await inline.rebuild(store)
        everything = [one async for one in store.read_all()]
        assert await heard(store) == {one.position: one.version for one in everything}
        assert await totals.list(store) == {"a": Total(sum(range(30)), 30), "b": Total(4, 4)}
    await append_inline(store, inline, [Happened(5)], "b")
    assert await totals.get(store, "b") == Total(9, 5)
    # A version of its own serves once it is built; until then the one before does.
    newer = Totals()
    newer.version = 2
    assert await newer.get(store, "b") == Total(9, 5)
    await store.documents.save("views/totals/1", "Thing-old", {"sum": 0, "events": 7})
    assert await newer.get(store, "old") == Total(0, 7)
    await Inline(newer).rebuild(store)
    for one in (newer, totals):
        assert await one.get(store, "old") is None
        assert await one.get(store, "b") == Total(9, 5)


async def test_another_one_is_built_beside_while_appends_go_on(store: EventStore) -> None:
    """And takes its place inline while nothing is appended, as the docs have it."""

    class Others(Totals):
        name = "others"

    async def add(totals: Totals, number: int) -> None:
        async with store.transaction() as tx:
            tx.on_append(Inline(totals))
            await tx.append_events(f"s{number % 3}", "Thing", [Happened(number)], ANY)

    old, new = Totals(), Others()
    for number in range(20):
        await add(old, number)
    coordinator = ProjectionCoordinator(store, [new])
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            await tasks.start(coordinator.run)
            for number in range(20, 40):
                await add(old, number)
            await coordinator.wait_for(await store.last_position())
            coordinator.stop()
    for stream in ("s0", "s1", "s2"):
        assert await new.get(store, stream) == await old.get(store, stream) is not None
    for number in range(40, 60):
        await add(new, number)
    for first in range(3):
        its = range(first, 60, 3)
        assert await new.get(store, f"s{first}") == Total(sum(its), len(its))


async def test_a_rebuild_notices_what_was_appended_meanwhile(store: EventStore) -> None:
    class Careless(Totals):
        async def reset(self, tx: Transaction) -> None:
            await super().reset(tx)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(append_numbers, store, 1, "late")

    await append_numbers(store, 3)
    with pytest.raises(RuntimeError, match=r"appended to Thing-late while .*'totals'"):
        await Inline(Careless()).rebuild(store)


# -- with SQL ---------------------------------------------------------------------------------

TABLE = Table(
    "inline_sums",
    MetaData(),
    Column("name", String, primary_key=True),
    Column("sum", Integer, nullable=False),
)


class Sums(Projection[SQLTransaction]):
    name = "sums"

    @handles(Happened)
    async def happened(self, event: StoredEvent[Happened], tx: SQLTransaction) -> None:
        name, number = str(event.aggregate_id), event.event.number
        change = update(TABLE).where(TABLE.c.name == name).values(sum=TABLE.c.sum + number)
        result: Any = await tx.execute(change)
        if not result.rowcount:
            await tx.execute(insert(TABLE).values(name=name, sum=number))
        await tx.documents.save("sums", name, event.version)

    async def reset(self, tx: SQLTransaction) -> None:
        await tx.execute(TABLE.delete())


with_sql = pytest.mark.parametrize("which", ["SQLite", "PostgreSQL"])


@pytest.fixture
async def sql_store(store: EventStore) -> PostgreSQLEventStore | SQLiteEventStore:
    assert isinstance(store, PostgreSQLEventStore | SQLiteEventStore)
    async with store.transaction() as tx:
        await tx.run_sync(lambda session: TABLE.metadata.create_all(session.connection()))
    return store


async def sums(store: PostgreSQLEventStore | SQLiteEventStore) -> dict[str, int]:
    async with store.transaction() as tx:
        return {row.name: row.sum for row in await tx.execute(select(TABLE).order_by("name"))}


@with_sql
async def test_sql_is_stored_with_the_events_that_it_follows_from(sql_store: Any) -> None:
    store = sql_store
    await append_inline(store, Inline(Sums()), [Happened(3), Ended(), Happened(4)])
    assert await sums(store) == {"a": 7}
    async with store.transaction() as tx:  # after SQL of the user's own
        tx.on_append(Inline(Sums()))
        await tx.execute(update(TABLE).values(sum=100))
        await tx.append_events("a", "Thing", [Happened(1)], 3)
        await tx.append_events("b", "Thing", [Happened(2)], NO_STREAM)
    assert await sums(store) == {"a": 101, "b": 2}
    assert [one.value for one in await store.documents.list("sums")] == [4, 1]
    with pytest.raises(ConcurrencyError):
        await append_inline(store, Inline(Sums()), [Happened(1)], expected=1)
    with pytest.raises(KeyError):
        await append_inline(store, Inline(Sums(), Failing()), [Happened(1), Happened(13)])
    assert await sums(store) == {"a": 101, "b": 2}
    assert len(await store.get_events("a")) == 4


@with_sql
async def test_an_error_of_sql_that_is_confined_takes_no_event_with_it(sql_store: Any) -> None:
    def try_to_insert(session: Session) -> None:
        with pytest.raises(IntegrityError), session.begin_nested():
            session.execute(insert(TABLE).values(name="a", sum=9))

    async def handle(events: Sequence[StoredEvent], tx: Transaction) -> None:
        assert isinstance(tx, SQLTransaction)
        await tx.run_sync(try_to_insert)
        await tx.run_sync(lambda session: session.rollback() if sqlite else None)
        await tx.execute(update(TABLE).values(sum=TABLE.c.sum + 1))

    store = sql_store
    sqlite = isinstance(store, SQLiteEventStore)
    async with store.transaction() as tx:
        await tx.execute(insert(TABLE).values(name="a", sum=1))
        tx.on_append(handle)
        await tx.append_events("a", "Thing", [Happened(1)], NO_STREAM)
    assert await sums(store) == {"a": 2}
    assert numbers(await store.get_events("a")) == [1]

    async def break_it(events: Sequence[StoredEvent], tx: Transaction) -> None:
        assert isinstance(tx, SQLTransaction)
        await tx.execute(insert(TABLE).values(name="a", sum=9))

    with pytest.raises(IntegrityError):
        async with store.transaction() as tx:
            tx.on_append(break_it)
            await tx.append_events("a", "Thing", [Happened(2)], ANY)
    assert numbers(await store.get_events("a")) == [1]


@with_sql
async def test_many_with_sql_at_once_and_cancelled_at_every_checkpoint(sql_store: Any) -> None:
    inline = Inline(Sums(), Totals())
    store = sql_store
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            for number in range(12):
                events = [Happened(number)]
                tasks.start_soon(append_inline, store, inline, events, f"s{number % 2}")
    assert await sums(store) == {"s0": 30, "s1": 36}
    runs = 0

    async def append() -> bool:
        nonlocal runs
        runs += 1
        await append_inline(store, inline, [Happened(runs)])
        return True

    async def check(result: bool | None) -> None:
        stored = numbers(await store.get_events("a", "Thing"))
        # A cancellation that comes out of the block means that nothing was stored.
        assert (stored[-1:] == [runs]) == bool(result)
        assert (await sums(store)).get("a", 0) == sum(stored)
        assert (await Totals().get(store, "a") or Total()) == Total(sum(stored), len(stored))

    assert await cancel_at_every_checkpoint(append, check) >= 4
    await Inline(Sums()).rebuild(store)
    total = sum(numbers(await store.get_events("a", "Thing")))
    assert await sums(store) == {"a": total, "s0": 30, "s1": 36}


async def test_within_a_transaction_of_the_users_there_is_nobody_to_call(
    postgresql_dsn: str,
) -> None:
    from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

    store = PostgreSQLEventStore(postgresql_dsn)
    await store.migrate()
    async with store:
        engine = create_async_engine(
            postgresql_dsn.replace("postgresql://", "postgresql+asyncpg://")
        )
        session = AsyncSession(engine)
        with pytest.raises(RuntimeError, match="part of another one"):
            async with store.transaction(within=session) as tx:
                tx.on_append(Inline(Totals()))
        await store.guest.run(session.close())
        await store.guest.run(engine.dispose())


async def test_others_wait_while_the_events_are_handed_on_in_memory() -> None:
    order: list[str] = []

    async def handle(events: Sequence[StoredEvent], tx: Transaction) -> None:
        tasks.start_soon(append_plainly)
        await anyio.wait_all_tasks_blocked()
        order.append("handled")

    async def append_plainly() -> None:
        await append_numbers(store, 1, "b")
        order.append("appended")

    async with InMemoryEventStore() as store:
        with anyio.fail_after(10):
            async with anyio.create_task_group() as tasks, store.transaction() as tx:
                tx.on_append(handle)
                await tx.append_events("a", "Thing", [Happened(1)], NO_STREAM)
        assert order == ["handled", "appended"]
        assert [one.aggregate_id async for one in store.read_all()] == ["a", "b"]
