"""Handlers that fail: at random, for ever, at one event; what is parked; and cancellation."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from random import Random
from typing import Any, cast

import anyio
import pytest
from attrs import evolve
from sqlalchemy import select

from eventsource_anyio import ANY, EventStore, InMemoryEventStore, StoredEvent
from eventsource_anyio.errors import ProjectionStoppedError
from eventsource_anyio.projections.base import Projection
from eventsource_anyio.projections.coordinator import ProjectionCoordinator
from eventsource_anyio.projections.parked import ParkedRepository
from eventsource_anyio.projections.progress import Progress
from eventsource_anyio.projections.running import ShardRun
from eventsource_anyio.projections.serving import COLLECTION as SERVING
from eventsource_anyio.projections.shards import ShardRepository
from eventsource_anyio.testing.cancelling import cancel_at_every_checkpoint
from eventsource_anyio.testing.reading import forgotten
from eventsource_anyio.testing.samples import Ended, Happened, append_numbers
from tests.every_store import make_store, open_store, which_store
from tests.read_models import (
    LEASE,
    TOTALS,
    Seen,
    SQLTotals,
    Summing,
    append,
    assert_seen,
    assert_totals,
    by_stream,
    create_tables,
    number_of,
    running,
    seen,
    summed,
    until,
)

__all__ = ["make_store", "open_store", "which_store"]

pytestmark = pytest.mark.usefixtures("saved_soon")


class Failing:
    """Fails before one of so many events, at random, and between them."""

    def __init__(self, seed: int, one_of: int) -> None:
        self.random = Random(seed)
        self.one_of = one_of
        self.failures = 0

    async def __call__(self, event: StoredEvent) -> None:
        if self.random.randrange(self.one_of) == 0:
            self.failures += 1
            raise OSError("at random")


async def total_of(store: EventStore) -> int:
    return sum([number_of(event) async for event in store.read_all()])


# -- at random --------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
async def test_a_handler_that_fails_at_random_has_the_sum_of_all_events(
    store: EventStore, shards: int
):
    failing = Failing(shards, 15)
    patient = {"shards": shards, "attempts": 100, "retry_after": 0.0001, "batch_size": 40}
    given: list[Projection] = [Seen(**patient), Summing(**patient)]
    if not isinstance(store, InMemoryEventStore):
        await create_tables(store)
        given.append(SQLTotals(**patient))
    for projection in given:
        projection.before = failing  # type: ignore[attr-defined]
    coordinator = ProjectionCoordinator(store, given)
    async with running(coordinator):
        await coordinator.wait_for(await append(store, 6, 20))
    assert failing.failures > 10
    await assert_seen(store)
    assert await summed(store) == await total_of(store) == 6 * 210
    if len(given) == 3:
        assert await assert_totals(store) == 120


# -- always -----------------------------------------------------------------------------------


class Poisoned(Seen):
    """Fails at events of these numbers."""

    attempts = 3
    retry_after = 0.001

    def __init__(self, *poison: int, **settings: object) -> None:
        super().__init__(**settings)
        self.poison = set(poison)

    async def before(self, event: StoredEvent) -> None:
        if number_of(event) in self.poison:
            raise ValueError(f"poison {number_of(event)}")


async def parked(store: EventStore) -> dict[str, tuple[int, int, int, str]]:
    found = await ParkedRepository(store, "seen", 1).all()
    return {one.stream_id: (one.first, one.last, one.events, one.error) for one in found}


async def test_a_batch_is_taken_apart_to_the_event_that_fails(store: EventStore):
    """Its neighbours are committed, those before it and, where it is parked, those behind it."""
    for start in range(0, 500, 100):
        events = [Happened(number) for number in range(start, start + 100)]
        await store.append_events(str(start), "Thing", events, ANY)
    stopping = Poisoned(250)
    coordinator = ProjectionCoordinator(store, [stopping])
    async with running(coordinator):
        with pytest.raises(ProjectionStoppedError) as stopped:
            await coordinator.wait_for(500)
        assert isinstance(stopped.value.__cause__, ValueError)
    assert await seen(store) == list(range(1, 251))
    calls = Counter(stopping.calls)
    assert calls[251] <= 9 + stopping.attempts  # as often as 500 can be halved
    assert stopping.calls.count(251) >= stopping.attempts
    assert len(stopping.calls) <= 3 * 500

    parking = Poisoned(250, on_failure="park")
    coordinator = ProjectionCoordinator(store, [parking])
    async with running(coordinator):
        await coordinator.wait_for(500)
    stays = {*range(251, 301)}
    assert await seen(store) == [one for one in range(1, 501) if one not in stays]
    assert await parked(store) == {"Thing-200": (51, 100, 50, "ValueError: poison 250")}
    assert len(parking.calls) <= 3 * 500


async def test_an_event_is_tried_so_often_with_pauses_that_double(store: EventStore):
    await append_numbers(store, 1)
    times: list[float] = []

    class Timed(Poisoned):
        async def before(self, event: StoredEvent) -> None:
            times.append(anyio.current_time())
            await super().before(event)

    coordinator = ProjectionCoordinator(store, [Timed(0, attempts=4, retry_after=0.02)])
    async with running(coordinator):
        with pytest.raises(ProjectionStoppedError):
            await coordinator.wait_for(1)
    pauses = [later - earlier for earlier, later in pairwise(times)]
    assert len(pauses) == 3
    for pause, least in zip(pauses, (0.02, 0.04, 0.08), strict=True):
        assert pause >= least * 0.95


async def test_stopping_cuts_the_pause_between_attempts_short(store: EventStore):
    await append_numbers(store, 3)
    coordinator = ProjectionCoordinator(store, [Poisoned(1, retry_after=1000)])
    async with running(coordinator):
        await until(lambda: coordinator.statistics()[0].state == "retrying")
        coordinator.stop()
        with anyio.fail_after(5):
            await coordinator.wait_stopped()
    assert await seen(store) == [1]


async def test_a_parked_stream_waits_and_the_others_go_on(store: EventStore):
    """In batches and after a new start, also with a shard that somebody else had before."""
    projection = Poisoned(7, on_failure="park", batch_size=5)
    for first in (0, 10, 20):
        coordinator = ProjectionCoordinator(store, [projection])
        async with running(coordinator):
            await append(store, 3, 5, first=first)
            position = await append(store, 3, 5, first=first + 5)
            await coordinator.wait_for(position)
    # 8, 9 and so on of each stream were never handled: number 7 is in all of them
    waits = {f"Thing-s{stream}": (7, 30, 24, "ValueError: poison 7") for stream in range(3)}
    assert await parked(store) == waits
    assert await seen(store) == list(range(1, 19))
    await append_numbers(store, 3, "other")
    coordinator = ProjectionCoordinator(store, [projection])
    async with running(coordinator):
        await coordinator.wait_for(93)
    assert await seen(store) == [*range(1, 19), 91, 92, 93]
    assert max(Counter(projection.calls).values()) <= 3 + 3 + 3


async def test_what_cannot_be_decoded_is_poison(store: EventStore):
    await append_numbers(store, 2)
    await store.append_events("a", "Thing", [Ended(), Happened(2)], ANY)
    await append_numbers(store, 2, "b")
    with forgotten(Ended.event_type):
        coordinator = ProjectionCoordinator(store, [Seen()])
        async with running(coordinator):
            with pytest.raises(ProjectionStoppedError) as stopped:
                await coordinator.wait_for(6)
        assert "Ended in Thing-a, version 3" in str(stopped.value.__cause__)
        assert await seen(store) == [1, 2]
        coordinator = ProjectionCoordinator(store, [Seen(on_failure="park")])
        async with running(coordinator):
            await coordinator.wait_for(6)
        assert await seen(store) == [1, 2, 5, 6]
        ((first, last, events, error),) = (await parked(store)).values()
        assert (first, last, events) == (3, 4, 2)
        assert error.startswith("EventDecodeError: ")


async def test_a_stream_is_parked_though_somebody_else_has_parked_it(store: EventStore):
    """It is looked at again, and what failed waits behind."""
    await append_numbers(store, 3)

    class ParkedMeanwhile(Poisoned):
        async def before(self, event: StoredEvent) -> None:
            if event.position == 2 and not await parked(store):
                value = {"first": 2, "last": 2, "events": 0, "error": "somebody's"}
                value["since"] = "2026-01-01T00:00:00+00:00"
                await store.documents.add("projections/seen/1/parked", "Thing-a", value)
            await super().before(event)

    coordinator = ProjectionCoordinator(store, [ParkedMeanwhile(1, on_failure="park")])
    async with running(coordinator):
        await coordinator.wait_for(3)
    assert await parked(store) == {"Thing-a": (2, 3, 2, "somebody's")}
    assert await seen(store) == [1]


async def test_many_streams_fail_in_many_shards(store: EventStore):
    projection = Poisoned(3, on_failure="park", shards=5, batch_size=20, retry_after=0.0001)
    await append(store, 20, 6)
    coordinator = ProjectionCoordinator(store, [projection])
    async with running(coordinator):
        await coordinator.wait_for(120)
        assert [one.state for one in coordinator.statistics()] == ["running"]
    assert len(await parked(store)) == 20
    assert {value[:3] for value in (await parked(store)).values()} == {(3, 6, 4)}
    assert len(await seen(store)) == 40


# -- cancelled --------------------------------------------------------------------------------


async def test_cancelled_at_every_checkpoint_of_its_run(store: EventStore):
    """What one leaves behind, the next one goes on with; each sum is exact."""
    settings = {"batch_size": 3, "attempts": 50, "retry_after": 0.00001, "shards": 2}
    sql = not isinstance(store, InMemoryEventStore)
    if sql:
        await create_tables(store)

    def projections() -> list[Projection]:
        given: list[Projection] = [Seen(**settings), Summing(**settings)]
        return [*given, SQLTotals(**settings)] if sql else given

    async def run() -> bool:
        coordinator = ProjectionCoordinator(store, projections(), lease=LEASE)
        position = await append(store, 2, 2)
        async with anyio.create_task_group() as tasks:
            await tasks.start(coordinator.run)
            await coordinator.wait_for(position)
            coordinator.stop()
        return True

    async def check(_: bool | None) -> None:
        coordinator = ProjectionCoordinator(store, projections(), lease=60)
        async with running(coordinator):
            await coordinator.wait_for(await store.last_position())
        await assert_seen(store)
        assert await summed(store) == await total_of(store)
        if sql:
            await assert_totals(store)

    assert await cancel_at_every_checkpoint(run, check) > 5


class Leaving(SQLTotals):
    """Stops its run at its last event; here and there something fails; one stream is poison."""

    batch_size = 3
    attempts = 2
    retry_after = 0.00001
    on_failure = "park"

    def __init__(self, sql: bool) -> None:
        super().__init__()
        self.sql = sql
        self.run: ShardRun | None = None
        self.last = 0
        self.handled = 0

    async def handle(self, event: StoredEvent, tx: Any) -> None:
        self.handled += 1
        if self.run is not None and event.position >= self.last:
            self.run.stop()
        if event.stream_id == "Thing-poison" or self.handled % 5 == 0:
            raise ValueError("now and then")
        await tx.documents.add("read/seen", f"{event.position:09}", event.stream_id)
        if self.sql:
            await super().handle(event, tx)


async def test_cancelled_at_every_checkpoint_of_a_shard(store: EventStore):
    """Reading, handling, committing, failing, parking, giving back; all in the task cancelled."""
    sql = not isinstance(store, InMemoryEventStore)
    if sql:
        await create_tables(store)
    shards, parking = ShardRepository(store, "totals", 1), ParkedRepository(store, "totals", 1)
    await store.documents.add(SERVING, "totals", {"version": 1})
    await shards.create(1)
    last = 0

    async def prepare() -> None:
        nonlocal last
        await store.append_events("poison", "Thing", [Happened(1)], ANY)
        last = await append(store, 2)

    async def run() -> bool:
        projection = Leaving(sql)
        projection.last = last
        (shard,) = await shards.all()
        taken = await shards.save(store.documents, evolve(shard, owner="me"))
        projection.run = ShardRun(
            *(store, cast("Any", projection), taken, shards, parking, Progress()),
            serving=True,
            ended=lambda _: None,
        )
        await projection.run.run()
        return True

    async def go_on(_: bool | None) -> None:
        """The next one begins with what this one has left, and would fail at what was doubled."""
        await prepare()

    await prepare()
    assert await cancel_at_every_checkpoint(run, go_on) > 12
    coordinator = ProjectionCoordinator(store, [Leaving(sql)], lease=60)
    async with running(coordinator):
        await coordinator.wait_for(last)
    (waits,) = await parking.all()
    events = [event async for event in store.read_all()]
    poison = [event.position for event in events if event.stream_id == "Thing-poison"]
    assert (waits.first, waits.last, waits.events) == (1, len(poison), len(poison))
    assert await seen(store) == [e.position for e in events if e.position not in poison]
    if sql:
        async with cast("Any", store).transaction() as tx:
            rows = (await tx.execute(select(TOTALS))).all()
        kept = [event for event in events if event.position not in poison]
        assert {stream: tuple(of) for stream, *of in rows} == by_stream(kept)
