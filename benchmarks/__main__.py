"""python -m benchmarks: measure, and hold the claims to it; the exit code is 1 if one is missed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import psutil
from rich.console import Console

from . import in_memory, postgresql, sqlite
from .report import print_claims, print_suite, write_json
from .suite import Claim, Suite

PARTS = ("memory", "sqlite", "postgresql")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--only", choices=PARTS, action="append", help="leave out the others")
    add("--short", action="store_true", help="a first look, in about two minutes")
    add("--rounds", type=int, default=5, help="runs of each (default: 5)")
    add("--large", action="store_true", help="also PostgreSQL with 5 M events; takes minutes")
    add("--peers", action="store_true", help="also the other libraries, which pip installs")
    add("--peers-python", type=Path, help="their interpreter (default: the newest that is found)")
    add("--data", type=Path, help="where PostgreSQL has its data: a directory on a disk")
    add("--json", type=Path, help="write every figure to this file")
    return parser.parse_args()


def main() -> int:
    options = _arguments()
    parts = options.only or PARTS
    scale, rounds = (0.2, min(options.rounds, 3)) if options.short else (1.0, options.rounds)
    console = Console()
    load = psutil.getloadavg()[0]
    if load > 0.5:
        console.print(f"This machine has other work to do (load {load:.1f}): believe no figure.")
    suites: list[Suite] = []
    claims: list[Claim] = []
    about: dict[str, object] = {"load before": load}
    for part in (in_memory, sqlite):
        if part.PART in parts:
            suite, its_claims = part.measure(scale, rounds, console)
            suites.append(suite)
            claims += its_claims
    if "postgresql" in parts:
        how = postgresql.Plan(
            short=options.short,
            rounds=rounds,
            data=options.data,
            large=options.large,
            peers=options.peers,
            peers_python=options.peers_python,
        )
        its_suites, its_claims, found = postgresql.measure(how, console)
        about |= found
        suites += its_suites
        claims += its_claims
    for suite in suites:
        print_suite(console, suite, rounds)
    print_claims(console, claims)
    if options.json:
        write_json(options.json, suites, claims, about)
    return 1 if any(claim.verdict == "missed" for claim in claims) else 0


if __name__ == "__main__":
    sys.exit(main())
