"""A projection that skips while others wait."""

from __future__ import annotations

import anyio
from anyio.lowlevel import checkpoint

from eventsource_anyio import (
    ANY,
    AppendResult,
    EventStore,
    Transaction,
)
from eventsource_anyio.projections.base import Projection
from eventsource_anyio.projections.coordinator import ProjectionCoordinator
from eventsource_anyio.testing.samples import Ended, Happened
from tests.every_store import make_store, open_store, which_store

__all__ = ["make_store", "open_store", "which_store"]


async def happen(store: EventStore) -> AppendResult:
    return await store.append_events("a", "Thing", [Happened(5)], ANY)


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
