"""Parked streams, rebuilds and their progress, on every store."""

from __future__ import annotations

from contextlib import suppress

import anyio
import pytest

from eventsource_anyio import ANY, EventStore, StoredEvent, Transaction
from eventsource_anyio.errors import ProjectionStoppedError
from eventsource_anyio.projections import ProjectionCoordinator
from eventsource_anyio.testing.cancelling import cancel_at_every_checkpoint
from eventsource_anyio.testing.samples import Ended, append_numbers

from .every_store import make_store, open_store, which_store
from .projecting import (
    LEASE,
    NAME,
    PATIENCE,
    Broken,
    Reacting,
    Recording,
    add,
    failing,
    open_elsewhere,
    positions,
    reactions,
    run_for_a_while,
    seen,
)

__all__ = ["make_store", "open_elsewhere", "open_store", "which_store"]

pytestmark = pytest.mark.usefixtures("saved_soon")


# -- parked streams ---------------------------------------------------------------------------


async def test_a_parked_stream_can_be_looked_at_and_retried(store: EventStore) -> None:
    wrong, before = failing(2)
    coordinator = ProjectionCoordinator(store, [Reacting(before=before)])
    await add(store, "a", 1, 2)
    await add(store, "b", 1)
    await store.append_events("a", "Thing", [Ended()], ANY)  # nobody wants it
    await add(store, "a", 3)
    await run_for_a_while(coordinator, store)

    assert await seen(store) == [1, 3]
    (parked,) = await coordinator.parked(NAME)
    assert (parked.stream_id, parked.first, parked.last, parked.events) == ("Thing-a", 2, 4, 2)
    assert parked.error == "Broken: number 2"
    assert await coordinator.parked(NAME, version=1) == [parked]

    wrong.clear()
    assert await coordinator.retry_parked(NAME, "Thing-a") == 2
    assert await coordinator.parked(NAME) == []
    assert await coordinator.retry_parked(NAME, "Thing-a") == 0
    assert await seen(store) == [1, 2, 3, 5]
    assert await reactions(store) == [(1, 1), (2, 1), (3, 1), (5, 1)]


async def test_a_retry_that_fails_leaves_the_rest_parked(store: EventStore) -> None:
    wrong, before = failing(2, 4)
    coordinator = ProjectionCoordinator(store, [Recording(before=before)])
    await add(store, "a", 1, 2, 3, 4, 5)
    await run_for_a_while(coordinator, store)
    wrong.remove(2)
    with pytest.raises(Broken, match="number 4"):
        await coordinator.retry_parked(NAME, "Thing-a")
    assert await seen(store) == [1, 2, 3]
    (parked,) = await coordinator.parked(NAME)
    assert (parked.first, parked.last, parked.events) == (4, 5, 2)
    assert parked.error == "Broken: number 4"

    await add(store, "a", 6)
    await run_for_a_while(coordinator, store)
    (parked,) = await coordinator.parked(NAME)
    assert (parked.first, parked.last, parked.events) == (4, 6, 3)
    wrong.clear()
    assert await coordinator.retry_parked(NAME, "Thing-a") == 3
    assert await seen(store) == await positions(store)


async def test_what_is_parked_during_a_retry_is_retried_too(store: EventStore) -> None:
    wrong, before = failing(2)
    running = Recording(before=before)
    await add(store, "a", 1, 2, 3)
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            coordinator = ProjectionCoordinator(store, [running])
            await tasks.start(coordinator.run)
            await coordinator.wait_for(3)
            retrying = anyio.Event()
            go_on = anyio.Event()

            async def slowly(event: StoredEvent) -> None:
                retrying.set()
                await go_on.wait()

            async def retry() -> None:
                other = ProjectionCoordinator(store, [Recording(before=slowly)])
                assert await other.retry_parked(NAME, "Thing-a") == 4

            async with anyio.create_task_group() as tries:
                tries.start_soon(retry)
                await retrying.wait()
                wrong.clear()
                await coordinator.wait_for(await add(store, "a", 4, 5))
                (parked,) = await coordinator.parked(NAME)
                assert (parked.first, parked.last) == (2, 5)
                go_on.set()
            await coordinator.wait_for(await add(store, "a", 6))
            coordinator.stop()
    assert await coordinator.parked(NAME) == []
    assert await seen(store) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("retriers", [1, 3])
async def test_retries_while_it_runs_lose_nothing(store: EventStore, retriers: int) -> None:
    """The stream is parked again and again, while others of it come and are retried."""
    times: dict[int, int] = {}

    async def now_and_then(event: StoredEvent) -> None:
        times[event.position] = times.get(event.position, 0) + 1
        if event.position % 7 == 3 and times[event.position] < 5:
            raise Broken

    coordinator = ProjectionCoordinator(store, [Reacting(before=now_and_then)])
    last = 0
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            await tasks.start(coordinator.run)

            async def append() -> None:
                nonlocal last
                for number in range(40):
                    last = await add(store, "ab"[number % 2], number)

            async def retry() -> None:
                while True:
                    for stream_id in ("Thing-a", "Thing-b"):
                        with suppress(Broken):
                            await coordinator.retry_parked(NAME, stream_id)
                    if last == 40 and not await coordinator.parked(NAME):
                        await coordinator.wait_for(last)
                        if not await coordinator.parked(NAME):
                            return

            async with anyio.create_task_group() as others:
                others.start_soon(append)
                for _ in range(retriers):
                    others.start_soon(retry)
            coordinator.stop()
    assert await seen(store) == list(range(1, 41))
    assert await reactions(store) == [(position, 1) for position in range(1, 41)]


async def test_what_is_discarded_is_never_handled(
    store: EventStore, caplog: pytest.LogCaptureFixture
) -> None:
    _, before = failing(2)
    coordinator = ProjectionCoordinator(store, [Recording(before=before)])
    await add(store, "a", 1, 2, 3)
    await run_for_a_while(coordinator, store)
    caplog.clear()
    assert await coordinator.discard_parked(NAME, "Thing-a") == 2
    assert "discarded 2 events of Thing-a, versions 2 to 3" in caplog.text
    assert await coordinator.discard_parked(NAME, "Thing-a") == 0
    await add(store, "a", 4)
    await run_for_a_while(coordinator, store)
    assert await seen(store) == [1, 4]
    assert await coordinator.parked(NAME) == []


async def test_a_cancelled_retry_can_be_done_again(store: EventStore) -> None:
    wrong: set[int] = set()

    async def before(event: StoredEvent) -> None:
        if event.position in wrong:
            raise Broken

    coordinator = ProjectionCoordinator(store, [Reacting(before=before)])

    async def park() -> None:
        last = await store.last_position()
        wrong.add(last + 1)
        await add(store, "a", 1, 2, 3)
        await run_for_a_while(coordinator, store)
        wrong.clear()

    async def again(handled: int | None) -> None:
        assert handled in (None, 3)
        await coordinator.retry_parked(NAME, "Thing-a")
        assert await coordinator.parked(NAME) == []
        assert await seen(store) == await positions(store)
        assert [one for one, _ in await reactions(store)] == await positions(store)
        await park()

    await park()
    retry = lambda: coordinator.retry_parked(NAME, "Thing-a")  # noqa: E731
    assert await cancel_at_every_checkpoint(retry, again) >= 6


# -- rebuild ----------------------------------------------------------------------------------


async def test_a_rebuild_handles_everything_again_and_reacts_to_nothing(store: EventStore) -> None:
    await append_numbers(store, 50)
    handled: list[int] = []

    async def before(event: StoredEvent) -> None:
        handled.append(event.position)

    coordinator = ProjectionCoordinator(store, [Reacting(before=before, shards=2)])
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            await tasks.start(coordinator.run)
            await coordinator.wait_for(50)
            await coordinator.rebuild(NAME)
            await coordinator.wait_for(50)
            assert await seen(store) == list(range(1, 51))
            assert handled == 2 * list(range(1, 51))
            await coordinator.wait_for(await add(store, "b", 1))
            coordinator.stop()
    assert await seen(store) == list(range(1, 52))
    assert await reactions(store) == [(position, 1) for position in range(1, 52)]


async def test_a_rebuild_needs_nobody_who_runs(store: EventStore) -> None:
    await append_numbers(store, 5)
    await run_for_a_while(ProjectionCoordinator(store, [Recording()]), store)
    other = ProjectionCoordinator(store, [Recording()])
    await other.rebuild(NAME)
    assert await seen(store) == []
    await run_for_a_while(ProjectionCoordinator(store, [Recording(shards=3)]), store)
    assert await seen(store) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("shards", [1, 4])
async def test_rebuilds_while_others_run_and_append(
    store: EventStore, elsewhere: EventStore, shards: int
) -> None:
    """Two coordinators, each with a store of its own; events come all the time."""
    coordinators = [
        ProjectionCoordinator(store, [Reacting(shards=shards)], lease=LEASE),
        ProjectionCoordinator(elsewhere, [Reacting(shards=shards)], lease=LEASE),
    ]
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            for coordinator in coordinators:
                await tasks.start(coordinator.run)
            done = anyio.Event()

            async def append() -> None:
                number = 0
                while not done.is_set() and number < 1000:
                    number += 1
                    last = await add(store, f"{number % 5}", number)
                    await coordinators[0].wait_for(last - 50)  # or nobody would ever catch up

            async with anyio.create_task_group() as others:
                others.start_soon(append)
                for _ in range(3):
                    for coordinator in coordinators:
                        await coordinator.wait_for(await store.last_position())
                        await coordinator.rebuild(NAME)
                done.set()
            for coordinator in coordinators:
                coordinator.stop()
    await run_for_a_while(ProjectionCoordinator(store, [Reacting(shards=shards)]), store)
    documents = await store.documents.list("seen/1", limit=100_000)
    total = sum(document.value[1] for document in documents)  # type: ignore[index]
    assert total == sum([event.event.number async for event in store.read_all()])  # type: ignore[attr-defined]
    assert await seen(store) == await positions(store)
    assert [position for position, _ in await reactions(store)] == await positions(store)


async def test_a_cancelled_rebuild_can_be_done_again(store: EventStore) -> None:
    coordinator = ProjectionCoordinator(store, [Reacting(shards=2)])
    await append_numbers(store, 10)
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            await tasks.start(coordinator.run)

            async def afterwards(_: object) -> None:
                await coordinator.rebuild(NAME)
                await coordinator.wait_for(10)
                assert await seen(store) == await positions(store)
                assert [one for one, _ in await reactions(store)] == await positions(store)

            assert (
                await cancel_at_every_checkpoint(lambda: coordinator.rebuild(NAME), afterwards) >= 5
            )
            coordinator.stop()


async def test_a_rebuild_that_fails_has_changed_nothing(store: EventStore) -> None:
    class Stubborn(Recording):
        resets = 0

        async def reset(self, tx: Transaction) -> None:
            self.resets += 1
            await super().reset(tx)
            if self.resets > 3:  # it is held by now
                raise Broken
            await coordinator.wait_for(await add(store, "b", 7))  # so that there is a conflict

    coordinator = ProjectionCoordinator(store, [Stubborn()])
    await append_numbers(store, 5)
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            await tasks.start(coordinator.run)
            await coordinator.wait_for(5)
            with pytest.raises(Broken):
                await coordinator.rebuild(NAME)
            await coordinator.wait_for(await add(store, "a", 6))
            coordinator.stop()
    assert await seen(store) == await positions(store)


async def test_what_was_parked_is_rebuilt_with_the_rest(store: EventStore) -> None:
    wrong, before = failing(2)
    coordinator = ProjectionCoordinator(store, [Recording(before=before)])
    await add(store, "a", 1, 2, 3)
    await run_for_a_while(coordinator, store)
    wrong.clear()
    await coordinator.rebuild(NAME)
    assert await coordinator.parked(NAME) == []
    await run_for_a_while(coordinator, store)
    assert await seen(store) == [1, 2, 3]


async def test_what_was_parked_and_not_reacted_to_is_not_rebuilt(store: EventStore) -> None:
    wrong, before = failing(2)
    coordinator = ProjectionCoordinator(store, [Reacting(before=before)])
    await add(store, "a", 1, 2, 3)
    await run_for_a_while(coordinator, store)
    with pytest.raises(ValueError, match="1 streams are parked"):
        await coordinator.rebuild(NAME)
    assert await seen(store) == [1]
    wrong.clear()
    await coordinator.retry_parked(NAME, "Thing-a")
    await coordinator.rebuild(NAME)
    await run_for_a_while(coordinator, store)
    assert await reactions(store) == [(1, 1), (2, 1), (3, 1)]


async def test_a_rebuild_mends_a_projection_that_has_failed(store: EventStore) -> None:
    wrong, before = failing(2)
    projection = Recording(before=before)
    projection.on_failure = "stop"
    coordinator = ProjectionCoordinator(store, [projection])
    await append_numbers(store, 5)
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            await tasks.start(coordinator.run)
            with pytest.raises(ProjectionStoppedError):
                await coordinator.wait_for(5)
            wrong.clear()
            await coordinator.rebuild(NAME)
            await coordinator.wait_for(5)
            coordinator.stop()
    assert await seen(store) == [1, 2, 3, 4, 5]


async def test_who_has_lost_a_shard_does_not_fail_by_what_changed_since(
    store: EventStore, elsewhere: EventStore
) -> None:
    other = ProjectionCoordinator(elsewhere, [Recording()])

    rebuilt = False

    async def before(event: StoredEvent) -> None:
        nonlocal rebuilt
        if event.position == 3 and not rebuilt:
            rebuilt = True
            await other.rebuild(NAME)
            raise Broken("what was written is gone")

    projection = Recording(before=before)
    projection.on_failure, projection.batch_size, projection.attempts = "stop", 1, 1
    await append_numbers(store, 5)
    await run_for_a_while(ProjectionCoordinator(store, [projection]), store)
    assert await seen(store) == [1, 2, 3, 4, 5]
    assert rebuilt


# -- progress ---------------------------------------------------------------------------------


async def test_progress_is_seen_from_anywhere(store: EventStore, elsewhere: EventStore) -> None:
    at, go_on = anyio.Event(), anyio.Event()

    async def before(event: StoredEvent) -> None:
        if event.position == 61 and not go_on.is_set():
            at.set()
            await go_on.wait()

    running = ProjectionCoordinator(store, [Recording(before=before)])
    watching = ProjectionCoordinator(elsewhere, [Recording()])
    progress = await watching.progress(NAME)
    assert (progress.fraction, progress.target, progress.seconds_left) == (1.0, 0, 0.0)
    await append_numbers(store, 100)
    progress = await watching.progress(NAME, version=1)
    assert (progress.name, progress.version) == (NAME, 1)
    assert (progress.position, progress.target, progress.fraction) == (0, 100, 0.0)
    assert (progress.rate, progress.seconds_left) == (0.0, None)
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            await tasks.start(running.run)
            await at.wait()
            progress = await watching.progress(NAME)
            assert (progress.position, progress.target, progress.fraction) == (60, 100, 0.6)
            assert progress.rate > 0
            assert progress.seconds_left == pytest.approx(40 / progress.rate)
            go_on.set()
            await running.wait_for(100)
            progress = await watching.progress(NAME)
            assert (progress.fraction, progress.seconds_left) == (1.0, 0.0)
            await running.rebuild(NAME)
            assert (await watching.progress(NAME)).rate >= 0
            running.stop()


async def test_progress_goes_over_what_is_filtered_out(
    store: EventStore, elsewhere: EventStore
) -> None:
    """It is saved though nothing more may come, so that others see it."""
    running = ProjectionCoordinator(store, [Recording(shards=3)])
    watching = ProjectionCoordinator(elsewhere, [Recording(shards=3)])
    await append_numbers(store, 3)
    await store.append_events("a", "Thing", [Ended()] * 10, ANY)
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            await tasks.start(running.run)
            while (await watching.progress(NAME)).fraction < 1:  # noqa: ASYNC110
                await anyio.sleep(0.01)
            running.stop()


@pytest.mark.parametrize("name", ["progress", "parked", "rebuild"])
async def test_what_is_not_known_is_named(store: EventStore, name: str) -> None:
    operation = getattr(ProjectionCoordinator(store, [Recording()]), name)
    with pytest.raises(ValueError, match="no projection 'x' here; there are: recording"):
        await operation("x")
    with pytest.raises(ValueError, match=r"Version 2 of .*\n.*was given: 1\.\n.*version=…"):
        await operation(NAME, version=2)
