"""Buses over brokers: what a relay gets to handlers elsewhere, and how long one event takes.

- The servers are new ones that make each write durable, as a store does.
- *relay*: events that are in a store, until handlers in another process have had all of them, each
  stream in its order. Store and relay are in the process that is measured.
- *publish*: batches of 500, each stored by the broker before the next; NATS beside bare nats-py,
  with a message an event.
- *publish to handler*: from the call of `publish` to that of a handler in another process, one
  event at a time.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from statistics import quantiles
from time import monotonic, perf_counter
from typing import IO, Literal, TypeAlias, cast
from uuid import uuid4

import anyio
import nats
from rich.console import Console

from eventsource_anyio import (
    EventBus,
    InMemoryEventStore,
    ProjectionCoordinator,
    StoredEvent,
)
from eventsource_anyio.bus.encoding import encode
from eventsource_anyio.bus.nats import NATSEventBus
from eventsource_anyio.bus.redis import RedisEventBus
from eventsource_anyio.ids import uuid7
from eventsource_anyio.relay import EventRelay
from eventsource_anyio.testing.nats import NATSUnavailableError, nats_server
from eventsource_anyio.testing.redis import RedisUnavailableError, redis_server

from .events import PLACED
from .plan import Plan
from .suite import Found, Piece, Suite, on, ours, per_second
from .work import Filled, put_in

Broker: TypeAlias = Literal["Redis", "NATS"]
BROKERS: Sequence[Broker] = ("Redis", "NATS")
_BATCH = 500  # what a relay reads at a time
_STREAMS = 1000
_WARM = 20
_RELAYED = Filled(streams=20, sizes=())
_PUBLISHED = 20_000
_ALONE = 200


def bus(broker: Broker, url: str, name: str, subscription: str | None = None) -> EventBus:
    if broker == "Redis":
        return RedisEventBus(url, prefix=name, subscription=subscription)
    return NATSEventBus(url, name=name, subscription=subscription)


def batches(events: int) -> Sequence[Sequence[StoredEvent]]:
    """New events of many streams in turn, each in its order."""
    now = datetime.now(UTC)
    every = [
        StoredEvent(
            *(PLACED, uuid7(), "Placed", f"order-{n % _STREAMS}", "Order", n // _STREAMS + 1),
            *(n + 1, now, now, {}, 1),
        )
        for n in range(events)
    ]
    return [every[first : first + _BATCH] for first in range(0, events, _BATCH)]


async def published(broker: Broker, url: str) -> Found:
    todo = batches(_PUBLISHED)
    async with bus(broker, url, uuid4().hex) as here:
        begun = perf_counter()
        for batch in todo:
            await here.publish(batch)
        return per_second(_PUBLISHED, perf_counter() - begun)


async def bare_nats(url: str) -> Found:
    todo, name = batches(_PUBLISHED), uuid4().hex
    client = await nats.connect(url)
    try:
        jetstream = client.jetstream()
        await jetstream.add_stream(name=name, subjects=[f"{name}.*"])
        begun = perf_counter()
        for batch in todo:
            sent = [encode(event, 8) for event in batch]
            await asyncio.gather(
                *[
                    await jetstream.publish_async(f"{name}.{one.partition}", one.payload)
                    for one in sent
                ]
            )
        return per_second(_PUBLISHED, perf_counter() - begun)
    finally:
        await client.close()


async def relayed(broker: Broker, url: str, loop: str) -> Found:
    name, events = uuid4().hex, _RELAYED.events
    async with InMemoryEventStore() as store:
        await put_in(store, _RELAYED)
        with _process("handle", broker, url, name, loop, events) as other:
            async with bus(broker, url, name) as here, anyio.create_task_group() as tasks:
                coordinator = ProjectionCoordinator(store, [EventRelay(here, name="relay")])
                begun = perf_counter()
                await tasks.start(coordinator.run)
                await anyio.to_thread.run_sync(_line, other)
                seconds = perf_counter() - begun
                coordinator.stop()
    return per_second(events, seconds)


async def latency(broker: Broker, url: str, loop: str) -> Found:
    name, times = uuid4().hex, list[float]()
    with _process("tell", broker, url, name, loop, _ALONE + _WARM) as other:
        async with bus(broker, url, name) as here:
            for batch in batches(_ALONE + _WARM):
                for event in batch:
                    begun = monotonic()
                    await here.publish([event])
                    times.append(float(await anyio.to_thread.run_sync(_line, other)) - begun)
    found = quantiles(times[_WARM:], n=100)
    return {"p50 ms": found[49] * 1000, "p99 ms": found[98] * 1000}


def _started(broker: Broker, stack: ExitStack) -> str:
    if broker == "Redis":
        return stack.enter_context(redis_server(durable=True)).url
    return stack.enter_context(nats_server(durable=True)).url


@contextmanager
def adding(suite: Suite, plan: Plan, console: Console) -> Iterator[None]:
    with ExitStack() as stack:
        for broker in BROKERS:
            try:
                url = _started(broker, stack)
            except (RedisUnavailableError, NATSUnavailableError) as error:
                console.print(f"{broker} is left out: {error}")
                continue
            if broker == "NATS":
                piece = Piece("publish", broker, "batches of 500", "bare nats-py, asyncio")
                suite.add(piece, partial(on, "asyncio", bare_nats, url))
            for loop in plan.loops:
                piece = Piece("publish", broker, "batches of 500", ours(loop))
                suite.add(piece, partial(on, loop, published, broker, url))
            for loop in plan.loops:
                piece = Piece("relay", broker, "to another process", ours(loop))
                suite.add(piece, partial(on, loop, relayed, broker, url, loop))
            for loop in plan.loops:
                piece = Piece("publish to handler", broker, "another process", ours(loop))
                suite.add(piece, partial(on, loop, latency, broker, url, loop))
        yield


# The other process -------------------------------------------------------------------------------


@contextmanager
def _process(
    what: str, broker: Broker, url: str, name: str, loop: str, events: int
) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "benchmarks.brokers", what, broker, url, name, loop]
    with subprocess.Popen([*command, str(events)], stdout=subprocess.PIPE, text=True) as other:
        try:
            _line(other)  # it has started
            yield other
        except BaseException:
            other.kill()
            raise


def _line(other: subprocess.Popen[str]) -> str:
    line = cast("IO[str]", other.stdout).readline()
    if not line:
        raise RuntimeError("the other process has failed")
    return line


async def _handle(what: str, broker: Broker, url: str, name: str, events: int) -> None:
    here = bus(broker, url, name, "benchmark")
    handled, versions = 0, dict[str, int]()

    async def handle(event: StoredEvent) -> None:
        nonlocal handled
        now = monotonic()
        stream = str(event.aggregate_id)
        if event.version != versions.get(stream, 0) + 1:
            raise AssertionError("an event was missed, or came in another order")
        versions[stream] = event.version
        handled += 1
        if what == "tell" or handled == events:
            print(now, flush=True)
        if handled == events:
            here.stop()

    here.register(handle)
    async with here, anyio.create_task_group() as tasks:
        await tasks.start(here.run)
        print("started", flush=True)


if __name__ == "__main__":
    what, broker, url, name, loop, count = sys.argv[1:]
    on(loop, partial(_handle, what, cast("Broker", broker), url, name, int(count)))
