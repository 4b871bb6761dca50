"""The command `eventsource-anyio`: makes the schema of a PostgreSQL store, and looks after it.

It exits with 1 where something failed or the doctor found a problem, and with 2 where it was asked
for what makes no sense. No password is ever printed.
"""

from __future__ import annotations

import os
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import partial
from typing import NoReturn

import anyio

from .errors import EventSourceError
from .stores.postgresql import Diagnosis, PostgreSQLEventStore, migration_sql

_VARIABLE = "DATABASE_URL"
# One of these in a password ends it early, and the rest is taken, and shown, for a host's name.
_DSN = re.compile(r"postgres(ql)?(\+asyncpg)?://([^:/?#]*(:[^/?#\s]*)?@)?[^@]*")
_PASSWORD = re.compile(r"(?<=://)([^:/\s]*:)\S*@|((?:ssl)?password=)[^&\s]*")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return the status to exit with."""
    parser = _parser()
    asked = parser.parse_args(arguments)
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
    store = PostgreSQLEventStore(dsn, schema=asked.schema, prefix=asked.prefix)
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
    try:
        from .testing.gap_stress import gap_stress
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error.name} is not installed, which --gap-stress needs: pip install {error.name}"
        ) from error
    return await store.doctor(gap_stress=partial(gap_stress, seconds=asked.gap_stress))


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

    parser = _Parser("eventsource-anyio", description="Looks after event stores in PostgreSQL.")
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
    return parser


if __name__ == "__main__":
    sys.exit(main())
