"""The bus over Redis: what a relay publishes, and how long an event takes to another process.

    python -m benchmarks.redis [LOOP…]

The server is a new one that makes each write durable (`appendfsync always`), as a store does.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from statistics import quantiles
from time import monotonic, perf_counter
from typing import IO, cast
from uuid import uuid4

import anyio

from eventsource_anyio import StoredEvent
from eventsource_anyio.bus.redis import RedisEventBus
from eventsource_anyio.ids import uuid7
from eventsource_anyio.testing.redis import redis_server

from .events import PLACED
from .suite import LOOPS, Found, on

_BATCH = 500  # what a relay reads at a time
_STREAMS = 1000
_WARM = 20


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


async def published(url: str, events: int) -> Found:
    """One batch after another, each stored before the next."""
    todo = batches(events)
    async with RedisEventBus(url, prefix=uuid4().hex) as bus:
        begun = perf_counter()
        for batch in todo:
            await bus.publish(batch)
        return {"events/s": events / (perf_counter() - begun)}


async def relayed(url: str, loop: str, events: int) -> Found:
    """The same, until handlers in another process have had them all, each stream in its order."""
    todo, prefix = batches(events), uuid4().hex
    with _process("handle", url, prefix, loop, events) as other:
        async with RedisEventBus(url, prefix=prefix) as bus:
            begun = perf_counter()
            for batch in todo:
                await bus.publish(batch)
            await anyio.to_thread.run_sync(_line, other)
            seconds = perf_counter() - begun
    return {"events/s": events / seconds}


async def latency(url: str, loop: str, events: int) -> Found:
    """From the call of `publish` to the call of a handler in another process, one at a time."""
    prefix, times = uuid4().hex, list[float]()
    with _process("tell", url, prefix, loop, events + _WARM) as other:
        async with RedisEventBus(url, prefix=prefix) as bus:
            for batch in batches(events + _WARM):
                for event in batch:
                    begun = monotonic()
                    await bus.publish([event])
                    times.append(float(await anyio.to_thread.run_sync(_line, other)) - begun)
    found = quantiles(times[_WARM:], n=100)
    return {"p50 ms": found[49] * 1000, "p99 ms": found[98] * 1000}


# -- the other process ------------------------------------------------------------------------


def _process(what: str, url: str, prefix: str, loop: str, events: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.redis", what, url, prefix, loop, str(events)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    _line(other)  # it has started
    return other


def _line(other: subprocess.Popen[str]) -> str:
    line = cast("IO[str]", other.stdout).readline()
    if not line:
        raise RuntimeError("the other process has failed")
    return line


async def _handle(what: str, url: str, prefix: str, events: int) -> None:
    bus = RedisEventBus(url, prefix=prefix, subscription="benchmark")
    handled, versions = 0, dict[str, int]()

    async def handle(event: StoredEvent) -> None:
        nonlocal handled
        now = monotonic()
        stream = str(event.aggregate_id)
        if event.version != versions.get(stream, 0) + 1:
            raise AssertionError("an event was missed, or came in another order")
        versions[stream] = event.version
        handled += 1
        if what == "tell":
            print(now, flush=True)
        if handled == events:
            if what == "handle":
                print(now, flush=True)
            bus.stop()

    bus.register(handle)
    async with bus, anyio.create_task_group() as tasks:
        await tasks.start(bus.run)
        print("started", flush=True)


def main(loops: Sequence[str]) -> None:
    with redis_server(durable=True) as server:
        for loop in loops:
            for name, work in (
                ("published", partial(published, server.url, 50_000)),
                ("relayed", partial(relayed, server.url, loop, 50_000)),
                ("latency", partial(latency, server.url, loop, 500)),
            ):
                for unit, value in on(loop, work).items():
                    print(f"{name:10} {loop:8} {value:12,.2f} {unit}")


if __name__ == "__main__":
    if sys.argv[1:2] in (["handle"], ["tell"]):
        what, url, prefix, loop, count = sys.argv[1:]
        on(loop, partial(_handle, what, url, prefix, int(count)))
    else:
        main(sys.argv[1:] or list(LOOPS))
