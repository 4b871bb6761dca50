"""The floors of the regression gate: ratios to the bare driver below which something has broken.

A floor is about 0.55 of what the ratio usually is, so that a machine with noise in it passes, and
half the speed does not. `typical` is what was measured when the floor was set; where this library
has become faster, or slower for a good reason, `python -m benchmarks.gate --tell` gives new ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs

from .results import Results, times
from .suite import Piece, ours

SHARE = 0.55
_PG, _SQLITE = "PostgreSQL", "SQLite"


@attrs.frozen
class Floor:
    work: str
    store: str
    case: str
    loop: str
    typical: float
    unit: str = "events/s"

    @property
    def piece(self) -> Piece:
        return Piece(self.work, self.store, self.case, ours(self.loop))

    @property
    def least(self) -> float:
        return self.typical * SHARE


FLOORS: Sequence[Floor] = [
    Floor(work, store, case, loop, typical, unit)
    for work, store, case, unit, typicals in (
        ("append", _PG, "1 task, 1 event, own streams", "events/s", (0.71, 0.68)),
        ("append", _PG, "64 tasks, 1 event, own streams", "events/s", (2.5, 2.0)),
        ("append", _PG, "1,000 tasks, 1 event, own streams", "events/s", (4.4, 3.2)),
        ("append", _PG, "1 task, 100 events, own streams", "events/s", (0.74, 0.74)),
        ("read", _PG, "everything", "events/s", (0.9, 0.88)),
        ("load", _PG, "1,000 events", "ms", (0.42, 0.42)),
        ("catch up", _PG, "one statement a batch", "events/s", (0.42, 0.42)),
        ("append", _SQLITE, "1 task, 1 event, own streams", "events/s", (0.38, 0.36)),
        ("append", _SQLITE, "1,000 tasks, 1 event, own streams", "events/s", (7.0, 5.6)),
        ("read", _SQLITE, "everything", "events/s", (0.47, 0.47)),
    )
    for loop, typical in zip(("asyncio", "Trio"), typicals, strict=True)
]


@attrs.frozen
class Verdict:
    floor: Floor
    ratio: float | None
    """None: it could not be measured, which is no better than being too slow."""
    why: str = ""

    @property
    def held(self) -> bool:
        return self.ratio is not None and self.ratio >= self.floor.least

    def __str__(self) -> str:
        floor = self.floor
        limit = f"times the bare driver, floor {floor.least:.2f} (usually {floor.typical:g})"
        if self.ratio is None:
            return f"{floor.piece}: not measured: {self.why or 'no figure'}"
        return f"{floor.piece}: {self.ratio:.2f} {limit}"


def judge(results: Results, floors: Iterable[Floor]) -> list[Verdict]:
    return [_judge(results, floor) for floor in floors]


def _judge(results: Results, floor: Floor) -> Verdict:
    piece = floor.piece
    figure = results.find(piece.work, piece.store, piece.case, piece.subject, floor.unit)
    limit = results.limit(figure) if figure else None
    if figure is None or limit is None:
        failed = [f"{one}: {why}" for one, why in results.failed.items() if _beside(one, piece)]
        return Verdict(floor, None, "; ".join(failed))
    found = times(figure, limit)
    return Verdict(floor, found, "" if found is not None else "one of its runs did nothing")


def wanted(floors: Iterable[Floor], piece: Piece) -> bool:
    """Whether the piece is a floor's, or the bare driver beside it."""
    return any(_beside(piece, floor.piece) for floor in floors) and (
        piece.subject.startswith("bare ") or any(piece == floor.piece for floor in floors)
    )


def _beside(one: Piece, other: Piece) -> bool:
    return (one.work, one.store, one.case) == (other.work, other.store, other.case)


def message(verdicts: Sequence[Verdict], load: float, cores: int) -> str:
    """What to do about those that did not hold, twice; `load` is that before it was measured."""
    broken = "\n".join(f"  {verdict}" for verdict in verdicts if not verdict.held)
    busy = (
        f"  The machine had other work to do (load {load:.1f} on {cores} cores): first of all\n"
        "  measure again when it is quiet, by `nox -s speed`.\n"
    )
    return (
        f"Slower than it may be, measured twice:\n{broken}\n{busy if load > cores / 2 else ''}"
        "  Find the change that did it: `python -m benchmarks.gate` on the commits before, with\n"
        "  `python -m cProfile` on the work that it names. If the price is meant to be paid, run\n"
        "  `python -m benchmarks.gate --tell`, change `typical` in benchmarks/floors.py, and say\n"
        "  why in the commit."
    )
