"""The contract of SQL in a transaction: the user's tables, and all else of it, together or not."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, TypeAlias

import anyio
import pytest
from sqlalchemy import ForeignKey, delete, func, insert, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, joinedload, mapped_column, relationship

from ..errors import (
    CheckpointConflictError,
    ConcurrencyError,
    DocumentConflictError,
    DuplicateEventError,
)
from ..events import NewEvent
from ..stores.interface import ANY, NO_STREAM
from ..stores.postgresql import PostgreSQLEventStore
from ..stores.sql_transaction import SQLTransaction
from ..stores.sqlite import SQLiteEventStore
from .cancelling import cancel_at_every_checkpoint
from .repositories import content, message
from .samples import Ended, Happened, append_numbers, numbers

SQLEventStore: TypeAlias = PostgreSQLEventStore | SQLiteEventStore

_caller: ContextVar[str] = ContextVar("_caller", default="nobody")


class Base(DeclarativeBase):
    pass


class Account(Base):
    """A read model: how many events of each aggregate there are."""

    __tablename__ = "contract_account"

    name: Mapped[str] = mapped_column(primary_key=True)
    total: Mapped[int] = mapped_column(default=0)
    entries: Mapped[list[Entry]] = relationship(order_by="Entry.number")


class Entry(Base):
    __tablename__ = "contract_entry"

    number: Mapped[int] = mapped_column(primary_key=True)
    account: Mapped[str] = mapped_column(
        ForeignKey(Account.name, deferrable=True, initially="DEFERRED")
    )


def open_account(session: Session, name: str, *, entries: int = 0) -> Account:
    account = Account(name=name, entries=[Entry(number=number) for number in range(entries)])
    session.add(account)
    return account


def fail_in(session: Session) -> None:
    open_account(session, "failing")
    raise KeyError("the caller's own")


async def count(tx: SQLTransaction, name: str) -> int:
    """Count one more, and return how many rows there were to count in."""
    one_more = update(Account).where(Account.name == name).values(total=Account.total + 1)
    result: Any = await tx.execute(one_more)
    return int(result.rowcount)


async def totals(store: SQLEventStore) -> dict[str, int]:
    async with store.transaction() as tx:
        return await totals_in(tx)


async def totals_in(tx: SQLTransaction) -> dict[str, int]:
    rows = await tx.execute(select(Account.name, Account.total).order_by(Account.name))
    return {row.name: row.total for row in rows}


class SQLTransactContract:
    """What the `SQLTransaction` of every store does, as tests.

    It is used as `EventStoreContract` is, and needs SQLAlchemy. Its tables are made in the store's
    database.
    """

    @pytest.fixture(autouse=True)
    async def _tables(self, store: SQLEventStore) -> None:
        async with store.transaction() as tx:
            await tx.run_sync(lambda session: Base.metadata.create_all(session.connection()))
            await tx.run_sync(open_account, "a")

    async def test_sql_is_stored_together_with_everything_else(self, store: SQLEventStore) -> None:
        async with store.transaction() as tx:
            await tx.append_events("a", "Thing", [Happened(1)], NO_STREAM)
            assert await count(tx, "a") == 1
            await tx.checkpoints.save("reader", 1, expected=0)
            await tx.run_sync(open_account, "b")
            await tx.outbox.add(message("new"))
            revision = await tx.documents.add("c", "a", {"of": "a"})
            await tx.documents.save_all("c", {"b": 1, "d": 1})
            assert await count(tx, "b") == 1
            assert await count(tx, "c") == 0
            # Inside the block everybody sees what is stored.
            assert await tx.checkpoints.get("reader") == 0
            assert await content(store, "reader") == ([], [0], [])
            assert await store.documents.list("c") == []
            assert [one.key for one in await tx.documents.list("c")] == ["a", "b", "d"]
        assert [result.version for result in tx.results] == [1]
        assert await content(store, "reader") == (["a"], [1], ["new"])
        found = await store.documents.list("c")
        assert [one.value for one in found] == [{"of": "a"}, 1, 1]
        assert found[0].revision == revision
        assert await totals(store) == {"a": 1, "b": 1}
        assert (await store.append_events("a", "Thing", [Ended()], 1)).version == 2

    async def test_sql_alone_is_stored_too(self, store: SQLEventStore) -> None:
        async with store.transaction() as tx:
            await count(tx, "a")
        assert tx.results == ()
        assert await totals(store) == {"a": 1}
        assert await store.last_position() == 0

    async def test_whatever_fails_takes_sql_and_everything_else_back(
        self, store: SQLEventStore
    ) -> None:
        event = NewEvent(Ended())
        await store.append_events("known", "Thing", [event], NO_STREAM)
        await store.checkpoints.save("reader", 3)
        await store.documents.add("c", "known", 3)
        documents = await store.documents.list("c")
        before = await content(store, "reader")

        async def fail(kind: str) -> None:
            async with store.transaction() as tx:
                await tx.checkpoints.save("reader", 9, expected=3)
                await tx.append_events("a", "Thing", [Happened(1)], NO_STREAM)
                await count(tx, "a")
                await tx.run_sync(open_account, "b", entries=3)
                await tx.outbox.add(message("new"))
                await tx.documents.save_all("c", {"a": 1, "known": 9})
                if kind == "sql":
                    await tx.execute(insert(Account).values(name="a"))
                elif kind == "flush":
                    await tx.run_sync(open_account, "a")
                elif kind == "deferred":
                    await tx.execute(insert(Entry).values(number=9, account="nobody's"))
                elif kind == "checkpoint":
                    await tx.checkpoints.save("reader", 10, expected=3)
                elif kind == "document":
                    await tx.documents.add("c", "known", 9)
                elif kind == "version":
                    await tx.append_events("known", "Thing", [Ended()], NO_STREAM)
                elif kind == "event id":
                    await tx.append_events("a", "Thing", [event], ANY)
                elif kind == "function":
                    await tx.run_sync(fail_in)
                else:
                    raise KeyError("the caller's own")

        for kind, error in (
            ("sql", IntegrityError),
            ("flush", IntegrityError),
            ("deferred", IntegrityError),
            ("checkpoint", CheckpointConflictError),
            ("document", DocumentConflictError),
            ("version", ConcurrencyError),
            ("event id", DuplicateEventError),
            ("function", KeyError),
            ("block", KeyError),
        ):
            with pytest.raises(error):
                await fail(kind)
            assert await content(store, "reader") == before, kind
            assert await store.documents.list("c") == documents, kind
            assert await totals(store) == {"a": 0}, kind
        async with store.transaction() as tx:
            assert (await tx.execute(select(func.count()).select_from(Entry))).scalar_one() == 0
            await tx.append_events("a", "Thing", [Ended()], NO_STREAM)
            await count(tx, "a")
        assert await content(store) == (["known", "a"], [], [])
        assert await totals(store) == {"a": 1}

    async def test_a_result_can_be_read_after_other_sql_and_after_the_block(
        self, store: SQLEventStore
    ) -> None:
        async with store.transaction() as tx:
            rows = [{"name": f"row {number:03}", "total": number} for number in range(500)]
            await tx.execute(insert(Account), rows)
            core = await tx.execute(text("SELECT name, total FROM contract_account ORDER BY name"))
            orm = await tx.execute(select(Account).order_by(Account.name))
            named = await tx.execute(text("SELECT name FROM contract_account WHERE total = 7"))
            returned = await tx.execute(
                delete(Account).where(Account.total > 1).returning(Account.total)
            )
            assert await totals_in(tx) == {"a": 0, "row 000": 0, "row 001": 1}
            assert core.fetchone() == ("a", 0)
        assert core.mappings().fetchmany(2)[1] == {"name": "row 001", "total": 1}
        assert len(core.all()) == 498
        assert [account.total for account in orm.scalars()] == [0, *range(500)]
        assert named.scalar_one() == "row 007"
        assert sorted(returned.scalars()) == list(range(2, 500))

    async def test_parameters_are_a_dict_or_a_list_of_them(self, store: SQLEventStore) -> None:
        add = text("INSERT INTO contract_account VALUES (:name, :total)")
        async with store.transaction() as tx:
            await tx.execute(add, {"name": "one", "total": 1})
            await tx.execute(add, [{"name": name, "total": 2} for name in ("two", "three")])
        assert await totals(store) == {"a": 0, "one": 1, "three": 2, "two": 2}

    async def test_the_orm_works_as_in_synchronous_code(self, store: SQLEventStore) -> None:
        def change(session: Session) -> list[int]:
            account = session.get_one(Account, "b")
            account.entries[0].number = 10  # loaded when it is used
            return [entry.number for entry in account.entries]

        async with store.transaction() as tx:
            opened = await tx.run_sync(open_account, "b", entries=3)
        assert opened.name == "b"  # the end of the block takes nothing from it
        async with store.transaction() as tx:
            assert await tx.run_sync(change) == [10, 1, 2]
        statement = select(Account).options(joinedload(Account.entries)).order_by(Account.name)
        async with store.transaction() as tx:
            _, found = (await tx.execute(statement)).unique().scalars()
        assert [entry.number for entry in found.entries] == [1, 2, 10]

    async def test_an_error_of_sql_can_be_confined(self, store: SQLEventStore) -> None:
        def try_to_open(session: Session, name: str) -> bool:
            try:
                with session.begin_nested():
                    open_account(session, name)
            except IntegrityError:
                return False
            return True

        async with store.transaction() as tx:
            await count(tx, "a")
            assert [await tx.run_sync(try_to_open, name) for name in "aba"] == [False, True, False]
            await tx.checkpoints.save("reader", 1)
        assert await totals(store) == {"a": 1, "b": 0}
        assert await store.checkpoints.get("reader") == 1

    async def test_a_function_sees_the_callers_context(self, store: SQLEventStore) -> None:
        async with store.transaction() as tx:
            token = _caller.set("ann")
            try:
                assert await tx.run_sync(lambda _: _caller.get()) == "ann"
            finally:
                _caller.reset(token)
            assert await tx.run_sync(lambda _: _caller.get()) == "nobody"

    async def test_transactions_of_many_lose_nothing(self, store: SQLEventStore) -> None:
        """Counters, checkpoints, appends and readers at once; every third transaction fails."""
        failed: list[int] = []

        async def transact(number: int) -> None:
            try:
                async with store.transaction() as tx:
                    await count(tx, "a")
                    await tx.append_events("a", "Thing", [Happened(number)], ANY)
                    await tx.checkpoints.save(str(number), 1, expected=0)
                    if number % 3 == 0:
                        raise KeyError(number)
            except KeyError:
                failed.append(number)

        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                for number in range(15):
                    tasks.start_soon(transact, number)
                    tasks.start_soon(append_numbers, store, 2, f"plain{number}")
                    tasks.start_soon(store.checkpoints.get, "0")
        kept = {number for number in range(15) if number % 3}
        assert sorted(failed) == list(range(0, 15, 3))
        assert await totals(store) == {"a": len(kept)}
        assert set(numbers(await store.get_events("a"))) == kept
        for number in range(15):
            assert await store.checkpoints.get(str(number)) == (number in kept)
            assert len(await store.get_events(f"plain{number}")) == 2

    async def test_a_subscriber_sees_the_events_of_a_transaction_after_its_end_only(
        self, store: SQLEventStore
    ) -> None:
        seen: list[int] = []
        arrived = anyio.Event()

        async def follow() -> None:
            async for stored in subscription:
                seen.extend(numbers([stored]))
                arrived.set()

        async def transact(number: int, *, fail: bool) -> None:
            async with store.transaction() as tx:
                await count(tx, "a")
                await tx.append_events("a", "Thing", [Happened(number)], NO_STREAM)
                await anyio.wait_all_tasks_blocked()
                await store.last_position()
                assert seen == []
                if fail:
                    raise KeyError(number)

        with anyio.fail_after(30):
            async with store.subscribe() as subscription, anyio.create_task_group() as tasks:
                tasks.start_soon(follow)
                with pytest.raises(KeyError):
                    await transact(1, fail=True)
                await transact(2, fail=False)
                await arrived.wait()
                tasks.cancel_scope.cancel()
        assert seen == [2]

    async def test_a_cancelled_transaction_with_sql_is_whole_or_not_there(
        self, store: SQLEventStore
    ) -> None:
        runs = whole = 0

        async def transact() -> bool:
            nonlocal runs
            runs += 1
            async with store.transaction() as tx:
                await count(tx, "a")
                await tx.checkpoints.save("reader", runs, expected=whole)
                await tx.run_sync(open_account, f"{runs:04}")  # in order as texts too
                await tx.append_events("a", "Thing", [Happened(runs)], ANY)
            return True

        async def check(result: bool | None) -> None:
            nonlocal whole
            # A cancellation that comes out of the block means that nothing was stored.
            whole = runs if result else whole
            stored = numbers(await store.get_events("a"))
            assert await store.checkpoints.get("reader") == whole
            assert stored[-1:] == ([whole] if whole else [])
            found = await totals(store)
            assert found.pop("a") == len(stored)
            assert list(map(int, found)) == stored

        assert await cancel_at_every_checkpoint(transact, check) >= 4

    async def test_sql_belongs_inside_the_block(self, store: SQLEventStore) -> None:
        tx = store.transaction()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="inside its block"):
                await tx.execute(select(1))
            with pytest.raises(RuntimeError, match="inside its block"):
                await tx.run_sync(open_account, "late")
            if tx.results == ():
                async with tx:
                    await tx.append_events("a", "Thing", [Ended()], ANY)
        assert await totals(store) == {"a": 0}
