"""Waiting for what others run: here and in other processes, told by them and not by looking."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal, cast

import anyio
import msgspec
import psycopg
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream

from eventsource_anyio import (
    ANY,
    EventStore,
    PostgreSQLEventStore,
    SQLiteEventStore,
)
from eventsource_anyio.projections import ProjectionCoordinator
from eventsource_anyio.projections.telling import Telling
from eventsource_anyio.projections.wanted import Wanted
from eventsource_anyio.testing.samples import Ended, Happened
from tests.every_store import make_store, open_store, which_store
from tests.projecting import open_elsewhere
from tests.read_models import Seen, running, seen, until

__all__ = ["make_store", "open_elsewhere", "open_store", "which_store"]

SCRIPT = Path(__file__).with_name("projection_worker.py")
NEVER = 1000.0


class Filtered(Seen):
    """It skips what is not of its type, and says so seldom unless somebody waits."""

    name = "filtered"
    event_types = (Happened,)


@pytest.fixture(autouse=True)
def never_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is not told finds nothing out."""
    pauses = dict.fromkeys((False, True), (NEVER, NEVER))
    monkeypatch.setattr("eventsource_anyio.projections.runner._LOOK_ELSEWHERE", pauses)
    monkeypatch.setattr("eventsource_anyio.projections.running._SKIPPED_FOR", NEVER)
    monkeypatch.setattr("eventsource_anyio.projections.wanted._WAITED_FOR", NEVER)


def coordinator(store: EventStore, shards: int = 1, **settings: object) -> ProjectionCoordinator:
    # It looks around so seldom that it finds nothing out by that either.
    return ProjectionCoordinator(store, [Filtered(shards=shards, **settings)], lease=NEVER)


async def add(store: EventStore, stream: str, event: Happened | Ended) -> int:
    return (await store.append_events(stream, "Thing", [event], ANY)).position


async def wait_again_and_again(store: EventStore, waiting: ProjectionCoordinator) -> None:
    """For what is handled, and for what is skipped."""
    with anyio.fail_after(20):
        for number in range(6):
            position = await add(store, f"s{number}", Happened(number))
            await waiting.wait_for(position)
            assert len(await seen(store, "filtered")) == number + 1
            await waiting.wait_for(await add(store, f"s{number}", Ended()))


# In one process ----------------------------------------------------------------------------------


async def test_whoever_runs_nothing_is_told(store: EventStore):
    one, two = coordinator(store), coordinator(store)
    async with running(one, two):
        assert [x.statistics()[0].state for x in (one, two)] == ["running", "waiting"]
        await wait_again_and_again(store, two)


async def test_by_another_object_of_the_same_store(store: EventStore, elsewhere: EventStore):
    if isinstance(store, SQLiteEventStore):
        pytest.skip("there others are looked at")
    one, two = coordinator(store), coordinator(elsewhere)
    async with running(one, two):
        await wait_again_and_again(elsewhere, two)


async def test_on_sqlite_others_are_looked_at_soon(
    store: EventStore, elsewhere: EventStore, monkeypatch: pytest.MonkeyPatch
):
    if not isinstance(store, SQLiteEventStore):
        pytest.skip("of SQLite")
    monkeypatch.undo()
    one, two = coordinator(store), coordinator(elsewhere)
    async with running(one, two):
        for number in range(6):
            await two.wait_for(await add(elsewhere, "s", Happened(number)))


async def test_each_of_many_is_told_of_the_others_shards(store: EventStore, elsewhere: EventStore):
    if isinstance(store, SQLiteEventStore):
        elsewhere = store
    one = ProjectionCoordinator(store, [Filtered(shards=4)], lease=0.3)
    two = ProjectionCoordinator(elsewhere, [Filtered(shards=4)], lease=0.3)
    async with running(one, two):
        await until(lambda: [x.statistics()[0].shards_here for x in (one, two)] == [2, 2])
        await wait_again_and_again(store, two)
        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                for number in range(20):
                    position = await add(store, f"s{number}", Happened(number))
                    for waiting in (one, two):
                        tasks.start_soon(waiting.wait_for, position)


async def test_whoever_takes_it_over_tells_too(store: EventStore):
    """It has not heard the question, so it is asked again."""
    one, two, three = (coordinator(store) for _ in range(3))
    waited = anyio.Event()

    async def wait() -> None:
        await two.wait_for(1)
        waited.set()

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            await tasks.start(one.run)
            await tasks.start(two.run)
            tasks.start_soon(wait)
            one.stop()
            await one.wait_stopped()
            await tasks.start(three.run)
            while three.statistics()[0].state == "waiting":  # it is the other one's share
                three.stop()
                await three.wait_stopped()
                await tasks.start(three.run)
            assert two.statistics()[0].state == "waiting"
            await add(store, "s", Happened())
            await waited.wait()
            two.stop()
            three.stop()


async def test_nothing_is_said_where_nobody_waits(store: EventStore):
    said: list[str] = []

    def hear(message: str) -> None:
        if message:
            _, waiting, moved, _ = msgspec.json.decode(message)
            said.extend(["waits"] * len(waiting) + ["moved"] * len(moved))

    one, two = coordinator(store), coordinator(store)
    async with running(one, two) as tasks:
        hearing = anyio.CancelScope()

        async def listen() -> None:
            with hearing:
                await store.hints.hear(hear)

        tasks.start_soon(listen)
        await wait_again_and_again(store, one)  # its own
        assert said == []
        await two.wait_for(await add(store, "s", Happened()))
        await until(lambda: said == ["waits", "moved"])
        hearing.cancel()


async def test_waiting_for_very_much_at_once(store: EventStore):
    """What is said at once is short enough for every store, and the rest is said later."""
    lengths: list[int] = []
    telling = Telling(store)
    positions = range(10**17, 10**17 + 500)
    for position in positions:
        telling.wait_begins("filtered@1", position)
    asked: set[int] = set()

    heard: set[str] = set()

    def hear(message: str) -> None:
        heard.add(message)
        if message.startswith("["):
            lengths.append(len(message.encode()))
            asked.update(position for _, position in msgspec.json.decode(message)[1])

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(store.hints.hear, hear)
            while "test" not in heard:
                await store.hints.tell("test")
            tasks.start_soon(telling.run, anyio.CancelScope())
            await until(lambda: asked == {*positions})
            tasks.cancel_scope.cancel()
    assert 4 <= len(lengths) <= 6
    assert max(lengths) < 8000


def test_what_is_not_asked_for_again_is_forgotten(monkeypatch: pytest.MonkeyPatch):
    wanted = Wanted()
    wanted.add(5)
    wanted.add(7)
    assert [wanted.within(*bounds) for bounds in ((4, 5), (5, 6), (6, 9), (7, 9))] == [
        True,
        False,
        True,
        False,
    ]
    assert not wanted.take(4)
    assert wanted.take(6)
    monkeypatch.setattr("eventsource_anyio.projections.wanted._WAITED_FOR", 0.0)
    wanted.add(9)
    assert not wanted.take(6)
    assert wanted.take(8)
    assert not wanted
    for position in range(2000):
        wanted.add(position)
    assert not wanted.within(1000, 2000)


# On PostgreSQL -----------------------------------------------------------------------------------


def postgresql(database: str, driver: str, name: str) -> PostgreSQLEventStore:
    dsn = f"{database}{'&' if '?' in database else '?'}application_name={name}"
    chosen = cast("Literal['asyncpg', 'psycopg']", driver)
    return PostgreSQLEventStore(dsn, poll_every=NEVER, driver=chosen)


@pytest.fixture(params=["asyncpg", "psycopg"])
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@asynccontextmanager
async def another_process(
    loop: tuple[str, dict[str, Any]], database: str, *arguments: object
) -> AsyncIterator[None]:
    backend, options = loop
    command = [sys.executable, str(SCRIPT), "follow", database, backend, json.dumps(options)]
    async with await anyio.open_process([*command, *map(str, arguments)], stderr=None) as process:
        try:
            assert process.stdout is not None
            said = BufferedByteReceiveStream(process.stdout)
            assert (await said.receive_until(b"\n", 100)).startswith(b"started")
            yield
            assert process.returncode is None
        finally:
            process.kill()


async def test_another_process_tells(
    anyio_backend: tuple[str, dict[str, Any]], migrated_dsn: str, driver: str
):
    with anyio.fail_after(40):
        async with (
            another_process(anyio_backend, migrated_dsn, driver, 2),
            postgresql(migrated_dsn, driver, "waiter") as store,
        ):
            waiting = coordinator(store, 2)
            async with running(waiting):
                await wait_again_and_again(store, waiting)
                assert waiting.statistics()[0].shards_here == 0


async def test_connections_that_are_lost_while_somebody_waits(migrated_dsn: str, driver: str):
    async with (
        postgresql(migrated_dsn, driver, "runner") as store,
        postgresql(migrated_dsn, driver, "waiter") as elsewhere,
    ):
        one, two = coordinator(store), coordinator(elsewhere)
        async with running(one, two):
            for number in range(1, 4):
                async with anyio.create_task_group() as waiting:
                    waiting.start_soon(two.wait_for, number)
                    await until(lambda: one._runners["filtered", 1].progress.wanted)
                    with psycopg.connect(migrated_dsn, autocommit=True) as session:
                        session.execute(
                            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                        )
                    assert await add(store, "s", Happened(number)) == number


async def test_a_reader_takes_over_from_who_only_listens(migrated_dsn: str, driver: str):
    """And is told of what was announced in between, though it never looks by itself."""
    async with (
        postgresql(migrated_dsn, driver, "reader") as store,
        postgresql(migrated_dsn, driver, "writer") as elsewhere,
    ):
        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                said: list[str] = []
                tasks.start_soon(store.hints.hear, said.append)
                tasks.start_soon(store.hints.hear, lambda _: None)
                await until(lambda: said == [""])
                tail = store._opened().tail
                for position in range(1, 7):
                    await anyio.sleep(0.02)  # or the append is not announced, so soon after another
                    if position % 2:
                        before = tail._stirred
                        await add(elsewhere, "s", Happened())
                        await until(lambda: tail._stirred > before)  # noqa: B023
                        await anyio.sleep(0.03)  # longer than whoever was told goes on looking
                        await store._wait(position - 1)
                    else:
                        async with anyio.create_task_group() as waiting:
                            waiting.start_soon(store._wait, position - 1)
                            await until(lambda: tail._watched and tail._only_listening is None)
                            await anyio.sleep(0.03)
                            await add(elsewhere, "s", Happened())
                    assert await store.last_position() == position
                    await elsewhere.hints.tell(str(position))
                    await until(lambda: len(said) == 1 + position)  # noqa: B023
                assert said == ["", *map(str, range(1, 7))]
                tasks.cancel_scope.cancel()
