"""What `store.doctor()` finds, provoked for real; and a store behind PgBouncer."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import anyio
import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from eventsource_anyio import NO_STREAM, StorageError
from eventsource_anyio.stores.postgresql import (
    Diagnosis,
    Finding,
    PostgreSQLEventStore,
    batch,
    doctor,
    migration_sql,
    settings,
)
from eventsource_anyio.stores.postgresql.schema import Schema, migrations
from eventsource_anyio.stores.postgresql.settings import Server, judged
from eventsource_anyio.testing import cancel_at_every_checkpoint
from eventsource_anyio.testing.postgresql import (
    PostgreSQLDatabases,
    PostgreSQLServer,
    postgresql_binaries,
)
from eventsource_anyio.testing.samples import Happened, append_numbers, numbers
from tests.every_store import DRIVERS

FOUND = postgresql_binaries()
DEBIAN = "/usr/sbin"
PGBOUNCER = shutil.which("pgbouncer", path=os.pathsep.join((os.environ.get("PATH", ""), DEBIAN)))
# A server with nothing to complain of, and with all that can be provoked in one.
SETTINGS = {
    **dict.fromkeys(("fsync", "full_page_writes", "synchronous_commit"), "on"),
    "max_prepared_transactions": "5",
    "wal_level": "logical",
}

one_loop = pytest.mark.parametrize("anyio_backend", ["asyncio"])


def ask(dsn: str, *statements: str) -> list[tuple[Any, ...]]:
    """The rows of the last statement; `es.` is the schema."""
    with psycopg.connect(dsn, autocommit=True) as session:
        for statement in statements:
            answer = session.execute(Schema().sql(statement).encode())
        return answer.fetchall() if answer.description else []


def complaints(diagnosis: Diagnosis, *checks: str) -> list[Finding]:
    return [
        one
        for one in diagnosis.findings
        if one.level != "ok" and (not checks or one.check in checks)
    ]


class Site:
    """A database with a store in it, an application's role, and more of them; gone at the end."""

    def __init__(self, server: PostgreSQLDatabases, stack: ExitStack) -> None:
        self.server = server
        self._stack = stack
        self._databases = stack.enter_context(ExitStack())
        self.dsn = self.database()
        self.name = self.dsn.rpartition("/")[2]
        self.role = self.new_role()
        self.login = self.login_of(self.role)

    def database(self, options: str = "") -> str:
        name = f"eventsource_{secrets.token_hex(8)}"
        ask(self.server.dsn(), f"CREATE DATABASE {name} TEMPLATE template0 {options}")
        self._databases.callback(self.server.drop_database, self.server.dsn(name))
        return self.server.dsn(name)

    def new_role(self) -> str:
        role = f"app_{secrets.token_hex(4)}"
        ask(self.server.dsn(), f"CREATE ROLE {role} LOGIN PASSWORD 'secret'")
        self._stack.callback(ask, self.server.dsn(), f"DROP ROLE {role}")
        return role

    def login_of(self, role: str) -> str:
        return self.server.dsn(self.name, role, "secret")

    def close(self) -> None:
        self._databases.close()

    async def examined(self, dsn: str | None = None, **options: Any) -> Diagnosis:
        with anyio.fail_after(20):
            return await PostgreSQLEventStore(dsn or self.login, **options).doctor()


@contextmanager
def site_in(server: PostgreSQLDatabases) -> Iterator[Site]:
    with ExitStack() as stack:
        site = Site(server, stack)
        ask(site.dsn, migration_sql(role=site.role))
        try:
            yield site
        finally:
            site.close()


@pytest.fixture(scope="module")
def strict(request: pytest.FixtureRequest) -> Iterator[PostgreSQLDatabases]:
    """A server that can do all that is provoked."""
    if not FOUND:
        pytest.skip("no binaries of PostgreSQL, for a server with settings of its own")
    with PostgreSQLServer(next(iter(FOUND.values())), settings=SETTINGS) as server:
        yield server


@pytest.fixture
def site(strict: PostgreSQLDatabases) -> Iterator[Site]:
    with site_in(strict) as site:
        yield site


# -- all is well --------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", DRIVERS)
async def test_where_all_is_well_it_says_so_and_changes_nothing(site, driver):
    store = PostgreSQLEventStore(site.login, driver=driver)
    async with store:
        await append_numbers(store, 3)
        while_open = await store.doctor()
    positions = ask(site.dsn, "SELECT last_value FROM es.positions")
    diagnosis = await store.doctor()
    assert complaints(diagnosis) == complaints(while_open) == []
    assert diagnosis.ok
    assert str(diagnosis).endswith("The store can be used: all is well.")
    assert [one.check for one in diagnosis.findings] == [
        *("server", "durability", "connections", "locks", "time limits", "clock", "pooler"),
        *("schema", "privileges", "events", "order", "open appends"),
    ]
    assert ask(site.dsn, "SELECT last_value FROM es.positions") == positions
    assert ask(site.dsn, "SELECT count(*) FROM es.events") == [(3,)]
    others = "SELECT count(*) FROM pg_stat_activity WHERE usename = "
    while ask(site.dsn, f"{others}'{site.role}'") != [(0,)]:
        pass  # libpq says good-bye, and does not wait for the server's process to end


@one_loop
async def test_it_works_on_a_store_with_no_events_in_another_schema(site):
    names: dict[str, Any] = {"schema": "es_other", "prefix": "es_"}
    await PostgreSQLEventStore(site.dsn, **names).migrate(role=site.role)
    assert complaints(await site.examined(**names)) == []


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_cancelled_it_leaves_nothing_behind(site):
    store = PostgreSQLEventStore(site.login)
    sessions = f"SELECT count(*) FROM pg_stat_activity WHERE usename = '{site.role}'"

    async def nobody_is_connected(_: object) -> None:
        for _ in range(500):
            if ask(site.dsn, sessions) == [(0,)]:
                return
            await anyio.sleep(0.01)
        pytest.fail("a connection was left open")

    assert await cancel_at_every_checkpoint(store.doctor, nobody_is_connected) > 10


def test_it_reads_well():
    diagnosis = Diagnosis(
        (
            Finding("one", "ok", "fine"),
            Finding("two", "warning", "what.\n  And why.", "Do this.\nOr that."),
            Finding("three", "problem", "bad."),
            Finding("four", "problem", "worse."),
        )
    )
    assert not diagnosis.ok
    assert str(diagnosis).splitlines() == [
        "ok       one: fine",
        "warning  two: what.",
        "           And why.",
        "           Do this.",
        "           Or that.",
        "problem  three: bad.",
        "problem  four: worse.",
        "The store cannot be relied on: 2 problems, 1 warning.",
    ]
    assert Diagnosis(diagnosis.findings[:2]).ok


# -- provoked -----------------------------------------------------------------------------------


def announcing(when: str, how: str = "BEFORE INSERT ON es.events FOR EACH STATEMENT") -> str:
    return (
        f"DROP TRIGGER announce ON es.events; CREATE TRIGGER announce {how} "
        f"WHEN ({when}) EXECUTE FUNCTION es.announced()"
    )


ROW = "(0, 1, now(), NULL, gen_random_uuid(), 1, 'E', 'T', 'x', NULL, '{}')"
CHANGED = (
    "CREATE OR REPLACE FUNCTION es.safe_position(known bigint) RETURNS bigint LANGUAGE plpgsql AS"
)
PROVOKED: dict[str, tuple[str, str, str, str]] = {
    "no trigger": ("DROP TRIGGER announce ON es.events", "problem", "order", "is missing"),
    "trigger off": (
        "ALTER TABLE es.events DISABLE TRIGGER announce",
        *("problem", "order", "is disabled"),
    ),
    "trigger of replicas": (
        "ALTER TABLE es.events ENABLE REPLICA TRIGGER announce",
        *("problem", "order", "is disabled"),
    ),
    "trigger too late": (
        announcing("true", "AFTER INSERT ON es.events FOR EACH STATEMENT"),
        *("problem", "order", "is another one"),
    ),
    "trigger of rows": (
        announcing("true", "BEFORE INSERT ON es.events FOR EACH ROW"),
        *("problem", "order", "is another one"),
    ),
    "trigger that takes no lock": (announcing("true"), "problem", "order", "not announced"),
    "trigger that takes another lock": (
        announcing("pg_advisory_xact_lock_shared('es.positions'::regclass::oid::int4, -7) IS NULL"),
        *("problem", "order", "not announced"),
    ),
    "replication role": (
        "ALTER DATABASE :here SET session_replication_role = replica",
        *("problem", "order", "not announced"),
    ),
    "cache": ("ALTER SEQUENCE es.positions CACHE 20", "problem", "order", "20 positions at a time"),
    "cycle": ("ALTER SEQUENCE es.positions CYCLE", "problem", "order", "count up by one"),
    "step": ("ALTER SEQUENCE es.positions INCREMENT 2", "problem", "order", "count up by one"),
    "sequence behind": (
        f"INSERT INTO es.events VALUES {ROW.replace('0', '9', 1)}",
        *("problem", "order", "is at 0, and events go up to 9"),
    ),
    "unlogged": ("ALTER TABLE es.events SET UNLOGGED", "problem", "events", "UNLOGGED"),
    "row security": (
        "ALTER TABLE es.events ENABLE ROW LEVEL SECURITY",
        *("problem", "events", "hides events"),
    ),
    "function missing": (
        "DROP FUNCTION es.save_checkpoint",
        "problem",
        "schema",
        "save_checkpoint",
    ),
    "table missing": ("DROP TABLE es.outbox", "problem", "schema", "lacks outbox"),
    "index missing": (
        "DROP INDEX es.events_event_type",
        *("problem", "schema", "lacks events_event_type"),
    ),
    "constraint missing": (
        "ALTER TABLE es.events DROP CONSTRAINT es_events_version",
        *("problem", "schema", "lacks events_version"),
    ),
    "index invalid": (
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'es.events_event_id'::regclass",
        *("problem", "schema", "lacks events_event_id"),
    ),
    "function changed": (
        f"{CHANGED} 'BEGIN RETURN known; END'",
        "problem",
        "schema",
        "somebody: safe",
    ),
    "old": ("DELETE FROM es.migrations WHERE version > 1", "problem", "schema", "is at version 1"),
    "none": ("DROP SCHEMA eventsource CASCADE", "problem", "schema", "holds no event store"),
    "emptied": (
        "DROP SCHEMA eventsource CASCADE; CREATE SCHEMA eventsource",
        *("problem", "schema", "holds no event store"),
    ),
    "isolation": (
        "ALTER DATABASE :here SET default_transaction_isolation = serializable",
        *("problem", "server", "is serializable"),
    ),
    "read-only": (
        "ALTER DATABASE :here SET default_transaction_read_only = on",
        *("problem", "server", "read_only is on"),
    ),
    "not synchronous": (
        "ALTER ROLE :role SET synchronous_commit = off",
        *("warning", "durability", "lose the latest appends"),
    ),
    "few connections": (
        "ALTER DATABASE :here CONNECTION LIMIT 5",
        *("problem", "connections", "may open 6, and 5 are allowed"),
    ),
    "few connections of the role": (
        "ALTER ROLE :role CONNECTION LIMIT 4",
        *("problem", "connections", "may open 6, and 4 are allowed"),
    ),
    "no privilege for events": (
        "REVOKE INSERT ON es.events FROM :role",
        *("problem", "privileges", "lacks INSERT on events."),
    ),
    "no privilege for positions": (
        "REVOKE USAGE ON es.positions FROM :role",
        *("problem", "privileges", "lacks USAGE on positions."),
    ),
    "no privilege for a function": (
        "REVOKE EXECUTE ON FUNCTION es.append_event FROM :role, public",
        *("problem", "privileges", "lacks EXECUTE on append_event."),
    ),
    "no privilege for the schema": (
        "REVOKE USAGE ON SCHEMA eventsource FROM :role",
        *("problem", "privileges", "lacks USAGE on eventsource."),
    ),
    "several privileges": (
        "REVOKE UPDATE ON es.checkpoints FROM :role; REVOKE ALL ON es.migrations FROM :role",
        *("problem", "privileges", "lacks UPDATE on checkpoints, SELECT on migrations."),
    ),
    "too many privileges": (
        "GRANT UPDATE, TRUNCATE ON es.events TO :role",
        *("warning", "privileges", "it may UPDATE, TRUNCATE."),
    ),
    "owner": ("ALTER TABLE es.events OWNER TO :role", "warning", "privileges", "it owns them."),
}


@one_loop
@pytest.mark.parametrize("provocation", PROVOKED)
async def test_it_finds(site, provocation):
    statement, level, check, words = PROVOKED[provocation]
    ask(site.dsn, statement.replace(":here", site.name).replace(":role", site.role))
    diagnosis = await site.examined()
    (found,) = complaints(diagnosis)
    assert (found.level, found.check) == (level, check)
    assert words in found.text
    assert diagnosis.ok == (level == "warning")
    if found.remedy.endswith(";") and "…" not in found.remedy:
        ask(site.dsn, found.remedy)
        assert complaints(await site.examined()) == []


@one_loop
async def test_a_role_needs_no_privilege_for_the_function_of_a_trigger(site):
    ask(site.dsn, "REVOKE EXECUTE ON FUNCTION es.announced FROM public")
    assert complaints(await site.examined()) == []


@one_loop
async def test_it_finds_that_a_role_is_a_superuser(site):
    (found,) = complaints(await site.examined(site.dsn))
    assert (found.level, found.check) == ("warning", "privileges")
    assert found.text.endswith("it is a superuser.")


@one_loop
async def test_it_says_which_time_limits_there_are(site):
    for setting in ("statement_timeout = '30s'", "idle_session_timeout = '90s'"):
        ask(site.dsn, f"ALTER ROLE {site.role} SET {setting}")
    (limits,) = [one for one in (await site.examined()).findings if one.check == "time limits"]
    assert limits.text == "statement_timeout is 30 s, idle_session_timeout is 90 s"


@one_loop
@pytest.mark.parametrize(
    ("apart", "words"), [(6, "6.0 s behind ours"), (-6, "6.0 s ahead of ours"), (4, "")]
)
async def test_it_finds_that_clocks_differ(site, monkeypatch, apart, words):
    monkeypatch.setattr(doctor, "time", SimpleNamespace(time=lambda: time.time() + apart))
    found = complaints(await site.examined())
    assert [one.check for one in found] == ["clock"] * bool(words)
    assert all(one.level == "warning" and words in one.text for one in found)


@one_loop
@pytest.mark.parametrize("by", ["dsn", "login"])
async def test_it_finds_who_holds_an_append_open(site, by):
    holding = "INSERT INTO eventsource.events SELECT * FROM eventsource.events WHERE false"
    with psycopg.connect(site.dsn, application_name="night job") as session:
        session.execute(holding)
        session.execute(holding)
        found = complaints(await site.examined(getattr(site, by)), "open appends")
        pid = session.info.backend_pid
    (one,) = found
    assert one.level == "warning"
    assert f"Session {pid} (night job, role " in one.text
    # Only those who may see others' sessions are told since when.
    assert re.search(r"for (1|2) s\." if by == "dsn" else r"for a while\.", one.text)
    assert f"pg_terminate_backend({pid})" in one.remedy


@one_loop
async def test_it_says_nothing_of_appends_that_come_and_go(site, monkeypatch):
    with psycopg.connect(site.dsn) as gone, psycopg.connect(site.dsn) as held:
        holding = "INSERT INTO eventsource.events SELECT * FROM eventsource.events WHERE false"
        gone.execute(holding)
        slept: list[float] = []

        async def while_it_sleeps(seconds: float) -> None:
            slept.append(seconds)
            gone.rollback()
            held.execute(holding)

        patched = SimpleNamespace(sleep=while_it_sleeps, move_on_after=anyio.move_on_after)
        monkeypatch.setattr(doctor, "anyio", patched)
        assert complaints(await site.examined()) == []
    assert slept == [1.0]


@one_loop
async def test_it_finds_a_prepared_transaction_that_holds_an_append(site):
    with psycopg.connect(site.dsn, autocommit=True) as session:
        session.execute("BEGIN; INSERT INTO eventsource.events SELECT * FROM eventsource.events")
        session.execute("PREPARE TRANSACTION 'ledger 7'")
        try:
            (found,) = complaints(await site.examined())
        finally:
            session.execute("ROLLBACK PREPARED 'ledger 7'")
    assert (found.level, found.check) == ("warning", "open appends")
    assert re.match(r"The prepared transaction 'ledger 7' .* not committed for \d s\.", found.text)
    assert "ROLLBACK PREPARED" in found.remedy


@one_loop
async def test_it_finds_that_a_subscription_writes_the_events(site):
    publisher = site.database()
    await PostgreSQLEventStore(publisher).migrate()
    connection = publisher.replace("postgresql://", "postgres://")
    ask(
        publisher,
        "CREATE PUBLICATION events FOR TABLE es.events",
        "SELECT pg_create_logical_replication_slot('here', 'pgoutput')",
    )
    ask(
        site.dsn,
        f"CREATE SUBSCRIPTION there CONNECTION '{connection}' PUBLICATION events "
        "WITH (create_slot = false, enabled = false, slot_name = 'here')",
    )
    try:
        (found,) = complaints(await site.examined())
    finally:
        ask(site.dsn, "ALTER SUBSCRIPTION there SET (slot_name = NONE)")
        ask(site.dsn, "DROP SUBSCRIPTION there")
        ask(publisher, "SELECT pg_drop_replication_slot('here')")
    assert (found.level, found.check) == ("problem", "events")
    assert "logical subscription" in found.text


@one_loop
async def test_it_finds_another_encoding(site):
    dsn = site.database("ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'")
    found = complaints(await site.examined(dsn), "server")
    assert [one.level for one in found] == ["problem"]
    assert "LATIN1" in found[0].text
    assert "ENCODING 'UTF8'" in found[0].remedy


@one_loop
async def test_it_works_with_the_schema_of_a_newer_program(site):
    ask(
        site.dsn,
        f"INSERT INTO es.migrations VALUES ({migrations()[-1].version + 1}, 'later')",
        "CREATE OR REPLACE FUNCTION es.announced() RETURNS trigger LANGUAGE plpgsql "
        "AS 'BEGIN RETURN NEW; END'",
    )
    assert complaints(await site.examined()) == []


# -- another server -----------------------------------------------------------------------------


async def test_it_reports_that_there_is_no_server():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        dsn = f"postgresql://postgres:secret@127.0.0.1:{taken.getsockname()[1]}/postgres"
        diagnosis = await PostgreSQLEventStore(dsn).doctor()
    (found,) = diagnosis.findings
    assert (found.check, found.level) == ("server", "problem")
    assert "could not be reached" in found.text
    assert "secret" not in str(diagnosis)


def taking_its_time() -> float:
    time.sleep(0.1)
    return time.time()


@one_loop
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("ALTER DATABASE :here RENAME TO :here_", "database does not exist"),
        ("ALTER ROLE :role CONNECTION LIMIT 1", "no connection left"),
        ("ALTER ROLE :role NOLOGIN", "refused the login"),
        ("ALTER DATABASE :here SET idle_session_timeout = '1ms'", "was lost|was stopped"),
    ],
)
async def test_it_reports_that_it_cannot_connect_or_stay_so(site, monkeypatch, change, words):
    change = change.replace(":here", site.name).replace(":role", site.role)
    ask(site.server.dsn(), change)
    monkeypatch.setattr(doctor, "time", SimpleNamespace(time=taking_its_time))
    try:
        diagnosis = await site.examined()
    finally:
        if "RENAME" in change:
            ask(site.server.dsn(), f"ALTER DATABASE {site.name}_ RENAME TO {site.name}")
    assert not diagnosis.ok
    assert diagnosis.findings[-1].check == "server"
    assert re.search(words, diagnosis.findings[-1].text)


@pytest.fixture(scope="module")
def poor(strict: PostgreSQLDatabases) -> Iterator[PostgreSQLServer]:
    """A server that is short of everything."""
    settings = {"max_connections": "10", "max_locks_per_transaction": "10"}
    with PostgreSQLServer(next(iter(FOUND.values())), settings=settings) as server:
        yield server


@one_loop
async def test_it_finds_what_a_server_is_short_of(poor):
    with site_in(poor) as site:
        found = complaints(await site.examined(connections=1))
        assert {one.level for one in found} == {"warning"}
        assert {one.check for one in found} == {"durability", "locks"}
        for words in (
            *("fsync is off: ", "full_page_writes is off: ", "synchronous_commit is off: "),
            "the lock table has room for 0 processes",
        ):
            assert [one.text.startswith(words) for one in found].count(True) == 1
        # Three of the ten are for superusers, and the doctor takes two.
        (one,) = complaints(await site.examined(), "connections")
        assert one.level == "warning"
        assert re.fullmatch("a store opens 6 at most; [2-7] of the .* 7 are taken now.", one.text)
        (one,) = complaints(await site.examined(connections=7), "connections")
        assert (one.level, one.text) == ("problem", "A store may open 8, and 7 are allowed.")


@one_loop
async def test_it_finds_that_the_server_is_a_replica(poor):
    with PostgreSQLServer(next(iter(FOUND.values()))) as server, site_in(server) as site:
        server.stop()
        signal = server.directory / "data" / "standby.signal"
        signal.touch()
        signal.chmod(0o644)
        server.start()
        found = complaints(await site.examined(), *("server", "pooler", "events", "order"))
        signal.unlink()
        server.restart()
        assert complaints(await site.examined(), "server") == []
    (one,) = found
    assert (one.level, one.check) == ("problem", "server")
    assert "a replica" in one.text


@pytest.mark.parametrize(
    ("version", "supported"), [(130020, False), (140001, True), (189999, True), (190000, False)]
)
def test_it_knows_which_versions_are_supported(version, supported):
    server = Server("me", False, described(version), 1, (-1, -1), 0.0)
    found = [one for one in judged(server, 5) if one.level != "ok"]
    assert [one.check for one in found] == ([] if supported else ["server"])


def described(version: int) -> dict[str, str]:
    """The settings of a server that is fine, as far as they are looked at."""
    durable = dict.fromkeys(("fsync", "full_page_writes", "synchronous_commit"), "on")
    return {
        **durable,
        "server_version_num": str(version),
        "server_version": f"{version // 10_000}.{version % 10_000}",
        "server_encoding": "UTF8",
        "default_transaction_isolation": "read committed",
        "default_transaction_read_only": "off",
        "max_connections": "100",
        "superuser_reserved_connections": "3",
        "max_locks_per_transaction": "64",
        "max_prepared_transactions": "0",
    }


@pytest.mark.parametrize(("reserved", "enough"), [("0", True), ("91", True), ("92", False)])
def test_reserved_connections_are_not_counted(reserved, enough):
    settings = {**described(180000), "reserved_connections": reserved}
    server = Server("me", False, settings, 0, (-1, -1), 0.0)
    assert [one.level for one in judged(server, 5) if one.check == "connections"] == [
        "ok" if enough else "problem"
    ]


@pytest.mark.parametrize(("prepared", "room"), [("5", 4), ("4", 3)])
def test_prepared_transactions_have_room_for_locks_too(prepared, room):
    settings = {**described(180000), "max_connections": "11", "max_prepared_transactions": prepared}
    server = Server("me", False, settings, 0, (-1, -1), 0.0)
    (one,) = [one for one in judged(server, 5) if one.check == "locks"]
    assert f"room for {room} processes" in one.text
    assert one.level == ("ok" if room == 4 else "warning")


def test_a_batch_takes_as_many_locks_as_it_is_reckoned_with():
    assert settings._LOCKS == 2 * batch.APPENDS_AT_MOST  # of the two lanes


# -- the gap stress test ------------------------------------------------------------------------


class Stress:
    """A gap stress test that says what it is told to, and remembers how it was called."""

    def __init__(self, *, failed: bool, ok: bool, error: Exception | None = None) -> None:
        self.failed = failed
        self.ok = ok
        self.error = error
        self.calls: list[tuple[str, str]] = []

    async def __call__(self, dsn: str, /, *, schema: str) -> Stress:
        self.calls.append((dsn, schema))
        if self.error:
            raise self.error
        return self

    def __str__(self) -> str:
        return "VERDICT"


@one_loop
@pytest.mark.parametrize(
    ("stress", "level", "words"),
    [
        (Stress(failed=False, ok=True), "ok", "VERDICT"),
        (Stress(failed=False, ok=False), "warning", "VERDICT"),
        (Stress(failed=True, ok=False), "problem", "VERDICT"),
        (Stress(failed=False, ok=True, error=StorageError("denied")), "problem", "denied"),
        (Stress(failed=False, ok=True, error=RuntimeError("died")), "problem", "died"),
    ],
)
async def test_a_gap_stress_test_is_one_more_finding(site, stress, level, words):
    plain = await site.examined()
    diagnosis = await PostgreSQLEventStore(site.login).doctor(gap_stress=stress)
    *others, found = diagnosis.findings
    assert [one.check for one in others] == [one.check for one in plain.findings]
    assert (found.check, found.level) == ("gap stress", level)
    assert words in found.text
    ((dsn, schema),) = stress.calls
    assert dsn == site.login
    assert schema.startswith("eventsource_doctor_")


async def test_a_gap_stress_test_needs_a_dsn():
    engine = create_async_engine("postgresql+asyncpg://h/d")
    with pytest.raises(ValueError, match="need a DSN"):
        await PostgreSQLEventStore(engine).doctor(gap_stress=Stress(failed=False, ok=True))


# -- PgBouncer ----------------------------------------------------------------------------------


@contextmanager
def pgbouncer(
    server: PostgreSQLDatabases, mode: str, size: int = 4
) -> Iterator[PostgreSQLDatabases]:
    """A pooler in front of a server."""
    assert PGBOUNCER is not None
    behind = urlsplit(server.dsn())
    options = {
        "host": behind.hostname or "127.0.0.1",
        "port": behind.port or 5432,
        "user": behind.username or "postgres",
        "password": unquote(behind.password or "none"),
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory, "ini")
        config.write_text(
            f"[databases]\n* = {' '.join(f'{name}={options[name]}' for name in options)}"
            f"\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
            f"auth_type = any\npool_mode = {mode}\ndefault_pool_size = {size}\n",
            encoding="utf-8",
        )
        as_nobody: dict[str, Any] = {}
        if os.geteuid() == 0:  # as whom it refuses to run
            Path(directory).chmod(0o755)
            as_nobody = {"user": "nobody", "group": "nogroup", "extra_groups": []}
        process = subprocess.Popen(
            [PGBOUNCER, "-q", config], stderr=subprocess.DEVNULL, **as_nobody
        )
        try:
            deadline = time.monotonic() + 10
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except OSError:
                    assert process.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
            yield PostgreSQLDatabases(f"postgresql://{options['user']}@127.0.0.1:{port}/postgres")
        finally:
            process.terminate()
            process.wait()


def pooler(mode: str, size: int = 4) -> Any:
    @pytest.fixture(scope="module")
    def made(postgresql_server: PostgreSQLDatabases) -> Iterator[PostgreSQLDatabases]:
        if PGBOUNCER is None:
            reason = "pgbouncer is not installed; Debian has it: apt-get install pgbouncer"
            if os.environ.get("CI"):
                pytest.fail(reason, pytrace=False)
            pytest.skip(reason)
        with pgbouncer(postgresql_server, mode, size) as made:
            yield made

    return made


by_transaction = pooler("transaction")
by_session = pooler("session")
by_turns = pooler("transaction", 1)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notification that does not come is not waited for as long."""
    monkeypatch.setattr(doctor, "_PATIENCE", 0.7)


@pytest.fixture
async def migrated(postgresql_dsn: str, anyio_backend: object) -> str:
    """The name of a database with a store in it."""
    await PostgreSQLEventStore(postgresql_dsn).migrate()
    return postgresql_dsn.rpartition("/")[2]


def engine_by(pooler: PostgreSQLDatabases, database: str) -> AsyncEngine:
    """As the doctor says."""
    dsn = pooler.dsn(database).replace("postgresql://", "postgresql+asyncpg://")
    return create_async_engine(dsn, connect_args={"statement_cache_size": 0})


@pytest.mark.parametrize("driver", DRIVERS)
async def test_the_doctor_finds_a_pooler_by_transaction(by_transaction, migrated, driver):
    dsn = by_transaction.dsn(migrated)
    store = PostgreSQLEventStore(dsn, poll_every=0.25, driver=driver)
    for _ in range(2):  # the second time there are statements with its names
        diagnosis = await store.doctor()
        assert "is complete" in str(diagnosis)
        found = complaints(diagnosis, "pooler")
        assert [one.level for one in found] == ["problem", "warning"]
        assert "statement_cache_size" in found[0].remedy
        assert "max_prepared_statements" in found[0].remedy
        assert "every 0.25 s" in found[1].text


@one_loop
async def test_the_doctor_sees_through_a_pooler_what_it_sees_without(
    postgresql_dsn, by_transaction, migrated
):
    straight = await PostgreSQLEventStore(postgresql_dsn).doctor()
    for _ in range(3):
        through = await PostgreSQLEventStore(by_transaction.dsn(migrated)).doctor()
        for diagnosis in (straight, through):
            assert "is complete" in str(diagnosis)
        assert [(one.check, one.level) for one in through.findings if one.check != "pooler"] == [
            (one.check, one.level) for one in straight.findings if one.check != "pooler"
        ]


@one_loop
async def test_the_doctor_finds_nothing_wrong_with_a_pooler_by_session(by_session, migrated):
    store = PostgreSQLEventStore(by_session.dsn(migrated))
    assert complaints(await store.doctor(), "pooler") == []


@one_loop
async def test_the_doctor_finds_a_pooler_of_one_session(by_turns, migrated):
    store = PostgreSQLEventStore(by_turns.dsn(migrated))
    diagnosis = await store.doctor()
    assert "warning" in [one.level for one in diagnosis.findings if one.check == "pooler"]
    assert "is complete" in str(diagnosis)


async def test_the_doctor_is_content_with_what_it_advised(by_transaction, migrated):
    store = PostgreSQLEventStore(engine_by(by_transaction, migrated))
    (found,) = complaints(await store.doctor(), "pooler")
    assert found.level == "warning"
    assert "gives every transaction another session" in found.text


async def test_a_store_works_through_a_pooler_by_transaction(
    by_transaction, postgresql_dsn, migrated
):
    """With the remedy of the doctor, but for notifications, it is as if there were none."""
    engine = engine_by(by_transaction, migrated)
    async with PostgreSQLEventStore(engine, poll_every=0.2) as store:
        async with anyio.create_task_group() as tasks:
            for number in range(100):
                tasks.start_soon(append_numbers, store, 1 + number % 3, f"{number % 40}")
        read = [event async for event in store.read_all()]
        assert len(read) == 199
        assert sorted({event.position for event in read}) == [event.position for event in read]

        async def with_sql(number: int) -> None:
            for turn in range(5):
                async with store.transaction() as tx:
                    for value in (turn, f"{number}"):
                        asked = text(f"SELECT CAST(:value AS {type(value).__name__[:3]}4)")
                        if isinstance(value, str):
                            asked = text("SELECT CAST(:value AS text)")
                        assert (await tx.execute(asked, {"value": value})).scalar() == value
                    await tx.append_events(f"sql {number}", "Thing", [Happened(turn)], turn)
                    await tx.checkpoints.save(f"{number}", turn)

        async with anyio.create_task_group() as tasks:
            for number in range(10):
                tasks.start_soon(with_sql, number)
        async with store.transaction() as tx:
            await tx.append_events("steps", "Thing", [Happened(0)], NO_STREAM)
            await tx.checkpoints.save("0", 9, expected=4)
        assert numbers(await store.get_events("sql 9")) == [0, 1, 2, 3, 4]
        assert await store.checkpoints.get("0") == 9

        # Another process appends: it can only be found by looking.
        async with store.subscribe(after=await store.last_position()) as events:
            async with PostgreSQLEventStore(postgresql_dsn) as other:
                for number in range(3):
                    await append_numbers(other, 1, f"other {number}")
                    with anyio.fail_after(5):
                        assert (await anext(events)).aggregate_id == f"other {number}"
        await store.guest.run(engine.dispose())
