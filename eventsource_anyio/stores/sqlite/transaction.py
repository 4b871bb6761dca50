"""A transaction with the user's own SQL in it, by SQLAlchemy on the standard library's driver."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, cast

import anyio
from anyio.lowlevel import checkpoint_if_cancelled

from ..sql_transaction import SQLTransaction
from ..transaction import LookUps, Write
from .sql import SQLConnection, Turn

if TYPE_CHECKING:
    from sqlalchemy import Executable, Result
    from sqlalchemy.orm import Session

P = ParamSpec("P")
T = TypeVar("T")


class SQLiteTransaction(SQLTransaction):
    """SQL in it runs in a thread, on a connection of its own.

    From the first SQL to the end of the block it is the one writer that SQLite has: appends of this
    store and of other processes wait for it, and other transactions with SQL; reads go on. So keep
    it short. Append by its own `append_events`: the store's would wait for the end of the block
    that waits for it, so in the block's task it raises `RuntimeError`; do not wait inside for
    another task's either.

    Foreign keys are enforced. The tables `events`, `checkpoints`, `outbox` and `documents` are
    the store's.
    """

    __slots__ = ("_begun", "_calls", "_connection")

    def __init__(
        self, write: Write, look_ups: LookUps, connection: Callable[[], SQLConnection]
    ) -> None:
        super().__init__(write, look_ups)
        self._connection = connection
        self._begun: tuple[SQLConnection, Turn] | None = None
        self._calls = anyio.Lock()

    async def execute(self, statement: Executable, parameters: object = None) -> Result[Any]:
        return await self._run(partial(_execute, statement, parameters))

    async def run_sync(
        self, function: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        return await self._run(lambda session: function(session, *args, **kwargs))

    async def _run(self, work: Callable[[Session], T]) -> T:
        async with self._calls:
            self._check_open()
            connection, turn = self._begun or await self._begin()
            return await connection.run(turn, work)

    async def _begin(self) -> tuple[SQLConnection, Turn]:
        connection = self._connection()
        turn = await connection.begin()
        if not self._open:  # left by another task, while this one waited
            await connection.end(turn)
            self._check_open()
        self._begun = connection, turn
        return self._begun

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        followed = exc_type is None and self._is_followed()
        if followed:
            async with self._calls:
                try:
                    self._begun = self._begun or await self._begin()
                except BaseException:
                    self._open = False
                    raise
        if self._begun is None:
            await super().__aexit__(exc_type, exc, traceback)
            return
        self._open = False
        connection, turn = self._begun
        try:
            if exc_type is None:
                await checkpoint_if_cancelled()
                if followed:
                    results = await connection.write(turn, self._steps)
                    await connection.commit(turn, await self._follow(results))
                else:
                    results = await connection.commit(turn, self._steps)
                self._stored(results)
        finally:
            await connection.end(turn)


def _execute(statement: Executable, parameters: object, session: Session) -> Result[Any]:
    from sqlalchemy import CursorResult

    # As SQLAlchemy's AsyncSession has it: the ORM's rows are made now, not when they are asked for.
    options = {"prebuffer_rows": True}
    result = cast(
        "Result[Any]",
        session.execute(statement, cast("Any", parameters), execution_options=options),
    )
    if isinstance(result, CursorResult) and result.returns_rows:
        return result.freeze()()
    return result
