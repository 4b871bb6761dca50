"""The embedded store: one SQLite file, durable, shared between processes."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from anyio.lowlevel import cancel_shielded_checkpoint
from attrs import frozen

from ...errors import StoreClosedError
from ...ids import AggregateId
from ..interface import AppendResult, Document, EventStore, Page, PageRequest, Step, StoredMessage
from ..signal import AppendSignal
from .database import SQLiteDatabase, Synchronous, decode_rows
from .repositories import (
    decode_documents,
    decode_messages,
    documents_after,
    documents_by_key,
    get_checkpoint,
    pending_rows,
)
from .sql import SQLConnection
from .transaction import SQLiteTransaction
from .worker import Worker

if TYPE_CHECKING:
    from sqlite3 import Connection


@frozen
class _Opened:
    """What there is while the store is open."""

    worker: Worker
    database: SQLiteDatabase
    signal: AppendSignal
    sql: SQLConnection


class SQLiteEventStore(EventStore):
    """Events in one SQLite file in WAL mode; made if it is not there.

    `synchronous` is SQLite's: with `FULL` an append that returned survives a power cut, with
    `NORMAL` only the end of the process. Appends that are made concurrently share one commit.

    Any number of processes on one machine may use the file (not over a network file system). An
    append waits for a lock of another one as long as the caller lets it; a subscription looks for
    the events of other processes every `poll_every` seconds, on the store's own thread, and gets
    those of its own store at once.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        synchronous: Synchronous = "FULL",
        poll_every: float = 0.05,
    ) -> None:
        if str(path) == ":memory:" or not str(path):
            raise ValueError("the path must be a file; InMemoryEventStore keeps events in memory")
        if synchronous not in get_args(Synchronous):
            raise ValueError(f"synchronous must be 'FULL' or 'NORMAL', not {synchronous!r}")
        if not poll_every > 0:
            raise ValueError(f"poll_every must be a number of seconds above 0, not {poll_every!r}")
        self._path = Path(path)
        self._synchronous: Synchronous = synchronous
        self._poll_every = poll_every
        self._state: _Opened | None = None

    def transaction(self) -> SQLiteTransaction:
        """As `EventStore.transaction`, and with SQL in it: see `SQLiteTransaction`."""
        return SQLiteTransaction(self._write, self._look_ups(), lambda: self._opened().sql)

    def _opened(self) -> _Opened:
        if self._state is None:
            raise StoreClosedError(type(self).__name__)
        return self._state

    async def _open(self) -> None:
        if self._state is not None:
            raise RuntimeError(f"this {type(self).__name__} is open already")
        name = type(self).__name__
        new_database = partial(SQLiteDatabase, self._path, self._synchronous)
        database, signal = new_database(), AppendSignal()
        worker = Worker(database, signal, name=name, poll_every=self._poll_every)
        sql = SQLConnection(new_database, worker, signal, name=name)
        self._state = _Opened(worker, database, signal, sql)
        try:
            await worker.open()
        except BaseException:
            self._state = None
            raise
        signal.advance(database.position)

    async def _close(self) -> None:
        state, self._state = self._state, None
        if state is None:
            await cancel_shielded_checkpoint()
            return
        state.signal.close(type(self).__name__)
        await state.sql.close()
        await state.worker.close()

    async def last_position(self) -> int:
        state = self._opened()

        def look(connection: Connection) -> int:
            state.database.look(connection)
            return state.database.position

        return await state.worker.read(look)

    def _write(self, steps: Sequence[Step]) -> Awaitable[Sequence[AppendResult]]:
        state = self._opened()
        state.sql.refuse_to_wait_for_itself()
        return state.worker.write(steps)

    async def _read(self, request: PageRequest) -> Page:
        state = self._opened()
        rows, resume, at_end = await state.worker.read(
            lambda connection: state.database.page(connection, request), 1 + request.limit // 20
        )
        return Page(decode_rows(rows), resume, at_end)

    async def _wait(self, after: int) -> None:
        state = self._opened()
        await state.signal.wait(after, begun=state.worker.watch)

    async def _aggregate_types(self, aggregate_id: AggregateId) -> Sequence[str]:
        state = self._opened()
        return await state.worker.read(
            lambda connection: state.database.aggregate_types(connection, aggregate_id)
        )

    async def _checkpoint(self, name: str) -> int:
        worker = self._opened().worker
        return await worker.read(lambda connection: get_checkpoint(connection, name))

    async def _pending(self, limit: int, after: int) -> Sequence[StoredMessage]:
        worker = self._opened().worker
        rows = await worker.read(lambda connection: pending_rows(connection, limit, after))
        return decode_messages(rows)

    async def _documents_by_key(self, collection: str, keys: Sequence[str]) -> Sequence[Document]:
        rows = await self._opened().worker.read(
            lambda connection: documents_by_key(connection, collection, keys), 1 + len(keys) // 20
        )
        return decode_documents(collection, rows)

    async def _documents_after(self, collection: str, after: str, limit: int) -> Sequence[Document]:
        rows = await self._opened().worker.read(
            lambda connection: documents_after(connection, collection, after, limit),
            1 + limit // 20,
        )
        return decode_documents(collection, rows)
