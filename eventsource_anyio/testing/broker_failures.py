"""What a broker does when its server fails, as a test suite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import anyio
import pytest

from ..bus.broker import Broker, Entry, EntryConflictError, Message
from ..errors import StorageError
from .brokers import SECONDS, Reader, messages, numbers, one_of


class Server(Protocol):
    """A server that can be made to fail."""

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def kill(self) -> None: ...
    def lose_everything(self) -> None: ...


async def insist(broker: Broker, to_send: Sequence[Message]) -> None:
    """Send, and again until it is done."""
    while True:
        try:
            await broker.send(to_send)
        except StorageError:
            await anyio.sleep(0.01)
        else:
            break


class BrokerFailureContract:
    """What a `Broker` does when its server fails: `new_broker` as in `BrokerContract`, of the
    server that the fixture `server` is, which is running."""

    async def test_killed_and_started_again(
        self, new_broker: Callable[[], Broker], server: Server
    ) -> None:
        broker = new_broker()
        await broker.open()
        try:
            await broker.send(messages(1, 2))
            revision = await broker.put("kept", b"1", None)
            reader = Reader(broker, 0, 1)
            await reader.read_all()
            server.kill()
            with anyio.fail_after(SECONDS):
                for call in (
                    broker.send(messages(3)),
                    broker.get("kept"),
                    broker.put("kept", b"2", revision),
                    broker.ends([0]),
                ):
                    with pytest.raises(StorageError, match="\n"):
                        await call
            server.start()
            await insist(broker, messages(4))
            await reader.follow(lambda: 4 in reader.seen[0])
            assert [one for one in reader.seen[0] if one != 3] == [1, 2, 4]
            assert await broker.get("kept") == Entry("kept", b"1", revision)
            await broker.put("kept", b"3", revision)
        finally:
            await broker.close()

    async def test_a_reader_waits_over_a_restart(
        self, new_broker: Callable[[], Broker], server: Server
    ) -> None:
        broker, other = new_broker(), new_broker()
        await broker.open()
        try:
            await broker.send(messages(1))
            reader = Reader(broker, 0, 1)
            await reader.read_all()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(reader.follow, lambda: reader.seen[0] == [1, 2])
                await anyio.wait_all_tasks_blocked()
                server.stop()
                server.start()
                await other.open()
                await other.send(messages(2))
        finally:
            await broker.close()
            await other.close()

    async def test_killed_under_load_it_loses_nothing_and_keeps_the_order(
        self, new_broker: Callable[[], Broker], server: Server
    ) -> None:
        broker, reading = new_broker(), new_broker()
        await broker.open()
        await reading.open()
        reader = Reader(reading, 0, 1, 2)
        total = 3000

        async def send() -> None:
            for number in range(0, total, 10):
                batch = [one for n in range(number, number + 10) for one in one_of(n, n % 3)]
                await insist(broker, batch)

        async def kill() -> None:
            for enough in (200, 1000):
                await reader.wait_for(enough)
                server.kill()
                await anyio.to_thread.run_sync(server.start)

        try:
            with anyio.fail_after(SECONDS):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(send)
                    tasks.start_soon(kill)
                    await reader.follow(lambda: total - 1 in reader.seen[(total - 1) % 3])
                for partition in range(3):
                    mine = reader.seen[partition]
                    await reader.follow(lambda mine=mine: len(set(mine)) == total // 3)  # type: ignore[misc]
            for partition in range(3):
                first_time = list(dict.fromkeys(reader.seen[partition]))
                assert first_time == list(range(partition, total, 3))
        finally:
            await broker.close()
            await reading.close()

    async def test_everything_lost(self, new_broker: Callable[[], Broker], server: Server) -> None:
        broker = new_broker()
        await broker.open()
        try:
            await broker.send(messages(*range(5)))
            revision = await broker.put("gone", b"1", None)
            reader = Reader(broker, 0, 1)
            await reader.read_all()
            server.stop()
            server.lose_everything()
            server.start()
            await insist(broker, messages(5, 6))
            reading = await broker.read(reader.offsets, 10, SECONDS)
            assert numbers(reading.messages) == [5, 6]
            assert set(reading.lost) == {0}
            assert await broker.get("gone") is None
            assert await broker.list("any") == []
            with pytest.raises(EntryConflictError):
                await broker.put("gone", b"2", revision)
            assert await broker.put("gone", b"2", None) != revision
        finally:
            await broker.close()

    async def test_there_is_no_server(
        self, new_broker: Callable[[], Broker], server: Server
    ) -> None:
        broker = new_broker()
        server.stop()
        try:
            with anyio.fail_after(SECONDS), pytest.raises(StorageError, match="\n"):
                await broker.open()
        finally:
            server.start()
        await broker.open()
        try:
            await broker.send(messages(1))
        finally:
            server.stop()  # nor when it is closed
            with anyio.fail_after(SECONDS):
                await broker.close()
            server.start()
