"""What tests of buses over brokers have in common."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol
from uuid import uuid4

import anyio

from eventsource_anyio import StoredEvent
from eventsource_anyio.bus.nats import NATSEventBus
from eventsource_anyio.bus.partitioned import BrokerEventBus
from eventsource_anyio.bus.redis import RedisEventBus

SECONDS = 30.0


class MakeBus(Protocol):
    def __call__(self, **options: object) -> BrokerEventBus: ...


def redis_buses(url: str) -> MakeBus:
    """Makes buses that hear each other."""
    prefix = uuid4().hex

    def make(**options: object) -> BrokerEventBus:
        given = {"subscription": "test", "retry_after": 0.01, "prefix": prefix, **options}
        return RedisEventBus(url, **given)  # type: ignore[arg-type]

    return make


def nats_buses(url: str) -> MakeBus:
    """Likewise."""
    name = uuid4().hex

    def make(**options: object) -> BrokerEventBus:
        given = {"subscription": "test", "retry_after": 0.01, "name": name, **options}
        return NATSEventBus(url, **given)  # type: ignore[arg-type]

    return make


BUSES = {"nats": nats_buses, "redis": redis_buses}


@asynccontextmanager
async def running(*buses: BrokerEventBus) -> AsyncIterator[None]:
    """Entered and run; stopped at the end, and cancelled if the block fails."""
    async with anyio.create_task_group() as tasks:
        for bus in buses:
            await tasks.start(_run, bus)
        yield
        for bus in buses:
            bus.stop()


async def _run(bus: BrokerEventBus, *, task_status: anyio.abc.TaskStatus[None]) -> None:
    async with bus:
        await bus.run(task_status=task_status)


async def until(condition: Callable[[], object], look: Callable[[], object] = lambda: None) -> None:
    """Wait for something that nobody tells of."""
    with anyio.fail_after(SECONDS):
        while not condition():
            look()
            await anyio.sleep(0.005)


async def publish_in_parts(bus: BrokerEventBus, events: Sequence[StoredEvent]) -> None:
    """So that the broker drops some of them: NATS keeps a number of messages, of many events."""
    for start in range(0, len(events), 5):
        await bus.publish(events[start : start + 5])


def positions(events: Sequence[StoredEvent]) -> list[int]:
    return [one.position for one in events]
