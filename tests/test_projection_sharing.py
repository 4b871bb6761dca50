"""Several coordinators share the shards of a projection: evenly, and each event is handled once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack, suppress

import anyio
import anyio.abc
import pytest
from attrs import evolve

from eventsource_anyio import EventStore, InMemoryEventStore, StoreClosedError, StoredEvent
from eventsource_anyio.errors import DocumentConflictError
from eventsource_anyio.projections.base import Projection
from eventsource_anyio.projections.coordinator import ProjectionCoordinator
from eventsource_anyio.projections.members import COLLECTION
from eventsource_anyio.projections.shards import Shard, ShardRepository, ranges
from tests.every_store import make_store, open_store, which_store
from tests.read_models import (
    LEASE,
    Seen,
    SQLTotals,
    Summing,
    append,
    assert_seen,
    assert_totals,
    create_tables,
    number_of,
    running,
    seen,
    shard_documents,
    summed,
    until,
)

__all__ = ["make_store", "open_store", "which_store"]


def here(*coordinators: ProjectionCoordinator) -> list[int]:
    return [one.statistics()[0].shards_here for one in coordinators]


def test_ranges_cover_all_slices():
    for count in (1, 2, 3, 4, 7, 8, 1000, 1024):
        found = ranges(count)
        assert [one for first, last in found for one in range(first, last + 1)] == [*range(1024)]
        assert len(found) == count
        sizes = {last - first for first, last in found}
        assert max(sizes) - min(sizes) <= 1


async def test_shards_are_shared_evenly_as_coordinators_come_and_go(store: EventStore):
    one, two, three, four = (
        ProjectionCoordinator(store, [Seen(shards=8)], lease=LEASE) for _ in range(4)
    )

    async def append_always() -> None:
        first = 0
        while True:
            await append(store, 5, 1, first=first)
            first += 1
            await anyio.sleep(0.002)

    async with anyio.create_task_group() as writing:
        writing.start_soon(append_always)
        async with running(one):
            assert here(one) == [8]
            async with running(two, three):
                await until(lambda: sorted(here(one, two, three)) == [2, 3, 3])
                async with running(four):
                    await until(lambda: here(one, two, three, four) == [2, 2, 2, 2])
                    three.stop()
                    await three.wait_stopped()
                    await until(lambda: sorted(here(one, two, four)) == [2, 3, 3])
            await until(lambda: here(one) == [8])
            writing.cancel_scope.cancel()
    async with running(one):
        await one.wait_for(await store.last_position())
    await assert_seen(store)


async def test_what_a_dead_one_had_is_taken_over_once_its_lease_is_over(store: EventStore):
    await append(store, 8, 2)
    shards = ShardRepository(store, "seen", 1)
    await store.documents.add(COLLECTION, "dead", {"projections": ["seen@1"]})
    await shards.create(4)
    for shard in await shards.all():
        await shards.save(store.documents, evolve(shard, owner="dead"))
    coordinator = ProjectionCoordinator(store, [Seen(shards=4)], lease=LEASE)
    async with running(coordinator):
        begun = anyio.current_time()
        assert here(coordinator) == [0]
        assert coordinator.statistics()[0].state == "waiting"
        await coordinator.wait_for(16)
        assert anyio.current_time() - begun > LEASE * 0.9
        assert here(coordinator) == [4]
        assert await store.documents.get(COLLECTION, "dead") is None
    await assert_seen(store)


async def test_one_whose_store_is_gone_is_taken_over(make_store: Callable[[], EventStore]):
    """It cannot say good-bye."""
    if make_store() is make_store():
        pytest.skip("a store in memory is gone for everybody")
    async with make_store() as store, AsyncExitStack() as stack:
        await append(store, 8, 2)
        doomed_store = await stack.enter_async_context(make_store())
        doomed = ProjectionCoordinator(doomed_store, [Seen(shards=4)], lease=LEASE)
        coordinator = ProjectionCoordinator(store, [Seen(shards=4)], lease=LEASE)

        async def run_doomed(*, task_status: anyio.abc.TaskStatus[None]) -> None:
            with suppress(StoreClosedError):
                await doomed.run(task_status=task_status)

        async with running(coordinator) as tasks:
            await tasks.start(run_doomed)
            await until(lambda: here(coordinator, doomed) == [2, 2])
            await doomed_store.__aexit__(None, None, None)
            await doomed.wait_stopped()
            assert len(await store.documents.list(COLLECTION)) == 2
            await coordinator.wait_for(await append(store, 8, 2))
            await until(lambda: here(coordinator) == [4])
        await assert_seen(store)


# -- another number of shards -----------------------------------------------------------------


async def test_another_number_of_shards_keeps_the_positions(store: EventStore):
    calls = 0
    for shards in (4, 8, 3, 1, 1024 if isinstance(store, InMemoryEventStore) else 16, 2):
        projection = Seen(shards=shards)
        coordinator = ProjectionCoordinator(store, [projection])
        async with running(coordinator):
            await coordinator.wait_for(await append(store, 10, 2))
            assert here(coordinator) == [shards]
        documents = await shard_documents(store, "seen")
        assert [(one["first"], one["last"]) for one in documents] == ranges(shards)
        calls += len(projection.calls)
    assert calls == await store.last_position()
    await assert_seen(store)


async def test_shards_that_stand_apart_are_split_and_joined_later(store: EventStore):
    """One of them was stopped by an event; nothing is skipped, and nothing is done again."""

    class Breaking(Seen):
        mended = False
        attempts = 1

        async def before(self, event: StoredEvent) -> None:
            if event.stream_id == "Thing-s3" and not self.mended:
                raise ValueError("broken")

    await append(store, 10, 4)
    broken = ProjectionCoordinator(store, [Breaking(shards=4)])
    async with running(broken):
        await until(lambda: broken.statistics()[0].state == "failed")
    handled = await seen(store)
    assert 0 < len(handled) < 40
    mended = Breaking(shards=3)
    mended.mended = True
    coordinator = ProjectionCoordinator(store, [mended])
    async with running(coordinator):
        await coordinator.wait_for(40)
        assert here(coordinator)[0] >= 3
    assert sorted(mended.calls) == [one for one in range(1, 41) if one not in handled]
    await assert_seen(store)
    async with running(coordinator):
        assert here(coordinator) == [3]


@pytest.mark.usefixtures("saved_soon")
async def test_coordinators_of_different_opinions_on_the_number_of_shards(store: EventStore):
    """While a new version of the program is rolled out."""
    old = [ProjectionCoordinator(store, [Seen(shards=4)], lease=LEASE) for _ in range(2)]
    new = [ProjectionCoordinator(store, [Seen(shards=6)], lease=LEASE) for _ in range(2)]
    async with running(*old):
        await old[0].wait_for(await append(store, 10, 2))
        async with running(*new):
            await new[0].wait_for(await append(store, 10, 2))
            for one in old:
                one.stop()
                await one.wait_stopped()
            await new[1].wait_for(await append(store, 10, 2))
    await assert_seen(store)


# -- fencing ----------------------------------------------------------------------------------


class Signing(Seen):
    """Leaves its mark where another one's would not be noticed; waits at its first event."""

    shards = 2

    def __init__(self, mark: str, *, waits: bool = False) -> None:
        super().__init__()
        self.mark = mark
        self.waits = waits
        self.there = anyio.Event()
        self.go_on = anyio.Event()

    async def handle(self, event, tx):
        self.calls.append(event.position)
        await tx.documents.save("marks", str(event.position), self.mark)
        self.there.set()
        if self.waits:
            await self.go_on.wait()


async def test_who_was_taken_over_inside_a_handler_commits_nothing(store: EventStore):
    await append(store, 6, 2)
    slow, quick = Signing("slow", waits=True), Signing("quick")
    # It looks so seldom that it does not find out by itself.
    one = ProjectionCoordinator(store, [slow], lease=600)
    two = ProjectionCoordinator(store, [quick], lease=LEASE)
    async with running(one, two):
        await slow.there.wait()
        await two.wait_for(12)
        slow.waits = False
        slow.go_on.set()
        await until(lambda: one.statistics()[0].shards_here < 2)
        await two.wait_for(await append(store, 6, 2))
        await one.wait_for(24)
        marks = {int(one.key): one.value for one in await store.documents.list("marks")}
    assert {position: marks[position] for position in range(1, 13)} == dict.fromkeys(
        range(1, 13), "quick"
    )
    assert sorted(marks) == [*range(1, 25)]
    assert slow.calls
    assert len(set(quick.calls)) == len(quick.calls)


async def test_a_shard_that_could_not_be_given_back_is_given_back_later(store: EventStore):
    """It has an owner who is alive and does not run it."""
    one = ProjectionCoordinator(store, [Seen(shards=2)], lease=LEASE)
    two = ProjectionCoordinator(store, [Seen(shards=2)], lease=LEASE)
    shards = ShardRepository(store, "seen", 1)

    async def claim(shard: Shard, owner: str | None) -> bool:
        try:
            await shards.save(store.documents, evolve(shard, owner=owner))
        except DocumentConflictError:
            return False
        return True

    async with running(one):
        (first,) = [document.key for document in await store.documents.list(COLLECTION)]
        async with running(two):
            await until(lambda: here(one, two) == [1, 1])
            (other,) = [shard for shard in await shards.all() if shard.owner != first]
            assert await claim(other, first)
            await two.wait_for(await append(store, 10))
            await until(lambda: here(one, two) == [1, 1])
    await assert_seen(store)


async def test_one_that_was_taken_for_dead_joins_again(store: EventStore):
    projection = Seen(shards=2)
    coordinator = ProjectionCoordinator(store, [projection], lease=LEASE)
    async with running(coordinator):
        for _ in range(3):
            (document,) = await store.documents.list(COLLECTION)
            await store.documents.delete(COLLECTION, document.key)
            position = await append(store, 5)

            async def joined(key: str = document.key) -> bool:
                return [one.key for one in await store.documents.list(COLLECTION)] not in (
                    [],
                    [key],
                )

            await until(joined)
            await coordinator.wait_for(position)
    await assert_seen(store)
    assert set(projection.calls) == set(range(1, 16))  # a batch may have been begun twice


async def test_sums_while_shards_change_hands(store: EventStore):
    """Coordinators that come and go, some of them cancelled, and two kinds of sums."""
    sql = not isinstance(store, InMemoryEventStore)
    if sql:
        await create_tables(store)

    def coordinator(shards: int) -> ProjectionCoordinator:
        settings = {"shards": shards, "batch_size": 7, "attempts": 1000, "retry_after": 0.0001}
        given: list[Projection] = [Summing(**settings), *([SQLTotals(**settings)] if sql else [])]
        return ProjectionCoordinator(store, given, lease=LEASE)

    staying = coordinator(5)
    async with running(staying):
        for shards in (5, 3, 5):
            async with anyio.create_task_group() as tasks:
                leaving = coordinator(shards)
                await tasks.start(leaving.run)
                position = await append(store, 8, 3)
                await leaving.wait_for(position - 12)
                tasks.cancel_scope.cancel()
        await staying.wait_for(await store.last_position())
    assert await summed(store) == sum([number_of(one) async for one in store.read_all()])
    if sql:
        await assert_totals(store)
