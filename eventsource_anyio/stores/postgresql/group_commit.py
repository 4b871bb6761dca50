"""Appends that are made at the same time share a round trip and a transaction.

- There is no timer and no task: the first caller of a batch leads, sends it when the lane is free,
  and carries the others. A lone append finds the lane free and goes at once.
- A stream belongs to one lane, and a lane has one batch in flight, so appends to one stream are
  sent in the order they were made. Each has a version check and an outcome of its own.
- A stream that another transaction is appending to keeps nobody else waiting: its appends are set
  aside, and the first of them asks again after a while.
- A caller that is cancelled before its batch is sent takes its append out again. What was sent is
  finished, and its outcome is what happened.
- A batch may be sent twice, if the connection or its leader was lost: the event ids see to it that
  nothing is stored twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from math import inf
from random import random
from typing import TypeAlias
from uuid import UUID

import anyio
from anyio.lowlevel import checkpoint

from ...cleanup import shielded_cleanup
from ...errors import StoreClosedError
from ..records import Append, AppendResult, ExpectedVersion
from .batch import Batch, Change, Job, Stream
from .driver import Connection, DriverError
from .failures import storage_error
from .pool import Pool
from .statements import (
    APPENDED,
    BUSY,
    CONFLICT,
    KNOWN,
    Answer,
    Statements,
    appended,
    event_answer,
    event_values,
    events_answers,
    events_values,
)
from .writing import outcome

_BATCHES_AT_MOST = 100
_REACHED_AT_MOST = 10_000
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05
_TRIES, _BETWEEN_TRIES = 5, 0.01
# One append can break a batch by what is in it; the batch is then sent one by one, unless the
# error is of a kind that each of them would meet.
_OF_ALL = ("08", "25", "28", "3D", "3F", "40", "42", "53", "55", "57", "58")
_LOCK_TABLE_FULL = "53200"
UNIQUE = "23505"

Committed: TypeAlias = Callable[[Connection], Awaitable[None]]


class Lane:
    """Sends one batch after another. `committed` is called after each with its connection."""

    def __init__(self, pool: Pool, statements: Statements, committed: Committed) -> None:
        self._pool = pool
        self._statements = statements
        self._committed = committed
        self._current: Batch | None = None  # is being sent, or about to be
        self._waiting: deque[Batch] = deque()
        self._aside: dict[Stream, Batch] = {}  # behind one that asks again
        self._door = anyio.Lock()  # where they wait in order if there is no room
        self._room = Change()
        self._alone = True  # the last caller was: then nobody is waited for
        self._reached: dict[Stream, int] = {}  # by appends that expect no version
        self._closed = ""

    async def append(self, append: Append) -> tuple[AppendResult]:
        """Store it, or raise. Cancelled, nothing was stored, or it raises nothing."""
        # One of many waits in this coroutine, and in no other of ours: they are what it costs.
        for _ in range(_TRIES):
            job = Job(append, (append.aggregate_type, append.aggregate_id))
            if len(self._waiting) < _BATCHES_AT_MOST and not self._door.locked():
                self._queue(job)
            else:
                async with self._door:  # one at a time: whoever came first goes first
                    while len(self._waiting) >= _BATCHES_AT_MOST:
                        await self._room.wait()
                    self._queue(job)
            pause = _FIRST_PAUSE
            try:
                while True:
                    try:
                        while not job.settled and job.batch.leader is not job:
                            await job.batch.changed.wait()
                        if not job.settled:
                            await self._settled(job)
                    except BaseException as error:
                        if not await self._done_all_the_same(job, error):
                            raise
                    if job.error is not None:
                        raise job.error
                    answer = job.answer
                    assert answer is not None
                    if answer.status == APPENDED:
                        return (appended(append, answer),)
                    if answer.status != BUSY:
                        break
                    # This job has its stream to itself now: those behind it are set aside.
                    await anyio.sleep(pause * (0.5 + random()))  # noqa: S311  (no secret)
                    pause = min(2 * pause, _LONGEST_PAUSE)
                    job.settled = False
                    self._enqueue(job)
            finally:
                if self._aside:
                    self._bring_back(job)
            result = await self._outcome(append, answer)
            if result is not None:
                return (result,)
            await anyio.sleep(_BETWEEN_TRIES)
        raise storage_error(DriverError("and none of its event ids is stored", UNIQUE))

    def close(self, store: str) -> None:
        """Refuse what waits. What was sent is finished."""
        self._closed = store
        for batch in [*self._waiting, *self._aside.values()]:
            self._refuse(batch.jobs)
            batch.grant()
            batch.changed.happened()
        self._waiting.clear()
        self._aside.clear()
        self._room.happened()

    def _refuse(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            job.error = StoreClosedError(self._closed)
            job.settled = True

    # The queue ---------------------------------------------------------------------------------

    def _queue(self, job: Job) -> None:
        aside = self._aside.get(job.stream)
        if aside is None:
            self._enqueue(job)
        else:
            aside.hold(job)

    def _enqueue(self, job: Job) -> None:
        if self._closed:
            raise StoreClosedError(self._closed)
        if self._current is None:
            self._current = batch = Batch()
            batch.grant()
        elif self._waiting:
            batch = self._waiting[-1]
        else:
            batch = self._current
        if batch.sent or batch.full:
            batch = Batch()
            self._waiting.append(batch)
        batch.add(job)

    def _next(self) -> None:
        """The lane is free: let the next batch go."""
        self._current = None
        while self._waiting and self._current is None:
            batch = self._waiting.popleft()
            if batch.leader is not None:
                self._current = batch
                batch.grant()
        self._room.happened()

    def _set_aside(self, job: Job) -> None:
        """Its stream is busy: it asks again, and the others wait behind it, in their order."""
        if job.stream not in self._aside:
            self._aside[job.stream] = aside = Batch()
            aside.leader = job
            for later in _to_send(job.batch.jobs):
                if later.stream == job.stream and later is not job:
                    aside.hold(later)
            for batch in self._waiting:
                for later in [one for one in batch.jobs if one.stream == job.stream]:
                    self._take_out(later)
                    aside.hold(later)
        job.answer = Answer(BUSY, 0)
        job.settled = True

    def _bring_back(self, job: Job) -> None:
        """It asks no more: let those who wait behind it do so."""
        aside = self._aside.get(job.stream)
        if aside is None or aside.leader is not job:
            return
        del self._aside[job.stream]
        if self._closed:  # since they were set aside
            self._refuse(aside.jobs)
        else:
            for later in aside.jobs:
                self._enqueue(later)
        aside.changed.happened()

    def _take_out(self, job: Job) -> None:
        """Take it out of its batch, which gets another leader if it was the one."""
        batch = job.batch
        batch.jobs.remove(job)
        batch.events -= len(job.append.events)
        if batch.leader is job:
            batch.leader = batch.jobs[0] if batch.jobs else None
            batch.granted.happened()  # it may have been put into another one
            if batch.leader is None and batch is self._current:
                self._next()
        batch.changed.happened()

    # The callers -------------------------------------------------------------------------------

    async def _done_all_the_same(self, job: Job, error: BaseException) -> bool:
        """Whether it was stored, though its caller was cancelled, or may have been."""
        if not job.settled:
            if not job.batch.sent:
                self._take_out(job)
                return False
            if job.withdrawn:
                return False
            with anyio.CancelScope(shield=True):
                await self._settled(job)
        cancelled = isinstance(error, anyio.get_cancelled_exc_class())
        scope_cancelled = anyio.current_effective_deadline() == -inf
        stored = job.answer is not None and job.answer.status in (APPENDED, KNOWN)
        # If it was stored, that is the outcome, as if it had been shielded. The scope that was
        # cancelled still is, and raises at the next checkpoint.
        return cancelled and scope_cancelled and (stored or job.unknown)

    async def _settled(self, job: Job) -> None:
        while not job.settled:
            batch = job.batch
            if batch.leader is not job:
                await batch.changed.wait()
            elif batch.may_send:
                await self._lead(batch, job)
            else:
                await batch.granted.wait()

    async def _lead(self, batch: Batch, leader: Job) -> None:
        if not (self._alone or batch.full):
            await checkpoint()  # whoever was woken with this caller comes along
        try:
            connection = await self._pool.acquire()
        except DriverError as error:
            batch.sent = True
            self._fail(batch.jobs, error, unknown=False)
            self._pass_on(batch)
            return
        batch.sent = True
        self._alone = len(batch.jobs) == 1
        try:
            with shielded_cleanup() as scope:
                connection = await self._send(connection, batch.jobs)
                self._pass_on(batch)
                await self._committed(connection)
            if scope.cancelled_caught:
                connection.abandon()
                self._fail(batch.jobs, DriverError("there was no answer in time", lost=True))
                self._pass_on(batch)
        except BaseException:
            # Only asyncio's own cancellation gets here. The others are sent again.
            leader.withdrawn = True
            self._send_again(batch, leader)
            raise
        finally:
            self._pool.release(connection)
            # They know their batch; without the circle they need no garbage collector.
            batch.jobs = []
            batch.leader = None

    def _pass_on(self, batch: Batch) -> None:
        if batch is self._current:
            self._next()  # before the others wake up: the next leader comes first
        batch.changed.happened()

    def _send_again(self, batch: Batch, leader: Job) -> None:
        again = Batch()
        for job in _to_send(batch.jobs):
            if job is not leader:
                again.add(job)
        if again.jobs:
            self._waiting.appendleft(again)
        self._pass_on(batch)

    # The server --------------------------------------------------------------------------------

    async def _outcome(self, append: Append, answer: Answer) -> AppendResult | None:
        try:
            return await outcome(self._pool.fetch, self._statements, append, answer)
        except DriverError as error:
            raise storage_error(error, unknown=error.lost) from error

    async def _send(self, connection: Connection, jobs: Sequence[Job]) -> Connection:
        """Send them, on another connection if this one is lost, and settle each."""
        try:
            await self._settle(connection, jobs)
        except DriverError as error:
            if not error.lost:
                self._fail(jobs, error)
                return connection
            connection.abandon()
            try:
                connection = await self._pool.replace(connection)
                await self._settle(connection, _to_send(jobs))
            except DriverError as again:
                self._fail(jobs, again if again.sqlstate else error)
            except BaseException:
                connection.abandon()
                raise
        return connection

    async def _settle(self, connection: Connection, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        try:
            answers = await self._ask(connection, [job.append for job in jobs])
        except DriverError as error:
            if len(jobs) == 1 and error.sqlstate == UNIQUE:
                # An id of it is stored with another stream, or a version came from elsewhere.
                answers = [Answer(KNOWN, 0)]
            elif len(jobs) > 1 and not (error.lost or error.sqlstate.startswith(_OF_ALL)):
                for job in jobs:
                    await self._settle(connection, _to_send([job]))
                return
            elif len(jobs) > 1 and error.sqlstate == _LOCK_TABLE_FULL:
                half = len(jobs) // 2
                await self._settle(connection, jobs[:half])
                await self._settle(connection, _to_send(jobs[half:]))
                return
            elif error.lost:
                raise
            else:
                self._fail(jobs, error)
                return
        stored: set[UUID] | None = None
        for job, answer in zip(jobs, answers, strict=True):
            if answer.status == BUSY:
                if job.batch.sent:
                    self._set_aside(job)
                continue
            if answer.status == CONFLICT:
                if stored is None:
                    stored = _stored(jobs, answers)
                if any(event.event_id in stored for event in job.append.events):
                    answer = Answer(KNOWN, 0)  # it repeats one of the same batch
            elif answer.status == APPENDED and job.append.expected_version is ExpectedVersion.ANY:
                self._reached[job.stream] = answer.version + len(job.append.events)
            job.answer = answer
            job.settled = True
        if len(self._reached) > _REACHED_AT_MOST:
            self._reached.clear()

    async def _ask(self, connection: Connection, appends: Sequence[Append]) -> Sequence[Answer]:
        statements = self._statements
        if len(appends) == 1 and len(appends[0].events) == 1:
            (row,) = await connection.fetch(
                statements.append_event, *event_values(appends[0], self._reached)
            )
            return [event_answer(row)]
        values = events_values(appends, wait=False, atomic=False, reached=self._reached)
        (row,) = await connection.fetch(statements.append_events, *values)
        return events_answers(appends, row)

    def _fail(
        self, jobs: Sequence[Job], error: DriverError, *, unknown: bool | None = None
    ) -> None:
        for job in _to_send(jobs):
            job.unknown = error.lost if unknown is None else unknown
            job.error = storage_error(error, unknown=job.unknown)
            job.settled = True


def _stored(jobs: Sequence[Job], answers: Sequence[Answer]) -> set[UUID]:
    return {
        event.event_id
        for job, answer in zip(jobs, answers, strict=True)
        if answer.status == APPENDED
        for event in job.append.events
    }


def _to_send(jobs: Sequence[Job]) -> list[Job]:
    """Those of a batch that is being sent that are not settled, nor set aside meanwhile."""
    return [job for job in jobs if not job.settled and job.batch.sent]
