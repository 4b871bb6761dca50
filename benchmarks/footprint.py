"""What a library costs before it does anything: the time of its import, the size on the disk.

The size is that of the files that pip has put there, without what Python compiles from them: of the
library with its extra for PostgreSQL, and of everything that it requires.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

import eventsource_anyio

from .suite import NAME, Found, Piece, Suite

IMPORT = "import eventsource_anyio"
IMPORT_POSTGRESQL = "from eventsource_anyio import AggregateRepository, PostgreSQLEventStore"
_NOT_COUNTED = ("pip", "setuptools", "wheel", "psutil")  # psutil: for us, to measure memory

_IMPORT = "import time; begun = time.perf_counter(); {}; print(time.perf_counter() - begun)"
_SIZE = """if True:
    import json, sys
    from importlib.metadata import distributions
    without = set(json.loads(sys.argv[1]))
    size = 0
    for one in distributions():
        if one.name.lower() not in without:
            for file in one.files or ():
                if file.suffix != ".pyc" and (path := file.locate()).is_file():
                    size += path.stat().st_size
    print(size)
"""


def import_time(statement: str, python: Path) -> Found:
    """Milliseconds, in a process of its own."""
    said = subprocess.run(
        [python, "-c", _IMPORT.format(statement)], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return {"ms": float(said) * 1000}


def environment_size(python: Path) -> Found:
    """Megabytes of everything that is installed in an environment."""
    command = [str(python), "-c", _SIZE, json.dumps(_NOT_COUNTED)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {"MB": float(said) / 1e6}


def required_size(requirement: str) -> Found:
    """Megabytes of a distribution of this environment, and of all that it requires."""
    seen: set[str] = set()
    todo = [Requirement(requirement)]
    paths: set[Path] = set()
    while todo:
        one = todo.pop()
        if str(one) in seen:
            continue
        seen.add(str(one))
        found = distribution(one.name)
        for line in found.requires or ():
            other = Requirement(line)
            environments = [{"extra": extra} for extra in ("", *one.extras)]
            if not other.marker or any(map(other.marker.evaluate, environments)):
                todo.append(other)
        if one.name == NAME:  # may be installed for editing, which leaves its files where they are
            package = Path(eventsource_anyio.__file__).parent
            paths |= {path for path in package.rglob("*") if path.is_file()}
        else:
            paths |= {Path(str(file.locate())) for file in found.files or ()}
    counted = (path for path in paths if path.suffix != ".pyc" and path.is_file())
    return {"MB": sum(path.stat().st_size for path in counted) / 1e6}


def add(suite: Suite) -> None:
    here = Path(sys.executable)
    for case, subject, statement in (
        ("the package alone", NAME, IMPORT),
        ("what a program needs", "bare asyncpg", "import asyncpg"),
        ("what a program needs", NAME, IMPORT_POSTGRESQL),
    ):
        piece = Piece("import", "PostgreSQL", case, subject)
        suite.add(piece, partial(import_time, statement, here))
    for subject, requirement in (
        ("bare asyncpg", "asyncpg"),
        (NAME, f"{NAME}[postgresql]"),
    ):
        piece = Piece("installation", "PostgreSQL", "with all that it needs", subject)
        suite.add(piece, partial(required_size, requirement))
