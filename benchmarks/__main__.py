"""python -m benchmarks: measure, and hold the claims to it.

The exit code is 1 if something of ours fails or, in a full run, if a claim does not hold.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import attrs
from rich.console import Console

from . import brokers, bus, footprint, in_memory, large, machine, peers, postgresql, sqlite
from .claims import claims
from .plan import FULL, SHORT, STORES, Plan
from .report import print_claims, print_results
from .results import Results
from .suite import NAME, Piece, Suite


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--short", action="store_true", help="a first look, in less than three minutes")
    add("--only", choices=STORES, action="append", help="leave out the other stores")
    add("--work", action="append", help="leave out what else is done; as it is called in results")
    add("--rounds", type=int, help="runs of each (default: 5; 3 for a first look)")
    add("--no-peers", action="store_true", help="leave out the other libraries")
    add("--peers-python", type=Path, help="their interpreter (default: the newest that is found)")
    add("--large", action="store_true", help="also PostgreSQL with 5 M events; takes minutes")
    add("--data", type=Path, help="where PostgreSQL has its data: a directory on a disk")
    add("--spent", action="store_true", help="also tell how long each kind of work took")
    add("--json", type=Path, help="write every run's figure to this file")
    return parser.parse_args(arguments)


@contextmanager
def everything(
    suite: Suite, plan: Plan, stores: Sequence[str], console: Console
) -> Iterator[dict[str, object]]:
    """All pieces of work, and what there has to be for them; what is known of it."""
    about: dict[str, object] = {"rounds": plan.rounds}
    with ExitStack() as stack:
        stack.enter_context(peers.running(plan.peers))
        about["peers"] = {
            peer.name: f"{peer.version}, Python {peer.python_version}" for peer in plan.peers
        }
        if "memory" in stores:
            in_memory.add(suite, plan)
            bus.add(suite, plan)
        if "brokers" in stores:
            stack.enter_context(brokers.adding(suite, plan, console))
        if "SQLite" in stores:
            stack.enter_context(sqlite.adding(suite, plan, console))
        if "PostgreSQL" in stores:
            running, dsn = stack.enter_context(postgresql.adding(suite, plan, console))
            about["postgresql"] = running.about
            footprint.add(suite)
            peers.add_footprint(suite, plan.peers)
            if plan.large:
                large.add(suite, plan, dsn, console)
        yield about


def main(arguments: Sequence[str] | None = None) -> int:
    options = _arguments(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=150)
    about = machine.about() | {"mode": "short" if options.short else "full"}
    if machine.busy(about):
        load = about["load before"]
        console.print(f"This machine has other work to do (load {load}): believe no figure.")
    found = [] if options.no_peers else peers.environments(options.peers_python, console)
    plan = SHORT if options.short else FULL
    plan = attrs.evolve(
        plan,
        rounds=options.rounds or plan.rounds,
        large=options.large,
        data=options.data,
        peers=found,
    )
    suite = Suite()
    with everything(suite, plan, options.only or STORES, console) as known:
        if options.work:
            suite.keep(lambda piece: piece.work in options.work)
        suite.run(plan.rounds, console)
    results = Results.of(suite, about | known)
    if options.json:
        results.save(options.json)
    judged = claims(results)
    print_results(console, results)
    print_claims(console, judged)
    if options.spent:
        for (work, store), seconds in sorted(suite.spent.items(), key=lambda item: -item[1]):
            console.print(f"{seconds:7.1f} s  {work}, {store}")
    held = options.short or all(claim.held for claim in judged)
    return 0 if held and not any(map(_ours, results.failed)) else 1


def _ours(piece: Piece) -> bool:
    return piece.subject.startswith(NAME)


if __name__ == "__main__":
    sys.exit(main())
