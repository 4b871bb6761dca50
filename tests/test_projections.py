"""What a projection handles, and what it refuses to be."""

from __future__ import annotations

from typing import ClassVar

import anyio
import attrs
import pytest

from eventsource_anyio import (
    ANY,
    EventStore,
    OutboxMessage,
    SQLiteEventStore,
    StoredEvent,
    Transaction,
)
from eventsource_anyio.projections.base import Projection, check_projection, handles
from eventsource_anyio.projections.coordinator import ProjectionCoordinator
from eventsource_anyio.projections.serving import COLLECTION as SERVING
from eventsource_anyio.testing.samples import Ended, Happened, append_numbers
from tests.every_store import make_store, open_store, which_store
from tests.read_models import Seen, assert_seen, running, seen, shard_documents

__all__ = ["make_store", "open_store", "which_store"]


@attrs.frozen
class HappenedAgain(Happened):
    event_type: ClassVar[str] = "tests.projections.HappenedAgain"


class Marked(Projection[Transaction]):
    """By methods for the events it wants."""

    name = "marked"

    def __init__(self) -> None:
        self.handled: list[tuple[str, int]] = []

    @handles(Happened)
    async def happened(self, event: StoredEvent, tx: Transaction) -> None:
        self.handled.append(("happened", event.position))

    @handles(Ended)
    async def ended(self, event: StoredEvent, tx: Transaction) -> None:
        self.handled.append(("ended", event.position))

    async def reset(self, tx: Transaction) -> None: ...


# -- what is handled --------------------------------------------------------------------------


async def test_every_event_is_handled_once(store: EventStore):
    await append_numbers(store, 20)
    coordinator = ProjectionCoordinator(store, [Seen()])
    async with running(coordinator):
        result = await store.append_events("b", "Thing", [Happened(1)], ANY)
        await coordinator.wait_for(result)
        assert len(await seen(store)) == 21
    await assert_seen(store)


async def test_marked_methods_handle_their_events_and_those_of_subclasses(store: EventStore):
    projection = Marked()
    coordinator = ProjectionCoordinator(store, [projection])
    async with running(coordinator):
        for event in (Happened(), Ended(), HappenedAgain()):
            result = await store.append_events("a", "Thing", [event], ANY)
        await coordinator.wait_for(result)
    expected = [("happened", 1), ("ended", 2), ("happened", 3)]
    assert projection.handled == expected


async def test_what_is_filtered_out_is_passed_over(store: EventStore):
    """By types of events and of aggregates; the checkpoint is where the store ends."""
    by_event = Seen(name="by event", event_types=[Happened])
    by_name = Seen(name="by name", event_types=[HappenedAgain.event_type])
    by_aggregate = Seen(name="by aggregate", aggregate_types=["Other"])
    coordinator = ProjectionCoordinator(store, [by_event, by_name, by_aggregate])
    async with running(coordinator):
        await store.append_events("a", "Thing", [Ended(), Happened(), HappenedAgain()], ANY)
        await store.append_events("a", "Other", [Happened()], ANY)
        await store.append_events("a", "Thing", [Ended()], ANY)
        await coordinator.wait_for(5)
        assert [one.position for one in coordinator.statistics()] == [5, 5, 5]
    assert await seen(store, "by event") == [2, 4]
    assert await seen(store, "by name") == [3]
    assert await seen(store, "by aggregate") == [4]
    for name in ("by event", "by name", "by aggregate"):
        assert [shard["position"] for shard in await shard_documents(store, name)] == [5]


async def test_a_batch_is_one_transaction_of_so_many_events(store: EventStore):
    await append_numbers(store, 25)
    sizes: list[int] = []

    class Batches(Seen):
        async def handle_batch(self, events, tx):
            sizes.append(len(events))
            await super().handle_batch(events, tx)

    coordinator = ProjectionCoordinator(store, [Batches(batch_size=10)])
    async with running(coordinator):
        await coordinator.wait_for(25)
    assert sizes == [10, 10, 5]
    await assert_seen(store)


async def test_a_batch_ends_when_its_time_is_over(store: EventStore):
    await append_numbers(store, 10)
    shards: list[int] = []

    class Slow(Seen):
        async def before(self, event: StoredEvent) -> None:
            (shard,) = await shard_documents(store, "seen")
            shards.append(shard["position"])

    coordinator = ProjectionCoordinator(store, [Slow(batch_seconds=1e-9)])
    async with running(coordinator):
        await coordinator.wait_for(10)
    assert shards == list(range(10))  # each event is committed before the next one is handled
    await assert_seen(store)


# -- reactions --------------------------------------------------------------------------------


class Reacting(Seen):
    async def react(self, event: StoredEvent, tx: Transaction) -> None:
        message = OutboxMessage("t", str(event.position).encode())
        await tx.outbox.add(message)


class ReactingInBatches(Reacting):
    async def handle_batch(self, events, tx):
        for event in events:
            await self.handle(event, tx)


async def reactions(store: EventStore) -> list[int]:
    return [int(one.message.payload) for one in await store.outbox.pending(1000)]


@pytest.mark.parametrize("kind", [Reacting, ReactingInBatches])
async def test_only_the_version_that_serves_reacts(store: EventStore, kind: type[Reacting]):
    await append_numbers(store, 3)

    class Other(kind):  # type: ignore[valid-type, misc]
        async def handle(self, event, tx): ...

    coordinator = ProjectionCoordinator(store, [kind(version=1), Other(version=2)])
    async with running(coordinator):
        await append_numbers(store, 2)
        await coordinator.wait_for(5)
    assert await reactions(store) == [1, 2, 3, 4, 5]
    assert {one.version: one.serving for one in coordinator.statistics()} == {1: True, 2: False}


async def test_what_was_reacted_to_before_is_not_reacted_to_again(store: EventStore):
    """`quiet` in the shard, as a rebuild leaves it."""
    await append_numbers(store, 5)
    await store.documents.add(SERVING, "seen", {"version": 1})
    shard = {"first": 0, "last": 1023, "position": 0, "owner": None, "quiet": 3, "until": None}
    await store.documents.add("projections/seen/1/shards", "0000", shard)
    coordinator = ProjectionCoordinator(store, [Reacting()])
    async with running(coordinator):
        await coordinator.wait_for(5)
    await assert_seen(store)
    assert await reactions(store) == [4, 5]


async def test_nothing_is_handled_beyond_until(store: EventStore):
    await append_numbers(store, 5)
    await store.documents.add(SERVING, "seen", {"version": 1})
    shard = {"first": 0, "last": 1023, "position": 0, "owner": None, "quiet": 0, "until": 3}
    await store.documents.add("projections/seen/1/shards", "0000", shard)
    coordinator = ProjectionCoordinator(store, [Seen()])
    async with running(coordinator):
        await coordinator.wait_for(3)
        await append_numbers(store, 1)
        await anyio.wait_all_tasks_blocked()
        assert [one.position for one in coordinator.statistics()] == [3]
    assert await seen(store) == [1, 2, 3]


# -- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("name", ""),
        ("name", "x" * 151),
        ("name", 7),
        ("version", 0),
        ("version", True),
        ("version", "1"),
        ("shards", 0),
        ("shards", 1025),
        ("batch_size", 0),
        ("batch_size", 1.5),
        ("attempts", 0),
        ("batch_seconds", 0),
        ("batch_seconds", float("nan")),
        ("retry_after", -1),
        ("on_failure", "ignore"),
        ("event_types", [int]),
        ("event_types", "Ended"),
        ("event_types", Happened),
        ("aggregate_types", "Thing"),
    ],
)
def test_settings_that_cannot_be_are_refused(setting: str, value: object):
    with pytest.raises((ValueError, TypeError)):
        check_projection(Seen(**{setting: value}))


def test_what_is_no_projection_is_refused():
    class Nameless(Projection[Transaction]):
        async def reset(self, tx): ...

    with pytest.raises(TypeError, match="Projection objects"):
        check_projection(Seen)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="name"):
        check_projection(Nameless())
    with pytest.raises(TypeError, match="abstract"):
        Projection()  # type: ignore[abstract]


def test_a_coordinator_refuses_what_it_cannot_run(tmp_path):
    store = SQLiteEventStore(tmp_path / "events.db")
    with pytest.raises(ValueError, match="no projection"):
        ProjectionCoordinator(store, [])
    with pytest.raises(ValueError, match="same name and version"):
        ProjectionCoordinator(store, [Seen(), Seen()])
    with pytest.raises(ValueError, match="lease"):
        ProjectionCoordinator(store, [Seen()], lease=0)
    with pytest.raises(ValueError, match="shards"):
        ProjectionCoordinator(store, [Seen(shards=0)])
    ProjectionCoordinator(store, [Seen(version=1), Seen(version=2), Seen(name="other")])


def test_methods_that_cannot_be_called_are_refused_where_they_are_defined():
    with pytest.raises(TypeError, match="needs event classes"):
        handles()
    with pytest.raises(TypeError):
        handles(int)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be async"):

        @handles(Happened)
        def happened(self, event, tx): ...

    with pytest.raises(TypeError, match="are both for Happened"):

        class Twice(Projection[Transaction]):
            @handles(Happened)
            async def one(self, event, tx): ...

            @handles(Happened)
            async def other(self, event, tx): ...


def test_filters_follow_from_marked_methods_unless_handle_is_overridden():
    wanted = {Happened.event_type, HappenedAgain.event_type, Ended.event_type}
    assert set(Marked().filters().event_types) == wanted

    class Handling(Marked):
        async def handle(self, event, tx): ...

    assert Handling().filters().event_types == ()
    Handling.event_types = [Ended]
    assert Handling().filters().event_types == (Ended.event_type,)
