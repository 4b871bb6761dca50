"""What may keep a store from working, looked for on its own server.

- It changes nothing, and what it cannot look at it reports.
- Whether appends are announced is tried: an insert of no rows fires the trigger too.
- It works through a pooler through which the store does not: it prepares what it asks anew, and by
  another name where one is taken.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from secrets import token_hex

import anyio

from .catalog import EVENTS, HOLDERS, INDEXES, OBJECTS, POSITIONS, REHEARSAL, SESSION
from .diagnosis import Diagnosis, Fault, Finding, concluded
from .driver import Connection, Driver, DriverError, Row
from .failures import storage_error
from .schema import Schema, migrations
from .settings import Server, judged

_PATIENCE = 2.0  # seconds for a notification, or for a pooler to find a connection
_HELD_FOR = 1.0  # seconds after which an append in flight holds readers up
_ROUNDS = 3
_NAMES = 1000  # that are tried
_MISNAMED = ("42P05", "26000")  # the name of a prepared statement is taken, or not known
_RAISED = "P0001"
_BEFORE_STATEMENT = 2 | 4  # as pg_trigger has it: before an insert, once a statement
_PRIVILEGES = {
    "events": ("SELECT", "INSERT"),
    "positions": ("SELECT", "USAGE"),
    "checkpoints": ("SELECT", "INSERT", "UPDATE"),
    "outbox": ("SELECT", "INSERT", "DELETE"),
    "documents": ("SELECT", "INSERT", "UPDATE", "DELETE"),
    "migrations": ("SELECT",),
}
_FUNCTION = re.compile(
    r'CREATE (?:OR REPLACE )?FUNCTION "\w+"\."(\w+)"\(.*?AS \$\$(.*?)\$\$', re.DOTALL
)
_INDEX = re.compile(r'CONSTRAINT "(\w+)" (?:PRIMARY|UNIQUE)|INDEX "(\w+)"')
_MIGRATE = "Run `await store.migrate()` once, as a role that may create them."
_GRANT = "Run `await store.migrate(role=…)` as the owner: it gives a role what it needs, no more."
_AS_MADE = "Make them again as migration_sql() prints them."
_MISSED = "so readers may miss events for good"
_UNPREPARED = """The store needs prepared statements, and a pooler in between does not keep them.
Calls fail at random, or run a statement of another process's."""
_POOLED = """PgBouncer keeps them from version 1.21, with max_prepared_statements = 100. Otherwise
give the store create_async_engine(…, connect_args={"statement_cache_size": 0})."""


async def diagnose(
    driver: Driver, schema: Schema, connections: int, poll_every: float
) -> Diagnosis:
    """Look at everything that can be looked at."""
    findings: list[Finding] = []
    async with AsyncExitStack() as stack:
        try:
            one = await driver.connect()
            stack.push_async_callback(one.close)
            other = await driver.connect()
            stack.push_async_callback(other.close)
            doctor = _Doctor(one, other, schema)
            looks: dict[str, Callable[[], Awaitable[list[Finding]]]] = {
                "server": partial(doctor.server, connections),
                "pooler": partial(doctor.pooler, poll_every),
                "schema": doctor.objects,
                "events": doctor.events,
                "open appends": doctor.open_appends,
            }
            for check, look in looks.items():
                try:
                    findings += await look()
                except DriverError as error:
                    if error.lost:
                        raise
                    findings.append(Finding(check, "problem", str(storage_error(error))))
        except DriverError as error:
            findings.append(Finding("server", "problem", str(storage_error(error))))
    return Diagnosis(tuple(findings))


class _Doctor:
    """Looks by two connections. What it finds decides what it can look at afterwards."""

    def __init__(self, one: Connection, other: Connection, schema: Schema) -> None:
        self._one = one
        self._other = other
        self._schema = schema
        self._role, self._superuser = "", False
        self._replica = self._primary = False
        self._complete = False
        self._denied: list[str] = []

    async def _ask(self, statement: str, *values: object) -> Sequence[Row]:
        for _ in range(_NAMES):
            try:
                return await self._one.fetch(statement, *values)
            except DriverError as error:
                if error.sqlstate not in _MISNAMED:
                    raise
            statement += " "  # to the driver, it is another one
        return await self._one.fetch(statement, *values)

    async def server(self, connections: int) -> list[Finding]:
        asked = time.time()
        (row,) = await self._ask(SESSION)
        self._role, self._superuser, replica, now, used, *limits = row
        apart = now - (asked + time.time()) / 2
        rows = await self._ask("SELECT name, setting FROM pg_settings")
        settings: dict[str, str] = {row[0]: row[1] for row in rows}
        server = Server(self._role, replica, settings, used, limits, apart)
        self._replica, self._primary = replica, server.primary
        return [*judged(server, connections)]

    async def pooler(self, poll_every: float) -> list[Finding]:
        sessions: set[object] = set()
        kept, heard = True, self._replica  # where there is nothing to hear
        with anyio.move_on_after(_PATIENCE) as sharing:
            for script in ("BEGIN", "ROLLBACK") * _ROUNDS:
                try:
                    sessions.add((await self._one.fetch("SELECT pg_backend_pid()"))[0][0])
                except DriverError as error:
                    if error.lost:
                        raise
                    kept = False
                await self._other.run(script)  # by a pooler, in the session that was left last
        if sharing.cancelled_caught:
            await self._other.run("ROLLBACK")
        with anyio.move_on_after(0 if heard else _PATIENCE):
            channel = f"eventsource_doctor_{token_hex(8)}"
            await self._one.listen(channel)
            await self._other.run(f"NOTIFY {channel}")
            await self._one.heard()
            heard = True
        faults: list[Fault] = []
        if not kept:
            faults.append(("problem", _UNPREPARED, _POOLED))
        if not (heard and kept and len(sessions) == 1) or sharing.cancelled_caught:
            why = "Notifications do not arrive"
            if sharing.cancelled_caught or not kept or len(sessions) > 1:
                why = "A pooler in between gives every transaction another session of the server"
            text = (
                f"{why}.\nAppends of other processes are found by looking, every {poll_every:g} s."
            )
            remedy = "Give the store the server's own address, or a pool in session mode."
            faults.append(("warning", text, remedy))
        fine = "each connection is a session of its own, and notifications arrive"
        return concluded("pooler", fine, *faults)

    async def objects(self) -> list[Finding]:
        name, prefix = self._schema.name, self._schema.prefix
        script = self._schema.beginning() + self._schema.sql("".join(m.sql for m in migrations()))
        bodies: dict[str, str] = dict(_FUNCTION.findall(script))
        wanted = [(prefix + table, one) for table, needs in _PRIVILEGES.items() for one in needs]
        wanted += [(function, "EXECUTE") for function in bodies]
        rows = await self._ask(OBJECTS, name, [w[0] for w in wanted], [w[1] for w in wanted])
        missing = sorted({row[0] for row in rows if not row[2]})
        if len(missing) == len({row[0] for row in wanted}):
            return [Finding("schema", "problem", f"{name!r} holds no event store.", _MIGRATE)]
        self._denied = [
            f"{privilege} on {one}"
            for one, privilege, there, may, _ in rows
            if there and not may and one != f"{prefix}announced"  # a trigger needs none
        ]
        newest = migrations()[-1].version
        version = newest
        if not self._denied and prefix + "migrations" not in missing:
            ((version,),) = await self._ask(
                self._schema.sql("SELECT coalesce(max(version), 0) FROM es.migrations")
            )
        if version < newest:
            text = f"{name!r} is at version {version}, and this program needs version {newest}."
            return [Finding("schema", "problem", text, _MIGRATE)]
        indexes = [one or other for one, other in _INDEX.findall(script)]
        missing += [row[0] for row in await self._ask(INDEXES, name, indexes)]
        faults: list[Fault] = []
        if missing:
            faults.append(("problem", f"{name!r} lacks {', '.join(missing)}.", _AS_MADE))
        changed = sorted(
            row[0]
            for row in rows
            if row[4] is not None and row[4].split() != bodies[row[0]].split()
        )
        if changed and version == newest:
            faults.append(("problem", f"Changed by somebody: {', '.join(changed)}.", _AS_MADE))
        self._complete = not missing
        return concluded("schema", f"{name!r} is complete, at version {version}", *faults)

    async def events(self) -> list[Finding]:
        schema = self._schema
        rows = await self._ask(
            EVENTS, schema.name, schema.prefix + "events", schema.prefix + "positions"
        )
        if not rows:
            return []
        ((unlogged, hidden, subscribed, owns, may, cache, odd, enabled, kind),) = rows
        faults: list[Fault] = []
        if self._denied:
            text = f"Role {self._role!r} lacks {', '.join(self._denied)}."
            faults.append(("problem", text, _GRANT))
        if self._superuser or owns or may:
            can = "is a superuser" if self._superuser else "owns them" if owns else f"may {may}"
            text = f"Role {self._role!r} can change and delete events: it {can}."
            faults.append(("warning", text, _GRANT))
        fine = f"role {self._role!r} can do what it needs to, and cannot change events"
        found = concluded("privileges", fine, *faults)
        table, positions = schema.sql("es.events"), schema.sql("es.positions")
        faults = []
        if unlogged:
            text = "It is UNLOGGED: a crash of the server empties it."
            faults.append(("problem", text, f"ALTER TABLE {table} SET LOGGED;"))
        if hidden:
            text = f"Row-level security hides events from role {self._role!r}."
            faults.append(("problem", text, f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY;"))
        if subscribed:
            text = f"A logical subscription writes to it, unannounced, {_MISSED}."
            faults.append(("problem", text, "Read from the publisher until it takes over."))
        found += concluded("events", "they are durable and visible", *faults)
        faults = []
        if enabled is None or kind != _BEFORE_STATEMENT:
            what = "missing" if enabled is None else "another one"
            text = f"The trigger announce is {what}: appends are not announced, {_MISSED}."
            faults.append(("problem", text, _AS_MADE))
        elif enabled not in ("O", "A"):
            text = f"The trigger announce is disabled: appends are not announced, {_MISSED}."
            faults.append(("problem", text, f"ALTER TABLE {table} ENABLE TRIGGER announce;"))
        elif self._primary and self._complete and not self._denied:
            faults += await self._rehearsed()
        if cache not in (None, 1):
            text = f"Each session takes {cache} positions at a time, {_MISSED}."
            faults.append(("problem", text, f"ALTER SEQUENCE {positions} CACHE 1;"))
        if odd:
            remedy = f"ALTER SEQUENCE {positions} INCREMENT 1 NO CYCLE;"
            faults.append(("problem", "The sequence does not count up by one.", remedy))
        if self._complete and not self._denied:
            ((highest, last),) = await self._ask(schema.sql(POSITIONS))
            if highest > last:
                text = f"The sequence is at {last}, and events go up to {highest}: appends fail."
                remedy = f"SELECT setval('{positions}', {highest});"
                faults.append(("problem", text, remedy))
        return found + concluded("order", "appends are announced, and positions grow", *faults)

    async def _rehearsed(self) -> list[Fault]:
        try:
            await self._one.run(self._schema.sql(REHEARSAL))
        except DriverError as error:
            if error.sqlstate != _RAISED:
                raise
            text = f"An insert was not announced, {_MISSED}."
            remedy = "Is session_replication_role 'replica' here? If not, the trigger was changed."
            return [("problem", text, remedy)]
        return []

    async def open_appends(self) -> list[Finding]:
        names = (self._schema.name, self._schema.prefix + "positions")
        found = await self._ask(HOLDERS, *names)
        if found:
            before = {tuple(row[:2]) for row in found}
            await anyio.sleep(_HELD_FOR)
            found = [r for r in await self._ask(HOLDERS, *names) if tuple(r[:2]) in before]
        faults: list[Fault] = []
        for _, pid, application, role, age, prepared in found:
            who = f"Session {pid} ({application or 'no application_name'}, role {role!r})"
            remedy = f"Have it commit or roll back, or: SELECT pg_terminate_backend({pid});"
            if pid is None:
                who = f"The prepared transaction {prepared!r}"
                remedy = "COMMIT PREPARED or ROLLBACK PREPARED, whichever is meant."
            held = f"{age:.0f} s" if age is not None else "a while"
            text = f"{who} has appended and not committed for {held}. Readers wait for it."
            faults.append(("warning", text, remedy))
        return concluded("open appends", "no reader waits for one", *faults)
