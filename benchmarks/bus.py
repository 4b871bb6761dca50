"""The bus of one process: batches of 100 events to subscribers, each until all of them have it.

- *bare memory streams*: a memory stream of anyio for each subscriber: what one would do by hand.
- Peers: handlers of their bus, which are awaited by who publishes. eventsourcing has no bus.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from functools import partial
from statistics import quantiles
from time import perf_counter

import anyio
from anyio.abc import ObjectReceiveStream, TaskStatus
from anyio.streams.memory import MemoryObjectSendStream

from eventsource_anyio import InMemoryEventBus, StoredEvent
from eventsource_anyio.ids import uuid7

from .events import PLACED, Placed
from .plan import Plan
from .suite import Found, Piece, Suite, on, ours

SUBSCRIBERS = (1, 10, 100)
_BATCH = 100
_DELIVERED = 40_000
_BY_PEERS = 2000
_ALONE = 2000


def batches(subscribers: int) -> list[list[StoredEvent]]:
    """New events each, since a bus drops what it has delivered before."""
    now = datetime.now(UTC)
    return [
        [
            StoredEvent(PLACED, uuid7(), "Placed", "a", "Order", n + 1, n + 1, now, now, {}, 1)
            for n in range(first, first + _BATCH)
        ]
        for first in range(0, _DELIVERED // subscribers, _BATCH)
    ]


async def ring(subscribers: int) -> Found:
    async with InMemoryEventBus() as bus, AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(bus.subscribe(Placed)) for _ in range(subscribers)
        ]
        return await _deliver(bus.publish, streams)


async def memory_streams(subscribers: int) -> Found:
    async with AsyncExitStack() as stack:
        senders: list[MemoryObjectSendStream[StoredEvent]] = []
        streams: list[ObjectReceiveStream[StoredEvent]] = []
        for _ in range(subscribers):
            sender, receiver = anyio.create_memory_object_stream[StoredEvent](1024)
            senders.append(await stack.enter_async_context(sender))
            streams.append(await stack.enter_async_context(receiver))

        async def publish(events: Sequence[StoredEvent]) -> None:
            for event in events:
                for sender in senders:
                    sender.send_nowait(event)

        return await _deliver(publish, streams)


async def _deliver(
    publish: Callable[[Sequence[StoredEvent]], Awaitable[None]],
    streams: Sequence[ObjectReceiveStream[StoredEvent]],
) -> Found:
    todo = batches(len(streams))
    waiting = 0
    all_have_it = anyio.Event()

    async def listen(
        stream: ObjectReceiveStream[StoredEvent], *, task_status: TaskStatus[None]
    ) -> None:
        nonlocal waiting
        task_status.started()
        for batch in todo:
            for event in batch:
                if await stream.receive() is not event:
                    raise AssertionError("an event was missed, or came in another order")
            waiting -= 1
            if not waiting:
                all_have_it.set()

    async with anyio.create_task_group() as group:
        for stream in streams:
            await group.start(listen, stream)
        begun = perf_counter()
        for batch in todo:
            waiting, all_have_it = len(streams), anyio.Event()
            await publish(batch)
            await all_have_it.wait()
        seconds = perf_counter() - begun
    return {"deliveries/s": len(streams) * len(todo) * _BATCH / seconds}


async def to_handler() -> Found:
    """From the call of `publish` to that of a handler, which `run` calls."""
    times: list[float] = []
    begun = 0.0

    async def handle(event: StoredEvent) -> None:
        times.append(perf_counter() - begun)

    bus = InMemoryEventBus()
    bus.register(handle, Placed)
    async with anyio.create_task_group() as group:
        await group.start(bus.run)
        for batch in batches(_DELIVERED // _ALONE):
            for event in batch:
                begun = perf_counter()
                await bus.publish([event])
        bus.stop()
    found = quantiles(times, n=100)
    return {"p50 ms": found[49] * 1000, "p99 ms": found[98] * 1000}


def add(suite: Suite, plan: Plan) -> None:
    for loop in plan.loops:
        suite.add(
            Piece("publish to handler", "memory", "alone", ours(loop)),
            partial(on, loop, to_handler),
        )
    for subscribers in SUBSCRIBERS:
        case = "1 subscriber" if subscribers == 1 else f"{subscribers} subscribers"
        for loop in plan.loops:
            if loop != "Trio":
                bare = Piece("fan-out", "memory", case, f"bare memory streams, {loop}")
                suite.add(bare, partial(on, loop, memory_streams, subscribers))
        for loop in plan.loops:
            piece = Piece("fan-out", "memory", case, ours(loop))
            suite.add(piece, partial(on, loop, ring, subscribers))
        for peer in plan.peers:
            if peer.name == "eventsource-py":
                count = max(_BY_PEERS // subscribers // _BATCH, 1) * _BATCH
                asked = partial(peer.ask, "fan_out", subscribers=subscribers, events=count)
                suite.add(Piece("fan-out", "memory", case, peer.name), asked)
