"""Events delivered by a projection: at least once, each stream in order, holding nobody up."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from random import Random
from typing import Any
from uuid import UUID

import anyio
import anyio.lowlevel
import pytest
from sqlalchemy import text

from eventsource_anyio import ANY, EventStore, InMemoryEventStore, StoredEvent
from eventsource_anyio.bus.in_memory import InMemoryEventBus
from eventsource_anyio.projections import Projection, ProjectionCoordinator
from eventsource_anyio.projections.shards import ShardRepository
from eventsource_anyio.relay import EventRelay
from eventsource_anyio.testing import cancel_at_every_checkpoint
from eventsource_anyio.testing.samples import Ended, Happened
from tests.every_store import make_store, open_store, which_store
from tests.projecting import open_elsewhere
from tests.read_models import append, number_of, running, until

__all__ = ["make_store", "open_elsewhere", "open_store", "which_store"]

pytestmark = pytest.mark.usefixtures("again_soon")


async def nothing(event: StoredEvent) -> None:
    pass


class Receiver:
    """What it was given; `once` is what a receiver that knows event ids has."""

    def __init__(self, before: Callable[[StoredEvent], Awaitable[None]] = nothing) -> None:
        self.before = before
        self.received: list[StoredEvent] = []

    async def __call__(self, events: Sequence[StoredEvent]) -> None:
        for event in events:
            await self.before(event)
            self.received.append(event)

    @property
    def once(self) -> list[StoredEvent]:
        first: dict[UUID, StoredEvent] = {}
        for event in self.received:
            first.setdefault(event.event_id, event)
        return list(first.values())

    def versions(self, stream: str) -> list[int]:
        return [event.version for event in self.once if event.stream_id == stream]


def relay_to(deliver: Any, **options: Any) -> EventRelay:
    settings: dict[str, Any] = {"attempts": 3, "retry_after": 0.001, "batch_size": 20}
    return EventRelay(deliver, name="relay", **{**settings, **options})


async def test_events_are_delivered_as_they_are_stored(store: EventStore):
    await append(store, 3, 5)
    receiver = Receiver()
    coordinator = ProjectionCoordinator(store, [relay_to(receiver)])
    async with running(coordinator):
        await coordinator.wait_for(await append(store, 3, 5, first=5))
    assert receiver.received == [event async for event in store.read_all()]


async def test_a_bus_is_given_them(store: EventStore):
    """And what was delivered has been handled."""
    handled: list[StoredEvent] = []

    async def handle(event: StoredEvent) -> None:
        await anyio.lowlevel.checkpoint()
        handled.append(event)

    async with InMemoryEventBus() as bus:
        bus.register(handle, Happened)
        coordinator = ProjectionCoordinator(store, [relay_to(bus)])
        async with running(coordinator):
            await coordinator.wait_for(await append(store, 2, 4))
            assert handled == [event async for event in store.read_all()]


async def test_only_what_is_wanted(store: EventStore):
    types, aggregates = Receiver(), Receiver()
    await store.append_events("a", "Thing", [Happened(1), Ended()], ANY)
    await store.append_events("b", "Other", [Happened(2)], ANY)
    coordinator = ProjectionCoordinator(
        store,
        [
            EventRelay(types, name="types", event_types=[Ended]),
            EventRelay(aggregates, name="aggregates", aggregate_types=["Other"]),
        ],
    )
    async with running(coordinator):
        await coordinator.wait_for(await store.last_position())
    assert [event.event for event in types.received] == [Ended()]
    assert [event.event for event in aggregates.received] == [Happened(2)]


@pytest.mark.parametrize("shards", [1, 3])
async def test_a_receiver_that_fails_at_random_gets_every_stream_in_order(
    store: EventStore, shards: int
):
    random, failures = Random(shards), 0

    async def before(event: StoredEvent) -> None:
        nonlocal failures
        if random.randrange(15) == 0:
            failures += 1
            raise OSError("away") if random.randrange(8) == 0 else ValueError("at random")

    receiver = Receiver(before)
    relay = relay_to(receiver, attempts=100, retry_after=0.0001, shards=shards)
    coordinator = ProjectionCoordinator(store, [relay])
    async with running(coordinator):
        await coordinator.wait_for(await append(store, 6, 20))
    assert failures > 5
    for stream in range(6):
        assert receiver.versions(f"Thing-s{stream}") == list(range(1, 21))


async def test_what_fails_for_the_last_time_is_set_aside_and_its_stream_behind_it(
    store: EventStore,
):
    poison = {2}

    async def before(event: StoredEvent) -> None:
        if event.stream_id == "Thing-s0" and number_of(event) in poison:
            raise ValueError("poison")

    receiver = Receiver(before)
    coordinator = ProjectionCoordinator(store, [relay_to(receiver)])
    async with running(coordinator):
        await coordinator.wait_for(await append(store, 2, 4))
        assert receiver.versions("Thing-s0") == [1]
        assert receiver.versions("Thing-s1") == [1, 2, 3, 4]
        (parked,) = await coordinator.parked("relay")
        assert (parked.stream_id, parked.first, parked.events) == ("Thing-s0", 2, 3)
        poison.clear()
        assert await coordinator.retry_parked("relay", "Thing-s0") == 3
        await coordinator.wait_for(await append(store, 2, first=4))
    assert receiver.versions("Thing-s0") == receiver.versions("Thing-s1") == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("error", [ConnectionRefusedError, TimeoutError, ZeroDivisionError])
async def test_a_receiver_that_is_away_is_waited_for(store: EventStore, error: type[Exception]):
    """For much longer than there are attempts, and nothing is set aside."""
    calls, away = 0, True

    async def before(event: StoredEvent) -> None:
        nonlocal calls
        calls += 1
        if away:
            raise error("there is nobody")

    receiver = Receiver(before)
    relay = relay_to(receiver, attempts=1, outages=(OSError, ZeroDivisionError))
    coordinator = ProjectionCoordinator(store, [relay])
    async with running(coordinator):
        await append(store, 2, 2)
        await until(lambda: calls > 3)
        (statistics,) = coordinator.statistics()
        assert statistics.state == "retrying"
        assert statistics.error == f"{error.__name__}: there is nobody"
        away = False
        await coordinator.wait_for(4)
        assert await coordinator.parked("relay") == []
        assert coordinator.statistics()[0].state == "running"
    assert [event.position for event in receiver.once] == [1, 2, 3, 4]


async def test_it_can_be_stopped_while_the_receiver_is_away(store: EventStore):
    calls = 0

    async def before(event: StoredEvent) -> None:
        nonlocal calls
        calls += 1
        raise ConnectionError

    coordinator = ProjectionCoordinator(store, [relay_to(Receiver(before))])
    async with running(coordinator):
        await append(store, 1)
        await until(lambda: calls > 1)
        coordinator.stop()
        await coordinator.wait_stopped()
    assert [shard.position for shard in await ShardRepository(store, "relay", 1).all()] == [0]


async def test_a_slow_delivery_holds_up_nobody(
    store: EventStore, which: str, request: pytest.FixtureRequest
):
    """No lock, and no connection: there are writers of all kinds meanwhile, and on PostgreSQL no
    transaction is open."""
    reached, go_on = anyio.Event(), anyio.Event()

    async def before(event: StoredEvent) -> None:
        reached.set()
        await go_on.wait()

    coordinator = ProjectionCoordinator(store, [relay_to(Receiver(before))], lease=3600)
    async with running(coordinator):
        await append(store, 1)
        await reached.wait()
        with anyio.fail_after(20):
            await append(store, 2, 2)
            async with store.transaction() as tx:
                await tx.documents.save("other", "thing", 1)
            if not isinstance(store, InMemoryEventStore):
                anything: Any = store
                async with anything.transaction() as tx:
                    await tx.execute(text("CREATE TABLE elsewhere (number INTEGER)"))
        if which == "PostgreSQL":
            await _assert_no_open_transactions(request.getfixturevalue("migrated_dsn"))
        go_on.set()
        await coordinator.wait_for(await store.last_position())


async def _assert_no_open_transactions(dsn: str) -> None:
    import psycopg

    def count() -> object:
        with psycopg.connect(dsn, autocommit=True) as session:
            return session.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                "AND state LIKE 'idle in transaction%'"
            ).fetchone()

    assert await anyio.to_thread.run_sync(count) == (0,)


@pytest.mark.parametrize(("after", "expected"), [(0, [1, 2, 3, 4]), (1, [2, 3, 4]), ("now", [4])])
async def test_a_new_one_begins_where_it_is_told(
    store: EventStore, after: Any, expected: list[int]
):
    """And goes on from where it was, whenever it is run again."""
    await append(store, 1, 3)
    receiver = Receiver()
    for number in range(2):
        coordinator = ProjectionCoordinator(store, [relay_to(receiver, after=after, shards=2)])
        async with running(coordinator):
            if number == 0:
                await append(store, 1)
            await coordinator.wait_for(4)
            assert [event.position for event in receiver.received] == expected


async def test_a_bus_that_lost_its_data_is_refilled(store: EventStore):
    receiver = Receiver()
    coordinator = ProjectionCoordinator(store, [relay_to(receiver, after="now")])
    async with running(coordinator):
        last = await append(store, 2, 5)
        await coordinator.wait_for(last)
        receiver.received.clear()
        await coordinator.rebuild("relay")
        await coordinator.wait_for(last)
    assert receiver.received == [event async for event in store.read_all()]


async def test_another_process_goes_on_where_one_was_stopped(
    store: EventStore, elsewhere: EventStore
):
    receiver = Receiver()
    one, other = (
        ProjectionCoordinator(where, [relay_to(receiver)], lease=0.3)
        for where in (store, elsewhere)
    )
    async with running(one, other):
        await append(store, 2, 5)
        await one.wait_for(10)
        one.stop()
        await one.wait_stopped()
        await other.wait_for(await append(store, 2, 5, first=5))
    assert [event.position for event in receiver.received] == list(range(1, 21))


async def test_cancelled_at_every_checkpoint_every_stream_is_in_order(store: EventStore):
    receiver = Receiver()
    coordinator = ProjectionCoordinator(store, [relay_to(receiver)])
    last = 0

    async def deliver() -> None:
        nonlocal last
        last = await append(store, 2)
        async with anyio.create_task_group() as tasks:
            await tasks.start(coordinator.run)
            await coordinator.wait_for(last)
            coordinator.stop()

    async def check(_: object) -> None:
        async with running(coordinator):
            await coordinator.wait_for(await store.last_position())
        events = [event async for event in store.read_all()]
        assert sorted(receiver.once, key=lambda event: event.position) == events
        for stream in ("Thing-s0", "Thing-s1"):
            versions = receiver.versions(stream)
            assert versions == list(range(1, len(versions) + 1))

    assert await cancel_at_every_checkpoint(deliver, check) >= 5


async def test_a_projection_can_begin_with_what_is_new(store: EventStore):
    class Counting(Projection):
        name = "counting"
        after = "now"
        calls = 0

        async def handle(self, event: StoredEvent, tx: object) -> None:
            self.calls += 1

        async def reset(self, tx: object) -> None:
            pass

    await append(store, 1, 3)
    projection = Counting()
    coordinator = ProjectionCoordinator(store, [projection])
    async with running(coordinator):
        await coordinator.wait_for(await append(store, 1))
    assert projection.calls == 1


@pytest.mark.parametrize("after", [-1, 1.5, True, "later", None])
async def test_a_beginning_that_makes_no_sense(store: EventStore, after: Any):
    with pytest.raises(ValueError, match="after must be a position from 0, or 'now'"):
        ProjectionCoordinator(store, [relay_to(Receiver(), after=after)])


def test_it_needs_somebody_to_deliver():
    with pytest.raises(TypeError, match="EventBus or an async function"):
        EventRelay("bus", name="relay")  # type: ignore[arg-type]
