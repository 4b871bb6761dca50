"""A projection for tests: it records what it was given, and nothing of it can come twice."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Literal

import anyio
import pytest

from eventsource_anyio import ANY, EventStore, StoredEvent, Transaction
from eventsource_anyio.projections import Projection, ProjectionCoordinator
from eventsource_anyio.testing.samples import Happened

LEASE = 0.3
NAME = "recording"
PATIENCE = 60  # for a machine that is busy; the tests need a fraction of it
ALL = 1_000_000


class Broken(Exception):  # noqa: N818
    pass


async def nothing(event: StoredEvent) -> None:
    pass


class Recording(Projection[Transaction]):
    """A document for each event, which can be added only once; and one for each reaction."""

    name = NAME
    attempts = 2
    retry_after = 0.001
    batch_size = 20
    on_failure: Literal["stop", "park"] = "park"
    event_types = (Happened,)

    def __init__(
        self,
        version: int = 1,
        shards: int = 1,
        before: Callable[[StoredEvent], Awaitable[None]] = nothing,
    ) -> None:
        self.version = version
        self.shards = shards
        self.before = before  # is awaited before an event is handled; may raise

    async def handle(self, event: StoredEvent, tx: Transaction) -> None:
        await self.before(event)
        assert isinstance(event.event, Happened)
        value = [event.stream_id, event.event.number]
        await tx.documents.add(f"seen/{self.version}", f"{event.position:06}", value)

    async def reset(self, tx: Transaction) -> None:
        for document in await tx.documents.list(f"seen/{self.version}", limit=ALL):
            await tx.documents.delete(f"seen/{self.version}", document.key)

    async def take_over(self, tx: Transaction) -> None:
        await tx.documents.save("readers", "version", self.version)


class Reacting(Recording):
    async def react(self, event: StoredEvent, tx: Transaction) -> None:
        await tx.documents.add("reactions", f"{event.position:06}", self.version)


async def positions(store: EventStore) -> list[int]:
    return [one.position async for one in store.read_all() if isinstance(one.event, Happened)]


async def seen(store: EventStore, version: int = 1) -> list[int]:
    """The positions that were handled; each stream's in the order of its events."""
    documents = await store.documents.list(f"seen/{version}", limit=ALL)
    order: dict[object, list[int]] = {}
    for document in sorted(documents, key=lambda one: one.revision):
        assert isinstance(document.value, list)
        order.setdefault(document.value[0], []).append(int(document.key))
    assert all(found == sorted(found) for found in order.values()), order
    return [int(document.key) for document in documents]


async def reactions(store: EventStore) -> Sequence[tuple[int, object]]:
    """The positions that were reacted to, and the version that did."""
    documents = await store.documents.list("reactions", limit=ALL)
    return [(int(document.key), document.value) for document in documents]


def failing(*numbers: int) -> tuple[set[int], Callable[[StoredEvent], Awaitable[None]]]:
    """A set of numbers whose events cannot be handled as long as they are in it."""
    wrong = set(numbers)

    async def before(event: StoredEvent) -> None:
        assert isinstance(event.event, Happened)
        if event.event.number in wrong:
            raise Broken(f"number {event.event.number}")

    return wrong, before


@pytest.fixture(name="elsewhere")
async def open_elsewhere(
    store: EventStore, make_store: Callable[[], EventStore]
) -> AsyncIterator[EventStore]:
    """The same events as another process has them; in memory it is the same store."""
    other = make_store()
    if other is store:
        yield store
    else:
        async with other:
            yield other


async def run_for_a_while(coordinator: ProjectionCoordinator, store: EventStore) -> None:
    """Until everything that is in the store is handled, or set aside."""
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            await tasks.start(coordinator.run)
            await coordinator.wait_for(await store.last_position())
            coordinator.stop()


async def add(store: EventStore, stream: str, *numbers: int) -> int:
    """Append to a stream; the position of the last one."""
    events = [Happened(number) for number in numbers]
    return (await store.append_events(stream, "Thing", events, ANY)).position
