"""Several processes share one projection, or a process manager; real ones, killed at any moment.

For longer: EVENTSOURCE_STRESS_SECONDS=60 pytest --timeout=400 tests/test_projection_processes.py
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any

import anyio
import psycopg
import pytest
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

from eventsource_anyio import (
    ANY,
    EventStore,
    NewEvent,
    OutboxMessage,
    StorageError,
    StoredEvent,
)
from eventsource_anyio.projections import Reaction, handles
from eventsource_anyio.projections.shards import ShardRepository
from eventsource_anyio.repositories.outbox import StoredMessage
from eventsource_anyio.testing.samples import Happened
from tests.conftest import LOOPS
from tests.every_store import make_store, open_store
from tests.read_models import append, assert_totals, create_tables, until
from tests.test_process_managers import (
    SIXTY_DAYS,
    Account,
    Begun,
    Confirmed,
    Order,
    Orders,
    Overdue,
    Placed,
)

__all__ = ["make_store", "open_store"]

if sys.platform == "win32":
    pytest.skip("needs signals and fork", allow_module_level=True)

SCRIPT = Path(__file__).with_name("projection_worker.py")
SECONDS = float(os.environ.get("EVENTSOURCE_STRESS_SECONDS", "2.5"))
LEASE, SHARDS, PROCESSES = 0.5, 8, 4


@pytest.fixture(params=["SQLite", "PostgreSQL"])
def which(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def database(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if which == "SQLite":
        return str(tmp_path / "events.db")
    return str(request.getfixturevalue("migrated_dsn"))


class Worker:
    """A process, running `projection_worker.py`."""

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


Start = Callable[..., Any]


@pytest.fixture
def start(anyio_backend: tuple[str, dict[str, Any]], database: str) -> Start:
    """Starts a process, which runs on the same event loop as the test, or on another one."""

    @asynccontextmanager
    async def started(mode: str, *arguments: object, loop: str = "") -> AsyncIterator[Worker]:
        backend, options = LOOPS[loop] if loop else anyio_backend
        command = [sys.executable, str(SCRIPT), mode, database, backend, json.dumps(options)]
        command += map(str, arguments)
        async with await anyio.open_process(command, stderr=None) as process:
            try:
                yield Worker(process)
            finally:
                if process.returncode is None:
                    process.kill()

    return started


async def position_of(store: EventStore) -> int:
    """How far all shards are."""
    shards = await ShardRepository(store, "totals", 1).all()
    return min([shard.position for shard in shards], default=0)


async def handled_all(store: EventStore) -> None:
    last = await store.last_position()

    async def reached() -> bool:
        return await position_of(store) >= last

    await until(reached, 30 + 2 * SECONDS)


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_processes_that_are_killed_at_random_miss_nothing_and_double_nothing(
    store: EventStore, start: Start
):
    """The order in each stream is checked by the projection itself, which would stop.

    Each process runs on another event loop.
    """
    random, loops = Random(), cycle(sorted(LOOPS))
    appended, over, killed = 0, False, 0

    async def write(stream: int) -> None:
        nonlocal appended
        number = 0
        while not over:
            events = [NewEvent(Happened(number + extra)) for extra in range(1 + number % 3)]
            while True:
                try:
                    await store.append_events(f"s{number % 10}{stream}", "Thing", events, ANY)
                    break
                except StorageError:
                    await anyio.sleep(0.01)
            number += 1
            appended += len(events)
            await anyio.sleep(0.005)

    await create_tables(store)
    with anyio.fail_after(60 + 4 * SECONDS):
        async with AsyncExitStack() as stack:
            workers: list[Worker] = []

            async def another() -> None:
                process = start("project", SHARDS, LEASE, loop=next(loops))
                worker = await stack.enter_async_context(process)
                workers.append(worker)

            for _ in range(PROCESSES):
                await another()
            async with anyio.create_task_group() as tasks:
                for stream in range(2):
                    tasks.start_soon(write, stream)
                for worker in workers:
                    assert (await worker.said()).startswith("started")
                end = anyio.current_time() + SECONDS
                while anyio.current_time() < end:
                    await anyio.sleep(random.uniform(0.3, 0.7))  # at no moment in particular
                    worker = workers.pop(random.randrange(len(workers)))
                    assert worker.process.returncode is None, "it has failed by itself"
                    worker.process.kill()
                    killed += 1
                    await another()
                over = True
            await handled_all(store)
            assert [worker.process.returncode for worker in workers] == [None] * PROCESSES
    assert killed >= SECONDS / 0.8 - 1
    assert await assert_totals(store) == appended


class Reminding(Orders):
    """It sets a timer for each order, in place of another one; some of them are due at once."""

    look_every = 0.05
    batch_size = 5

    @handles(Placed)
    async def placed(self, event: StoredEvent[Placed], order: Order, act: Reaction) -> None:
        amount = event.event.amount
        order.apply(Begun(amount))
        await act.execute(Account, order.aggregate_id, Account.reserve, amount)
        await act.send(OutboxMessage("placed", str(order.aggregate_id).encode()))
        await act.schedule(Overdue(), after=SIXTY_DAYS)
        await act.schedule(Overdue(), after=timedelta(milliseconds=amount))


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_a_process_manager_that_is_killed_at_random_does_everything_once(
    store: EventStore, start: Start
):
    """Events in, commands and messages out, timers: each event loop is killed in its turn."""
    names: list[str] = []
    over = False

    async def place_orders() -> None:
        while not over:
            names.append(f"{len(names):05}")
            amount = len(names) * 7 % 101
            await store.append_events(names[-1], "Shop", [Placed(names[-1], amount)], ANY)
            await anyio.sleep(max(0.003, SECONDS / 3000))  # so many that it is always at work

    async def settled() -> bool:
        manager = Reminding(store)
        reminded = [one for one in await store.outbox.pending(10**6) if is_reminder(one)]
        return len(reminded) >= len(names) and not await manager.pending_timers()

    with anyio.fail_after(60 + 4 * SECONDS):
        async with start("react", 0.6 * SECONDS) as worker:
            assert (await worker.said()).startswith("started")
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(place_orders)
                killed = int(await worker.said())
                over = True
            await until(settled, 30 + SECONDS)
            assert worker.process.returncode is None
    assert killed >= SECONDS
    for name in names:
        stream = await store.get_events(name, "ProcessTestsOrder")
        assert Counter(type(one.event) for one in stream) == {Begun: 1, Confirmed: 1, Overdue: 1}
        assert len(await store.get_events(name, "ProcessTestsAccount")) == 1
    sent = Counter(one.message.payload for one in await store.outbox.pending(10**6))
    assert sent == {name.encode(): 2 for name in names}  # that it was placed, and the reminder


def is_reminder(one: StoredMessage) -> bool:
    return one.message.topic == "reminder"


class Pausing:
    """Stops a process where it holds no lock, for which others would have to wait."""

    def __init__(self, database: str, process: Process) -> None:
        self._database = database
        self._process = process

    async def pause(self) -> None:
        while True:
            self._process.send_signal(signal.SIGSTOP)
            if not await anyio.to_thread.run_sync(self._in_a_transaction):
                return
            self.go_on()
            await anyio.sleep(0.01)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def _in_a_transaction(self) -> bool:
        if not self._database.startswith("postgresql:"):
            connection = sqlite3.connect(self._database, timeout=0.5, isolation_level=None)
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return True
            finally:
                connection.close()
            return False
        what = (
            "SELECT state, coalesce(wait_event, '') FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name = 'leader'"
        )
        with psycopg.connect(self._database, autocommit=True) as session:
            while True:
                sessions = session.execute(what).fetchall()
                if all(event == "ClientRead" for _, event in sessions):  # it is not at work
                    return any(state != "idle" for state, _ in sessions)


async def test_a_paused_process_can_write_nothing_once_it_was_taken_over(
    store: EventStore, start: Start, database: str
):
    """It goes on with what it had at hand, and all of it is refused."""
    await create_tables(store)
    shards = ShardRepository(store, "totals", 1)
    over, written = False, anyio.Event()

    async def write() -> None:
        number = 0
        while not over:
            await append(store, 5, 1, first=number)
            number += 1
            await anyio.sleep(0.02)
        written.set()

    async def owners() -> set[str | None]:
        return {shard.owner for shard in await shards.all()}

    with anyio.fail_after(60):
        async with start("project", 2, LEASE, "leader") as leader:
            assert (await leader.said()).startswith("started")
            before = await owners()
            pausing = Pausing(database, leader.process)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(write)
                await until(lambda: position_of(store))
                await pausing.pause()
                async with start("project", 2, LEASE) as other:
                    assert (await other.said()).startswith("started")

                    async def taken_over() -> bool:
                        return not await owners() & {*before, None}

                    await until(taken_over)
                    pausing.go_on()

                    async def shared() -> bool:
                        return len(await owners() - {None}) == 2

                    await until(shared)  # it has joined again, as another one
                    assert not await owners() & before
                    over = True
                    await written.wait()
                    await handled_all(store)
                    assert leader.process.returncode is other.process.returncode is None
    assert await assert_totals(store) > 0


async def test_a_process_killed_before_any_of_its_statements(
    store: EventStore, start: Start, request: pytest.FixtureRequest
):
    """One after the other, until there is none left; each event loop tries a third of them."""
    await create_tables(store)
    first = 1 + sorted(LOOPS).index(request.node.callspec.params["anyio_backend"])
    with anyio.fail_after(110):
        async with start("die", first, len(LOOPS)) as worker:
            killed = int(await worker.said())
            assert await worker.process.wait() == 0
    assert killed > 10
    assert await assert_totals(store) == 2 * (killed + 1)
