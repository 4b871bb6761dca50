"""What is claimed of our store on PostgreSQL; the names are those of the pieces in the suite.

Beside bare asyncpg, what is claimed is claimed on asyncio, and the others are told; each stands
beside the bare one on its own loop, and Trio beside that on asyncio.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from . import memory
from .latency import FIFTY, Load
from .postgresql_work import OTHERS, OURS
from .server import sql
from .suite import Claim, Suite

Followed: TypeAlias = tuple[Load, str, str]

ASYNCIO, TRIO = OURS["asyncio"], OURS["trio"]
SUBJECTS = (*OURS.values(), *OTHERS)
BARE = {
    "1 task": ("INSERT", 0.9),
    "64 tasks": ("queue of 20, INSERT", 3.0),
    "1,000 tasks": ("queue of 20, INSERT", 6.0),
    "batches of 100": ("unnest, rows made in the loop", 0.8),
}
TRIO_AT_LEAST = {
    "1 task": 0.85,
    "64 tasks": 0.95,
    "1,000 tasks": 0.95,
    "batches of 100": 0.95,
    "load 1,000 events": 0.95,
    "read everything": 0.95,
}


def claims(suite: Suite, followed: Sequence[Followed], dsn: str) -> list[Claim]:
    return [
        *_appends(suite),
        *_checked(suite),
        *_reads(suite),
        *_trio(suite),
        *_projections(suite),
        *_latencies(suite, followed),
        *_memory(dsn),
    ]


def _appends(suite: Suite) -> list[Claim]:
    return [
        Claim(
            f"{what}, {subject} ÷ {base}",
            suite.ratio(f"{what}: ours, {subject}", f"{what}: {base}, {loop}"),
            "≥",
            bound if subject is ASYNCIO else None,
        )
        for what, (base, bound) in BARE.items()
        for subject in SUBJECTS
        for loop in ("uvloop" if subject.loop == "uvloop" else "asyncio",)
    ]


def _checked(suite: Suite) -> list[Claim]:
    """Told: beside what checks the version too, which an INSERT does not."""
    return [
        Claim(
            f"{what}, asyncio ÷ {base}",
            suite.ratio(f"{what}: ours, asyncio", f"{what}: {base}, asyncio"),
        )
        for what, (insert, _) in BARE.items()
        if insert.endswith("INSERT")
        for way in ("append_event", "checked transaction")
        for base in (insert.replace("INSERT", way),)
    ]


def _reads(suite: Suite) -> list[Claim]:
    found: list[Claim] = []
    for subject in SUBJECTS:
        ours = subject not in OTHERS
        loads = suite.median(f"load 1,000 events: ours, {subject}")
        what = f"ms to load an aggregate of 1,000 events, {subject}"
        found.append(Claim(what, 1000 / loads, "≤", 4 if ours else None))
        read = suite.median(f"read everything: ours, {subject}")
        what = f"read everything: typed events/s, {subject}"
        found.append(Claim(what, read, "≥", 300_000 if ours else None))
    return found


def _trio(suite: Suite) -> list[Claim]:
    return [
        Claim(
            f"Trio ÷ asyncio: {what}",
            suite.ratio(f"{what}: ours, {TRIO}", f"{what}: ours, {ASYNCIO}"),
            "≥",
            bound,
        )
        for what, bound in TRIO_AT_LEAST.items()
    ]


def _projections(suite: Suite) -> list[Claim]:
    found: list[Claim] = []
    for what, bound in (("no handler's work", 100_000.0), ("SQL read model", 20_000.0)):
        for loop in OURS:
            events = suite.median(f"projection, {what}: ours, {loop}, events/s")
            found.append(Claim(f"projection, {what}: events/s, {loop}", events, "≥", bound))
        ratio = suite.ratio(
            f"projection, {what}: ours, trio, events/s",
            f"projection, {what}: ours, asyncio, events/s",
        )
        found.append(Claim(f"Trio ÷ asyncio: projection, {what}", ratio, "≥", 0.85))
    base = "projection, SQL read model: by hand, asyncio"
    ratio = suite.ratio("projection, SQL read model: ours, asyncio, events/s", base)
    found.append(Claim("projection, SQL read model: ÷ by hand with asyncpg, asyncio", ratio))
    for loop in OURS:
        for figure, bound in (("p50, ms", 5.0), ("p99, ms", 15.0)):
            name = f"append to read model: {loop}, {figure}"
            found.append(Claim(name, suite.median(name), "≤", bound))
        name = f"50 writers and a projection: {loop}, ratio to that"
        what = f"50 writers beside a projection ÷ alone, {loop}"
        found.append(Claim(what, suite.median(name), "≥", 0.8))
    return found


def _latencies(suite: Suite, followed: Sequence[Followed]) -> list[Claim]:
    found: list[Claim] = []
    for load, place, who in followed:
        name = f"latency, {load}: {place}, {who}"
        bounds = {"p99, ms": 50.0} if load == FIFTY else {"p50, ms": 2.0, "p99, ms": 5.0}
        for figure, bound in bounds.items():
            value = suite.median(f"{name}, {figure}")
            found.append(Claim(f"{name}, {figure}", value, "≤", bound))
        missed = sum(suite.runs(f"{name}, events missed"))
        found.append(Claim(f"{name}, events missed", missed, "≤", 0))
    return found


def _memory(dsn: str) -> list[Claim]:
    found: list[Claim] = []
    for loop in ("asyncio", "trio"):
        sql(dsn, "TRUNCATE eventsource.events")
        what = f"PostgreSQL: kB for each of 10,000 concurrent appends, {loop}"
        found.append(Claim(what, memory.in_a_process("appends", loop, dsn), "≤", 10))
    return found
