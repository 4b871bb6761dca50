"""Another process that runs a projection: the tests of `test_projection_processes.py` start it.

    python projection_worker.py MODE DATABASE BACKEND ITS_OPTIONS_AS_JSON ARGUMENT...

`DATABASE` is the DSN of a PostgreSQL database or the path of a SQLite file.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from random import Random
from time import monotonic, sleep
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # to be the package `tests`

import anyio
from anyio.lowlevel import checkpoint

from eventsource_anyio import EventStore, PostgreSQLEventStore, SQLiteEventStore
from eventsource_anyio.projections.coordinator import ProjectionCoordinator
from eventsource_anyio.projections.members import COLLECTION
from eventsource_anyio.stores.postgresql import asyncpg_driver, libpq_driver
from eventsource_anyio.stores.sqlite import database as sqlite_database
from tests.conftest import LOOPS
from tests.read_models import SQLTotals, append

KILLED = 9


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def open_store(database: str) -> EventStore:
    if database.startswith("postgresql:"):
        return PostgreSQLEventStore(database)
    return SQLiteEventStore(database, synchronous="NORMAL")


def coordinator_of(store: EventStore, shards: int, lease: float) -> ProjectionCoordinator:
    settings = {"shards": shards, "batch_size": 20, "retry_after": 0.01}
    return ProjectionCoordinator(store, [SQLTotals(**settings)], lease=lease)


async def project(database: str, shards: str, lease: str, name: str = "worker") -> None:
    """Run the projection for ever, and say when it has started; end if it ever fails."""
    if database.startswith("postgresql:"):
        database += f"{'&' if '?' in database else '?'}application_name={name}"
    async with open_store(database) as store:
        coordinator = coordinator_of(store, int(shards), float(lease))
        async with anyio.create_task_group() as tasks:
            await tasks.start(coordinator.run)
            say(f"started {os.getpid()}")
            while True:
                await coordinator.wait_for(await store.last_position() + 1)


async def follow(database: str, driver: str, shards: str) -> None:
    """Run the projection that others wait for, as `Filtered` of their tests has it."""
    from tests.test_projection_waiting import Filtered, postgresql

    async with postgresql(database, driver, "runner") as store:
        coordinator = ProjectionCoordinator(store, [Filtered(shards=int(shards))])
        async with anyio.create_task_group() as tasks:
            await tasks.start(coordinator.run)
            say(f"started {os.getpid()}")
            await coordinator.wait_stopped()


async def react(database: str) -> None:
    """Run the process manager for ever."""
    from tests.test_projection_processes import Reminding

    async with open_store(database) as store:
        await forget_the_dead(store)
        manager = Reminding(store)
        await ProjectionCoordinator(store, [manager], lease=60).run()


async def forget_the_dead(store: EventStore) -> None:
    """Their leases are over, to save the time."""
    for one in await store.documents.list(COLLECTION):
        await store.documents.delete(COLLECTION, one.key)


def react_and_die(database: str, seconds: float) -> None:
    """In one process after another, each on the next event loop and killed at a random moment.

    Say how many were, and run in this one from then on.
    """
    import asyncpg  # type: ignore[import-untyped]  # noqa: F401  (once for all processes)

    from tests import test_projection_processes  # noqa: F401

    loops, random, killed = cycle(LOOPS.values()), Random(), 0
    end = monotonic() + seconds
    say("started")
    while monotonic() < end:
        backend, options = next(loops)
        if not (child := os.fork()):
            try:
                anyio.run(react, database, backend=backend, backend_options=options)
            finally:
                os._exit(1)
        sleep(random.uniform(0.05, 0.25))
        os.kill(child, signal.SIGKILL)
        if os.WTERMSIG(os.waitpid(child, 0)[1]) != signal.SIGKILL:
            sys.exit("it has failed by itself")
        killed += 1
    say(f"{killed}")
    anyio.run(react, database)


class Statements:
    """Ends the process at its nth statement, if it gets that far, before it is made."""

    def __init__(self) -> None:
        self.left = 0

    def count(self, *_: object) -> None:
        if self.left:
            self.left -= 1
            if not self.left:
                os._exit(KILLED)

    def hook(self) -> None:
        """Into all drivers and SQLAlchemy, which are imported once for all processes."""
        import asyncpg  # noqa: F401
        import sqlalchemy.dialects.postgresql.asyncpg
        import sqlalchemy.dialects.sqlite
        import sqlalchemy.ext.asyncio  # noqa: F401
        from sqlalchemy import event
        from sqlalchemy.engine import Engine

        for name in ("before_cursor_execute", "commit", "begin", "rollback"):
            event.listen(Engine, name, self.count)
        for driver in (asyncpg_driver, libpq_driver):
            connection_class: Any = driver._Connection
            for name in ("fetch", "run"):
                counted = self._counted(getattr(connection_class, name))
                setattr(connection_class, name, counted)
        sqlite: Any = sqlite_database.SQLiteDatabase
        connect = sqlite.connect

        def traced(*args: Any, **options: Any) -> Any:
            connection = connect(*args, **options)
            connection.set_trace_callback(self.count)
            return connection

        sqlite.connect = traced

    def _counted(self, call: Callable[..., Awaitable[object]]) -> Callable[..., Awaitable[object]]:
        async def counted(*args: object) -> object:
            self.count()
            return await call(*args)

        return counted


async def die(database: str, statements: Statements, nth: int) -> None:
    """Handle some events, and end at the nth statement from when that begins."""
    async with open_store(database) as store:
        await forget_the_dead(store)
        position = await append(store, 2)
        statements.left = nth
        coordinator = coordinator_of(store, 1, 60)
        async with anyio.create_task_group() as tasks:
            await tasks.start(coordinator.run)
            await coordinator.wait_for(position)
            coordinator.stop()
            await coordinator.wait_stopped()
            statements.left = 0
            await checkpoint()


def die_everywhere(run: Callable[..., object], database: str, nth: int, step: int) -> None:
    """In one process after another, until one comes to its end; say how many did not.

    At the nth statement, and then a step later each time.
    """
    statements = Statements()
    statements.hook()
    run(checkpoint)  # imports the event loop, likewise
    killed = 0
    while True:
        if not (child := os.fork()):
            code = 1
            try:
                run(partial(die, database, statements, nth))
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            say(f"{killed}")
            return
        if code != KILLED:
            sys.exit(f"{nth}: {code}")
        killed += 1
        nth += step


if __name__ == "__main__":
    mode, database, backend, options, *arguments = sys.argv[1:]
    run = partial(anyio.run, backend=backend, backend_options=json.loads(options))
    if mode == "project":
        run(partial(project, database, *arguments))
    elif mode == "follow":
        run(partial(follow, database, *arguments))
    elif mode == "react":
        react_and_die(database, *map(float, arguments))
    else:
        die_everywhere(run, database, *map(int, arguments))
