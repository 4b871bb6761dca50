"""A projection whose batch meets the writes of others, and one that skips while others wait."""

from __future__ import annotations

import anyio
import pytest
from anyio.lowlevel import checkpoint

from eventsource_anyio import (
    ANY,
    AppendResult,
    ConcurrencyError,
    EventStore,
    StoredEvent,
    Transaction,
)
from eventsource_anyio.errors import ProjectionStoppedError
from eventsource_anyio.projections.base import Projection
from eventsource_anyio.projections.coordinator import ProjectionCoordinator
from eventsource_anyio.testing.samples import Ended, Happened, numbers
from tests.every_store import make_store, open_store, which_store

__all__ = ["make_store", "open_store", "which_store"]

pytestmark = pytest.mark.usefixtures("saved_soon")


async def happen(store: EventStore) -> AppendResult:
    return await store.append_events("a", "Thing", [Happened(5)], ANY)


class Contended(Projection[Transaction]):
    """Appends where it has found the end of a stream, while others get ahead of it."""

    name = "contended"
    attempts = 1
    retry_after = 0.001

    def __init__(self, store: EventStore, others: int) -> None:
        self.store = store
        self.others = others
        self.calls = 0

    async def handle(self, event: StoredEvent, tx: Transaction) -> None:
        self.calls += 1
        if event.aggregate_id == "a":
            version = (await self.store.get_events("b", "Thing")).version
            if self.others:
                self.others -= 1
                await self.store.append_events("b", "Thing", [Happened(0)], ANY)
            await tx.append_events("b", "Thing", [Happened(1)], version)

    async def reset(self, tx: Transaction) -> None:
        pass


async def test_a_writer_who_gets_ahead_costs_no_attempt(store: EventStore) -> None:
    projection = Contended(store, 7)
    coordinator = ProjectionCoordinator(store, [projection])
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            await tasks.start(coordinator.run)
            await coordinator.wait_for(await happen(store))
            coordinator.stop()
    assert numbers(await store.get_events("b")) == [0] * 7 + [1]


async def test_a_conflict_with_nobody_is_a_failure(store: EventStore) -> None:
    class Wrong(Contended):
        async def handle(self, event: StoredEvent, tx: Transaction) -> None:
            self.calls += 1
            await tx.append_events("b", "Thing", [Happened(1)], 5)

    projection = Wrong(store, 0)
    projection.attempts = 3
    coordinator = ProjectionCoordinator(store, [projection])
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            await tasks.start(coordinator.run)
            with pytest.raises(ProjectionStoppedError) as stopped:
                await coordinator.wait_for(await happen(store))
            coordinator.stop()
    assert isinstance(stopped.value.__cause__, ConcurrencyError)
    assert projection.calls == 4


class Filtered(Projection[Transaction]):
    name = "filtered"
    event_types = (Ended,)
    shards = 2

    async def reset(self, tx: Transaction) -> None:
        pass


async def test_what_is_skipped_elsewhere_is_waited_for(store: EventStore) -> None:
    """Also if nothing happens afterwards."""
    coordinators = [ProjectionCoordinator(store, [Filtered()], lease=0.5) for _ in range(2)]
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            for coordinator in coordinators:
                await tasks.start(coordinator.run)
            while [one.statistics()[0].shards_here for one in coordinators] != [1, 1]:
                await checkpoint()
            result = await happen(store)
            for coordinator in coordinators:
                await coordinator.wait_for(result)
            for coordinator in coordinators:
                coordinator.stop()
