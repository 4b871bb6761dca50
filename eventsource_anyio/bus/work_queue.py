"""Work queues: jobs for whoever is free, each done by one worker, in no particular order.

For what has to be done, not for what has happened: the order of events in a stream is for the
subscriptions of a bus.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from types import TracebackType
from typing import Self

from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint_if_cancelled
from attrs import frozen

from ..cleanup import shielded_cleanup
from ..errors import StorageError
from .waiting import Backoff

_logger = logging.getLogger("eventsource_anyio.bus")
_LONGEST_PAUSE = 3600.0


@frozen
class Job:
    """What is to be done. `attempt` counts from 1. `ticket` is the queue's own."""

    job_id: str
    payload: bytes
    attempt: int
    ticket: str = ""


@frozen
class DeadJob:
    """A job that was given up: it has failed too often, or its workers have died."""

    job_id: str
    payload: bytes
    attempts: int
    error: str
    since: datetime


@frozen
class WorkQueueStatistics:
    """`waiting` jobs, `active` ones that a worker has, and `dead` ones."""

    waiting: int
    active: int
    dead: int


class WorkQueue(ABC):
    """Jobs that are kept until they are done; an async context manager, open inside its block.

    A job is done at least once. One whose worker does not say that it is done within `lease`
    seconds is given to another: `extend` says that it goes on. One that fails is tried again after
    a pause that begins with `retry_after` seconds and doubles; after `attempts` it is a dead
    letter.
    """

    def __init__(self, *, lease: float, attempts: int, retry_after: float) -> None:
        if not lease > 0:
            raise ValueError(f"lease must be a number of seconds above 0, not {lease!r}")
        if not isinstance(attempts, int) or isinstance(attempts, bool) or attempts < 1:
            raise ValueError(f"attempts must be a number from 1, not {attempts!r}")
        if not retry_after >= 0:
            raise ValueError(f"retry_after must be a number of seconds, not {retry_after!r}")
        self.lease = lease
        self.attempts = attempts
        self.retry_after = retry_after

    async def __aenter__(self) -> Self:
        await self._open()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._close()

    async def add(self, *payloads: bytes) -> None:
        """Return when they are stored; where that failed, they may be there once more when it is
        done again."""
        for one in payloads:
            if not isinstance(one, bytes):
                raise TypeError(f"payload must be bytes, not {type(one).__name__}: encode it first")
        await checkpoint_if_cancelled()
        if payloads:
            await self._add(payloads)
        else:
            await cancel_shielded_checkpoint()

    def receive(self) -> AbstractAsyncContextManager[Job]:
        """The next job, as soon as there is one: `async with queue.receive() as job`.

        Left as usual, the job is done. Left by an error, it has failed, and the error comes out.
        Left by a cancellation, it is given to another worker at once, and was no attempt.
        A broker that fails is waited out, until there is a job.
        """
        return _Receiving(self._take, self._end)

    async def _end(self, job: Job, error: BaseException | None) -> None:
        if error is None:
            await self._done(job)
            return
        try:
            if not isinstance(error, Exception):
                await self._give_back(job, 0.0, attempted=False)
            elif job.attempt < self.attempts:
                pause = self.retry_after * 2 ** min(job.attempt - 1, 20)
                await self._give_back(job, min(pause, _LONGEST_PAUSE), attempted=True)
            else:
                _logger.error(
                    "job %s is given up, after %d attempts",
                    *(job.job_id, job.attempt),
                    exc_info=error,
                )
                await self._bury(job, f"{type(error).__name__}: {error}"[:2000])
        except StorageError as failure:  # the end of the lease gives it to another
            _logger.warning("job %s: %s", job.job_id, failure)

    @abstractmethod
    async def extend(self, job: Job) -> None:
        """Have the lease begin anew; inside of the job's block."""

    @abstractmethod
    async def dead_letters(self) -> Sequence[DeadJob]:
        """The jobs that were given up, the oldest first; at most a thousand."""

    @abstractmethod
    async def retry_dead_letters(self, *job_ids: str) -> int:
        """Add them again, or all if none is named; how many."""

    @abstractmethod
    async def discard_dead_letters(self, *job_ids: str) -> int:
        """Forget them, or all if none is named; how many."""

    @abstractmethod
    async def statistics(self) -> WorkQueueStatistics:
        """How many jobs there are, by the broker."""

    @abstractmethod
    async def _open(self) -> None: ...

    @abstractmethod
    async def _close(self) -> None: ...

    @abstractmethod
    async def _add(self, payloads: Sequence[bytes]) -> None: ...

    @abstractmethod
    async def _take(self) -> Job | None:
        """A job, new or one whose lease has ended; None if none has come for a while.

        Those that have had all of their attempts are dead letters instead. A job that is taken by a
        call that is cancelled is given out again when its lease ends.
        """

    @abstractmethod
    async def _done(self, job: Job) -> None:
        """Also where another worker has it by now."""

    @abstractmethod
    async def _give_back(self, job: Job, pause: float, *, attempted: bool) -> None:
        """Have it given out again after a pause, unless another worker has it by now."""

    @abstractmethod
    async def _bury(self, job: Job, error: str) -> None:
        """Make a dead letter of it, unless another worker has it by now."""


class _Receiving(AbstractAsyncContextManager[Job]):
    def __init__(
        self,
        take: Callable[[], Awaitable[Job | None]],
        end: Callable[[Job, BaseException | None], Awaitable[None]],
    ) -> None:
        self._take = take
        self._end = end
        self._job: Job | None = None

    async def __aenter__(self) -> Job:
        if self._job is not None:
            raise RuntimeError("call receive() anew for each job")
        backoff = Backoff("a worker waits")
        while self._job is None:
            try:
                self._job = await self._take()
            except StorageError as error:
                await backoff.wait(error)
            else:
                backoff.reset()
        return self._job

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._job is not None
        with shielded_cleanup():
            await self._end(self._job, exc)
