"""Work queues in NATS JetStream: a stream with one consumer, and a bucket of dead letters.

- A job is a message of a stream that keeps what is not acknowledged. The consumer gives it out
  again when the lease ends, and counts how often. A job that was given out and is no attempt is
  sent anew, with its id and its count in headers.
- Acknowledging is the server's: it takes it from any worker. So who gives back a job, or buries it,
  does so only within the lease, by the clock of the worker.
- Jobs are pulled one by one, and come to one inbox. One that comes when whoever has pulled it was
  cancelled is for the next one who takes.
"""

from __future__ import annotations

from base64 import urlsafe_b64encode
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import anyio
from msgspec import Struct
from msgspec.json import encode
from msgspec.msgpack import Decoder, Encoder

from ..cleanup import shielded_cleanup
from ..errors import StorageError, StoreClosedError
from .broker import Entry, EntryConflictError
from .nats_bucket import Bucket
from .nats_connection import Answer, Call, NoAnswererError, status_of
from .nats_jetstream import Stored, make_stream, stream_info
from .nats_session import Session, check_name, check_number
from .work_queue import DeadJob, Job, WorkQueue, WorkQueueStatistics

if TYPE_CHECKING:
    from nats.aio.msg import Msg

    from ..guest import Guest

_WORKERS = "workers"
_WAIT = 2.0  # seconds; less than the server may take to answer
_AT_ONCE = 500
_LISTED = 1000
_ID, _ATTEMPTS = "Eventsource-Job", "Eventsource-Attempts"
_DIED = "its worker has not said within the lease that it is done"


class _Dead(Struct, frozen=True, array_like=True):
    job_id: str
    payload: bytes
    attempts: int
    error: str
    since: datetime


_encode, _decode = Encoder().encode, Decoder(_Dead).decode


class _Consumer(Answer, frozen=True, kw_only=True):
    num_pending: int = 0
    num_ack_pending: int = 0


class NATSWorkQueue(WorkQueue):
    """A work queue in NATS 2.11 or later; what `servers`, `replicas`, `options` and `guest` are is
    as for `NATSEventBus`.

    Queues of the same `name` and `prefix` are one, in all processes, which have to use the same
    `lease`. Other programs may add jobs too: each message to `<prefix>.jobs.<name>` is one.
    """

    def __init__(
        self,
        servers: str | Sequence[str],
        name: str,
        *,
        prefix: str = "eventsource",
        replicas: int = 1,
        options: Mapping[str, object] | None = None,
        guest: Guest | None = None,
        lease: float = 60.0,
        attempts: int = 5,
        retry_after: float = 1.0,
    ) -> None:
        super().__init__(lease=lease, attempts=attempts, retry_after=retry_after)
        check_name("name", name)
        check_name("prefix", prefix)
        check_number("replicas", replicas)
        self._session = Session(type(self).__name__, servers, options, guest, self._forget)
        self._connection = self._session.connection
        self._config = {"storage": "file", "num_replicas": replicas}
        self._stream = f"{prefix}_jobs_{name}"
        self._subject = f"{prefix}.jobs.{name}"
        self._dead = Bucket(self._connection, f"{prefix}_dead_jobs_{name}", self._config)
        self._there = False
        self._inbox = self._connection.new_inbox()
        self._came: deque[tuple[Msg, float]] = deque()
        self._news = anyio.Event()
        self._gone = False
        self._connection.on_change = self._wake
        self._leases: dict[str, float] = {}  # by ticket, when each ends

    # Jobs ----------------------------------------------------------------------------------------

    async def _open(self) -> None:
        await self._session.open(self._begin)

    async def _begin(self) -> None:
        self._news = anyio.Event()
        await self._connection.listen(self._inbox, self._hear)
        await self._have()

    async def _close(self) -> None:
        with shielded_cleanup(), suppress(StorageError, StoreClosedError):
            await self._session.run(self._return_all)
        await self._session.close()
        self._came.clear()
        self._leases.clear()

    def _forget(self) -> None:
        self._there = False
        self._dead.forget()

    async def _have(self) -> None:
        if not self._there:
            await self._dead.make()
            config = {**self._config, "retention": "workqueue"}
            await make_stream(self._connection, self._stream, self._subject, config)
            consumer = {
                "durable_name": _WORKERS,
                "ack_policy": "explicit",
                "ack_wait": _nanoseconds(self.lease),
                "max_ack_pending": -1,
            }
            await self._connection.api(
                f"CONSUMER.DURABLE.CREATE.{self._stream}.{_WORKERS}",
                {"stream_name": self._stream, "config": consumer},
                _Consumer,
            )
            self._there = True

    async def _add(self, payloads: Sequence[bytes]) -> None:
        await self._session.run(self._send, [(one, None) for one in payloads])

    async def _send(self, jobs: Sequence[tuple[bytes, dict[str, str] | None]]) -> None:
        await self._have()
        for start in range(0, len(jobs), _AT_ONCE):
            calls = [Call(self._subject, *job) for job in jobs[start : start + _AT_ONCE]]
            await self._connection.ask(calls)
            for call in calls:
                call.decoded(Stored)

    async def _take(self) -> Job | None:
        return await self._session.run(self._take_one)

    async def _take_one(self) -> Job | None:
        await self._have()
        found = self._next()
        if found is None:
            request = {"batch": 1, "expires": _nanoseconds(_WAIT)}
            subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{_WORKERS}"
            await self._connection.send(subject, encode(request), self._inbox)
            with anyio.move_on_after(_WAIT):
                while found is None and not self._gone:
                    await self._news.wait()
                    found = self._next()
            if self._gone:
                self._gone = False
                raise NoAnswererError
            if found is None:
                return None
        message, until = found
        job = _job(message)
        self._leases[job.ticket] = until
        if job.attempt <= self.attempts:
            return job
        await self._bury_one(job, _DIED, self.attempts)
        return None

    def _next(self) -> tuple[Msg, float] | None:
        while self._came:
            message, until = self._came.popleft()
            if until > anyio.current_time() + self.lease / 2:
                return message, until
        return None

    async def _hear(self, message: Msg) -> None:
        status = status_of(message)
        if not status and message.reply:
            self._came.append((message, anyio.current_time() + self.lease))
        elif status == "503":  # the consumer was deleted, or all of JetStream
            self._gone = True
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = anyio.Event()

    async def _return_all(self) -> None:
        while found := self._next():
            await self._send_anew(_job(found[0]))

    async def extend(self, job: Job) -> None:
        if self._holds(job):
            self._leases[job.ticket] = anyio.current_time() + self.lease
            await self._session.run(self._acknowledge, job, b"+WPI")

    async def _done(self, job: Job) -> None:
        self._leases.pop(job.ticket, None)
        await self._session.run(self._acknowledge, job, b"+ACK")

    async def _give_back(self, job: Job, pause: float, *, attempted: bool) -> None:
        if self._holds(job):
            del self._leases[job.ticket]
            if attempted:
                told = b"-NAK " + encode({"delay": _nanoseconds(pause)})
                await self._session.run(self._acknowledge, job, told)
            else:
                await self._session.run(self._send_anew, job)

    async def _send_anew(self, job: Job) -> None:
        headers = {_ID: job.job_id, _ATTEMPTS: str(job.attempt - 1)}
        await self._send([(job.payload, headers)])
        await self._acknowledge(job, b"+ACK")

    async def _bury(self, job: Job, error: str) -> None:
        if self._holds(job):
            await self._session.run(self._bury_one, job, error, job.attempt)

    async def _bury_one(self, job: Job, error: str, attempts: int) -> None:
        self._leases.pop(job.ticket, None)
        now = datetime.now(UTC)
        dead = _encode(_Dead(job.job_id, job.payload, attempts, error, now))
        entry = await self._dead.get(_key(job.job_id))
        try:
            await self._dead.put(_key(job.job_id), dead, entry.revision if entry else None)
        except EntryConflictError:
            return  # another worker has it
        await self._acknowledge(job, b"+ACK")

    async def _acknowledge(self, job: Job, what: bytes) -> None:
        await self._connection.ask([Call(job.ticket, what)])

    def _holds(self, job: Job) -> bool:
        return self._leases.get(job.ticket, 0.0) > anyio.current_time()

    # Operations ----------------------------------------------------------------------------------

    async def statistics(self) -> WorkQueueStatistics:
        return await self._session.run(self._count)

    async def _count(self) -> WorkQueueStatistics:
        await self._have()
        subject = f"CONSUMER.INFO.{self._stream}.{_WORKERS}"
        consumer = await self._connection.api(subject, {}, _Consumer)
        dead = await stream_info(self._connection, self._dead.stream)
        return WorkQueueStatistics(
            consumer.num_pending, consumer.num_ack_pending, dead.state.messages
        )

    async def dead_letters(self) -> Sequence[DeadJob]:
        dead = [_decode(entry.value) for entry in await self._session.run(self._entries)]
        dead.sort(key=lambda one: one.since)
        return [
            DeadJob(one.job_id, one.payload, one.attempts, one.error, one.since)
            for one in dead[:_LISTED]
        ]

    async def retry_dead_letters(self, *job_ids: str) -> int:
        return await self._session.run(self._end_dead, job_ids, True)

    async def discard_dead_letters(self, *job_ids: str) -> int:
        return await self._session.run(self._end_dead, job_ids, False)

    async def _entries(self) -> Sequence[Entry]:
        await self._have()
        return await self._dead.list(_DEAD)

    async def _end_dead(self, job_ids: Sequence[str], again: bool) -> int:
        if job_ids:
            await self._have()
            found = [await self._dead.get(_key(job_id)) for job_id in dict.fromkeys(job_ids)]
        else:
            found = list(await self._entries())
        count = 0
        for entry in found:
            if entry is not None:
                dead = _decode(entry.value)
                if again:
                    await self._send([(dead.payload, {_ID: dead.job_id})])
                try:
                    await self._dead.delete(entry.key, entry.revision)
                except EntryConflictError:
                    continue
                count += 1
        return count


_DEAD = "dead"


def _key(job_id: str) -> str:
    return f"{_DEAD}/{urlsafe_b64encode(job_id.encode()).decode()}"


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1_000_000_000)


def _job(message: Msg) -> Job:
    """Its reply is $JS.ACK.<stream>.<consumer>.<delivered>.<sequence>…, or with a domain and an
    account's hash before the stream."""
    headers = message.headers or {}
    tokens = message.reply.split(".")
    delivered, sequence = tokens[4:6] if len(tokens) < 11 else tokens[6:8]
    attempt = int(headers.get(_ATTEMPTS, "0")) + int(delivered)
    return Job(headers.get(_ID, sequence), message.data, attempt, message.reply)
