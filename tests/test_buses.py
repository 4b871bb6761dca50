"""The bus of one process: the contract of every bus, and what it promises beyond that."""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import attrs
import pytest
from anyio.lowlevel import checkpoint

from eventsource_anyio import (
    ANY,
    AggregateRepository,
    AggregateRoot,
    DomainEvent,
    EventStore,
    InMemoryEventBus,
    StoredEvent,
    applies,
    event_metadata,
)
from eventsource_anyio.bus.recent import RecentIds
from eventsource_anyio.errors import FellBehindError, PublishError
from eventsource_anyio.ids import uuid7
from eventsource_anyio.testing import EventBusContract, cancel_at_every_checkpoint
from eventsource_anyio.testing.buses import Seen, by_stream, receive, stored
from eventsource_anyio.testing.samples import Ended, Happened, numbers


class TestInMemoryEventBus(EventBusContract):
    @pytest.fixture
    def bus(self) -> InMemoryEventBus:
        return InMemoryEventBus()


@attrs.frozen
class Knocked(DomainEvent):
    times: int = 1


@attrs.frozen
class KnockedHard(Knocked):
    pass


class Door(AggregateRoot):
    knocks = 0

    def knock(self) -> None:
        self.apply(Knocked())

    @applies(Knocked)
    def _knocked(self, event: Knocked) -> None:
        self.knocks += event.times


class Blocked:
    """A handler that begins, and ends when it is let."""

    def __init__(self) -> None:
        self.begun, self.let = anyio.Event(), anyio.Event()
        self.calls = 0
        self.done: list[int] = []

    async def __call__(self, event: StoredEvent) -> None:
        self.calls += 1
        self.begun.set()
        await self.let.wait()
        self.done.append(event.version)


async def fail(event: StoredEvent) -> None:
    raise KeyError(event.version)


# -- handlers without run() -------------------------------------------------------------------


async def test_without_run_the_publisher_calls_the_handlers(event_store: EventStore):
    bus, first, second = InMemoryEventBus(), Seen(), Seen()
    bus.register(first)
    bus.register(second, Ended)
    events = await stored(event_store, 3)
    await bus.publish(events)
    assert first.events == list(events)
    assert second.events == []
    assert bus.statistics().queued == 0


async def test_without_run_order_is_kept_among_publishers(event_store: EventStore):
    bus, seen = InMemoryEventBus(buffer=4), Seen()

    async def handle(event: StoredEvent) -> None:
        for _ in range(event.version % 3):
            await checkpoint()
        await seen(event)

    bus.register(handle)

    async def publish() -> None:
        events = await stored(event_store, 3)
        await bus.publish(events)
        assert all(one in seen.events for one in events)

    async with anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(publish)
    assert by_stream(seen.events) == {"Thing-a": list(range(1, 61))}


async def test_without_run_a_cancelled_publisher_waits_for_the_handlers(event_store: EventStore):
    bus, blocked, seen = InMemoryEventBus(), Blocked(), Seen()
    bus.register(blocked)
    bus.register(seen)
    events = await stored(event_store, 2)
    async with anyio.create_task_group() as tasks:
        with anyio.CancelScope() as scope:

            async def cancel() -> None:
                await blocked.begun.wait()
                scope.cancel()
                await anyio.wait_all_tasks_blocked()
                blocked.let.set()

            tasks.start_soon(cancel)
            await bus.publish(events)
    assert blocked.done == [1, 2]
    assert seen.events == list(events)


async def test_those_who_began_without_run_are_done_before_it_starts(event_store: EventStore):
    bus, blocked = InMemoryEventBus(), Blocked()
    bus.register(blocked)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bus.publish, await stored(event_store, 1))
        await blocked.begun.wait()
        tasks.start_soon(bus.run)
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(bus.publish, await stored(event_store, 1))
        await anyio.wait_all_tasks_blocked()
        assert blocked.calls == 1
        blocked.let.set()
        await bus.publish(await stored(event_store, 1))
        assert blocked.done == [1, 2, 3]
        bus.stop()


async def test_more_than_the_buffer_is_published_in_parts(event_store: EventStore):
    bus, seen = InMemoryEventBus(buffer=3), Seen()
    bus.register(seen)
    await bus.publish(events := await stored(event_store, 10))
    async with anyio.create_task_group() as tasks:
        await tasks.start(bus.run)
        await bus.publish(later := await stored(event_store, 10))
        await bus.publish(last := await stored(event_store, 10), background=True)
        bus.stop()
    assert seen.events == [*events, *later, *last]


# -- failures ---------------------------------------------------------------------------------


@pytest.fixture(params=["run", "not run"])
def runs(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "run")


async def test_a_failure_reaches_the_publisher_as_one_error(event_store: EventStore, runs: bool):
    bus, seen = InMemoryEventBus(), Seen()
    bus.register(fail, Happened)
    bus.register(seen)
    events = await stored(event_store, 2)
    async with anyio.create_task_group() as tasks:
        if runs:
            await tasks.start(bus.run)
        with pytest.raises(PublishError) as caught:
            await bus.publish(events)
        assert seen.events == list(events)
        await bus.publish((await event_store.append_events("a", "Thing", [Ended()], ANY)).events)
        bus.stop()
    assert [repr(error) for error in caught.value.errors] == ["KeyError(1)", "KeyError(2)"]
    assert caught.value.__cause__ is caught.value.errors[0]
    assert str(caught.value) == (
        "Handlers have failed that the events were published to.\n"
        f"  KeyError(1), in handler fail of {Happened.event_type}, Thing-a, version 1.\n"
        f"  KeyError(2), in handler fail of {Happened.event_type}, Thing-a, version 2.\n"
        "  The events are stored, and everybody else has had them. Mend the handler; published "
        "again, they reach who has failed only.\n"
        "  A bus that is given on_failure=… tells that in place of the publisher."
    )


async def test_what_is_published_again_reaches_those_who_have_failed(
    event_store: EventStore, runs: bool
):
    bus, seen, tried, fails = InMemoryEventBus(), Seen(), Seen(), True

    async def fail_once(event: StoredEvent) -> None:
        nonlocal fails
        await tried(event)
        if event.version == 2 and fails:
            fails = False
            raise KeyError("once")

    bus.register(fail_once)
    bus.register(seen)
    events = await stored(event_store, 3)
    async with anyio.create_task_group() as tasks:
        if runs:
            await tasks.start(bus.run)
        async with bus.subscribe() as stream:
            with pytest.raises(PublishError):
                await bus.publish(events)
            await bus.publish(events)
            await bus.publish(events)
            await bus.publish(last := await stored(event_store, 1))
            assert await receive(stream, 4) == [*events, *last]
        bus.stop()
    assert seen.events == [*events, *last]
    assert [one.version for one in tried.events] == [1, 2, 3, 2, 4]


async def test_many_failures_are_told_shortly(event_store: EventStore):
    bus = InMemoryEventBus()
    bus.register(fail)
    with pytest.raises(PublishError, match=r"(?s)KeyError\(10\).*\n  and 20 more\.\n") as caught:
        await bus.publish(await stored(event_store, 30))
    assert len(caught.value.errors) == 30
    with pytest.raises(PublishError, match="A handler has failed"):
        await bus.publish(await stored(event_store, 1))


async def test_a_policy_is_told_in_place_of_the_publisher(event_store: EventStore, runs: bool):
    told: list[tuple[int, Exception]] = []

    async def tell(event: StoredEvent, error: Exception) -> None:
        told.append((event.version, error))

    bus = InMemoryEventBus(on_failure=tell)
    bus.register(fail)
    async with anyio.create_task_group() as tasks:
        if runs:
            await tasks.start(bus.run)
            await bus.publish(await stored(event_store, 1), background=True)
        await bus.publish(await stored(event_store, 1))
        bus.stop()
    assert [(version, repr(error)) for version, error in told] == [
        (version, f"KeyError({version})") for version in ((1, 2) if runs else (1,))
    ]


async def test_a_policy_that_fails_fails_the_publisher(event_store: EventStore, runs: bool):
    async def refuse(event: StoredEvent, error: Exception) -> None:
        raise LookupError("no policy") from error

    bus = InMemoryEventBus(on_failure=refuse)
    bus.register(fail)
    async with anyio.create_task_group() as tasks:
        if runs:
            await tasks.start(bus.run)
        with pytest.raises(PublishError) as caught:
            await bus.publish(await stored(event_store, 1))
        bus.stop()
    assert isinstance(caught.value.errors[0], LookupError)


async def test_a_failure_in_the_background_ends_run_where_nobody_is_told(event_store: EventStore):
    bus = InMemoryEventBus()
    bus.register(fail)
    with pytest.raises(ExceptionGroup) as caught:
        async with anyio.create_task_group() as tasks:
            await tasks.start(bus.run)
            await bus.publish(await stored(event_store, 1), background=True)
            await bus.wait_stopped()
    (error,) = caught.value.exceptions
    assert isinstance(error, PublishError)


async def test_when_run_is_cut_off_its_publishers_are_told(event_store: EventStore):
    bus, blocked = InMemoryEventBus(), Blocked()
    bus.register(blocked)
    errors: list[PublishError] = []

    async def publish() -> None:
        try:
            await bus.publish(await stored(event_store, 2))
        except PublishError as error:
            errors.append(error)

    async with anyio.create_task_group() as publishers:
        async with anyio.create_task_group() as tasks:
            await tasks.start(bus.run)
            publishers.start_soon(publish)
            publishers.start_soon(publish)
            await blocked.begun.wait()
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
    assert blocked.done == []
    assert [len(error.errors) for error in errors] == [2, 2]
    assert "run() was cut off" in str(errors[0])
    blocked.let.set()
    await bus.publish([one async for one in event_store.read_all()])
    assert blocked.done == [1, 2, 3, 4]


# -- handlers that publish, and what they see ---------------------------------------------------


async def test_a_handler_that_publishes_is_waited_for_by_who_began(
    event_store: EventStore, runs: bool
):
    bus, seen = InMemoryEventBus(), Seen()
    doors = AggregateRepository(event_store, Door, bus=bus)

    async def knock_on(event: StoredEvent) -> None:
        await seen(event)
        if event.position < 5:
            await doors.execute(f"door {event.position}", Door.knock)

    bus.register(knock_on)
    async with anyio.create_task_group() as tasks:
        if runs:
            await tasks.start(bus.run)
        with anyio.fail_after(20):
            await doors.execute("first", Door.knock)
        assert [event.position for event in seen.events] == [1, 2, 3, 4, 5]
        bus.stop()


async def test_what_fails_because_of_an_event_reaches_who_published_it(
    event_store: EventStore, runs: bool
):
    bus = InMemoryEventBus()
    later = await stored(event_store, 1, "later")

    async def publish(event: StoredEvent) -> None:
        await bus.publish(later)

    async def fail_later(event: StoredEvent) -> None:
        if event.stream_id == "Thing-later":
            raise KeyError("later")

    bus.register(publish)
    bus.register(fail_later)
    async with anyio.create_task_group() as tasks:
        if runs:
            await tasks.start(bus.run)
        with pytest.raises(PublishError, match="Thing-later"):
            await bus.publish(await stored(event_store, 1))
        bus.stop()


async def test_a_handler_cannot_wait_for_room(event_store: EventStore):
    bus, refused = InMemoryEventBus(buffer=2), list[str]()
    later = await stored(event_store, 5, "later")

    async def publish(event: StoredEvent) -> None:
        if event.stream_id == "Thing-a":
            for one in later:
                try:
                    await bus.publish([one])
                except RuntimeError as error:
                    refused.append(str(error))

    bus.register(publish)
    async with anyio.create_task_group() as tasks:
        await tasks.start(bus.run)
        with anyio.fail_after(20):
            await bus.publish(await stored(event_store, 1))
        bus.stop()
    assert len(refused) == 3
    assert "larger buffer (it is 2)" in refused[0]


async def test_a_task_that_a_handler_has_left_behind_is_a_publisher_like_any_other(
    event_store: EventStore,
):
    bus, seen, go_on = InMemoryEventBus(), Seen(), anyio.Event()
    later = await stored(event_store, 1, "later")
    errors: list[PublishError] = []

    async def publish_later() -> None:
        await go_on.wait()
        try:
            await bus.publish(later)
        except PublishError as error:
            errors.append(error)

    async with anyio.create_task_group() as tasks:

        async def start(event: StoredEvent) -> None:
            if event.stream_id == "Thing-a":
                tasks.start_soon(publish_later)
            else:
                await fail(event)

        bus.register(start)
        bus.register(seen)
        await bus.publish(await stored(event_store, 1))
        go_on.set()
    assert len(errors) == 1
    assert later[0] in seen.events


async def test_handlers_see_the_publishers_context(event_store: EventStore, runs: bool):
    bus = InMemoryEventBus()

    async def append(event: StoredEvent) -> None:
        await checkpoint()
        await event_store.append_events(f"of {event.stream_id}", "Thing", [Ended()], ANY)

    bus.register(append)

    async def publish(name: str) -> None:
        events = await stored(event_store, 1, name)
        with event_metadata(user=name):
            await bus.publish(events)

    async with anyio.create_task_group() as tasks:
        if runs:
            await tasks.start(bus.run)
        async with anyio.create_task_group() as publishers:
            for name in ("ann", "bob", "cyd"):
                publishers.start_soon(publish, name)
        bus.stop()
    for name in ("ann", "bob", "cyd"):
        (event,) = await event_store.get_events(f"of Thing-{name}", "Thing")
        assert event.metadata == {"user": name}


async def test_a_handler_may_use_scopes_and_tasks_of_its_own(event_store: EventStore, runs: bool):
    bus, seen = InMemoryEventBus(), Seen()

    async def handle(event: StoredEvent) -> None:
        with anyio.move_on_after(0.01) as scope:
            await anyio.sleep_forever()
        assert scope.cancelled_caught
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(seen, event)
            tasks.start_soon(anyio.sleep_forever)
            await seen.wait_for(1)
            tasks.cancel_scope.cancel()

    bus.register(handle)
    async with anyio.create_task_group() as tasks:
        if runs:
            await tasks.start(bus.run)
        await bus.publish(await stored(event_store, 1))
        bus.stop()
    assert len(seen.events) == 1


async def test_a_class_stands_for_its_subclasses(event_store: EventStore):
    bus, knocks, hard = InMemoryEventBus(), Seen(), Seen()
    bus.register(knocks, Knocked)
    bus.register(hard, KnockedHard)
    events = [Knocked(1), KnockedHard(2), Ended()]
    await bus.publish((await event_store.append_events("a", "Thing", events, ANY)).events)
    assert [one.version for one in knocks.events] == [1, 2]
    assert [one.version for one in hard.events] == [2]


# -- receivers that are slow ------------------------------------------------------------------


async def publish_singly(bus: InMemoryEventBus, events: Sequence[StoredEvent]) -> None:
    for event in events:
        await bus.publish([event])


async def test_who_falls_behind_is_told_once_and_goes_on(event_store: EventStore):
    bus = InMemoryEventBus(buffer=4)
    events = await stored(event_store, 30)
    async with bus.subscribe(Happened) as stream, bus.subscribe(Ended) as other:
        await publish_singly(bus, events)
        with pytest.raises(FellBehindError, match=r"(?s)after=0.* until its position is") as caught:
            await stream.receive()
        missed, until = caught.value.after, caught.value.until
        rest = await receive(stream, 30 - (until - missed))
        assert [one.position for one in rest] == list(range(until + 1, 31))
        with anyio.move_on_after(0.01):  # nothing of what it listens to was lost
            await other.receive()
        read = [
            one.position async for one in event_store.read_all() if missed < one.position <= until
        ]
        assert [*read, *(one.position for one in rest)] == list(range(1, 31))


async def test_who_catches_up_has_everything_once_and_in_order(event_store: EventStore):
    bus, received = InMemoryEventBus(buffer=4), list[StoredEvent]()

    async def follow(*, task_status: anyio.abc.TaskStatus[None]) -> None:
        async with bus.subscribe(Happened, catch_up=event_store) as stream:
            task_status.started()
            async for event in stream:
                received.append(event)
                for _ in range(event.version % 5):
                    await checkpoint()
                if len(received) == 600:
                    return

    async def publish(name: str) -> None:
        for _ in range(100):
            await publish_singly(bus, await stored(event_store, 2, name))

    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            await tasks.start(follow)
            for name in "abc":
                tasks.start_soon(publish, name)
    assert by_stream(received) == {f"Thing-{name}": list(range(1, 201)) for name in "abc"}


async def test_a_cancelled_receive_of_who_catches_up_has_consumed_nothing(
    event_store: EventStore,
):
    bus, received = InMemoryEventBus(buffer=2), list[StoredEvent]()
    async with bus.subscribe(catch_up=event_store) as stream:

        async def take() -> bool:
            received.append(await stream.receive())
            return True

        async def publish(_: object = None) -> None:
            await publish_singly(bus, await stored(event_store, 11, first=published()))

        def published() -> int:
            return bus.statistics().published

        await publish()
        for _ in range(12):
            await cancel_at_every_checkpoint(take, publish)
        received += await receive(stream, published() - len(received))
        assert numbers(received) == list(range(published()))


async def test_a_receiver_may_have_publishers_wait(event_store: EventStore):
    bus = InMemoryEventBus(buffer=4)
    events = await stored(event_store, 25)
    async with anyio.create_task_group() as tasks:
        async with bus.subscribe(backpressure=True) as stream:
            tasks.start_soon(publish_singly, bus, events)
            await anyio.wait_all_tasks_blocked()
            assert bus.statistics().published == 4
            tasks.start_soon(bus.publish, await stored(event_store, 6, first=25))
            received = numbers(await receive(stream, 31))
            assert [one for one in received if one < 25] == list(range(25))
            assert [one for one in received if one >= 25] == list(range(25, 31))
            tasks.start_soon(publish_singly, bus, await stored(event_store, 20))
            await anyio.wait_all_tasks_blocked()
        # nobody is left to wait for
    assert bus.statistics().published == 51


async def test_who_waits_for_room_is_not_overtaken(event_store: EventStore):
    bus = InMemoryEventBus(buffer=4)
    async with bus.subscribe(backpressure=True) as stream, anyio.create_task_group() as tasks:
        await bus.publish(await stored(event_store, 2))
        tasks.start_soon(bus.publish, await stored(event_store, 3, first=2))
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(bus.publish, await stored(event_store, 1, first=5))  # has room
        await anyio.wait_all_tasks_blocked()
        assert bus.statistics().published == 2
        assert numbers(await receive(stream, 6)) == list(range(6))


async def test_who_publishes_all_the_time_lets_others_have_their_turns(event_store: EventStore):
    bus, turns = InMemoryEventBus(), 0
    events = await stored(event_store, 100)

    async def count() -> None:
        nonlocal turns
        while True:
            await checkpoint()
            turns += 1

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(count)
        await publish_singly(bus, events)
        tasks.cancel_scope.cancel()
    assert turns > 3


async def test_who_waits_for_room_in_the_background_is_refused_at_the_end(
    event_store: EventStore,
):
    bus, refused = InMemoryEventBus(buffer=1), list[str]()

    async def publish() -> None:
        with pytest.raises(RuntimeError, match="nobody runs it") as caught:
            await bus.publish(await stored(event_store, 1), background=True)
        refused.append(str(caught.value))

    async with anyio.create_task_group() as tasks, bus.subscribe(backpressure=True):
        await tasks.start(bus.run)
        await bus.publish(await stored(event_store, 1), background=True)
        tasks.start_soon(publish)
        await anyio.wait_all_tasks_blocked()
        bus.stop()
        await bus.wait_stopped()
        await anyio.wait_all_tasks_blocked()
        assert len(refused) == 1  # though there is no room
    assert bus.statistics().published == 1


async def test_two_tasks_cannot_wait_on_one_stream():
    bus = InMemoryEventBus()
    async with anyio.create_task_group() as tasks, bus.subscribe() as stream:
        tasks.start_soon(stream.receive)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(anyio.BusyResourceError):
            await stream.receive()
        tasks.cancel_scope.cancel()


async def test_a_bus_keeps_nothing_while_nobody_listens(event_store: EventStore):
    bus = InMemoryEventBus(buffer=8)
    async with bus.subscribe() as stream:
        await bus.publish(await stored(event_store, 3))
        await receive(stream, 3)
    await bus.publish(await stored(event_store, 3))
    async with bus.subscribe() as stream:
        await bus.publish(last := await stored(event_store, 1))
        assert await receive(stream, 1) == list(last)
    assert (statistics := bus.statistics()).streams == 0
    assert statistics.published == 7


# -- the rest ---------------------------------------------------------------------------------


@pytest.mark.parametrize("buffer", [0, -1, 1.5, True, None])
def test_a_buffer_is_a_number_of_events(buffer: object):
    with pytest.raises(ValueError, match="buffer must be"):
        InMemoryEventBus(buffer=buffer)  # type: ignore[arg-type]


def test_a_receiver_that_is_waited_for_needs_no_store(event_store: EventStore):
    with pytest.raises(ValueError, match="catch up"):
        InMemoryEventBus().subscribe(catch_up=event_store, backpressure=True)


async def test_nothing_to_publish_is_a_checkpoint():
    with anyio.CancelScope() as scope:
        scope.cancel()
        await InMemoryEventBus().publish([])
    assert scope.cancelled_caught
    await InMemoryEventBus().publish([])
    await InMemoryEventBus().wait_stopped()


def test_recent_ids_are_bounded():
    recent, ids = RecentIds(3), [uuid7() for _ in range(5)]
    assert [recent.add(one) for one in ids[:3]] == [True] * 3
    assert [recent.add(one) for one in ids[:3]] == [False] * 3
    assert [recent.add(one) for one in ids[3:]] == [True] * 2
    assert [one in recent for one in ids] == [False, False, True, True, True]
    assert recent.add(ids[0])
