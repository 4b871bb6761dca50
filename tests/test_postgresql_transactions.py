"""Transactions with the user's own SQL in them, and those inside the user's own transaction."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from typing import Any, Literal, TypeAlias

import anyio
import psycopg
import pytest
from anyio.lowlevel import current_token
from sqlalchemy import ForeignKey, create_engine, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from eventsource_anyio import (
    ANY,
    NO_STREAM,
    CheckpointConflictError,
    ConcurrencyError,
    DuplicateEventError,
    EventSourceError,
    NewEvent,
    OutboxMessage,
    StorageError,
    StoredEvent,
)
from eventsource_anyio.guest import Guest
from eventsource_anyio.stores.postgresql import (
    PostgreSQLEventStore,
    PostgreSQLTransaction,
    migration_sql,
)
from eventsource_anyio.testing import cancel_at_every_checkpoint
from eventsource_anyio.testing.postgresql import (
    PostgreSQLDatabases,
    PostgreSQLServer,
    postgresql_binaries,
)
from eventsource_anyio.testing.samples import Ended, Happened, append_numbers
from tests.every_store import DRIVERS

CONNECTIONS = 5  # what a store has by default
APPEND = (
    "SELECT eventsource.append_event('Thing', '{}', -1, gen_random_uuid(), "
    "'eventsource_anyio.testing.Ended', 1, NULL, NULL, '{{}}')"
)


class Base(DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "author"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    books: Mapped[list[Book]] = relationship(back_populates="author", order_by="Book.id")


class Book(Base):
    __tablename__ = "book"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    author_id: Mapped[int] = mapped_column(
        ForeignKey("author.id", deferrable=True, initially="DEFERRED")
    )
    author: Mapped[Author] = relationship(back_populates="books")


class Database:
    """A database with a store's tables and the user's own, looked at from outside."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.sessions = ExitStack()
        self._session = self.connect(autocommit=True)

    def connect(self, **options: Any) -> psycopg.Connection:
        session = psycopg.connect(self.dsn, **options)
        self.sessions.callback(session.close)
        return session

    def ask(self, statement: str, *values: object) -> Any:
        row = self._session.execute(statement.encode(), values).fetchone()
        return row and row[0]

    def run(self, script: str) -> None:
        self._session.execute(script.encode())

    def found(self, name: str) -> tuple[int, ...]:
        """How much of what `write` writes is there: authors, books, events and the others."""
        counted = (
            "SELECT (SELECT count(*) FROM author WHERE name LIKE %(some)s), (SELECT count(*) "
            "FROM book JOIN author a ON a.id = author_id WHERE a.name LIKE %(some)s), "
            "(SELECT count(*) FROM eventsource.events WHERE aggregate_id LIKE %(some)s), "
            "(SELECT count(*) FROM eventsource.checkpoints c "
            "WHERE c.name = %(name)s AND position = 7), "
            "(SELECT count(*) FROM eventsource.outbox WHERE topic = %(name)s)"
        )
        values = {"some": f"{name} %", "name": name}
        row = self._session.execute(counted.encode(), values).fetchone()
        assert row is not None
        return row

    def events(self, aggregate_id: str) -> int:
        events = "SELECT count(*) FROM eventsource.events WHERE aggregate_id = %s"
        return int(self.ask(events, aggregate_id))

    def at_work(self) -> int:
        """The connections of others that are running something or have a transaction open."""
        return int(
            self.ask(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                "AND backend_type = 'client backend' AND state <> 'idle' "
                "AND pid <> pg_backend_pid()"
            )
        )

    def waiting(self) -> int:
        """The connections that wait for an advisory lock: for a stream that another one holds."""
        return int(
            self.ask(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                "AND wait_event_type = 'Lock' AND wait_event = 'advisory'"
            )
        )


EVERYTHING = (3, 2, 3, 1, 1)
NOTHING = (0, 0, 0, 0, 0)


async def write(tx: PostgreSQLTransaction, name: str) -> None:
    """Core, text, the ORM, appends, a checkpoint and a message."""
    await tx.execute(insert(Author.__table__), [{"name": f"{name} core"}])  # type: ignore[arg-type]
    await tx.execute(text("INSERT INTO author (name) VALUES (:name)"), {"name": f"{name} text"})
    await tx.append_events(f"{name} a", "Thing", [Happened(1), Happened(2)], NO_STREAM)
    assert await tx.run_sync(publish, f"{name} orm", "one", title="two") == ["one", "two"]
    await tx.checkpoints.save(name, 7, expected=0)
    await tx.append_events(f"{name} b", "Thing", [Ended()], NO_STREAM)
    await tx.outbox.add(OutboxMessage(name, b""))


def publish(session: Session, name: str, *titles: str, title: str) -> list[str]:
    session.add(Author(name=name, books=[Book(title=one) for one in (*titles, title)]))
    session.flush()
    session.expire_all()
    author = session.scalars(select(Author).where(Author.name == name)).one()
    return [book.title for book in author.books]  # loaded here


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(20):
        while not condition():  # noqa: ASYNC110  (what is asked knows of no event)
            await anyio.sleep(0.001)


@pytest.fixture(scope="session")
def template(postgresql_server: PostgreSQLDatabases) -> Iterator[str]:
    """The name of a database that has everything and to which nobody is connected."""
    dsn = postgresql_server.create_database()
    make_tables(dsn)
    yield dsn.partition("?")[0].rpartition("/")[2]
    postgresql_server.drop_database(dsn)


def make_tables(dsn: str) -> None:
    engine = create_engine(dsn.replace("postgresql://", "postgresql+psycopg://", 1))
    Base.metadata.create_all(engine)
    engine.dispose()
    with psycopg.connect(dsn, autocommit=True) as session:
        session.execute(migration_sql().encode())


@pytest.fixture
def database(postgresql_server: PostgreSQLDatabases, template: str) -> Iterator[Database]:
    dsn = postgresql_server.create_database(template)
    database = Database(dsn)
    with database.sessions:
        yield database
    postgresql_server.drop_database(dsn)


@pytest.fixture(params=DRIVERS)
async def store(
    request: pytest.FixtureRequest, database: Database
) -> AsyncIterator[PostgreSQLEventStore]:
    async with PostgreSQLEventStore(database.dsn, driver=request.param) as store:
        yield store


def engine_for(database: Database, **options: Any) -> AsyncEngine:
    return create_async_engine(
        database.dsn.replace("postgresql://", "postgresql+asyncpg://", 1), **options
    )


@pytest.fixture
async def engine(store: PostgreSQLEventStore, database: Database) -> AsyncIterator[AsyncEngine]:
    """The user's own engine, which on Trio runs in the store's guest."""
    engine = engine_for(database)
    yield engine
    await store.guest.run(engine.dispose())


Target: TypeAlias = AsyncSession | AsyncConnection
Begin: TypeAlias = Callable[[], AbstractAsyncContextManager[Target]]


@pytest.fixture(params=["session", "connection"])
def begin(
    request: pytest.FixtureRequest, store: PostgreSQLEventStore, engine: AsyncEngine
) -> Begin:
    """Begins a transaction of the user, which is rolled back unless it is committed."""

    @asynccontextmanager
    async def begin() -> AsyncIterator[Target]:
        target = AsyncSession(engine) if request.param == "session" else engine.connect()
        if isinstance(target, AsyncConnection):
            await store.guest.run(started(target))
        try:
            yield target
        finally:
            with anyio.CancelScope(shield=True):
                await store.guest.run(target.close())

    return begin


async def started(connection: AsyncConnection) -> None:
    await connection.start()


async def assert_usable(store: PostgreSQLEventStore, database: Database) -> None:
    """Nothing is left open, and there are as many connections as ever, for all kinds of use."""
    await until(lambda: database.at_work() == 0)

    async def transact(number: int) -> None:
        async with store.transaction() as tx:
            await tx.execute(text("SELECT 1"))
            await tx.append_events(f"usable {number}", "Thing", [Ended()], ANY)
        async with store.transaction() as tx:
            await tx.append_events(f"usable {number}", "Thing", [Ended()], ANY)
            await tx.checkpoints.save(f"usable {number}", 1)
        await store.get_events(f"usable {number}", "Thing")

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            for number in range(3 * CONNECTIONS):
                tasks.start_soon(transact, number)
    assert database.at_work() == 0


# -- all together, or nothing -----------------------------------------------------------------


@pytest.mark.parametrize("way", ["dsn", "engine", "shared"])
async def test_everything_of_a_transaction_is_committed_together(database: Database, way: str):
    engine = engine_for(database)
    async with Guest() as guest:
        given: str | AsyncEngine = database.dsn if way == "dsn" else engine
        shared = guest if way == "shared" else None
        async with PostgreSQLEventStore(given, guest=shared) as store:
            assert (store.guest is guest) == (way == "shared")
            async with store.transaction() as tx:
                await write(tx, "all")
                assert database.found("all") == NOTHING
            assert database.found("all") == EVERYTHING
            assert [(one.version, len(one.events)) for one in tx.results] == [(2, 2), (1, 1)]
            assert [stored.position for one in tx.results for stored in one.events] == [1, 2, 3]
            assert [stored async for stored in store.read_all()] == [
                stored for one in tx.results for stored in one.events
            ]
            if way == "shared":
                await store.guest.run(select_one(engine))
                async with PostgreSQLEventStore(engine, guest=guest) as another:
                    async with another.transaction() as tx:
                        await write(tx, "another")
                assert database.found("another") == EVERYTHING
            await assert_usable(store, database)
            await store.guest.run(engine.dispose())


async def select_one(engine: AsyncEngine) -> None:
    """The user's own use of an engine, as SQLAlchemy's manual has it."""
    async with engine.connect() as connection:
        assert await connection.scalar(text("SELECT 1")) == 1


async def test_the_session_is_sqlalchemys_own(store: PostgreSQLEventStore, database: Database):
    async with store.transaction() as tx:
        tx.session.add(Author(name="own orm"))
        await tx.append_events("own a", "Thing", [Ended()], NO_STREAM)
        asked = tx.session.scalars(select(Author))
        (author,) = await (asked if is_asyncio() else store.guest.run(asked))
        author.name = "own name"
        assert database.found("own") == NOTHING
    assert author.name == "own name"  # nothing is expired by the commit
    assert database.ask("SELECT name FROM author") == "own name"
    assert database.found("own") == (1, 0, 1, 0, 0)


def is_asyncio() -> bool:
    return isinstance(current_token().native_token, asyncio.AbstractEventLoop)


async def test_sql_without_an_append_and_an_append_without_sql(
    store: PostgreSQLEventStore, database: Database
):
    async with store.transaction() as tx:
        result = await tx.execute(insert(Author).returning(Author.name), {"name": "sql core"})
        assert result.scalars().all() == ["sql core"]
    assert tx.results == ()
    async with store.transaction() as tx:
        assert not tx.session.new
        await tx.append_events("sql a", "Thing", [Ended()], NO_STREAM)
    assert [one.position for one in tx.results] == [1]
    async with store.transaction() as tx:
        assert tx.session.in_transaction() is False
    assert database.found("sql") == (1, 0, 1, 0, 0)
    with pytest.raises(RuntimeError, match="inside its block"):
        await tx.execute(text("SELECT 1"))
    with pytest.raises(RuntimeError, match="inside its block"):
        await tx.run_sync(publish, "late", title="one")
    assert database.at_work() == 0


FAILURES: dict[str, type[Exception]] = {
    "own": KeyError,
    "statement": IntegrityError,
    "flush": IntegrityError,
    "deferred": IntegrityError,
    "syntax": DBAPIError,
    "version": ConcurrencyError,
    "checkpoint": CheckpointConflictError,
    "event id": DuplicateEventError,
    "event id elsewhere": DuplicateEventError,
    "event id twice": DuplicateEventError,
}


@pytest.mark.parametrize("kind", FAILURES)
async def test_everything_of_a_transaction_is_rolled_back_together(
    store: PostgreSQLEventStore, database: Database, kind: str
):
    event = NewEvent(Happened(1))
    await store.append_events("known", "Thing", [event, NewEvent(Happened(2))], NO_STREAM)
    await store.checkpoints.save("known", 3)
    async with store.transaction() as tx:
        await tx.execute(insert(Author), {"name": "known"})
    another = NewEvent(Happened(9), event_id=event.event_id)

    async def fail(tx: PostgreSQLTransaction) -> None:
        if kind == "own":
            raise KeyError("the user's own")
        if kind == "statement":
            await tx.execute(insert(Author), {"name": "known"})
        elif kind == "flush":
            tx.session.add(Author(name="known"))
        elif kind == "deferred":
            await tx.execute(insert(Book), {"title": "of nobody", "author_id": 999})
        elif kind == "syntax":
            await tx.execute(text("SELECT FROM WHERE"))
        elif kind == "version":
            await tx.append_events("known", "Thing", [Ended()], 1)
        elif kind == "checkpoint":
            await tx.checkpoints.save("known", 5, expected=2)
        elif kind == "event id":
            await tx.append_events("known", "Thing", [another], ANY)
        elif kind == "event id elsewhere":
            await tx.append_events("all c", "Thing", [event], ANY)
        else:
            twice = NewEvent(Ended())
            await tx.append_events("all c", "Thing", [twice], ANY)
            await tx.append_events("all d", "Thing", [twice], ANY)

    with pytest.raises(FAILURES[kind]) as raised:
        async with store.transaction() as tx:
            await write(tx, "all")
            await fail(tx)
    assert type(raised.value) is FAILURES[kind] or kind == "syntax"
    assert tx.results == ()
    assert database.found("all") == NOTHING
    assert [stored.aggregate_id async for stored in store.read_all()] == ["known", "known"]
    assert await store.checkpoints.get("known") == 3
    assert database.at_work() == 0
    async with store.transaction() as tx:
        await write(tx, "all")
    assert database.found("all") == EVERYTHING


STEPS_FAIL = [kind for kind, error in FAILURES.items() if issubclass(error, EventSourceError)]


async def test_an_error_is_told_though_its_connection_is_gone(
    store: PostgreSQLEventStore, database: Database
):
    with pytest.raises(LookupError, match="mine"):
        async with store.transaction() as tx:
            pid = (await tx.execute(text("SELECT pg_backend_pid()"))).scalar_one()
            await tx.append_events("a", "Thing", [Happened(1)], NO_STREAM)
            database.ask("SELECT pg_terminate_backend(%s, 5000)", pid)
            raise LookupError("mine")
    assert not await store.get_events("a", "Thing")


@pytest.mark.parametrize("kind", [*STEPS_FAIL, "event id after one that is new"])
async def test_steps_without_sql_are_written_all_or_none(
    store: PostgreSQLEventStore, database: Database, kind: str
):
    """Appends alone, too: that one of them is refused may be found after the others."""
    event = NewEvent(Happened(1))
    await store.append_events("known", "Thing", [event], NO_STREAM)
    await store.checkpoints.save("known", 3)
    another = NewEvent(Happened(9), event_id=event.event_id)
    with pytest.raises(FAILURES.get(kind, DuplicateEventError)):
        async with store.transaction() as tx:
            await tx.append_events("new a", "Thing", [Ended()], NO_STREAM)
            if kind == "version":
                await tx.append_events("known", "Thing", [Ended()], 0)
            elif kind == "checkpoint":
                await tx.checkpoints.save("new", 7)
                await tx.checkpoints.save("known", 5, expected=2)
            elif kind == "event id":
                await tx.append_events("known", "Thing", [another], ANY)
            elif kind == "event id after one that is new":
                await tx.append_events("known", "Thing", [NewEvent(Ended()), event], 1)
            elif kind == "event id elsewhere":
                await tx.append_events("new b", "Thing", [event], ANY)
            else:
                await tx.append_events("new b", "Thing", [event], ANY)
                await tx.append_events("new c", "Thing", [event], ANY)
    assert tx.results == ()
    assert database.found("new") == NOTHING
    assert await store.checkpoints.get("known") == 3
    assert database.at_work() == 0


async def test_an_append_may_be_repeated_in_a_transaction(
    store: PostgreSQLEventStore, database: Database
):
    """Whatever it expects, and whether it was made before or is of the same transaction."""
    events = [NewEvent(Happened(1)), NewEvent(Happened(2))]
    first = await store.append_events("known", "Thing", events, NO_STREAM)
    new = [NewEvent(Happened(3))]
    async with store.transaction() as tx:
        for expected in (ANY, NO_STREAM, 0, 1, 2, 9):
            await tx.append_events("known", "Thing", events, expected)
        for expected in (ANY, NO_STREAM, 0, 1):
            await tx.append_events("new", "Thing", new, expected)
    assert tx.results[:6] == (first,) * 6
    assert tx.results[6:] == (tx.results[6],) * 4
    assert tx.results[6].version == 1
    assert (database.events("known"), database.events("new")) == (2, 1)


async def test_a_cancelled_transaction_with_sql_is_whole_or_not_there(
    store: PostgreSQLEventStore, database: Database
):
    """And if the cancellation comes out of it, it is not there."""
    runs = 0

    async def transact() -> bool:
        nonlocal runs
        runs += 1
        async with store.transaction() as tx:
            await write(tx, f"run {runs}")
        return True

    async def check(result: bool | None) -> None:
        await until(lambda: database.at_work() == 0)
        assert database.found(f"run {runs}") == (EVERYTHING if result else NOTHING)

    assert await cancel_at_every_checkpoint(transact, check) >= 10
    await assert_usable(store, database)


async def test_a_cancelled_transaction_of_steps_is_whole_or_not_there(
    store: PostgreSQLEventStore, database: Database
):
    runs = 0

    async def transact() -> bool:
        nonlocal runs
        runs += 1
        async with store.transaction() as tx:
            await tx.append_events(f"run {runs} a", "Thing", [Ended()], NO_STREAM)
            await tx.append_events(f"run {runs} b", "Thing", [Ended(), Ended()], NO_STREAM)
            await tx.checkpoints.save(f"run {runs}", 7)
            await tx.outbox.add(OutboxMessage(f"run {runs}", b""))
        return True

    async def check(result: bool | None) -> None:
        await until(lambda: database.at_work() == 0)
        assert database.found(f"run {runs}") == ((0, 0, 3, 1, 1) if result else NOTHING)

    assert await cancel_at_every_checkpoint(transact, check) >= 5
    await assert_usable(store, database)


@pytest.mark.parametrize("driver", DRIVERS)
async def test_deadlines_in_transactions_leave_nothing_behind(
    database: Database, driver: Literal["asyncpg", "psycopg"]
):
    kept: list[str] = []

    async def transact(store: PostgreSQLEventStore, number: int) -> None:
        with anyio.move_on_after(number % 20 / 1000):
            async with store.transaction() as tx:
                await write(tx, f"nr {number:03}")
            kept.append(f"nr {number:03}")

    # asyncpg complains to asyncio's loop if it is cancelled while it talks about TLS.
    dsn = f"{database.dsn}{'&' if '?' in database.dsn else '?'}sslmode=disable"
    async with PostgreSQLEventStore(dsn, driver=driver) as store:
        with anyio.fail_after(25):
            async with anyio.create_task_group() as tasks:
                for number in range(60):
                    tasks.start_soon(transact, store, number)
        await until(lambda: database.at_work() == 0)
        for number in range(60):
            name = f"nr {number:03}"
            assert database.found(name) == (EVERYTHING if name in kept else NOTHING)
        await assert_usable(store, database)


# -- inside the user's transaction ------------------------------------------------------------


async def add_everything(store: PostgreSQLEventStore, target: Target, name: str) -> None:
    async with store.transaction(within=target) as tx:
        await tx.append_events(f"{name} a", "Thing", [Happened(1), Happened(2)], NO_STREAM)
        await tx.checkpoints.save(name, 7, expected=0)
        await tx.append_events(f"{name} b", "Thing", [Ended()], NO_STREAM)
        await tx.outbox.add(OutboxMessage(name, b""))
    assert [one.version for one in tx.results] == [2, 1]


ADDED = (0, 0, 3, 1, 1)


@pytest.mark.parametrize("first", ["the append", "the user's statement"])
@pytest.mark.parametrize("ending", ["commit", "rollback", "close"])
async def test_a_transaction_within_the_users_ends_as_the_users(
    store: PostgreSQLEventStore, database: Database, begin: Begin, ending: str, first: str
):
    """Also where the append is its first statement: SQLAlchemy begins lazily."""
    run = store.guest.run
    sql = first != "the append"
    async with begin() as target:
        if sql:
            await run(target.execute(insert(Author), {"name": "user core"}))
        async with store.transaction(within=target) as tx:
            await tx.append_events("user a", "Thing", [Happened(1)], NO_STREAM)
        assert database.found("user") == NOTHING
        await add_everything(store, target, "more")
        assert database.found("more") == NOTHING
        assert await store.last_position() == 0
        if ending != "close":
            await run(getattr(target, ending)())
    committed = ending == "commit"
    assert database.found("user") == ((int(sql), 0, 1, 0, 0) if committed else NOTHING)
    assert database.found("more") == (ADDED if committed else NOTHING)
    assert [stored async for stored in store.read_all()][:1] == (
        [tx.results[0].events[0]] if committed else []
    )
    assert database.at_work() == 0


async def test_a_savepoint_that_is_rolled_back_takes_its_appends_along(
    store: PostgreSQLEventStore, database: Database, begin: Begin
):
    run = store.guest.run

    async def nested(target: Target) -> Any:
        return await target.begin_nested()

    async with begin() as target:
        kept = await run(nested(target))
        await add_everything(store, target, "kept")
        await run(kept.commit())
        lost = await run(nested(target))
        await add_everything(store, target, "lost")
        await run(lost.rollback())
        await run(target.execute(insert(Author), {"name": "kept core"}))
        async with store.transaction(within=target) as tx:
            await tx.append_events("lost a", "Thing", [Happened(9)], NO_STREAM)
        await run(target.commit())
    assert database.found("kept") == (1, 0, 3, 1, 1)
    assert database.found("lost") == (0, 0, 1, 0, 0)
    assert len([stored async for stored in store.read_all()]) == 4


@pytest.mark.parametrize("begin", ["session"], indirect=True)
@pytest.mark.parametrize("kind", STEPS_FAIL)
async def test_who_goes_on_after_an_error_within_commits_nothing_of_it(
    store: PostgreSQLEventStore, database: Database, begin: Begin, kind: str
):
    """The block is all or nothing, also if the user's transaction is committed all the same."""
    event = NewEvent(Happened(1))
    await store.append_events("known", "Thing", [event], NO_STREAM)
    await store.checkpoints.save("known", 3)
    run = store.guest.run
    async with begin() as target:
        await run(target.execute(insert(Author), {"name": "user core"}))
        with pytest.raises(FAILURES[kind]):
            async with store.transaction(within=target) as tx:
                await tx.checkpoints.save("user", 7)
                await tx.outbox.add(OutboxMessage("user", b""))
                await tx.append_events("user a", "Thing", [Ended()], NO_STREAM)
                if kind == "version":
                    await tx.append_events("known", "Thing", [Ended()], 0)
                elif kind == "checkpoint":
                    await tx.checkpoints.save("known", 5, expected=2)
                elif kind == "event id":
                    another = NewEvent(Happened(9), event_id=event.event_id)
                    await tx.append_events("known", "Thing", [another], ANY)
                elif kind == "event id elsewhere":
                    await tx.append_events("user b", "Thing", [event], ANY)
                else:
                    await tx.append_events("user b", "Thing", [event], ANY)
                    await tx.append_events("user c", "Thing", [event], ANY)
        await run(target.execute(insert(Author), {"name": "user more"}))
        await run(target.commit())
    assert database.found("user") == (2, 0, 0, 0, 0)


async def test_a_transaction_within_that_is_cancelled_is_whole_or_not_there(
    store: PostgreSQLEventStore, database: Database, begin: Begin
):
    run = store.guest.run
    runs = 0

    async def transact() -> bool:
        nonlocal runs
        runs += 1
        async with begin() as target:
            await run(target.execute(insert(Author), {"name": f"run {runs} core"}))
            await add_everything(store, target, f"run {runs}")
            await run(target.commit())
        return True

    async def check(result: bool | None) -> None:
        await until(lambda: database.at_work() == 0)
        whole = (1, 0, 3, 1, 1)
        # The commit is the user's own, so a cancellation there may come out of it.
        assert database.found(f"run {runs}") in ((whole,) if result else (NOTHING, whole))

    assert await cancel_at_every_checkpoint(transact, check) >= 5
    await assert_usable(store, database)


async def test_nothing_to_write_needs_no_transaction(
    store: PostgreSQLEventStore, database: Database, begin: Begin
):
    async with begin() as target:
        with pytest.raises(KeyError):
            async with store.transaction(within=target) as tx:
                await tx.append_events("a", "Thing", [Ended()], ANY)
                raise KeyError("the user's own")
        async with store.transaction(within=target):
            pass
        assert database.at_work() == 0
    assert await store.last_position() == 0


async def test_autocommit_is_refused(store: PostgreSQLEventStore, database: Database):
    engine = engine_for(database, isolation_level="AUTOCOMMIT")
    session = AsyncSession(engine)
    with pytest.raises(ValueError, match="AUTOCOMMIT"):
        async with store.transaction(within=session) as tx:
            await tx.append_events("a", "Thing", [Ended()], ANY)
    await store.guest.run(session.close())
    async with PostgreSQLEventStore(engine, guest=store.guest) as another:
        with pytest.raises(ValueError, match="AUTOCOMMIT"):
            async with another.transaction() as tx:
                await tx.execute(text("SELECT 1"))
                await tx.append_events("a", "Thing", [Ended()], ANY)
        await another.append_events("b", "Thing", [Ended()], ANY)
    await store.guest.run(engine.dispose())
    assert [stored.aggregate_id async for stored in store.read_all()] == ["b"]


async def test_another_driver_is_refused(store: PostgreSQLEventStore, database: Database):
    url = database.dsn.replace("postgresql://", "postgresql+psycopg://", 1)
    for engine in (create_async_engine(url), create_engine(url), None, 7):
        with pytest.raises(TypeError, match=r"postgresql\+asyncpg"):
            PostgreSQLEventStore(engine)  # type: ignore[arg-type]
    engine = create_async_engine(url)
    session = AsyncSession(engine)
    with pytest.raises(TypeError, match=r"psycopg.*postgresql\+asyncpg"):
        async with store.transaction(within=session) as tx:
            await tx.append_events("a", "Thing", [Ended()], ANY)
    await store.guest.run(session.close())
    await store.guest.run(engine.dispose())
    assert await store.last_position() == 0


SNAPSHOTS: dict[str, tuple[object, type[EventSourceError]]] = {
    "old": (ANY, StorageError),
    "old, as it was": (1, StorageError),
    "old, as it is": (2, ConcurrencyError),
    "new": (ANY, StorageError),
    "new, as it was": (NO_STREAM, StorageError),
    "new, as it is": (1, ConcurrencyError),
    "known": (ANY, DuplicateEventError),
}


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_a_snapshot_of_the_user_stores_nothing_wrong(
    store: PostgreSQLEventStore, database: Database, level: str
):
    """What was appended after the snapshot is a conflict, whatever was expected."""
    engine = engine_for(database, isolation_level=level)
    run = store.guest.run
    known = NewEvent(Happened(1))
    for name, (expected, error) in SNAPSHOTS.items():
        if name.startswith("old"):
            await append_numbers(store, 1, name)
        session = AsyncSession(engine)
        await run(session.execute(text("SELECT count(*) FROM eventsource.events")))
        meanwhile = [known] if name == "known" else [Happened(3)]
        now = (await store.append_events(name, "Thing", meanwhile, ANY)).version
        before = await store.last_position()
        mine = NewEvent(Ended(), event_id=known.event_id) if name == "known" else Ended()
        with pytest.raises(error) as raised:
            async with store.transaction(within=session) as tx:
                await tx.append_events(name, "Thing", [mine], expected)  # type: ignore[arg-type]
        assert (level in str(raised.value)) == (error is StorageError)
        await run(session.rollback())
        assert [stored.position async for stored in store.read_all()][-1] == before
        # Begun anew, it sees what it did not.
        async with store.transaction(within=session) as tx:
            await tx.append_events(name, "Thing", [Ended()], now)
        await run(session.commit())
        assert tx.results[0].version == now + 1
        await run(session.close())
    await run(engine.dispose())


# -- readers beside open transactions ---------------------------------------------------------


@asynccontextmanager
async def following(store: PostgreSQLEventStore) -> AsyncIterator[Callable[[int], Awaitable[list]]]:
    """Follows the store; what is called with a number waits until so many events have come."""
    seen: list[StoredEvent] = []
    came = anyio.Event()

    async def follow() -> None:
        nonlocal came
        async with store.subscribe() as subscription:
            async for stored in subscription:
                seen.append(stored)
                came.set()
                came = anyio.Event()

    async def wait(number: int) -> list[StoredEvent]:
        with anyio.fail_after(10):
            while len(seen) < number:
                await came.wait()
        return list(seen)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(follow)
        yield wait
        tasks.cancel_scope.cancel()


async def test_a_reader_waits_for_an_open_append_and_misses_nothing(
    store: PostgreSQLEventStore, database: Database, begin: Begin
):
    await append_numbers(store, 1, "before")
    async with following(store) as came:
        assert len(await came(1)) == 1
        async with begin() as target:
            async with store.transaction(within=target) as open_tx:
                await open_tx.append_events("open", "Thing", [Ended()], ANY)
            later = [await store.append_events(str(n), "Thing", [Ended()], ANY) for n in range(3)]
            assert database.ask("SELECT count(*) FROM eventsource.events") == 4
            # They are committed, but the open one comes before them.
            assert await store.last_position() < later[0].position
            assert [stored.aggregate_id async for stored in store.read_all()] == ["before"]
            assert len(await came(1)) == 1
            await store.guest.run(target.commit())
        seen = await came(5)
        assert [stored.aggregate_id for stored in seen] == ["before", "open", "0", "1", "2"]
        assert [stored.position for stored in seen] == sorted(stored.position for stored in seen)
        assert seen[1] == open_tx.results[0].events[0]


async def test_a_rolled_back_append_is_a_gap_that_holds_nobody_up(
    store: PostgreSQLEventStore, begin: Begin
):
    async with following(store) as came:
        async with begin() as target:
            await add_everything(store, target, "open")
            last = await store.append_events("later", "Thing", [Ended()], ANY)
        assert [stored.position for stored in await came(1)] == [last.position]
        assert await store.last_position() == last.position


@pytest.fixture(scope="module")
def prepared_server() -> Iterator[PostgreSQLServer]:
    """A server with prepared transactions, which are not there by default."""
    found = postgresql_binaries()
    if not found:
        pytest.skip("there are no PostgreSQL binaries, and prepared transactions are a setting")
    settings = {"max_prepared_transactions": "5"}
    with PostgreSQLServer(next(iter(found.values())), settings=settings) as server:
        yield server


async def test_transactions_without_an_append_hold_no_reader_up(prepared_server: PostgreSQLServer):
    """Whatever they write, how long ago they began, and in whichever database."""
    dsn, other = prepared_server.create_database(), prepared_server.create_database()
    make_tables(dsn)
    make_tables(other)
    database, elsewhere = Database(dsn), Database(other)
    with database.sessions, elsewhere.sessions:
        store = PostgreSQLEventStore(dsn)
        elsewhere_store = PostgreSQLEventStore(other)
        async with store, elsewhere_store, following(store) as came:
            database.ask("INSERT INTO author (name) SELECT generate_series(1, 100) RETURNING 1")
            open_ones = {
                "bulk update": (database, "UPDATE author SET name = name || '!'"),
                "index": (database, "CREATE INDEX ON book (title)"),
                "temporary table": (database, "CREATE TEMP TABLE scratch AS SELECT 1 AS one"),
                "checkpoint": (database, "INSERT INTO eventsource.checkpoints VALUES ('x', 1)"),
                "another database": (
                    elsewhere,
                    "UPDATE author SET name = 'x'; SELECT txid_current()",
                ),
                "append in another database": (elsewhere, APPEND.format("x")),
            }
            sessions = []
            for where, statement in open_ones.values():
                session = where.connect()
                session.execute(statement.encode())
                sessions.append(session)
            prepared = database.connect(autocommit=True)
            prepared.execute("BEGIN; INSERT INTO author (name) VALUES ('prepared')")
            prepared.execute("PREPARE TRANSACTION 'one'")
            last = 0
            for number in range(1, 6):
                last = (await store.append_events("a", "Thing", [Ended()], ANY)).position
                assert await store.last_position() == last
                assert (await came(number))[-1].position == last
            assert database.ask("SELECT count(*) FROM pg_prepared_xacts") == 1
            assert database.at_work() == 4
            prepared.execute("ROLLBACK PREPARED 'one'")


async def test_a_prepared_append_is_waited_for(prepared_server: PostgreSQLServer):
    """As one that is open: it may still be committed."""
    dsn = prepared_server.create_database()
    make_tables(dsn)
    database = Database(dsn)
    with database.sessions:
        async with PostgreSQLEventStore(dsn) as store, following(store) as came:
            session = database.connect(autocommit=True)
            session.execute(f"BEGIN; {APPEND.format('prepared')}".encode())
            session.execute("PREPARE TRANSACTION 'append'")
            await store.append_events("a", "Thing", [Ended()], ANY)
            assert await store.last_position() == 0
            session.execute("COMMIT PREPARED 'append'")
            assert [stored.aggregate_id for stored in await came(2)] == ["prepared", "a"]


# -- writers beside open transactions ---------------------------------------------------------


async def test_appends_to_a_held_stream_wait_and_hold_nobody_up(
    store: PostgreSQLEventStore, database: Database, begin: Begin
):
    done: list[str] = []
    made: list[int] = []
    cancelled = anyio.CancelScope()

    async def append(number: int) -> None:
        made.append(number)
        await store.append_events("held", "Thing", [Happened(number)], ANY)
        done.append("held")

    async def append_and_give_up() -> None:
        with cancelled:
            await store.append_events("held", "Thing", [Happened(99)], ANY)

    async def conflict() -> None:
        with pytest.raises(ConcurrencyError):
            await store.append_events("held", "Thing", [Happened(98)], NO_STREAM)
        done.append("conflict")

    async def transact(number: int) -> None:
        async with store.transaction() as tx:
            await tx.append_events("held", "Thing", [Happened(number)], ANY)
            await tx.append_events(f"beside {number}", "Thing", [Ended()], ANY)
            await tx.checkpoints.save(str(number), 1)
        done.append("transaction")

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            async with begin() as target:
                async with store.transaction(within=target) as tx:
                    await tx.append_events("held", "Thing", [Happened(0)], NO_STREAM)
                tasks.start_soon(append_and_give_up)
                for number in range(1, 21):
                    tasks.start_soon(append, number)
                tasks.start_soon(conflict)
                # More of them than there are connections.
                for number in range(21, 21 + 2 * CONNECTIONS):
                    tasks.start_soon(transact, number)
                for _ in range(5):
                    for other in range(20):  # in both lanes
                        await store.append_events(f"other {other}", "Thing", [Ended()], ANY)
                    await store.get_events("other 1", "Thing")
                    await store.checkpoints.save("other", 1)
                assert database.events("other 7") == 5
                assert done == []
                cancelled.cancel()
                await store.append_events("other 1", "Thing", [Ended()], ANY)
                await store.guest.run(target.commit())
        assert sorted(done) == sorted(["held"] * 20 + ["conflict"] + ["transaction"] * 10)
    assert cancelled.cancelled_caught
    events = (await store.get_events("held", "Thing")).events
    numbers = [stored.event.number for stored in events if isinstance(stored.event, Happened)]
    assert numbers[0] == 0
    assert [number for number in numbers if 1 <= number <= 20] == made
    assert sorted(numbers) == list(range(31))
    await assert_usable(store, database)


async def test_a_transaction_with_sql_waits_for_a_held_stream(
    store: PostgreSQLEventStore, database: Database, begin: Begin
):
    cancelled, ended = anyio.CancelScope(), anyio.Event()

    async def transact(name: str, scope: anyio.CancelScope) -> None:
        with scope:
            async with store.transaction() as tx:
                await tx.execute(insert(Author), {"name": f"{name} core"})
                await tx.append_events("held", "Thing", [Ended()], ANY)
        ended.set()

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            async with begin() as target:
                await append_within(store, target, "held")
                tasks.start_soon(transact, "cancelled", cancelled)
                tasks.start_soon(transact, "patient", anyio.CancelScope())
                await until(lambda: database.waiting() == 2)
                cancelled.cancel()
                await ended.wait()
                await store.append_events("other", "Thing", [Ended()], ANY)
                await store.guest.run(target.rollback())
    assert cancelled.cancelled_caught
    await until(lambda: database.at_work() == 0)
    assert database.found("cancelled") == NOTHING
    assert database.found("patient") == (1, 0, 0, 0, 0)
    assert database.events("held") == 1


async def append_within(store: PostgreSQLEventStore, target: Target, aggregate_id: str) -> None:
    async with store.transaction(within=target) as tx:
        await tx.append_events(aggregate_id, "Thing", [Ended()], ANY)


@pytest.mark.parametrize("begin", ["session"], indirect=True)
async def test_transactions_that_wait_for_each_other_end(
    store: PostgreSQLEventStore, database: Database, begin: Begin
):
    """One of them is given up by the server, and says so; the other goes on."""
    name = database.ask("SELECT current_database()")
    database.run(f"ALTER DATABASE {name} SET deadlock_timeout = '50ms'")
    outcomes: list[str] = []
    first_is_done = anyio.Event()

    async def transact(one: str, two: str, ready: Coroutine[Any, Any, Any] | None) -> None:
        async with begin() as target:
            await append_within(store, target, one)
            if ready is None:
                first_is_done.set()
                await until(lambda: database.waiting() == 1)
            else:
                await ready
            try:
                await append_within(store, target, two)
                await store.guest.run(target.commit())
                outcomes.append("committed")
            except StorageError as error:
                outcomes.append(str(error))

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(transact, "a", "b", first_is_done.wait())
            tasks.start_soon(transact, "b", "a", None)
    assert sorted(outcomes)[1:] == ["committed"]
    assert "40P01" in min(outcomes)
    assert "the same call again" in min(outcomes)
    assert (database.events("a"), database.events("b")) == (1, 1)


async def test_many_transactions_at_once_neither_lose_nor_double_anything(
    store: PostgreSQLEventStore, database: Database
):
    database.ask("INSERT INTO author (name) VALUES ('0') RETURNING 1")
    conflicts = 0

    async def count(_: int) -> None:
        nonlocal conflicts
        while True:
            version = (await store.get_events("counter", "Thing")).version
            try:
                async with store.transaction() as tx:
                    await tx.execute(text("UPDATE author SET name = (name::int + 1)::text"))
                    await tx.append_events("counter", "Thing", [Ended()], version)
                return
            except ConcurrencyError:
                conflicts += 1

    with anyio.fail_after(25):
        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(count, number)
    assert database.ask("SELECT name FROM author") == "20"
    assert database.events("counter") == 20
    await assert_usable(store, database)
