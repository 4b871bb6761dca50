"""One SQLite connection on one thread, which runs a batch of jobs a hop.

- The queue lives on the event loop, so it needs no lock, and a caller that is cancelled before its
  job was handed over takes it out again. The thread has one batch at a time; while it works, the
  next batch gathers. So there is no timer: a lone job goes at once.
- The write jobs of a batch share one transaction, each with its own result or error; reads run
  after it. A job that failed has changed nothing.
- A write that was handed over is finished, and its caller's outcome is what happened: if the caller
  is cancelled and it was stored, the result is returned.
- A job that finds the database locked by another process goes into the next batch, so waiting for a
  lock is waiting in the queue: it can be cancelled, and reads overtake it.
- While the store's other connection is the one that writes, writes are held back: they would only
  wait for its lock on the thread, and reads with them.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Generic, TypeVar, cast

import anyio
from anyio import from_thread
from anyio.lowlevel import checkpoint_if_cancelled, current_token

from ...cleanup import shielded_cleanup
from ...errors import EventSourceError, StorageError, StoreClosedError
from ..records import Append, AppendResult
from ..signal import AppendSignal
from .database import SQLiteDatabase, Unit
from .failures import is_locked, storage_error

if TYPE_CHECKING:
    from sqlite3 import Connection

_COST_AT_MOST = 500
_REOPEN_AFTER = 0.01

T = TypeVar("T")


class _Batch:
    """Jobs that are handed over together. Those who made them wait for one event."""

    __slots__ = ("cost", "done", "handed_over", "jobs")

    def __init__(self) -> None:
        self.jobs: list[_Job[object]] = []
        self.cost = 0
        self.handed_over = False
        self.done = anyio.Event()


class _Job(Generic[T]):
    """A read, which is a function, or a write, which is a unit of steps."""

    __slots__ = ("batch", "error", "settled", "value", "withdrawn", "work")

    def __init__(self, work: Callable[[Connection], T] | Unit, batch: _Batch) -> None:
        self.work = work
        self.batch = batch
        self.settled = False
        self.withdrawn = False
        self.value: T | None = None
        self.error: BaseException | None = None


class Worker:
    """Runs functions of a connection on its own thread, in batches.

    It tells the signal, on the event loop, of the last position after every batch; and while
    anybody waits for the signal, it looks every `poll_every` seconds for other processes' events.
    """

    def __init__(
        self,
        database: SQLiteDatabase,
        signal: AppendSignal,
        *,
        name: str,
        poll_every: float,
    ) -> None:
        self._database = database
        self._signal = signal
        self._name = name
        self._poll_every = poll_every
        self._waiting: deque[_Batch] = deque()
        self._batches: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        self._at_hand: _Batch | None = None
        self._held_back: deque[_Batch] | None = None  # None: writes are not paused
        self._watching = False
        self._open = False
        self._stopped = anyio.Event()
        self._token = current_token()

    async def open(self) -> None:
        """Start the thread and connect; a database that is locked is tried again."""
        while not self._open:
            connecting = _Batch()
            failures: list[BaseException] = []
            thread = threading.Thread(
                target=self._main, args=(connecting, failures), name=self._name, daemon=True
            )
            thread.start()
            try:
                await connecting.done.wait()
            except BaseException:
                self._batches.put(None)
                with shielded_cleanup():
                    await connecting.done.wait()
                    if not failures:
                        await self._stopped.wait()
                raise
            if not failures:
                self._open = True
            elif is_locked(failures[0]):
                await anyio.sleep(_REOPEN_AFTER)  # SQLite itself does not wait for every lock
            else:
                raise failures[0]

    async def close(self) -> None:
        """Let the batch at hand finish, refuse what waits, close the connection."""
        if not self._open:
            return
        self._open = False
        self._batches.put(None)
        for batch in (*self._waiting, *(self._held_back or ())):
            self._refuse(batch.jobs)
            batch.done.set()
        self._waiting.clear()
        self._held_back = None
        with shielded_cleanup():
            await self._stopped.wait()

    async def read(self, run: Callable[[Connection], T], cost: int = 1) -> T:
        job = self._submit(run, cost)
        try:
            while not job.settled:  # a locked database puts it into one batch after another
                await job.batch.done.wait()
        finally:
            job.withdrawn = True
        return _outcome(job)

    async def write(self, unit: Unit) -> list[AppendResult]:
        """Store the unit inside the batch's transaction."""
        await checkpoint_if_cancelled()
        cost = 0
        for step in unit:
            cost += len(step.events) if type(step) is Append else 1
        job: _Job[list[AppendResult]] = self._submit(unit, cost)
        try:
            while not job.settled:
                await job.batch.done.wait()
        except BaseException as error:
            job.withdrawn = True
            if not job.batch.handed_over:
                raise
            with anyio.CancelScope(shield=True):
                while not job.settled:
                    await job.batch.done.wait()
            cancelled = isinstance(error, anyio.get_cancelled_exc_class())
            scope_cancelled = anyio.current_effective_deadline() == -inf
            if job.error is not None or not (cancelled and scope_cancelled):
                raise
            # It was stored, so that is the outcome, as if it had been shielded (a shield around
            # every append costs as much as all of its waiting). The scope that was cancelled
            # still is, and raises at the next checkpoint.
        return _outcome(job)

    async def pause_writes(self) -> None:
        """Hold writes back until `resume_writes`, and return once none is at work.

        What raises out of it, a cancellation, leaves them paused all the same.
        """
        if self._held_back is None:  # a closing store does not resume them between two turns
            self._held_back = deque()
        if self._at_hand is not None:
            await self._at_hand.done.wait()

    def resume_writes(self) -> None:
        held_back, self._held_back = self._held_back, None
        self._waiting.extend(held_back or ())
        if self._at_hand is None:
            self._hand_over()

    def watch(self) -> None:
        """Somebody has begun to wait for other processes: wake the thread up to look for them."""
        if not self._watching:
            self._watching = True
            self._batches.put(None)

    # On the event loop -----------------------------------------------------------------------

    def _submit(self, work: Callable[[Connection], T] | Unit, cost: int) -> _Job[T]:
        if not self._open:
            raise StoreClosedError(self._name)
        if not self._waiting or self._waiting[-1].cost >= _COST_AT_MOST:
            self._waiting.append(_Batch())
        batch = self._waiting[-1]
        job = _Job(work, batch)
        batch.jobs.append(cast("_Job[object]", job))
        batch.cost += cost
        if self._at_hand is None:
            self._hand_over()
        return job

    def _hand_over(self) -> None:
        self._at_hand = None
        while self._waiting and self._at_hand is None:
            batch = self._waiting.popleft()
            batch.jobs = [job for job in batch.jobs if not job.withdrawn]
            if self._held_back is not None:
                _move_writes(batch, self._held_back)
            if batch.jobs:
                batch.handed_over = True
                self._at_hand = batch
                self._batches.put(batch)
            else:
                batch.done.set()

    def _finished(self, batch: _Batch, position: int) -> None:
        self._signal.advance(position)
        locked: list[_Job[object]] = []
        for job in batch.jobs:
            if is_locked(job.error) and not job.withdrawn:
                locked.append(job)
            else:
                job.settled = True
        if locked:
            self._try_again(locked)
        batch.jobs = []  # they know their batch; without the circle they need no garbage collector
        self._hand_over()
        batch.done.set()

    def _try_again(self, jobs: list[_Job[object]]) -> None:
        if not self._open:
            self._refuse(jobs)
            return
        if not self._waiting:
            self._waiting.append(_Batch())
        again = self._waiting[0]
        again.jobs[:0] = jobs
        for job in jobs:
            job.batch = again
            job.error = None

    def _refuse(self, jobs: Sequence[_Job[object]]) -> None:
        for job in jobs:
            job.error = StoreClosedError(self._name)
            job.settled = True

    # On the thread ---------------------------------------------------------------------------

    def _main(self, connecting: _Batch, failures: list[BaseException]) -> None:
        try:
            try:
                connection = self._database.connect()
            except BaseException as error:  # noqa: BLE001  (raised where it was opened)
                failures.append(error)
                from_thread.run_sync(connecting.done.set, token=self._token)
                return
            try:
                from_thread.run_sync(connecting.done.set, token=self._token)
                self._serve(connection)
            finally:
                connection.close()
                from_thread.run_sync(self._stopped.set, token=self._token)
        except RuntimeError:
            # The event loop has ended with the store still open; there is nobody left to tell.
            return

    def _serve(self, connection: Connection) -> None:
        database = self._database
        looked = monotonic()
        while True:
            # Down first: a reader that comes in between sees it down, and wakes this thread up.
            self._watching = False
            watching = self._watching = self._signal.waiting > 0
            left = looked + self._poll_every - monotonic() if watching else inf
            try:
                batch = self._batches.get(timeout=min(max(left, 0), threading.TIMEOUT_MAX))
            except queue.Empty:
                batch = None
            if batch is not None:
                self._execute(connection, batch.jobs)
            elif not self._open and self._batches.empty():
                return
            known = database.position
            if watching and monotonic() - looked >= self._poll_every:
                self._look(connection)
                looked = monotonic()
            if batch is not None:
                from_thread.run_sync(self._finished, batch, database.position, token=self._token)
            elif database.position > known:
                from_thread.run_sync(self._signal.advance, database.position, token=self._token)

    def _look(self, connection: Connection) -> None:
        try:
            self._database.look(connection)
        except Exception as error:  # noqa: BLE001  (raised where it is read)
            # Whoever waits is woken, reads, and is told. Locked: there will be another look.
            if not is_locked(error):
                from_thread.run_sync(self._signal.wake, token=self._token)

    def _execute(self, connection: Connection, jobs: Sequence[_Job[object]]) -> None:
        writes = [job for job in jobs if not callable(job.work)]
        if writes:
            self._write(connection, writes)
            if len(writes) > 1 and any(_is_failure(job.error) for job in writes):
                # One of them may have broken it for all: each by itself, in a transaction each.
                for job in writes:
                    self._write(connection, [job])
        for job in jobs:
            if callable(job.work):
                try:
                    job.value = job.work(connection)
                except BaseException as error:  # noqa: BLE001  (raised where the job was made)
                    job.error = _failure(error)

    def _write(self, connection: Connection, jobs: Sequence[_Job[object]]) -> None:
        database = self._database
        try:
            database.begin(connection)
            outcomes = database.write(connection, [cast("Unit", job.work) for job in jobs])
            connection.execute("COMMIT")
        except BaseException as error:  # noqa: BLE001  (raised where each job was made)
            database.roll_back(connection)
            for job in jobs:
                job.error = _failure(error)
        else:
            for job, outcome in zip(jobs, outcomes, strict=True):
                job.error = outcome if isinstance(outcome, EventSourceError) else None
                job.value = outcome


def _move_writes(batch: _Batch, to: deque[_Batch]) -> None:
    writes = [job for job in batch.jobs if not callable(job.work)]
    if writes:
        if not to or to[-1].cost >= _COST_AT_MOST:
            to.append(_Batch())
        to[-1].jobs += writes
        to[-1].cost += batch.cost
        for job in writes:
            job.batch = to[-1]
        batch.jobs = [job for job in batch.jobs if callable(job.work)]


def _outcome(job: _Job[T]) -> T:
    if job.error is not None:
        raise job.error
    return cast("T", job.value)


def _is_failure(error: BaseException | None) -> bool:
    return isinstance(error, StorageError)


def _failure(error: BaseException) -> BaseException:
    return error if is_locked(error) else storage_error(error)
