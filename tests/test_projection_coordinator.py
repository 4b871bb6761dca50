"""Running projections: started, stopped, cancelled, waited for, looked at."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import anyio
import anyio.abc
import psycopg
import pytest
from anyio.lowlevel import checkpoint

from eventsource_anyio import (
    ANY,
    EventStore,
    SQLiteEventStore,
    StorageError,
    StoreClosedError,
    StoredEvent,
)
from eventsource_anyio.errors import ProjectionStoppedError
from eventsource_anyio.projections.coordinator import ProjectionCoordinator
from eventsource_anyio.projections.members import COLLECTION
from eventsource_anyio.stores.postgresql import PostgreSQLEventStore
from eventsource_anyio.testing.samples import Happened, append_numbers
from tests.every_store import make_store, open_store, which_store
from tests.read_models import (
    LEASE,
    Seen,
    append,
    assert_seen,
    running,
    seen,
    shard_documents,
    until,
)

__all__ = ["make_store", "open_store", "which_store"]

pytestmark = pytest.mark.usefixtures("saved_soon")


class Stuck(Seen):
    """Waits at an event until it is let go on."""

    batch_seconds = 600  # however long that takes

    def __init__(self, at: int, **settings: object) -> None:
        super().__init__(**settings)
        self.at = at
        self.there = anyio.Event()
        self.go_on = anyio.Event()

    async def before(self, event: StoredEvent) -> None:
        if event.position == self.at:
            self.there.set()
            await self.go_on.wait()


class Broken(Seen):
    """Fails at an event until it is mended."""

    name = "broken"
    attempts = 2
    retry_after = 0.001
    at = 3
    mended = False

    async def before(self, event: StoredEvent) -> None:
        if event.position == self.at and not self.mended:
            raise KeyError("broken")


async def owners(store: EventStore, name: str = "seen") -> set[object]:
    return {shard["owner"] for shard in await shard_documents(store, name)}


async def coordinators(store: EventStore) -> list[str]:
    return [one.key for one in await store.documents.list(COLLECTION)]


# -- begin and end ----------------------------------------------------------------------------


async def test_started_means_that_it_has_its_shards(store: EventStore):
    await append(store, 10)
    coordinator = ProjectionCoordinator(store, [Seen(shards=4), Seen(name="other")])
    async with running(coordinator):
        assert await owners(store) == await owners(store, "other") == {*await coordinators(store)}
        assert [one.shards_here for one in coordinator.statistics()] == [4, 1]
        await coordinator.wait_for(await append(store, 10))
    await assert_seen(store)
    await assert_seen(store, "other")


async def test_coordinators_that_start_at_once_have_all_of_it_between_them(store: EventStore):
    """Each has looked again where another one was faster."""
    several = [ProjectionCoordinator(store, [Seen(shards=4)], lease=60) for _ in range(4)]
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            async with anyio.create_task_group() as starting:
                for coordinator in several:
                    starting.start_soon(tasks.start, coordinator.run)
            assert None not in await owners(store)
            assert sum(one.statistics()[0].shards_here for one in several) == 4
            for coordinator in several:
                coordinator.stop()


async def test_stopping_finishes_the_batch_and_gives_back_what_it_had(store: EventStore):
    await append_numbers(store, 10)
    projection = Stuck(at=3, batch_size=5)
    coordinator = ProjectionCoordinator(store, [projection])
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            await tasks.start(coordinator.run)
            await projection.there.wait()
            coordinator.stop()
            await anyio.wait_all_tasks_blocked()
            assert await seen(store) == []
            projection.go_on.set()
            await coordinator.wait_stopped()
            assert await seen(store) == [1, 2, 3, 4, 5]
            assert projection.calls == [1, 2, 3, 4, 5]
            assert await owners(store) == {None}
            assert await coordinators(store) == []
            assert [one.state for one in coordinator.statistics()] == ["stopped"]


async def test_it_is_stopped_when_nothing_of_it_is_left(store: EventStore):
    coordinator = ProjectionCoordinator(store, [Seen()])
    await coordinator.wait_stopped()
    returned = False
    ended: list[bool] = []

    async def run(*, task_status: anyio.abc.TaskStatus[None]) -> None:
        nonlocal returned
        await coordinator.run(task_status=task_status)
        returned = True

    async def wait() -> None:
        await coordinator.wait_stopped()
        ended.append(returned)

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            await tasks.start(run)
            coordinator.stop()
            while coordinator.statistics()[0].shards_here:
                await checkpoint()
            for _ in range(100):  # some of them while it is leaving
                tasks.start_soon(wait)
                await checkpoint()
    assert ended == [True] * 100
    assert await coordinators(store) == []


async def test_what_is_finished_for_longer_than_the_lease_is_not_taken_over(store: EventStore):
    await append_numbers(store, 3)
    projection, other = Stuck(at=2), Seen()
    one = ProjectionCoordinator(store, [projection], lease=2 * LEASE)
    two = ProjectionCoordinator(store, [other], lease=2 * LEASE)
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            await tasks.start(one.run)
            await projection.there.wait()
            (first,) = await owners(store)
            await tasks.start(two.run)
            (second,) = {*await coordinators(store)} - {first}
            one.stop()
            await beats(store, second, 5)  # three to a lease
            assert await owners(store) == {first}
            projection.go_on.set()
            await one.wait_stopped()
            await until(lambda: two.statistics()[0].state == "running")
            two.stop()
    assert projection.calls == [1, 2, 3]
    assert other.calls == []
    await assert_seen(store)


async def beats(store: EventStore, coordinator: str, times: int) -> None:
    """Return once a coordinator has said so many times that it is alive."""
    revisions: set[UUID] = set()
    while len(revisions) <= times:
        document = await store.documents.get(COLLECTION, coordinator)
        assert document is not None
        revisions.add(document.revision)
        await anyio.sleep(0.01)


async def test_cancelled_it_is_done_with_at_once(store: EventStore):
    """Others need not wait for its lease."""
    await append_numbers(store, 5)
    projection = Stuck(at=3, shards=2)
    cancelled = ProjectionCoordinator(store, [projection], lease=60)
    coordinator = ProjectionCoordinator(store, [Seen(shards=2)], lease=60)
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            await tasks.start(cancelled.run)
            await projection.there.wait()
            tasks.cancel_scope.cancel()
        assert await coordinators(store) == []
        await cancelled.wait_stopped()
        assert cancelled.statistics()[0].state == "stopped"
        async with running(coordinator):
            await coordinator.wait_for(5)
    await assert_seen(store)


async def test_it_runs_once_at_a_time_and_again_after_it_was_stopped(store: EventStore):
    coordinator = ProjectionCoordinator(store, [Seen()])
    for _ in range(3):
        async with running(coordinator):
            with pytest.raises(RuntimeError, match="running already"):
                await coordinator.run()
            await coordinator.wait_for(await append(store, 1))
    async with running(coordinator):  # and after it was cancelled
        with pytest.raises(RuntimeError, match="running already"):
            await coordinator.run()
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            await tasks.start(coordinator.run)
            tasks.cancel_scope.cancel()
        async with running(coordinator):
            await coordinator.wait_for(await append(store, 1))
    await assert_seen(store)


async def test_storage_that_fails_when_it_starts_is_a_plain_error(
    make_store: Callable[[], EventStore], request: pytest.FixtureRequest, tmp_path: Path
):
    async with make_store() as store:
        if isinstance(store, SQLiteEventStore):
            connection = sqlite3.connect(tmp_path / "events.db")
            connection.execute("DROP TABLE documents")
            connection.close()
        elif isinstance(store, PostgreSQLEventStore):
            with psycopg.connect(request.getfixturevalue("migrated_dsn")) as session:
                session.execute("DROP TABLE eventsource.documents")
        else:
            pytest.skip("memory does not fail")
        coordinator = ProjectionCoordinator(store, [Seen(), Seen(name="other")])
        with pytest.raises(StorageError):
            await coordinator.run()
        await coordinator.wait_stopped()


@pytest.mark.parametrize("shards", [1, 4])
async def test_a_store_that_is_closed_under_it_is_a_plain_error(store: EventStore, shards: int):
    coordinator = ProjectionCoordinator(store, [Seen(shards=shards)])
    outcomes: list[BaseException] = []

    async def run(*, task_status: anyio.abc.TaskStatus[None]) -> None:
        try:
            await coordinator.run(task_status=task_status)
        except Exception as error:  # noqa: BLE001  (looked at below)
            outcomes.append(error)

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            await tasks.start(run)
            # By then the store listens too: the connection of one that is closed while it
            # connects to listen may be left to the garbage collector.
            await coordinator.wait_for(await append(store, 20))
            await store.__aexit__(None, None, None)
    assert [type(error) for error in outcomes] == [StoreClosedError]


async def test_an_error_that_is_no_event_s_ends_it_as_it_is(store: EventStore):
    class Leave(BaseException): ...

    class Exiting(Seen):
        async def before(self, event: StoredEvent) -> None:
            raise Leave

    await append_numbers(store, 1)
    coordinator = ProjectionCoordinator(store, [Exiting(), Seen(name="other")])
    with anyio.fail_after(20), pytest.raises(Leave):
        await coordinator.run()
    assert await seen(store) == []


# -- waiting ----------------------------------------------------------------------------------


async def test_waiting_for_what_was_appended(store: EventStore):
    coordinator = ProjectionCoordinator(store, [Seen(shards=2), Seen(name="other")])
    async with running(coordinator):
        for number in range(10):
            result = await store.append_events(str(number), "Thing", [Happened()], ANY)
            await coordinator.wait_for(result)
            assert len(await seen(store)) == len(await seen(store, "other")) == number + 1
        await coordinator.wait_for(0)
        await coordinator.wait_for(result.position, "other")
        with pytest.raises(ValueError, match=r"no projection 'x' here; there are: other, seen"):
            await coordinator.wait_for(result, "x")


async def test_waiting_for_one_while_another_one_is_behind(store: EventStore):
    stuck = Stuck(at=1, name="stuck")
    coordinator = ProjectionCoordinator(store, [stuck, Seen()])
    async with running(coordinator) as tasks:
        waited: list[str] = []

        async def wait(name: str | None) -> None:
            await coordinator.wait_for(1, name)
            waited.append(str(name))

        for name in (None, "stuck", "seen"):
            tasks.start_soon(wait, name)
        await append_numbers(store, 1)
        await until(lambda: waited == ["seen"])
        await stuck.there.wait()
        stuck.go_on.set()
        await until(lambda: sorted(waited) == ["None", "seen", "stuck"])


async def test_waiting_by_name_is_for_the_version_that_serves(store: EventStore):
    stuck = Stuck(at=1, version=2)
    coordinator = ProjectionCoordinator(store, [Seen(name="seen"), stuck])
    stuck.name = "seen"
    async with running(coordinator):
        await append_numbers(store, 1)
        await coordinator.wait_for(1, "seen")
        await stuck.there.wait()
        with anyio.move_on_after(0.05) as scope:
            await coordinator.wait_for(1)
        assert scope.cancelled_caught
        stuck.at = 0
        stuck.go_on.set()
        stuck.batch_size = 1
        await store.documents.delete("read/seen", f"{1:09}")
        await coordinator.wait_for(1)


async def test_waiting_for_what_others_run(store: EventStore):
    """Each of two has a part of the shards, and may be asked for all."""
    one = ProjectionCoordinator(store, [Seen(shards=4)], lease=LEASE)
    two = ProjectionCoordinator(store, [Seen(shards=4)], lease=LEASE)
    async with running(one, two):
        await until(lambda: [x.statistics()[0].shards_here for x in (one, two)] == [2, 2])
        position = await append(store, 20)
        await two.wait_for(position)
        assert len(await seen(store)) == 20
        await one.wait_for(position)


async def test_waiting_where_nothing_runs(store: EventStore):
    await append_numbers(store, 1)
    coordinator = ProjectionCoordinator(store, [Seen()])
    with pytest.raises(ProjectionStoppedError, match="is not running"):
        await coordinator.wait_for(1)
    async with running(coordinator):
        await coordinator.wait_for(1)
    with pytest.raises(ProjectionStoppedError) as stopped:
        await coordinator.wait_for(1)
    assert (stopped.value.name, stopped.value.version) == ("seen", 1)
    assert stopped.value.__cause__ is None


@pytest.mark.parametrize("how", ["stop", "cancel"])
async def test_whoever_waits_is_told_that_it_was_stopped(store: EventStore, how: str):
    coordinator = ProjectionCoordinator(store, [Seen()])
    told: list[str] = []

    async def wait() -> None:
        with pytest.raises(ProjectionStoppedError):
            await coordinator.wait_for(1000)
        told.append("stopped")

    with anyio.fail_after(20):
        async with anyio.create_task_group() as waiting:
            async with anyio.create_task_group() as tasks:
                await tasks.start(coordinator.run)
                waiting.start_soon(wait)
                await anyio.wait_all_tasks_blocked()
                if how == "stop":
                    coordinator.stop()
                else:
                    tasks.cancel_scope.cancel()
    assert told == ["stopped"]


# -- failing ----------------------------------------------------------------------------------


async def test_a_projection_that_fails_stops_and_the_others_go_on(store: EventStore):
    broken = Broken(shards=3)
    coordinator = ProjectionCoordinator(store, [broken, Seen()])
    async with running(coordinator):
        position = await append(store, 4, 2)
        await coordinator.wait_for(position, "seen")
        with pytest.raises(ProjectionStoppedError) as stopped:
            await coordinator.wait_for(position)
        assert isinstance(stopped.value.__cause__, KeyError)
        await until(lambda: coordinator.statistics()[0].shards_here == 0)
        failed, good = coordinator.statistics()
        assert (failed.state, failed.error) == ("failed", "KeyError: 'broken'")
        assert (good.state, good.error) == ("running", None)
        assert failed.position <= 2
        assert broken.at not in await seen(store, "broken")
        broken.mended = True
        coordinator.resume("broken")
        await coordinator.wait_for(position)
        assert [one.state for one in coordinator.statistics()] == ["running", "running"]
        assert [one.error for one in coordinator.statistics()] == [None, None]
        with pytest.raises(ValueError, match="no projection 'x'"):
            coordinator.resume("x")
    await assert_seen(store)
    await assert_seen(store, "broken")


async def test_resuming_at_any_moment(store: EventStore):
    """While it looks around, or fails again."""
    broken = Broken(attempts=1)
    coordinator = ProjectionCoordinator(store, [broken], lease=LEASE)
    async with running(coordinator):
        await append_numbers(store, 5)
        for _ in range(200):
            coordinator.resume("broken")
            await checkpoint()
        for times in range(10):
            await until(lambda: coordinator.statistics()[0].state == "failed")
            for _ in range(times):
                coordinator.resume("broken")
                await checkpoint()
        await until(lambda: coordinator.statistics()[0].state == "failed")
        broken.mended = True
        coordinator.resume("broken")
        await coordinator.wait_for(5)
    await assert_seen(store, "broken")


async def test_what_has_failed_here_is_tried_by_others(store: EventStore):
    """A coordinator with an older program may be the reason."""
    await append_numbers(store, 5)
    one = ProjectionCoordinator(store, [Broken()], lease=LEASE)
    mended = Broken()
    mended.mended = True
    two = ProjectionCoordinator(store, [mended], lease=LEASE)
    async with running(one, two):
        await two.wait_for(5)
    await assert_seen(store, "broken")


# -- looking ----------------------------------------------------------------------------------


async def test_statistics_in_every_state(store: EventStore):
    projection = Broken(retry_after=60)
    coordinator = ProjectionCoordinator(store, [projection], lease=LEASE)
    (before,) = coordinator.statistics()
    assert (before.name, before.version, before.state) == ("broken", 1, "stopped")
    assert (before.position, before.lag_events, before.lag_seconds) == (0, 0, 0.0)
    assert (before.shards, before.shards_here, before.handled) == (0, 0, 0)
    async with running(coordinator):
        assert coordinator.statistics()[0].state == "running"
        other = ProjectionCoordinator(store, [Broken()], lease=LEASE)
        async with running(other):
            (waiting,) = other.statistics()
            assert (waiting.state, waiting.shards, waiting.shards_here) == ("waiting", 1, 0)
        await append_numbers(store, 10)
        await until(lambda: coordinator.statistics()[0].state == "retrying")
        await until(lambda: coordinator.statistics()[0].lag_events == 8)
        (retrying,) = coordinator.statistics()
        assert retrying.error == "KeyError: 'broken'"
        assert retrying.lag_seconds > 0
        assert retrying.rate > 0
        assert retrying.handled == retrying.position == 2
    (after,) = coordinator.statistics()
    assert (after.state, after.shards_here) == ("stopped", 0)
    failing = ProjectionCoordinator(store, [Broken()])
    async with running(failing):
        await until(lambda: failing.statistics()[0].state == "failed")
    assert failing.statistics()[0].state == "failed"
    good = Broken()
    good.mended = True
    coordinator = ProjectionCoordinator(store, [good])
    async with running(coordinator):
        await coordinator.wait_for(10)
        (done,) = coordinator.statistics()
    assert (done.state, done.position, done.lag_events, done.lag_seconds) == ("running", 10, 0, 0)
    assert (done.handled, done.serving, done.error) == (8, True, None)
