"""The store for production: PostgreSQL, with any number of processes."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from random import random
from typing import TYPE_CHECKING, overload

import anyio
from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint_if_cancelled
from attrs import frozen

from ...cleanup import shielded_cleanup
from ...errors import StoreClosedError
from ...ids import AggregateId
from ...repositories.outbox import StoredMessage, decode_message
from ..interface import Append, AppendResult, EventStore, Page, PageRequest, Step
from ..signal import AppendSignal
from ..transaction import Transaction, Write
from .asyncpg_driver import AsyncpgDriver, connect_by_dsn, connect_by_engine, engine_by_dsn
from .driver import Driver, DriverError, Row
from .failures import storage_error
from .group_commit import UNIQUE, Lane
from .migrating import check, migrate
from .pool import Pool
from .schema import Schema
from .statements import LARGEST, Statements, by_id, decode_rows
from .tail import Tail
from .transaction import PostgreSQLTransaction, begun, fetch_in, on_commit
from .writing import append_at_once, outcome, write_at_once, write_steps

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

    from ...guest import Guest

_LANES = 2
_PAUSE = 0.01


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
    that listens, as long as somebody subscribes. They are opened when they are needed. Transactions
    with SQL in them take theirs from the engine.

    A subscription gets to know of appends by notifications, and where one is lost, it looks every
    `poll_every` seconds. The database's time limits, such as `statement_timeout`, hold.

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
    ) -> None:
        if isinstance(connections, bool) or not isinstance(connections, int) or connections < 1:
            raise ValueError(f"connections must be a number from 1, not {connections!r}")
        if not poll_every > 0:
            raise ValueError(f"poll_every must be a number of seconds above 0, not {poll_every!r}")
        self._dsn = database if isinstance(database, str) else ""
        self._engine = None if isinstance(database, str) else database
        self._own_engine: AsyncEngine | None = None
        self._schema = Schema(schema, prefix)
        self._connections = connections
        self._poll_every = poll_every
        self._guest = guest
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
            guest = self._state.guest if self._state else self._guest or _new_guest()
            if self._state is None and guest is not self._guest:
                await stack.enter_async_context(guest)
            driver = self._driver(guest)
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
            return Transaction(self._write_within(within), self._checkpoint, self._pending)
        return PostgreSQLTransaction(
            self._write,
            self._checkpoint,
            self._pending,
            self._write_in,
            state.guest,
            self._sql_engine,
            partial(state.tail.hint, state.pool),
        )

    async def last_position(self) -> int:
        state = self._opened()
        try:
            return await state.tail.safe_position()
        except DriverError as error:
            raise storage_error(error) from error

    # Opening and closing ---------------------------------------------------------------------

    def _opened(self) -> _Opened:
        if self._state is None:
            raise StoreClosedError(type(self).__name__)
        return self._state

    def _driver(self, guest: Guest) -> Driver:
        if self._engine is not None:
            return AsyncpgDriver(guest, connect_by_engine(self._engine))
        return AsyncpgDriver(guest, connect_by_dsn(self._dsn))

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
            return self._append(steps[0])
        return self._write_together(steps)

    async def _append(self, append: Append) -> Sequence[AppendResult]:
        state = self._opened()
        lane = state.lanes[hash((append.aggregate_type, append.aggregate_id)) % _LANES]
        while True:
            answer = await lane.append(append)
            try:
                result = await outcome(state.pool.fetch, state.statements, append, answer)
            except DriverError as error:
                raise storage_error(error) from error
            if result is not None:
                return (result,)
            await anyio.sleep(_PAUSE)

    async def _write_together(self, steps: Sequence[Step]) -> Sequence[AppendResult]:
        state = self._opened()
        await checkpoint_if_cancelled()
        appends = [step for step in steps if isinstance(step, Append)]
        writing = (state.pool, state.tail, state.statements)
        while True:
            try:
                if len(appends) == len(steps):
                    results = await append_at_once(*writing, appends)
                else:
                    results = await write_at_once(*writing, steps)
            except DriverError as error:
                if error.sqlstate != UNIQUE or not appends:
                    raise storage_error(error, unknown=error.lost) from error
                await self._find_duplicate(appends)
                results = None
            if results is not None:
                return results
            await anyio.sleep(_PAUSE * (0.5 + random()))  # noqa: S311  (no secret)

    async def _find_duplicate(self, appends: Sequence[Append]) -> None:
        """Raise `DuplicateEventError`, if it was an event id that was there already."""
        state = self._opened()
        for append in appends:
            ids = [event.event_id for event in append.events]
            stored = by_id(await state.pool.fetch(state.statements.by_ids, ids))
            if stored:
                append.repeated(stored)

    async def _write_in(
        self, connection: AsyncConnection, steps: Sequence[Step]
    ) -> Sequence[AppendResult]:
        state = self._opened()
        try:
            return await write_steps(fetch_in(state.guest, connection), state.statements, steps)
        except DriverError as error:
            if error.sqlstate == UNIQUE:
                await self._find_duplicate([step for step in steps if isinstance(step, Append)])
            raise storage_error(error) from error

    def _write_within(self, target: AsyncSession | AsyncConnection) -> Write:
        state = self._opened()

        async def write(steps: Sequence[Step]) -> Sequence[AppendResult]:
            connection = await begun(state.guest, target)
            on_commit(connection, state.tail.look)
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
        state = self._opened()
        try:
            if request.stream is not None:
                return await self._stream_page(state, request)
            return await self._page(state, request)
        except DriverError as error:
            raise storage_error(error) from error

    async def _stream_page(self, state: _Opened, request: PageRequest) -> Page:
        low, high = _bounds(request)
        statement, values = state.statements.page(request, low, high)
        rows = await state.pool.fetch(statement, *values)
        if len(rows) < request.limit:
            return Page(decode_rows(rows), 0, at_end=True)
        resume = rows[-1][1] + (-1 if request.backwards else 1)
        return Page(decode_rows(rows), resume, at_end=False)

    async def _page(self, state: _Opened, request: PageRequest) -> Page:
        low, high = _bounds(request)
        safe = state.signal.position
        # What is known to be safe stays so: the server is asked only for what may be beyond.
        asked = low > safe or (request.backwards and high > safe)
        if asked:
            safe = await state.tail.safe_position()
        known, high = high <= safe, min(high, safe)
        rows: Sequence[Row] = []
        if low <= high:
            statement, values = state.statements.page(request, low, high)
            rows = await state.pool.fetch(statement, *values)
        if len(rows) == request.limit:
            resume = rows[-1][0] + (-1 if request.backwards else 1)
            return Page(decode_rows(rows), resume, at_end=False)
        if request.backwards:
            return Page(decode_rows(rows), low - 1, at_end=True)
        return Page(decode_rows(rows), max(low, high + 1), at_end=asked or known)

    async def _wait(self, after: int) -> None:
        await self._opened().tail.wait(after)

    async def _fetch(self, statement: str, *values: object) -> Sequence[Row]:
        try:
            return await self._opened().pool.fetch(statement, *values)
        except DriverError as error:
            raise storage_error(error) from error

    async def _aggregate_types(self, aggregate_id: AggregateId) -> Sequence[str]:
        rows = await self._fetch(self._opened().statements.aggregate_types, str(aggregate_id))
        return [row[0] for row in rows]

    async def _checkpoint(self, name: str) -> int:
        rows = await self._fetch(self._opened().statements.checkpoint, name)
        return rows[0][0] if rows else 0

    async def _pending(self, limit: int) -> Sequence[StoredMessage]:
        rows = await self._fetch(self._opened().statements.pending, limit)
        return [decode_message(*row) for row in rows]


def _bounds(request: PageRequest) -> tuple[int, int]:
    low, high = request.start, request.stop
    if request.backwards:
        low, high = high, low
    return min(low or 0, LARGEST), LARGEST if high is None else min(high, LARGEST)


def _new_guest() -> Guest:
    from ...guest import Guest  # it imports asyncio, which a Trio program may do without

    return Guest()
