"""Projections on a PostgreSQL server that goes away, loses connections, or refuses a batch."""

from __future__ import annotations

from random import Random

import anyio
import pytest
from anyio import to_thread
from sqlalchemy import text

from eventsource_anyio import ANY, NewEvent, StoredEvent
from eventsource_anyio.errors import ProjectionStoppedError
from eventsource_anyio.projections.base import Projection
from eventsource_anyio.projections.coordinator import ProjectionCoordinator
from eventsource_anyio.projections.parked import ParkedRepository
from eventsource_anyio.stores.postgresql import PostgreSQLEventStore
from eventsource_anyio.testing.postgresql import PostgreSQLServer
from eventsource_anyio.testing.samples import Happened, append_numbers
from tests.read_models import (
    LEASE,
    Seen,
    SQLTotals,
    append,
    assert_seen,
    assert_totals,
    create_tables,
    running,
    seen,
    until,
)
from tests.test_postgresql_failures import (
    Database,
    Network,
    again,
    database,
    driver,
    network,
    server,
    store,
    template,
)

__all__ = ["database", "driver", "network", "server", "store", "template"]

again_soon = pytest.mark.usefixtures("again_soon")

# So few that an outage which counts as a failure of the handler stops the projection.
SETTINGS = {"attempts": 2, "retry_after": 0.001, "batch_size": 20}


class Writing:
    """Appends until it is stopped, through whatever happens."""

    def __init__(self, store: PostgreSQLEventStore) -> None:
        self.store = store
        self.appended = 0
        self.stopping = False

    async def run(self) -> None:
        while not self.stopping:
            event = NewEvent(Happened(self.appended))
            stream = f"s{self.appended % 7}"
            await again(lambda: self.store.append_events(stream, "Thing", [event], ANY))  # noqa: B023
            self.appended += 1
            await anyio.sleep(0.001)


async def finish(coordinator: ProjectionCoordinator, store: PostgreSQLEventStore) -> None:
    """All of it has been handled, once."""
    last = await store.last_position()
    await until(lambda: all(one.position >= last for one in coordinator.statistics()))
    await assert_seen(store)
    assert await assert_totals(store) > 0


async def test_connections_that_are_killed_cost_nothing(
    database: Database, store: PostgreSQLEventStore
):
    random = Random(5)
    await create_tables(store)
    given: list[Projection] = [Seen(shards=2, **SETTINGS), SQLTotals(shards=2, **SETTINGS)]
    coordinator = ProjectionCoordinator(store, given, lease=LEASE)
    writing = Writing(store)
    async with running(coordinator) as tasks:
        tasks.start_soon(writing.run)
        for killed in range(25):
            if pids := database.pids():
                database.terminate(random.choice(pids))
            enough = writing.appended + random.randrange(8)
            await until(lambda: writing.appended >= enough)  # noqa: B023
            assert {one.state for one in coordinator.statistics()} <= {"running", "retrying"}, (
                killed
            )
        writing.stopping = True
        await finish(coordinator, store)


@again_soon
async def test_a_connection_that_is_lost_in_a_handler_is_no_failure_of_its(
    store: PostgreSQLEventStore,
):
    class Unlucky(SQLTotals):
        lost = 0

        async def handle(self, event, tx):
            if event.position == 2 and self.lost < 5:
                self.lost += 1
                await tx.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
            await super().handle(event, tx)

    await create_tables(store)
    await append(store, 2)
    projection = Unlucky(attempts=4, retry_after=0.001, batch_size=1)
    coordinator = ProjectionCoordinator(store, [projection], lease=LEASE)
    async with running(coordinator):
        await coordinator.wait_for(2)
    assert projection.lost == 5
    assert await assert_totals(store) == 2


@pytest.mark.parametrize("how", ["restart", "kill"])
async def test_a_server_that_is_restarted_is_waited_for(
    server: PostgreSQLServer, database: Database, store: PostgreSQLEventStore, how: str
):
    await create_tables(store)
    given: list[Projection] = [Seen(shards=2, **SETTINGS), SQLTotals(shards=2, **SETTINGS)]
    coordinator = ProjectionCoordinator(store, given, lease=LEASE)
    writing = Writing(store)
    async with running(coordinator) as tasks:
        tasks.start_soon(writing.run)
        await until(lambda: writing.appended > 40)
        await to_thread.run_sync(server.kill if how == "kill" else server.stop)
        await until(lambda: "retrying" in {one.state for one in coordinator.statistics()})
        await to_thread.run_sync(server.start)
        enough = writing.appended + 40
        await until(lambda: writing.appended > enough)
        writing.stopping = True
        await finish(coordinator, store)


@again_soon
async def test_an_outage_is_over_also_if_no_event_comes(
    server: PostgreSQLServer, store: PostgreSQLEventStore
):
    coordinator = ProjectionCoordinator(store, [Seen()], lease=LEASE)
    async with running(coordinator):
        await coordinator.wait_for(await append(store, 2))
        await to_thread.run_sync(server.stop)
        try:
            await until(lambda: coordinator.statistics()[0].state == "retrying")
            assert coordinator.statistics()[0].error is not None
        finally:
            await to_thread.run_sync(server.start)
        await until(lambda: coordinator.statistics()[0].state == "running")
        assert coordinator.statistics()[0].error is None


@again_soon
async def test_it_can_be_stopped_while_the_server_is_away(
    server: PostgreSQLServer, store: PostgreSQLEventStore
):
    coordinator = ProjectionCoordinator(store, [Seen(shards=3)], lease=LEASE)
    async with running(coordinator):
        await coordinator.wait_for(await append(store, 2))
        await to_thread.run_sync(server.stop)
        try:
            await until(lambda: coordinator.statistics()[0].state == "retrying")
            with anyio.fail_after(15):
                coordinator.stop()
                await coordinator.wait_stopped()
        finally:
            await to_thread.run_sync(server.start)
    async with running(coordinator):
        await until(lambda: coordinator.statistics()[0].shards_here == 3)  # after the lease
        await coordinator.wait_for(await append(store, 2))
    await assert_seen(store)


# -- answers that are lost --------------------------------------------------------------------


class Losing(Seen):
    """Loses the answer to the commit of the batch in which an event comes."""

    def __init__(self, network: Network, at: int, **settings: object) -> None:
        super().__init__(**settings)
        self.network = network
        self.at = at

    async def before(self, event: StoredEvent) -> None:
        if event.position == self.at:
            self.at = 0
            self.network.silent_at_commit = True


@pytest.mark.parametrize("batch_seconds", [1.0, 1e-9], ids=["whole", "in part"])
async def test_a_batch_whose_commit_was_not_answered_is_done_once(
    database: Database, network: Network, store: PostgreSQLEventStore, batch_seconds: float
):
    """Of one that was committed in part the rest is not forgotten."""
    await append_numbers(store, 20)
    projection = Losing(network, 5, batch_seconds=batch_seconds, **SETTINGS)
    async with database.store(network.dsn) as lossy:
        coordinator = ProjectionCoordinator(lossy, [projection], lease=600)
        async with running(coordinator):
            await until(lambda: network.silent)
            await until_committed(store, 5)
            await network.cut()
            await coordinator.wait_for(20)
    assert projection.at == 0
    assert len(projection.calls) == 20
    await assert_seen(store)


async def until_committed(store: PostgreSQLEventStore, position: int) -> None:
    async def committed() -> bool:
        return position in await seen(store)

    await until(committed)


async def test_what_comes_after_a_parked_event_is_handled_though_no_answer_came(
    database: Database, network: Network, store: PostgreSQLEventStore
):
    for stream in ("a", "b", "c", "d"):
        await append_numbers(store, 2, stream)

    class Parking(Seen):
        async def before(self, event: StoredEvent) -> None:
            if event.position == 3:
                if self.calls.count(3) > 3:  # alone, and for the last time
                    network.silent_at_commit = True
                raise ValueError("poison")

    projection = Parking(on_failure="park", attempts=2, retry_after=0.001)
    parked = ParkedRepository(store, "seen", 1)
    async with database.store(network.dsn) as lossy:
        coordinator = ProjectionCoordinator(lossy, [projection], lease=600)
        async with running(coordinator):
            await until(lambda: network.silent)
            await until(parked.all)
            await network.cut()
            await coordinator.wait_for(8)
    (waits,) = await parked.all()
    assert (waits.stream_id, waits.first, waits.last, waits.events) == ("Thing-b", 1, 2, 2)
    assert await seen(store) == [1, 2, 5, 6, 7, 8]


# -- refused ----------------------------------------------------------------------------------


@again_soon
@pytest.mark.parametrize("on_failure", ["stop", "park"])
async def test_what_the_server_always_refuses_is_the_event_s_fault(
    database: Database, store: PostgreSQLEventStore, on_failure: str
):
    """It takes all other writes; its neighbours are committed."""
    check = "ALTER TABLE eventsource.documents ADD CHECK (key <> '000000031')"
    database.rows(check)
    for stream in ("a", "b", "c"):
        await append_numbers(store, 20, stream)
    projection = Seen(attempts=2, retry_after=0.001, on_failure=on_failure)
    coordinator = ProjectionCoordinator(store, [projection], lease=LEASE)
    async with running(coordinator):
        if on_failure == "stop":
            with pytest.raises(ProjectionStoppedError) as stopped:
                await coordinator.wait_for(60)
            assert "constraint" in str(stopped.value.__cause__)
            assert await seen(store) == list(range(1, 31))
        else:
            await coordinator.wait_for(60)
            assert await seen(store) == [*range(1, 31), *range(41, 61)]


@again_soon
async def test_a_server_that_takes_no_writes_is_nobody_s_fault(
    database: Database, store: PostgreSQLEventStore
):
    """It is waited for, and nothing is parked."""
    await append_numbers(store, 5)
    projection = Seen(attempts=1, on_failure="park")
    coordinator = ProjectionCoordinator(store, [projection], lease=LEASE)
    database.rows(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE disk_full; END'"
    )
    async with running(coordinator):
        await coordinator.wait_for(5)
        database.rows(
            "CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON eventsource.documents "
            "FOR EACH STATEMENT EXECUTE FUNCTION refuse()"
        )
        await append_numbers(store, 5)
        await until(lambda: len(projection.calls) > 15)
        assert coordinator.statistics()[0].state == "retrying"
        database.rows("DROP TRIGGER refuse ON eventsource.documents")
        await coordinator.wait_for(10)
    assert await ParkedRepository(store, "seen", 1).all() == []
    await assert_seen(store)
