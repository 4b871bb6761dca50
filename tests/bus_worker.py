"""Another process of a subscription: the tests of `test_redis_processes.py` start it.

    python bus_worker.py URL PREFIX BACKEND ITS_OPTIONS_AS_JSON PARTITIONS LEASE PAUSE

It handles events by telling a list in Redis of them, after a pause.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial

import anyio

from eventsource_anyio import StoredEvent
from eventsource_anyio.bus.redis import RedisEventBus
from eventsource_anyio.bus.redis_connection import RedisConnections
from eventsource_anyio.testing.samples import Happened


async def work(url: str, prefix: str, partitions: int, lease: float, pause: float) -> None:
    record = RedisConnections(url)
    record.open()

    async def handle(event: StoredEvent) -> None:
        await anyio.sleep(pause)
        line = f"{os.getpid()} {event.stream_id} {event.version}"
        await record.call(("RPUSH", f"{prefix}:handled", line))

    bus = RedisEventBus(
        url, prefix=prefix, subscription="workers", partitions=partitions, lease=lease
    )
    bus.register(handle, Happened)
    async with bus, anyio.create_task_group() as tasks:
        await tasks.start(bus.run)
        os.write(1, b"started\n")


if __name__ == "__main__":
    url, prefix, backend, options, partitions, lease, pause = sys.argv[1:]
    anyio.run(
        partial(work, url, prefix, int(partitions), float(lease), float(pause)),
        backend=backend,
        backend_options=json.loads(options),
    )
