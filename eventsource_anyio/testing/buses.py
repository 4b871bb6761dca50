"""The contract of an event bus as a test suite."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import anyio
import pytest
from anyio.abc import ObjectReceiveStream

from ..bus.interface import EventBus
from ..events import StoredEvent
from ..stores.interface import ANY, EventStore
from .cancelling import cancel_at_every_checkpoint
from .samples import Ended, Happened, numbers

_SECONDS = 30.0  # after which what does not come will not come


async def stored(
    store: EventStore, count: int, aggregate_id: str = "a", first: int = 0
) -> Sequence[StoredEvent]:
    """`Happened(first)` and so on, appended and ready to be published."""
    events = [Happened(number) for number in range(first, first + count)]
    return (await store.append_events(aggregate_id, "Thing", events, ANY)).events


async def receive(stream: ObjectReceiveStream[StoredEvent], count: int) -> list[StoredEvent]:
    """The next events of a stream; fails if they do not come."""
    with anyio.fail_after(_SECONDS):
        return [await stream.receive() for _ in range(count)]


class Seen:
    """A handler that keeps what it was called with, and can be waited for."""

    def __init__(self) -> None:
        self.events: list[StoredEvent] = []
        self._changed = anyio.Event()

    async def __call__(self, event: StoredEvent) -> None:
        self.events.append(event)
        self._changed.set()
        self._changed = anyio.Event()

    async def wait(self, enough: Callable[[], bool]) -> None:
        with anyio.fail_after(_SECONDS):
            while not enough():
                await self._changed.wait()

    async def wait_for(self, count: int) -> None:
        await self.wait(lambda: len(self.events) >= count)


def by_stream(events: Sequence[StoredEvent]) -> dict[str, list[int]]:
    """The versions of each stream, in the order of the events."""
    versions: dict[str, list[int]] = defaultdict(list)
    for event in events:
        versions[event.stream_id].append(event.version)
    return dict(versions)


class EventBusContract:
    """What every `EventBus` does, as tests.

    Subclass it in a test module and give it a fixture `bus`, a bus that nobody has used and that is
    not entered yet::

        class TestMyBus(EventBusContract):
            @pytest.fixture
            def bus(self):
                return MyBus()

    It is to keep a thousand events or more for a slow receiver, and to try a failing handler again,
    or go on with other streams, within a second or so. It needs anyio's pytest plugin in its auto
    mode, and the fixture `event_store`, which is there wherever this package is installed.
    """

    async def test_a_stream_has_what_is_published_in_order(
        self, bus: EventBus, event_store: EventStore
    ) -> None:
        early, late = await stored(event_store, 2), await stored(event_store, 3)
        async with bus:
            await bus.publish(early)
            async with bus.subscribe() as stream:
                await bus.publish(late)
                assert await receive(stream, 3) == list(late)

    async def test_events_arrive_whole(self, bus: EventBus, event_store: EventStore) -> None:
        result = await event_store.append_events(
            "ü/1", "Thing", [Happened(2**40, "§"), Ended()], ANY, metadata={"who": ["me", None]}
        )
        async with bus, bus.subscribe() as stream:
            await bus.publish(result.events)
            received = await receive(stream, 2)
            assert received == list(result.events)
            assert [type(one.event) for one in received] == [Happened, Ended]
            assert received[0].metadata == {"who": ["me", None]}

    async def test_everybody_has_all_of_the_types_they_listen_to(
        self, bus: EventBus, event_store: EventStore
    ) -> None:
        everything, happened, ended = Seen(), Seen(), Seen()
        bus.register(everything)
        bus.register(happened, Happened)
        bus.register(ended, Ended.event_type)
        events = (
            await event_store.append_events(
                "a", "Thing", [Happened(1), Ended(), Happened(2), Ended()], ANY
            )
        ).events
        async with bus, anyio.create_task_group() as tasks:
            await tasks.start(bus.run)
            async with bus.subscribe(Happened) as some, bus.subscribe() as all_of_them:
                async with bus.subscribe(Ended.event_type, Happened) as both:
                    await bus.publish(events)
                    assert await receive(some, 2) == [events[0], events[2]]
                    assert await receive(all_of_them, 4) == list(events)
                    assert await receive(both, 4) == list(events)
            await everything.wait_for(4)
            await happened.wait_for(2)
            await ended.wait_for(2)
            bus.stop()
        assert everything.events == list(events)
        assert happened.events == [events[0], events[2]]
        assert ended.events == [events[1], events[3]]

    async def test_nothing_is_missed_from_the_start_on(
        self, bus: EventBus, event_store: EventStore
    ) -> None:
        seen = Seen()
        bus.register(seen)
        async with bus, anyio.create_task_group() as tasks:
            await tasks.start(bus.run)
            async with bus.subscribe() as stream:
                for number in range(20):
                    await bus.publish(await stored(event_store, 1, str(number % 3)))
                assert len(await receive(stream, 20)) == 20
            await seen.wait_for(20)
            bus.stop()

    async def test_order_is_kept_in_each_stream(
        self, bus: EventBus, event_store: EventStore
    ) -> None:
        seen = Seen()

        async def slowly(event: StoredEvent) -> None:
            if event.version % 3 == 0:
                await anyio.lowlevel.checkpoint()
            await seen(event)

        bus.register(slowly)

        async def publish(name: str) -> None:
            for _ in range(10):
                await bus.publish(await stored(event_store, 3, name))

        async with bus, anyio.create_task_group() as tasks:
            await tasks.start(bus.run)
            async with bus.subscribe() as stream:
                async with anyio.create_task_group() as publishers:
                    for number in range(8):
                        publishers.start_soon(publish, str(number))
                received = await receive(stream, 240)
            await seen.wait_for(240)
            bus.stop()
            assert by_stream(received) == by_stream(seen.events)
            assert by_stream(received) == {f"Thing-{one}": list(range(1, 31)) for one in range(8)}

    async def test_what_is_published_again_is_dropped(
        self, bus: EventBus, event_store: EventStore
    ) -> None:
        seen = Seen()
        bus.register(seen)
        first, second = await stored(event_store, 3), await stored(event_store, 2)
        async with bus, anyio.create_task_group() as tasks:
            await tasks.start(bus.run)
            async with bus.subscribe() as stream:
                await bus.publish(first)
                await bus.publish(first)
                await bus.publish([*first, *second])
                await bus.publish(second)
                last = await stored(event_store, 1, "last")
                await bus.publish(last)
                received = await receive(stream, 6)  # streams are in order, each for itself
                assert sorted(received, key=lambda one: one.position) == [*first, *second, *last]
            await seen.wait(lambda: last[0] in seen.events)
            await seen.wait_for(6)
            bus.stop()
        assert by_stream(seen.events) == {"Thing-a": [1, 2, 3, 4, 5], "Thing-last": [1]}

    async def test_in_the_background_it_needs_to_be_run(
        self, bus: EventBus, event_store: EventStore
    ) -> None:
        seen = Seen()
        bus.register(seen)
        events = await stored(event_store, 3)
        async with bus:
            with pytest.raises(RuntimeError, match=r"tasks\.start\(bus\.run\)"):
                await bus.publish(events, background=True)
            assert seen.events == []
            async with anyio.create_task_group() as tasks:
                await tasks.start(bus.run)
                with pytest.raises(RuntimeError, match="running already"):
                    await bus.run()
                with pytest.raises(RuntimeError, match="before run"):
                    bus.register(seen)
                async with bus.subscribe() as stream:
                    await bus.publish(events, background=True)
                    assert await receive(stream, 3) == list(events)
                await seen.wait_for(3)
                bus.stop()
                await bus.wait_stopped()
            await bus.wait_stopped()
        assert seen.events == list(events)

    async def test_stopping_finishes_what_is_queued(
        self, bus: EventBus, event_store: EventStore
    ) -> None:
        events = await stored(event_store, 5)
        async with bus, bus.subscribe() as stream:
            async with anyio.create_task_group() as tasks:
                await tasks.start(bus.run)
                await bus.publish(events, background=True)
                bus.stop()
            assert await receive(stream, 5) == list(events)

    async def test_a_failing_handler_keeps_nobody_from_an_event(
        self, bus: EventBus, event_store: EventStore
    ) -> None:
        good, bad = Seen(), Seen()

        async def fail_for_a_while(event: StoredEvent) -> None:
            await bad(event)
            if event.stream_id == "Thing-bad" and len(bad.events) < 3:
                raise KeyError("a handler's")

        bus.register(fail_for_a_while)
        bus.register(good)
        async with bus, anyio.create_task_group() as tasks:
            await tasks.start(bus.run)
            for name in ("bad", "fine"):
                events = await stored(event_store, 2, name)
                try:
                    await bus.publish(events)
                except Exception as error:  # noqa: BLE001 - where the publisher is told
                    assert "in handler" in str(error)  # noqa: PT017
            await good.wait_for(4)
            await bad.wait(lambda: by_stream(bad.events).get("Thing-fine") == [1, 2])
            bus.stop()
        assert by_stream(good.events) == {"Thing-bad": [1, 2], "Thing-fine": [1, 2]}

    async def test_a_publisher_that_gives_up_cuts_no_handler_off(
        self, bus: EventBus, event_store: EventStore
    ) -> None:
        begun, go_on, seen = anyio.Event(), anyio.Event(), Seen()

        async def handle(event: StoredEvent) -> None:
            begun.set()
            await go_on.wait()
            await seen(event)

        bus.register(handle)
        events = await stored(event_store, 2)
        async with bus, anyio.create_task_group() as tasks:
            await tasks.start(bus.run)

            async def publish(*, task_status: anyio.abc.TaskStatus[anyio.CancelScope]) -> None:
                with anyio.CancelScope() as scope:
                    task_status.started(scope)
                    await bus.publish(events)

            scope = await tasks.start(publish)
            with anyio.fail_after(_SECONDS):
                await begun.wait()
            scope.cancel()
            go_on.set()
            await seen.wait_for(2)
            bus.stop()
        assert seen.events == list(events)

    async def test_a_slow_receiver_holds_nobody_up_and_misses_nothing(
        self, bus: EventBus, event_store: EventStore
    ) -> None:
        async with bus, bus.subscribe(Happened, catch_up=event_store) as stream:
            with anyio.fail_after(_SECONDS):
                for number in range(60):
                    await bus.publish(await stored(event_store, 100, str(number % 4)))
            received = await receive(stream, 3000)
            await bus.publish(await stored(event_store, 1, "last"))
            received += await receive(stream, 3001)
        assert len({one.event_id for one in received}) == 6001
        assert by_stream(received) == {
            **{f"Thing-{one}": list(range(1, 1501)) for one in range(4)},
            "Thing-last": [1],
        }

    async def test_a_cancelled_receive_has_consumed_nothing(
        self, bus: EventBus, event_store: EventStore
    ) -> None:
        received: list[StoredEvent] = []
        async with bus, bus.subscribe() as stream:
            published = 0

            async def take() -> bool:
                received.append(await stream.receive())
                return True

            async def publish(_: bool | None = None) -> None:
                nonlocal published
                await bus.publish(await stored(event_store, 1, first=published))
                published += 1

            await publish()
            await cancel_at_every_checkpoint(take, publish)
            with anyio.move_on_after(0):  # there is nothing that it could take
                received.append(await stream.receive())
            received += await receive(stream, published - len(received))
        assert numbers(received) == list(range(published))

    async def test_a_cancelled_publish_may_be_repeated(
        self, bus: EventBus, event_store: EventStore
    ) -> None:
        seen = Seen()
        bus.register(seen)
        versions = 0
        events = await stored(event_store, 2)
        async with bus, anyio.create_task_group() as tasks:
            await tasks.start(bus.run)
            async with bus.subscribe() as stream:

                async def publish() -> bool:
                    await bus.publish(events)
                    return True

                async def again(_: bool | None) -> None:
                    nonlocal events, versions
                    await bus.publish(events)
                    assert await receive(stream, 2) == list(events)
                    versions += 2
                    events = await stored(event_store, 2)

                await cancel_at_every_checkpoint(publish, again)
            await seen.wait_for(versions)
            bus.stop()
        assert by_stream(seen.events) == {"Thing-a": list(range(1, versions + 1))}

    async def test_streams_end_with_the_bus(self, bus: EventBus, event_store: EventStore) -> None:
        events = await stored(event_store, 2)
        received: list[StoredEvent] = []

        async def follow(*, task_status: anyio.abc.TaskStatus[None]) -> None:
            async with bus.subscribe() as stream:
                task_status.started()
                async for event in stream:
                    received.append(event)  # noqa: PERF401 - what was received before the end

        with anyio.fail_after(_SECONDS):
            async with anyio.create_task_group() as tasks:
                async with bus:
                    await tasks.start(follow)
                    await bus.publish(events)
                    while len(received) < 2:
                        await anyio.lowlevel.checkpoint()
        assert received == list(events)

    async def test_a_stream_is_used_inside_its_block(
        self, bus: EventBus, event_store: EventStore
    ) -> None:
        async with bus:
            async with bus.subscribe() as stream:
                await bus.publish(await stored(event_store, 1))
                await receive(stream, 1)
            with pytest.raises(anyio.ClosedResourceError):
                await stream.receive()

    async def test_errors_arrive_as_they_are(self, bus: EventBus, event_store: EventStore) -> None:
        with pytest.raises(KeyError):
            async with bus:
                async with bus.subscribe() as stream:
                    await bus.publish(await stored(event_store, 1))
                    async for _ in stream:
                        raise KeyError("the caller's own")

    async def test_what_is_no_event_type_is_refused(self, bus: EventBus) -> None:
        with pytest.raises(TypeError, match="int"):
            bus.subscribe(int)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="int"):
            bus.register(Seen(), int)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="handler"):
            bus.register("no function")  # type: ignore[arg-type]
