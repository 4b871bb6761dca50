"""The embedded store: one SQLite file, durable, shared between processes."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from anyio.lowlevel import cancel_shielded_checkpoint

from ...errors import StoreClosedError
from ...ids import AggregateId
from ..interface import AppendResult, EventStore, Page, PageRequest, Step, StoredMessage
from ..signal import AppendSignal
from .database import SQLiteDatabase, Synchronous, decode_rows
from .repositories import decode_messages, get_checkpoint, pending_rows
from .worker import Worker

if TYPE_CHECKING:
    from sqlite3 import Connection


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
        self._state: tuple[Worker, SQLiteDatabase, AppendSignal] | None = None

    def _opened(self) -> tuple[Worker, SQLiteDatabase, AppendSignal]:
        if self._state is None:
            raise StoreClosedError(type(self).__name__)
        return self._state

    async def _open(self) -> None:
        if self._state is not None:
            raise RuntimeError(f"this {type(self).__name__} is open already")
        database = SQLiteDatabase(self._path, self._synchronous)
        signal = AppendSignal()
        worker = Worker(
            database,
            signal,
            name=type(self).__name__,
            poll_every=self._poll_every,
        )
        self._state = (worker, database, signal)
        try:
            await worker.open()
        except BaseException:
            self._state = None
            raise
        signal.advance(database.position)

    async def _close(self) -> None:
        if self._state is None:
            await cancel_shielded_checkpoint()
            return
        worker, _, signal = self._state
        self._state = None
        signal.close(type(self).__name__)
        await worker.close()

    async def last_position(self) -> int:
        worker, database, _ = self._opened()

        def look(connection: Connection) -> int:
            database.look(connection)
            return database.position

        return await worker.read(look)

    def _write(self, steps: Sequence[Step]) -> Awaitable[Sequence[AppendResult]]:
        worker, _, _ = self._opened()
        return worker.write(steps)

    async def _read(self, request: PageRequest) -> Page:
        worker, database, _ = self._opened()
        rows, resume, at_end = await worker.read(
            lambda connection: database.page(connection, request), 1 + request.limit // 20
        )
        return Page(decode_rows(rows), resume, at_end)

    async def _wait(self, after: int) -> None:
        worker, _, signal = self._opened()
        await signal.wait(after, begun=worker.watch)

    async def _aggregate_types(self, aggregate_id: AggregateId) -> Sequence[str]:
        worker, database, _ = self._opened()
        return await worker.read(
            lambda connection: database.aggregate_types(connection, aggregate_id)
        )

    async def _checkpoint(self, name: str) -> int:
        worker, _, _ = self._opened()
        return await worker.read(lambda connection: get_checkpoint(connection, name))

    async def _pending(self, limit: int) -> Sequence[StoredMessage]:
        worker, _, _ = self._opened()
        rows = await worker.read(lambda connection: pending_rows(connection, limit))
        return decode_messages(rows)
