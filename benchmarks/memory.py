"""Memory, measured in a fresh process: python -m benchmarks.memory stream trio FILE-OR-DSN"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import anyio
import psutil

from eventsource_anyio import NO_STREAM, EventStore, SQLiteEventStore

from .events import PLACED
from .suite import on

COUNT = 10_000


def in_a_process(what: str, loop: str, where: str, schema: str = "") -> float:
    command = [sys.executable, "-m", "benchmarks.memory", what, loop, where, schema]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(ran.stdout)


def _resident() -> int:
    return psutil.Process().memory_info().rss


async def stream(store: EventStore) -> float:
    """MB above the start, at the highest, while every event is read."""
    async with store:
        await anext(store.read_all())
        start = highest = _resident()
        read = 0
        async for _ in store.read_all():
            read += 1
            if read % 5000 == 0:
                highest = max(highest, _resident())
        return (highest - start) / 1e6


async def appends(store: EventStore) -> float:
    """kB for each of 10,000 appends that are all under way in one task group."""
    run = uuid4()
    async with store:
        before = await store.append_events(f"{run}-first", "Order", [PLACED], NO_STREAM)
        start = highest = _resident()

        async def append(number: int) -> None:
            nonlocal highest
            if number % 500 == 0:
                highest = max(highest, _resident())
            result = await store.append_events(f"{run}-{number}", "Order", [PLACED], NO_STREAM)
            if number % 500 == 0:
                highest = max(highest, _resident())
            assert result.position > before.position

        async with anyio.create_task_group() as tasks:
            for number in range(COUNT):
                tasks.start_soon(append, number)
        highest = max(highest, _resident())
        stored = 0
        async for _ in store.read_all():
            stored += 1
        if stored < COUNT + 1:
            raise AssertionError(f"{COUNT + 1 - stored} appends are missing")
        return (highest - start) / COUNT / 1e3


def _store(where: str, schema: str) -> EventStore:
    if "://" not in where:
        return SQLiteEventStore(Path(where))
    from .postgresql_work import opened

    return opened(where, schema)


if __name__ == "__main__":
    what, loop, where, schema = sys.argv[1:]
    print(on(loop, stream if what == "stream" else appends, _store(where, schema)))
