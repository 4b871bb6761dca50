"""The store for production: PostgreSQL, with any number of processes."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from random import random
from typing import TYPE_CHECKING, Literal, overload

import anyio
from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint_if_cancelled
from attrs import frozen

from ...cleanup import shielded_cleanup
from ...errors import StoreClosedError
from ...ids import AggregateId
from ...repositories.document import Document, decode_document
from ...repositories.outbox import StoredMessage, decode_message
from ..hints import Hints
from ..interface import Append, AppendResult, EventStore, Page, PageRequest, Step
from ..signal import AppendSignal
from ..transaction import Transaction, Write
from .asyncpg_driver import (
    AsyncpgDriver,
    check_engine,
    connect_by_dsn,
    connect_by_engine,
    engine_by_dsn,
)
from .diagnosis import Diagnosis, GapStress, stressed
from .doctor import diagnose
from .driver import Driver, DriverError, Row
from .dsn import parse_dsn
from .failures import storage_error
from .group_commit import UNIQUE, Lane
from .migrating import check, migrate
from .paging import read_page
from .pool import Pool
from .schema import Schema
from .statements import Statements, by_id
from .tail import Tail
from .transaction import PostgreSQLTransaction, begun, fetch_in, on_commit, savepoint
from .writing import write_at_once, write_steps

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

    from ...guest import Guest

_LANES = 2
_PAUSE = 0.01
_TRIES = 5


@frozen
class _Opened:
    """What there is while the store is open."""

    stack: AsyncExitStack
    guest: Guest
    pool: Pool
    signal: AppendSignal
    tail: Tail
    lanes: Sequence[Lane]
    statements: Statements


class PostgreSQLEventStore(EventStore):
    """Events in PostgreSQL 14 to 18, appended and followed by any number of processes.

    `database` is a DSN, `postgresql://user:password@host/database`, or an `AsyncEngine` of
    SQLAlchemy on asyncpg, by which the store then makes its connections. The tables are in
    `schema`, their names after `prefix`; `migrate()` makes them.

    At most `connections` are used for appends, reads and the store's own transactions, and one more
    that listens, as long as somebody subscribes or a coordinator runs. They are opened when they
    are needed. Transactions with SQL in them take theirs from the engine.

    A subscription gets to know of appends by notifications, and where one is lost, it looks every
    `poll_every` seconds. The database's time limits, such as `statement_timeout`, hold.

    `driver` is "asyncpg", or "psycopg": libpq, which runs natively on Trio. By default it is
    psycopg on Trio, where it is installed, and asyncpg otherwise; both do the same. Transactions
    with SQL in them always use asyncpg, and so does a store that was given an engine.

    On Trio, asyncpg and SQLAlchemy run in a `Guest`: the store's own, or the `guest` given, for
    what shares an engine with it.
    """

    def __init__(
        self,
        database: str | AsyncEngine,
        *,
        schema: str = "eventsource",
        prefix: str = "",
        connections: int = 5,
        poll_every: float = 0.5,
        guest: Guest | None = None,
        driver: Literal["asyncpg", "psycopg"] | None = None,
    ) -> None:
        if driver not in (None, "asyncpg", "psycopg"):
            raise ValueError(f"driver must be 'asyncpg' or 'psycopg', not {driver!r}")
        if driver == "psycopg" and not isinstance(database, str):
            raise ValueError("an engine makes connections of asyncpg; driver='psycopg' needs a DSN")
        if isinstance(connections, bool) or not isinstance(connections, int) or connections < 1:
            raise ValueError(f"connections must be a number from 1, not {connections!r}")
        if not poll_every > 0:
            raise ValueError(f"poll_every must be a number of seconds above 0, not {poll_every!r}")
        if not isinstance(database, str):
            check_engine(database)
        else:
            dsn = parse_dsn(database)
            if driver != "psycopg":  # by default too, lest it works on Trio alone
                dsn.check_for_asyncpg()
        self._dsn = database if isinstance(database, str) else ""
        self._engine = None if isinstance(database, str) else database
        self._own_engine: AsyncEngine | None = None
        self._schema = Schema(schema, prefix)
        self._connections = connections
        self._poll_every = poll_every
        self._guest = guest
        self._chosen = driver
        self._state: _Opened | None = None

    @property
    def guest(self) -> Guest:
        """Runs what is asyncio's, such as a session of SQLAlchemy, while the store is open."""
        return self._opened().guest

    async def migrate(self, *, role: str | None = None) -> None:
        """Make the schema's tables and functions, or bring them up to date; or do nothing.

        The store need not be open. Several may do it at once. It needs a role that may create a
        schema, or owns it; `role` is given the privileges that an application needs, which are to
        read and to append, but not to change or delete an event. `migration_sql` prints it.
        """
        async with AsyncExitStack() as stack:
            driver = await self._driver_now(stack)
            try:
                connection = await driver.connect()
                try:
                    await migrate(connection, self._schema, role)
                except BaseException:
                    connection.abandon()  # and with it, its transaction
                    raise
                await connection.close()
            except DriverError as error:
                raise storage_error(error) from error

    async def doctor(self, *, gap_stress: GapStress | None = None) -> Diagnosis:
        """What keeps this store from working, or may: a plain report, and what to do about it.

        The store need not be open, nor its schema be there. It changes nothing. What is wrong with
        the server, the network or the schema is reported, not raised.

        `gap_stress`, from `eventsource_anyio.testing.gap_stress`, is run too, if it is given: some
        seconds of appends by several processes, in a schema that it makes and drops.
        """
        if gap_stress is not None and not self._dsn:
            raise ValueError("gap_stress starts processes, which need a DSN; this has an engine")
        async with AsyncExitStack() as stack:
            driver = await self._driver_now(stack)
            found = await diagnose(driver, self._schema, self._connections, self._poll_every)
        return await stressed(found, gap_stress, self._dsn) if gap_stress else found

    @overload
    def transaction(self) -> PostgreSQLTransaction: ...
    @overload
    def transaction(self, *, within: AsyncSession | AsyncConnection) -> Transaction: ...
    def transaction(self, *, within: AsyncSession | AsyncConnection | None = None) -> Transaction:
        """As `EventStore.transaction`, and with SQL in it: see `PostgreSQLTransaction`.

        With `within`, everything is written into the transaction of that session or connection at
        the end of the block, and becomes real, or not, with what its owner does then: `results` are
        those of a commit. Let the block come last: until the commit, readers wait for its events. A
        subscription hears of them within `poll_every` seconds.
        """
        state = self._opened()
        if within is not None:
            return Transaction(self._write_within(within), self._look_ups())
        return PostgreSQLTransaction(
            self._write,
            self._look_ups(),
            self._write_in,
            state.guest,
            self._sql_engine,
            partial(state.tail.hint, state.pool),
        )

    @property
    def hints(self) -> Hints:
        return self._opened().tail.hints

    async def last_position(self) -> int:
        state = self._ready()
        try:
            return await state.tail.safe_position()
        except DriverError as error:
            raise storage_error(error) from error

    # Opening and closing ---------------------------------------------------------------------

    def _opened(self) -> _Opened:
        if self._state is None:
            raise StoreClosedError(type(self).__name__)
        return self._state

    def _ready(self) -> _Opened:
        """For what waits by itself, with the primitives of the loop that opened the store."""
        state = self._opened()
        if state.guest.inside:
            raise RuntimeError(
                "this call of the store is made inside guest.run(), on asyncio's side of Trio.\n"
                "  It would wait there for what belongs to Trio, and hang.\n"
                "  Call the store outside. Only `store.transaction(within=session)` goes inside."
            )
        return state

    def _driver(self, guest: Guest) -> Driver:
        if self._engine is not None:
            return AsyncpgDriver(guest, connect_by_engine(self._engine))
        if self._chosen == "psycopg" or (self._chosen is None and guest.pumps):
            try:
                from .libpq_driver import LibpqDriver

                return LibpqDriver(self._dsn)
            except ImportError:
                if self._chosen is not None:
                    raise
        return AsyncpgDriver(guest, connect_by_dsn(self._dsn))

    async def _driver_now(self, stack: AsyncExitStack) -> Driver:
        """For as long as the stack, whether the store is open or not."""
        guest = self._state.guest if self._state else self._guest
        if guest is None:
            guest = await stack.enter_async_context(_new_guest())
        return self._driver(guest)

    async def _open(self) -> None:
        if self._state is not None:
            raise RuntimeError(f"this {type(self).__name__} is open already")
        name = type(self).__name__
        async with AsyncExitStack() as stack:
            guest = self._guest or _new_guest()
            if guest is not self._guest:
                await stack.enter_async_context(guest)
            driver = self._driver(guest)
            pool = Pool(driver, self._connections, name)
            stack.push_async_callback(pool.close)
            statements = Statements(self._schema)
            try:
                channel = await check(pool, statements, self._schema)
            except DriverError as error:
                raise storage_error(error) from error
            signal = AppendSignal()
            tail = Tail(driver, pool, statements, signal, channel, self._poll_every)
            stack.push_async_callback(tail.close)
            lanes = [Lane(pool, statements, tail.hint) for _ in range(_LANES)]
            self._state = _Opened(stack.pop_all(), guest, pool, signal, tail, lanes, statements)

    async def _close(self) -> None:
        state, self._state = self._state, None
        if state is None:
            await cancel_shielded_checkpoint()
            return
        name = type(self).__name__
        state.signal.close(name)
        for lane in state.lanes:
            lane.close(name)
        engine, self._own_engine = self._own_engine, None
        with shielded_cleanup():
            if engine is not None:
                await state.guest.run(engine.dispose())
            await state.stack.aclose()

    # Writing ---------------------------------------------------------------------------------

    def _write(self, steps: Sequence[Step]) -> Awaitable[Sequence[AppendResult]]:
        if len(steps) == 1 and isinstance(steps[0], Append):
            append = steps[0]
            lanes = self._ready().lanes
            return lanes[hash((append.aggregate_type, append.aggregate_id)) % _LANES].append(append)
        return self._write_together(steps)

    async def _write_together(self, steps: Sequence[Step]) -> Sequence[AppendResult]:
        state = self._ready()
        await checkpoint_if_cancelled()
        writing = (state.pool, state.tail, state.statements)
        refused = 0
        while True:
            try:
                results = await write_at_once(*writing, steps, look=refused > 0)
            except DriverError as error:
                refused += 1
                if error.sqlstate != UNIQUE or refused > _TRIES:
                    raise storage_error(error, unknown=error.lost) from error
                results = None
            if results is not None:
                return results
            await anyio.sleep(_PAUSE * (0.5 + random()))  # noqa: S311  (no secret)

    async def _find_duplicate(self, appends: Sequence[Append]) -> None:
        """Raise `DuplicateEventError`, if it was an event id that was there already."""
        state = self._opened()
        for append in appends:
            ids = [event.event_id for event in append.events]
            stored = by_id(await self._fetch(state.statements.by_ids, ids))
            if stored:
                append.repeated(stored)

    async def _write_in(
        self, connection: AsyncConnection, steps: Sequence[Step]
    ) -> Sequence[AppendResult]:
        state = self._opened()
        try:
            fetch = fetch_in(state.guest, connection)
            results = await write_steps(fetch, state.statements, steps, wait=True)
        except DriverError as error:
            if error.sqlstate == UNIQUE and not state.guest.inside:
                await self._find_duplicate([step for step in steps if isinstance(step, Append)])
            raise storage_error(error) from error
        assert results is not None  # it waited
        return results

    def _write_within(self, target: AsyncSession | AsyncConnection) -> Write:
        state = self._opened()

        async def write(steps: Sequence[Step]) -> Sequence[AppendResult]:
            connection = await begun(state.guest, target)
            on_commit(connection, state.tail.look)
            if len(steps) == 1:
                return await self._write_in(connection, steps)
            async with savepoint(state.guest, connection):
                return await self._write_in(connection, steps)

        return write

    def _sql_engine(self) -> AsyncEngine:
        if self._engine is not None:
            return self._engine
        if self._own_engine is None:
            self._own_engine = engine_by_dsn(self._dsn, self._connections)
        return self._own_engine

    # Reading ---------------------------------------------------------------------------------

    async def _read(self, request: PageRequest) -> Page:
        state = self._ready()
        try:
            return await read_page(state.pool, state.tail, state.statements, request)
        except DriverError as error:
            raise storage_error(error) from error

    async def _wait(self, after: int) -> None:
        await self._ready().tail.wait(after)

    async def _fetch(self, statement: str, *values: object) -> Sequence[Row]:
        try:
            return await self._ready().pool.fetch(statement, *values)
        except DriverError as error:
            raise storage_error(error) from error

    async def _aggregate_types(self, aggregate_id: AggregateId) -> Sequence[str]:
        rows = await self._fetch(self._opened().statements.aggregate_types, str(aggregate_id))
        return [row[0] for row in rows]

    async def _checkpoint(self, name: str) -> int:
        rows = await self._fetch(self._opened().statements.checkpoint, name)
        return rows[0][0] if rows else 0

    async def _pending(self, limit: int, after: int) -> Sequence[StoredMessage]:
        rows = await self._fetch(self._opened().statements.pending, limit, after)
        return [decode_message(*row) for row in rows]

    async def _documents_by_key(self, collection: str, keys: Sequence[str]) -> Sequence[Document]:
        statement = self._opened().statements.documents_by_key
        rows = await self._fetch(statement, collection, list(keys))
        return [decode_document(collection, *row) for row in rows]

    async def _documents_after(self, collection: str, after: str, limit: int) -> Sequence[Document]:
        statement = self._opened().statements.documents_after
        rows = await self._fetch(statement, collection, after, limit)
        return [decode_document(collection, *row) for row in rows]


def _new_guest() -> Guest:
    from ...guest import Guest  # it imports asyncio, which a Trio program may do without

    return Guest()
