"""The buses over brokers: the contract of every bus, and what a broker's adds to it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from random import Random
from uuid import uuid4

import anyio
import attrs
import pytest
from msgspec.structs import replace

from eventsource_anyio import (
    ANY,
    DomainEvent,
    EventDecodeError,
    InMemoryEventStore,
    NewEvent,
    ProjectionCoordinator,
    StorageError,
    StoreClosedError,
    StoredEvent,
)
from eventsource_anyio import events as registry
from eventsource_anyio.bus.broker import Message
from eventsource_anyio.bus.encoding import encode, open_payload
from eventsource_anyio.bus.letters import DeadLetters
from eventsource_anyio.bus.nats import NATSEventBus
from eventsource_anyio.bus.partitioned import BrokerEventBus
from eventsource_anyio.bus.redis import RedisEventBus
from eventsource_anyio.bus.redis_broker import RedisBroker
from eventsource_anyio.bus.redis_connection import RedisConnections
from eventsource_anyio.errors import FellBehindError
from eventsource_anyio.relay import EventRelay
from eventsource_anyio.testing import EventBusContract, cancel_at_every_checkpoint
from eventsource_anyio.testing.buses import Seen, by_stream, receive, stored
from eventsource_anyio.testing.samples import Happened

from .brokering import BUSES, SECONDS, MakeBus, positions, publish_in_parts, running, until


class TestRedisEventBus(EventBusContract):
    @pytest.fixture
    def bus(self, redis_url: str) -> RedisEventBus:
        return RedisEventBus(
            redis_url, prefix=uuid4().hex, subscription="test", retry_after=0.01, keep=2000
        )


class TestNATSEventBus(EventBusContract):
    @pytest.fixture
    def bus(self, nats_url: str) -> NATSEventBus:
        return NATSEventBus(
            nats_url, name=uuid4().hex, subscription="test", retry_after=0.01, keep=2000
        )


@pytest.fixture(params=sorted(BUSES))
def make_bus(request: pytest.FixtureRequest) -> MakeBus:
    return BUSES[request.param](request.getfixturevalue(f"{request.param}_url"))


# -- subscriptions ----------------------------------------------------------------------------


async def test_processes_share_a_subscription_each_stream_in_order(make_bus, event_store):
    seen = [Seen(), Seen(), Seen()]
    buses = [make_bus(lease=0.5) for _ in seen]
    for bus, handler in zip(buses, seen, strict=True):
        bus.register(handler)
    every = lambda: [event for one in seen for event in one.events]  # noqa: E731
    async with running(*buses), make_bus() as publisher:
        await until(lambda: sorted(len(one.statistics().partitions) for one in buses) == [2, 3, 3])
        for number in range(10):
            for stream in range(40):  # some in each partition
                await publisher.publish(await stored(event_store, 1, str(stream), number))
        await until(lambda: len(every()) >= 400)
    assert len(every()) == 400
    assert all(one.events for one in seen)
    for one in seen:
        for versions in by_stream(one.events).values():
            assert versions == sorted(versions)


async def test_different_subscriptions_have_all_events(make_bus, event_store):
    one, other = Seen(), Seen()
    first, second = make_bus(subscription="one"), make_bus(subscription="ä other/…")
    first.register(one)
    second.register(other)
    async with running(first, second):
        events = await stored(event_store, 10)
        await first.publish(events)
        await one.wait_for(10)
        await other.wait_for(10)
    assert one.events == other.events == list(events)


@pytest.mark.parametrize("start", ["new", "first", 3])
async def test_where_a_new_subscription_begins(make_bus, event_store, start):
    seen = Seen()
    events = await stored(event_store, 6)
    async with make_bus() as publisher:
        await publisher.publish(events)
        bus = make_bus(start=start)
        bus.register(seen)
        async with running(bus):
            last = await stored(event_store, 1, "last")
            await publisher.publish(last)
            await seen.wait(lambda: last[0] in seen.events)
            await until(lambda: len(seen.events) == {"new": 1, "first": 7, 3: 4}[start])
    expected = {"new": [7], "first": [1, 2, 3, 4, 5, 6, 7], 3: [4, 5, 6, 7]}[start]
    assert sorted(positions(seen.events)) == expected


async def test_with_a_store_a_new_subscription_may_begin_before_the_broker(make_bus, event_store):
    for number in range(10):
        await stored(event_store, 10, str(number))  # never published
    seen = Seen()
    for count in (66, 67):  # the second one has nothing to read again
        bus = make_bus(start=35, catch_up=event_store)
        bus.register(seen)
        async with running(bus):
            await bus.publish(await stored(event_store, 1, "1"))
            await seen.wait_for(count)
    assert sorted(positions(seen.events)) == list(range(36, 103))


async def test_a_subscription_goes_on_where_it_was(make_bus, event_store):
    first, second = Seen(), Seen()
    async with make_bus() as publisher:
        bus = make_bus()
        bus.register(first)
        async with running(bus):
            await publisher.publish(await stored(event_store, 50, "a"))
            await first.wait_for(50)
        await publisher.publish(await stored(event_store, 50, "a"))
        bus = make_bus()
        bus.register(second)
        async with running(bus):
            await second.wait_for(50)
            await publisher.publish(await stored(event_store, 1, "a"))
            await second.wait_for(51)
    assert by_stream(first.events) == {"Thing-a": list(range(1, 51))}
    assert by_stream(second.events) == {"Thing-a": list(range(51, 102))}


async def test_who_takes_over_drops_what_was_handled_before(make_bus, event_store):
    first, second = Seen(), Seen()
    events = await stored(event_store, 20, "a")
    async with make_bus() as publisher, make_bus() as another:
        for seen in (first, second):
            bus = make_bus()
            bus.register(seen)
            async with running(bus):
                # by two publishers, neither of which knows what the other has published
                await (publisher if seen is first else another).publish(events)
                last = await stored(event_store, 1, "a")
                await publisher.publish(last)
                await seen.wait_for(21 if seen is first else 1)
    assert by_stream(first.events) == {"Thing-a": list(range(1, 22))}
    assert by_stream(second.events) == {"Thing-a": [22]}


async def test_a_handler_that_is_cut_off_has_the_event_again(make_bus, event_store):
    begun, seen = anyio.Event(), Seen()

    async def hang(event: StoredEvent) -> None:
        begun.set()
        await anyio.sleep_forever()

    bus = make_bus()
    bus.register(hang)
    events = await stored(event_store, 3)
    async with bus:
        async with anyio.create_task_group() as tasks:
            await tasks.start(bus.run)
            await bus.publish(events)
            with anyio.fail_after(SECONDS):
                await begun.wait()
            tasks.cancel_scope.cancel()
        assert bus.statistics().handled == 0
    bus = make_bus(lease=60.0)  # nobody has to wait for the lease of the one that was cancelled
    bus.register(seen)
    async with running(bus):
        await seen.wait_for(3)
    assert seen.events == list(events)


async def test_what_was_handled_is_saved_before_more_is_read(make_bus, event_store):
    begun, seen, later = anyio.Event(), Seen(), Seen()

    async def handle(event: StoredEvent) -> None:
        if event.version == 4:
            begun.set()
            await anyio.sleep_forever()
        await seen(event)

    bus = make_bus()
    bus.register(handle)
    async with bus, anyio.create_task_group() as tasks:
        await tasks.start(bus.run)
        await bus.publish(await stored(event_store, 3))
        await seen.wait_for(3)
        await bus.publish(await stored(event_store, 1))
        with anyio.fail_after(SECONDS):
            await begun.wait()
        tasks.cancel_scope.cancel()
    bus = make_bus()
    bus.register(later)
    async with running(bus):
        await later.wait_for(1)
    assert by_stream(later.events) == {"Thing-a": [4]}


async def test_handlers_need_a_name(make_bus):
    bus = make_bus(subscription=None)
    with pytest.raises(ValueError, match="subscription='invoicing'"):
        bus.register(Seen())
    with pytest.raises(StoreClosedError, match="EventBus is not open"):
        await bus.publish([])
    with pytest.raises(StoreClosedError):
        await bus.run()


async def test_all_use_the_same_partitions(make_bus):
    async with make_bus(partitions=4):
        with pytest.raises(ValueError, match="partitions=4"):
            async with make_bus(partitions=5):
                pass
        async with make_bus(partitions=4):
            pass


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("partitions", 0), ("partitions", 1025), ("lease", 0), ("start", "last")),
        *(("start", -1), ("start", True), ("attempts", 0), ("retry_after", -1), ("buffer", 0)),
        *(("remembered", 0), ("keep", 0), ("subscription", "")),
    ],
)
def test_wrong_options_are_refused(option, value):
    with pytest.raises(ValueError, match=option):
        RedisEventBus("redis://localhost", **{option: value})
    with pytest.raises(ValueError, match=option):
        NATSEventBus("nats://localhost", **{option: value})


# -- what is sent -----------------------------------------------------------------------------


async def test_a_class_that_is_not_known_here_matters_only_to_who_wants_it(
    make_bus, event_store, monkeypatch
):
    @attrs.frozen
    class Foreign(DomainEvent):
        value: int

    result = await event_store.append_events("a", "Thing", [Foreign(1), Happened(2)], ANY)
    seen, everything = Seen(), Seen()
    bus = make_bus()
    bus.register(seen, Happened)
    async with running(bus):
        async with bus.subscribe(Happened) as some, bus.subscribe() as all_of_them:
            await bus.publish(result.events)
            monkeypatch.delitem(registry._by_name, "Foreign")
            await seen.wait_for(1)
            assert await receive(some, 1) == [result.events[1]]
            with pytest.raises(EventDecodeError, match="Foreign"):
                await receive(all_of_them, 1)
            assert await receive(all_of_them, 1) == [result.events[1]]
        assert await bus.dead_letters() == []
    assert seen.events == [result.events[1]]
    assert everything.events == []


async def test_an_event_that_was_stored_at_an_older_schema_arrives_equal(make_bus, event_store):
    moment = "2020-02-29T12:00:00.123456+00:00"
    given = NewEvent(
        Happened(1), metadata={"correlation_id": "x"}, occurred_at=datetime.fromisoformat(moment)
    )
    (event,) = (await event_store.append_events(uuid4(), "Thing", [given], ANY)).events
    old = replace(event, schema_version=7)
    async with make_bus() as bus, bus.subscribe() as stream:
        await bus.publish([event, replace(old, event_id=uuid4(), version=2)])
        received = await receive(stream, 2)
    assert received[0] == event
    assert type(received[0].aggregate_id) is type(event.aggregate_id)
    assert received[1].schema_version == 7


class Counting(RedisBroker):
    sends = 0

    async def send(self, messages: Sequence[Message]) -> None:
        self.sends += 1
        await super().send(messages)


async def test_many_publishers_share_round_trips_and_keep_the_order(redis_url, event_store):
    broker = Counting(RedisConnections(redis_url), uuid4().hex, keep=10_000)
    async with BrokerEventBus(broker) as bus, bus.subscribe() as stream:

        async def publish(name: str) -> None:
            for _ in range(20):
                await bus.publish(await stored(event_store, 2, name))

        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(publish, str(number))
        received = await receive(stream, 800)
    assert broker.sends < 100
    assert by_stream(received) == {f"Thing-{one}": list(range(1, 41)) for one in range(20)}


async def test_the_background_is_bounded(make_bus, event_store):
    bus = make_bus(buffer=10)
    async with running(bus), bus.subscribe() as stream:
        for _ in range(20):
            await bus.publish(await stored(event_store, 4), background=True)
            assert bus.statistics().queued <= 10
        await bus.publish(await stored(event_store, 1))  # after what is in the background
        received = await receive(stream, 81)
    assert by_stream(received) == {"Thing-a": list(range(1, 82))}


# -- receive streams --------------------------------------------------------------------------


async def test_a_stream_may_begin_at_a_position(make_bus, event_store):
    events = await stored(event_store, 10)
    async with make_bus() as bus:
        await bus.publish(events)
        async with bus.subscribe(after=4) as kept, bus.subscribe(after=0) as first:
            async with bus.subscribe(after=4, catch_up=event_store) as read:
                more = await stored(event_store, 2, "b")
                await bus.publish(more)
                assert sorted(positions(await receive(kept, 8))) == list(range(5, 13))
                assert sorted(positions(await receive(read, 8))) == list(range(5, 13))
                assert sorted(positions(await receive(first, 12))) == list(range(1, 13))


async def test_with_a_store_a_stream_may_begin_before_the_broker(make_bus, event_store):
    await stored(event_store, 10)  # never published
    async with make_bus() as bus:
        async with bus.subscribe(Happened, after=4, catch_up=event_store) as stream:
            await bus.publish(await stored(event_store, 1))
            assert positions(await receive(stream, 7)) == list(range(5, 12))


@pytest.mark.parametrize("make_bus", ["redis"], indirect=True)  # NATS has it heard already
async def test_who_fell_behind_is_told_and_goes_on(make_bus, event_store):
    async with make_bus(keep=100, partitions=1) as bus, bus.subscribe() as stream:
        await bus.publish(await stored(event_store, 10))
        assert len(await receive(stream, 10)) == 10
        await publish_in_parts(bus, await stored(event_store, 1000))
        with pytest.raises(FellBehindError) as caught:
            await receive(stream, 1)
        assert caught.value.after == 10
        received = await receive(stream, 1010 - caught.value.until)
        assert positions(received) == list(range(caught.value.until + 1, 1011))


async def test_a_filter_does_not_hide_that_it_fell_behind(make_bus, event_store):
    seen = Seen()
    async with make_bus(keep=100, partitions=1) as publisher:
        bus = make_bus(keep=100, partitions=1, catch_up=event_store)
        bus.register(seen, Happened)
        async with running(bus):
            await publisher.publish(await stored(event_store, 10))
            await seen.wait_for(10)
        await publish_in_parts(publisher, await stored(event_store, 1000))
        bus = make_bus(keep=100, partitions=1, catch_up=event_store)
        bus.register(seen, Happened)
        async with running(bus):
            await seen.wait_for(1010)
            assert bus.statistics().missed == 0
    assert by_stream(seen.events) == {"Thing-a": list(range(1, 1011))}


async def test_a_subscription_that_fell_behind_says_so(make_bus, event_store, caplog):
    seen = Seen()
    async with make_bus(keep=100, partitions=1) as publisher:
        for count in (10, 1000):
            bus = make_bus(keep=100, partitions=1)
            bus.register(seen)
            async with running(bus):
                if count == 10:
                    await publisher.publish(await stored(event_store, 10))
                    await seen.wait_for(10)
                else:
                    await seen.wait(lambda: bool(seen.events) and seen.events[-1].version == 1010)
                    assert bus.statistics().missed == 1
            if count == 10:
                await publish_in_parts(publisher, await stored(event_store, 1000))
    assert "has missed events between the positions 11 and" in caplog.text
    assert 110 <= len(seen.events) < 1010


# -- failures of handlers ---------------------------------------------------------------------


class Picky:
    """Fails with events of one stream, until it is told not to."""

    def __init__(self) -> None:
        self.seen = Seen()
        self.attempts: dict[int, int] = defaultdict(int)
        self.failing = True

    async def __call__(self, event: StoredEvent) -> None:
        self.attempts[event.position] += 1
        if self.failing and event.stream_id == "Thing-bad" and event.version >= 3:
            raise KeyError("it cannot")
        await self.seen(event)


async def test_a_stream_is_set_aside_while_others_go_on(make_bus, event_store):
    picky, told, other = Picky(), [], Seen()

    async def tell(event, error):
        told.append((event, error))
        raise RuntimeError("the policy's own")

    bus = make_bus(attempts=3, partitions=1, on_failure=tell)
    bus.register(picky)
    bus.register(other)
    async with running(bus):
        bad = await stored(event_store, 5, "bad")
        good = await stored(event_store, 5, "good")
        await bus.publish([*bad, *good])
        await picky.seen.wait_for(7)
        assert by_stream(picky.seen.events) == {"Thing-bad": [1, 2], "Thing-good": [1, 2, 3, 4, 5]}
        assert picky.attempts == {**dict.fromkeys((1, 2, 6, 7, 8, 9, 10), 1), 3: 3}
        (letters,) = await bus.dead_letters()
        assert (letters.stream_id, letters.first, letters.last, letters.events) == (
            *("Thing-bad", 3, 5),
            3,
        )
        assert letters.error == "KeyError: 'it cannot'"
        assert [event for event, _ in told] == [bad[2]]
        assert isinstance(told[0][1], KeyError)
        # The handler that had it is not given it again.
        assert by_stream(other.events)["Thing-bad"] == [1, 2, 3]

        with pytest.raises(KeyError):
            await bus.retry_dead_letters("Thing-bad")
        picky.failing = False
        assert await bus.retry_dead_letters("Thing-bad") == 3
        assert await bus.retry_dead_letters("Thing-bad") == 0
        assert await bus.dead_letters() == []
        await bus.publish(await stored(event_store, 2, "bad"))
        await picky.seen.wait_for(12)
    assert by_stream(picky.seen.events)["Thing-bad"] == [1, 2, 3, 4, 5, 6, 7]
    assert by_stream(other.events)["Thing-bad"] == [1, 2, 3, 4, 5, 6, 7]


async def test_an_error_of_a_storage_costs_no_attempt(make_bus, event_store):
    seen, failures = Seen(), 0

    async def handle(event: StoredEvent) -> None:
        nonlocal failures
        failures += 1
        if failures < 4:
            raise StorageError("the handler's own database is away")
        await seen(event)

    bus = make_bus(attempts=1)
    bus.register(handle)
    async with running(bus):
        await bus.publish(await stored(event_store, 2))
        await seen.wait_for(2)
        assert await bus.dead_letters() == []
    assert by_stream(seen.events) == {"Thing-a": [1, 2]}


class Losing(RedisBroker):
    """One answer of four is lost, after what was asked for has been done."""

    losing = False
    random = Random(0)

    def lose(self) -> None:
        if self.losing and self.random.random() < 0.25:
            raise StorageError("the answer was lost")

    async def put(self, key: str, value: bytes, expected: str | None) -> str:
        revision = await super().put(key, value, expected)
        self.lose()
        return revision

    async def send(self, messages: Sequence[Message]) -> None:
        await super().send(messages)
        self.lose()


async def test_lost_answers_cost_nothing(redis_url, event_store):
    picky, other = Picky(), Seen()
    broker = Losing(RedisConnections(redis_url), uuid4().hex, keep=10_000)
    bus = BrokerEventBus(broker, subscription="test", attempts=1, lease=0.5)
    bus.register(picky)
    bus.register(other, Happened)
    async with running(bus), bus.subscribe() as stream:
        broker.losing = True
        for number in range(60):
            for name in ("good", "fine", "bad"):
                events = await stored(event_store, 1, name, number)
                with anyio.fail_after(SECONDS):
                    while True:
                        with suppress(StorageError):
                            await bus.publish(events)
                            break
        received = await receive(stream, 180)
        await picky.seen.wait_for(122)
        with anyio.fail_after(SECONDS):
            while True:
                with suppress(StorageError):
                    letters = await bus.dead_letters()
                    if letters and letters[0].last == 60:
                        break
        broker.losing = picky.failing = False
        await bus.retry_dead_letters("Thing-bad")
        await picky.seen.wait_for(180)
    whole = list(range(1, 61))
    assert by_stream(received) == {f"Thing-{one}": whole for one in ("good", "fine", "bad")}
    assert by_stream(picky.seen.events) == by_stream(received)


async def test_dead_letters_outlive_who_made_them_and_are_discarded(make_bus, event_store):
    picky = Picky()
    for expected in (2, 6):  # the second one finds the stream set aside
        bus = make_bus(attempts=1)
        bus.register(picky)
        async with running(bus):
            await bus.publish(await stored(event_store, 4, "bad"))
            last = await stored(event_store, 1, "good")
            await bus.publish(last)
            await picky.seen.wait_for(4 if expected == 6 else 3)
            events = 0
            with anyio.fail_after(SECONDS):
                while events != expected:
                    events = sum(one.events for one in await bus.dead_letters())
    assert by_stream(picky.seen.events)["Thing-bad"] == [1, 2]
    assert max(picky.attempts[position] for position in picky.attempts) == 1
    async with make_bus() as bus:
        assert await bus.discard_dead_letters("Thing-bad") == 6
        assert await bus.discard_dead_letters("Thing-bad") == 0
        assert await bus.dead_letters() == []


async def test_what_cannot_be_decoded_is_a_dead_letter_at_once(make_bus, event_store, monkeypatch):
    @attrs.frozen
    class Removed(DomainEvent):
        value: int

    seen = Seen()
    bus = make_bus()
    bus.register(seen)
    result = await event_store.append_events("a", "Thing", [Removed(1)], ANY)
    async with running(bus):
        known = registry._by_name["Removed"]
        monkeypatch.delitem(registry._by_name, "Removed")
        await bus.publish(result.events)
        letters: Sequence[DeadLetters] = []
        with anyio.fail_after(SECONDS):
            while not letters:
                letters = await bus.dead_letters()
        assert "EventDecodeError" in letters[0].error
        with pytest.raises(EventDecodeError):
            await bus.retry_dead_letters("Thing-a")
        monkeypatch.setitem(registry._by_name, "Removed", known)
        assert await bus.retry_dead_letters("Thing-a") == 1
    assert seen.events == list(result.events)


async def test_a_letter_that_was_never_counted_in_is_nobodys(make_bus, event_store):
    """Somebody has died after writing it, and then its event was handled after all."""
    picky = Picky()
    bus = make_bus(attempts=1)
    bus.register(picky)
    async with running(bus):
        events = await stored(event_store, 4, "bad")
        message = encode(events[1], 8)
        envelope = open_payload(message.payload)
        letters = bus._letters()
        left = DeadLetters("Thing-bad", 2, 2, 1, "", datetime.now(UTC), revision="f" * 32)
        assert await letters.add(left, envelope, message.payload) is None
        key = letters._letter_key("Thing-bad", 2)
        await bus._broker.put(key, b"not even a letter", None)
        await bus.publish(events)
        with anyio.fail_after(SECONDS):
            while not (found := await bus.dead_letters()) or found[0].last < 4:
                pass
        picky.failing = False
        assert await bus.retry_dead_letters("Thing-bad") == 2
        assert await letters.letters("Thing-bad") == []
    assert by_stream(picky.seen.events) == {"Thing-bad": [1, 2, 3, 4]}


async def test_a_retry_and_the_subscription_lose_nothing_between_them(make_bus, event_store):
    picky = Picky()
    bus = make_bus(attempts=1)
    bus.register(picky)
    published = 2

    def has_seen(version: int) -> bool:
        return version in {one.version for one in picky.seen.events}

    async def publish(count: int) -> None:
        nonlocal published
        for _ in range(count):
            await bus.publish(await stored(event_store, 1, "bad"))
            published += 1
            if not picky.failing:
                await picky.seen.wait(partial(has_seen, published))

    async with running(bus):
        await bus.publish(await stored(event_store, 2, "bad"))
        for _ in range(10):
            picky.failing = True
            await publish(1)
            with anyio.fail_after(SECONDS):
                while not await bus.dead_letters():
                    pass
                picky.failing = False
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(publish, 5)
                    while len({one.version for one in picky.seen.events}) < published:
                        await bus.retry_dead_letters("Thing-bad")
        assert await bus.dead_letters() == []
    assert {one.version for one in picky.seen.events} == set(range(1, 63))


# -- cancellation -----------------------------------------------------------------------------


async def test_running_may_be_cancelled_anywhere(make_bus, event_store):
    seen = Seen()
    published = 0

    async def run() -> None:
        nonlocal published
        bus = make_bus(lease=0.5, partitions=2)
        bus.register(seen)
        async with bus, anyio.create_task_group() as tasks:
            await tasks.start(bus.run)
            published += 2
            await bus.publish(await stored(event_store, 1, str(published)))
            await bus.publish(await stored(event_store, 1, str(published + 1)), background=True)
            await seen.wait(lambda: len({one.event_id for one in seen.events}) >= 1)
            bus.stop()

    async def check(_: None) -> None:
        pass

    first = make_bus(partitions=2)
    first.register(seen)
    async with running(first):  # so that the subscription is there from now on
        pass
    with anyio.fail_after(90):
        assert await cancel_at_every_checkpoint(run, check) > 5
    last = make_bus(lease=0.5, partitions=2)
    last.register(seen)
    async with running(last):
        events = await stored(event_store, 1, "last")
        await last.publish(events)
        await seen.wait(lambda: events[0] in seen.events)


# -- refilling --------------------------------------------------------------------------------


async def test_a_store_fills_a_bus(make_bus):
    seen = Seen()
    async with InMemoryEventStore() as store:
        for number in range(25):
            await stored(store, 100, str(number))
        bus = make_bus(start="first")
        bus.register(seen)
        async with running(bus):
            assert await bus.refill(store) == 2500
            await seen.wait_for(2500)
            assert await bus.refill(store, after=2400) == 100
            await bus.publish(await stored(store, 1, "last"))
            await seen.wait_for(2501)
    assert by_stream(seen.events) == {
        **{f"Thing-{one}": list(range(1, 101)) for one in range(25)},
        "Thing-last": [1],
    }


# -- with relays ------------------------------------------------------------------------------


async def test_a_relay_that_is_cut_off_before_its_checkpoint_delivers_again_and_nobody_notices(
    make_bus, event_store
):
    seen, deliveries = Seen(), 0
    bus = make_bus()
    bus.register(seen)
    async with running(bus), make_bus() as publisher, bus.subscribe() as stream:

        async def deliver(events: Sequence[StoredEvent]) -> None:
            nonlocal deliveries
            await publisher.publish(events)
            deliveries += 1
            if deliveries % 3 == 1:  # killed between delivery and checkpoint
                relaying.cancel_scope.cancel()
                await anyio.sleep_forever()

        for number in range(20):
            await stored(event_store, 10, str(number % 4), number)
        last = await event_store.last_position()
        with anyio.fail_after(SECONDS):
            for _ in range(5):
                relay = EventRelay(deliver, name="relay", batch_size=50)
                coordinator = ProjectionCoordinator(event_store, [relay])
                async with anyio.create_task_group() as relaying:
                    await relaying.start(coordinator.run)
                    await coordinator.wait_for(last)
                    coordinator.stop()
        received = await receive(stream, 200)
        await seen.wait_for(200)
    assert deliveries > 4
    whole = {f"Thing-{one}": list(range(1, 51)) for one in range(4)}
    assert by_stream(received) == by_stream(seen.events) == whole


async def test_rebuilding_a_relay_fills_a_bus_that_was_emptied(event_store, redis_url):
    prefix = uuid4().hex
    async with RedisEventBus(redis_url, prefix=prefix) as bus:
        events = await stored(event_store, 20)
        coordinator = ProjectionCoordinator(event_store, [EventRelay(bus, name="relay")])
        async with anyio.create_task_group() as tasks:
            await tasks.start(coordinator.run)
            await coordinator.wait_for(20)
            connections = RedisConnections(redis_url)
            connections.open()
            await connections.call(("DEL", *(f"{prefix}:events:{one:04}" for one in range(8))))
            await connections.close()
            async with bus.subscribe() as stream:
                await coordinator.rebuild("relay")
                assert await receive(stream, 20) == list(events)
            coordinator.stop()
