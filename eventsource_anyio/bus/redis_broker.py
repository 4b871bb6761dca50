"""Redis Streams as a broker: what a partition, an offset and an entry are there.

- A partition is a stream. Its ids are `{log}-{number}`: `log` is when the stream was begun, by the
  server's clock, and numbers count from 1, given out by the script that adds. So whoever reads sees
  by the first number that he gets whether anything was dropped, and by the log whether it was lost.
- Scripts are atomic: of what is sent together all is stored or, at worst, the first part.
- Entries are fields of a hash a directory, each with its revision before its value, and are written
  by scripts that compare the revision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast
from uuid import uuid4

from .broker import Broker, Entry, EntryConflictError, Message, Reading, ReceivedMessage
from .redis_connection import Argument, Command, RedisConnections, Reply, Script

_REVISION = 32

_SEND = Script("""
local keep, log, number = ARGV[1], {}, {}
for i = 2, #ARGV, 3 do
  local k = tonumber(ARGV[i])
  if not log[k] then
    local last = redis.call('XREVRANGE', KEYS[k], '+', '-', 'COUNT', 1)[1]
    if last then
      log[k], number[k] = string.match(last[1], '^(%d+)-(%d+)$')
    else
      local time = redis.call('TIME')
      log[k] = time[1] .. string.format('%03d', math.floor(tonumber(time[2]) / 1000))
      number[k] = 0
    end
  end
  number[k] = number[k] + 1
  local id = log[k] .. '-' .. string.format('%d', number[k])
  redis.call('XADD', KEYS[k], 'MAXLEN', '~', keep, id, 'i', ARGV[i + 1], 'p', ARGV[i + 2])
end
""")

_PUT = Script("""
local old, expected = redis.call('HGET', KEYS[1], ARGV[1]), ARGV[2]
if expected == '' and old then return 0 end
if expected ~= '' and not (old and string.sub(old, 1, #expected) == expected) then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
return 1
""")

_DELETE = Script("""
local old = redis.call('HGET', KEYS[1], ARGV[1])
if not (old and string.sub(old, 1, #ARGV[2]) == ARGV[2]) then return 0 end
redis.call('HDEL', KEYS[1], ARGV[1])
return 1
""")


class RedisBroker(Broker):
    """One server, or one database of it, under a prefix of its keys."""

    def __init__(self, connections: RedisConnections, prefix: str, keep: int) -> None:
        self._connections = connections
        self._prefix = prefix
        self._keep = keep

    async def open(self) -> None:
        self._connections.open()
        try:
            await self._connections.call(("PING",))
        except BaseException:
            await self._connections.close()
            raise

    async def close(self) -> None:
        await self._connections.close()

    # Messages ------------------------------------------------------------------------------------

    async def send(self, messages: Sequence[Message]) -> None:
        keys: dict[int, int] = {}
        arguments: list[Argument] = [self._keep]
        for message in messages:
            number = keys.setdefault(message.partition, len(keys) + 1)
            arguments += (number, message.message_id, message.payload)
        await self._connections.run(_SEND, [self._key(one) for one in keys], *arguments)

    async def read(self, after: Mapping[int, str], limit: int, wait: float) -> Reading:
        found = await self._read(after, limit, wait)
        if not found:
            # A log that was begun again at a time that the server's clock was set back to.
            ends = await self.ends(list(after))
            lost = [one for one, end in ends.items() if end and _order(end) < _order(after[one])]
            if lost:
                found = await self._read(dict.fromkeys(lost, ""), limit, 0.0)
        gone = [one for one, messages in found.items() if _are_gone(after[one], messages[0].offset)]
        return Reading([one for messages in found.values() for one in messages], gone)

    async def _read(
        self, after: Mapping[int, str], limit: int, wait: float
    ) -> dict[int, list[ReceivedMessage]]:
        block: Command = ("BLOCK", max(int(wait * 1000), 1)) if wait > 0 else ()
        keys = {self._key(one).encode(): one for one in after}
        ids = [after[one] or "0-0" for one in keys.values()]
        count = max(-(-limit // len(keys)), 1)
        (reply,) = await self._connections.call(
            ("XREAD", "COUNT", count, *block, "STREAMS", *keys, *ids), wait=wait
        )
        found: dict[int, list[ReceivedMessage]] = {}
        for stream in _list(reply):
            key, messages = _list(stream)
            partition = keys[cast("bytes", key)]
            found[partition] = _messages(partition, messages)
        return found

    async def read_back(self, partition: int, upto: str, limit: int) -> Sequence[ReceivedMessage]:
        key = self._key(partition)
        (reply,) = await self._connections.call(("XREVRANGE", key, upto, "-", "COUNT", limit))
        return _messages(partition, reply)[::-1]

    async def ends(self, partitions: Sequence[int]) -> Mapping[int, str]:
        replies = await self._connections.call(
            *(("XREVRANGE", self._key(one), "+", "-", "COUNT", 1) for one in partitions)
        )
        return {
            partition: found[0].offset if (found := _messages(partition, reply)) else ""
            for partition, reply in zip(partitions, replies, strict=True)
        }

    def _key(self, partition: int) -> str:
        return f"{self._prefix}:events:{partition:04}"

    # Entries -------------------------------------------------------------------------------------

    async def get(self, key: str) -> Entry | None:
        (value,) = await self._connections.call(("HGET", *self._entry(key)))
        return None if value is None else _entry(key, cast("bytes", value))

    async def list(self, directory: str) -> Sequence[Entry]:
        (reply,) = await self._connections.call(("HGETALL", self._entry(f"{directory}/")[0]))
        fields = iter(cast("Sequence[bytes]", _list(reply)))
        return [
            _entry(f"{directory}/{name.decode()}", value)
            for name, value in zip(fields, fields, strict=True)
        ]

    async def put(self, key: str, value: bytes, expected: str | None) -> str:
        revision = uuid4().hex
        directory, name = self._entry(key)
        done = await self._connections.run(
            _PUT, [directory], name, expected or "", revision.encode() + value
        )
        if not done:
            raise EntryConflictError(key)
        return revision

    async def delete(self, key: str, expected: str) -> None:
        directory, name = self._entry(key)
        if not await self._connections.run(_DELETE, [directory], name, expected):
            raise EntryConflictError(key)

    def _entry(self, key: str) -> tuple[str, str]:
        directory, _, name = key.rpartition("/")
        return f"{self._prefix}:entries:{directory}", name


def _entry(key: str, stored: bytes) -> Entry:
    return Entry(key, stored[_REVISION:], stored[:_REVISION].decode())


def _list(reply: Reply) -> list[Reply]:
    return reply if isinstance(reply, list) else []


def _messages(partition: int, reply: Reply) -> list[ReceivedMessage]:
    found: list[ReceivedMessage] = []
    for message in cast("list[tuple[bytes, list[bytes]]]", _list(reply)):
        offset, fields = message
        found.append(ReceivedMessage(partition, offset.decode(), fields[1].decode(), fields[3]))
    return found


def _order(offset: str) -> tuple[int, int]:
    log, _, number = (offset or "0-0").partition("-")
    return int(log), int(number)


def _are_gone(after: str, first: str) -> bool:
    """Whether messages between an offset and the first that was read are not there any more."""
    log, number = _order(after)
    first_log, first_number = _order(first)
    if not after:
        return first_number != 1
    return first_log != log or first_number != number + 1
