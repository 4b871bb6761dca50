"""The bus over NATS: what a relay publishes, beside bare nats-py, and how long an event takes.

    python -m benchmarks.nats [LOOP…]

The server is a new one that makes each write durable (`sync_interval: always`), as a store does.
`main` prints; `published`, `bare`, `relayed` and `latency` are pieces of work for a suite.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from statistics import quantiles
from time import monotonic, perf_counter
from typing import IO, TYPE_CHECKING, cast
from uuid import uuid4

import anyio
import nats as nats_py

from eventsource_anyio import StoredEvent
from eventsource_anyio.bus.encoding import encode
from eventsource_anyio.bus.nats import NATSEventBus
from eventsource_anyio.testing.nats import nats_server

from .redis import batches
from .suite import LOOPS, Found, on

if TYPE_CHECKING:
    from collections.abc import Iterator

_WARM = 20


async def published(url: str, events: int) -> Found:
    """One batch after another, each stored before the next."""
    todo = batches(events)
    async with NATSEventBus(url, name=uuid4().hex) as bus:
        begun = perf_counter()
        for batch in todo:
            await bus.publish(batch)
        return {"events/s": events / (perf_counter() - begun)}


async def bare(url: str, events: int) -> Found:
    """The same by nats-py alone, a message an event, each batch acknowledged before the next."""
    todo, name = batches(events), uuid4().hex
    client = await nats_py.connect(url)
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
        return {"events/s": events / (perf_counter() - begun)}
    finally:
        await client.close()


async def relayed(url: str, loop: str, events: int) -> Found:
    """`published`, until handlers in another process have had all, each stream in its order."""
    todo, name = batches(events), uuid4().hex
    with _process("handle", url, name, loop, events) as other:
        async with NATSEventBus(url, name=name) as bus:
            begun = perf_counter()
            for batch in todo:
                await bus.publish(batch)
            await anyio.to_thread.run_sync(_line, other)
            return {"events/s": events / (perf_counter() - begun)}


async def latency(url: str, loop: str, events: int) -> Found:
    """From the call of `publish` to the call of a handler in another process, one at a time."""
    name, times = uuid4().hex, list[float]()
    with _process("tell", url, name, loop, events + _WARM) as other:
        async with NATSEventBus(url, name=name) as bus:
            for batch in batches(events + _WARM):
                for event in batch:
                    begun = monotonic()
                    await bus.publish([event])
                    times.append(float(await anyio.to_thread.run_sync(_line, other)) - begun)
    found = quantiles(times[_WARM:], n=100)
    return {"p50 ms": found[49] * 1000, "p99 ms": found[98] * 1000}


# -- the other process ------------------------------------------------------------------------


@contextmanager
def _process(
    what: str, url: str, name: str, loop: str, events: int
) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "benchmarks.nats", what, url, name, loop, str(events)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
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


async def _handle(what: str, url: str, name: str, events: int) -> None:
    bus = NATSEventBus(url, name=name, subscription="benchmark")
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
            bus.stop()

    bus.register(handle)
    async with bus, anyio.create_task_group() as tasks:
        await tasks.start(bus.run)
        print("started", flush=True)


def main(loops: Sequence[str]) -> None:
    with nats_server(durable=True) as server:
        for loop in loops:
            for name, work in (
                ("published", partial(published, server.url, 50_000)),
                ("bare", partial(bare, server.url, 20_000)),
                ("relayed", partial(relayed, server.url, loop, 50_000)),
                ("latency", partial(latency, server.url, loop, 500)),
            ):
                if name == "bare" and loop == "trio":
                    continue  # nats-py is for asyncio
                for unit, value in on(loop, work).items():
                    print(f"{name:10} {loop:8} {value:12,.2f} {unit}")


if __name__ == "__main__":
    if sys.argv[1:2] in (["handle"], ["tell"]):
        what, url, name, loop, count = sys.argv[1:]
        on(loop, partial(_handle, what, url, name, int(count)))
    else:
        main(sys.argv[1:] or list(LOOPS))
