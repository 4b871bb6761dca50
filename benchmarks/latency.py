"""How long it is from an append to a subscriber that is live, in two processes or in one.

An event carries when it was given to the store, by the machine's monotonic clock, which all
processes share. The time ends when the subscriber's own code has the event. It includes the append.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from random import Random
from time import monotonic_ns, perf_counter
from typing import TypeAlias, cast

import anyio
import attrs
from anyio.abc import TaskStatus

from eventsource_anyio import ANY, DomainEvent, EventStore

from .events import AllSent, Sent
from .subject import Driver, Subject, opened
from .suite import Found, on

_WARM = 20
_LONGEST = 60.0  # seconds that a subscriber may take to end

Append: TypeAlias = Callable[[str, DomainEvent], Coroutine[object, object, object]]


@attrs.frozen
class Load:
    """How many tasks append; each one again after `pause` seconds on average, or at once.

    The pauses are random, from none to twice as long, so that they keep step with nothing.
    """

    writers: int
    pause: float = 0.0

    def __str__(self) -> str:
        who = "1 writer" if self.writers == 1 else f"{self.writers} writers"
        return f"{who}, about {self.writers / self.pause:.0f} appends/s" if self.pause else who


ONE_PACED, ONE, FIFTY = Load(1, 0.01), Load(1), Load(50)


async def write(append: Append, load: Load, seconds: float) -> int:
    """Append until the time is over, each task to its own stream; how many there were."""
    for _ in range(_WARM):
        async with anyio.create_task_group() as group:
            for number in range(load.writers):
                group.start_soon(append, f"latency-{number}", Sent(0))
    sent = 0

    async def writer(number: int) -> None:
        nonlocal sent
        pauses = Random(number)
        due = anyio.current_time()
        while perf_counter() < end:
            if load.pause:
                due += load.pause * 2 * pauses.random()
                await anyio.sleep_until(due)
            await append(f"latency-{number}", Sent(monotonic_ns()))
            sent += 1

    end = perf_counter() + seconds
    async with anyio.create_task_group() as group:
        for number in range(load.writers):
            group.start_soon(writer, number)
    await append("latency-end", AllSent(sent))
    return sent


async def collect(events: AsyncIterator[DomainEvent]) -> dict[str, float]:
    """Take events up to `AllSent`: the latencies, and how many never came."""
    took: list[int] = []
    async for event in events:
        now = monotonic_ns()
        match event:
            case Sent(at) if at:
                took.append(now - at)
            case AllSent(count):
                took.sort()
                return {
                    "p50 ms": took[len(took) // 2] / 1e6,
                    "p99 ms": took[len(took) * 99 // 100] / 1e6,
                    "missed": count - len(took),
                }
            case _:
                pass
    raise AssertionError("the subscription ended")


@contextmanager
def follower(*command: str) -> Iterator[Callable[[], dict[str, float]]]:
    """A process that follows, from when it says that it is ready; what it found in the end.

    To be asked for that ends its standard input.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def found() -> dict[str, float]:
        said, _ = process.communicate(timeout=_LONGEST)
        figures: dict[str, float] = json.loads(said)
        return figures

    try:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise AssertionError("the subscriber did not start")
        yield found
    finally:
        process.kill()
        process.wait()


def say_ready() -> None:
    print("ready", flush=True)


def two_processes(dsn: str, subject: Subject, load: Load, seconds: float) -> Found:
    """The writer here, the subscriber in another process, each with a store of its own."""
    with follower("benchmarks.latency", dsn, subject.loop, subject.driver) as found:
        store = opened(dsn, driver=subject.driver)
        sent = on(subject.loop, _write_in, store, load, seconds)
        return {**found(), "committed": sent, "appends/s": sent / seconds}


def one_process(dsn: str, subject: Subject, load: Load, seconds: float) -> Found:
    """The writer and the subscriber in one process, with one store."""
    return on(subject.loop, _together, opened(dsn, driver=subject.driver), load, seconds)


def _append_to(store: EventStore) -> Append:
    return lambda stream, event: store.append_events(stream, "Latency", [event], ANY)


async def _write_in(store: EventStore, load: Load, seconds: float) -> int:
    async with store:
        return await write(_append_to(store), load, seconds)


async def _follow_in(store: EventStore) -> dict[str, float]:
    async with store:
        return await _follow(store, say_ready)


async def _follow(store: EventStore, ready: Callable[[], None]) -> dict[str, float]:
    """From now on; in order, or it is an error."""
    last = await store.last_position()
    async with store.subscribe(after=last) as subscription:

        async def events() -> AsyncIterator[DomainEvent]:
            nonlocal last
            async for stored in subscription:
                if stored.position <= last:
                    raise AssertionError(f"position {stored.position} came after {last}")
                last = stored.position
                yield stored.event

        ready()
        return await collect(events())


async def _together(store: EventStore, load: Load, seconds: float) -> Found:
    found: dict[str, float] = {}

    async def subscriber(*, task_status: TaskStatus[None]) -> None:
        found.update(await _follow(store, task_status.started))

    with anyio.fail_after(seconds + _LONGEST):
        async with store, anyio.create_task_group() as group:
            await group.start(subscriber)
            sent = await write(_append_to(store), load, seconds)
    return {**found, "committed": sent, "appends/s": sent / seconds}


if __name__ == "__main__":
    dsn, loop, driver = sys.argv[1:]
    print(json.dumps(on(loop, _follow_in, opened(dsn, driver=cast("Driver", driver)))))
