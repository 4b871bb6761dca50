"""What goes wrong with a server and the way to it: each is an error, and none is lost data."""

from __future__ import annotations

import re
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from math import inf
from random import Random
from secrets import token_hex
from time import monotonic
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar
from urllib.parse import urlsplit
from uuid import UUID

import anyio
import attrs
import psycopg
import pytest
from anyio import to_thread
from anyio.abc import Listener, SocketAttribute, SocketStream
from anyio.lowlevel import checkpoint
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from eventsource_anyio import (
    ANY,
    NO_STREAM,
    AppendResult,
    DomainEvent,
    NewEvent,
    OutboxMessage,
    StorageError,
    StoreClosedError,
    StoredEvent,
)
from eventsource_anyio.stores.postgresql import (
    PostgreSQLEventStore,
    libpq_driver,
    migration_sql,
)
from eventsource_anyio.testing.postgresql import PostgreSQLServer, postgresql_binaries
from eventsource_anyio.testing.samples import Ended, Happened, append_numbers, numbers
from tests.every_store import DRIVERS

APPEND = (
    "SELECT eventsource.append_event('Thing', %s, -1, gen_random_uuid(), "
    "'eventsource_anyio.testing.Ended', 1, NULL, NULL, '{}')"
)


T = TypeVar("T")
Driver: TypeAlias = Literal["asyncpg", "psycopg"]
LOCK = b"LOCK TABLE eventsource.events IN EXCLUSIVE MODE"


class Database:
    """A store's database in a server of these tests, looked at from outside."""

    def __init__(self, server: PostgreSQLServer, dsn: str, driver: Driver) -> None:
        self.server = server
        self.dsn = dsn
        self.driver = driver
        self.name = urlsplit(dsn).path[1:]
        self.sessions = ExitStack()
        self._session: psycopg.Connection | None = None

    def store(self, dsn: str = "", **options: Any) -> PostgreSQLEventStore:
        return PostgreSQLEventStore(dsn or self.dsn, driver=self.driver, **options)

    def connect(self, **options: Any) -> psycopg.Connection:
        session = psycopg.connect(self.dsn, application_name="observer", **options)
        self.sessions.callback(session.close)
        return session

    def rows(self, statement: str, *values: object) -> list[Any]:
        if self._session is None:
            self._session = self.connect(autocommit=True)
        try:
            done = self._session.execute(statement.encode(), values or None)
        except psycopg.OperationalError:  # the server was stopped meanwhile
            self._session = self.connect(autocommit=True)
            done = self._session.execute(statement.encode(), values or None)
        return done.fetchall() if done.description else []

    def pids(self) -> list[int]:
        """The connections of stores."""
        sessions = (
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() "
            "AND backend_type = 'client backend' AND application_name <> 'observer'"
        )
        return [pid for (pid,) in self.rows(sessions)]

    def terminate(self, *pids: int) -> None:
        self.rows("SELECT pg_terminate_backend(pid) FROM unnest(%s::int[]) pid", list(pids))

    def stuck(self) -> int:
        """How many of them wait for somebody who has locked a table."""
        waiting = (
            "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() "
            "AND wait_event_type = 'Lock' AND wait_event = 'relation'"
        )
        return len(self.rows(waiting))

    def ids(self) -> list[UUID]:
        stored = "SELECT event_id FROM eventsource.events ORDER BY position"
        return [event_id for (event_id,) in self.rows(stored)]

    def role(self, *statements: str) -> str:
        """The DSN of a new role that may use the store, and has had something altered."""
        name = f"role_{token_hex(8)}"
        self.rows(f"CREATE ROLE {name} LOGIN PASSWORD 'right'")
        self.rows(migration_sql(role=name, after=99))
        for statement in statements:
            self.rows(f"ALTER ROLE {name} {statement}")
        return self.server.dsn(self.name, user=name, password="right")


@contextmanager
def locked(database: Database) -> Iterator[psycopg.Connection]:
    """Appends are stuck in the server as long as this block lasts."""
    session = database.connect()
    session.execute(LOCK)
    try:
        yield session
    finally:
        session.rollback()


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(20):
        while not condition():  # noqa: ASYNC110  (what is asked knows of no event)
            await anyio.sleep(0.001)


@pytest.fixture(scope="module")
def server() -> Iterator[PostgreSQLServer]:
    """A server of our own, to be stopped and killed; its settings are the default ones.

    It is in memory all the same: what is killed is the server, never the machine.
    """
    found = postgresql_binaries()
    if not found:
        pytest.skip("there are no PostgreSQL binaries to start a server with, and to stop it")
    durable = dict.fromkeys(("fsync", "full_page_writes", "synchronous_commit"), "on")
    with PostgreSQLServer(next(iter(found.values())), settings=durable) as server:
        yield server


@pytest.fixture(scope="module")
def template(server: PostgreSQLServer) -> str:
    """The name of a database that has the tables and to which nobody is connected."""
    dsn = server.create_database()
    with psycopg.connect(dsn, autocommit=True) as session:
        session.execute(migration_sql().encode())
    return urlsplit(dsn).path[1:]


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> Driver:
    driver: Driver = request.param
    return driver


@pytest.fixture
def database(server: PostgreSQLServer, template: str, driver: Driver) -> Iterator[Database]:
    database = Database(server, server.create_database(template), driver)
    with database.sessions:
        yield database
    server.drop_database(database.dsn)


@pytest.fixture
async def store(database: Database) -> AsyncIterator[PostgreSQLEventStore]:
    async with database.store() as store:
        yield store


@pytest.fixture
async def other(database: Database) -> AsyncIterator[PostgreSQLEventStore]:
    """Another process, as far as the database can tell."""
    async with database.store() as store:
        yield store


class Network:
    """The way to a server: a proxy that loses what the server says, or the connections."""

    def __init__(self, listener: Listener[SocketStream], dsn: str) -> None:
        self._listener = listener
        there = urlsplit(dsn)
        self._server = (there.hostname or "127.0.0.1", there.port or 5432)
        here = listener.extra(SocketAttribute.local_port)
        self.dsn = f"{there._replace(netloc=f'postgres@127.0.0.1:{here}').geturl()}?sslmode=disable"
        self.silent = False
        self.silent_at_commit = False
        self.connections: set[SocketStream] = set()
        self.lost: set[SocketStream] = set()
        self.connected = 0

    async def serve(self) -> None:
        await self._listener.serve(self._connected)

    async def _connected(self, client: SocketStream) -> None:
        self.connected += 1
        async with client:
            try:
                server = await anyio.connect_tcp(*self._server)
            except OSError:  # it is away, and who comes is turned away
                return
            await self._between(client, server)

    async def _between(self, client: SocketStream, server: SocketStream) -> None:
        async with server:
            ends = {client, server}
            self.connections |= ends
            try:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._pass_on, client, server, True)
                    await self._pass_on(server, client, False)
                    tasks.cancel_scope.cancel()
            finally:
                self.connections -= ends

    async def _pass_on(self, one: SocketStream, another: SocketStream, asking: bool) -> None:
        try:
            async for said in one:
                if asking and self.silent_at_commit and re.search(rb"COMMIT;?\0", said):
                    self.silent = True
                if asking or not (self.silent or another in self.lost):
                    await another.send(said)
            await another.aclose()
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            await another.aclose()

    async def cut(self) -> None:
        """Lose all connections; new ones are as good as ever."""
        self.lost |= self.connections  # what was not answered yet is not answered now
        self.silent = self.silent_at_commit = False
        for one in list(self.connections):
            await one.aclose()


@pytest.fixture
async def network(database: Database) -> AsyncIterator[Network]:
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listeners:
        network = Network(listeners.listeners[0], database.dsn)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(network.serve)
            yield network
            tasks.cancel_scope.cancel()


async def again(call: Callable[[], Awaitable[T]]) -> T:
    """Make the same call until it succeeds, as the errors say."""
    while True:
        try:
            return await call()
        except (StorageError, DBAPIError, OSError):  # the latter two are SQLAlchemy's, in its place
            await anyio.sleep(0.005)


@asynccontextmanager
async def followed(store: PostgreSQLEventStore) -> AsyncIterator[list[StoredEvent]]:
    """What a subscriber sees that goes on after each error."""
    seen: list[StoredEvent] = []

    async def follow() -> None:
        async with store.subscribe() as subscription:
            while True:
                try:
                    seen.append(await anext(subscription))
                except StorageError:
                    await anyio.sleep(0.005)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(follow)
        yield seen
        tasks.cancel_scope.cancel()


def assert_acknowledged(acknowledged: dict[UUID, StoredEvent], seen: list[StoredEvent]) -> None:
    """Each is there once, where its result said, in an order without gaps in a stream."""
    assert len({event.event_id for event in seen}) == len(seen)
    there = {event.event_id: event for event in seen}
    assert acknowledged.items() <= there.items()
    assert [event.position for event in seen] == sorted(event.position for event in seen)
    versions: dict[str, int] = {}
    for event in seen:
        assert event.version == versions.get(event.stream_id, 0) + 1
        versions[event.stream_id] = event.version


# -- the server goes away ---------------------------------------------------------------------


@pytest.mark.parametrize("how", ["restart", "kill"])
async def test_a_server_that_comes_back_has_what_was_acknowledged(
    server: PostgreSQLServer, database: Database, store: PostgreSQLEventStore, how: str
):
    """Everything goes on by itself; what raised is repeated, and stored once."""
    acknowledged: dict[UUID, StoredEvent] = {}
    made: set[UUID] = set()
    done: Counter[str] = Counter()
    stopping = anyio.Event()

    async def append(number: int) -> AppendResult:
        events = [NewEvent(Happened(number)) for _ in range(1 + number % 2)]
        made.update(event.event_id for event in events)
        return await again(lambda: store.append_events(str(number % 5), "Thing", events, ANY))

    async def transact(number: int) -> AppendResult:
        event = NewEvent(Happened(number))
        made.add(event.event_id)

        async def call() -> AppendResult:
            async with store.transaction() as tx:
                if number % 2:
                    await tx.execute(text("SELECT 1"))
                await tx.append_events(f"tx {number}", "Thing", [event], ANY)
                await tx.checkpoints.save(f"tx {number}", 1)
            return tx.results[0]

        return await again(call)

    async def write(what: Callable[[int], Awaitable[AppendResult]], number: int) -> None:
        while not stopping.is_set():
            result = await what(number)
            acknowledged.update({event.event_id: event for event in result.events})
            done[what.__name__] += 1

    async def read() -> None:
        while not stopping.is_set():
            try:
                await store.get_events("1", "Thing")
                await store.last_position()
                done["read"] += 1
            except StorageError:
                await anyio.sleep(0.005)

    async def work(times: int) -> None:
        """Returns when each has done so much since."""
        then = {**done, "seen": len(seen)}
        await until(
            lambda: all(
                {**done, "seen": len(seen)}.get(what, 0) >= then.get(what, 0) + times
                for what in ("append", "transact", "read", "seen")
            )
        )

    with anyio.fail_after(28):
        async with followed(store) as seen:
            async with anyio.create_task_group() as tasks:
                for number in range(8):
                    tasks.start_soon(write, append, number)
                for number in range(4):
                    tasks.start_soon(write, transact, number)
                tasks.start_soon(read)
                await work(20)
                await to_thread.run_sync(server.kill if how == "kill" else server.stop)
                await to_thread.run_sync(server.start)
                await work(20)
                stopping.set()
            await until(lambda: len(seen) >= len(made))
    stored = [event async for event in store.read_all()]
    assert stored == seen
    assert {event.event_id for event in stored} == made == acknowledged.keys()
    assert_acknowledged(acknowledged, seen)


async def test_connections_that_are_terminated_lose_nothing(
    database: Database, store: PostgreSQLEventStore
):
    """At random, under 64 appenders."""
    random = Random(3)
    acknowledged: dict[UUID, StoredEvent] = {}
    made: set[UUID] = set()
    left, errors, killed = 64, 0, 0

    async def append(number: int) -> None:
        nonlocal left, errors
        for nth in range(12):
            events = [NewEvent(Happened(nth)) for _ in range(1 + nth % 3)]
            made.update(event.event_id for event in events)
            while True:
                try:
                    result = await store.append_events(str(number % 20), "Thing", events, ANY)
                    break
                except StorageError:
                    errors += 1
            acknowledged.update({event.event_id: event for event in result.events})
        left -= 1

    with anyio.fail_after(28):
        async with followed(store) as seen:
            async with anyio.create_task_group() as tasks:
                for number in range(64):
                    tasks.start_soon(append, number)
                while left:
                    if pids := database.pids():
                        database.terminate(random.choice(pids))
                        killed += 1
                    enough = len(acknowledged) + random.randrange(60)
                    await until(lambda: not left or len(acknowledged) >= enough)  # noqa: B023
            await until(lambda: len(seen) >= len(made))
    assert killed > 10
    assert set(database.ids()) == made == acknowledged.keys()
    assert_acknowledged(acknowledged, seen)


async def test_a_server_that_is_away_is_an_error_and_then_not(
    server: PostgreSQLServer, database: Database, store: PostgreSQLEventStore
):
    """The same store and subscription go on; opening one meanwhile is refused."""
    event = NewEvent(Happened(7))
    with anyio.fail_after(25):
        async with store.subscribe() as subscription:
            await append_numbers(store, 1)
            assert (await anext(subscription)).version == 1
            await to_thread.run_sync(server.stop)
            calls: list[Callable[[], Awaitable[object]]] = [
                lambda: store.append_events("a", "Thing", [event], ANY),
                lambda: store.get_events("a", "Thing"),
                store.last_position,
                lambda: store.checkpoints.get("a"),
                lambda: store.checkpoints.save("a", 1),
                lambda: store.outbox.add(OutboxMessage("a", b"")),
                lambda: anext(subscription),
                lambda: database.store().__aenter__(),
                lambda: database.store().migrate(),
            ]
            for call in calls * 2:
                with pytest.raises(StorageError, match=r"Is (it|the server) running"):
                    await call()
            await to_thread.run_sync(server.start)
            assert (await store.append_events("a", "Thing", [event], ANY)).version == 2
            assert (await anext(subscription)).event_id == event.event_id
            assert (await store.get_events("a", "Thing")).version == 2


# -- the answer is lost -----------------------------------------------------------------------


async def test_an_append_whose_answer_was_lost_is_found_again(database: Database, network: Network):
    """Each of a batch: it is sent once more, and finds itself."""
    results: list[AppendResult] = []

    async def append(store: PostgreSQLEventStore, number: int) -> None:
        expected = (ANY, NO_STREAM, 0)[number % 3]
        event = NewEvent(Happened(number))
        results.append(await store.append_events(str(number), "Thing", [event], expected))
        assert results[-1].events[0].event_id == event.event_id

    with anyio.fail_after(25):
        async with database.store(network.dsn) as store:
            async with anyio.create_task_group() as tasks:
                for number in range(20):  # each lane has a connection then
                    tasks.start_soon(append_numbers, store, 1, f"warm {number}")
            for number in range(20):  # and then it waits for nobody's company
                await append_numbers(store, 1, f"alone {number}")
            async with anyio.create_task_group() as tasks:
                with locked(database) as second:
                    second.rollback()
                    with locked(database):
                        for number in range(51):
                            tasks.start_soon(append, store, number)
                        # One append is stuck in each lane, and then the next lock.
                        await until(lambda: database.stuck() == 2)
                        await anyio.wait_all_tasks_blocked()
                        tasks.start_soon(to_thread.run_sync, lambda: second.execute(LOCK))
                        await until(lambda: database.stuck() == 3)
                    # Then the others of each lane, together.
                    await until(lambda: len(results) == 2 == database.stuck())
                    network.silent = True
                await until(lambda: len(database.ids()) == 91)
                assert len(results) == 2
                await network.cut()
    assert sorted(numbers([event for result in results for event in result.events])) == [*range(51)]
    assert {result.version for result in results} == {1}
    assert len(database.ids()) == 91


async def test_a_cancelled_append_whose_answer_was_lost_returns_what_it_stored(
    database: Database, network: Network
):
    """What raises was not stored, also if the connection is lost at the wrong moment."""
    results: list[AppendResult] = []

    async def append(store: PostgreSQLEventStore) -> None:
        with scope:
            results.append(await store.append_events("a", "Thing", [Ended()], ANY))

    scope = anyio.CancelScope()
    with anyio.fail_after(25):
        async with database.store(network.dsn) as store:
            async with anyio.create_task_group() as tasks:
                with locked(database):
                    tasks.start_soon(append, store)
                    await until(lambda: database.stuck() == 1)
                    network.silent = True
                await until(lambda: len(database.ids()) == 1)
                scope.cancel()
                await anyio.wait_all_tasks_blocked()
                await network.cut()
    assert [result.version for result in results] == [1]


async def test_an_append_that_may_have_been_stored_says_so(
    server: PostgreSQLServer, database: Database, network: Network
):
    """Where nobody can be asked any more; a caller that was cancelled is told it, too."""
    events = [NewEvent(Ended()), NewEvent(Ended())]
    errors: list[str] = []
    scopes = [anyio.CancelScope(), anyio.CancelScope()]

    async def append(store: PostgreSQLEventStore, number: int) -> None:
        with scopes[number]:
            try:
                await store.append_events(f"a {number}", "Thing", [events[number]], ANY)
            except StorageError as error:
                errors.append(str(error))

    with anyio.fail_after(25):
        async with database.store(network.dsn) as store:
            for number in range(2):
                async with anyio.create_task_group() as tasks:
                    with locked(database):
                        tasks.start_soon(append, store, number)
                        await until(lambda: database.stuck() == 1)
                        network.silent = True
                    await until(lambda: len(database.ids()) == number + 1)  # noqa: B023
                    if number == 1:
                        scopes[number].cancel()
                    await to_thread.run_sync(server.stop)
                    await network.cut()
                await to_thread.run_sync(server.start)
            assert ["is not known" in error for error in errors] == [True, True]
            for number in range(2):
                result = await store.append_events(f"a {number}", "Thing", [events[number]], 0)
                assert result.version == 1
    assert len(database.ids()) == 2


@pytest.mark.parametrize("kind", ["steps", "sql"])
async def test_a_transaction_whose_commit_was_not_answered_says_so(
    database: Database, network: Network, kind: str
):
    """It may be repeated, and nothing is stored twice."""
    event, message = NewEvent(Ended()), OutboxMessage("topic", b"")
    raised: list[StorageError] = []

    async def transact(store: PostgreSQLEventStore) -> AppendResult:
        async with store.transaction() as tx:
            if kind == "sql":
                await tx.execute(text("SELECT 1"))
            await tx.append_events("a", "Thing", [event], NO_STREAM)
            await tx.outbox.add(message)
        return tx.results[0]

    async def try_to(store: PostgreSQLEventStore) -> None:
        with pytest.raises(StorageError, match="is not known") as error:
            await transact(store)
        raised.append(error.value)

    with anyio.fail_after(25):
        async with database.store(network.dsn) as store:
            async with anyio.create_task_group() as tasks:
                network.silent_at_commit = True
                tasks.start_soon(try_to, store)
                await until(lambda: len(database.ids()) == 1)
                assert raised == []
                await network.cut()
            assert (await transact(store)).version == 1
            assert len(await store.outbox.pending()) == 1
    assert len(database.ids()) == 1


async def test_a_transaction_on_a_connection_that_was_lost_takes_another(
    database: Database, network: Network
):
    """What has sent nothing yet begins anew, whoever cut the connection meanwhile."""
    with anyio.fail_after(25):
        async with database.store(network.dsn) as store:
            for number in range(3):
                async with store.transaction() as tx:
                    await tx.append_events("a", "Thing", [Ended()], number)
                    await tx.checkpoints.save("a", number)
                await store.get_events("a", "Thing")
                # Not noticed before it is used: the event loop has no turn in between.
                database.terminate(*database.pids())
    assert len(database.ids()) == 3


async def test_a_read_is_made_again_though_every_idle_connection_was_lost(database: Database):
    async with database.store() as store:
        for _ in range(30):
            async with anyio.create_task_group() as tasks:
                for _ in range(4):
                    tasks.start_soon(store.get_events, "a", "Thing")
            # They learn of it while the first of them is used, or a little later.
            database.terminate(*database.pids())
            assert len(await store.get_events("a", "Thing")) == 0


# -- the listening connection, and hints ------------------------------------------------------


async def test_a_listening_connection_that_is_killed_is_replaced(database: Database):
    """The subscriber goes on, and hints wake it again: polls alone would take a minute."""
    patient = database.store(poll_every=60)
    with anyio.fail_after(25):
        async with patient, database.store() as other:
            tail = patient._opened().tail
            async with patient.subscribe() as subscription:
                for number in range(1, 9):
                    if number % 3 == 0:
                        database.terminate(*database.pids())
                    other._opened().tail._hinted = -inf
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(again_later, other, database)
                        while True:
                            tail._stirred = -inf  # as after minutes of nothing
                            try:
                                assert (await anext(subscription)).version == number
                                break
                            except StorageError:
                                assert number % 3 == 0


async def again_later(store: PostgreSQLEventStore, database: Database) -> None:
    """Append when the subscriber waits, and listens."""
    event = NewEvent(Ended())
    listening = (
        "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle' "
        "AND query LIKE '%%safe_position%%' AND application_name <> 'observer'"
    )
    await until(lambda: bool(database.rows(listening)))
    await anyio.wait_all_tasks_blocked()
    await again(lambda: store.append_events("a", "Thing", [event], ANY))


@pytest.mark.parametrize("how", ["never sent", "not listened to"])
async def test_a_notification_that_is_lost_costs_no_more_than_a_poll(
    database: Database, other: PostgreSQLEventStore, how: str
):
    poll_every = 0.1
    session = database.connect(autocommit=True)
    latencies: list[float] = []

    async def append() -> None:
        await until(lambda: tail._listening is not None)
        await anyio.wait_all_tasks_blocked()
        if how == "never sent":
            session.execute(APPEND.encode(), ("a",))
        else:
            await other.append_events("a", "Thing", [Ended()], ANY)
        latencies.append(-monotonic())

    with anyio.fail_after(25):
        async with database.store(poll_every=poll_every) as store:
            tail = store._opened().tail
            async with store.subscribe() as subscription:
                for _ in range(4):
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(append)
                        await anext(subscription)
                    latencies[-1] += monotonic()
                    # Nobody waits now, so the connection is at rest.
                    if how == "not listened to":
                        assert tail._listening is not None
                        await tail._listening.run("UNLISTEN *")
                    tail._stirred = -inf  # as after a while of nothing
    assert min(latencies[1:]) < 2 * poll_every  # the others, on a busy machine, may take longer


async def test_hints_come_long_before_the_next_poll(
    database: Database, other: PostgreSQLEventStore
):
    """Of an append of another process, and of one in a transaction of this one."""
    async with database.store(poll_every=60) as store:
        tail = store._opened().tail
        with anyio.fail_after(25):
            async with store.subscribe() as subscription:
                await append_numbers(store, 1)
                await anext(subscription)
                for number in range(6):
                    async with anyio.create_task_group() as tasks:

                        async def append(number: int) -> None:
                            await anyio.wait_all_tasks_blocked()
                            async with (store, other)[number % 2].transaction() as tx:
                                if number % 3 == 0:
                                    await tx.execute(text("SELECT 1"))
                                await tx.append_events("a", "Thing", [Ended()], ANY)

                        tail._stirred = tail._hinted = -inf  # as after minutes of nothing
                        other._opened().tail._hinted = -inf
                        tasks.start_soon(append, number)
                        await anext(subscription)


async def test_closing_while_a_subscriber_connects_leaks_nothing(database: Database):
    for turns in range(12):
        store = database.store()
        outcomes: list[str] = []

        async def follow(store: PostgreSQLEventStore, outcomes: list[str]) -> None:
            try:
                async with store.subscribe() as subscription:
                    await anext(subscription)
            except StoreClosedError:
                outcomes.append("closed")

        with anyio.fail_after(10):
            async with store, anyio.create_task_group() as tasks:
                tasks.start_soon(follow, store, outcomes)
                for _ in range(3 * turns):
                    await checkpoint()
                await store.__aexit__(None, None, None)
            assert outcomes == ["closed"]
            await until(lambda: database.pids() == [])


# -- what the server refuses ------------------------------------------------------------------


LIMITS = {
    "statement_timeout": ("57014", "statement_timeout"),
    "lock_timeout": ("55P03", "lock_timeout"),
}


@pytest.mark.parametrize("limit", LIMITS)
async def test_a_time_limit_of_the_server_is_named(database: Database, limit: str):
    sqlstate, named = LIMITS[limit]
    errors: list[str] = []
    async with database.store(database.role(f"SET {limit} = '50ms'")) as store:
        first = [NewEvent(Ended())]  # also on a busy machine, where anything may take as long
        await again(lambda: store.append_events("a", "Thing", first, ANY))

        async def fail(call: Callable[[], Awaitable[object]]) -> None:
            with pytest.raises(StorageError) as raised:
                await call()
            errors.append(str(raised.value))

        async def transact(sql: bool) -> None:
            async with store.transaction() as tx:
                if sql:
                    await tx.execute(text("SELECT 1"))
                await tx.append_events("a", "Thing", [Ended()], ANY)
                await tx.checkpoints.save("a", 1)

        session = database.connect()
        session.execute("LOCK TABLE eventsource.events IN ACCESS EXCLUSIVE MODE")
        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                for number in range(8):
                    call = lambda: store.append_events(str(number), "Thing", [Ended()], ANY)  # noqa: B023, E731
                    tasks.start_soon(fail, call)
                tasks.start_soon(fail, lambda: transact(False))
                tasks.start_soon(fail, lambda: transact(True))
                tasks.start_soon(fail, lambda: store.get_events("a", "Thing"))
        session.rollback()
        assert len(errors) == 11
        for error in errors:
            assert sqlstate in error
            assert named in error
            assert "changed nothing" in error
            assert "same call again" in error
        assert len(database.ids()) == 1
        assert database.rows("SELECT 1 FROM eventsource.checkpoints") == []
        await again(lambda: transact(True))
        await again(lambda: transact(False))
    stored = "SELECT max(version) FROM eventsource.events WHERE aggregate_id = 'a'"
    assert database.rows(stored) == [(3,)]


async def test_who_is_refused_is_told_why(server: PostgreSQLServer, database: Database):
    right = database.role()
    role = urlsplit(right).username
    pg_hba = server.directory / "data" / "pg_hba.conf"
    trusting = pg_hba.read_text()
    asks = f"host all {role} 127.0.0.1/32 scram-sha-256\n"
    no_rights = database.role()
    database.rows(f"REVOKE ALL ON SCHEMA eventsource FROM {urlsplit(no_rights).username}")
    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        port = nobody_listens.getsockname()[1]
        cases = {
            right.replace("right@", "wrong@"): ("28P01", "Check the user, the password"),
            server.dsn(database.name, user="nobody_at_all"): ("28000", "Check the user"),
            server.dsn("no_such_database"): ("3D000", "Check the database's name"),
            f"postgresql://postgres@127.0.0.1:{port}/x": ("could not be reached", "Is it running"),
            "postgresql://postgres@nowhere.invalid:5432/x": ("could not be reached", "running"),
            f"postgresql://postgres@{'a' * 64}.invalid/x": ("could not be reached", "running"),
            f"postgresql:///x?host={server.directory}/nowhere": ("could not be", "running"),
            server.create_database(): ("holds no event store", "migrate()"),
            no_rights: ("42501", "may not do this"),
        }
        pg_hba.write_text(asks + trusting)
        database.rows("SELECT pg_reload_conf()")
        try:
            for dsn, (what, remedy) in cases.items():
                with anyio.fail_after(10), pytest.raises(StorageError) as raised:
                    async with database.store(dsn):
                        pass
                assert what in str(raised.value)
                assert remedy in str(raised.value)
                assert "PostgreSQL" in str(raised.value) or what == "holds no event store"
            await until(lambda: database.pids() == [])
            async with database.store(right) as store:
                await store.append_events("a", "Thing", [Ended()], ANY)
        finally:
            pg_hba.write_text(trusting)
            database.rows("SELECT pg_reload_conf()")


async def test_a_server_that_never_answers_is_waited_for_as_long_as_the_caller_likes(
    database: Database, network: Network, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(libpq_driver, "_STOP_WITHIN", 0.2)  # nor is it asked for ever to stop
    network.silent = True
    store = database.store(network.dsn)
    with anyio.move_on_after(0.1) as scope:
        async with store:
            pass
    assert scope.cancelled_caught
    await until(lambda: not network.connections)
    network.silent = False
    async with store:
        await store.append_events("a", "Thing", [Ended()], ANY)
        network.silent = True
        for call in (store.get_events("a", "Thing"), store.last_position()):
            with anyio.move_on_after(0.05) as scope:
                await call
            assert scope.cancelled_caught
        await network.cut()
        assert (await store.get_events("a", "Thing")).version == 1


async def test_a_store_that_cannot_connect_again_fails_all_that_wait(database: Database):
    """In each lane, and again and again; nobody is left hanging, and it may come back."""
    failed = 0

    async def append(store: PostgreSQLEventStore, number: int) -> None:
        nonlocal failed
        with pytest.raises(StorageError, match="no connection left") as raised:
            await store.append_events(str(number), "Thing", [Ended()], ANY)
        assert "53300" in str(raised.value)
        assert "Lower `connections`" in str(raised.value)
        failed += 1

    dsn = database.role()
    role = urlsplit(dsn).username
    async with database.store(dsn) as store:
        await store.append_events("a", "Thing", [Ended()], ANY)
        database.rows(f"ALTER ROLE {role} CONNECTION LIMIT 0")
        database.terminate(*database.pids())
        with anyio.fail_after(20):
            for _ in range(2):
                async with anyio.create_task_group() as tasks:
                    for number in range(300):
                        tasks.start_soon(append, store, number)
            database.rows(f"ALTER ROLE {role} CONNECTION LIMIT -1")
            assert (await store.append_events("a", "Thing", [Ended()], ANY)).version == 2
    assert failed == 600


async def test_a_server_that_is_read_only_is_named(database: Database):
    async with database.store() as store:
        await append_numbers(store, 3)
    read_only = database.role("SET default_transaction_read_only = on")
    async with database.store(read_only) as store:
        assert len(await store.get_events("a", "Thing")) == 3
        assert len([event async for event in store.read_all()]) == 3
        assert await store.last_position() == 3

        async def transact() -> None:
            async with store.transaction() as tx:
                await tx.execute(text("SELECT 1"))
                await tx.append_events("a", "Thing", [Ended()], ANY)

        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: append_numbers(store, 1),
            lambda: append_numbers(store, 2),
            lambda: store.checkpoints.save("a", 1),
            lambda: store.outbox.add(OutboxMessage("a", b"")),
            transact,
        ]
        for call in calls:
            with pytest.raises(StorageError, match="read-only") as raised:
                await call()
            assert "25006" in str(raised.value)
            assert "primary" in str(raised.value)
    assert len(database.ids()) == 3


def refuse_some(database: Database, sqlstate: str) -> None:
    """Events whose payload says so are refused by the server with this error."""
    database.rows(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"RAISE EXCEPTION 'refused by the test' USING ERRCODE = '{sqlstate}'; END $$"
    )
    database.rows(
        "CREATE TRIGGER refuse BEFORE INSERT ON eventsource.events FOR EACH ROW "
        "WHEN (NEW.payload LIKE '%poison%') EXECUTE FUNCTION refuse()"
    )


async def test_a_disk_that_is_full_is_named(database: Database, store: PostgreSQLEventStore):
    """The error is raised by a trigger: to fill a disk takes one, and the right to mount it."""
    refuse_some(database, "53100")
    await append_numbers(store, 1)
    with pytest.raises(StorageError, match="disk of the server is full") as raised:
        await store.append_events("a", "Thing", [Happened(0, "poison")], ANY)
    assert "53100" in str(raised.value)
    assert "Make room" in str(raised.value)
    assert len(database.ids()) == 1
    database.rows("DROP TRIGGER refuse ON eventsource.events")
    await store.append_events("a", "Thing", [Happened(0, "poison")], ANY)


@attrs.frozen
class Overlong(DomainEvent):
    """Its name does not fit into an index."""

    event_type: ClassVar[str] = f"tests.{token_hex(5000)}"

    note: str = "poison"


POISONS: dict[str, tuple[str, str]] = {
    "constraint": ("23514", "constraint"),
    "foreign constraint": ("23503", "constraint"),
    "trigger": ("P0001", "refused it"),
    "value": ("22P05", "cannot store a value"),
    "internal": ("XX000", "refused it"),
    "index": ("54000", "larger than"),
}


@pytest.mark.parametrize("kind", POISONS)
async def test_one_poisoned_append_of_a_batch_fails_alone(
    database: Database, store: PostgreSQLEventStore, kind: str
):
    sqlstate, what = POISONS[kind]
    if kind == "constraint":
        database.rows("ALTER TABLE eventsource.events ADD CHECK (payload NOT LIKE '%poison%')")
    elif kind != "index":
        refuse_some(database, sqlstate)
    poison: DomainEvent = Overlong() if kind == "index" else Happened(0, "poison")
    outcomes: list[object] = [None] * 40
    transacted: list[str] = []

    async def append(number: int) -> None:
        events = [Ended(), poison] if number in (7, 23) else [Happened(number)]
        try:
            outcomes[number] = await store.append_events(str(number % 30), "Thing", events, ANY)
        except StorageError as error:
            outcomes[number] = str(error)

    async def transact() -> None:
        try:
            async with store.transaction() as tx:
                await tx.append_events("100", "Thing", [Ended()], ANY)
                await tx.append_events("101", "Thing", [poison], ANY)
        except StorageError as error:
            transacted.append(str(error))

    session = database.connect()
    session.execute("LOCK TABLE eventsource.events IN EXCLUSIVE MODE")
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            try:
                # One is stuck in each lane, and so the others are sent together.
                for number in range(100, 120):
                    tasks.start_soon(append_numbers, store, 1, str(number))
                await until(lambda: database.stuck() == 2)
                for number in range(40):
                    tasks.start_soon(append, number)
                tasks.start_soon(transact)
                await anyio.wait_all_tasks_blocked()
            finally:
                session.rollback()
    for number, outcome in enumerate(outcomes):
        if number in (7, 23):
            assert sqlstate in str(outcome)
            assert what in str(outcome)
            assert "changed nothing" in str(outcome)
        else:
            assert isinstance(outcome, AppendResult)
            assert numbers(outcome.events) == [number]
    assert [sqlstate in error for error in transacted] == [True]
    stored = database.rows("SELECT aggregate_id::int FROM eventsource.events")
    kept = [number % 30 for number in range(40) if number not in (7, 23)]
    assert sorted(number for (number,) in stored) == sorted([*kept, *range(100, 120)])


async def test_odd_payloads_are_stored_and_come_back(store: PostgreSQLEventStore):
    odd = ["\0", "\ud7ff\ue000", "\U0010ffff", "\\u0000", "'; --", "$1", "{}", "x" * 3_000_000]
    events = [Happened(number, note) for number, note in enumerate(odd)]
    await store.append_events("odd", "Thing", events, NO_STREAM)
    await store.append_events("odd", "Thing", [Happened(9, odd[0])], ANY)
    stored = (await store.get_events("odd", "Thing")).events
    assert [event.event for event in stored] == [*events, Happened(9, odd[0])]


# -- the lock table ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("anyio_backend", "size"),  # it is the server's table; the loops take turns
    [("asyncio", "default"), ("uvloop", "small"), ("trio", "small")],
    indirect=["anyio_backend"],
)
async def test_as_many_streams_as_may_be_fit_into_the_lock_table(
    server: PostgreSQLServer, database: Database, size: str
):
    """16 processes, each with a thousand appends at once; and in a table of a tenth of the size."""
    if size == "small":
        settings = {"max_locks_per_transaction": "10", "max_connections": "20"}
        with PostgreSQLServer(server.binaries, settings=settings) as small:
            dsn = small.create_database()
            with psycopg.connect(dsn, autocommit=True) as session:
                session.execute(migration_sql().encode())
            await crowd(database, dsn, 250, connections=1)
    else:
        await crowd(database, database.dsn, 1000, connections=2)


async def crowd(database: Database, dsn: str, each: int, connections: int) -> None:
    stores = [database.store(dsn, connections=connections) for _ in range(16)]
    returned = 0

    async def append(store: PostgreSQLEventStore, stream: str) -> None:
        nonlocal returned
        assert (await store.append_events(stream, "Thing", [Ended()], NO_STREAM)).version == 1
        returned += 1

    async def use(number: int, store: PostgreSQLEventStore) -> None:
        async with store, anyio.create_task_group() as tasks:
            for nth in range(each):
                tasks.start_soon(append, store, f"{number} {nth}")

    with anyio.fail_after(28):
        async with anyio.create_task_group() as tasks:
            for number, store in enumerate(stores):
                tasks.start_soon(use, number, store)
    assert returned == 16 * each
    with psycopg.connect(dsn) as session:
        found = session.execute("SELECT count(*) FROM eventsource.events").fetchone()
    assert found == (16 * each,)
