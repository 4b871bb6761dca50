"""A transaction with the user's own SQL in it, by SQLAlchemy; and one inside the user's own.

- It begins with the first SQL; without any it is the steps alone.
- The steps are written at the end, after the user's SQL, so that no reader waits for the user: but
  for what follows from the appends (`on_append`), which comes between them and the commit.
- What ends it is shielded, and nothing that can be cancelled comes after the commit: if a
  cancellation comes out of the block, nothing was stored.
- Our statements run through `exec_driver_sql`: SQLAlchemy begins a transaction with its first
  statement, and one sent past it would be committed by itself.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeAlias, TypeVar, cast

from ...cleanup import shielded_cleanup
from ...errors import EventSourceError
from ..records import AppendResult, Step
from ..sql_transaction import SQLTransaction
from ..transaction import LookUps, Write
from .asyncpg_driver import RawConnection, translated
from .driver import DriverError, Fetch, Row
from .failures import storage_error

if TYPE_CHECKING:
    from sqlalchemy import Executable, Result
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
    from sqlalchemy.orm import Session

    from ...guest import Guest

P = ParamSpec("P")
T = TypeVar("T")
WriteIn: TypeAlias = Callable[
    ["AsyncConnection", Sequence[Step]], Awaitable[Sequence[AppendResult]]
]


class PostgreSQLTransaction(SQLTransaction):
    """SQL in it runs on a connection of the store's engine.

    `session` is SQLAlchemy's own. On asyncio it is used as ever, but for its `commit`, `rollback`
    and `close`, which are this block's to call. On Trio use `execute` and `run_sync`, which work on
    both, or the session inside `store.guest.run(…)`.
    """

    __slots__ = ("_committed", "_engine", "_guest", "_session", "_write_in")

    def __init__(
        self,
        write: Write,
        look_ups: LookUps,
        write_in: WriteIn,
        guest: Guest,
        engine: Callable[[], AsyncEngine],
        committed: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(write, look_ups)
        self._write_in = write_in
        self._guest = guest
        self._engine = engine
        self._committed = committed
        self._session: AsyncSession | None = None

    @property
    def session(self) -> AsyncSession:
        """The session of this transaction; its connection is taken when it is first used."""
        self._check_open()
        if self._session is None:
            from sqlalchemy.ext.asyncio import AsyncSession

            self._session = AsyncSession(self._engine(), expire_on_commit=False)
        return self._session

    async def execute(self, statement: Executable, parameters: object = None) -> Result[Any]:
        execute = self.session.execute(statement, cast("Any", parameters))
        return cast("Result[Any]", await self._guest.run(execute))

    async def run_sync(
        self, function: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        return await self._guest.run(self.session.run_sync(function, *args, **kwargs))

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._session is None and (exc_type is not None or not self._is_followed()):
            await super().__aexit__(exc_type, exc, traceback)
            return
        session = self.session
        self._open = False
        try:
            if exc_type is None:
                await self._finish(session)
        finally:
            await _close(self._guest, session)

    async def _finish(self, session: AsyncSession) -> None:
        await self._guest.run(session.flush())
        results: Sequence[AppendResult] = ()
        if self._steps:
            connection = await begun(self._guest, session)
            results = await self._write_in(connection, self._steps)
            if self._is_followed():
                steps = await self._follow(results)
                await self._guest.run(session.flush())
                if steps:
                    await self._write_in(connection, steps)
        with shielded_cleanup() as scope:
            await _commit(self._guest, session)
            if results:
                await self._committed()
        if scope.cancelled_caught:
            lost = DriverError("there was no answer to COMMIT in time", lost=True)
            raise storage_error(lost, unknown=True)
        self._stored(results)


async def _close(guest: Guest, session: AsyncSession) -> None:
    from sqlalchemy.exc import DBAPIError

    # What cannot be rolled back because its connection is gone, the server rolls back.
    with shielded_cleanup(), suppress(DBAPIError):
        await guest.run(session.close())


async def _commit(guest: Guest, session: AsyncSession) -> None:
    from sqlalchemy.exc import DBAPIError, IntegrityError

    try:
        await guest.run(session.commit())
    except IntegrityError:
        raise  # a deferred constraint, which none of the store's is
    except DBAPIError as error:
        failure = translated(error, lost=error.connection_invalidated)
        raise storage_error(failure, unknown=failure.lost) from error


def fetch_in(guest: Guest, connection: AsyncConnection) -> Fetch:
    """Our statements, in the transaction of a connection of SQLAlchemy."""
    from sqlalchemy.exc import DBAPIError

    async def fetch(statement: str, *values: object) -> Sequence[Row]:
        try:
            result = await guest.run(connection.exec_driver_sql(statement, values))
        except DBAPIError as error:
            raise translated(error, lost=error.connection_invalidated) from error
        return cast("Sequence[Row]", result.fetchall()) if result.returns_rows else ()

    return fetch


async def begun(guest: Guest, target: AsyncSession | AsyncConnection) -> AsyncConnection:
    """The connection of the user's transaction, which has begun on the server too."""
    from sqlalchemy.ext.asyncio import AsyncConnection

    connection = (
        target if isinstance(target, AsyncConnection) else await guest.run(target.connection())
    )
    pooled = await guest.run(connection.get_raw_connection())
    raw = cast("RawConnection", pooled.driver_connection)
    if not hasattr(raw, "is_in_transaction"):
        raise TypeError(
            f"the connection is {type(raw).__module__}'s; a store appends inside transactions of "
            "asyncpg: create_async_engine('postgresql+asyncpg://…')"
        )
    if not raw.is_in_transaction():
        await guest.run(connection.exec_driver_sql("SELECT 1"))
    if not raw.is_in_transaction():
        raise ValueError(
            "the connection commits each statement by itself (isolation_level='AUTOCOMMIT'), so "
            "there is no transaction to append in. Begin one, or use store.transaction()."
        )
    return connection


@asynccontextmanager
async def savepoint(guest: Guest, connection: AsyncConnection) -> AsyncGenerator[None]:
    """All of the block or nothing, in a transaction whose owner may go on after an error."""
    fetch = fetch_in(guest, connection)
    try:
        await fetch("SAVEPOINT eventsource")
        try:
            yield
        except EventSourceError:
            with suppress(DriverError):  # the first error says what it was
                await fetch("ROLLBACK TO SAVEPOINT eventsource")
            raise
        await fetch("RELEASE SAVEPOINT eventsource")
    except DriverError as error:
        raise storage_error(error) from error


def on_commit(connection: AsyncConnection, call: Callable[[], None]) -> None:
    """Call it once, when the transaction is about to be committed."""
    from sqlalchemy import event

    def committing(_: object) -> None:
        call()

    event.listen(connection.sync_connection, "commit", committing, once=True)
