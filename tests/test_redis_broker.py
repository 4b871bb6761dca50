"""Redis as a broker: what the buses are built on, call by call."""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import uuid4

import pytest

from eventsource_anyio.bus.broker import EntryConflictError, Message
from eventsource_anyio.bus.redis_broker import RedisBroker
from eventsource_anyio.bus.redis_connection import RedisConnections


@pytest.fixture
async def broker(redis_url: str, anyio_backend: object) -> AsyncIterator[RedisBroker]:
    broker = RedisBroker(RedisConnections(redis_url), uuid4().hex, keep=1)
    await broker.open()
    yield broker
    await broker.close()


def messages(partition: int, *names: str) -> list[Message]:
    return [Message(partition, name, name.encode()) for name in names]


async def test_messages_are_read_in_order_after_an_offset(broker):
    await broker.send([*messages(0, "a", "b"), *messages(1, "x"), *messages(0, "c")])
    reading = await broker.read({0: "", 1: ""}, 100, 0)
    assert [one.message_id for one in reading.messages if one.partition == 0] == ["a", "b", "c"]
    assert [one.payload for one in reading.messages if one.partition == 1] == [b"x"]
    assert not reading.lost
    second = next(one for one in reading.messages if one.message_id == "b")
    reading = await broker.read({0: second.offset}, 100, 5)
    assert [one.message_id for one in reading.messages] == ["c"]
    ends = await broker.ends([0, 1, 2])
    assert ends[0] == reading.messages[0].offset
    assert ends[2] == ""
    assert (await broker.read({0: ends[0], 2: ""}, 100, 0.01)).messages == []
    back = await broker.read_back(0, second.offset, 1)
    assert [one.message_id for one in back] == ["b"]
    assert [one.message_id for one in await broker.read_back(0, ends[0], 9)] == ["a", "b", "c"]


async def test_a_reader_is_told_what_was_dropped(broker):
    await broker.send(messages(0, "first"))
    (first,) = (await broker.read({0: ""}, 100, 0)).messages
    for number in range(10):
        await broker.send(messages(0, *(str(n) for n in range(number * 100, number * 100 + 100))))
    for after in ("", first.offset):
        reading = await broker.read({0: after}, 5, 0)
        assert list(reading.lost) == [0]
        reading = await broker.read({0: reading.messages[-1].offset}, 5, 0)
        assert not reading.lost


async def test_an_entry_is_written_where_it_has_the_revision_that_is_known(broker):
    assert await broker.get("a/b") is None
    first = await broker.put("a/b", b"1\n\0", None)
    entry = await broker.get("a/b")
    assert (entry.key, entry.value, entry.revision) == ("a/b", b"1\n\0", first)
    with pytest.raises(EntryConflictError):
        await broker.put("a/b", b"2", None)
    second = await broker.put("a/b", b"2", first)
    for stale in (first, "f" * 32):
        with pytest.raises(EntryConflictError):
            await broker.put("a/b", b"3", stale)
        with pytest.raises(EntryConflictError):
            await broker.delete("a/b", stale)
    assert (await broker.get("a/b")).value == b"2"
    await broker.delete("a/b", second)
    with pytest.raises(EntryConflictError):
        await broker.delete("a/b", second)
    with pytest.raises(EntryConflictError):
        await broker.put("a/b", b"3", second)
    assert await broker.put("a/b", b"2", None) not in {first, second}


async def test_a_directory_lists_what_is_directly_in_it(broker):
    for key in ("a/b", "a/c", "a/c/d", "ab/c"):
        await broker.put(key, key.encode(), None)
    assert sorted(one.key for one in await broker.list("a")) == ["a/b", "a/c"]
    assert [one.value for one in await broker.list("a/c")] == [b"a/c/d"]
    assert await broker.list("nothing") == []
