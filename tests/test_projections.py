"""Projections and their coordinator, on every store."""

from __future__ import annotations

import anyio
import pytest

from eventsource_anyio import ANY, EventStore, Transaction
from eventsource_anyio.projections.base import Projection, handles
from eventsource_anyio.projections.coordinator import ProjectionCoordinator
from eventsource_anyio.testing.samples import Happened, append_numbers

from tests.every_store import make_store, open_store, which_store

__all__ = ["make_store", "open_store", "which_store"]


class Counting(Projection[Transaction]):
    """How often each stream has happened, in documents."""

    name = "counting"

    async def handle(self, event, tx):
        await tx.documents.add("seen", str(event.position), event.stream_id)

    async def reset(self, tx):
        for document in await tx.documents.list("seen", limit=100_000):
            await tx.documents.delete("seen", document.key)


async def test_every_event_is_handled_once(store: EventStore) -> None:
    await append_numbers(store, 20)
    coordinator = ProjectionCoordinator(store, [Counting()])
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            await tasks.start(coordinator.run)
            result = await store.append_events("b", "Thing", [Happened(1)], ANY)
            await coordinator.wait_for(result)
            assert len(await store.documents.list("seen", limit=100)) == 21
            coordinator.stop()
