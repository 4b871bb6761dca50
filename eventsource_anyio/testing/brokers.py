"""What a broker does for the bus over it, as a test suite: see `eventsource_anyio.bus.broker`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import anyio
import pytest

from ..bus.broker import Broker, Entry, EntryConflictError, Message, ReceivedMessage
from ..errors import StorageError
from .cancelling import cancel_at_every_checkpoint

SECONDS = 30.0  # after which what does not come will not come
_SHORT = 0.05  # to wait for what is not to come


def messages(*numbers: int, partition: int = 0) -> list[Message]:
    return [Message(partition, str(number), b"%d\0" % number) for number in numbers]


def numbers(received: Sequence[ReceivedMessage], partition: int = 0) -> list[int]:
    mine = [one for one in received if one.partition == partition]
    assert all(one.payload == one.message_id.encode() + b"\0" for one in mine)
    return [int(one.message_id) for one in mine]


class Reader:
    """Reads on from where it is, over failures."""

    def __init__(self, broker: Broker, *partitions: int, limit: int = 100) -> None:
        self.offsets = dict.fromkeys(partitions or (0,), "")
        self.seen: defaultdict[int, list[int]] = defaultdict(list)
        self._broker = broker
        self._limit = limit
        self._changed = anyio.Event()

    async def read(self, wait: float = SECONDS) -> int:
        reading = await self._broker.read(self.offsets, self._limit, wait)
        for one in reading.messages:
            self.offsets[one.partition] = one.offset
            self.seen[one.partition] += numbers([one], one.partition)
        self._changed.set()
        self._changed = anyio.Event()
        return len(reading.messages)

    async def read_all(self) -> int:
        count = 0
        while found := await self.read(_SHORT):
            count += found
        return count

    async def wait_for(self, count: int) -> None:
        """Until so many were seen, by another task."""
        while sum(map(len, self.seen.values())) < count:
            await self._changed.wait()

    async def follow(self, until: Callable[[], bool]) -> None:
        with anyio.fail_after(SECONDS):
            while not until():
                try:
                    await self.read(0.5)
                except StorageError:
                    await anyio.sleep(0.01)


def one_of(number: int, partition: int) -> list[Message]:
    return messages(number, partition=partition)


class BrokerContract:
    """What every `Broker` does, as tests.

    Subclass it and give it a fixture `new_broker`: a function that makes brokers, not opened yet,
    of one log that nobody has used, which keeps some hundreds of messages in a partition, and not
    many thousands.
    """

    async def test_messages_come_in_order(self, new_broker: Callable[[], Broker]) -> None:
        broker = new_broker()
        await broker.open()
        try:
            await broker.send(
                [one for number in range(250) for p in range(3) for one in one_of(number, p)]
            )
            await broker.send(messages(250, 251, partition=1))
            reader = Reader(broker, 0, 1, 2, 3, limit=10)
            assert await reader.read_all() == 752
            assert reader.seen[0] == reader.seen[2] == list(range(250))
            assert reader.seen[1] == list(range(252))
        finally:
            await broker.close()

    async def test_reading_goes_on_after_any_offset(self, new_broker: Callable[[], Broker]) -> None:
        broker = new_broker()
        await broker.open()
        try:
            await broker.send(messages(*range(5)))
            await broker.send(messages(5))
            await broker.send(messages(6, 7))
            everything = (await broker.read({0: ""}, 100, 0)).messages
            assert numbers(everything) == list(range(8))
            for one in everything:
                reading = await broker.read({0: one.offset}, 100, _SHORT)
                assert numbers(reading.messages) == list(range(int(one.message_id) + 1, 8))
                assert not reading.lost
            assert len({one.offset for one in everything}) == 8
        finally:
            await broker.close()

    async def test_a_reader_waits_for_what_comes(self, new_broker: Callable[[], Broker]) -> None:
        here, there = new_broker(), new_broker()
        await here.open()
        await there.open()
        try:
            await here.send(messages(1))
            reader = Reader(here, 0, 1)
            await reader.read_all()
            for number in range(2, 6):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(reader.read)
                    await anyio.wait_all_tasks_blocked()
                    tasks.start_soon(there.send, messages(number, partition=number % 2))
            assert reader.seen == {0: [1, 2, 4], 1: [3, 5]}
        finally:
            await here.close()
            await there.close()

    async def test_who_waits_in_vain_is_told(self, new_broker: Callable[[], Broker]) -> None:
        broker = new_broker()
        await broker.open()
        try:
            before = anyio.current_time()
            assert not (await broker.read({0: "", 1: ""}, 10, _SHORT)).messages
            assert anyio.current_time() - before >= _SHORT * 0.9
            await broker.send(messages(1, partition=2))
            assert not (await broker.read({0: "", 1: ""}, 10, _SHORT)).messages
        finally:
            await broker.close()

    async def test_readers_beside_each_other(self, new_broker: Callable[[], Broker]) -> None:
        broker = new_broker()
        await broker.open()
        try:
            readers = [Reader(broker, *range(1 + one % 4), limit=1 + one) for one in range(8)]
            async with anyio.create_task_group() as tasks:
                for one in readers:
                    tasks.start_soon(one.follow, lambda one=one: len(one.seen[0]) >= 100)
                for number in range(0, 100, 2):
                    await broker.send(
                        [
                            *one_of(number, 0),
                            *one_of(number, 1),
                            *one_of(number + 1, 0),
                            *one_of(number, 2),
                        ]
                    )
            for one in readers:
                assert one.seen[0] == list(range(100))
                assert one.seen[1] == sorted(one.seen[1])
        finally:
            await broker.close()

    async def test_ends_are_between_before_and_after(
        self, new_broker: Callable[[], Broker]
    ) -> None:
        broker = new_broker()
        await broker.open()
        try:
            await broker.send(messages(1, 2, 3))
            ends = await broker.ends([0, 1])
            assert set(ends) == {0, 1}
            await broker.send([*messages(4), *messages(1, partition=1)])
            reading = await broker.read(ends, 10, _SHORT)
            assert numbers(reading.messages) == [4]
            assert numbers(reading.messages, 1) == [1]
            assert not reading.lost
        finally:
            await broker.close()

    async def test_reading_back(self, new_broker: Callable[[], Broker]) -> None:
        broker = new_broker()
        await broker.open()
        try:
            await broker.send(messages(0, partition=1))
            await broker.send(messages(*range(150)))
            for number in range(150, 200):
                await broker.send(messages(number))
            everything = (await broker.read({0: ""}, 1000, 0)).messages
            while len(everything) < 200:
                more = await broker.read({0: everything[-1].offset}, 1000, 0)
                assert more.messages
                assert not more.lost
                everything = [*everything, *more.messages]
            for upto, limit in ((199, 5), (199, 80), (199, 500), (160, 30), (70, 20), (0, 5)):
                back = await broker.read_back(0, everything[upto].offset, limit)
                expected = everything[max(0, upto + 1 - limit) : upto + 1]
                assert sorted(numbers(back)) == numbers(expected)
                assert {one.offset for one in back} == {one.offset for one in expected}
        finally:
            await broker.close()

    async def test_what_was_dropped_is_told(self, new_broker: Callable[[], Broker]) -> None:
        broker = new_broker()
        await broker.open()
        try:
            await broker.send(messages(-2, -1))
            first, _ = (await broker.read({0: ""}, 10, 0)).messages
            assert not (await broker.read({0: ""}, 10, 0)).lost
            number = 0
            while not (await broker.read({0: ""}, 1, 0)).lost:
                assert number < 100_000, "it keeps everything"
                await broker.send(messages(*range(number, number + 200)))
                number += 200
            reading = await broker.read({0: first.offset, 1: ""}, 1, 0)
            assert set(reading.lost) == {0}
            kept = reading.messages[0]
            assert int(kept.message_id) >= 0
            reading = await broker.read({0: kept.offset}, 1, 0)
            assert not reading.lost
            assert numbers(reading.messages)[0] == int(kept.message_id) + 1
        finally:
            await broker.close()

    async def test_large_messages(self, new_broker: Callable[[], Broker]) -> None:
        broker = new_broker()
        await broker.open()
        try:
            large = [Message(0, str(one), bytes([one]) * 400_000) for one in range(6)]
            await broker.send(large)
            received: list[ReceivedMessage] = []
            while len(received) < 6:
                offset = received[-1].offset if received else ""
                received += (await broker.read({0: offset}, 100, SECONDS)).messages
            assert [one.payload for one in received] == [one.payload for one in large]
        finally:
            await broker.close()

    # Entries -------------------------------------------------------------------------------------

    async def test_entries(self, new_broker: Callable[[], Broker]) -> None:
        broker, other = new_broker(), new_broker()
        await broker.open()
        await other.open()
        try:
            assert await broker.get("log") is None
            first = await broker.put("log", b"\0\xff", None)
            assert await other.get("log") == Entry("log", b"\0\xff", first)
            second = await other.put("log", b"", first)
            assert second != first
            assert await broker.get("log") == Entry("log", b"", second)
            with pytest.raises(EntryConflictError):
                await broker.delete("log", first)
            await broker.delete("log", second)
            assert await other.get("log") is None
            third = await broker.put("log", b"1", None)
            assert third not in (first, second)
            for expected in (None, first, second):
                with pytest.raises(EntryConflictError):
                    await broker.put("log", b"2", expected)
            assert await broker.get("log") == Entry("log", b"1", third)
            with pytest.raises(EntryConflictError):
                await broker.put("nothing", b"", third)
            with pytest.raises(EntryConflictError):
                await broker.delete("nothing", third)
        finally:
            await broker.close()
            await other.close()

    async def test_entries_of_a_directory(self, new_broker: Callable[[], Broker]) -> None:
        broker = new_broker()
        await broker.open()
        try:
            long = "A=20-_z9" * 125
            for key in ("d/a", f"d/{long}", "d/e/f", "dd/a", f"{long}/{long}", "d"):
                await broker.put(key, key.encode(), None)
            assert sorted(one.key for one in await broker.list("d")) == [f"d/{long}", "d/a"]
            assert all(one.value == one.key.encode() for one in await broker.list("d"))
            assert [one.key for one in await broker.list("d/e")] == ["d/e/f"]
            assert [one.key for one in await broker.list(long)] == [f"{long}/{long}"]
            assert await broker.list("nothing") == []
            (entry,) = await broker.list("dd")
            await broker.delete("dd/a", entry.revision)
            assert await broker.list("dd") == []
        finally:
            await broker.close()

    async def test_a_directory_of_many(self, new_broker: Callable[[], Broker]) -> None:
        broker = new_broker()
        await broker.open()
        try:
            async with anyio.create_task_group() as tasks:
                for number in range(1200):
                    tasks.start_soon(broker.put, f"many/{number}", b"%d" % number, None)
            found = await broker.list("many")
            assert sorted(int(one.value) for one in found) == list(range(1200))
        finally:
            await broker.close()

    async def test_one_of_those_who_put_at_once_wins(
        self, new_broker: Callable[[], Broker]
    ) -> None:
        broker = new_broker()
        await broker.open()
        won: list[int] = []

        async def put(number: int, expected: str | None) -> None:
            try:
                await broker.put("lease/1", b"%d" % number, expected)
            except EntryConflictError:
                return
            won.append(number)

        try:
            revision: str | None = None
            for _ in range(5):
                won.clear()
                async with anyio.create_task_group() as tasks:
                    for number in range(10):
                        tasks.start_soon(put, number, revision)
                entry = await broker.get("lease/1")
                assert entry is not None
                assert won == [int(entry.value)]
                revision = entry.revision
        finally:
            await broker.close()

    # Cancellation --------------------------------------------------------------------------------

    async def test_cancelled_calls_leave_it_usable(self, new_broker: Callable[[], Broker]) -> None:
        broker = new_broker()
        await broker.open()
        sent = 0
        reader = Reader(broker, 0)

        async def send() -> bool:
            nonlocal sent
            sent += 3
            await broker.send(messages(sent, sent + 1, sent + 2))
            return True

        async def check_sent(result: bool | None) -> None:
            reader.seen.clear()
            await reader.read_all()
            seen = reader.seen[0]
            assert seen == [sent, sent + 1, sent + 2][: len(seen)]
            assert len(seen) == 3 or not result

        async def read() -> int:
            return await reader.read(0.01)

        async def check_read(result: int | None) -> None:
            await broker.send(messages(1))
            reader.seen.clear()
            await reader.read_all()
            assert reader.seen[0] == [1]

        async def put() -> str:
            return await broker.put(f"cancelled/{sent}", b"", None)

        async def check_put(result: str | None) -> None:
            nonlocal sent
            entry = await broker.get(f"cancelled/{sent}")
            assert result is None or (entry is not None and entry.revision == result)
            sent += 1

        try:
            with anyio.fail_after(SECONDS):
                assert await cancel_at_every_checkpoint(send, check_sent) >= 1
                assert await cancel_at_every_checkpoint(read, check_read) >= 1
                assert await cancel_at_every_checkpoint(put, check_put) >= 1
        finally:
            await broker.close()

    async def test_callers_with_little_patience(self, new_broker: Callable[[], Broker]) -> None:
        broker = new_broker()
        await broker.open()
        done: list[int] = []

        async def call(number: int) -> None:
            with anyio.move_on_after((0, 0.0001, 0.001, 60)[number % 4]):
                match number % 3:
                    case 0:
                        await broker.send(messages(number))
                    case 1:
                        await broker.put(f"patience/{number}", b"", None)
                    case _:
                        await broker.read({0: "", 1: ""}, 10, _SHORT)
                done.append(number)

        try:
            with anyio.fail_after(SECONDS):
                async with anyio.create_task_group() as tasks:
                    for number in range(240):
                        tasks.start_soon(call, number)
            assert set(range(3, 240, 4)) <= set(done)
            reader = Reader(broker, 0)
            await reader.read_all()
            assert {one for one in done if one % 3 == 0} <= set(reader.seen[0])
            entries = {int(one.key.partition("/")[2]) for one in await broker.list("patience")}
            assert {one for one in done if one % 3 == 1} <= entries
        finally:
            await broker.close()

    async def test_open_and_close(self, new_broker: Callable[[], Broker]) -> None:
        broker = new_broker()
        for number in range(2):
            await broker.open()
            await broker.send(messages(number))
            await broker.close()
        await broker.close()
        with pytest.raises(Exception, match=r"async with|not open"):
            await broker.send(messages(2))
        await broker.open()
        try:
            assert numbers((await broker.read({0: ""}, 10, 0)).messages) == [0, 1]
        finally:
            await broker.close()

    async def test_opening_cancelled(self, new_broker: Callable[[], Broker]) -> None:
        broker = new_broker()

        async def open_it() -> bool:
            await broker.open()
            return True

        async def check(result: bool | None) -> None:
            if result is None:
                await broker.open()
            await broker.send(messages(1))
            await broker.close()

        with anyio.fail_after(SECONDS):
            assert await cancel_at_every_checkpoint(open_it, check) >= 1
