"""One SQLite file, several processes: real ones, some of them killed, some of them in the way."""

from __future__ import annotations

import json
import sqlite3
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
)
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

import anyio
import pytest
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

from eventsource_anyio import (
    ANY,
    NO_STREAM,
    NewEvent,
    SQLiteEventStore,
    StoreClosedError,
    StoredEvent,
)
from eventsource_anyio.testing.samples import Happened, append_numbers, numbers

ASYNCIO_LOOPS = ["asyncio", *(["uvloop"] if sys.platform != "win32" else [])]
SCRIPT = Path(__file__).with_name("sqlite_writer.py")
VERSION_1 = Path(__file__).with_name("sqlite_version_1.sql").read_text(encoding="utf-8")


class Another:
    """Another process, running `sqlite_writer.py`."""

    def __init__(self, process: Process) -> None:
        assert process.stdout is not None
        self.process = process
        self._said = BufferedByteReceiveStream(process.stdout)

    async def said(self) -> str:
        """The next line that it says; empty once it has ended."""
        try:
            return (await self._said.receive_until(b"\n", 65536)).decode()
        except (anyio.EndOfStream, anyio.IncompleteRead):
            return ""

    async def tell(self, line: str = "") -> None:
        assert self.process.stdin is not None
        await self.process.stdin.send(f"{line}\n".encode())


StartAnother: TypeAlias = Callable[..., AbstractAsyncContextManager[Another]]


@pytest.fixture
def another(anyio_backend: tuple[str, dict[str, Any]]) -> StartAnother:
    """Starts another process, which runs on the same event loop as the test."""
    backend, options = anyio_backend

    @asynccontextmanager
    async def start(mode: str, *arguments: object) -> AsyncIterator[Another]:
        command = [sys.executable, str(SCRIPT), mode, backend, json.dumps(options)]
        command += map(str, arguments)
        async with await anyio.open_process(command, stderr=None) as process:
            yield Another(process)

    return start


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.db"


@contextmanager
def locked(path: Path) -> Iterator[sqlite3.Connection]:
    """The write lock of the file, held by another connection."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield connection
    finally:
        connection.close()


async def assert_whole(path: Path) -> list[StoredEvent]:
    """Check that nothing is missing or doubled, and return all events."""
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()
    async with SQLiteEventStore(path) as store:
        events = [stored async for stored in store.read_all()]
    positions = [stored.position for stored in events]
    assert positions == sorted(set(positions))
    assert len({stored.event_id for stored in events}) == len(events)
    versions: dict[str, list[int]] = {}
    for stored in events:
        versions.setdefault(stored.stream_id, []).append(stored.version)
    assert versions == {
        stream_id: list(range(1, len(of) + 1)) for stream_id, of in versions.items()
    }
    return events


def notes(events: Sequence[StoredEvent]) -> list[str]:
    return [stored.event.note for stored in events if isinstance(stored.event, Happened)]


# -- writing at the same time -----------------------------------------------------------------


async def test_processes_neither_lose_nor_double_an_append(another: StartAnother, path: Path):
    names, times = ("one", "two", "three"), 40
    with anyio.fail_after(60):
        async with AsyncExitStack() as stack:
            start = stack.enter_async_context
            writers = [await start(another("append", path, name, times)) for name in names]
            for writer in writers:
                assert await writer.said() == "ready"
            for writer in writers:
                await writer.tell("go")
            for writer in writers:
                assert await writer.process.wait() == 0
    events = await assert_whole(path)
    counted = [stored for stored in events if stored.stream_id == "Counter-all"]
    assert numbers(counted) == list(range(1, len(names) * times + 1))
    shared = [stored for stored in events if stored.stream_id == "Thing-shared"]
    assert [stored.event for stored in shared[::2]] == [stored.event for stored in shared[1::2]]
    for name in names:
        mine = [stored for stored in shared[::2] if notes([stored]) == [name]]
        assert numbers(mine) == list(range(times))


async def test_of_processes_that_save_a_checkpoint_one_wins_each_time(
    another: StartAnother, path: Path
):
    names, times = ("one", "two", "three"), 40
    with anyio.fail_after(60):
        async with AsyncExitStack() as stack:
            start = stack.enter_async_context
            writers = [await start(another("hand_over", path, name, times)) for name in names]
            for writer in writers:
                assert await writer.said() == "ready"
            for writer in writers:
                await writer.tell("go")
            for writer in writers:
                assert await writer.process.wait() == 0
    events = await assert_whole(path)
    assert numbers(events) == list(range(1, len(names) * times + 1))
    async with SQLiteEventStore(path) as store:
        assert await store.checkpoints.get("shared") == len(events)
        told = [one.message for one in await store.outbox.pending(1000)]
    expected = [(one.aggregate_id, b"%d" % one.position) for one in events]
    assert [(one.topic, one.payload) for one in told] == expected


async def test_a_subscriber_sees_what_every_process_appends_once_and_in_order(
    another: StartAnother, path: Path
):
    times, here = 30, 100
    seen: list[StoredEvent] = []

    async def append_here() -> None:
        for number in range(here):
            await store.append_events("here", "Thing", [Happened(number)], ANY)

    with anyio.fail_after(60):
        async with (
            SQLiteEventStore(path, synchronous="NORMAL", poll_every=0.002) as store,
            another("append", path, "one", times) as one,
            another("append", path, "two", times) as two,
            store.subscribe() as subscription,
        ):
            for writer in (one, two):
                assert await writer.said() == "ready"
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(append_here)
                tasks.start_soon(one.tell)
                tasks.start_soon(two.tell)
                while len(seen) < here + 2 * 3 * times:
                    seen.append(await anext(subscription))
    assert seen == await assert_whole(path)


async def test_a_subscriber_is_woken_by_another_process_alone(another: StartAnother, path: Path):
    async with SQLiteEventStore(path, poll_every=0.002) as store:
        async with another("append", path, "one", 1) as writer, store.subscribe() as subscription:
            assert await writer.said() == "ready"
            with anyio.fail_after(20):
                async with anyio.create_task_group() as tasks:

                    @tasks.start_soon
                    async def tell_when_it_waits() -> None:
                        await anyio.wait_all_tasks_blocked()
                        await writer.tell()

                    seen = [await anext(subscription) for _ in range(3)]
    assert sorted(numbers(seen)) == [0, 0, 1]


@pytest.mark.parametrize("events_before", [0, 2])
async def test_processes_that_open_a_file_together_make_one_schema(
    another: StartAnother, tmp_path: Path, events_before: int
):
    """A new file, or one that version 1 has made."""
    async with another("open_files") as one, another("open_files") as two:
        for nth in range(40):
            path = tmp_path / f"{nth}.db"
            if events_before:
                connection = sqlite3.connect(path)
                connection.executescript(VERSION_1)
                connection.close()
            for process in (one, two):
                await process.tell(str(path))
            with anyio.fail_after(20):
                assert (await one.said(), await two.said()) == ("done", "done")
            connection = sqlite3.connect(path)
            tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            assert sorted(name for (name,) in tables) == [
                *("checkpoints", "documents", "events", "outbox", "sqlite_sequence")
            ]
            assert connection.execute("PRAGMA user_version").fetchone() == (3,)
            found = connection.execute("SELECT count(*) FROM events").fetchone()
            assert found == (events_before + 2,)
            connection.close()


# -- killed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("synchronous", ["NORMAL", "FULL"])
async def test_a_killed_process_has_stored_what_it_acknowledged_and_nothing_by_halves(
    another: StartAnother, path: Path, synchronous: str
):
    random = Random(synchronous)
    acknowledged: dict[str, tuple[str, int]] = {}
    for _ in range(4):
        with anyio.fail_after(60):
            async with another("load", path, synchronous) as writer:
                lines = [await writer.said() for _ in range(random.randrange(1, 200))]
                assert all(lines)
                writer.process.kill()
                while line := await writer.said():
                    lines.append(line)
        for line in lines:
            for event_id, stream_id, version in json.loads(line):
                acknowledged[event_id] = (stream_id, version)

        events = await assert_whole(path)
        stored = {str(one.event_id): (one.stream_id, one.version) for one in events}
        assert acknowledged.items() <= stored.items()
        for unit, count in Counter(notes(events)).items():
            assert unit.endswith(f" {count}")
        async with SQLiteEventStore(path) as store:
            messages = {one.message.message_id for one in await store.outbox.pending(10**6)}
        of_transactions = [one for one in events if one.aggregate_type == "Other"]
        assert messages == {one.event_id for one in of_transactions if numbers([one]) == [1]}


# -- in the way -------------------------------------------------------------------------------


async def test_an_append_waits_for_another_process_and_reads_overtake_it(path: Path):
    async with SQLiteEventStore(path) as store:
        await append_numbers(store, 3)
        stored: list[int] = []

        async def append() -> None:
            stored.append((await store.append_events("a", "Thing", [Happened(3)], 3)).version)

        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                with locked(path):
                    tasks.start_soon(append)
                    for _ in range(3):
                        await anyio.wait_all_tasks_blocked()
                        assert numbers(await store.get_events("a", "Thing")) == [0, 1, 2]
                    assert stored == []
        assert stored == [4]


async def test_appends_that_wait_for_another_process_keep_their_order(path: Path):
    async with SQLiteEventStore(path) as store:

        async def append(number: int) -> None:
            await store.append_events("a", "Thing", [Happened(number)], ANY)

        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                with locked(path):
                    for number in range(8):
                        tasks.start_soon(append, number)
                        await store.last_position()  # so it waits
        assert numbers(await store.get_events("a", "Thing")) == list(range(8))


async def test_an_append_that_waits_for_another_process_can_be_cancelled(path: Path):
    async with SQLiteEventStore(path) as store:
        await append_numbers(store, 1)
        events = [NewEvent(Happened(1))]
        with anyio.fail_after(20):
            with locked(path):
                for patience in (0.01, 0.06, 0.12):
                    with anyio.move_on_after(patience) as scope:
                        await store.append_events("a", "Thing", events, ANY)
                    assert scope.cancelled_caught
            assert numbers(await store.get_events("a", "Thing")) == [0]
            assert (await store.append_events("a", "Thing", events, 1)).version == 2


@pytest.mark.parametrize("anyio_backend", ASYNCIO_LOOPS, indirect=True)
async def test_an_append_that_waits_for_another_process_can_be_cancelled_natively(path: Path):
    import asyncio

    async with SQLiteEventStore(path) as store:
        with locked(path):
            for _ in range(3):
                append = asyncio.ensure_future(append_numbers(store, 1))
                await store.last_position()  # it was tried, in vain
                append.cancel()
                done, _ = await asyncio.wait([append], timeout=20)
                assert append in done
                assert append.cancelled()
        await append_numbers(store, 1)
        assert await store.last_position() == 1


async def test_appends_with_deadlines_between_locks_are_stored_if_and_only_if_they_return(
    path: Path,
):
    random = Random(7)
    done = threading.Event()
    returned: set[str] = set()

    def lock_again_and_again() -> None:
        while not done.wait(random.choice((0, 0.01))):
            with locked(path):
                done.wait(random.choice((0, 0.01, 0.1)))

    async def append(name: str, patience: float) -> None:
        with anyio.move_on_after(patience):
            await store.append_events(name, "Thing", [Happened(), Happened()], NO_STREAM)
            returned.add(name)

    async with SQLiteEventStore(path, synchronous="NORMAL") as store:
        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(anyio.to_thread.run_sync, lock_again_and_again)
                async with anyio.create_task_group() as appends:
                    for number in range(500):
                        patience = random.choice((0, random.uniform(0, 0.01), 0.3, 60))
                        appends.start_soon(append, str(number), patience)
                        if number % 20 == 0:
                            await store.last_position()
                done.set()
    events = await assert_whole(path)
    assert Counter(stored.aggregate_id for stored in events) == dict.fromkeys(returned, 2)
    assert 100 < len(returned) < 400


async def test_a_store_that_waits_for_another_process_can_be_closed(path: Path):
    async with SQLiteEventStore(path) as store:
        with anyio.fail_after(20), locked(path):
            async with anyio.create_task_group() as tasks:

                @tasks.start_soon
                async def append() -> None:
                    with pytest.raises(StoreClosedError):
                        await append_numbers(store, 1)

                await anyio.wait_all_tasks_blocked()
                await store.__aexit__(None, None, None)
    assert await assert_whole(path) == []


async def test_opening_waits_for_another_process_and_can_be_cancelled(path: Path):
    async with SQLiteEventStore(path) as store:
        await append_numbers(store, 3)
    positions: list[int] = []

    async def open_and_look() -> None:
        async with SQLiteEventStore(path) as store:
            positions.append(await store.last_position())

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            with locked(path) as connection:
                connection.execute("COMMIT")
                connection.execute("PRAGMA locking_mode = EXCLUSIVE")
                connection.execute("BEGIN IMMEDIATE")
                with anyio.move_on_after(0.2) as scope:
                    await open_and_look()
                assert scope.cancelled_caught
                tasks.start_soon(open_and_look)
                await anyio.wait_all_tasks_blocked()
                assert positions == []
    assert positions == [3]
