"""Another process that runs a relay: the tests of `test_relay_processes.py` start it.

    python relay_worker.py MODE DATABASE BACKEND ITS_OPTIONS_AS_JSON LEASE NTH

`MODE` is `outbox` or `events`. It says each thing that it delivers on a line, and nobody else says
it: what was said was delivered. With the nth delivery it is killed, after that was said and before
it was stored; `NTH` 0: never. If it is -1, the first delivery takes until a line comes in.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # to be the package `tests`

import anyio

from eventsource_anyio import EventStore, StoredEvent
from eventsource_anyio.projections import ProjectionCoordinator
from eventsource_anyio.relay import EventRelay, OutboxRelay
from eventsource_anyio.repositories.outbox import StoredMessage
from tests.projection_worker import KILLED, open_store, say


class Saying(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(f"log {record.getMessage()}")


class Deliveries:
    def __init__(self, nth: int) -> None:
        self.nth = nth
        self.calls = 0

    async def __call__(self, things: Sequence[StoredMessage] | Sequence[StoredEvent]) -> None:
        self.calls += 1
        for one in things:
            if isinstance(one, StoredMessage):
                message = one.message
                say(f"got {message.message_id} {message.key} {message.payload.decode()}")
            else:
                say(f"got {one.event_id} {one.stream_id} {one.version}")
        if self.calls == self.nth:
            os._exit(KILLED)
        if self.nth == -1 and self.calls == 1:
            await anyio.to_thread.run_sync(sys.stdin.readline)


async def relay(mode: str, database: str, lease: str, nth: str) -> None:
    logger = logging.getLogger("eventsource_anyio.relay")
    logger.addHandler(Saying())
    logger.setLevel(logging.INFO)
    deliver = Deliveries(int(nth))
    async with open_store(database) as store, anyio.create_task_group() as tasks:
        await tasks.start(_runner(mode, store, deliver, float(lease)).run)
        say("started")


def _runner(
    mode: str, store: EventStore, deliver: Deliveries, lease: float
) -> OutboxRelay | ProjectionCoordinator:
    if mode == "outbox":
        return OutboxRelay(store, deliver, lease=lease, poll_every=0.02, batch_size=5)
    relay = EventRelay(deliver, name="relay", batch_size=5)
    return ProjectionCoordinator(store, [relay], lease=lease)


if __name__ == "__main__":
    mode, database, backend, options, *arguments = sys.argv[1:]
    run = partial(anyio.run, backend=backend, backend_options=json.loads(options))
    run(partial(relay, mode, database, *arguments))
