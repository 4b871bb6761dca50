"""python -m benchmarks.gate: no ratio to the bare driver may fall below its floor.

It measures what the floors are about, as a short run does, on asyncio and Trio, and what fell below
its floor once more: two runs in a row are seldom bad luck. The exit code is 1 if one fell twice.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import attrs
import psutil
from rich.console import Console
from rich.table import Table

from .__main__ import everything
from .floors import FLOORS, SHARE, Verdict, judge, message, wanted
from .plan import SHORT
from .results import Results
from .suite import Suite

_CASES = tuple(case for case in SHORT.appends if case[1:] == (1, False))
PLAN = attrs.evolve(
    SHORT, rounds=5, appends=_CASES, followed=(), latencies=(), seconds=0.35, embedded=0.15
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate", description=__doc__)
    parser.add_argument("--tell", action="store_true", help="what the floors would be set to now")
    options = parser.parse_args()
    console = Console() if sys.stdout.isatty() else Console(width=150)
    load, cores = psutil.getloadavg()[0], psutil.cpu_count() or 1
    suite = Suite()
    with everything(suite, PLAN, ("SQLite", "PostgreSQL"), console):
        suite.keep(partial(wanted, FLOORS))
        suite.run(PLAN.rounds, console)
        verdicts = judge(Results.of(suite, {}), FLOORS)
        _show(console, verdicts, options.tell)
        if options.tell:
            return 0
        broken = [verdict.floor for verdict in verdicts if not verdict.held]
        if broken:
            console.print(f"{len(broken)} below its floor: measuring again …")
            suite.keep(partial(wanted, broken))
            suite.run(PLAN.rounds, console)
            verdicts = judge(Results.of(suite, {}), broken)
            _show(console, verdicts, tell=False)
    if all(verdict.held for verdict in verdicts):
        return 0
    print(message(verdicts, load, cores), file=sys.stderr)
    return 1


def _show(console: Console, verdicts: list[Verdict], tell: bool) -> None:
    table = Table("work", "÷ bare", "floor", "usually", "floor now" if tell else "")
    for verdict in verdicts:
        ratio = verdict.ratio
        shown = "not measured" if ratio is None else f"{ratio:.2f}"
        last = "held" if verdict.held else "BELOW"
        if tell:
            last = "" if ratio is None else f"{ratio * SHARE:.2f}"
        floor = verdict.floor
        table.add_row(str(floor.piece), shown, f"{floor.least:.2f}", f"{floor.typical:g}", last)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
