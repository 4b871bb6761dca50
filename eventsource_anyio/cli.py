"""The command `eventsource-anyio`: looks after PostgreSQL stores, and rebuilds projections.

It exits with 1 where something failed or the doctor found a problem, and with 2 where it was asked
for what makes no sense. No password is ever printed.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import partial
from importlib import import_module
from typing import NoReturn, TypeAlias, cast

import anyio

from .errors import EventSourceError
from .projections import BuildProgress, ProjectionCoordinator
from .stores.postgresql import Diagnosis, PostgreSQLEventStore, migration_sql

_VARIABLE = "DATABASE_URL"
# One of these in a password ends it early, and the rest is taken, and shown, for a host's name.
_DSN = re.compile(r"postgres(ql)?(\+\w+)?://([^:/?#]*(:[^/?#\s]*)?@)?[^@]*")
_EVERY = 0.2  # seconds between two looks at how far a rebuild has got
_PASSWORD = re.compile(r"(?<=://)([^:/\s]*:)\S*@|((?:ssl)?password=)[^&\s]*")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return the status to exit with."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    if asked.command == "rebuild":
        return _rebuild(parser, asked)
    try:
        script = migration_sql(
            schema=asked.schema, prefix=asked.prefix, after=asked.after, role=asked.role
        )
    except ValueError as error:
        parser.error(str(error))
    if asked.command == "sql":
        sys.stdout.write(script)
        return 0
    dsn = asked.dsn or os.environ.get(_VARIABLE, "")
    if not _DSN.fullmatch(dsn):
        parser.error(
            f"give the DSN as an argument or in {_VARIABLE}: postgresql://user@host/database. What "
            "is not a letter or a digit in a password is written as in a URL, such as %2F for /"
        )
    try:
        store = PostgreSQLEventStore(dsn, schema=asked.schema, prefix=asked.prefix)
    except ValueError as error:
        parser.error(str(error))
    try:
        if asked.command == "migrate":
            anyio.run(partial(store.migrate, role=asked.role))
            sys.stdout.write(f"Schema {asked.schema!r} is up to date.\n")
            return 0
        diagnosis = anyio.run(_doctor, store, asked)
    except (EventSourceError, ImportError) as error:
        sys.stderr.write(_shown(f"{error}\n"))
        return 1
    sys.stdout.write(_shown(f"{diagnosis}\n"))
    return 0 if diagnosis.ok else 1


async def _doctor(store: PostgreSQLEventStore, asked: Namespace) -> Diagnosis:
    if asked.gap_stress is None:
        return await store.doctor()
    from .testing.gap_stress import gap_stress

    return await store.doctor(gap_stress=partial(gap_stress, seconds=asked.gap_stress))


# -- rebuild ----------------------------------------------------------------------------------

_Application: TypeAlias = Callable[[], AbstractAsyncContextManager[ProjectionCoordinator]]


def _rebuild(parser: ArgumentParser, asked: Namespace) -> int:
    try:
        anyio.run(_run_rebuild, _application(asked.application), asked.name)
    except _NotAnApplicationError as error:
        parser.error(str(error))
    except (EventSourceError, ImportError, ValueError) as error:
        cause = f"  {type(error.__cause__).__name__}: {error.__cause__}\n" * bool(error.__cause__)
        sys.stderr.write(_shown(f"{error}\n{cause}"))
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted. Whoever runs the projection goes on with it.\n")
        return 130
    return 0


class _NotAnApplicationError(Exception):
    pass


def _application(path: str) -> _Application:
    module, _, name = path.partition(":")
    if not module or not name.isidentifier():
        raise _NotAnApplicationError(f"give module:function, such as shop.main:coordinator: {path}")
    sys.path.insert(0, os.getcwd())
    try:
        found: object = getattr(import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise _NotAnApplicationError(f"there is no module {error.name}") from error
    if not callable(found):
        raise _NotAnApplicationError(f"{module} has no function {name}")
    return cast("_Application", found)


async def _run_rebuild(application: _Application, name: str) -> None:
    manager = application()
    if not isinstance(manager, AbstractAsyncContextManager):
        raise _NotAnApplicationError(
            "the function must be an async context manager that opens the store and yields the "
            "ProjectionCoordinator, which is not run yet: @asynccontextmanager async def …"
        )
    logging.getLogger("eventsource_anyio").addHandler(logging.NullHandler())  # not over the bar
    failure: EventSourceError | None = None
    async with manager as coordinator:
        await coordinator.rebuild(name)
        target = (await coordinator.progress(name)).target
        async with anyio.create_task_group() as tasks:
            try:
                await tasks.start(coordinator.run)
                await _show_until(coordinator, name, target)
            except EventSourceError as error:
                failure = error
            coordinator.stop()
        if failure is not None:
            raise failure


async def _show_until(coordinator: ProjectionCoordinator, name: str, target: int) -> None:
    """Return when what was in the store at the beginning is handled."""
    with _shown_progress(name) as show:
        arrived = False
        while not arrived:
            with anyio.move_on_after(_EVERY):
                await coordinator.wait_for(target, name)
                arrived = True
            show(await coordinator.progress(name))
    progress = await coordinator.progress(name)
    sys.stdout.write(f"{name}, version {progress.version}, is rebuilt up to position {target}.\n")


@contextmanager
def _shown_progress(name: str) -> Generator[Callable[[BuildProgress], None], None, None]:
    """A bar where a person looks on and rich is installed, else a line now and then."""
    if sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
        except ModuleNotFoundError:
            pass
        else:
            columns = ("{task.description}", BarColumn(), MofNCompleteColumn())
            rate = "{task.fields[rate]:,.0f}/s"
            console = Console(stderr=True)
            with Progress(*columns, rate, TimeRemainingColumn(), console=console) as bars:
                bar = bars.add_task(name, total=None, rate=0.0)

                def move(progress: BuildProgress) -> None:
                    bars.update(
                        bar,
                        completed=min(progress.position, progress.target),
                        total=progress.target,
                        rate=progress.rate,
                    )

                yield move
            return
    shown = -10

    def write(progress: BuildProgress) -> None:
        nonlocal shown
        percent = int(100 * progress.fraction)
        if percent >= shown + 10 or (percent == 100 and shown < 100):
            shown = percent
            left = progress.seconds_left
            sys.stderr.write(
                f"{name}: {progress.position:,} of {progress.target:,}, {percent} %, "
                f"{progress.rate:,.0f}/s{'' if left is None else f', {left:,.0f} s left'}\n"
            )

    yield write


# -- arguments --------------------------------------------------------------------------------


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(_shown(message))


def _shown(text: str) -> str:
    return _PASSWORD.sub(
        lambda found: f"{found[1] or ''}{found[2] or ''}***{'@' * bool(found[1])}", text
    )


def _parser() -> ArgumentParser:
    where = _Parser(add_help=False)
    where.add_argument("--schema", default="eventsource", help="where the tables are (%(default)s)")
    where.add_argument("--prefix", default="", help="what their names begin with (nothing)")
    where.set_defaults(after=0, role=None)
    server = _Parser(add_help=False)
    server.add_argument("dsn", nargs="?", metavar="DSN", help=f"or {_VARIABLE} in the environment")
    granted = _Parser(add_help=False)
    granted.add_argument("--role", help="grant what an application needs to this role")

    text = "Looks after event stores in PostgreSQL, and rebuilds projections."
    parser = _Parser("eventsource-anyio", description=text)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    text = "make the tables and functions of a store, or bring them up to date"
    commands.add_parser("migrate", help=text, description=text, parents=[server, where, granted])
    text = "print the SQL that migrate runs"
    sql = commands.add_parser("sql", help=text, description=text, parents=[where, granted])
    sql.add_argument("--after", type=int, metavar="VERSION", help="leave out what is there already")
    text = "find out what keeps a store from working"
    doctor = commands.add_parser("doctor", help=text, description=text, parents=[server, where])
    doctor.add_argument(
        "--gap-stress",
        type=float,
        metavar="SECONDS",
        help="also append from several processes, in a schema that is dropped again",
    )
    text = "empty the read model of a projection, and build it anew"
    rebuild = commands.add_parser("rebuild", help=text, description=text)
    rebuild.add_argument(
        "application",
        metavar="MODULE:FUNCTION",
        help="an async context manager that yields a ProjectionCoordinator on an open store",
    )
    rebuild.add_argument("name", metavar="NAME", help="of the projection; the version that serves")
    return parser


if __name__ == "__main__":
    sys.exit(main())
