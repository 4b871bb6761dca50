"""python -m benchmarks [--short] [--rounds N] [--json FILE]: measure, and hold the claims to it."""

from __future__ import annotations

import argparse
import json
import platform
import sqlite3
import subprocess
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from importlib.metadata import version
from itertools import count
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import anyio
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from eventsource_anyio import SQLiteEventStore

from . import work

LOOPS: dict[str, tuple[str, dict[str, object]]] = {
    "asyncio": ("asyncio", {}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}
TASKS = 1000


def on(loop: str, function: Callable[..., Awaitable[work.Measured]], *args: Any) -> work.Measured:
    backend, options = LOOPS[loop]
    return anyio.run(function, *args, backend=backend, backend_options=options)


class Suite:
    """Named pieces of work, each run once a round, so that all of them see the same neighbours."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work: dict[str, Callable[[], work.Measured]] = {}
        self.rates: dict[str, list[float]] = {}
        self._files = count()

    def path(self) -> Path:
        return self.folder / f"{next(self._files)}.db"

    def add(self, name: str, function: Callable[[], work.Measured]) -> None:
        self.work[name] = function

    def run(self, rounds: int, console: Console) -> None:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("", total=rounds * len(self.work))
            for _ in range(rounds):
                for name, function in self.work.items():
                    progress.update(task, description=f"{name:32}")
                    done, seconds = function()
                    self.rates.setdefault(name, []).append(done / seconds)
                    progress.advance(task)

    def rate(self, name: str) -> float:
        return median(self.rates[name])

    def ratio(self, name: str, base: str) -> float:
        """The median of the rounds' ratios: each is of two runs that followed one another."""
        pairs = zip(self.rates[name], self.rates[base], strict=True)
        return median(one / other for one, other in pairs)


def build(folder: Path, scale: float) -> Suite:
    suite = Suite(folder)
    read = folder / "read.db"
    anyio.run(work.fill, read, int(100_000 * scale) // 1000 * 1000)
    appends = max(int(20_000 * scale) // TASKS, 2) * TASKS
    for loop in LOOPS:
        suite.add(
            f"memory, one by one, {loop}",
            partial(on, loop, work.memory_one_by_one, int(50_000 * scale)),
        )
    suite.add("fold, 8 event types", partial(work.fold, int(300_000 * scale)))
    synchronous: work.Synchronous
    for synchronous in ("NORMAL", "FULL"):
        few = appends if synchronous == "NORMAL" else appends // 4  # each waits for the disk

        def bare(mode: work.Synchronous = synchronous, few: int = few) -> work.Measured:
            return work.bare_sqlite(suite.path(), mode, few)

        suite.add(f"bare sqlite3, {synchronous}", bare)
        for explicit, name in ((True, "transaction"), (False, "one INSERT")):

            def peer(
                mode: work.Synchronous = synchronous, few: int = few, explicit: bool = explicit
            ) -> work.Measured:
                path = suite.path()
                return on("asyncio", work.aiosqlite_tasks, path, mode, few, TASKS, explicit)

            suite.add(f"aiosqlite {name}, {synchronous}", peer)
        for loop in LOOPS:

            def ours(loop: str = loop, mode: work.Synchronous = synchronous) -> work.Measured:
                store = SQLiteEventStore(suite.path(), synchronous=mode)
                return on(loop, work.store_tasks, store, appends, TASKS)

            suite.add(f"SQLite, 1,000 tasks, {synchronous}, {loop}", ours)
    for loop in LOOPS:
        suite.add(f"SQLite, stream, {loop}", partial(on, loop, work.stream, read))
    return suite


def claims(suite: Suite) -> list[tuple[str, float, float]]:
    """What is claimed, what was measured, what it has to be at least."""
    rate, ratio = suite.rate, suite.ratio
    found: list[tuple[str, float, float]] = [
        ("memory: appends/s one by one, asyncio", rate("memory, one by one, asyncio"), 100_000),
        ("fold: events/s", rate("fold, 8 event types"), 2_000_000),
    ]
    for loop in LOOPS:
        normal, full = f"SQLite, 1,000 tasks, NORMAL, {loop}", f"SQLite, 1,000 tasks, FULL, {loop}"
        found += [
            (
                f"SQLite NORMAL, {loop} ÷ aiosqlite",
                ratio(normal, "aiosqlite transaction, NORMAL"),
                5,
            ),
            (f"SQLite NORMAL, {loop} ÷ bare driver", ratio(normal, "bare sqlite3, NORMAL"), 0.4),
            (f"SQLite FULL, {loop} ÷ bare driver", ratio(full, "bare sqlite3, FULL"), 5),
            (f"SQLite: streamed events/s, {loop}", rate(f"SQLite, stream, {loop}"), 200_000),
        ]
    for what in (
        "memory, one by one",
        "SQLite, 1,000 tasks, NORMAL",
        "SQLite, 1,000 tasks, FULL",
        "SQLite, stream",
    ):
        found.append((f"Trio ÷ asyncio: {what}", ratio(f"{what}, trio", f"{what}, asyncio"), 0.85))
    return found


def limits(folder: Path, events: int) -> list[tuple[str, float, float]]:
    """What is claimed, what was measured, what it may be at most."""
    large = folder / "large.db"
    anyio.run(work.fill, large, events)
    found = []
    for backend in ("asyncio", "trio"):
        for what, most, unit, args in (
            ("stream", 50, f"MB above the start, {events:,} events streamed", [str(large)]),
            ("appends", 10, "kB for each of 10,000 concurrent appends", []),
        ):
            command = [sys.executable, "-m", "benchmarks.memory", what, backend, *args]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found.append((f"{unit}, {backend}", float(output), float(most)))
    timer = (
        "import time; begun = time.perf_counter(); import eventsource_anyio; "
        "print(time.perf_counter() - begun)"
    )
    runs = [
        float(
            subprocess.run(
                [sys.executable, "-c", timer], check=True, capture_output=True, text=True
            ).stdout
        )
        for _ in range(7)
    ]
    found.append(("ms to import eventsource_anyio", median(runs) * 1000, 100.0))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a first look, in about a minute")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each (default: 5)")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    options = parser.parse_args()
    scale, rounds = (0.2, min(options.rounds, 3)) if options.short else (1.0, options.rounds)
    console = Console()
    with TemporaryDirectory() as name:
        folder = Path(name)
        suite = build(folder, scale)
        suite.run(rounds, console)
        at_least = claims(suite)
        at_most = limits(folder, int(1_000_000 * scale))

    rates = Table("work", "per second", "lowest", "highest", title=f"Median of {rounds} runs")
    for work_name, values in suite.rates.items():
        rates.add_row(
            work_name, *(f"{value:,.0f}" for value in (median(values), min(values), max(values)))
        )
    console.print(rates)
    verdicts = Table("claim", "measured", "bound", "", title="Claims")
    missed = 0
    for bounds, sign in ((at_least, "≥"), (at_most, "≤")):
        for claim, value, bound in bounds:
            held = value >= bound if sign == "≥" else value <= bound
            missed += not held
            shown = f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"
            verdicts.add_row(claim, shown, f"{sign} {bound:,g}", "held" if held else "missed")
    console.print(verdicts)
    if options.json:
        options.json.write_text(
            json.dumps(
                {
                    "python": platform.python_version(),
                    "machine": platform.platform(),
                    "sqlite": sqlite3.sqlite_version,
                    "versions": {
                        p: version(p)
                        for p in ("anyio", "trio", "uvloop", "msgspec", "attrs", "aiosqlite")
                    },
                    "rates": suite.rates,
                    "claims": [{"claim": c, "measured": v, "at least": b} for c, v, b in at_least],
                    "limits": [{"claim": c, "measured": v, "at most": b} for c, v, b in at_most],
                },
                indent=1,
            )
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
