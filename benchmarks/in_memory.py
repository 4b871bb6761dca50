"""The store in memory, and what needs no store: folding events, and the import of the package."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from functools import partial
from statistics import median
from time import perf_counter
from uuid import uuid4

from rich.console import Console

from eventsource_anyio import ANY, InMemoryEventStore, StoredEvent

from .events import PLACED, STEPS, Counter
from .suite import LOOPS, Claim, Measured, Suite, on

PART = "memory"


async def one_by_one(appends: int) -> Measured:
    async with InMemoryEventStore() as store:
        begun = perf_counter()
        for number in range(appends):
            await store.append_events(f"order-{number % 100}", "Order", [PLACED], ANY)
        return appends, perf_counter() - begun


def fold(events: int) -> Measured:
    """Rebuild an aggregate with eight event types."""
    now = datetime.now(UTC)
    stored = [
        StoredEvent(STEPS[n % 8](n), uuid4(), "", "a", "Counter", n + 1, n + 1, now, now, {}, 1)
        for n in range(events)
    ]
    counter = Counter("a")
    begun = perf_counter()
    counter.replay(stored)
    seconds = perf_counter() - begun
    if counter.total != sum(range(events)):
        raise AssertionError("the fold is wrong")
    return events, seconds


def import_time() -> float:
    """Milliseconds, in a process of its own; the median of seven."""
    timer = (
        "import time; begun = time.perf_counter(); import eventsource_anyio; "
        "print(time.perf_counter() - begun)"
    )
    command = [sys.executable, "-c", timer]
    runs = [
        float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(7)
    ]
    return median(runs) * 1000


def measure(scale: float, rounds: int, console: Console) -> tuple[Suite, list[Claim]]:
    suite = Suite("In memory")
    for loop in LOOPS:
        suite.add(f"memory, one by one, {loop}", partial(on, loop, one_by_one, int(50_000 * scale)))
    suite.add("fold, 8 event types", partial(fold, int(300_000 * scale)))
    suite.run(rounds, console)
    alone = "memory, one by one"
    return suite, [
        Claim(
            "memory: appends/s one by one, asyncio", suite.median(f"{alone}, asyncio"), "≥", 100_000
        ),
        Claim(
            "Trio ÷ asyncio: memory, one by one",
            suite.ratio(f"{alone}, trio", f"{alone}, asyncio"),
            "≥",
            0.85,
        ),
        Claim("fold: events/s", suite.median("fold, 8 event types"), "≥", 2_000_000),
        Claim("ms to import eventsource_anyio", import_time(), "≤", 100),
    ]
