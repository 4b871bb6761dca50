"""Memory, measured in a fresh process each: python -m benchmarks.memory stream trio FILE"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio
import psutil

from eventsource_anyio import NO_STREAM, SQLiteEventStore

from .events import PLACED


def _resident() -> int:
    return psutil.Process().memory_info().rss


async def stream(path: Path) -> float:
    """MB above the start, at the highest, while every event of the file is read."""
    async with SQLiteEventStore(path) as store:
        await anext(store.read_all())
        start = highest = _resident()
        count = 0
        async for _ in store.read_all():
            count += 1
            if count % 5000 == 0:
                highest = max(highest, _resident())
        return (highest - start) / 1e6


async def appends(path: Path) -> float:
    """kB for each of 10,000 appends that are all under way in one task group."""
    count = 10_000
    async with SQLiteEventStore(path / "events.db") as store:
        await store.append_events("first", "Order", [PLACED], NO_STREAM)
        start = highest = _resident()

        async def append(number: int) -> None:
            nonlocal highest
            if number % 500 == 0:
                highest = max(highest, _resident())
            await store.append_events(f"order-{number}", "Order", [PLACED], NO_STREAM)

        async with anyio.create_task_group() as tasks:
            for number in range(count):
                tasks.start_soon(append, number)
        highest = max(highest, _resident())
        if await store.last_position() != count + 1:
            raise AssertionError("an append is missing")
        return (highest - start) / count / 1e3


if __name__ == "__main__":
    what, backend, *path = sys.argv[1:]
    if what == "stream":
        print(anyio.run(stream, Path(path[0]), backend=backend))
    else:
        with TemporaryDirectory() as folder:
            print(anyio.run(appends, Path(folder), backend=backend))
