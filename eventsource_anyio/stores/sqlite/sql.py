"""The connection for the user's SQL, beside the worker's: opened with the first SQL, then kept.

- A *turn* is one transaction on it. There is one at a time; others wait in their order. It begins
  with `BEGIN IMMEDIATE`, after the worker has stopped to write, so that the two never contend.
- Every call runs in a thread of anyio's, under one lock, and is never abandoned. So what asyncio's
  own `Task.cancel()` leaves behind is waited for by what comes next; and as it may also begin late,
  it first looks whether its turn is over.
- A turn that was begun is ended by `end`, and what it still has to tell, told there: it comes after
  the commit and cannot be cancelled.
- Waiting for the lock of another process is trying again: it can be cancelled in between.
- SQLAlchemy neither begins nor commits; its session works inside a savepoint. So a session's
  `commit` commits nothing, and no statement of its is ever committed by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from math import inf
from threading import Lock, get_ident
from typing import TYPE_CHECKING, TypeVar

import anyio
from anyio import to_thread

from ...cleanup import shielded_cleanup
from ...errors import EventSourceError, StoreClosedError
from ..records import AppendResult, Step
from ..signal import AppendSignal
from .database import SQLiteDatabase
from .failures import is_locked, storage_error
from .worker import Worker

if TYPE_CHECKING:
    import sqlite3

    from sqlalchemy import Connection, Engine
    from sqlalchemy.orm import Session

T = TypeVar("T")

_PAUSE = 0.01


class Turn:
    """One transaction of the connection, and the task that began it."""

    __slots__ = ("connection", "ended", "position", "session", "task")

    def __init__(self) -> None:
        self.task = anyio.get_current_task().id
        self.ended = False
        self.position = 0
        self.connection: Connection | None = None
        self.session: Session | None = None


# Beside the task's id, which another task may have once this one has ended.
_own_turn: ContextVar[Turn | None] = ContextVar("_own_turn", default=None)


class SQLConnection:
    def __init__(
        self,
        database: Callable[[], SQLiteDatabase],
        worker: Worker,
        signal: AppendSignal,
        *,
        name: str,
    ) -> None:
        self._database = database
        self._worker = worker
        self._signal = signal
        self._name = name
        self._turns = anyio.Semaphore(1)
        self._turn: Turn | None = None
        self._closed = False
        self._limiter = anyio.CapacityLimiter(inf)  # nothing waits outside the lock
        self._lock = Lock()
        self._thread: int | None = None  # the one that may use the session now
        self._live: Turn | None = None  # the one whose session there is
        self._raw: sqlite3.Connection | None = None
        self._engine: Engine | None = None

    def refuse_to_wait_for_itself(self) -> None:
        """Raise in a task whose own turn it is: what it is about to wait for would never come."""
        turn = self._turn
        if turn is None or _own_turn.get() is not turn:
            return
        if anyio.get_current_task().id == turn.task:
            raise RuntimeError(
                "this task is inside a transaction with SQL, which is the one writer that SQLite "
                "has, so the call would wait for itself. Inside the block use the transaction: "
                "`tx.append_events(…)`, `tx.checkpoints`, `tx.outbox`, `tx.documents`."
            )

    async def begin(self) -> Turn:
        self.refuse_to_wait_for_itself()
        await self._turns.acquire()
        turn = self._turn = Turn()
        try:
            await self._worker.pause_writes()
            while not await self._in_thread(partial(self._begin, turn)):  # noqa: ASYNC110
                await anyio.sleep(_PAUSE)
        except BaseException:
            await self.end(turn)
            raise
        _own_turn.set(turn)
        return turn

    async def run(self, turn: Turn, work: Callable[[Session], T]) -> T:
        return await self._in_thread(partial(self._run, turn, work))

    async def write(self, turn: Turn, steps: Sequence[Step]) -> Sequence[AppendResult]:
        """All but the commit; SQL may follow."""
        return await self._in_thread(partial(self._write_first, turn, steps))

    async def commit(self, turn: Turn, steps: Sequence[Step]) -> Sequence[AppendResult]:
        with shielded_cleanup():
            return await self._in_thread(partial(self._commit, turn, steps))
        raise AssertionError("a thread is not abandoned")

    async def end(self, turn: Turn) -> None:
        """Roll back what was not committed; the next may come."""
        try:
            if not turn.ended:
                with shielded_cleanup():
                    await self._in_thread(partial(self._roll_back, turn))
        finally:
            self._release(turn)

    async def close(self) -> None:
        """Let the call at hand finish, roll back, close the connection; who waits is refused.

        Writes that were held back are for the worker to refuse, which is to be closed next.
        """
        self._closed = True
        turn = self._turn
        if turn is not None or self._raw is not None:
            with shielded_cleanup():
                await self._in_thread(partial(self._shut, turn))
        if turn is not None:
            self._release(turn)

    def _release(self, turn: Turn) -> None:
        if self._turn is turn:
            self._turn = None
            self._signal.advance(turn.position)
            if not self._closed:
                self._worker.resume_writes()
            self._turns.release()

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await to_thread.run_sync(call, limiter=self._limiter)

    # In a thread -----------------------------------------------------------------------------

    def _begin(self, turn: Turn) -> bool:
        """False if another process has the lock."""
        from sqlite3 import Error

        with self._lock:
            if turn.ended or self._closed:
                raise StoreClosedError(self._name)
            if self._live is not None:  # its end, left behind, comes later
                self._let_go(self._live)
            try:
                raw, engine = self._connected()
                raw.execute("BEGIN IMMEDIATE")
            except Error as error:
                if is_locked(error):
                    return False
                raise storage_error(error) from error
            from sqlalchemy.orm import Session

            self._live = turn
            turn.connection = engine.connect()
            turn.connection.begin()
            turn.session = Session(
                turn.connection, join_transaction_mode="create_savepoint", expire_on_commit=False
            )
            return True

    def _connected(self) -> tuple[sqlite3.Connection, Engine]:
        try:
            from sqlalchemy import create_engine, event
            from sqlalchemy.pool import StaticPool
        except ImportError as error:
            raise ImportError(
                f"sqlalchemy is not installed, which the SQL in a transaction of {self._name} "
                "needs. It comes with an extra: pip install 'eventsource-anyio[sqlalchemy]'"
            ) from error
        raw = self._raw
        if raw is None:
            raw = self._database().connect(one_thread=False)
            raw.execute("PRAGMA foreign_keys = ON")
            self._raw = raw
        if self._engine is None:
            engine = create_engine(
                "sqlite+pysqlite://",
                creator=lambda: raw,
                poolclass=StaticPool,
                pool_reset_on_return=None,
            )
            engine.connect().close()  # it asks some things of its first connection
            event.listen(engine, "before_cursor_execute", self._check)
            event.listen(engine, "commit", _refuse_to_commit)
            self._engine = engine
        return raw, self._engine

    def _run(self, turn: Turn, work: Callable[[Session], T]) -> T:
        with self._session(turn) as session:
            return work(session)

    def _commit(self, turn: Turn, steps: Sequence[Step]) -> Sequence[AppendResult]:
        with self._session(turn) as session:
            try:
                session.commit()
                self._check()
                outcome, position = self._write(steps)
                self._end(turn, position)
                return outcome
            finally:
                self._let_go(turn)

    def _write_first(self, turn: Turn, steps: Sequence[Step]) -> Sequence[AppendResult]:
        with self._session(turn) as session:
            # It ends the session's savepoint: what is rolled back in a later one is SQL alone.
            session.commit()
            self._check()
            return self._write(steps)[0]

    def _write(self, steps: Sequence[Step]) -> tuple[Sequence[AppendResult], int]:
        assert self._raw is not None
        # Nothing that another one knows holds here: the user's SQL may have changed anything.
        database = self._database()
        try:
            database.begun(self._raw)
            (outcome,) = database.write(self._raw, [steps])
        except Exception as error:
            raise storage_error(error) from error
        if isinstance(outcome, EventSourceError):
            raise outcome
        return outcome, database.position

    def _end(self, turn: Turn, position: int) -> None:
        from sqlite3 import IntegrityError

        assert self._raw is not None
        try:
            self._raw.execute("COMMIT")
        except IntegrityError as error:  # a deferred constraint, which none of the store's is
            from sqlalchemy import exc

            raise exc.IntegrityError("COMMIT", None, error) from error
        except Exception as error:
            raise storage_error(error) from error
        turn.position = position

    def _roll_back(self, turn: Turn) -> None:
        with self._lock:
            self._let_go(turn)

    def _shut(self, turn: Turn | None) -> None:
        with self._lock:
            if turn is not None:
                self._let_go(turn)
            if self._engine is not None:
                self._engine.dispose()
            if self._raw is not None:
                self._raw.close()

    def _let_go(self, turn: Turn) -> None:
        turn.ended = True
        if self._live is not turn:
            return
        self._live = None
        # First of all, so that SQLAlchemy, where it rolls back, finds nothing left to do.
        if self._raw is not None and self._raw.in_transaction:
            self._raw.execute("ROLLBACK")
        connection, session = turn.connection, turn.session
        turn.connection = turn.session = None
        if connection is not None:
            connection.close()
        if session is not None:
            session.close()

    @contextmanager
    def _session(self, turn: Turn) -> Generator[Session]:
        with self._lock:
            if turn.session is None or self._closed:
                raise StoreClosedError(self._name)
            self._thread = get_ident()
            try:
                yield turn.session
            finally:
                self._thread = None

    def _check(self, *_: object) -> None:
        """Before each statement of SQLAlchemy."""
        if self._thread != get_ident():
            raise RuntimeError(
                "SQL outside of `execute` and `run_sync`, which would block the event loop: an "
                "attribute that is loaded when it is first used? Load it inside, or with the "
                "statement (`selectinload`)."
            )
        if self._raw is None or not self._raw.in_transaction:
            raise RuntimeError(
                "the transaction has ended inside its block: by a ROLLBACK or COMMIT in its SQL, "
                "or by SQLite, because of ON CONFLICT ROLLBACK or a disk that failed. Let the "
                "error of a statement leave the block."
            )


def _refuse_to_commit(_: object) -> None:
    raise RuntimeError("the end of the block commits: leave out `connection.commit()`")
