"""The SQLite store as a file, a thread and a connection: what its contract leaves open."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any, Literal
from uuid import UUID

import anyio
import anyio.lowlevel
import pytest
from anyio import to_thread

from eventsource_anyio import (
    ANY,
    NO_STREAM,
    AppendResult,
    ConcurrencyError,
    DuplicateEventError,
    EventSourceError,
    NewEvent,
    OutboxMessage,
    ReadOptions,
    SQLiteEventStore,
    StorageError,
    StoreClosedError,
    StoredEvent,
)
from eventsource_anyio.ids import slice_of
from eventsource_anyio.stores.sqlite import database
from eventsource_anyio.testing import cancel_at_every_checkpoint
from eventsource_anyio.testing.samples import Ended, Happened, append_numbers, numbers

connect = sqlite3.connect

ASYNCIO_LOOPS = ["asyncio", *(["uvloop"] if sys.platform != "win32" else [])]
LOOK = database._LAST
VERSION_1 = Path(__file__).with_name("sqlite_version_1.sql")
VERSION_2 = Path(__file__).with_name("sqlite_version_2.sql")


class Watched:
    """What SQLite is asked by the stores of a test, in order, and on which threads."""

    def __init__(self) -> None:
        self.statements: list[str] = []
        self.threads: set[int] = set()
        self.connected = 0
        self.looks = threading.Semaphore(0)
        self.on_connect: Callable[[sqlite3.Connection], object] = lambda _: None
        self.on_statement: Callable[[str], object] = lambda _: None

    def connect(self, path: str, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(path, **options)
        self.threads.add(threading.get_ident())
        self.connected += 1
        connection.set_trace_callback(self._traced)
        self.on_connect(connection)
        return connection

    def _traced(self, statement: str) -> None:
        self.threads.add(threading.get_ident())
        self.statements.append(statement)
        self.on_statement(statement)
        if statement == LOOK:
            self.looks.release()

    async def looked(self) -> bool:
        """Wait until the store has looked for the events of other processes."""
        return await to_thread.run_sync(self.looks.acquire, True, 20.0)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    watched = Watched()
    monkeypatch.setattr(sqlite3, "connect", watched.connect)
    return watched


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.db"


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """Whatever a test does to its stores, their threads end."""
    yield
    for thread in threading.enumerate():
        if thread.name == SQLiteEventStore.__name__:
            thread.join(10)
            assert not thread.is_alive()


def content(directory: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in directory.iterdir()}


async def read(store: SQLiteEventStore) -> list[StoredEvent]:
    return [stored async for stored in store.read_all()]


def make_version_1(path: Path, script: Path = VERSION_1) -> None:
    connection = connect(path)
    connection.executescript(script.read_text(encoding="utf-8"))
    connection.close()


def make_version_2(path: Path) -> None:
    make_version_1(path, VERSION_2)


def execute(path: Path, statement: str) -> list[tuple[object, ...]]:
    connection = connect(path)
    found = connection.execute(statement).fetchall()
    connection.close()
    return found


def insert_rows(path: Path, first: int, count: int) -> None:
    """Events as another process stores them, but quicker."""
    rows = [
        (number, number, UUID(int=number).bytes, Ended.event_type)
        for number in range(first, first + count)
    ]
    connection = connect(path)
    connection.executemany(
        "INSERT INTO events VALUES (?, 'Many', 'all', ?, ?, ?, 1, 0, NULL, NULL, '{}')", rows
    )
    connection.commit()
    connection.close()


# -- the file ---------------------------------------------------------------------------------


async def test_a_file_that_is_opened_again_has_everything(path: Path):
    async with SQLiteEventStore(path) as store:
        await append_numbers(store, 3)
        await store.append_events("b", "Thing", [Ended()], NO_STREAM, metadata={"user": "ann"})
        before = await read(store)
    async with SQLiteEventStore(str(path)) as store:
        assert await read(store) == before
        assert await store.last_position() == before[-1].position
        result = await store.append_events("a", "Thing", [Happened(3)], 3)
        assert result.position == before[-1].position + 1


async def test_a_store_can_be_opened_again(path: Path):
    store = SQLiteEventStore(path)
    for version in (1, 2):
        async with store:
            assert (await store.append_events("a", "Thing", [Ended()], ANY)).version == version


async def test_an_open_store_is_not_opened_twice_and_stays_open(path: Path):
    async with SQLiteEventStore(path) as store:
        with pytest.raises(RuntimeError, match="open already"):
            await store.__aenter__()
        await append_numbers(store, 1)


@pytest.mark.parametrize("synchronous", ["FULL", "NORMAL"])
async def test_a_commit_is_as_durable_as_was_asked_for(
    path: Path, watched: Watched, synchronous: Literal["FULL", "NORMAL"]
):
    async with SQLiteEventStore(path, synchronous=synchronous):
        pass
    assert watched.statements[0] == f"PRAGMA synchronous = {synchronous}"
    assert len([one for one in watched.statements if "synchronous" in one]) == 1
    connection = connect(path)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


async def test_two_stores_may_have_one_file(path: Path):
    async with SQLiteEventStore(path) as one, SQLiteEventStore(path) as other:
        await append_numbers(one, 2)
        await append_numbers(other, 2)
        assert await read(one) == await read(other)
        assert len(await read(one)) == 4


async def test_the_file_of_another_program_is_refused_and_left_alone(path: Path):
    connection = connect(path)
    connection.execute("CREATE TABLE theirs (a, b)")
    connection.close()
    before = content(path.parent)
    with pytest.raises(StorageError, match=r"tables of another program\n.*a file of its own"):
        async with SQLiteEventStore(path):
            pass
    assert content(path.parent) == before


async def test_an_empty_file_may_have_been_numbered_by_another_program(path: Path):
    connection = connect(path)
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    async with SQLiteEventStore(path) as store:
        await append_numbers(store, 1)
    assert execute(path, "PRAGMA user_version") == [(3,)]


async def test_a_file_of_a_newer_version_is_refused_and_left_alone(path: Path):
    async with SQLiteEventStore(path) as store:
        await append_numbers(store, 1)
    connection = connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    before = content(path.parent)
    with pytest.raises(StorageError, match=r"schema version is 99.*\n.*Update this program"):
        async with SQLiteEventStore(path):
            pass
    assert content(path.parent) == before


async def test_a_file_of_version_1_is_upgraded_when_it_is_opened(path: Path):
    make_version_1(path)
    for opened in (1, 2):
        async with SQLiteEventStore(path) as store:
            first, second = (await read(store))[:2]
            assert (first.event, first.event_id) == (Happened(7, "old"), UUID(int=1))
            assert (first.metadata, second.version) == ({"user": "ann"}, 2)
            assert await store.checkpoints.get("reader") == opened - 1
            async with store.transaction() as tx:
                await tx.append_events("a", "Thing", [Ended()], 1 + opened)
                await tx.checkpoints.save("reader", opened, expected=opened - 1)
                await tx.outbox.add(OutboxMessage("t", b""))
            assert len(await store.outbox.pending()) == opened
            assert await store.last_position() == 2 + opened
        assert execute(path, "PRAGMA user_version") == [(3,)]


async def test_a_file_of_version_2_is_upgraded_when_it_is_opened(path: Path):
    make_version_2(path)
    for opened in (1, 2):
        async with SQLiteEventStore(path) as store:
            assert len(await read(store)) == 2
            assert await store.checkpoints.get("old") == 2
            (stored,) = await store.outbox.pending()
            assert (stored.position, stored.message.message_id) == (7, UUID(int=3))
            await store.documents.add("c", str(opened), opened)
            assert len(await store.documents.list("c")) == opened
        assert execute(path, "PRAGMA user_version") == [(3,)]


@pytest.mark.parametrize("make_old", [make_version_1, make_version_2])
async def test_an_upgraded_file_is_as_one_that_was_made_so(
    tmp_path: Path, make_old: Callable[[Path], None]
):
    schemas: list[list[tuple[object, ...]]] = []
    for name in ("old.db", "new.db"):
        if name == "old.db":
            make_old(tmp_path / name)
        async with SQLiteEventStore(tmp_path / name):
            pass
        found = execute(tmp_path / name, "SELECT type, name, sql FROM sqlite_master")
        schemas.append(
            sorted((kind, name, " ".join(str(sql).split())) for kind, name, sql in found)
        )
    assert schemas[0] == schemas[1]
    assert {("table", "outbox"), ("table", "documents")} <= {one[:2] for one in schemas[0]}


async def test_an_upgrade_that_fails_has_changed_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
):
    make_version_1(path)
    monkeypatch.setattr(database, "_SCHEMA", (*database._SCHEMA, ("CREATE TABLE events (x)",)))
    with pytest.raises(StorageError, match="events already exists"):
        async with SQLiteEventStore(path):
            pass
    assert execute(path, "PRAGMA user_version") == [(1,)]
    assert execute(path, "SELECT name FROM sqlite_master WHERE type = 'table'") == [("events",)]
    monkeypatch.undo()
    async with SQLiteEventStore(path) as store:
        assert await store.last_position() == 2
        assert await store.outbox.pending() == []


def text(path: Path) -> Path:
    path.write_text("Dear diary, today I have been mistaken for a database. " * 99)
    return path


def directory(path: Path) -> Path:
    path.mkdir()
    return path


def nowhere(path: Path) -> Path:
    return path.parent / "missing" / path.name


def in_a_read_only_directory(path: Path) -> Path:
    inner = path.parent / "read_only"
    inner.mkdir()
    protect(inner)
    return inner / path.name


def protect(path: Path) -> None:
    path.chmod(0o500)
    if os.access(path, os.W_OK):
        pytest.skip("this user may write anywhere")


@pytest.mark.parametrize("make", [text, directory, nowhere, in_a_read_only_directory])
async def test_what_cannot_be_opened_is_refused_and_says_which_file(
    path: Path, make: Callable[[Path], Path]
):
    bad = make(path)
    with pytest.raises(StorageError, match="cannot be opened") as raised:
        async with SQLiteEventStore(bad):
            pass
    assert str(bad) in str(raised.value)
    assert isinstance(raised.value.__cause__, sqlite3.Error)


async def test_a_read_only_file_can_be_read(path: Path):
    async with SQLiteEventStore(path) as store:
        await append_numbers(store, 3)
    protect(path)
    async with SQLiteEventStore(path) as store:
        assert numbers(await read(store)) == [0, 1, 2]
        with pytest.raises(StorageError, match="readonly"):
            await append_numbers(store, 1)
        assert numbers(await read(store)) == [0, 1, 2]


def test_what_is_no_file_and_no_setting_is_refused():
    for refused, settings, why in (
        (":memory:", {}, "InMemoryEventStore"),
        ("", {}, "must be a file"),
        ("events.db", {"synchronous": "OFF"}, "'FULL' or 'NORMAL'"),
        ("events.db", {"synchronous": "full"}, "'FULL' or 'NORMAL'"),
        ("events.db", {"poll_every": 0}, "above 0"),
        ("events.db", {"poll_every": -1}, "above 0"),
        ("events.db", {"poll_every": float("nan")}, "above 0"),
    ):
        with pytest.raises(ValueError, match=why):
            SQLiteEventStore(refused, **settings)


@pytest.mark.parametrize("before", [None, make_version_1, make_version_2])
async def test_another_process_may_make_the_file_at_any_moment_of_its_opening(
    tmp_path: Path, watched: Watched, before: Callable[[Path], None] | None
):
    """Before the nth statement of its opening, for every n, until there is no nth."""

    async def open_with_another_at(path: Path, nth: int) -> bool:
        left = nth

        def make_it_first(_: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                with suppress(sqlite3.OperationalError):  # it is locked already
                    database.SQLiteDatabase(path, "NORMAL").connect().close()

        if before:
            before(path)
        watched.on_statement = make_it_first
        async with SQLiteEventStore(path, synchronous="NORMAL") as store:
            watched.on_statement = lambda _: None
            await append_numbers(store, 1)
            await store.checkpoints.save("reader", 1, expected=0)
            assert await store.last_position() == (3 if before else 1)
        assert execute(path, "PRAGMA user_version") == [(3,)]
        return left <= 0

    nth = 1
    while await open_with_another_at(tmp_path / f"{nth}.db", nth):
        nth += 1
    assert nth > 5


async def test_a_full_disk_fails_what_does_not_fit_and_nothing_else(path: Path, watched: Watched):
    watched.on_connect = lambda connection: connection.execute("PRAGMA max_page_count = 60")
    too_large = Happened(0, "x" * 400_000)
    stored: set[str] = set()
    failed: set[str] = set()

    async def append(name: str, *events: Happened) -> None:
        try:
            await store.append_events(name, "Thing", events, NO_STREAM)
        except StorageError as error:
            assert "full" in str(error)  # noqa: PT017
            failed.add(name)
        else:
            stored.add(name)

    async def transact() -> None:
        with pytest.raises(StorageError):
            async with store.transaction() as tx:
                await tx.append_events("first", "Thing", [Happened()], NO_STREAM)
                await tx.append_events("second", "Thing", [Happened(), too_large], NO_STREAM)

    async with SQLiteEventStore(path, synchronous="NORMAL") as store:
        for attempt in range(3):
            async with anyio.create_task_group() as tasks:
                for number in range(10):
                    tasks.start_soon(append, f"{attempt}small{number}", Happened(number))
                tasks.start_soon(append, f"{attempt}large", too_large)
                tasks.start_soon(append, f"{attempt}last_is_large", Happened(), too_large)
                tasks.start_soon(transact)
        assert failed == {f"{nth}{what}" for nth in range(3) for what in ("large", "last_is_large")}
        assert len(stored) == 30
        assert {one.aggregate_id for one in await read(store)} == stored
    async with SQLiteEventStore(path) as store:
        assert {one.aggregate_id for one in await read(store)} == stored


async def test_a_disk_that_was_full_for_a_while_has_lost_nothing_that_was_acknowledged(path: Path):
    resource = pytest.importorskip("resource")
    stored: list[UUID] = []
    failures = 0

    async def append(number: int) -> None:
        nonlocal failures
        events = [NewEvent(Happened(number, "x" * 2000)) for _ in range(3)]
        try:
            await store.append_events(str(number), "Thing", events, NO_STREAM)
        except StorageError:
            failures += 1
        else:
            stored.extend(event.event_id for event in events)

    async with SQLiteEventStore(path, synchronous="NORMAL") as store:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
        try:
            for first in range(0, 60, 6):
                async with anyio.create_task_group() as tasks:
                    for number in range(first, first + 6):
                        tasks.start_soon(append, number)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert failures
        assert stored
        await append(60)
        assert len(stored) == 3 * (61 - failures)
        assert {one.event_id for one in await read(store)} == set(stored)
    async with SQLiteEventStore(path) as store:
        assert {one.event_id for one in await read(store)} == set(stored)
    connection = connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()


async def test_recorded_at_never_goes_back_even_if_the_clock_does(
    path: Path, monkeypatch: pytest.MonkeyPatch
):
    now = 1_700_000_000_000_000_000
    monkeypatch.setattr(database, "time_ns", lambda: now)
    for step in (0, 5_000_000_000, -60_000_000_000, 1_000, 3_600_000_000_000):
        now += step
        async with SQLiteEventStore(path, synchronous="NORMAL") as store:
            await append_numbers(store, 2)
            now -= 1_000_000_000
            await append_numbers(store, 1)
            events = await read(store)
    moments = [stored.recorded_at for stored in events]
    assert moments == sorted(moments)
    assert len(set(moments)) == 3


async def test_rare_events_are_searched_for_in_bounded_steps(path: Path, watched: Watched):
    async with SQLiteEventStore(path, synchronous="NORMAL") as store:
        rare = [Happened(1), Happened(2)]
        await store.append_events("a", "Thing", rare[:1], ANY)
        insert_rows(path, first=2, count=120_000)
        last = (await store.append_events("a", "Thing", rare[1:], ANY)).position
        assert last == 120_002

        for backwards in (False, True):
            watched.statements.clear()
            options = ReadOptions(event_types=(Happened.event_type,), backwards=backwards)
            found = [stored.event async for stored in store.read_all(options)]
            assert found == (rare[::-1] if backwards else rare)
            assert len([one for one in watched.statements if "BETWEEN" in one]) == 3
        options = ReadOptions(aggregate_types=("Thing",))
        async with store.subscribe(after=1, options=options) as subscription:
            with anyio.fail_after(20):
                assert (await anext(subscription)).event == rare[1]
            assert subscription.position == last


async def test_slices_are_searched_for_in_bounded_steps(
    path: Path, watched: Watched, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(database, "_HASHED_AT_MOST", 1_000)
    async with SQLiteEventStore(path, synchronous="NORMAL") as store:
        rare = [Happened(1), Happened(2)]
        await store.append_events("a", "Thing", rare[:1], ANY)
        insert_rows(path, first=2, count=2_500)
        await store.append_events("a", "Thing", rare[1:], ANY)
        number = slice_of("Thing-a")
        for backwards in (False, True):
            watched.statements.clear()
            options = ReadOptions(slices=range(number, number + 1), backwards=backwards)
            found = [stored.event async for stored in store.read_all(options)]
            assert found == (rare[::-1] if backwards else rare)
            assert len([one for one in watched.statements if "BETWEEN" in one]) == 3


# -- the group commit -------------------------------------------------------------------------


async def test_concurrent_appends_share_commits(path: Path, watched: Watched):
    async with SQLiteEventStore(path, synchronous="NORMAL") as store:
        watched.statements.clear()
        async with anyio.create_task_group() as tasks:
            for number in range(1000):
                tasks.start_soon(append_numbers, store, 1, str(number))
        assert watched.statements.count("COMMIT") < 50
        assert len(await read(store)) == 1000


async def test_a_lone_append_waits_for_no_other_and_no_timer(path: Path, watched: Watched):
    async with SQLiteEventStore(path, synchronous="NORMAL", poll_every=float("inf")) as store:
        watched.statements.clear()
        with anyio.fail_after(20):
            for _ in range(200):
                await append_numbers(store, 1)
        assert watched.statements.count("COMMIT") == 200


async def test_an_error_in_a_group_is_its_own_callers_only(path: Path, watched: Watched):
    known = NewEvent(Happened(-1))
    outcomes: dict[int, type[EventSourceError]] = {}

    async def append(number: int) -> None:
        try:
            if number % 4 == 1:
                await store.append_events("conflict", "Thing", [Ended()], 7)
            elif number % 4 == 2:
                await store.append_events(str(number), "Thing", [Ended(), known], ANY)
            elif number % 4 == 3:
                async with store.transaction() as tx:
                    await tx.append_events(str(number), "Thing", [Happened(number)], 0)
                    await tx.append_events(str(number), "Thing", [Happened(number)], 0)
            else:
                await store.append_events(str(number), "Thing", [Happened(number)], 0)
        except EventSourceError as error:
            outcomes[number] = type(error)

    async with SQLiteEventStore(path, synchronous="NORMAL") as store:
        await store.append_events("known", "Thing", [known], ANY)
        watched.statements.clear()
        async with anyio.create_task_group() as tasks:
            for number in range(80):
                tasks.start_soon(append, number)
        assert watched.statements.count("COMMIT") < 20
        assert watched.statements.count("ROLLBACK") == 0
        kinds = {1: ConcurrencyError, 2: DuplicateEventError, 3: ConcurrencyError}
        assert outcomes == {number: kinds[number % 4] for number in range(80) if number % 4}
        events = await read(store)
        assert sorted(numbers(events)) == [-1, *range(0, 80, 4)]
        assert [stored.position for stored in events] == list(range(1, 22))


async def test_ten_thousand_appends_at_once(path: Path):
    async with SQLiteEventStore(path, synchronous="NORMAL") as store:
        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                for number in range(10_000):
                    tasks.start_soon(append_numbers, store, 1, str(number % 1000))
        assert await store.last_position() == 10_000
        assert len(await store.get_events("999", "Thing")) == 10


async def test_a_reader_sees_positions_in_the_order_of_commits(path: Path):
    """What it has seen up to a position is all that there will ever be up to there."""
    done = False
    seen: list[list[int]] = []

    def tail() -> None:
        connection = connect(path)
        while not done:
            rows = connection.execute("SELECT position FROM events ORDER BY position").fetchall()
            seen.append([row[0] for row in rows])
        connection.close()

    async def append(number: int) -> None:
        for _ in range(10):
            await append_numbers(store, 3, str(number))

    async with SQLiteEventStore(path, synchronous="NORMAL") as store:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(to_thread.run_sync, tail)
            async with anyio.create_task_group() as writers:
                for number in range(30):
                    writers.start_soon(append, number)
            done = True
        positions = [stored.position for stored in await read(store)]
    assert len(positions) == 900
    assert all(some == positions[: len(some)] for some in seen)


# -- giving up --------------------------------------------------------------------------------


async def assert_repeatable(
    store: SQLiteEventStore,
    appended: dict[str, list[NewEvent]],
    returned: dict[str, AppendResult],
) -> None:
    """Each append is whole or not there, and made again it gives what it gave, or would have."""
    before = {stored.event_id: stored for stored in await read(store)}
    for aggregate_id, events in appended.items():
        stored = [before[one.event_id] for one in events if one.event_id in before]
        assert len(stored) in (0, len(events))
        again = await store.append_events(aggregate_id, "Thing", events, NO_STREAM)
        assert again.version == len(events)
        if aggregate_id in returned:
            assert again == returned[aggregate_id]
        if stored:
            assert again.events == tuple(stored)
    after = await read(store)
    assert len(after) == sum(map(len, appended.values()))
    assert [stored.position for stored in after] == list(range(1, len(after) + 1))


def some_appends(random: Random, count: int) -> dict[str, list[NewEvent]]:
    return {
        str(number): [NewEvent(Happened(number)) for _ in range(random.randint(1, 3))]
        for number in range(count)
    }


async def test_appends_with_random_deadlines_are_stored_if_they_return_and_can_be_repeated(
    path: Path,
):
    random = Random(7)
    appended = some_appends(random, 2000)
    returned: dict[str, AppendResult] = {}

    async def append(aggregate_id: str, patience: float) -> None:
        with anyio.move_on_after(patience):
            result = await store.append_events(
                aggregate_id, "Thing", appended[aggregate_id], NO_STREAM
            )
            returned[aggregate_id] = result

    async with SQLiteEventStore(path, synchronous="NORMAL") as store:
        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                for aggregate_id in appended:
                    patience = random.choice((0, random.uniform(0, 0.3), 60))
                    tasks.start_soon(append, aggregate_id, patience)
            assert 600 < len(returned) < 1800
            assert {stored.aggregate_id for stored in await read(store)} == returned.keys()
            await assert_repeatable(store, appended, returned)


async def test_an_append_that_is_cancelled_while_it_is_written_returns_if_it_is_stored(path: Path):
    runs = 0
    outcomes: list[bool] = []

    async def append() -> AppendResult:
        nonlocal runs
        runs += 1
        return await store.append_events(str(runs), "Thing", [Happened(runs)], NO_STREAM)

    async def check(result: AppendResult | None) -> None:
        stored = await store.get_events(str(runs), "Thing")
        assert stored.version == (result.version if result else 0)
        outcomes.append(result is not None)

    async with SQLiteEventStore(path) as store:
        await cancel_at_every_checkpoint(append, check)
    assert outcomes[-1]


@pytest.mark.parametrize("anyio_backend", ASYNCIO_LOOPS, indirect=True)
async def test_a_native_cancel_of_an_append_ends_well(path: Path):
    import asyncio

    random = Random(7)
    appended = some_appends(random, 600)
    returned: dict[str, AppendResult] = {}
    async with SQLiteEventStore(path, synchronous="NORMAL") as store:
        for first in range(0, len(appended), 30):
            tasks = {
                name: asyncio.ensure_future(
                    store.append_events(name, "Thing", appended[name], NO_STREAM)
                )
                for name in map(str, range(first, first + 30))
            }
            cancelled: list[asyncio.Task[AppendResult]] = []
            for task in random.sample(list(tasks.values()), 20):
                await anyio.lowlevel.checkpoint()
                if task.cancel():
                    cancelled.append(task)
            with anyio.fail_after(20):
                await asyncio.wait(tasks.values())
            assert all(task.cancelled() for task in cancelled)
            for name, task in tasks.items():
                if task not in cancelled:
                    returned[name] = task.result()
        assert 200 <= len(returned) < 600
        await assert_repeatable(store, appended, returned)


# -- the thread -------------------------------------------------------------------------------


async def test_sqlite_is_never_called_on_the_event_loops_thread(path: Path, watched: Watched):
    async with SQLiteEventStore(path) as store:
        await append_numbers(store, 3)
        with pytest.raises(ConcurrencyError):
            await store.append_events("a", "Thing", [Ended()], NO_STREAM)
        async with store.transaction() as tx:
            await tx.append_events("b", "Thing", [Ended()], ANY)
        await store.get_events("a")
        await read(store)
        async with store.subscribe() as subscription:
            await anext(subscription)
        await store.last_position()
    assert len(watched.statements) > 10
    assert len(watched.threads) == 1
    assert threading.get_ident() not in watched.threads


async def test_opening_can_be_cancelled_at_any_point_and_leaves_nothing_open(tmp_path: Path):
    runs = 0

    async def open_and_close() -> bool:
        nonlocal runs
        runs += 1
        async with SQLiteEventStore(tmp_path / f"{runs}.db") as store:
            await append_numbers(store, 1)
        return True

    async def check(_: object) -> None:
        # With its last connection, SQLite takes its own files away.
        assert content(tmp_path).keys() <= {f"{run}.db" for run in range(1, runs + 1)}
        async with SQLiteEventStore(tmp_path / f"{runs}.db") as store:
            assert await store.last_position() in (0, 1)

    assert await cancel_at_every_checkpoint(open_and_close, check) >= 3


async def test_opening_a_locked_file_is_tried_again_in_moderation(path: Path, watched: Watched):
    connection = connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")  # to switch to WAL, SQLite does not wait for it
    with anyio.move_on_after(0.5) as scope:
        async with SQLiteEventStore(path):
            pass
    connection.close()
    assert scope.cancelled_caught
    assert 1 < watched.connected < 120
    async with SQLiteEventStore(path) as store:
        await append_numbers(store, 1)


def test_a_loop_that_ends_while_a_store_is_opening_leaves_nothing_open(
    path: Path, anyio_backend: tuple[str, dict[str, Any]]
):
    async def give_up() -> None:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await SQLiteEventStore(path).__aenter__()

    backend, options = anyio_backend
    anyio.run(give_up, backend=backend, backend_options=options)
    assert content(path.parent).keys() <= {path.name}


def test_a_program_that_forgets_to_close_its_store_ends(
    path: Path, anyio_backend: tuple[str, dict[str, Any]]
):
    backend, options = anyio_backend
    program = f"""if True:
        import anyio
        from eventsource_anyio import SQLiteEventStore

        async def main():
            await SQLiteEventStore({str(path)!r}).__aenter__()

        anyio.run(main, backend={backend!r}, backend_options={options!r})
    """
    command = [sys.executable, "-W", "error", "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")


async def test_a_store_that_failed_to_open_can_be_opened_later(path: Path):
    store = SQLiteEventStore(path.parent / "later" / path.name)
    with pytest.raises(StorageError):
        await store.__aenter__()
    with pytest.raises(StoreClosedError):
        await store.last_position()
    await anyio.Path(path.parent / "later").mkdir()
    async with store:
        await append_numbers(store, 1)


async def test_a_store_that_is_closed_at_work_answers_everybody_truly(path: Path):
    appended = some_appends(Random(7), 1500)
    returned: dict[str, AppendResult] = {}
    refused: set[str] = set()
    some_are_stored = anyio.Event()

    async def append(aggregate_id: str) -> None:
        try:
            result = await store.append_events(
                aggregate_id, "Thing", appended[aggregate_id], NO_STREAM
            )
        except StoreClosedError:
            refused.add(aggregate_id)
        else:
            returned[aggregate_id] = result
            some_are_stored.set()

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            async with SQLiteEventStore(path, synchronous="NORMAL") as store:
                for aggregate_id in appended:
                    tasks.start_soon(append, aggregate_id)
                await some_are_stored.wait()
    assert returned
    assert refused
    assert returned.keys() | refused == appended.keys()
    async with SQLiteEventStore(path, synchronous="NORMAL") as store:
        assert {stored.aggregate_id for stored in await read(store)} == returned.keys()
        await assert_repeatable(store, appended, returned)


async def test_a_store_that_is_closed_as_a_subscriber_begins_to_wait_answers_everybody(path: Path):
    """All three get their answers at once, and go on at once: to wait, to append, to close."""

    async def follow() -> None:
        with pytest.raises(StoreClosedError):
            while True:
                await anext(subscription)

    async def append() -> None:
        await store.last_position()
        with suppress(StoreClosedError):
            await append_numbers(store, 1)

    async def close() -> None:
        await store.last_position()
        await store.__aexit__(None, None, None)

    for _ in range(20):
        store = SQLiteEventStore(path, synchronous="NORMAL")
        with anyio.fail_after(20):
            async with store, store.subscribe(after=99) as subscription:
                async with anyio.create_task_group() as tasks:
                    for one in (store.last_position, follow, append, close):
                        tasks.start_soon(one)


async def test_a_store_whose_tasks_are_cancelled_is_closed(path: Path):
    appended = anyio.Event()

    async def work(store: SQLiteEventStore) -> None:
        while True:
            await append_numbers(store, 1)
            appended.set()

    async def follow(store: SQLiteEventStore) -> None:
        async with store.subscribe() as subscription:
            async for _ in subscription:
                pass

    with anyio.CancelScope() as scope:
        async with SQLiteEventStore(path) as store, anyio.create_task_group() as tasks:
            tasks.start_soon(work, store)
            tasks.start_soon(follow, store)
            await appended.wait()
            scope.cancel()
    assert scope.cancelled_caught
    with pytest.raises(StoreClosedError):
        await store.last_position()
    assert list(content(path.parent)) == [path.name]


# -- looking for other processes --------------------------------------------------------------


async def test_a_subscriber_of_the_same_store_is_woken_without_polling(path: Path):
    async def append_when_it_waits(number: int) -> None:
        await anyio.wait_all_tasks_blocked()
        await store.last_position()  # after its own read
        await anyio.wait_all_tasks_blocked()
        await store.append_events("a", "Thing", [Happened(number)], ANY)

    async with SQLiteEventStore(path, poll_every=float("inf")) as store:
        async with store.subscribe() as subscription:
            for number in range(3):
                with anyio.fail_after(20):
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(append_when_it_waits, number)
                        assert numbers([await anext(subscription)]) == [number]


async def test_it_looks_for_other_processes_while_somebody_waits_and_only_then(
    path: Path, watched: Watched
):
    async def follow(store: SQLiteEventStore, seen: list[int]) -> None:
        async with store.subscribe() as subscription:
            while True:
                seen.append((await anext(subscription)).position)

    async def assert_idle(store: SQLiteEventStore) -> None:
        await store.last_position()  # after this, the thread knows that nobody waits
        before = len(watched.statements)
        await anyio.sleep(0.05)
        assert len(watched.statements) == before

    async with SQLiteEventStore(path, poll_every=0.001) as store:
        await assert_idle(store)
        for nth in (1, 2):
            seen: list[int] = []
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(follow, store, seen)
                for _ in range(5 + watched.statements.count(LOOK)):
                    assert await watched.looked()
                assert seen == list(range(1, nth))
                insert_rows(path, first=nth, count=1)
                for _ in range(5 + watched.statements.count(LOOK)):
                    assert await watched.looked()
                tasks.cancel_scope.cancel()
            assert seen == list(range(1, nth + 1))
            await assert_idle(store)


async def test_a_waiting_subscriber_is_told_that_the_file_fails_and_goes_on(
    path: Path, watched: Watched
):
    connection = connect(path, timeout=20)

    async def break_it() -> None:
        assert await watched.looked()
        connection.execute("ALTER TABLE events RENAME TO elsewhere")

    with anyio.fail_after(20):
        async with (
            SQLiteEventStore(path, poll_every=0.001) as store,
            store.subscribe() as subscription,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(break_it)
            with pytest.raises(StorageError):
                await anext(subscription)
            with pytest.raises(StorageError):
                await append_numbers(store, 1)
            connection.execute("ALTER TABLE elsewhere RENAME TO events")
            insert_rows(path, first=1, count=1)
            assert (await anext(subscription)).position == 1
            await append_numbers(store, 1)
            assert (await anext(subscription)).position == 2
    connection.close()
