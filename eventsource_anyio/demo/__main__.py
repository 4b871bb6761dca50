"""`python -m eventsource_anyio.demo` imports a log of fines, and answers questions about them."""

import sys
from argparse import ArgumentParser
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import anyio

from .. import AggregateRepository, SQLiteEventStore, StorageError
from .fines import Fine, State
from .log import InputError, Refused, Row, made_up, read
from .work import Course, courses, import_cases

try:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
except ModuleNotFoundError:
    sys.exit("The demo shows its results with rich: pip install 'eventsource-anyio[demo]'")


def main() -> None:
    parser = ArgumentParser("python -m eventsource_anyio.demo", description=__doc__)
    parser.add_argument("csv", nargs="?", type=Path, help="the log; without one, it is made up")
    parser.add_argument("--cases", type=int, default=1000, metavar="N", help="how many to make up")
    parser.add_argument("--loop", choices=("asyncio", "uvloop", "trio"), default="asyncio")
    parser.add_argument("--store", metavar="FILE", help="an SQLite file to keep the events in")
    asked = parser.parse_args()
    if find_spec(asked.loop) is None:
        parser.error(f"{asked.loop} is not installed: pip install {asked.loop}")
    backend = "trio" if asked.loop == "trio" else "asyncio"
    options = {"use_uvloop": True} if asked.loop == "uvloop" else {}
    refused: Refused = []
    try:
        text = asked.csv and StringIO(asked.csv.read_text("utf-8-sig", "backslashreplace"))
        cases = read(text or made_up(asked.cases), refused)
        with TemporaryDirectory() as directory:
            path = asked.store or f"{directory}/fines.db"
            anyio.run(run, path, cases, refused, backend=backend, backend_options=options)
    except BrokenPipeError:
        sys.exit(1)
    except (OSError, InputError, StorageError) as error:
        parser.error(str(error))


async def run(path: str, cases: dict[str, list[Row]], refused: Refused) -> None:
    bar = track(cases.items(), "Importing", disable=not sys.stdout.isatty())
    async with SQLiteEventStore(path) as store:
        began = perf_counter()
        new, known = await import_cases(store, bar, refused)
        print(f"{new} events stored in {perf_counter() - began:.2f} s, {known} were there already.")
        print(f"Rows refused: {len(refused)}.")
        for line, reason in sorted(refused)[:10]:
            print(f"Line {line} refused: {reason}", file=sys.stderr)
        if not (found := await courses(store)):
            raise InputError("there is no row that can be used")
        longest, course = max(found.items(), key=lambda item: item[1].days)
        half = course.created + (course.last - course.created) / 2
        fine = await AggregateRepository(store, Fine).load(longest, at=half)
        print(f"{longest} took longest. Half way, on {half:%Y-%m-%d}, {fine.owed:.2f} was owed.")
    show(found)


def show(found: dict[str, Course]) -> None:
    unpaid = [one.owed for one in found.values() if one.owed]
    print(f"{len(unpaid)} of {len(found)} fines are unpaid, and {sum(unpaid):.2f} is owed in all.")
    groups: dict[str, list[Course]] = {state: [] for state in State} | {"all ended": []}
    for course in found.values():
        groups[course.state].append(course)
        if course.state is not State.OPEN:
            groups["all ended"].append(course)
    table = Table("Fines", box=SIMPLE, caption="Days: from its creation to its last event")
    for name in ("Number", "Owed", "Days, median", "Days, longest"):
        table.add_column(name, justify="right")
    for name, some in groups.items():
        if days := [one.days for one in some]:
            owed = sum(one.owed for one in some)
            table.add_row(name, f"{len(some)}", f"{owed:.2f}", f"{median(days):g}", f"{max(days)}")
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
