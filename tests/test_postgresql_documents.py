"""Documents in PostgreSQL: what others do at the same time, and what SQL sees of them."""

from __future__ import annotations

import pickle
from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import UUID, uuid4

import anyio
import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from eventsource_anyio import ANY, PostgreSQLEventStore
from eventsource_anyio.errors import DocumentConflictError
from eventsource_anyio.testing import cancel_at_every_checkpoint
from eventsource_anyio.testing.documents import document, values
from eventsource_anyio.testing.samples import Ended
from tests.every_store import DRIVERS

CALL = "SELECT conflict, actual FROM eventsource.write_documents(%s, %s, %s, %s, %s, %s)"


@pytest.fixture(params=DRIVERS)
async def store(
    migrated_dsn: str, request: pytest.FixtureRequest
) -> AsyncIterator[PostgreSQLEventStore]:
    async with PostgreSQLEventStore(migrated_dsn, driver=request.param) as store:
        yield store


class Session:
    """Somebody else at the same database, without an event loop."""

    def __init__(self, dsn: str) -> None:
        self.connection = psycopg.connect(dsn, autocommit=True)

    def ask(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        answer = self.connection.execute(statement.encode(), values or None)
        return answer.fetchall() if answer.description else []

    def save(self, key: str, value: str) -> UUID:
        revision = uuid4()
        arrays = [["c"], [key], [revision], [value], [None], [False]]
        assert self.ask(CALL, *arrays) == [(None, None)]
        return revision

    def waiting(self) -> int:
        """How many sessions wait for a lock."""
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' "
            "AND datname = current_database()"
        )
        return int(self.ask(waiting)[0][0])


@pytest.fixture
def other(migrated_dsn: str) -> Iterator[Session]:
    session = Session(migrated_dsn)
    with session.connection:
        yield session


async def until_somebody_waits(session: Session, count: int = 1) -> None:
    with anyio.fail_after(20):
        while session.waiting() < count:  # noqa: ASYNC110  (there is no event in another process)
            await anyio.sleep(0.01)


@pytest.mark.parametrize("kind", ["add", "save", "delete", "rolled back"])
async def test_what_another_commits_while_it_is_waited_for_is_compared(
    store: PostgreSQLEventStore, other: Session, migrated_dsn: str, kind: str
) -> None:
    first = None if kind == "add" else await store.documents.add("c", "m", 1)
    outcomes: list[UUID | DocumentConflictError] = []

    async def write() -> None:
        try:
            async with store.transaction() as tx:
                await tx.append_events("a", "Thing", [Ended()], ANY)
                await tx.documents.save_all("c", {"a": 2, "z": 2})
                if first is None:
                    revision = await tx.documents.add("c", "m", 2)
                else:
                    revision = await tx.documents.save("c", "m", 2, expected=first)
        except DocumentConflictError as error:
            outcomes.append(error)
        else:
            outcomes.append(revision)

    other.ask("BEGIN")
    revision: UUID | None = None
    if kind == "delete":
        other.ask("DELETE FROM eventsource.documents")
    else:
        revision = other.save("m", "3")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(write)
        watching = Session(migrated_dsn)
        with watching.connection:
            await until_somebody_waits(watching)
        other.ask("ROLLBACK" if kind == "rolled back" else "COMMIT")
    (outcome,) = outcomes
    if kind == "rolled back":
        assert (await document(store, "m")).revision == outcome
        assert await values(store) == {"a": 2, "m": 2, "z": 2}
        return
    assert isinstance(outcome, DocumentConflictError)
    assert (outcome.expected, outcome.actual) == (first, revision)
    assert str(pickle.loads(pickle.dumps(outcome))) == str(outcome)
    assert await values(store) == ({} if kind == "delete" else {"m": 3})
    assert not await store.get_events("a")


async def test_an_add_that_another_rolls_back_is_made(
    store: PostgreSQLEventStore, other: Session, migrated_dsn: str
) -> None:
    other.ask("BEGIN")
    other.save("m", "3")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(store.documents.add, "c", "m", 2)
        watching = Session(migrated_dsn)
        with watching.connection:
            await until_somebody_waits(watching)
        other.ask("ROLLBACK")
    assert await values(store) == {"m": 2}


@pytest.mark.parametrize("compared", [False, True])
@pytest.mark.parametrize("there", [False, True])
async def test_two_that_take_two_documents_in_opposite_order_do_not_deadlock(
    store: PostgreSQLEventStore, other: Session, migrated_dsn: str, there: bool, compared: bool
) -> None:
    """Both are held up at the first of their documents, and go on at the same time."""
    if there:
        await store.documents.save_all("c", {"a": 0, "b": 0})
    done: list[str] = []

    async def write(first: str, second: str) -> None:
        async with store.transaction() as tx:
            await tx.documents.save("c", first, 1)
            await tx.documents.save("c", second, 1)
            if compared:
                await tx.documents.delete("c", f"{first} only")
        done.append(first)

    for _ in range(5):
        other.ask("BEGIN")
        other.save("a", "7")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(write, "a", "b")
            tasks.start_soon(write, "b", "a")
            watching = Session(migrated_dsn)
            with watching.connection:
                await until_somebody_waits(watching, 2)
            other.save("b", "7")  # neither of them holds it
            other.ask("COMMIT")
    assert sorted(done) == ["a"] * 5 + ["b"] * 5
    assert await values(store) == {"a": 1, "b": 1}


async def test_in_the_users_transaction_a_conflict_leaves_it_to_the_user(
    migrated_dsn: str,
) -> None:
    engine = create_async_engine(migrated_dsn.replace("postgresql://", "postgresql+asyncpg://"))
    async with PostgreSQLEventStore(engine) as store:
        first = await store.documents.add("c", "a", 1)
        seen: list[object] = []

        async def within(*, fail: bool) -> UUID | None:
            saved: UUID | None = None
            async with AsyncSession(engine) as session:
                await session.execute(text("CREATE TABLE IF NOT EXISTS mine (a int)"))
                for wrong in (True, True, False):
                    try:
                        async with store.transaction(within=session) as tx:
                            if wrong:
                                await tx.documents.save("c", "0", 9, expected=first)
                                if not fail:
                                    await tx.documents.save("c", "b", 9)
                            else:
                                saved = await tx.documents.save("c", "a", 2, expected=first)
                                saved = await tx.documents.save("c", "a", 3, expected=saved)
                                await tx.append_events("a", "Thing", [Ended()], ANY)
                    except DocumentConflictError as error:
                        seen.append(error.actual)
                counted = await session.execute(
                    text("SELECT key, value FROM eventsource.documents ORDER BY key")
                )
                assert [tuple(row) for row in counted] == [("a", 3)]
                await (session.rollback() if fail else session.commit())
            return saved

        await store.guest.run(within(fail=True))
        assert await values(store) == {"a": 1}
        saved = await store.guest.run(within(fail=False))
        assert await store.documents.list("c") == [await document(store, "a")]
        assert (await document(store, "a")).revision == saved
        assert len(await store.get_events("a")) == 1
        assert seen == [None] * 4
        await store.guest.run(engine.dispose())


async def test_the_function_saves_nothing_if_there_is_a_conflict(
    store: PostgreSQLEventStore, other: Session
) -> None:
    revision = await store.documents.add("c", "b", 1)
    before = await store.documents.list("c")
    new = uuid4()
    for keys, expected, absent, answer in (
        (["a", "b"], [None, None], [False, True], (2, revision)),
        (["b", "a"], [None, new], [False, False], (2, None)),
        (["z", "b", "a"], [None, new, new], [True, False, False], (2, revision)),
    ):
        count = len(keys)
        revisions: list[UUID | None] = [uuid4(), None, uuid4()][:count]
        arrays = [["c"] * count, keys, revisions, ["7"] * count, expected, absent]
        assert other.ask(CALL, *arrays) == [answer]
        assert await store.documents.list("c") == before


async def test_sql_can_look_into_documents(store: PostgreSQLEventStore, other: Session) -> None:
    await store.documents.save_all("c", {"a": {"age": 7, "x": 1e16}, "b": {"age": 9}})
    older = "SELECT key FROM eventsource.documents WHERE (value->>'age')::int > 8"
    assert other.ask(older) == [("b",)]
    assert other.ask("SELECT value->>'x' FROM eventsource.documents WHERE key = 'a'") == [
        ("10000000000000000.0",)
    ]
    moment = "SELECT count(*) FROM eventsource.documents WHERE updated_at > now() - interval '1 h'"
    assert other.ask(moment) == [(2,)]
    before = other.ask("SELECT updated_at FROM eventsource.documents WHERE key = 'a'")
    found = await document(store, "a")
    await store.documents.save("c", "a", 1, expected=found.revision)
    assert other.ask("SELECT updated_at FROM eventsource.documents WHERE key = 'a'") > before


async def test_a_cancelled_wait_for_a_document_leaves_nothing_behind(
    store: PostgreSQLEventStore, other: Session
) -> None:
    other.ask("BEGIN")
    other.save("a", "7")
    with anyio.move_on_after(0.1) as scope:
        async with store.transaction() as tx:
            await tx.documents.save_all("c", {"0": 1, "a": 1})
    assert scope.cancelled_caught
    other.ask("COMMIT")
    assert await values(store) == {"a": 7}
    runs = 0

    async def save() -> UUID:
        nonlocal runs
        runs += 1
        return await store.documents.save("c", "a", runs)

    async def check(result: UUID | None) -> None:
        found = await document(store, "a")
        assert found.revision == result or result is None

    assert await cancel_at_every_checkpoint(save, check) >= 3
