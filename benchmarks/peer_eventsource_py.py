"""eventsource-py, in an environment of its own: what it is asked to do.

Subscriptions are by its manager, with the configurations that it has for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from random import Random
from time import monotonic_ns, perf_counter
from typing import Any, ParamSpec, cast
from uuid import UUID, uuid4

import psutil
from eventsource import (  # type: ignore[import-not-found]
    DatabaseProjection,
    InMemoryCheckpointRepository,
    InMemoryEventBus,
    SQLCheckpointRepository,
    handles,
)
from eventsource.application.subscriptions import (  # type: ignore[import-not-found]
    SubscriptionManager,
    create_catch_up_config,
    create_live_only_config,
)
from eventsource.domain import StreamId  # type: ignore[import-not-found]
from eventsource.ports import ExpectedVersion, FeedReadOptions  # type: ignore[import-not-found]
from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker

from .peer_eventsource_py_store import (
    BATCH,
    CONNECTIONS,
    LOADED,
    Found,
    Placed,
    Sent,
    append,
    append_to_one,
    fill,
    opened,
    placed,
    put_in,
    repository_of,
    schema,
    take_snapshots,
)
from .peer_serve import serve

P = ParamSpec("P")

PAGE = 1000
_END = 20.0  # seconds that its subscriber may be behind when the last event was appended


async def _append(
    store: Any, tasks: int, events: int, contended: bool, seconds: float
) -> tuple[int, float]:
    done = 0
    one_stream = uuid4()

    async def one(order: UUID) -> None:
        nonlocal done
        count = 0
        while (not count and not contended) or perf_counter() < begun + seconds:
            if contended:
                count += await append_to_one(store, one_stream, events, begun + seconds)
            else:
                await append(store, order, count, events)
                count += events
        done += count

    await asyncio.gather(*(append(store, uuid4(), 0, 1) for _ in range(CONNECTIONS)))
    begun = perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(tasks):
            group.create_task(one(uuid4()))
    return done, perf_counter() - begun


async def appends(where: str, tasks: int, events: int, contended: bool, seconds: float) -> Found:
    async with opened(where) as (store, _, _):
        done, took = await _append(store, tasks, events, contended, seconds)
        return {"events/s": done / took}


async def followed(where: str, tasks: int, events: int, contended: bool, seconds: float) -> Found:
    """The same, while a reader follows the feed as its runners do."""
    async with opened(where) as (store, _, _):
        position = await store.current_position()
        seen: set[UUID] = set()
        over = asyncio.Event()

        async def follow() -> None:
            nonlocal position
            last = False
            while True:
                page = [e async for e in store.read_all(position, FeedReadOptions(limit=BATCH))]
                seen.update(envelope.event.event_id for envelope in page)
                if page:
                    position = page[-1].position
                elif last:
                    return
                else:
                    last = over.is_set()
                    await asyncio.sleep(0.001)

        reader = asyncio.create_task(follow())
        done, took = await _append(store, tasks, events, contended, seconds)
        over.set()
        await reader
        committed = done + CONNECTIONS  # each connection was warmed up by one
        return {"events/s": done / took, "missed": committed - len(seen), "committed": committed}


async def loads(where: str, size: int, snapshot: bool, seconds: float) -> Found:
    async with opened(where) as (store, snapshots, _):
        if not where:
            await put_in(store, int(size == LOADED), [size])
            await take_snapshots(store, snapshots, [size])
        repository = repository_of(store, snapshots if snapshot else None)
        assert (await repository.load(UUID(int=size))).version == size
        done = 0
        begun = perf_counter()
        while (now := perf_counter()) < begun + seconds:
            await repository.load(UUID(int=size))
            done += 1
        return {"ms": (now - begun) / done * 1000}


async def read_all(where: str, streams: int, sizes: Sequence[int], seconds: float) -> Found:
    """In pages as its configuration for catching up has them."""
    async with opened(where) as (store, _, _):
        if not where:
            await put_in(store, streams, sizes)
        read = 0
        begun = perf_counter()
        while (now := perf_counter()) < begun + seconds:
            read += await _read(store)
        return {"events/s": read / (now - begun)}


async def _read(store: Any) -> int:
    position, read = None, 0
    while True:
        page = [e async for e in store.read_all(position, FeedReadOptions(limit=PAGE))]
        read += len(page)
        if len(page) < PAGE:
            return read
        position = page[-1].position


class Totals(DatabaseProjection):  # type: ignore[misc]
    handled = 0

    @handles(Placed)  # type: ignore[untyped-decorator,unused-ignore]
    async def _placed(self, connection: Any, event: Placed) -> None:
        statement = (
            "INSERT INTO totals AS t (order_id, amount, events) VALUES (:id, :amount, 1) "
            "ON CONFLICT (order_id) DO UPDATE SET amount = t.amount + excluded.amount, "
            "events = t.events + 1"
        )
        values = {"id": str(event.aggregate_id), "amount": event.amount}
        await connection.execute(text(statement), values)
        self.handled += 1


async def catch_up(where: str, seconds: float) -> Found:
    """A projection with SQL, one statement an event, and its checkpoint: as far as it comes."""
    async with opened(where) as (store, _, engine):
        checkpoints = SQLCheckpointRepository(engine)
        sessions = async_sessionmaker(engine, expire_on_commit=False)
        projection = Totals(session_factory=sessions, checkpoint_repo=checkpoints)
        manager = SubscriptionManager(store, InMemoryEventBus(), checkpoints)
        await manager.subscribe(projection, create_catch_up_config())
        begun = perf_counter()
        running = asyncio.create_task(manager.start())
        await asyncio.wait([running], timeout=seconds)
        done, took = projection.handled, perf_counter() - begun
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        await manager.stop()
        return {"events/s": done / took}


class Latencies:
    def __init__(self) -> None:
        self.took: dict[UUID, int] = {}
        self.again = 0

    def subscribed_to(self) -> list[type[Any]]:
        return [Sent]

    async def handle(self, event: Sent) -> None:
        if event.event_id in self.took:
            self.again += 1
        elif event.given:
            self.took[event.event_id] = monotonic_ns() - event.given


async def latency(where: str, writers: int, pause: float, seconds: float) -> Found:
    """From the append to the handler, in one process; stored, and then published on its bus."""
    async with opened(where) as (store, _, _):
        bus, handler = InMemoryEventBus(), Latencies()
        manager = SubscriptionManager(store, bus, InMemoryCheckpointRepository())
        await manager.subscribe(handler, create_live_only_config())
        await manager.start()
        streams = [uuid4() for _ in range(writers)]
        sent = 0

        async def send(stream: UUID, version: int, given: int) -> None:
            event = Sent(aggregate_id=stream, aggregate_version=version + 1, given=given)
            expected = ExpectedVersion.exact(version)
            await store.append(StreamId(stream, "Latency"), [event], expected)
            await bus.publish([event])

        async def writer(number: int) -> None:
            nonlocal sent
            pauses, version = Random(number), 1
            due = perf_counter()
            while perf_counter() < end:
                if pause:
                    due += pause * 2 * pauses.random()
                    await asyncio.sleep(max(due - perf_counter(), 0))
                await send(streams[number], version, monotonic_ns())
                version += 1
                sent += 1

        await asyncio.gather(*(send(stream, 0, 0) for stream in streams))
        end = perf_counter() + seconds
        await asyncio.gather(*(writer(number) for number in range(writers)))
        took_seconds = perf_counter() - end + seconds
        last = perf_counter()
        # A handler cannot tell that it has had all of them.
        while len(handler.took) < sent and perf_counter() < last + _END:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        await manager.stop()
        took = sorted(handler.took.values())
        return {
            "p50 ms": took[len(took) // 2] / 1e6,
            "p99 ms": took[len(took) * 99 // 100] / 1e6,
            "missed": sent - len(took),
            "again": handler.again,
            "committed": sent,
            "appends/s": sent / took_seconds,
        }


async def fan_out(subscribers: int, events: int) -> Found:
    """Batches of 100 to handlers of its bus, which `publish` awaits."""
    bus = InMemoryEventBus()
    got = 0

    def handler() -> Callable[[Any], Awaitable[None]]:
        async def handle(event: Any) -> None:
            nonlocal got
            got += 1

        return handle

    for _ in range(subscribers):
        bus.subscribe(Placed, handler())
    order = uuid4()
    todo = [placed(order, number + 1) for number in range(events)]
    begun = perf_counter()
    for first in range(0, events, BATCH):
        await bus.publish(todo[first : first + BATCH])
    took = perf_counter() - begun
    assert got == subscribers * events
    return {"deliveries/s": got / took}


async def memory_of_appends(where: str, count: int) -> Found:
    """kB for each of the appends that are all under way."""
    async with opened(where) as (store, _, _):
        await append(store, uuid4(), 0, 1)
        process = psutil.Process()
        start = highest = process.memory_info().rss

        async def one(number: int) -> None:
            nonlocal highest
            await append(store, uuid4(), 0, 1)
            if number % 100 == 0:
                highest = max(highest, process.memory_info().rss)

        await asyncio.gather(*(one(number) for number in range(count)))
        return {"kB": (max(highest, process.memory_info().rss) - start) / count / 1e3}


async def memory_of_a_stream(where: str) -> Found:
    """MB above the start, at the highest, while everything is read as one iteration."""
    async with opened(where) as (store, _, _):
        async for _ in store.read_all(None, FeedReadOptions(limit=1)):
            pass
        process = psutil.Process()
        start = highest = process.memory_info().rss
        read = 0
        async for _ in store.read_all():
            read += 1
            if read % 1000 == 0:
                highest = max(highest, process.memory_info().rss)
        return {"MB": (highest - start) / 1e6}


def _run(work: Callable[P, Awaitable[Found]]) -> Callable[P, Found]:
    def run(*args: P.args, **kwargs: P.kwargs) -> Found:
        async def call() -> Found:
            return await work(*args, **kwargs)

        return asyncio.run(call())

    return run


if __name__ == "__main__":
    works = (appends, followed, loads, read_all, catch_up, latency, fan_out)
    serve(
        {
            "schema": schema,
            "fill": fill,
            **{work.__name__: _run(cast("Any", work)) for work in works},
            "memory_of_appends": _run(memory_of_appends),
            "memory_of_a_stream": _run(memory_of_a_stream),
        }
    )
