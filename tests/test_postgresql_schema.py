"""The schema of the PostgreSQL store: where it is, who makes it and who may use it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import anyio
import asyncpg  # type: ignore[import-untyped]
import psycopg
import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from psycopg.rows import dict_row

from eventsource_anyio import NO_STREAM, OutboxMessage, StorageError
from eventsource_anyio.stores.postgresql import PostgreSQLEventStore, metadata, migration_sql
from eventsource_anyio.stores.postgresql.schema import Schema, migrations
from eventsource_anyio.testing.postgresql import (
    PostgreSQLDatabases,
    PostgreSQLServer,
    postgresql_binaries,
)
from eventsource_anyio.testing.samples import Happened, append_numbers, numbers

FOUND = {} if os.environ.get("EVENTSOURCE_POSTGRESQL_DSN") else postgresql_binaries()
NEWEST = migrations()[-1].version
NAMES: tuple[dict[str, Any], ...] = (
    {},
    {"schema": "Other"},
    {"schema": "public", "prefix": "es_"},
    {"schema": "es_s"},
)

one_loop = pytest.mark.parametrize("anyio_backend", ["asyncio"])
everywhere = pytest.mark.parametrize("names", NAMES, ids=["default", "named", "public", "es"])


def ask(dsn: str, *statements: str) -> list[tuple[Any, ...]]:
    """The rows of the last statement."""
    with psycopg.connect(dsn, autocommit=True) as session:
        for statement in statements:
            answer = session.execute(statement.encode())
        return answer.fetchall() if answer.description else []


def catalog(dsn: str, schema: str = "eventsource", *, tables: bool = False) -> dict[str, Any]:
    """All there is in a schema, or only its tables and sequences, but not who it belongs to."""
    here = "FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace AND nspname = %(schema)s"
    kinds = {
        "columns": f"SELECT relname, attname, format_type(atttypid, atttypmod) AS type, attnotnull,"
        " attidentity, (SELECT collname FROM pg_collation o WHERE o.oid = attcollation),"
        f" pg_get_expr(adbin, adrelid) AS value {here} JOIN pg_attribute ON attrelid = c.oid"
        " AND attnum > 0 AND relkind = 'r' LEFT JOIN pg_attrdef ON adrelid = c.oid"
        " AND adnum = attnum",
        "constraints": f"SELECT relname, conname, pg_get_constraintdef(o.oid) AS is {here}"
        " JOIN pg_constraint o ON conrelid = c.oid AND contype <> 'n'",
        "indexes": f"SELECT pg_get_indexdef(indexrelid) AS is {here} JOIN pg_index ON indrelid"
        " = c.oid",
        "sequences": f"SELECT relname, seqtypid::regtype::text, seqstart, seqincrement, seqmax,"
        f" seqmin, seqcache, seqcycle {here} JOIN pg_sequence ON seqrelid = c.oid",
        "options": f"SELECT relname, relkind, relpersistence, reloptions {here}",
    }
    if not tables:
        kinds |= {
            "compression": f"SELECT relname, attname, attcompression {here}"
            " JOIN pg_attribute ON attrelid = c.oid AND attcompression <> ''",
            "owned": f"SELECT relname, refobjid::regclass::text, refobjsubid, deptype {here}"
            " JOIN pg_depend ON objid = c.oid AND classid = 1259 AND refobjsubid > 0",
            "functions": "SELECT pg_get_functiondef(p.oid) AS is FROM pg_proc p"
            " JOIN pg_namespace n ON n.oid = pronamespace AND nspname = %(schema)s",
            "triggers": f"SELECT pg_get_triggerdef(t.oid), tgenabled {here}"
            " JOIN pg_trigger t ON tgrelid = c.oid",
        }
    with psycopg.connect(dsn, row_factory=dict_row) as session:
        return {
            kind: sorted(map(str, session.execute(query.encode(), {"schema": schema})))
            for kind, query in kinds.items()
        }


async def use(store: PostgreSQLEventStore) -> None:
    """Everything that an application does with a store."""
    async with store:
        async with store.subscribe() as events:
            await append_numbers(store, 3)
            await store.append_events("a", "Thing", [Happened(3)], 3)
            assert [(await anext(events)).version for _ in range(4)] == [1, 2, 3, 4]
        async with store.transaction() as tx:
            await tx.append_events("a", "Thing", [Happened(4)], 4)
            await tx.append_events("b", "Thing", [Happened(0)], NO_STREAM)
            await tx.checkpoints.save("reader", 1)
            await tx.outbox.add(OutboxMessage("topic", b"payload"))
            revision = await tx.documents.add("c", "a", 1)
        async with store.transaction() as tx:
            await tx.execute(sqlalchemy.text("SELECT 1"))
            await tx.append_events("a", "Thing", [Happened(5)], 5)
            await tx.checkpoints.save("reader", 2, expected=1)
            await tx.documents.save("c", "a", {"b": 2}, expected=revision)
        assert numbers(await store.get_events("a")) == [0, 1, 2, 3, 4, 5]
        assert [event.aggregate_id async for event in store.read_all()].count("b") == 1
        assert await store.last_position() >= 7
        assert await store.checkpoints.get("reader") == 2
        (stored,) = await store.outbox.pending()
        await store.outbox.delivered([stored.message.message_id])
        (document,) = await store.documents.list("c")
        assert document.value == {"b": 2}
        await store.documents.delete("c", "a", expected=document.revision)


class Cluster:
    """Databases and roles in a server, which are gone at the end."""

    def __init__(self, server: PostgreSQLDatabases, stack: ExitStack) -> None:
        self.server = server
        self._databases = stack.enter_context(ExitStack())
        self._stack = stack

    def database(self, options: str = "") -> str:
        if not options:
            dsn = self.server.create_database()
        else:
            name = f"eventsource_{secrets.token_hex(8)}"
            ask(self.server.dsn(), f"CREATE DATABASE {name} TEMPLATE template0 {options}")
            dsn = self.server.dsn(name)
        self._databases.callback(self.server.drop_database, dsn)
        return dsn

    def role(self, name: str, options: str = "LOGIN") -> str:
        name = f"{name}{secrets.token_hex(4)}"
        ask(self.server.dsn(), f"CREATE ROLE \"{name}\" PASSWORD 'secret' {options}")
        self._stack.callback(ask, self.server.dsn(), f'DROP ROLE "{name}"')
        return name

    def login(self, dsn: str, role: str) -> str:
        return self.server.dsn(dsn.rpartition("/")[2], role, "secret")


@pytest.fixture
def cluster(postgresql_server: PostgreSQLDatabases) -> Iterator[Cluster]:
    with ExitStack() as stack:
        made = Cluster(postgresql_server, stack)
        with made._databases:
            yield made


# -- making it ----------------------------------------------------------------------------------


async def test_migrating_again_changes_nothing(postgresql_dsn):
    store = PostgreSQLEventStore(postgresql_dsn)
    await store.migrate()
    there = catalog(postgresql_dsn), ask(postgresql_dsn, "TABLE eventsource.migrations")
    await store.migrate()
    async with store:
        await store.migrate()
    assert (catalog(postgresql_dsn), ask(postgresql_dsn, "TABLE eventsource.migrations")) == there
    assert len(there[1]) == len(migrations())


@pytest.mark.parametrize("isolation", ["read committed", "serializable"])
async def test_several_migrate_at_once(postgresql_dsn, isolation):
    database = postgresql_dsn.rpartition("/")[2]
    ask(
        postgresql_dsn,
        f"ALTER DATABASE {database} SET default_transaction_isolation = '{isolation}'",
    )
    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(PostgreSQLEventStore(postgresql_dsn).migrate)
    versions = ask(postgresql_dsn, "SELECT version FROM eventsource.migrations ORDER BY 1")
    assert versions == [(migration.version,) for migration in migrations()]


@one_loop
@everywhere
async def test_a_store_works_wherever_its_schema_is(postgresql_dsn, names):
    store = PostgreSQLEventStore(postgresql_dsn, **names)
    await store.migrate()
    await use(store)
    schemas = "SELECT nspname FROM pg_namespace WHERE nspname !~ '^(pg_|information_schema)'"
    schema = names.get("schema", "eventsource")
    assert {name for (name,) in ask(postgresql_dsn, schemas)} == {"public", schema}


@one_loop
async def test_prefixes_keep_stores_in_one_schema_apart(postgresql_dsn):
    one = PostgreSQLEventStore(postgresql_dsn, schema="shared", prefix="one_")
    two = PostgreSQLEventStore(postgresql_dsn, schema="shared", prefix="two_")
    await one.migrate()
    with pytest.raises(StorageError, match="'shared' holds no event store"):
        await two.__aenter__()
    await two.migrate()
    await use(one)
    async with two:
        assert await two.last_position() == 0
        assert await two.checkpoints.get("reader") == 0
        assert not await two.get_events("a")
    await use(two)
    with psycopg.connect(postgresql_dsn) as session:  # which appends to one, and does not end
        session.execute("INSERT INTO shared.one_events SELECT * FROM shared.one_events WHERE false")
        async with one, two:
            for store, seen in ((one, 0), (two, 1)):
                before = await store.last_position()
                await append_numbers(store, 1, "c")
                assert (await store.last_position() > before) == seen


@one_loop
@everywhere
@pytest.mark.parametrize("role", ["", "es_app", "it's my-es_app es.x"])
async def test_the_sql_that_is_printed_makes_the_same_schema(cluster, names, role):
    printed, made = cluster.database(), cluster.database()
    role = cluster.role(role) if role else None
    connection = await asyncpg.connect(printed)
    try:
        await connection.execute(migration_sql(**names, role=role))
        await connection.execute(migration_sql(**names, role=role, after=NEWEST))
    finally:
        await connection.close()
    await PostgreSQLEventStore(made, **names).migrate(role=role)
    schema = names.get("schema", "eventsource")
    assert catalog(printed, schema) == catalog(made, schema)
    granted = (
        "SELECT relname, relacl::text FROM pg_class WHERE relacl IS NOT NULL "
        "AND relnamespace = 'pg_catalog'::regnamespace IS FALSE ORDER BY 1"
    )
    assert ask(printed, granted) == ask(made, granted)


@one_loop
@pytest.mark.parametrize("version", [migration.version for migration in migrations()[:-1]])
async def test_a_store_of_an_older_version_is_upgraded_with_what_is_in_it(cluster, version):
    dsn, fresh = cluster.database(), cluster.database()
    older = [migration for migration in migrations() if migration.version <= version]
    ask(dsn, Schema().beginning(), *map(Schema().step, older))
    ask(
        dsn,
        "INSERT INTO eventsource.events (version, recorded_at, event_id, schema_version, "
        "event_type, aggregate_type, aggregate_id, payload) VALUES (1, now(), gen_random_uuid(), "
        f"1, '{Happened.event_type}', 'Thing', 'a', '{{\"number\":7}}')",
    )
    store = PostgreSQLEventStore(dsn)
    with pytest.raises(
        StorageError, match=f"is at version {version}, .* version {NEWEST}"
    ) as error:
        await store.__aenter__()
    assert "Run `await store.migrate()`" in str(error.value)
    await store.migrate()
    await PostgreSQLEventStore(fresh).migrate()
    assert catalog(dsn) == catalog(fresh)
    async with store:
        await append_numbers(store, 1)
        await store.checkpoints.save("reader", 1)
        await store.documents.add("c", "a", 1)
        assert numbers(await store.get_events("a")) == [7, 0]


@one_loop
async def test_a_program_works_with_the_schema_of_a_newer_one(postgresql_dsn):
    store = PostgreSQLEventStore(postgresql_dsn)
    await store.migrate()
    ask(postgresql_dsn, f"INSERT INTO eventsource.migrations VALUES ({NEWEST + 1}, 'later')")
    await store.migrate()
    await use(store)


# -- the privileges of an application -----------------------------------------------------------


@one_loop
@everywhere
@pytest.mark.parametrize("hardened", [False, True], ids=["", "hardened"])
async def test_a_role_can_do_what_it_needs_and_no_more(cluster, names, hardened):
    dsn = cluster.database()
    owner, role = cluster.role("owner_"), cluster.role("es_app_")
    ask(dsn, f'GRANT CREATE ON DATABASE "{dsn.rpartition("/")[2]}" TO {owner}')
    ask(dsn, f"GRANT CREATE ON SCHEMA public TO {owner}")
    if hardened:
        ask(
            dsn,
            "REVOKE ALL ON SCHEMA public FROM public",
            f"GRANT USAGE ON SCHEMA public TO {owner} WITH GRANT OPTION",
            f"ALTER DEFAULT PRIVILEGES FOR ROLE {owner} REVOKE EXECUTE ON FUNCTIONS FROM public",
        )
    await PostgreSQLEventStore(cluster.login(dsn, owner), **names).migrate(role=role)
    store = PostgreSQLEventStore(cluster.login(dsn, role), **names)
    await use(store)
    schema = Schema(names.get("schema", "eventsource"), names.get("prefix", ""))
    for statement in (
        "UPDATE es.events SET payload = ''",
        "DELETE FROM es.events",
        "TRUNCATE es.events",
        "DELETE FROM es.checkpoints",
        "TRUNCATE es.documents",
        "UPDATE es.outbox SET topic = ''",
        "DELETE FROM es.migrations",
        "SELECT setval('es.positions', 1)",
        "ALTER TABLE es.events DISABLE TRIGGER announce",
        "DROP TRIGGER announce ON es.events",
        "DROP FUNCTION es.safe_position",
        "ALTER SEQUENCE es.positions CACHE 20",
        "CREATE INDEX ON es.events (recorded_at)",
        "CREATE TABLE es.mine (a int)",
        "DROP TABLE es.outbox",
        f'DROP SCHEMA "{schema.name}" CASCADE',
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            ask(cluster.login(dsn, role), schema.sql(statement))
    with pytest.raises(StorageError, match="the role may not do this"):
        await store.migrate(role=role)
    await use_again(store)


async def use_again(store: PostgreSQLEventStore) -> None:
    async with store:
        assert len(await store.get_events("a")) == 6


@one_loop
async def test_what_a_role_lacks_is_said_with_its_remedy(cluster):
    dsn, role = cluster.database(), cluster.role("app_")
    await PostgreSQLEventStore(dsn).migrate()
    store = PostgreSQLEventStore(cluster.login(dsn, role))
    with pytest.raises(StorageError, match="permission denied") as error:
        await store.__aenter__()
    assert "`await store.migrate(role=…)`" in str(error.value)


# -- what cannot be used ------------------------------------------------------------------------


async def test_where_there_is_no_schema_the_error_says_how_to_make_it(postgresql_dsn):
    store = PostgreSQLEventStore(postgresql_dsn, schema="nowhere")
    with pytest.raises(StorageError, match="'nowhere' holds no event store") as error:
        await store.__aenter__()
    assert "Run `await store.migrate()`" in str(error.value)


@one_loop
@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
async def test_a_database_of_another_encoding_is_refused(cluster, encoding):
    dsn = cluster.database(f"ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C'")
    with pytest.raises(StorageError, match=f"encoding is {encoding}") as error:
        await PostgreSQLEventStore(dsn).__aenter__()
    assert "ENCODING 'UTF8' TEMPLATE template0" in str(error.value)


@pytest.mark.parametrize("name", ["", "9", "a b", 'a"b', "a.b", "a-b", "ä", "a" * 41, None, 1])
def test_bad_names_are_refused(name):
    for call in (migration_sql, metadata):
        with pytest.raises(ValueError, match="a schema is named by"):
            call(schema=name)
        if name != "":
            with pytest.raises(ValueError, match="a schema is named by"):
                call(prefix=name)
    with pytest.raises(ValueError, match="a schema is named by"):
        PostgreSQLEventStore("postgresql://h/d", schema=name)


@pytest.mark.parametrize("role", ["", 'a"b', "a\0", "r" * 64, 1])
def test_bad_roles_are_refused(role):
    with pytest.raises(ValueError, match="role must be the name of a role"):
        migration_sql(role=role)


# -- every version ------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=sorted(FOUND) or [0], ids=str)
def server(request: pytest.FixtureRequest) -> Iterator[PostgreSQLDatabases]:
    if not request.param:
        yield request.getfixturevalue("postgresql_server")
        return
    with PostgreSQLServer(FOUND[request.param]) as server:
        yield server


@pytest.fixture
def dsn(server: PostgreSQLDatabases) -> Iterator[str]:
    dsn = server.create_database()
    yield dsn
    server.drop_database(dsn)


@one_loop
async def test_a_store_works_on_every_version(dsn):
    store = PostgreSQLEventStore(dsn)
    await store.migrate()
    await use(store)


def differences(dsn: str, *statements: str, **names: str) -> list[str]:
    """What Alembic finds between the database, changed by the statements, and the metadata."""
    engine = sqlalchemy.create_engine(dsn.replace("postgresql://", "postgresql+psycopg://"))
    schemas = (names.get("schema", "eventsource"), None)
    options = {
        "include_schemas": True,
        "include_name": lambda name, kind, _: kind != "schema" or name in schemas,
        "compare_type": True,
        "compare_server_default": True,
    }
    try:
        with engine.connect() as connection:
            for statement in statements:
                connection.execute(sqlalchemy.text(statement))
            context = MigrationContext.configure(connection, opts=options)
            found = compare_metadata(context, metadata(**names))
    finally:
        engine.dispose()
    return [one[0][0] if isinstance(one, list) else one[0] for one in found]


@one_loop
@everywhere
async def test_alembic_finds_no_difference(dsn, names):
    await PostgreSQLEventStore(dsn, **names).migrate()
    assert differences(dsn, **names) == []


CHANGES = {
    "ALTER TABLE es.events ALTER payload TYPE bytea USING payload::bytea": "modify_type",
    "ALTER TABLE es.events ALTER event_type TYPE varchar(20)": "modify_type",
    "ALTER TABLE es.migrations ALTER applied_at TYPE timestamp": "modify_type",
    "ALTER TABLE es.documents ALTER value TYPE text": "modify_type",
    "ALTER TABLE es.events ADD mine int": "remove_column",
    "ALTER TABLE es.outbox DROP key": "add_column",
    "ALTER TABLE es.events ALTER metadata SET NOT NULL": "modify_nullable",
    "ALTER TABLE es.checkpoints ADD UNIQUE (position)": "remove_constraint",
    "ALTER TABLE es.events DROP CONSTRAINT es_events_version": "add_constraint",
    "DROP INDEX eventsource.events_event_type": "add_index",
    "CREATE INDEX ON es.outbox (topic)": "remove_index",
    "ALTER TABLE es.outbox ALTER recorded_at DROP DEFAULT": "modify_default",
    "ALTER TABLE es.outbox ALTER position DROP IDENTITY": "modify_default",
    "DROP TABLE es.checkpoints": "add_table",
}


@one_loop
async def test_alembic_finds_what_was_changed(dsn):
    await PostgreSQLEventStore(dsn).migrate()
    found = {change: differences(dsn, Schema().sql(change)) for change in CHANGES}
    assert found == {change: [expected] for change, expected in CHANGES.items()}


@one_loop
@everywhere
async def test_sqlalchemy_makes_the_same_tables(server, dsn, names):
    """Alembic does not compare collations, primary keys, sequences and options; this does."""
    await PostgreSQLEventStore(dsn, **names).migrate()
    schema = names.get("schema", "eventsource")
    other = server.create_database()
    try:
        engine = sqlalchemy.create_engine(other.replace("postgresql://", "postgresql+psycopg://"))
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text(f'CREATE SCHEMA IF NOT EXISTS "{schema}"'))
            metadata(**names).create_all(connection)
        engine.dispose()
        assert catalog(other, schema, tables=True) == catalog(dsn, schema, tables=True)
    finally:
        server.drop_database(other)
