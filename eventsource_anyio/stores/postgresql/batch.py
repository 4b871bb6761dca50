"""What group commit handles: jobs, each an append with its caller, and batches, sent together.

Who waits, waits for a batch: its leader until it may be sent, the others until they were answered.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Final, TypeAlias

import anyio
from msgspec import Struct

from ...ids import AggregateId
from ..records import Append
from .statements import Answer

APPENDS_AT_MOST: Final = 128  # each holds an entry of the lock table, which all processes share
EVENTS_AT_MOST: Final = 2000

Stream: TypeAlias = tuple[str, AggregateId]


class Change:
    """Wakes those who wait for something to be different; an event is made only for a waiter."""

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event: anyio.Event | None = None

    def wait(self) -> Awaitable[None]:
        if self._event is None:
            self._event = anyio.Event()
        return self._event.wait()

    def happened(self) -> None:
        event, self._event = self._event, None
        if event is not None:
            event.set()


class Batch:
    """Jobs that are sent together, by the caller of one of them, the leader."""

    __slots__ = ("changed", "events", "granted", "jobs", "leader", "may_send", "sent")

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.events = 0
        self.leader: Job | None = None
        self.may_send = False
        self.granted = Change()  # for the leader
        self.changed = Change()  # for the others: look at your job again
        self.sent = False

    @property
    def full(self) -> bool:
        return len(self.jobs) >= APPENDS_AT_MOST or self.events >= EVENTS_AT_MOST

    def add(self, job: Job) -> None:
        job.batch = self
        self.jobs.append(job)
        self.events += len(job.append.events)
        if self.leader is None:
            self.leader = job

    def hold(self, job: Job) -> None:
        """Keep it in a batch that is not to be sent."""
        job.batch = self
        self.jobs.append(job)

    def grant(self) -> None:
        """Let the leader send it."""
        self.may_send = True
        self.granted.happened()


_NOWHERE: Final = Batch()


class Job(Struct, eq=False):
    """An append whose caller waits for what becomes of it."""

    append: Append
    stream: Stream
    batch: Batch = _NOWHERE  # until it is queued
    settled: bool = False
    withdrawn: bool = False
    unknown: bool = False  # whether it was stored, where there is an error
    answer: Answer | None = None
    error: BaseException | None = None
