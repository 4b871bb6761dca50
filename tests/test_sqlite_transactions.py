"""SQL in a transaction of SQLite: what its contract leaves open, which is who waits for whom."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from random import uniform
from time import sleep
from types import SimpleNamespace
from typing import Any, Literal

import anyio
import pytest
from anyio import to_thread
from sqlalchemy import insert, select, text
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.orm import Session

from eventsource_anyio import (
    ANY,
    NO_STREAM,
    AggregateRepository,
    AggregateRoot,
    OutboxMessage,
    SQLiteEventStore,
    StorageError,
    StoreClosedError,
    SyncRunner,
    applies,
    cleanup,
)
from eventsource_anyio.stores.sql_transaction import SQLTransaction
from eventsource_anyio.stores.sqlite.sql import SQLConnection
from eventsource_anyio.testing import cancel_at_every_checkpoint
from eventsource_anyio.testing.repositories import assert_checkpoint, content
from eventsource_anyio.testing.samples import Ended, Happened, append_numbers, numbers
from eventsource_anyio.testing.sql_transacting import Account, Base, Entry, open_account

ASYNCIO_LOOPS = ["asyncio", *(["uvloop"] if sys.platform != "win32" else [])]

connect = sqlite3.connect

ADD = text("INSERT INTO seen VALUES (:number)")


class Watched:
    """What SQLite is asked by the connections of a test's stores, in order."""

    def __init__(self) -> None:
        self.statements: list[str] = []
        self.threads: set[int] = set()
        self.connected = 0
        self.on_connect: Callable[[], object] = lambda: None

    def connect(self, path: str, **options: Any) -> sqlite3.Connection:
        self.on_connect()
        connection: sqlite3.Connection = connect(path, **options)
        self.connected += 1
        connection.set_trace_callback(self._traced)
        return connection

    def _traced(self, statement: str) -> None:
        self.threads.add(threading.get_ident())
        self.statements.append(statement)

    def count(self, statement: str) -> int:
        return self.statements.count(statement)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    watched = Watched()
    monkeypatch.setattr(sqlite3, "connect", watched.connect)
    return watched


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.db"


@pytest.fixture(name="store")
async def _store(path: Path) -> AsyncIterator[SQLiteEventStore]:
    async with SQLiteEventStore(path, synchronous="NORMAL") as store:
        await prepare(store)
        yield store


async def prepare(store: SQLiteEventStore) -> None:
    async with store.transaction() as tx:
        await tx.execute(text("CREATE TABLE seen (number INTEGER PRIMARY KEY)"))


async def see(tx: SQLTransaction, number: int) -> None:
    await tx.execute(ADD, {"number": number})


async def seen(store: SQLiteEventStore) -> list[int]:
    async with store.transaction() as tx:
        rows = await tx.execute(text("SELECT number FROM seen ORDER BY number"))
        return list(rows.scalars())


@contextmanager
def locked(path: Path, *, timeout: float = 5) -> Generator[None]:
    """The write lock of the file, held by a connection of the test."""
    connection = connect(path, isolation_level=None, timeout=timeout)
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
    finally:
        connection.close()


@contextmanager
def locked_by_a_process(path: Path) -> Generator[None]:
    program = f"""if True:
        import sqlite3
        connection = sqlite3.connect({str(path)!r}, isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        print("locked", flush=True)
        input()
    """
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        try:
            yield
        finally:
            process.communicate("end\n")


class Slow:
    """A function for `run_sync` that is at work until it is told to go on."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self.ended = False

    def __call__(self, session: Session, number: int) -> None:
        self.begun.set()
        assert self.go_on.wait(20)
        session.execute(ADD, {"number": number})
        self.ended = True

    async def wait_begun(self) -> None:
        assert await to_thread.run_sync(self.begun.wait, 20)


class Late:
    """Makes a method of the connection late, in its thread: the first call waits to be let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        method: Callable[..., object] = getattr(SQLConnection, name)
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self.gone = threading.Event()

        def late(*arguments: object) -> object:
            if self.begun.is_set():
                return method(*arguments)
            self.begun.set()
            assert self.go_on.wait(20)
            try:
                return method(*arguments)
            finally:
                self.gone.set()

        monkeypatch.setattr(SQLConnection, name, late)

    async def wait_begun(self) -> None:
        assert await to_thread.run_sync(self.begun.wait, 20)

    async def let_go(self) -> None:
        self.go_on.set()
        assert await to_thread.run_sync(self.gone.wait, 20)


# -- the connection ---------------------------------------------------------------------------


async def test_it_begins_with_the_first_sql_and_not_before(path: Path, store: SQLiteEventStore):
    async with store.transaction() as tx:
        await tx.append_events("a", "Thing", [Happened(1)], NO_STREAM)
        await tx.checkpoints.save("reader", 1)
        with locked(path, timeout=0):
            pass
        await tx.execute(select(1))
        with pytest.raises(sqlite3.OperationalError, match="locked"), locked(path, timeout=0):
            pass
    with locked(path, timeout=0):
        assert len(await store.get_events("a")) == 1


async def test_without_sql_there_is_no_other_connection(path: Path, watched: Watched):
    async with SQLiteEventStore(path) as store:
        async with store.transaction() as tx:
            await tx.append_events("a", "Thing", [Happened(1)], NO_STREAM)
        assert watched.connected == 1
        assert watched.count("BEGIN IMMEDIATE") == 2


async def test_one_connection_is_kept_and_never_used_on_the_event_loops_thread(
    path: Path, watched: Watched
):
    async with SQLiteEventStore(path) as store:
        for number in range(3):
            if number == 0:
                await prepare(store)
            async with store.transaction() as tx:
                await see(tx, number)
                result = await tx.execute(text("SELECT number FROM seen"))
                await tx.run_sync(lambda session: session.execute(text("SELECT 1")).all())
                await tx.append_events("a", "Thing", [Happened(number)], ANY)
            assert sorted(result.scalars()) == list(range(number + 1))
        with pytest.raises(KeyError):
            async with store.transaction() as tx:
                await see(tx, 9)
                raise KeyError
    assert watched.connected == 2
    assert threading.get_ident() not in watched.threads
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # all is closed


@pytest.mark.parametrize(("synchronous", "expected"), [("FULL", 2), ("NORMAL", 1)])
async def test_it_is_opened_as_the_stores_own_and_checks_foreign_keys(
    path: Path, synchronous: Literal["FULL", "NORMAL"], expected: int
):
    async with SQLiteEventStore(path, synchronous=synchronous) as store:
        async with store.transaction() as tx:
            for name, value in (
                ("synchronous", expected),
                ("journal_mode", "wal"),
                ("wal_autocheckpoint", 4000),
                ("foreign_keys", 1),
            ):
                assert (await tx.execute(text(f"PRAGMA {name}"))).scalar_one() == value


async def test_a_store_that_is_opened_again_has_sql_again(path: Path):
    store = SQLiteEventStore(path)
    for number in range(2):
        async with store:
            if number == 0:
                await prepare(store)
            async with store.transaction() as tx:
                await see(tx, number)
            assert await seen(store) == list(range(number + 1))


async def test_where_sqlalchemy_is_missing_the_error_names_the_extra(
    path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    async with SQLiteEventStore(path) as store:
        for _ in range(2):
            with pytest.raises(ImportError, match=r"'eventsource-anyio\[sqlalchemy\]'"):
                async with store.transaction() as tx:
                    await tx.append_events("a", "Thing", [Ended()], ANY)
                    await tx.run_sync(lambda _: None)
        async with store.transaction() as tx:
            await tx.append_events("a", "Thing", [Ended()], NO_STREAM)
        monkeypatch.undo()
        async with store.transaction() as tx:
            await tx.execute(select(1))
            await tx.append_events("a", "Thing", [Ended()], 1)


async def test_every_call_is_a_checkpoint(store: SQLiteEventStore):
    for _ in range(2):
        async with store.transaction() as tx:
            await assert_checkpoint(lambda: tx.execute(select(1)))
            await assert_checkpoint(lambda: tx.run_sync(lambda _: None))
    for _ in range(2):
        with anyio.CancelScope() as scope:
            async with store.transaction() as tx:
                await see(tx, 1)
                scope.cancel()
        assert scope.cancelled_caught
    assert await seen(store) == []


def test_it_is_there_for_code_that_is_not_async(path: Path):
    with SyncRunner(SQLiteEventStore(path)) as runner:
        store = runner.store
        assert isinstance(store, SQLiteEventStore)
        runner.call(prepare, store)
        for number in range(3):
            with runner.context(store.transaction()) as tx:
                runner.call(see, tx, number)
                runner.call(tx.append_events, "a", "Thing", [Happened(number)], number)
        assert runner.call(seen, store) == [0, 1, 2]
        assert runner.call(store.last_position) == 3


# -- appends while it is open -----------------------------------------------------------------


async def test_writes_of_others_wait_for_it_and_succeed_and_reads_go_on(
    path: Path, store: SQLiteEventStore
):
    order: list[str] = []

    async def write(kind: str) -> None:
        if kind == "append":
            await store.append_events("other", "Thing", [Happened(1)], ANY)
        elif kind == "checkpoint":
            await store.checkpoints.save("other", 1)
        elif kind == "outbox":
            await store.outbox.add(OutboxMessage("topic", b"other"))
        elif kind == "transaction":
            async with store.transaction() as own:
                await own.append_events("other", "Thing", [Happened(2)], ANY)
        else:
            await another.append_events("other", "Thing", [Happened(3)], ANY)
        order.append(kind)

    kinds = ["append", "checkpoint", "outbox", "transaction", "another store"]
    with anyio.fail_after(30):
        async with SQLiteEventStore(path) as another, anyio.create_task_group() as tasks:
            async with store.transaction() as tx:
                await see(tx, 1)
                for kind in kinds:
                    tasks.start_soon(write, kind)
                await anyio.wait_all_tasks_blocked()
                for reader in (store, another):
                    assert await content(reader, "other") == ([], [0], [])
                assert len(await store.get_events("other")) == 0
                await tx.append_events("mine", "Thing", [Happened(9)], NO_STREAM)
                assert order == []
    assert sorted(order) == sorted(kinds)
    owners, checkpoints, messages = await content(store, "other")
    assert owners == ["mine", "other", "other", "other"]
    assert (checkpoints, messages) == ([1], ["other"])
    assert sorted(numbers(await store.get_events("other"))) == [1, 2, 3]


async def test_writes_that_wait_for_it_block_no_thread_and_share_a_commit(
    path: Path, watched: Watched
):
    appended = 0

    async def append(number: int) -> None:
        nonlocal appended
        await store.append_events(str(number), "Thing", [Happened(number)], NO_STREAM)
        appended += 1

    async with SQLiteEventStore(path, synchronous="NORMAL") as store:
        await prepare(store)
        async with anyio.create_task_group() as tasks:
            before = watched.count("BEGIN IMMEDIATE")
            async with store.transaction() as tx:
                await see(tx, 1)
                for number in range(1200):
                    tasks.start_soon(append, number)
                    if number % 100 == 0:
                        await store.last_position()
                assert appended == 0
                assert watched.count("BEGIN IMMEDIATE") == before + 1
        assert appended == await store.last_position() == 1200
        assert 3 <= watched.count("BEGIN IMMEDIATE") - before - 1 <= 8


async def test_a_write_that_waits_for_it_can_be_cancelled(store: SQLiteEventStore):
    async def append(number: int, scope: anyio.CancelScope) -> None:
        with scope:
            await store.append_events("a", "Thing", [Happened(number)], ANY)

    with anyio.fail_after(20):
        scopes = [anyio.CancelScope() for _ in range(4)]
        async with anyio.create_task_group() as tasks:
            async with store.transaction() as tx:
                await see(tx, 1)
                for number, scope in enumerate(scopes):
                    tasks.start_soon(append, number, scope)
                await anyio.wait_all_tasks_blocked()
                for scope in scopes[1:3]:
                    scope.cancel()
                await anyio.wait_all_tasks_blocked()
                assert [scope.cancelled_caught for scope in scopes] == [False, True, True, False]
    assert sorted(numbers(await store.get_events("a"))) == [0, 3]


async def test_it_has_its_turn_among_appends_that_never_pause(store: SQLiteEventStore):
    stop = False

    async def append(name: str) -> None:
        version = 0
        while not stop:
            await store.append_events(name, "Thing", [Happened(version)], version)
            version += 1

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(append, f"steady {number}")
            between: list[int] = []
            for number in range(20):
                async with store.transaction() as tx:
                    await see(tx, number)
                    await tx.append_events("mine", "Thing", [Happened(number)], number)
                between.append(tx.results[0].position)
            stop = True
    assert await seen(store) == list(range(20))
    # And they have theirs between two of them.
    assert sum(after - before > 1 for before, after in pairwise(between)) > 9


class Thing(AggregateRoot):
    def happen(self) -> None:
        self.apply(Happened(1))

    @applies(Happened)
    def _happened(self, event: Happened) -> None:
        pass


async def test_a_block_that_would_wait_for_itself_is_told_so(store: SQLiteEventStore):
    thing = Thing("thing")
    thing.happen()

    async def nested(*, sql: bool) -> None:
        async with store.transaction() as inner:
            await inner.checkpoints.save("reader", 1)
            if sql:
                await inner.execute(select(1))

    with anyio.fail_after(20):
        async with store.transaction() as tx:
            await append_numbers(store, 1)  # there is no SQL yet
            await see(tx, 1)
            calls: list[Callable[[], Any]] = [
                lambda: append_numbers(store, 1),
                lambda: store.checkpoints.save("reader", 1),
                lambda: store.outbox.add(OutboxMessage("topic", b"")),
                lambda: AggregateRepository(store, Thing).save(thing),
                lambda: nested(sql=False),
                lambda: nested(sql=True),
            ]
            for call in calls:
                with pytest.raises(RuntimeError, match=r"wait for itself.*tx\.append_events"):
                    await call()
            await tx.append_events("a", "Thing", [Happened(1)], 1)
        for call in calls:
            await call()
    assert await content(store, "reader") == (["a", "a", "a", "thing"], [1], [""])


async def test_tasks_that_were_started_inside_the_block_may_append_and_wait(
    store: SQLiteEventStore,
):
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            async with store.transaction() as tx:
                await see(tx, 1)
                tasks.start_soon(append_numbers, store, 2)
                await anyio.wait_all_tasks_blocked()
                assert await store.last_position() == 0
    assert await store.last_position() == 2


# -- turns ------------------------------------------------------------------------------------


async def test_transactions_with_sql_take_turns_in_their_order(store: SQLiteEventStore):
    order: list[str] = []

    async def transact(number: int, scope: anyio.CancelScope) -> None:
        with scope:
            async with store.transaction() as tx:
                await see(tx, number)
                order.append(f"begin {number}")
                await anyio.wait_all_tasks_blocked()
                await tx.append_events("a", "Thing", [Happened(number)], ANY)
                order.append(f"end {number}")

    with anyio.fail_after(30):
        scopes = [anyio.CancelScope() for _ in range(6)]
        async with anyio.create_task_group() as tasks:
            async with store.transaction() as tx:
                await tx.execute(select(1))
                for number, scope in enumerate(scopes):
                    tasks.start_soon(transact, number, scope)
                    await anyio.wait_all_tasks_blocked()
                assert order == []
                scopes[2].cancel()
                scopes[4].cancel()
    kept = [0, 1, 3, 5]
    assert order == [f"{what} {number}" for number in kept for what in ("begin", "end")]
    assert await seen(store) == numbers(await store.get_events("a")) == kept


async def test_tasks_may_use_one_transaction_at_once(store: SQLiteEventStore):
    async with store.transaction() as tx:
        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(see, tx, number)
    assert await seen(store) == list(range(20))


async def test_a_call_whose_block_was_left_meanwhile_has_no_effect(
    path: Path, store: SQLiteEventStore
):
    refused = 0

    async def late(number: int) -> None:
        nonlocal refused
        with pytest.raises(RuntimeError, match="inside its block"):
            await see(tx, number)
        refused += 1

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            with locked(path):
                async with store.transaction() as tx:
                    tasks.start_soon(late, 1)  # it waits for the lock
                    tasks.start_soon(late, 2)  # and this one for the first
                    await anyio.wait_all_tasks_blocked()
    assert refused == 2
    assert await seen(store) == []


async def test_a_call_that_waits_for_another_call_as_its_block_ends_is_refused(
    store: SQLiteEventStore,
):
    slow = Slow()
    refused = False

    async def late() -> None:
        nonlocal refused
        with pytest.raises(RuntimeError, match="inside its block"):
            await see(tx, 2)
        refused = True

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            async with store.transaction() as tx:
                tasks.start_soon(tx.run_sync, slow, 1)
                await slow.wait_begun()
                tasks.start_soon(late)
                await anyio.wait_all_tasks_blocked()
                tasks.start_soon(to_thread.run_sync, slow.go_on.set)
    assert refused
    assert await seen(store) == [1]


async def test_the_end_waits_for_a_call_at_hand_however_long_it_takes(
    store: SQLiteEventStore, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cleanup, "_SECONDS", 0.05)

    async def go_on(slow: Slow) -> None:
        await anyio.sleep(0.2)
        slow.go_on.set()

    for number, error in ((1, None), (2, KeyError)):
        slow = Slow()
        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                with suppress(KeyError):
                    async with store.transaction() as tx:
                        tasks.start_soon(tx.run_sync, slow, number)
                        await slow.wait_begun()
                        tasks.start_soon(go_on, slow)
                        if error:
                            raise error
                assert slow.ended
    assert await seen(store) == [1]


async def test_a_call_that_is_cancelled_while_it_runs_is_finished(store: SQLiteEventStore):
    slow = Slow()
    outcomes: list[str] = []

    async def run() -> None:
        with scope:
            await tx.run_sync(slow, 1)
            outcomes.append("returned")
            await anyio.sleep_forever()
        outcomes.append("cancelled")

    with anyio.fail_after(20):
        async with store.transaction() as tx:
            async with anyio.create_task_group() as tasks:
                scope = anyio.CancelScope()
                tasks.start_soon(run)
                await slow.wait_begun()
                scope.cancel()
                await anyio.wait_all_tasks_blocked()
                assert outcomes == []
                slow.go_on.set()
            assert outcomes == ["returned", "cancelled"]
    assert await seen(store) == [1]


async def test_waiting_for_another_process_can_be_cancelled(path: Path, store: SQLiteEventStore):
    transacted: list[int] = []

    async def transact(number: int) -> None:
        async with store.transaction() as tx:
            await see(tx, number)
            await tx.append_events("a", "Thing", [Happened(number)], ANY)
        transacted.append(number)

    with anyio.fail_after(20):
        with locked_by_a_process(path):
            for _ in range(2):
                with anyio.move_on_after(0.15) as scope:
                    await transact(1)
                assert scope.cancelled_caught
            async with store.transaction() as tx:
                with anyio.move_on_after(0.1) as scope:
                    await see(tx, 2)
                assert scope.cancelled_caught
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(transact, 3)
                tasks.start_soon(append_numbers, store, 1, "b")
                with anyio.move_on_after(0.2):
                    await anyio.sleep_forever()
                assert await store.last_position() == 0
                assert transacted == []
                tasks.cancel_scope.cancel()
        assert transacted == []
        async with anyio.create_task_group() as tasks:
            with locked_by_a_process(path):
                tasks.start_soon(transact, 4)
                tasks.start_soon(append_numbers, store, 1, "b")
                with anyio.move_on_after(0.2):
                    await anyio.sleep_forever()
    assert await seen(store) == numbers(await store.get_events("a")) == transacted == [4]
    assert len(await store.get_events("b")) == 1


async def test_cancelled_anywhere_it_disturbs_nobody_else(store: SQLiteEventStore):
    runs = 0

    async def transact() -> bool:
        nonlocal runs
        runs += 1
        async with store.transaction() as tx:
            await see(tx, runs)
            await tx.run_sync(lambda session: session.execute(ADD, {"number": -runs}))
        return True

    async def check(result: bool | None) -> None:
        with anyio.fail_after(20):
            await store.append_events("a", "Thing", [Happened(runs)], runs - 1)
            whole = [-runs, runs] if result else []
            assert [number for number in await seen(store) if abs(number) == runs] == whole

    async def transact_beside_appends() -> bool:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(append_numbers, store, 1, "b")
            await transact()
        return True

    assert await cancel_at_every_checkpoint(transact, check) >= 4
    assert await cancel_at_every_checkpoint(transact_beside_appends, check) >= 4


@pytest.mark.parametrize("anyio_backend", ASYNCIO_LOOPS, indirect=True)
@pytest.mark.parametrize("times", [1, 2])
async def test_a_native_cancel_leaves_nobody_on_the_connection(store: SQLiteEventStore, times: int):
    import asyncio

    slow = Slow()

    async def transact(number: int) -> None:
        async with store.transaction() as tx:
            await see(tx, number)
            await tx.append_events("a", "Thing", [Happened(number)], ANY)

    async def cancelled() -> None:
        async with store.transaction() as tx:
            await see(tx, 1)
            await tx.append_events("a", "Thing", [Happened(1)], ANY)
            await tx.run_sync(slow, 2)

    with anyio.fail_after(20):
        task = asyncio.ensure_future(cancelled())
        await slow.wait_begun()
        for _ in range(times):  # the first time its SQL, then its end
            task.cancel()
            await anyio.wait_all_tasks_blocked()
        assert task.done() is (times == 2)
        others = [asyncio.ensure_future(transact(number)) for number in (3, 4)]
        await anyio.wait_all_tasks_blocked()
        assert not slow.ended
        slow.go_on.set()
        await asyncio.wait([task, *others])
        assert task.cancelled()
        assert [other.exception() for other in others] == [None, None]
    assert slow.ended
    assert await seen(store) == numbers(await store.get_events("a")) == [3, 4]


@pytest.mark.parametrize("anyio_backend", ASYNCIO_LOOPS, indirect=True)
async def test_a_native_cancel_of_a_beginning_begins_nothing(path: Path, watched: Watched):
    import asyncio

    connecting, go_on = threading.Event(), threading.Event()

    def on_connect() -> None:
        if watched.connected:
            connecting.set()
            assert go_on.wait(20)

    async def transact(number: int) -> None:
        async with store.transaction() as tx:
            await tx.execute(text("CREATE TABLE IF NOT EXISTS seen (number)"))
            await see(tx, number)

    watched.on_connect = on_connect
    with anyio.fail_after(20):
        async with SQLiteEventStore(path) as store:
            task = asyncio.ensure_future(transact(1))
            assert await to_thread.run_sync(connecting.wait, 20)
            for _ in range(2):
                task.cancel()
                await anyio.wait_all_tasks_blocked()
            assert task.cancelled()
            other = asyncio.ensure_future(transact(2))
            await anyio.wait_all_tasks_blocked()
            go_on.set()
            await other
            assert await seen(store) == [2]
            await append_numbers(store, 1)


@pytest.mark.parametrize("anyio_backend", ASYNCIO_LOOPS, indirect=True)
async def test_an_end_that_comes_late_ends_no_other_transaction(
    store: SQLiteEventStore, monkeypatch: pytest.MonkeyPatch
):
    import asyncio

    async def cancelled() -> None:
        async with store.transaction() as tx:
            await see(tx, 1)
            await anyio.sleep_forever()

    with anyio.fail_after(20):
        late = Late(monkeypatch, "_roll_back")
        task = asyncio.ensure_future(cancelled())
        await anyio.wait_all_tasks_blocked()
        while not late.begun.is_set():
            task.cancel()
            await anyio.wait_all_tasks_blocked()
        task.cancel()
        await asyncio.wait([task])
        async with store.transaction() as tx:
            await see(tx, 2)
            await late.let_go()
            await see(tx, 3)
        await append_numbers(store, 1)
    assert await seen(store) == [2, 3]


@pytest.mark.parametrize("anyio_backend", ASYNCIO_LOOPS, indirect=True)
async def test_a_beginning_that_comes_late_begins_nothing(
    store: SQLiteEventStore, monkeypatch: pytest.MonkeyPatch
):
    import asyncio

    async def cancelled() -> None:
        async with store.transaction() as tx:
            await see(tx, 1)

    with anyio.fail_after(20):
        late = Late(monkeypatch, "_begin")
        task = asyncio.ensure_future(cancelled())
        await late.wait_begun()
        task.cancel()
        await asyncio.wait([task])
        await late.let_go()
        await append_numbers(store, 1)
    assert await seen(store) == []


async def test_a_task_is_not_taken_for_another_that_has_ended(
    store: SQLiteEventStore, monkeypatch: pytest.MonkeyPatch
):
    """An id may be given out again, as an address in memory is."""
    monkeypatch.setattr(anyio, "get_current_task", lambda: SimpleNamespace(id=7))
    begun = anyio.Event()

    async def append() -> None:
        await begun.wait()
        await append_numbers(store, 1)

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(append)
            async with store.transaction() as tx:
                await see(tx, 1)
                begun.set()
                await anyio.wait_all_tasks_blocked()
    assert await store.last_position() == 1


# -- closing ----------------------------------------------------------------------------------


async def test_a_store_that_is_closed_inside_the_block_rolls_it_back(path: Path):
    store = SQLiteEventStore(path)
    async with store:
        await prepare(store)
        with pytest.raises(StoreClosedError):
            async with store.transaction() as tx:
                await see(tx, 1)
                await tx.append_events("a", "Thing", [Ended()], ANY)
                await store.__aexit__(None, None, None)
                assert [entry.name for entry in path.parent.iterdir()] == [path.name]
                for _ in range(2):
                    with pytest.raises(StoreClosedError):
                        await tx.execute(select(1))
        with pytest.raises(StoreClosedError):
            async with store.transaction() as tx:
                await tx.execute(select(1))
    async with store:
        assert await seen(store) == []
        assert await store.last_position() == 0


async def test_closing_waits_for_the_call_at_hand_and_refuses_who_waits(path: Path):
    slow = Slow()
    outcomes: list[str] = []

    async def transact() -> None:
        with pytest.raises(StoreClosedError):
            async with store.transaction() as tx:
                await tx.run_sync(slow, 1)
                outcomes.append("run")
        outcomes.append("refused")

    async def wait_for_a_turn() -> None:
        with pytest.raises(StoreClosedError):
            async with store.transaction() as tx:
                await see(tx, 2)
        outcomes.append("refused")

    async def append() -> None:
        with pytest.raises(StoreClosedError):
            await append_numbers(store, 1)
        outcomes.append("refused")

    async def close() -> None:
        await store.__aexit__(None, None, None)
        outcomes.append("closed")

    with anyio.fail_after(20):
        async with SQLiteEventStore(path) as store:
            await prepare(store)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(transact)
                await slow.wait_begun()
                for task in (wait_for_a_turn, wait_for_a_turn, append):
                    tasks.start_soon(task)
                await anyio.wait_all_tasks_blocked()
                tasks.start_soon(close)
                await anyio.wait_all_tasks_blocked()
                assert outcomes == []
                slow.go_on.set()
    assert sorted(outcomes) == ["closed", *["refused"] * 4, "run"]
    async with SQLiteEventStore(path) as store:
        assert await seen(store) == []
        assert await store.last_position() == 0


async def test_closing_does_not_wait_for_the_end_of_a_block(path: Path):
    refused = 0

    held = anyio.Event()

    async def hold() -> None:
        async with store.transaction() as tx:
            await tx.execute(select(1))
            held.set()
            await anyio.sleep_forever()

    async def wait_for_a_turn() -> None:
        nonlocal refused
        with pytest.raises(StoreClosedError):
            async with store.transaction() as tx:
                await tx.execute(select(1))
        refused += 1

    with anyio.fail_after(20):
        async with SQLiteEventStore(path) as store, anyio.create_task_group() as tasks:
            tasks.start_soon(hold)
            await held.wait()
            tasks.start_soon(wait_for_a_turn)
            tasks.start_soon(wait_for_a_turn)
            await anyio.wait_all_tasks_blocked()
            await store.__aexit__(None, None, None)
            while refused < 2:
                await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()


async def test_a_block_that_ends_while_the_store_is_closing_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
):
    late = Late(monkeypatch, "_shut")
    refused = 0
    first = anyio.Event()

    async def wait(call: Callable[[], Awaitable[object]]) -> None:
        nonlocal refused
        with pytest.raises(StoreClosedError):
            await call()
        refused += 1
        first.set()

    with anyio.fail_after(20):
        async with SQLiteEventStore(path) as store, anyio.create_task_group() as tasks:
            await prepare(store)
            with pytest.raises(StoreClosedError):
                async with store.transaction() as tx:
                    await see(tx, 1)
                    tasks.start_soon(wait, lambda: append_numbers(store, 1))
                    tasks.start_soon(wait, lambda: seen(store))
                    await anyio.wait_all_tasks_blocked()
                    tasks.start_soon(store.__aexit__, None, None, None)
                    await late.wait_begun()
            await first.wait()
            assert refused == 1  # the one that now had its turn
            await late.let_go()
    assert refused == 2
    async with SQLiteEventStore(path) as store:
        assert await seen(store) == []


async def test_closing_does_not_wait_for_another_process(path: Path):
    refused = 0

    async def transact() -> None:
        nonlocal refused
        with pytest.raises(StoreClosedError):
            async with store.transaction() as tx:
                await tx.execute(select(1))
        refused += 1

    with anyio.fail_after(20):
        async with SQLiteEventStore(path) as store, anyio.create_task_group() as tasks:
            with locked(path):
                tasks.start_soon(transact)
                tasks.start_soon(transact)
                await anyio.wait_all_tasks_blocked()
                await store.__aexit__(None, None, None)
                while refused < 2:
                    await anyio.wait_all_tasks_blocked()


# -- what the user's SQL does -----------------------------------------------------------------


async def test_a_sessions_own_commit_and_rollback_stay_inside(store: SQLiteEventStore):
    def add_and_commit(session: Session) -> None:
        session.execute(ADD, {"number": 1})
        session.commit()
        session.execute(ADD, {"number": 2})
        session.rollback()
        session.execute(ADD, {"number": 3})

    with pytest.raises(KeyError):
        async with store.transaction() as tx:
            await tx.run_sync(add_and_commit)
            raise KeyError
    assert await seen(store) == []
    async with store.transaction() as tx:
        await tx.run_sync(add_and_commit)
        await tx.append_events("a", "Thing", [Ended()], ANY)
    assert await seen(store) == [1, 3]
    assert await store.last_position() == 1


def commit_the_connection(session: Session) -> None:
    session.connection().commit()


def roll_back_in_sql(session: Session) -> None:
    session.rollback()
    session.connection().exec_driver_sql("ROLLBACK")


def roll_back_on_a_conflict(session: Session) -> None:
    session.execute(text("INSERT OR ROLLBACK INTO seen VALUES (0)"))


def roll_back_and_close(session: Session) -> None:
    session.execute(text("ROLLBACK"))
    session.close()


ENDS = [commit_the_connection, roll_back_in_sql, roll_back_on_a_conflict, roll_back_and_close]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
async def test_a_transaction_that_was_ended_inside_its_block_fails(
    store: SQLiteEventStore, end: Callable[[Session], None]
):
    async with store.transaction() as tx:
        await see(tx, 0)
    for sql_follows in (True, False):
        with pytest.raises((RuntimeError, InvalidRequestError)):
            async with store.transaction() as tx:
                await see(tx, 1)
                await tx.append_events("a", "Thing", [Ended()], ANY)
                with suppress(IntegrityError, RuntimeError):  # as if nothing had happened
                    await tx.run_sync(end)
                if sql_follows:
                    await see(tx, 2)
        assert await seen(store) == [0]
        assert await store.last_position() == 0
    async with store.transaction() as tx:
        await see(tx, 3)
        await tx.append_events("a", "Thing", [Ended()], NO_STREAM)
    assert await seen(store) == [0, 3]


async def test_what_is_loaded_outside_the_calls_is_refused(store: SQLiteEventStore):
    async with store.transaction() as tx:
        await tx.run_sync(lambda session: Base.metadata.create_all(session.connection()))
        account = await tx.run_sync(open_account, "a", entries=2)
        await tx.run_sync(lambda session: session.flush())
        found = (await tx.execute(select(Account))).scalar_one()
        await tx.run_sync(lambda session: session.expire_all())
        with pytest.raises(RuntimeError, match=r"block the event loop.*selectinload"):
            _ = found.entries
        await tx.run_sync(lambda session: session.refresh(found))
        assert found is account
    async with store.transaction() as tx:
        with pytest.raises(IntegrityError):
            await tx.execute(insert(Entry).values(number=0, account="a"))


async def test_the_stores_own_tables_may_be_changed_too(store: SQLiteEventStore):
    """Nothing that is known of streams from before holds then."""
    for _ in range(2):
        async with store.transaction() as tx:
            await tx.execute(text("DELETE FROM events"))
            await tx.append_events("a", "Thing", [Happened(1), Happened(2)], NO_STREAM)
        assert [one.version for one in tx.results] == [2]
        assert (await store.append_events("a", "Thing", [Happened(3)], 2)).version == 3
        async with store.transaction() as tx:
            await tx.execute(select(1))
            await tx.append_events("a", "Thing", [Happened(4)], 3)
        assert (await store.append_events("a", "Thing", [Happened(5)], 4)).position == 5


async def test_a_write_that_fails_says_so_and_takes_everything_back(store: SQLiteEventStore):
    with pytest.raises(StorageError, match="no such table: events") as raised:
        async with store.transaction() as tx:
            await see(tx, 1)
            await tx.append_events("a", "Thing", [Ended()], ANY)
            await tx.execute(text("ALTER TABLE events RENAME TO elsewhere"))
    assert isinstance(raised.value.__cause__, sqlite3.Error)
    assert await seen(store) == []
    await append_numbers(store, 1)


async def test_a_file_that_fails_says_so_when_it_begins(path: Path, watched: Watched):
    async with SQLiteEventStore(path) as store:
        await anyio.Path(path).rename(path.with_name("elsewhere"))
        await anyio.Path(path).mkdir()
        for _ in range(2):
            with pytest.raises(StorageError, match="cannot be opened"):
                async with store.transaction() as tx:
                    await tx.execute(select(1))
        await append_numbers(store, 1)  # nobody is in the way


async def test_a_subscriber_of_the_same_store_is_woken_without_polling(path: Path):
    async with SQLiteEventStore(path, poll_every=float("inf")) as store:
        async with store.subscribe() as subscription:
            for number in range(3):
                with anyio.fail_after(20):
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(_transact_when_it_waits, store, number)
                        assert numbers([await anext(subscription)]) == [number]


async def _transact_when_it_waits(store: SQLiteEventStore, number: int) -> None:
    await anyio.wait_all_tasks_blocked()
    await store.last_position()  # after its own read
    await anyio.wait_all_tasks_blocked()
    async with store.transaction() as tx:
        await tx.execute(select(1))
        await tx.append_events("a", "Thing", [Happened(number)], ANY)


# -- killed -----------------------------------------------------------------------------------

PROGRAM = """if True:
    import json, os, sys
    import anyio
    from sqlalchemy import text
    from eventsource_anyio import ANY, SQLiteEventStore
    from eventsource_anyio.testing.samples import Happened

    async def main(path, last):
        async with SQLiteEventStore(path, synchronous="NORMAL") as store:
            async with store.transaction() as tx:
                await tx.execute(text("CREATE TABLE IF NOT EXISTS seen (number INTEGER)"))
            while True:
                position = await store.checkpoints.get("reader")
                async with store.transaction() as tx:
                    await tx.append_events("a", "Thing", [Happened(position)], position)
                    await tx.execute(text(f"INSERT INTO seen VALUES ({position})"))
                    await tx.checkpoints.save("reader", position + 1, expected=position)
                    if position == last:
                        os.write(1, b"inside")
                        await anyio.sleep_forever()
                os.write(1, b"%d " % position)

    path, last, backend, options = json.loads(sys.argv[1])
    anyio.run(main, path, last, backend=backend, backend_options=options)
"""


@pytest.mark.skipif(os.name != "posix", reason="there is no SIGKILL")
@pytest.mark.parametrize("last", [0, 20, None])
def test_of_a_killed_process_nothing_is_there_by_half(
    path: Path, anyio_backend: tuple[str, dict[str, Any]], last: int | None
):
    backend, options = anyio_backend
    arguments = json.dumps([str(path), last, backend, options])
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, arguments], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        said = os.read(process.stdout.fileno(), 1)
        if last is None:
            sleep(uniform(0, 0.3))
        else:
            while not said.endswith(b"inside"):
                said += process.stdout.read(1)
        process.send_signal(signal.SIGKILL)
        said += process.stdout.read()
    acknowledged = len(said.replace(b"inside", b"").split())

    async def check() -> None:
        async with SQLiteEventStore(path) as store:
            whole = await store.checkpoints.get("reader")
            assert acknowledged <= whole <= acknowledged + (last is None)
            assert numbers(await store.get_events("a")) == await seen(store) == list(range(whole))

    anyio.run(check, backend=backend, backend_options=options)
