"""Another process of a subscription: the tests of `test_broker_processes.py` start it.

    python bus_worker.py URL NAME BACKEND ITS_OPTIONS_AS_JSON PARTITIONS LEASE PAUSE RECORD

It handles events by telling a file of them, after a pause.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partial

import anyio

from eventsource_anyio import StoredEvent
from eventsource_anyio.bus.nats import NATSEventBus
from eventsource_anyio.bus.partitioned import BrokerEventBus
from eventsource_anyio.bus.redis import RedisEventBus
from eventsource_anyio.testing.samples import Happened


def bus_of(url: str, name: str, partitions: int, lease: float = 5.0) -> BrokerEventBus:
    if url.startswith("nats:"):
        return NATSEventBus(
            url, name=name, subscription="workers", partitions=partitions, lease=lease
        )
    return RedisEventBus(
        url, prefix=name, subscription="workers", partitions=partitions, lease=lease
    )


async def work(
    url: str, name: str, partitions: int, lease: float, pause: float, record: str
) -> None:
    told = os.open(record, os.O_WRONLY | os.O_APPEND)

    async def handle(event: StoredEvent) -> None:
        await anyio.sleep(pause)
        os.write(told, f"{os.getpid()} {event.stream_id} {event.version}\n".encode())

    bus = bus_of(url, name, partitions, lease)
    bus.register(handle, Happened)
    async with bus, anyio.create_task_group() as tasks:
        await tasks.start(bus.run)
        os.write(1, b"started\n")


if __name__ == "__main__":
    # Which is ignored by whatever a shell has started in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    url, name, backend, options, partitions, lease, pause, record = sys.argv[1:]
    anyio.run(
        partial(work, url, name, int(partitions), float(lease), float(pause), record),
        backend=backend,
        backend_options=json.loads(options),
    )
