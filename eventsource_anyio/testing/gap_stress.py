"""The gap stress test: do those who follow a PostgreSQL store ever miss a committed event?

    python -m eventsource_anyio.testing.gap_stress [DSN] [--seconds 60] [--runs 10]

Processes append in every way there is: tasks by `append_events`, and transactions that hold open
what they appended, or roll it back, all of it or to a savepoint; connections are killed at random.
Others subscribe meanwhile, on asyncio, uvloop and Trio. At the end, what they were given, and what
was acknowledged to the appenders, is compared with what is in the table.

A reader without the protocol reads along. What it misses are the gaps that there were to fall into:
a run without any has shown nothing.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from importlib.util import find_spec
from random import Random
from typing import TypeAlias, cast

import anyio
import attrs
import msgspec

from ..cleanup import shielded_cleanup
from ..guest import Guest
from ..stores.postgresql import PostgreSQLEventStore
from ..stores.postgresql.asyncpg_driver import AsyncpgDriver, connect_by_dsn
from ..stores.postgresql.driver import Connection, DriverError
from ..stores.postgresql.failures import storage_error
from ..stores.postgresql.schema import Schema
from .gap_load import WITH_ROW, Child, Record, Setup
from .postgresql import postgresql_server

_LOOPS = ("asyncio", "uvloop", "trio")
_LONGEST = 60.0  # seconds that an appender may be silent
_TABLE = "DROP TABLE IF EXISTS es.gap_stress; CREATE TABLE es.gap_stress (event_id uuid UNIQUE)"
_KILL = (
    "SELECT pg_terminate_backend(pid) FROM (SELECT pid FROM pg_stat_activity WHERE "
    "application_name = $1 AND datname = current_database() AND usename = current_user "
    "ORDER BY random() LIMIT 1) one"
)

Stored: TypeAlias = dict[bytes, tuple[int, int, str]]  # position, version, stream


@attrs.frozen
class SubscriberResult:
    """What a subscriber was given, against what is stored.

    `twice` counts deliveries of an event after its first, `out_of_order` those of a position, and
    `out_of_stream_order` those of a version in its stream, that is below the one before; `wrong`
    those of what is not stored, or not so. `stalled`: it got no further, though there was more.
    """

    loop: str
    delivered: int
    lost: int
    twice: int
    out_of_order: int
    out_of_stream_order: int
    wrong: int
    stalled: bool

    @property
    def ok(self) -> bool:
        """Whether it was given every event, once and in order."""
        return not any(attrs.astuple(self)[2:])

    def __str__(self) -> str:
        return (
            f"{self.loop}: {self.delivered:,} delivered, {self.lost:,} lost, {self.twice:,} twice, "
            f"{self.out_of_order:,} out of order, {self.out_of_stream_order:,} out of stream order"
            + (f", {self.wrong:,} not as stored" if self.wrong else "")
            + (", stalled" if self.stalled else "")
        )


@attrs.frozen
class GapStressResult:
    """The figures of a run, and the verdict; as a string, for people.

    `gaps` are the events that a reader without the protocol missed. `broken` counts those that were
    acknowledged and are not stored so, or stored and not acknowledged; `torn`, those stored without
    the other rows of their transaction, or the reverse; `out_of_version`, those whose version does
    not follow that of the event before it, by position, in its stream. `left_out` are the event
    loops that are not installed.
    """

    committed: int
    rolled_back: int
    killed: int
    gaps: int
    broken: int
    torn: int
    out_of_version: int
    subscribers: tuple[SubscriberResult, ...]
    left_out: tuple[str, ...]

    @property
    def lost(self) -> int:
        """The events that subscribers were not given, of all of them together."""
        return sum(one.lost for one in self.subscribers)

    @property
    def failed(self) -> bool:
        """Whether anything was wrong."""
        return any((self.broken, self.torn, self.out_of_version)) or not all(
            one.ok for one in self.subscribers
        )

    @property
    def ok(self) -> bool:
        """Whether nothing was wrong, and something could have been."""
        return self.gaps > 0 and not self.failed

    def __str__(self) -> str:
        verdict = "FAILED" if self.failed else "PASSED" if self.gaps else "SHOWED NOTHING"
        events = (
            f"{verdict}: {self.committed:,} events committed, {self.rolled_back:,} rolled back, "
            f"{self.killed:,} connections killed, {self.gaps:,} gaps"
        )
        table = (
            f"in the table: {self.broken:,} not as acknowledged, {self.torn:,} without the rest of "
            f"their transaction, {self.out_of_version:,} out of stream order"
        )
        left_out = (f"{loop}: left out, not installed" for loop in self.left_out)
        return "\n  ".join((events, *map(str, self.subscribers), table, *left_out))


async def gap_stress(
    dsn: str,
    *,
    schema: str,
    seconds: float = 15.0,
    processes: int = 3,
    tasks: int = 32,
    transactions: int = 2,
    hold: float = 1.0,
    terminate: bool = True,
    patience: float = 20.0,
) -> GapStressResult:
    """Append for some seconds, in processes of their own, and see what subscribers make of it.

    The schema is made, and dropped at the end; one that is there must hold a store without events,
    and keeps what is appended. Each process runs `tasks` that append, and `transactions` that pause
    after each append for up to `hold` seconds. With `terminate`, connections of this run, and no
    others, are killed. It needs about nine connections a process and 15 more.

    A subscriber that gets no further for `patience` seconds has lost what it was not given.
    Raises `StorageError` if the database fails, and `RuntimeError` if a process does.
    """
    where, mark = Schema(schema), f"gap_stress_{secrets.token_hex(8)}"
    there = [loop for loop in _LOOPS if find_spec(loop)]
    marked = f"{dsn}{'&' if '?' in dsn else '?'}application_name={mark}"
    load = (marked, schema, seconds, tasks, transactions, hold)
    setups = [Setup("append", there[n % len(there)], *load, 0.5) for n in range(processes)]
    # The first waits to be told, the others look all the time: a gap may be there very briefly.
    for loop, poll_every in zip((there * 3)[:3], (0.5, 0.001, 0.001), strict=True):
        setups.append(Setup("subscribe", loop, *load, poll_every))
    try:
        async with AsyncExitStack() as stack:
            driver = AsyncpgDriver(await stack.enter_async_context(Guest()), connect_by_dsn(dsn))
            along = await driver.connect()
            stack.push_async_callback(along.close)
            ours = await driver.connect()
            stack.push_async_callback(ours.close)
            ((new,),) = await ours.fetch("SELECT to_regnamespace($1) IS NULL", f'"{schema}"')
            what = f'SCHEMA IF EXISTS "{schema}"' if new else "TABLE IF EXISTS es.gap_stress"
            stack.push_async_callback(_drop, ours, where.sql(f"DROP {what} CASCADE"))
            await PostgreSQLEventStore(dsn, schema=schema).migrate()
            if await ours.fetch(where.sql("SELECT FROM es.events LIMIT 1")):
                raise ValueError(f"schema {schema!r} holds events; give the name of a new one")
            await ours.run(where.sql(_TABLE))
            run = _Run(along, ours, where, mark if terminate else "", patience)
            return await run.result(setups)
    except (ExceptionGroup, DriverError) as error:
        raise _first(error) from None


def _first(error: Exception) -> Exception:
    while isinstance(error, ExceptionGroup):
        error = cast("ExceptionGroup[Exception]", error).exceptions[0]
    return storage_error(error) if isinstance(error, DriverError) else error


async def _drop(connection: Connection, statement: str) -> None:
    with shielded_cleanup():
        await connection.run(statement)


class _Run:
    """Starts the processes, kills connections, reads along, and compares."""

    def __init__(
        self, along: Connection, ours: Connection, where: Schema, mark: str, patience: float
    ) -> None:
        self._along = along
        self._ours = ours
        self._where = where
        self._mark = mark
        self._patience = patience
        self._written = False
        self._killed = self._seen_along = 0

    async def result(self, setups: Sequence[Setup]) -> GapStressResult:
        stored: Stored = {}
        torn = 0
        command = [sys.executable, "-m", f"{__package__}.gap_load"]
        async with AsyncExitStack() as stack:
            children: list[Child] = []
            for setup in setups:
                process = await anyio.open_process(command, stderr=None)
                children.append(Child(setup, await stack.enter_async_context(process)))
            writers = [child for child in children if child.setup.role == "append"]
            followers = [child for child in children if child.setup.role == "subscribe"]
            async with anyio.create_task_group() as listening:
                for child in children:
                    listening.start_soon(child.listen)
                    await child.tell(msgspec.json.encode(child.setup))
                await self._expect(children, 0)
                async with anyio.create_task_group() as meanwhile:
                    meanwhile.start_soon(self._read_along)
                    meanwhile.start_soon(self._kill)
                    for child in children:
                        await child.tell(b"%f" % time.time())
                    await self._expect(writers, sys.maxsize)
                    self._written = True
                stored, torn = await self._table()
                end = max((position for position, *_ in stored.values()), default=0)
                async with anyio.create_task_group() as reading:
                    for child in followers:
                        reading.start_soon(child.until, end, self._patience)
                for child in followers:
                    assert child.process.stdin is not None
                    await child.process.stdin.aclose()
        said = [record for one in writers for record in one.records()]
        return GapStressResult(
            committed=len(stored),
            rolled_back=sum(position == 0 for position, *_ in said),
            killed=self._killed,
            gaps=len(stored) - self._seen_along,
            broken=_broken(stored, said),
            torn=torn,
            out_of_version=_out_of_version(stored),
            subscribers=tuple(_judge(stored, child) for child in followers),
            left_out=tuple(one for one in _LOOPS if one not in {s.loop for s in setups}),
        )

    async def _expect(self, children: Sequence[Child], position: int) -> None:
        for child in children:
            if not await child.until(position, _LONGEST):
                raise RuntimeError(f"{child} got no further for {_LONGEST} s")

    async def _kill(self) -> None:
        random = Random()  # noqa: S311  (no secret)
        while self._mark and not self._written:
            await anyio.sleep(random.uniform(0, 0.2))
            self._killed += len(await self._ours.fetch(_KILL, self._mark))

    async def _read_along(self) -> None:
        statement = self._where.sql("SELECT position FROM es.events WHERE position > $1 ORDER BY 1")
        after, written = 0, False
        while not written:
            written = self._written
            if rows := await self._along.fetch(statement, after):
                after = rows[-1][0]
                self._seen_along += len(rows)
            await anyio.sleep(0.01)

    async def _table(self) -> tuple[Stored, int]:
        """What is stored, and how many events or rows are without the other."""
        rows = await self._ours.fetch(
            self._where.sql(
                "SELECT e.event_id, position, version, aggregate_type || '-' || aggregate_id, "
                "r.event_id IS NULL FROM es.events e FULL JOIN es.gap_stress r USING (event_id) "
                "ORDER BY position"
            )
        )
        stored: Stored = {row[0].bytes: tuple(row[1:4]) for row in rows if row[0]}
        return stored, sum(not row[0] or (row[4] and row[3].startswith(WITH_ROW)) for row in rows)


def _broken(stored: Stored, said: Sequence[Record]) -> int:
    found = {(position, version, event_id) for event_id, (position, version, _) in stored.items()}
    kept = {record for record in said if record[0]}
    return len({event_id for _, _, event_id in kept ^ found})


def _out_of_version(stored: Stored) -> int:
    versions: dict[str, int] = {}
    count = 0
    for _, version, stream in stored.values():
        count += version != versions.get(stream, 0) + 1
        versions[stream] = version
    return count


def _judge(stored: Stored, follower: Child) -> SubscriberResult:
    seen: set[bytes] = set()
    versions: dict[str, int] = {}
    last = twice = out_of_order = out_of_stream_order = wrong = 0
    for position, version, event_id in follower.records():
        found = stored.get(event_id)
        if event_id in seen:
            twice += 1
        elif found is None or found[:2] != (position, version):
            wrong += 1
        else:
            out_of_order += position < last
            out_of_stream_order += version < versions.get(found[2], 0)
            last, versions[found[2]] = position, version
        seen.add(event_id)
    counts = (len(seen), len(stored.keys() - seen), twice, out_of_order, out_of_stream_order, wrong)
    return SubscriberResult(follower.setup.loop, *counts, follower.stalled)


def main() -> None:
    description = "Whether subscribers of the PostgreSQL store ever miss a committed event."
    parser = argparse.ArgumentParser("gap_stress", description=description)
    parser.add_argument("dsn", nargs="?", help="of a database; a server is started without it")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--runs", type=int, default=1)
    options = parser.parse_args()
    passed = 0
    with ExitStack() as stack:
        dsn: str = options.dsn
        if not dsn:
            server = stack.enter_context(postgresql_server(durable=True))
            dsn = server.create_database()
            stack.callback(server.drop_database, dsn)
        for _ in range(options.runs):
            schema = f"gap_stress_{secrets.token_hex(4)}"
            result = anyio.run(partial(gap_stress, dsn, schema=schema, seconds=options.seconds))
            passed += result.ok
            sys.stdout.write(f"{result}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{passed} of {options.runs} runs passed\n")
    sys.exit(passed < options.runs)


if __name__ == "__main__":
    main()
