"""What is claimed of this library, each claim with its bound; held to what was measured.

What was not measured, as in a short run, is not held to anything. A claim of a ratio is one of the
median of the rounds' ratios.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import nan
from typing import Literal, TypeAlias

import attrs

from .results import PEERS, Figure, Results, ratio
from .suite import LOOPS, NAME, ours

Sign: TypeAlias = Literal["≥", "≤"]
_OWN = "own streams"
_ALONE, _THOUSAND = f"1 task, 1 event, {_OWN}", f"1,000 tasks, 1 event, {_OWN}"
_AIOSQLITE = "aiosqlite, BEGIN … COMMIT"
_PG, _SQLITE, _NORMAL = "PostgreSQL", "SQLite", "SQLite, NORMAL"


@attrs.frozen
class Claim:
    what: str
    measured: float
    sign: Sign
    bound: float

    @property
    def held(self) -> bool:
        return self.measured >= self.bound if self.sign == "≥" else self.measured <= self.bound


def claims(results: Results) -> list[Claim]:
    found: list[Claim] = []
    for part in (_embedded, _appends, _reads, _loops, _subscribers, _projections, _buses, _costs):
        found += part(results)
    return found


def _value(
    results: Results, key: tuple[str, str, str, str, str], sign: Sign, bound: float
) -> Iterator[Claim]:
    if figure := results.find(*key):
        yield Claim(f"{figure.piece}: {figure.unit}", figure.value, sign, bound)


def _ratio(
    results: Results, key: tuple[str, str, str, str, str], base: str, sign: Sign, bound: float
) -> Iterator[Claim]:
    """Beside another subject."""
    work, store, case, _, unit = key
    one, other = results.find(*key), results.find(work, store, case, base, unit)
    yield from _divided(one, other, base, sign, bound)


def _divided(
    one: Figure | None, other: Figure | None, base: str, sign: Sign, bound: float
) -> Iterator[Claim]:
    if one and other and len(one.runs) == len(other.runs):
        found = nan if 0 in other.runs else ratio(one, other)  # which holds to nothing
        yield Claim(f"{one.piece}: ÷ {base}", found, sign, bound)


def _embedded(results: Results) -> Iterator[Claim]:
    key = ("append", "memory", _ALONE, ours("asyncio"), "events/s")
    yield from _value(results, key, "≥", 100_000)
    fold = ("fold", "memory", "8 event types", NAME, "events/s")
    yield from _value(results, fold, "≥", 2_000_000)
    for loop in LOOPS:
        normal = ("append", _NORMAL, _THOUSAND, ours(loop), "events/s")
        yield from _ratio(results, normal, _AIOSQLITE, "≥", 5)
        yield from _ratio(results, normal, "bare sqlite3", "≥", 0.4)
        full = ("append", _SQLITE, _THOUSAND, ours(loop), "events/s")
        yield from _ratio(results, full, "bare sqlite3", "≥", 5)
        read = ("read", _SQLITE, "everything", ours(loop), "events/s")
        yield from _value(results, read, "≥", 200_000)


def _appends(results: Results) -> Iterator[Claim]:
    """Beside bare asyncpg, and beside the faster peer of each round, on asyncio."""
    for case, bound in (
        (_ALONE, 0.9),
        (f"64 tasks, 1 event, {_OWN}", 3.0),
        (_THOUSAND, 6.0),
        (f"1 task, 100 events, {_OWN}", 0.8),
    ):
        key = ("append", _PG, case, ours("asyncio"), "events/s")
        yield from _ratio(results, key, "bare asyncpg, asyncio", "≥", bound)
    one = results.find("append", _PG, f"64 tasks, 1 event, {_OWN}", ours("asyncio"), "events/s")
    theirs = [found for name in PEERS if one and (found := results.peer(one, name))]
    if one and theirs:
        fastest = [max(runs) for runs in zip(*(found.runs for found in theirs), strict=True)]
        best = Figure(theirs[0].piece, one.unit, fastest)
        yield from _divided(one, best, "the faster peer", "≥", 20)


def _reads(results: Results) -> Iterator[Claim]:
    for loop in LOOPS:
        load = ("load", _PG, "1,000 events", ours(loop), "ms")
        yield from _value(results, load, "≤", 4)
        read = ("read", _PG, "everything", ours(loop), "events/s")
        yield from _value(results, read, "≥", 300_000)


def _loops(results: Results) -> Iterator[Claim]:
    """Trio beside asyncio."""
    for work, store, case, bound in (
        ("append", "memory", _ALONE, 0.85),
        ("append", _NORMAL, _THOUSAND, 0.85),
        ("append", _SQLITE, _THOUSAND, 0.85),
        ("read", _SQLITE, "everything", 0.85),
        ("append", _PG, _ALONE, 0.85),
        ("append", _PG, f"64 tasks, 1 event, {_OWN}", 0.95),
        ("append", _PG, _THOUSAND, 0.95),
        ("append", _PG, f"1 task, 100 events, {_OWN}", 0.95),
        ("read", _PG, "everything", 0.95),
        ("catch up", _PG, "no work", 0.85),
        ("catch up", _PG, "one statement a batch", 0.85),
    ):
        key = (work, store, case, ours("Trio"), "events/s")
        yield from _ratio(results, key, ours("asyncio"), "≥", bound)
    load = ("load", _PG, "1,000 events", ours("Trio"), "ms")
    yield from _ratio(results, load, ours("asyncio"), "≤", 1 / 0.95)


def _subscribers(results: Results) -> Iterator[Claim]:
    for figure in results.figures:
        piece = figure.piece
        if not piece.subject.startswith(NAME):
            continue
        if figure.unit == "missed":
            yield Claim(f"{piece}: committed events missed", figure.value, "≤", 0)
        elif piece.work == "append to subscriber" and figure.unit in ("p50 ms", "p99 ms"):
            one = piece.case.startswith("1 writer")
            if one or figure.unit == "p99 ms":
                bound = 50.0 if not one else 2.0 if figure.unit == "p50 ms" else 5.0
                yield Claim(f"{piece}: {figure.unit}", figure.value, "≤", bound)


def _projections(results: Results) -> Iterator[Claim]:
    for loop in LOOPS:
        for case, rate in (("no work", 100_000), ("one statement a batch", 20_000)):
            key = ("catch up", _PG, case, ours(loop), "events/s")
            yield from _value(results, key, "≥", rate)
        for unit, most in (("p50 ms", 5), ("p99 ms", 15)):
            key = ("append to read model", _PG, "1 writer", ours(loop), unit)
            yield from _value(results, key, "≤", most)
        for place in ("two processes", "one process"):
            where = ("append, with a projection", _PG, f"50 writers, {place}", ours(loop))
            beside = results.find(*where, "appends/s")
            alone = results.find(*where, "alone, appends/s")
            yield from _divided(beside, alone, "without it", "≥", 0.8)


def _buses(results: Results) -> Iterator[Claim]:
    for loop in LOOPS:
        fan_out = ("fan-out", "memory", "10 subscribers", ours(loop), "deliveries/s")
        yield from _value(results, fan_out, "≥", 1_000_000)
        alone = ("publish to handler", "memory", "alone", ours(loop), "p50 ms")
        yield from _value(results, alone, "≤", 0.05)
        relay = ("relay", "Redis", "to another process", ours(loop), "events/s")
        yield from _value(results, relay, "≥", 20_000)
        elsewhere = ("publish to handler", "Redis", "another process", ours(loop), "p50 ms")
        yield from _value(results, elsewhere, "≤", 10)
    for work, store, case, unit, bound in (
        ("fan-out", "memory", "10 subscribers", "deliveries/s", 0.85),
        ("relay", "Redis", "to another process", "events/s", 0.85),
        ("relay", "NATS", "to another process", "events/s", 0.70),
    ):
        key = (work, store, case, ours("Trio"), unit)
        yield from _ratio(results, key, ours("asyncio"), "≥", bound)


def _costs(results: Results) -> Iterator[Claim]:
    alone = ("import", _PG, "the package alone", NAME, "ms")
    yield from _value(results, alone, "≤", 100)
    for figure in results.figures:
        piece = figure.piece
        if not piece.subject.startswith(NAME):
            continue
        if piece.work == "memory of an append" and piece.case.startswith("10,000"):
            yield Claim(f"{piece}: {figure.unit} each", figure.value, "≤", 10)
        elif piece.work == "memory of a long stream":
            yield Claim(f"{piece}: {figure.unit} above the start", figure.value, "≤", 50)
        elif piece.work == "append at 5 M events" and piece.case.endswith("1,000 streams"):
            key = (piece.work, piece.store, piece.case, piece.subject, figure.unit)
            if other := results.find("append at 0 events", *key[1:]):
                cost = ratio(other, figure)
                yield Claim(f"{piece}: cost ÷ that at 0", cost, "≤", 1.2)
