"""Work queues in Redis: a stream with a consumer group, and a stream of dead letters.

- A job that a worker has is pending in the group; how long it has been idle there is its lease. To
  give it back is to set how long it has been idle, so that it is claimed when its pause is over.
- What is done to a job that a worker has is done by a script, and only if that worker has it still.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import cast
from uuid import uuid4

from ..errors import StorageError
from ..ids import check_name
from ..stores.records import from_microseconds
from .redis_connection import RedisConnections, Reply, Script
from .work_queue import DeadJob, Job, WorkQueue, WorkQueueStatistics

_GROUP = "workers"
_WAIT = 1.0  # seconds after which it is looked for jobs that were given back
_LISTED = 1000

_ADD = Script("""
for i = 1, #ARGV do redis.call('XADD', KEYS[1], '*', 'p', ARGV[i]) end
""")

# A job that was given back, or whose worker has died; those that have had their attempts are moved.
_CLAIM = Script("""
local worker, lease, attempts = ARGV[1], ARGV[2], tonumber(ARGV[3])
redis.pcall('XGROUP', 'CREATE', KEYS[1], 'workers', '0', 'MKSTREAM')
local cursor = '0-0'
for _ = 1, 1000 do
  local found = redis.call('XAUTOCLAIM', KEYS[1], 'workers', worker, lease, cursor, 'COUNT', 1)
  local job = found[2][1]
  cursor = found[1]
  if job then
    local id = job[1]
    local count = redis.call('XPENDING', KEYS[1], 'workers', id, id, 1)[1][4]
    if count <= attempts then return {id, job[2][2], count} end
    redis.call('XADD', KEYS[2], '*', 'p', job[2][2], 'n', attempts,
      'e', 'its worker has not said within the lease that it is done')
    redis.call('XACK', KEYS[1], 'workers', id)
    redis.call('XDEL', KEYS[1], id)
  end
  if cursor == '0-0' then return false end
end
return false
""")

_COUNT = Script("""
redis.pcall('XGROUP', 'CREATE', KEYS[1], 'workers', '0', 'MKSTREAM')
local pending = redis.call('XPENDING', KEYS[1], 'workers')[1]
return {redis.call('XLEN', KEYS[1]) - pending, pending, redis.call('XLEN', KEYS[2])}
""")

_HAS = """
local id, worker = ARGV[1], ARGV[2]
local has = redis.call('XPENDING', KEYS[1], 'workers', id, id, 1, worker)[1]
if not has then return 0 end
"""

_GIVE_BACK = Script(
    _HAS
    + """
redis.call('XCLAIM', KEYS[1], 'workers', worker, 0, id, 'IDLE', ARGV[3], 'RETRYCOUNT', ARGV[4],
  'JUSTID')
return 1
"""
)

_BURY = Script(
    _HAS
    + """
redis.call('XADD', KEYS[2], '*', 'p', ARGV[3], 'n', ARGV[4], 'e', ARGV[5])
redis.call('XACK', KEYS[1], 'workers', id)
redis.call('XDEL', KEYS[1], id)
return 1
"""
)

_REVIVE = Script("""
local count = 0
for i = 1, #ARGV do
  local found = redis.call('XRANGE', KEYS[2], ARGV[i], ARGV[i])[1]
  if found then
    redis.call('XADD', KEYS[1], '*', 'p', found[2][2])
    count = count + redis.call('XDEL', KEYS[2], ARGV[i])
  end
end
return count
""")


class RedisWorkQueue(WorkQueue):
    """A work queue in Redis 6.2 or later; `url` and `prefix` as for `RedisEventBus`.

    Queues of the same `name` and `prefix` are one, in all processes.
    """

    def __init__(
        self,
        url: str,
        name: str,
        *,
        prefix: str = "eventsource",
        lease: float = 60.0,
        attempts: int = 5,
        retry_after: float = 1.0,
    ) -> None:
        super().__init__(lease=lease, attempts=attempts, retry_after=retry_after)
        check_name("name", name)
        self._connections = RedisConnections(url, "RedisWorkQueue")
        self._jobs = f"{prefix}:work:{name}"
        self._dead = f"{prefix}:work:{name}:dead"
        self._worker = uuid4().hex

    async def extend(self, job: Job) -> None:
        await self._return(job, 0, job.attempt)

    async def dead_letters(self) -> Sequence[DeadJob]:
        (reply,) = await self._connections.call(("XRANGE", self._dead, "-", "+", "COUNT", _LISTED))
        found: list[DeadJob] = []
        for job_id, fields in cast("list[tuple[bytes, list[bytes]]]", reply or []):
            payload, attempts, error = fields[1], int(fields[3]), fields[5].decode()
            found.append(DeadJob(job_id.decode(), payload, attempts, error, _since(job_id)))
        return found

    async def retry_dead_letters(self, *job_ids: str) -> int:
        ids = job_ids or [one.job_id for one in await self.dead_letters()]
        return cast("int", await self._run(_REVIVE, *ids)) if ids else 0

    async def discard_dead_letters(self, *job_ids: str) -> int:
        ids = job_ids or [one.job_id for one in await self.dead_letters()]
        if not ids:
            return 0
        (count,) = await self._connections.call(("XDEL", self._dead, *ids))
        return cast("int", count)

    async def statistics(self) -> WorkQueueStatistics:
        return WorkQueueStatistics(*cast("list[int]", await self._run(_COUNT)))

    async def _open(self) -> None:
        self._connections.open()
        try:
            await self.statistics()
        except BaseException:
            await self._connections.close()
            raise

    async def _close(self) -> None:
        await self._connections.close()

    async def _add(self, payloads: Sequence[bytes]) -> None:
        await self._run(_ADD, *payloads)

    async def _take(self) -> Job | None:
        lease = int(self.lease * 1000)
        claimed = await self._run(_CLAIM, self._worker, lease, self.attempts)
        if claimed:
            job_id, payload, attempt = cast("tuple[bytes, bytes, int]", claimed)
            return Job(job_id.decode(), payload, attempt)
        try:
            (reply,) = await self._connections.call(
                (
                    *("XREADGROUP", "GROUP", _GROUP, self._worker, "COUNT", 1),
                    *("BLOCK", int(_WAIT * 1000), "STREAMS", self._jobs, ">"),
                ),
                wait=_WAIT,
            )
        except StorageError as error:
            if "NOGROUP" in str(error) or "StreamConsumerGroup" in str(error):
                return None  # the server has lost its data; it is made anew
            raise
        if not reply:
            return None
        ((_, ((job_id, (_, payload)),)),) = cast(
            "list[tuple[bytes, list[tuple[bytes, tuple[bytes, bytes]]]]]", reply
        )
        return Job(job_id.decode(), payload, 1)

    async def _done(self, job: Job) -> None:
        await self._connections.call(
            ("MULTI",),
            ("XACK", self._jobs, _GROUP, job.job_id),
            ("XDEL", self._jobs, job.job_id),
            ("EXEC",),
        )

    async def _give_back(self, job: Job, pause: float, *, attempted: bool) -> None:
        idle = int(max(self.lease - pause, 0.0) * 1000)  # the longest pause is a lease
        await self._return(job, idle, job.attempt if attempted else job.attempt - 1)

    async def _return(self, job: Job, idle: int, attempts: int) -> None:
        await self._run(_GIVE_BACK, job.job_id, self._worker, idle, attempts)

    async def _bury(self, job: Job, error: str) -> None:
        await self._run(_BURY, job.job_id, self._worker, job.payload, job.attempt, error)

    async def _run(self, script: Script, *arguments: str | bytes | int) -> Reply:
        return await self._connections.run(script, [self._jobs, self._dead], *arguments)


def _since(job_id: bytes) -> datetime:
    return from_microseconds(int(job_id.partition(b"-")[0]) * 1000)
