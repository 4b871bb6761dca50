"""The contract of a driver, which both keep, and what only libpq's does."""

from __future__ import annotations

import importlib
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta, timezone
from math import inf
from pathlib import Path
from random import Random
from typing import Any, Self
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import anyio
import psycopg
import pytest
from anyio.abc import SocketAttribute, SocketStream
from anyio.streams.buffered import BufferedByteReceiveStream
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from eventsource_anyio.guest import Guest
from eventsource_anyio.stores.postgresql import PostgreSQLEventStore, libpq_driver
from eventsource_anyio.stores.postgresql.asyncpg_driver import AsyncpgDriver, connect_by_dsn
from eventsource_anyio.stores.postgresql.driver import Connection, Driver, DriverError
from eventsource_anyio.stores.postgresql.libpq_driver import LibpqDriver
from eventsource_anyio.testing import cancel_at_every_checkpoint
from eventsource_anyio.testing.postgresql import PostgreSQLDatabases, PostgreSQLServer

MakeDriver = Callable[[str], Driver]
SECONDS = 10.0  # in which whatever is waited for has happened


class Server:
    """The database that is connected to, looked at from outside."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self._session = psycopg.connect(dsn, autocommit=True)

    def ask(self, statement: str, *values: object) -> Any:
        row = self._session.execute(statement.encode(), values).fetchone()
        return row and row[0]

    def run(self, script: str) -> None:
        self._session.execute(script.encode())

    def sessions(self, state: str = "%") -> int:
        """How many others are connected, and in this state."""
        statement = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            "AND backend_type = 'client backend' AND pid <> pg_backend_pid() AND state LIKE %s"
        )
        return int(self.ask(statement, state))

    def close(self) -> None:
        self._session.close()


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(SECONDS):
        while not condition():  # noqa: ASYNC110  (what is outside sets no event)
            await anyio.sleep(0.002)


@pytest.fixture
def server(postgresql_dsn: str) -> Iterator[Server]:
    server = Server(postgresql_dsn)
    server.run("CREATE TABLE noted (number int)")
    yield server
    server.close()


@pytest.fixture(params=["asyncpg", "psycopg"])
async def make_driver(request: pytest.FixtureRequest) -> AsyncIterator[MakeDriver]:
    if request.param == "psycopg":
        yield LibpqDriver
        return
    async with Guest() as guest:
        yield lambda dsn: AsyncpgDriver(guest, connect_by_dsn(dsn))


@pytest.fixture
def driver(make_driver: MakeDriver, server: Server) -> Driver:
    return make_driver(server.dsn)


@asynccontextmanager
async def connected(driver: Driver) -> AsyncIterator[Connection]:
    connection = await driver.connect()
    try:
        yield connection
    finally:
        await connection.close()


@pytest.fixture
async def connection(driver: Driver) -> AsyncIterator[Connection]:
    async with connected(driver) as connection:
        yield connection


async def value(connection: Connection, statement: str, *values: object) -> Any:
    ((found,),) = await connection.fetch(statement, *values)
    return found


async def answers(connection: Connection) -> bool:
    """It is usable, and says so."""
    return connection.usable and bool(await value(connection, "SELECT 42") == 42)


def is_libpq(driver: Driver) -> bool:
    return isinstance(driver, LibpqDriver)


TOKYO = timezone(timedelta(hours=9))
NOON = datetime(2026, 11, 23, 12, 0, 0, 123456, UTC)
IDS = [uuid4(), uuid4()]
VALUES: dict[str, list[object]] = {
    "int4": [0, 1, -1, 2**31 - 1, -(2**31)],
    "int8": [0, 1, -1, 300, 2**63 - 1, -(2**63)],
    "text": ["", "a", "é 漢字 🐘 ' \" \\ \n {NULL}", "x" * 100_000],
    "bytea": [b"", b"\0\xff\\", bytes(range(256)) * 100],
    "bool": [True, False],
    "uuid": [*IDS, UUID(int=0), UUID(int=2**128 - 1)],
    "timestamptz": [
        NOON,
        NOON.astimezone(TOKYO),
        datetime(1, 1, 2, tzinfo=UTC),  # asyncpg makes the first and the last infinite
        datetime(9999, 12, 30, 23, 59, 59, 999999, UTC),
    ],
    "int4[]": [[], [None], [1, None, -(2**31)], [7] * 1000],
    "int8[]": [[], [None], [1, None, 2**63 - 1], [7] * 1000],
    "text[]": [[], [None], ["", None, "NULL", "a,b", '"{}\\', "é 漢字"]],
    "bytea[]": [[], [None], [b"", None, b"\0\xff"]],
    "bool[]": [[], [None], [True, None, False]],
    "uuid[]": [[], [None], [IDS[0], None, IDS[1]]],
    "timestamptz[]": [[], [None], [NOON, None, NOON.astimezone(TOKYO)]],
}


class TestRows:
    @pytest.mark.parametrize("kind", VALUES)
    async def test_values_come_back_as_they_were(self, connection: Connection, kind: str) -> None:
        for sent in [*VALUES[kind], None]:
            found = await value(connection, f"SELECT $1::{kind}", sent)
            assert found == sent
            for one, other in zip(listed(found), listed(sent), strict=True):
                if isinstance(one, datetime):
                    assert one.tzinfo is UTC
                elif isinstance(one, UUID):
                    assert isinstance(other, UUID)
                else:
                    assert type(one) is type(other)

    async def test_the_signature_of_a_function_says_what_its_values_are(
        self, connection: Connection
    ) -> None:
        await connection.run(
            "CREATE FUNCTION told(a bigint, b int[], c bigint[], d timestamptz[], e text[], "
            "f uuid[]) RETURNS text LANGUAGE sql AS $$ SELECT concat_ws(' ', a, b, c, d, e, f) $$"
        )
        call = "SELECT told($1, $2, $3, $4, $5, $6)"
        for numbers in ([], [1], [40_000], [None]):
            told = await value(connection, call, 1, numbers, numbers, [], [], [])
            shown = "{" + ",".join("NULL" if one is None else str(one) for one in numbers) + "}"
            assert told == f"1 {shown} {shown} {{}} {{}} {{}}"

    async def test_rows_are_sequences_in_the_order_of_the_server(
        self, connection: Connection
    ) -> None:
        rows = await connection.fetch("SELECT n, -n FROM generate_series(1, $1) n", 3)
        assert [tuple(row) for row in rows] == [(1, -1), (2, -2), (3, -3)]
        assert (len(rows), rows[-1][1]) == (3, -3)
        assert len(await connection.fetch("SELECT 1 WHERE false")) == 0
        assert len(await connection.fetch("INSERT INTO noted VALUES ($1)", 1)) == 0
        assert len(await connection.fetch("NOTIFY nobody")) == 0
        assert [tuple(row) for row in await connection.fetch("TABLE noted")] == [(1,)]

    async def test_neither_the_time_zone_nor_the_environment_changes_what_is_read(
        self, make_driver: MakeDriver, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PGTZ", "Asia/Tokyo")
        monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
        async with connected(make_driver(server.dsn)) as connection:
            await connection.run("SET TimeZone = 'Asia/Tokyo'; SET DateStyle = 'German'")
            found = await value(connection, "SELECT $1::timestamptz", NOON)
            assert (found, found.tzinfo) == (NOON, UTC)
            assert await value(connection, "SELECT length($1::text)", "漢字") == 2
            assert await value(connection, "SELECT chr(28450)") == "漢"

    @pytest.mark.parametrize(
        ("kind", "wrong"),
        [
            ("int4", 2**31),
            ("int4", -(2**31) - 1),
            ("int4", "one"),
            ("int4[]", [1, 2**40]),
            ("int8", 2**63),
            ("text", 5),
            ("text", "\0"),
            ("text", "\ud800"),
            ("text[]", ["a", 5]),
            ("uuid", "no"),
            ("timestamptz", "now"),
        ],
    )
    async def test_what_does_not_fit_is_refused_and_not_cut_off(
        self, driver: Driver, connection: Connection, kind: str, wrong: object
    ) -> None:
        with pytest.raises(DriverError) as raised:
            await connection.fetch(f"SELECT $1::{kind}", wrong)
        if is_libpq(driver):
            assert not raised.value.lost
            assert await answers(connection)

    @pytest.mark.parametrize("values", [(), (1,), (1, 2, 3), (1, 2, 3, 4, 5, 6, 7, 8)])
    async def test_the_number_of_values_has_to_be_right(
        self, driver: Driver, connection: Connection, values: tuple[int, ...]
    ) -> None:
        for statement in ("SELECT $1::int + $2::int", *(["SELECT 1"] if values else [])):
            with pytest.raises(DriverError) as raised:
                await connection.fetch(statement, *values)
            if is_libpq(driver):
                assert not raised.value.lost
                assert await answers(connection)

    async def test_moments_beside_each_other_are_not_mixed_up(self, connection: Connection) -> None:
        later = [NOON, NOON, NOON + timedelta(microseconds=1), NOON, datetime(1, 1, 2, tzinfo=UTC)]
        rows = await connection.fetch("SELECT unnest($1::timestamptz[])", later)
        assert [row[0] for row in rows] == later

    async def test_a_row_that_python_cannot_hold_is_an_error_of_the_driver(
        self, driver: Driver, connection: Connection
    ) -> None:
        if is_libpq(driver):
            with pytest.raises(DriverError, match="timestamp too small"):
                await connection.fetch("SELECT '-infinity'::timestamptz")
        else:  # it has the first and the last that there are
            for told, far in (("-infinity", datetime.min), ("infinity", datetime.max)):  # noqa: DTZ901
                found = await value(connection, f"SELECT '{told}'::timestamptz")
                assert found == far.replace(tzinfo=UTC)
        assert await answers(connection)

    async def test_a_statement_is_prepared_once_whatever_its_values(
        self, driver: Driver, connection: Connection
    ) -> None:
        statement = "SELECT $1::int8, $2::int[], $3::text"
        counted = "SELECT count(*) FROM pg_prepared_statements WHERE statement = $1"
        for number, numbers in [(1, []), (2**40, [1]), (None, [2**31 - 1, None]), (3, [40_000])]:
            await connection.fetch(statement, number, numbers, "é")
            assert await value(connection, counted, statement) == 1
        async with connected(driver) as another:
            assert await value(another, counted, statement) == 0
            await another.fetch(statement, 1, [], "")
            assert await value(another, counted, statement) == 1

    async def test_a_large_result_and_a_large_value(self, connection: Connection) -> None:
        many = "SELECT n, repeat('x', 100) FROM generate_series(1, $1) n"
        rows = await connection.fetch(many, 100_000)
        assert (len(rows), tuple(rows[-1])) == (100_000, (100_000, "x" * 100))
        large = os.urandom(10_000_000)
        assert await value(connection, "SELECT $1::bytea", large) == large

    async def test_many_connections_at_once(self, driver: Driver) -> None:
        found: set[int] = set()

        async def ask(number: int) -> None:
            async with connected(driver) as connection:
                for _ in range(20):
                    found.add(await value(connection, "SELECT $1::int", number))

        async with anyio.create_task_group() as tasks:
            for number in range(10):
                tasks.start_soon(ask, number)
        assert found == set(range(10))

    async def test_connections_that_meet_a_statement_at_the_same_time(self, driver: Driver) -> None:
        async with AsyncExitStack() as stack:
            connections = [await stack.enter_async_context(connected(driver)) for _ in range(3)]
            found: list[int] = []

            async def ask(connection: Connection, number: int) -> None:
                found.append(await value(connection, f"SELECT {number} + $1::int", 3))
                found.append(await value(connection, f"SELECT {number} * $1::int", 3))

            for number in range(5):
                async with anyio.create_task_group() as tasks:
                    for connection in connections:
                        tasks.start_soon(ask, connection, number)
                assert sorted(found) == sorted([number + 3, number * 3] * 3)
                found.clear()


def listed(found: Any) -> list[Any]:
    return found if isinstance(found, list) else [found]


class TestScripts:
    async def test_a_script_is_several_statements(self, connection: Connection) -> None:
        await connection.run(
            "CREATE TABLE a (n int); INSERT INTO a VALUES (1), (2); SELECT * FROM a;"
            "CREATE FUNCTION f() RETURNS int LANGUAGE plpgsql AS $$ BEGIN RETURN 3; END $$;"
        )
        await connection.run("INSERT INTO a VALUES (f())")
        assert await value(connection, "SELECT sum(n) FROM a") == 6

    async def test_a_transaction_over_several_calls(
        self, connection: Connection, server: Server
    ) -> None:
        for end, kept in (("ROLLBACK", 0), ("COMMIT", 2)):
            await connection.run("BEGIN ISOLATION LEVEL READ COMMITTED")
            await connection.fetch("INSERT INTO noted VALUES ($1)", 1)
            await connection.run("INSERT INTO noted VALUES (2)")
            assert server.ask("SELECT count(*) FROM noted") == 0
            await connection.run(end)
            assert server.ask("SELECT count(*) FROM noted") == kept

    async def test_a_script_that_fails_changes_nothing(
        self, connection: Connection, server: Server
    ) -> None:
        with pytest.raises(DriverError) as raised:
            await connection.run("INSERT INTO noted VALUES (1); SELECT 1/0; SELECT 2")
        assert (raised.value.sqlstate, raised.value.lost) == ("22012", False)
        assert server.ask("SELECT count(*) FROM noted") == 0
        assert await answers(connection)


class TestErrors:
    async def test_an_error_has_its_sqlstate_and_detail(self, connection: Connection) -> None:
        await connection.run("CREATE TABLE once (n int UNIQUE)")
        insert = "INSERT INTO once VALUES ($1)"
        await connection.fetch(insert, 1)
        for _ in range(3):
            with pytest.raises(DriverError) as raised:
                await connection.fetch(insert, 1)
            assert (raised.value.sqlstate, raised.value.lost) == ("23505", False)
            assert "once_n_key" in str(raised.value)
            assert "Key (n)=(1) already exists." in str(raised.value)
        await connection.fetch(insert, 2)
        assert await value(connection, "SELECT count(*) FROM once") == 2

    async def test_an_error_at_the_commit_is_the_error_of_the_call(
        self, connection: Connection
    ) -> None:
        await connection.run("CREATE TABLE late (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
        with pytest.raises(DriverError) as raised:
            await connection.fetch("INSERT INTO late VALUES ($1), ($1)", 1)
        assert raised.value.sqlstate == "23505"
        assert await value(connection, "SELECT count(*) FROM late") == 0

    async def test_the_first_use_of_a_statement_may_fail(
        self, driver: Driver, connection: Connection
    ) -> None:
        once, divided = "SELECT 'another one'", "SELECT 1/$1::int"
        async with connected(driver) as other:
            for user in (connection, other):
                # In a transaction, which is then over: the next one cannot even be prepared.
                for statement, values, sqlstate in (
                    ("SELEKT 1", (), "42601"),
                    (divided, (0,), "22012"),
                    (divided, (0,), "22012"),
                ):
                    await user.run("BEGIN")
                    with pytest.raises(DriverError) as raised:
                        await user.fetch(statement, *values)
                    assert raised.value.sqlstate == sqlstate
                    with pytest.raises(DriverError) as raised:
                        await user.fetch(once)
                    assert raised.value.sqlstate == "25P02"
                    await user.run("ROLLBACK")
                assert await value(user, divided, 1) == 1
                assert await value(user, once) == "another one"

    async def test_a_statement_that_takes_too_long(self, connection: Connection) -> None:
        await connection.run("SET statement_timeout = 20")
        for call in (
            lambda: connection.fetch("SELECT pg_sleep(30)"),
            lambda: connection.run("SELECT pg_sleep(30)"),
        ):
            with pytest.raises(DriverError) as raised:
                await call()
            assert (raised.value.sqlstate, raised.value.lost) == ("57014", False)
            assert await answers(connection)


class TestCancelling:
    async def test_a_cancelled_call_is_stopped_and_the_connection_usable(
        self, connection: Connection, server: Server
    ) -> None:
        for call in (
            lambda: connection.fetch("SELECT pg_sleep($1)", 60),
            lambda: connection.run("SELECT 1; SELECT pg_sleep(60)"),
        ):
            with anyio.move_on_after(0.05) as scope:
                await call()
            assert scope.cancelled_caught
            with anyio.fail_after(SECONDS):
                assert await answers(connection)
            assert server.sessions("active") == 0
            assert server.sessions() == 1

    async def test_in_a_cancelled_scope_nothing_is_sent(
        self, driver: Driver, connection: Connection, server: Server
    ) -> None:
        if is_libpq(driver):
            with anyio.CancelScope() as scope:
                scope.cancel()
                await connection.fetch("INSERT INTO noted VALUES (1)")
            with anyio.CancelScope() as scope:
                scope.cancel()
                await connection.run("INSERT INTO noted VALUES (1)")
            assert server.ask("SELECT count(*) FROM noted") == 0
            assert await answers(connection)

    async def test_at_every_checkpoint_of_a_statement(
        self, driver: Driver, connection: Connection, server: Server
    ) -> None:
        number = 0

        async def insert() -> bool:
            nonlocal number
            number += 1
            await connection.fetch("INSERT INTO noted VALUES ($1)", number)
            return True

        async def afterwards(done: bool | None) -> None:
            stored = server.ask("SELECT count(*) FROM noted WHERE number = %s", number)
            assert stored or not done
            if is_libpq(driver):
                assert stored == bool(done)
            assert await answers(connection)

        assert await cancel_at_every_checkpoint(insert, afterwards) > 0
        assert server.sessions() == 1

    async def test_at_every_checkpoint_of_a_script(
        self, driver: Driver, connection: Connection, server: Server
    ) -> None:
        number = 0

        async def insert() -> bool:
            nonlocal number
            number += 1
            await connection.run(
                f"INSERT INTO noted VALUES ({number}); INSERT INTO noted VALUES ({number})"
            )
            return True

        async def afterwards(done: bool | None) -> None:
            stored = server.ask("SELECT count(*) FROM noted WHERE number = %s", number)
            assert stored in ((2,) if done else (0, 2))
            if is_libpq(driver):
                assert stored == (2 if done else 0)
            assert await answers(connection)

        assert await cancel_at_every_checkpoint(insert, afterwards) > 0

    async def test_at_every_checkpoint_of_the_first_statement(
        self, make_driver: MakeDriver, server: Server
    ) -> None:
        connections: list[Connection] = []

        async def first() -> Any:
            # A new driver and a new connection each time: nothing is prepared or known yet.
            with anyio.CancelScope(shield=True):
                connections.append(await make_driver(server.dsn).connect())
            return await value(connections[-1], "SELECT $1::int", 5)

        async def afterwards(found: int | None) -> None:
            assert found in (5, None)
            connection = connections.pop()
            assert await value(connection, "SELECT $1::int", 6) == 6
            assert await value(connection, "SELECT $1::int", 7) == 7
            await connection.close()

        await cancel_at_every_checkpoint(first, afterwards)
        await until(lambda: server.sessions() == 0)

    async def test_at_every_checkpoint_of_a_large_value(self, connection: Connection) -> None:
        large = os.urandom(3_000_000)

        async def ask() -> bool:
            return bool(await value(connection, "SELECT $1::bytea", large) == large)

        async def afterwards(same: bool | None) -> None:
            assert same is not False
            assert await answers(connection)

        await cancel_at_every_checkpoint(ask, afterwards)

    async def test_two_hundred_random_deadlines(
        self, driver: Driver, connection: Connection, server: Server
    ) -> None:
        random = Random(42)
        insert = "INSERT INTO noted SELECT $1 FROM pg_sleep($2)"
        await connection.fetch(insert, -1, 0.0)
        done: set[int] = set()
        for number in range(200):
            with anyio.move_on_after(random.uniform(0, 0.004)):
                await connection.fetch(insert, number, random.choice([0.0, 0.001, 30.0]))
                done.add(number)
            assert await answers(connection)
        stored = set(server.ask("SELECT array_agg(number) FROM noted WHERE number >= 0") or ())
        assert done <= stored
        if is_libpq(driver):
            assert done == stored
        assert 0 < len(done) < 200
        assert server.sessions() == 1

    async def test_at_every_checkpoint_of_connecting(self, driver: Driver, server: Server) -> None:
        before: int | None = None

        async def afterwards(connection: Connection | None) -> None:
            if connection is not None:
                assert await answers(connection)
                await connection.close()
            await until(lambda: server.sessions() == 0)
            nonlocal before
            before = before or descriptors()
            assert descriptors() <= before

        assert await cancel_at_every_checkpoint(driver.connect, afterwards) > 0

    async def test_who_is_cancelled_connecting_waits_no_longer_than_for_the_connection(
        self, driver: Driver, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What is given to a server that does not answer is not used up where one does."""
        monkeypatch.setattr("eventsource_anyio.stores.postgresql.asyncpg_driver._GRACE", 40)

        async def afterwards(connection: Connection | None) -> None:
            if connection is not None:
                await connection.close()

        with anyio.fail_after(30):
            assert await cancel_at_every_checkpoint(driver.connect, afterwards) > 0
        await until(lambda: server.sessions() == 0)


class TestLosing:
    async def test_a_connection_that_the_server_ends_while_it_is_idle(
        self, connection: Connection, server: Server
    ) -> None:
        server.ask("SELECT pg_terminate_backend(%s)", await pid_of(connection))
        await until(lambda: server.sessions() == 0)
        await anyio.sleep(0.02)
        assert not connection.usable
        for call in (lambda: connection.fetch("SELECT 1"), lambda: connection.run("SELECT 1")):
            with pytest.raises(DriverError) as raised:
                await call()
            assert raised.value.lost
        connection.abandon()
        await connection.close()
        assert not connection.usable

    @pytest.mark.parametrize("script", [False, True])
    async def test_a_connection_that_the_server_ends_during_a_call(
        self, driver: Driver, connection: Connection, server: Server, script: bool
    ) -> None:
        pid = await pid_of(connection)

        async def kill() -> None:
            await until(lambda: server.sessions("active"))
            server.ask("SELECT pg_terminate_backend(%s)", pid)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(kill)
            with pytest.raises(DriverError) as raised:
                if script:
                    await connection.run("SELECT 1; SELECT pg_sleep(30)")
                else:
                    await connection.fetch("SELECT pg_sleep(30)")
        assert raised.value.lost
        assert raised.value.sqlstate == "57P01" or not is_libpq(driver)  # asyncpg may not say why
        assert not connection.usable

    async def test_a_connection_that_the_server_ends_within_a_transaction(
        self, connection: Connection, server: Server
    ) -> None:
        await connection.run("SET idle_in_transaction_session_timeout = 10; BEGIN")
        await until(lambda: server.sessions() == 0)
        with pytest.raises(DriverError) as raised:
            await connection.fetch("SELECT 1")
        assert raised.value.lost
        assert not connection.usable

    async def test_a_connection_that_breaks_during_a_call(
        self, make_driver: MakeDriver, server: Server
    ) -> None:
        async with Relay(server.dsn) as relay, connected(make_driver(relay.dsn)) as connection:
            async with anyio.create_task_group() as tasks:

                async def cut() -> None:
                    await until(lambda: server.sessions("active"))
                    await relay.cut()

                tasks.start_soon(cut)
                with pytest.raises(DriverError) as raised:
                    await connection.fetch("SELECT pg_sleep(1)")
            assert raised.value.lost
            assert raised.value.sqlstate in ("", "08003")
            assert not connection.usable

    async def test_what_is_closed_or_abandoned_is_gone(
        self, driver: Driver, server: Server
    ) -> None:
        for abandoned in (False, True):
            connection = await driver.connect()
            await connection.run("BEGIN; INSERT INTO noted VALUES (1)")
            if abandoned:
                connection.abandon()
            else:
                await connection.close()
            assert not connection.usable
            await until(lambda: server.sessions() == 0)
            with pytest.raises(DriverError) as raised:
                await connection.fetch("SELECT 1")
            assert raised.value.lost
            connection.abandon()
            await connection.close()
        assert server.ask("SELECT count(*) FROM noted") == 0

    async def test_an_abandoned_one_leaves_the_others_alone(self, driver: Driver) -> None:
        first = await driver.connect()
        first.abandon()
        async with connected(driver) as second:  # likely with the same descriptor
            await second.listen("channel")
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(second.heard)
                await anyio.wait_all_tasks_blocked()
                first.abandon()
                await first.close()
                assert not first.usable
                async with connected(driver) as third:
                    await third.fetch("NOTIFY channel")


def descriptors() -> int:
    """How many this process has open, where that can be found out."""
    directory = Path("/proc/self/fd")
    return len(list(directory.iterdir())) if directory.exists() else 0


async def pid_of(connection: Connection) -> int:
    return int(await value(connection, "SELECT pg_backend_pid()"))


class TestListening:
    @pytest.fixture
    async def listening(self, connection: Connection) -> Connection:
        await connection.listen("channel")
        return connection

    async def test_a_notification_is_heard(self, listening: Connection, server: Server) -> None:
        for _ in range(3):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(listening.heard)
                await anyio.wait_all_tasks_blocked()
                server.run("NOTIFY channel")

    async def test_what_was_said_is_heard(self, listening: Connection, server: Server) -> None:
        said = {"", "a", "b", "Äpfel"}
        for word in (*said, "a"):
            server.run(f"NOTIFY channel, '{word}'")
        heard: set[str] = set()
        with anyio.fail_after(SECONDS):
            while heard != said:
                heard |= await listening.heard()

    async def test_of_very_many_some_are_left_out_but_not_of_an_append(
        self, listening: Connection, server: Server
    ) -> None:
        server.run("SELECT pg_notify('channel', n::text) FROM generate_series(1, 3000) n")
        server.run("NOTIFY channel")
        await listening.fetch("SELECT 1")
        most, said = 0, set[str]()
        with anyio.fail_after(SECONDS):
            while "" not in said:
                said = {*await listening.heard()}
                most = max(most, len(said))
        assert most in (1000, 1001)

    async def test_those_that_came_before_are_heard_once(
        self, listening: Connection, server: Server
    ) -> None:
        for meanwhile in (lambda: listening.fetch("SELECT 1"), lambda: listening.run("SELECT 1")):
            server.run("NOTIFY channel, 'a'")
            server.run("NOTIFY channel, 'b'")
            await meanwhile()
            await meanwhile()
            with anyio.fail_after(SECONDS):
                await listening.heard()
            with anyio.move_on_after(0.05) as scope:
                await listening.heard()
            assert scope.cancelled_caught

    async def test_other_channels_are_not(self, listening: Connection, server: Server) -> None:
        server.run("NOTIFY another")
        with anyio.move_on_after(0.05) as scope:
            await listening.heard()
        assert scope.cancelled_caught

    async def test_a_cancelled_call_takes_nothing(
        self, listening: Connection, server: Server
    ) -> None:
        for _ in range(3):
            server.run("NOTIFY channel")
            await listening.fetch("SELECT 1")
            with anyio.CancelScope() as scope:
                scope.cancel()
                await listening.heard()
            assert scope.cancelled_caught
            with anyio.fail_after(SECONDS):
                await listening.heard()

    async def test_it_also_listens_between_other_calls(
        self, listening: Connection, server: Server
    ) -> None:
        with anyio.move_on_after(0.01):
            await listening.heard()
        assert await answers(listening)
        server.run("NOTIFY channel")
        with anyio.fail_after(SECONDS):
            await listening.heard()
        assert await answers(listening)

    @pytest.mark.parametrize("how", ["ended", "abandoned", "closed"])
    async def test_a_connection_that_is_gone_is_heard(
        self, listening: Connection, server: Server, how: str
    ) -> None:
        pid = await pid_of(listening)
        with anyio.fail_after(SECONDS):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(listening.heard)
                await anyio.wait_all_tasks_blocked()
                if how == "ended":
                    server.ask("SELECT pg_terminate_backend(%s)", pid)
                elif how == "abandoned":
                    listening.abandon()
                else:
                    await listening.close()
        await until(lambda: not listening.usable)


class TestConnecting:
    async def test_who_may_not_is_told_why(
        self,
        make_driver: MakeDriver,
        server: Server,
        postgresql_server: PostgreSQLDatabases,
    ) -> None:
        wrong = {
            "3D000": postgresql_server.dsn("no such database"),
            "28000": postgresql_server.dsn(user="nobody"),
        }
        if not isinstance(postgresql_server, PostgreSQLServer):
            del wrong["28000"]
        for sqlstate, dsn in wrong.items():
            with pytest.raises(DriverError) as raised:
                await make_driver(dsn).connect()
            assert (raised.value.sqlstate, raised.value.lost) == (sqlstate, True)
            assert "no" in str(raised.value)

    @pytest.mark.parametrize(
        ("sqlstate", "message"),
        [
            ("28P01", 'password authentication failed for user "me"'),
            (
                "28000",
                'no pg_hba.conf entry for host "::1", user "me", database "it", no encryption',
            ),
            ("28000", 'pg_hba.conf rejects connection for host "::1", user "me", database "it"'),
            ("28000", 'Peer authentication failed for user "me"'),
            ("28000", 'role "me" is not permitted to log in'),
            ("53300", "sorry, too many clients already"),
            ("53300", 'too many connections for role "me"'),
            ("53300", "remaining connection slots are reserved for superusers"),
            ("57P03", "the database system is starting up"),
        ],
    )
    async def test_what_the_server_says_to_a_refusal(
        self, make_driver: MakeDriver, sqlstate: str, message: str
    ) -> None:
        async with refusing(sqlstate, message) as dsn:
            with pytest.raises(DriverError, match=message.split('"')[0]) as raised:
                await make_driver(dsn).connect()
        assert (raised.value.sqlstate, raised.value.lost) == (sqlstate, True)

    async def test_without_the_password_it_is_said_that_one_is_needed(self) -> None:
        async with talking(b"R\0\0\0\x08\0\0\0\x03") as dsn:
            with pytest.raises(DriverError, match="no password supplied") as raised:
                await LibpqDriver(dsn).connect()
        assert (raised.value.sqlstate, raised.value.lost) == ("28P01", True)

    async def test_other_words_have_no_sqlstate(self) -> None:
        async with refusing("28P01", "Passwort-Authentifizierung fehlgeschlagen") as dsn:
            with pytest.raises(DriverError, match="Passwort-Authentifizierung") as raised:
                await LibpqDriver(dsn).connect()
        assert (raised.value.sqlstate, raised.value.lost) == ("", True)

    @pytest.mark.parametrize(
        "dsn",
        [
            "postgresql://postgres@127.0.0.1:1/postgres",
            "postgresql://postgres@host.invalid/postgres",
            f"postgresql://postgres@{'ü' * 70}/postgres",
            "postgresql://postgres@/postgres?host=/nowhere",
        ],
    )
    async def test_nobody_there(self, make_driver: MakeDriver, dsn: str) -> None:
        with pytest.raises(DriverError) as raised:
            await make_driver(dsn).connect()
        assert (raised.value.sqlstate, raised.value.lost) == ("", True)

    async def test_a_server_that_does_not_answer(self, make_driver: MakeDriver) -> None:
        async with talking(b"") as dsn:
            begun = time.monotonic()
            with pytest.raises(DriverError, match=r"no answer within 1 s|TimeoutError") as raised:
                await make_driver(f"{dsn}?connect_timeout=1").connect()
        assert raised.value.lost
        assert 1 <= time.monotonic() - begun < SECONDS

    async def test_of_several_hosts_the_first_that_answers(
        self, make_driver: MakeDriver, server: Server
    ) -> None:
        where = urlsplit(server.dsn)
        for first in ("127.0.0.1:1", "localhost:1", "host.invalid:5432"):
            dsn = f"postgresql://{where.username}@{first},localhost:{where.port}{where.path}"
            async with connected(make_driver(dsn)) as connection:
                assert await answers(connection)

    async def test_of_several_addresses_the_first_that_answers(
        self, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def found(*_: object, **__: object) -> list[tuple[object, ...]]:
            return [(0, 0, 0, "", (address, 0)) for address in ("127.0.0.254", "127.0.0.1")]

        monkeypatch.setattr(anyio, "getaddrinfo", found)
        async with connected(LibpqDriver(server.dsn)) as connection:
            assert await answers(connection)

    async def test_a_unix_socket(
        self,
        make_driver: MakeDriver,
        server: Server,
        postgresql_server: PostgreSQLDatabases,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        if not isinstance(postgresql_server, PostgreSQLServer):
            pytest.skip("whether the server has one is not known")
        where = urlsplit(server.dsn)
        directory = postgresql_server.directory
        dsn = f"postgresql://postgres@{where.path}?host={directory}&port={where.port}"
        async with connected(make_driver(dsn)) as connection:
            assert await value(connection, "SELECT inet_client_addr() IS NULL")
        monkeypatch.setenv("PGHOST", str(directory))
        monkeypatch.setenv("PGPORT", str(where.port))
        async with connected(make_driver(f"postgresql://postgres@{where.path}")) as connection:
            assert await value(connection, "SELECT inet_client_addr() IS NULL")


class TestOnlyLibpq:
    async def test_round_trips(self, server: Server) -> None:
        async with Relay(server.dsn) as relay:
            driver = LibpqDriver(relay.dsn)
            statement = "SELECT $1::int"
            for first in (2, 1):  # once a driver it is asked what the values are
                async with connected(driver) as connection:
                    for expected in (first, 1, 1):
                        before = relay.round_trips
                        assert await value(connection, statement, 1) == 1
                        assert relay.round_trips - before == expected

    async def test_a_request_to_cancel_that_comes_too_early_is_made_again(
        self, server: Server
    ) -> None:
        async with Relay(server.dsn) as relay, connected(LibpqDriver(relay.dsn)) as connection:
            await connection.fetch("SELECT pg_sleep($1)", 0)
            relay.hold()
            with anyio.fail_after(SECONDS):
                with anyio.move_on_after(0.02) as scope:
                    async with anyio.create_task_group() as tasks:

                        async def release() -> None:
                            with anyio.CancelScope(shield=True):
                                await until(lambda: relay.accepted == 2)
                                await anyio.sleep(0.01)
                                relay.release()

                        tasks.start_soon(release)
                        await connection.fetch("SELECT pg_sleep($1)", 60)
                assert scope.cancelled_caught
                assert await answers(connection)
            assert relay.accepted > 2

    async def test_what_was_done_when_it_was_cancelled_is_the_outcome(
        self, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with connected(LibpqDriver(server.dsn)) as connection:
            monkeypatch.setattr(libpq_driver, "_polled", None)  # the server is not asked to stop
            insert = "INSERT INTO noted VALUES (1) RETURNING 5"
            found = [await value(connection, insert)]

            async def ask() -> None:
                found.append(await value(connection, insert))

            for done in (2, 3, 4):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(ask)
                    await anyio.wait_all_tasks_blocked()
                    # The answer comes, and nobody can look before the cancellation.
                    while server.ask("SELECT count(*) FROM noted") < done:
                        pass
                    time.sleep(0.01)  # noqa: ASYNC251
                    tasks.cancel_scope.cancel()
                assert len(found) == done
            assert await answers(connection)

    async def test_a_dead_network_keeps_a_cancelled_caller_for_a_moment_only(
        self, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(libpq_driver, "_STOP_WITHIN", 0.1)
        async with Relay(server.dsn) as relay, connected(LibpqDriver(relay.dsn)) as connection:
            relay.hold(everything=True)
            with anyio.fail_after(SECONDS), anyio.move_on_after(0.01) as scope:
                await connection.fetch("SELECT 1")
            assert scope.cancelled_caught
            assert not connection.usable
            relay.release()

    async def test_a_server_that_writes_before_it_has_read_everything(self, server: Server) -> None:
        large = os.urandom(20_000_000)
        async with Relay(server.dsn) as relay, connected(LibpqDriver(relay.dsn)) as connection:
            await connection.listen("channel")
            await connection.fetch("SELECT length($1::bytea)", b"")
            relay.hold(until_sent=600_000)
            server.run(
                "SELECT pg_notify('channel', n || repeat('x', 7900)) FROM generate_series(1, 100) n"
            )
            with anyio.fail_after(SECONDS):
                assert await value(connection, "SELECT length($1::bytea)", large) == len(large)
            await connection.heard()

    async def test_two_calls_at_once_are_an_error_and_not_mixed_up(self, server: Server) -> None:
        async with connected(LibpqDriver(server.dsn)) as connection:

            async def ask() -> None:
                with pytest.raises(DriverError) as raised:
                    await connection.fetch("SELECT pg_sleep(5)")
                assert raised.value.lost

            with anyio.fail_after(SECONDS):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(ask)
                    tasks.start_soon(ask)
            assert not connection.usable

    async def test_a_server_that_talks_nonsense(self) -> None:
        async with talking(b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I", b"T\0\0\0\0") as dsn:
            async with connected(LibpqDriver(dsn)) as connection:
                with anyio.fail_after(SECONDS), pytest.raises(DriverError) as raised:
                    await connection.fetch("SELECT 1")
                assert raised.value.lost
                assert not connection.usable

    @pytest.mark.parametrize("anyio_backend", [("asyncio", {})], ids=["asyncio"])
    async def test_asyncios_own_cancellation_is_raised_and_leaves_the_connection_usable(
        self, server: Server
    ) -> None:
        import asyncio

        async with connected(LibpqDriver(server.dsn)) as connection:
            for statement in ("SELECT pg_sleep(60)", "SELECT 1"):
                task = asyncio.create_task(connection.fetch(statement))
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert await answers(connection)

    def test_without_psycopg_it_is_said_what_brings_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "psycopg", None)
        monkeypatch.delitem(sys.modules, libpq_driver.__name__)
        with pytest.raises(ImportError, match=r"pip install 'eventsource-anyio\[psycopg\]'"):
            importlib.import_module(libpq_driver.__name__)

    def test_an_old_libpq_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(psycopg.pq, "version", lambda: 160004)
        monkeypatch.delitem(sys.modules, libpq_driver.__name__)
        with pytest.raises(ImportError, match="it has libpq 16, and 17 is needed"):
            importlib.import_module(libpq_driver.__name__)


class TestChoosing:
    async def test_a_store_uses_the_driver_that_was_chosen(
        self, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = PostgreSQLEventStore(server.dsn, driver="psycopg")
        await store.migrate()
        for driver, other in (("psycopg", AsyncpgDriver), ("asyncpg", LibpqDriver)):
            monkeypatch.setattr(other, "connect", None)
            chosen: Any = driver
            async with PostgreSQLEventStore(server.dsn, driver=chosen) as store:
                assert await store.last_position() == 0
            monkeypatch.undo()

    async def test_the_default_is_psycopg_on_trio_and_asyncpg_otherwise(
        self, server: Server, monkeypatch: pytest.MonkeyPatch, anyio_backend_name: str
    ) -> None:
        await PostgreSQLEventStore(server.dsn).migrate()
        default, other = AsyncpgDriver, LibpqDriver
        if anyio_backend_name == "trio":
            default, other = other, default  # type: ignore[assignment]
        monkeypatch.setattr(other, "connect", None)
        async with PostgreSQLEventStore(server.dsn) as store:
            assert await store.last_position() == 0
            async with store.transaction() as tx:  # asyncpg's in any case
                assert (await tx.execute(text("SELECT 42"))).scalar_one() == 42
        assert (await PostgreSQLEventStore(server.dsn).doctor()).ok
        async with Guest() as guest:  # what runs in it is asyncio's
            monkeypatch.undo()
            monkeypatch.setattr(LibpqDriver, "connect", None)
            await guest.run(PostgreSQLEventStore(server.dsn).migrate())

    @pytest.mark.parametrize("why", ["no psycopg", "an old libpq"])
    async def test_without_psycopg_it_is_asyncpg(
        self, server: Server, monkeypatch: pytest.MonkeyPatch, why: str
    ) -> None:
        if why == "no psycopg":
            monkeypatch.setitem(sys.modules, "psycopg", None)
        else:
            monkeypatch.setattr(psycopg.pq, "version", lambda: 160004)
        monkeypatch.delitem(sys.modules, libpq_driver.__name__)
        store = PostgreSQLEventStore(server.dsn)
        await store.migrate()
        async with store:
            assert await store.last_position() == 0
        with pytest.raises(ImportError, match=r"pip install 'eventsource-anyio\[psycopg\]'"):
            await PostgreSQLEventStore(server.dsn, driver="psycopg").migrate()

    async def test_an_engine_means_asyncpg(
        self, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await PostgreSQLEventStore(server.dsn).migrate()
        monkeypatch.setattr(LibpqDriver, "connect", None)
        dsn = server.dsn.replace("postgresql://", "postgresql+asyncpg://", 1)
        async with Guest() as guest:
            engine = create_async_engine(dsn)
            async with PostgreSQLEventStore(engine, guest=guest) as store:
                assert await store.last_position() == 0
            await guest.run(engine.dispose())

    def test_an_engine_has_one_already(self) -> None:
        engine = create_async_engine("postgresql+asyncpg://")
        with pytest.raises(ValueError, match="driver='psycopg' needs a DSN"):
            PostgreSQLEventStore(engine, driver="psycopg")
        PostgreSQLEventStore(engine, driver="asyncpg")

    def test_there_are_two(self) -> None:
        with pytest.raises(ValueError, match="driver must be 'asyncpg' or 'psycopg', not 'pg8000'"):
            PostgreSQLEventStore("postgresql://", driver="pg8000")  # type: ignore[arg-type]


class Relay:
    """Between a driver and the server: it counts round trips, holds back, and cuts off."""

    def __init__(self, dsn: str) -> None:
        self._where = urlsplit(dsn)
        if not self._where.hostname or not self._where.port:
            pytest.skip("the server has no TCP port")
        self.round_trips = 0
        self._until_sent = inf
        self.accepted = 0
        self._answered = True
        self._open = anyio.Event()
        self._open.set()
        self._held: Callable[[int], bool] = lambda _: False
        self._streams: list[SocketStream] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        # What nobody reads is soon not taken any more.
        listener.listeners[0].extra(SocketAttribute.raw_socket).setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384
        )
        port = listener.extra(SocketAttribute.local_port)
        account = f"{self._where.username}@127.0.0.1:{port}"
        self.dsn = f"postgresql://{account}{self._where.path}"
        await self._stack.__aenter__()
        await self._stack.enter_async_context(listener)
        tasks = await self._stack.enter_async_context(anyio.create_task_group())
        self._stack.callback(tasks.cancel_scope.cancel)
        tasks.start_soon(listener.serve, self._serve)
        return self

    async def __aexit__(self, *exc_info: Any) -> None:  # noqa: PYI036  (passed on)
        await self._stack.__aexit__(*exc_info)

    def hold(self, *, everything: bool = False, until_sent: float = inf) -> None:
        """Keep what the first client sends, or everything, until it was sent so many bytes."""
        self._open = anyio.Event()
        self._held = lambda number: everything or number == 1
        self._until_sent = until_sent

    def release(self) -> None:
        self._open.set()

    async def cut(self) -> None:
        for stream in self._streams:
            await stream.aclose()

    async def _serve(self, client: SocketStream) -> None:
        self.accepted += 1
        number = self.accepted
        assert self._where.hostname
        assert self._where.port
        server = await anyio.connect_tcp(self._where.hostname, self._where.port)
        self._streams += (client, server)
        async with client, server, anyio.create_task_group() as tasks:
            tasks.start_soon(self._pass_on, client, server, number, True)
            await self._pass_on(server, client, number, False)
            tasks.cancel_scope.cancel()

    async def _pass_on(
        self, source: SocketStream, target: SocketStream, number: int, up: bool
    ) -> None:
        try:
            async for data in source:
                if self._held(number) and (up or self._held(0)):
                    await self._open.wait()
                if up and self._answered:
                    self.round_trips += 1
                self._answered = not up
                await target.send(data)
                self._until_sent -= 0 if up else len(data)
                if self._until_sent <= 0:
                    self.release()
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            await target.aclose()


@asynccontextmanager
async def talking(*answers: bytes) -> AsyncIterator[str]:
    """The DSN of a server that says these things, one whenever it was told something."""

    async def serve(stream: SocketStream) -> None:
        async with stream:
            received = BufferedByteReceiveStream(stream)
            try:
                while (length := int.from_bytes(await received.receive_exactly(4), "big")) == 8:
                    await received.receive_exactly(4)
                    await stream.send(b"N")  # no TLS
                await received.receive_exactly(length - 4)
                for answer in answers:
                    await stream.send(answer)
                    await received.receive()
            except (anyio.EndOfStream, anyio.IncompleteRead, anyio.BrokenResourceError):
                return

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(SocketAttribute.local_port)
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, serve)
        yield f"postgresql://me@127.0.0.1:{port}/it"
        tasks.cancel_scope.cancel()


def refusing(sqlstate: str, message: str) -> AbstractAsyncContextManager[str]:
    """The DSN of a server that lets nobody in."""
    fields = f"SFATAL\0VFATAL\0C{sqlstate}\0M{message}\0\0".encode()
    return talking(b"E" + (len(fields) + 4).to_bytes(4, "big") + fields)
