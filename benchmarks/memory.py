"""Memory, measured in a fresh process: python -m benchmarks.memory stream Trio FILE-OR-DSN"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import anyio
import psutil

from eventsource_anyio import ANY, NO_STREAM, EventStore, SQLiteEventStore

from .events import PLACED
from .suite import Found, on


def in_a_process(what: str, loop: str, where: str, count: int = 0, schema: str = "") -> Found:
    command = [sys.executable, "-m", "benchmarks.memory", what, loop, where, str(count), schema]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: Found = json.loads(ran.stdout)
    return found


def _resident() -> int:
    return psutil.Process().memory_info().rss


async def fill(store: EventStore, events: int) -> None:
    async with store:
        for number in range(events // 1000):
            await store.append_events(f"order-{number % 100}", "Order", [PLACED] * 1000, ANY)


async def stream(store: EventStore) -> Found:
    """MB above the start, at the highest, while every event is read."""
    async with store:
        await anext(store.read_all())
        start = highest = _resident()
        read = 0
        async for _ in store.read_all():
            read += 1
            if read % 5000 == 0:
                highest = max(highest, _resident())
        return {"MB": (highest - start) / 1e6}


async def appends(store: EventStore, count: int) -> Found:
    """kB for each of the appends that are all under way in one task group."""
    run = uuid4()
    async with store:
        before = await store.append_events(f"{run}-first", "Order", [PLACED], NO_STREAM)
        start = highest = _resident()

        async def append(number: int) -> None:
            nonlocal highest
            if number % 100 == 0:
                highest = max(highest, _resident())
            result = await store.append_events(f"{run}-{number}", "Order", [PLACED], NO_STREAM)
            if number % 100 == 0:
                highest = max(highest, _resident())
            assert result.position > before.position

        async with anyio.create_task_group() as tasks:
            for number in range(count):
                tasks.start_soon(append, number)
        highest = max(highest, _resident())
        last = await store.last_position()
        if last - before.position < count:
            raise AssertionError(f"{count - last + before.position} appends are missing")
        return {"kB": (highest - start) / count / 1e3}


def _store(where: str, schema: str) -> EventStore:
    if "://" not in where:
        return SQLiteEventStore(Path(where))
    from .subject import opened

    return opened(where, schema)


if __name__ == "__main__":
    what, loop, where, count, schema = sys.argv[1:]
    store = _store(where, schema)
    found = on(loop, stream, store) if what == "stream" else on(loop, appends, store, int(count))
    print(json.dumps(found))
