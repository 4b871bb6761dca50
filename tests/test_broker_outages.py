"""Buses over brokers where the server fails: killed, restarted, emptied, refusing."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import anyio
import pytest

from eventsource_anyio import StorageError, StoredEvent
from eventsource_anyio.bus import consuming, receiving
from eventsource_anyio.bus.redis import RedisEventBus
from eventsource_anyio.bus.redis_connection import RedisConnections
from eventsource_anyio.testing import cancel_at_every_checkpoint
from eventsource_anyio.testing.buses import Seen, by_stream, receive, stored
from eventsource_anyio.testing.nats import NATSServer, nats_binary
from eventsource_anyio.testing.redis import RedisServer, redis_binary

from .brokering import BUSES, SECONDS, MakeBus, running

STREAMS = 12


SERVERS: dict[str, tuple[Path | None, Any]] = {
    "nats": (nats_binary(), NATSServer),
    "redis": (redis_binary(), RedisServer),
}


@pytest.fixture(params=sorted(SERVERS))
def server(request: pytest.FixtureRequest) -> Iterator[NATSServer | RedisServer]:
    binary, kind = SERVERS[request.param]
    if binary is None:
        reason = f"no {request.param}-server, to be killed"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with kind(binary) as server:
        yield server


only_redis = pytest.mark.parametrize("server", ["redis"], indirect=True)


@pytest.fixture
def make_bus(server: NATSServer | RedisServer) -> MakeBus:
    return BUSES[server.url.partition(":")[0]](server.url)


async def test_a_server_that_is_killed_under_load_costs_no_event_and_no_order(
    server, make_bus, event_store
):
    """By a publisher that does what a relay does: the same batch again until it is stored."""
    seen = Seen()
    bus = make_bus()
    bus.register(seen)
    received: list[StoredEvent] = []
    total = 200 * STREAMS

    async def publish(publisher) -> None:
        failures = 0
        for number in range(100):
            batch: list[StoredEvent] = []
            for stream in range(STREAMS):
                batch += await stored(event_store, 2, str(stream), number)
            while True:
                try:
                    await publisher.publish(batch)
                except StorageError:
                    failures += 1
                    await anyio.sleep(0.02)
                else:
                    break
        assert failures

    async def follow(*, task_status) -> None:
        async with bus.subscribe() as stream:
            task_status.started()
            while len(received) < total:
                received.append(await stream.receive())

    async def crash() -> None:
        for share in (0.2, 0.5, 0.8):
            await seen.wait_for(int(share * total))
            server.kill()
            await anyio.sleep(0.05)  # so that calls fail meanwhile
            await anyio.to_thread.run_sync(server.start)

    with anyio.fail_after(90):
        async with make_bus() as publisher, running(bus):
            async with anyio.create_task_group() as tasks:
                await tasks.start(follow)
                tasks.start_soon(crash)
                await publish(publisher)
            await seen.wait_for(total)
    whole = {f"Thing-{one}": list(range(1, 201)) for one in range(STREAMS)}
    assert by_stream(received) == whole
    # What was handled and not yet saved may be handled again, but then from there on.
    assert by_stream(seen.events) == whole


async def test_what_is_in_the_background_waits_for_the_server(server, make_bus, event_store):
    bus = make_bus(buffer=100)
    async with running(bus), bus.subscribe() as stream:
        server.kill()
        for number in range(10):
            await bus.publish(await stored(event_store, 3, "a", number), background=True)
        assert bus.statistics().queued == 30
        server.start()
        received = await receive(stream, 30)
    assert by_stream(received) == {"Thing-a": list(range(1, 31))}


async def test_a_server_that_is_not_there(server, make_bus, event_store):
    events = await stored(event_store, 1)
    async with make_bus() as bus:
        await bus.publish(events)
        server.kill()
        with pytest.raises(StorageError, match=r"cannot be reached|does not answer"):
            await bus.publish(await stored(event_store, 1))
        bus.register(Seen())
        with pytest.raises(StorageError):
            await bus.run()
        await bus.wait_stopped()
        with pytest.raises(StorageError, match="Nothing of this call was done"):
            async with make_bus():
                pass
    server.start()
    async with make_bus() as bus, bus.subscribe(after=0) as stream:
        assert await receive(stream, 1) == list(events)  # and what has failed is not sent later
        server.kill()
        with pytest.raises(StorageError):
            await bus.publish(await stored(event_store, 1, "failed"))
        server.start()
        last = await stored(event_store, 1, "last")
        await bus.publish(last)
        assert await receive(stream, 1) == list(last)
        with anyio.move_on_after(0.05):
            assert await stream.receive() is None


async def test_a_server_that_came_back_empty_is_filled_from_the_store(
    server, make_bus, event_store
):
    seen = Seen()
    bus = make_bus(lease=0.5)
    bus.register(seen)
    events = [*await stored(event_store, 50, "a"), *await stored(event_store, 50, "b")]
    async with running(bus), bus.subscribe() as stream:
        await bus.publish(events)
        await seen.wait_for(100)
        assert len(await receive(stream, 100)) == 100
        server.kill()
        server.lose_everything()
        lost = await stored(event_store, 50, "a")  # nobody has heard of these
        server.start()
        assert await bus.refill(event_store) == 150
        await seen.wait(lambda: {one.event_id for one in lost} <= {e.event_id for e in seen.events})
        assert await receive(stream, 50) == list(lost)
        last = await stored(event_store, 1, "a")
        await bus.publish(last)
        await seen.wait(lambda: seen.events[-1] == last[0])
        assert await receive(stream, 1) == list(last)


@only_redis
async def test_a_log_that_was_lost_alone_is_read_from_its_new_beginning(
    server, make_bus, event_store, monkeypatch
):
    """Also where the server's clock was set back, so that its ids are smaller than before."""
    for reading in (consuming, receiving):  # whoever waits for a later id is told of none
        monkeypatch.setattr(reading, "_WAIT", 0.1)
    seen = Seen()
    bus = make_bus(partitions=1)
    bus.register(seen)
    connections = RedisConnections(server.url)
    connections.open()
    async with running(bus), bus.subscribe(catch_up=event_store) as stream:
        await bus.publish(await stored(event_store, 5))
        await seen.wait_for(5)
        await receive(stream, 5)
        (keys,) = await connections.call(("KEYS", "*:events:*"))
        (key,) = cast("list[bytes]", keys)
        await connections.call(("DEL", key), ("XADD", key, "1-0", "i", "x", "p", "no event"))
        await bus.publish(await stored(event_store, 5))
        await seen.wait_for(10)
        assert len(await receive(stream, 5)) == 5
    await connections.close()
    assert by_stream(seen.events) == {"Thing-a": list(range(1, 11))}


async def test_a_stopped_server_is_waited_for_and_can_be_given_up(server, make_bus, event_store):
    async with make_bus() as bus:
        os.kill(server.pid, signal.SIGSTOP)
        try:
            with anyio.move_on_after(0.1) as scope:
                await bus.publish(await stored(event_store, 1))
            assert scope.cancelled_caught
        finally:
            os.kill(server.pid, signal.SIGCONT)
        async with bus.subscribe(after=0) as stream:
            await bus.publish(await stored(event_store, 1))
            with anyio.fail_after(SECONDS):
                while (await stream.receive()).version != 2:
                    pass


async def test_calls_may_be_cancelled_anywhere_and_leave_the_bus_usable(make_bus, event_store):
    async with make_bus() as bus, bus.subscribe() as stream:
        events = await stored(event_store, 3)

        async def publish() -> None:
            await bus.publish(events)
            await bus.dead_letters()

        async def check(_: None) -> None:
            await bus.publish(await stored(event_store, 1, "check"))
            with anyio.fail_after(SECONDS):
                while (await stream.receive()).stream_id != "Thing-check":
                    pass

        assert await cancel_at_every_checkpoint(publish, check) >= 2


# -- connecting -------------------------------------------------------------------------------


@only_redis
async def test_a_password_and_a_database(server, event_store):
    connections = RedisConnections(server.url)
    connections.open()
    await connections.call(
        ("ACL", "SETUSER", "me", "on", ">s3cr:t/@", "~*", "+@all"),
        ("CONFIG", "SET", "requirepass", "pass word"),
    )
    await connections.close()
    address = server.url.removeprefix("redis://")
    for account in ("me:s3cr%3At%2F%40", ":pass%20word"):
        prefix = uuid4().hex
        url = f"redis://{account}@{address}/3"
        async with RedisEventBus(url, prefix=prefix) as bus, bus.subscribe() as stream:
            await bus.publish(await stored(event_store, 1))
            assert len(await receive(stream, 1)) == 1
        async with RedisEventBus(f"redis://{account}@{address}/4", prefix=prefix) as bus:
            async with bus.subscribe(after=0) as stream:
                with anyio.move_on_after(0.05) as scope:
                    await stream.receive()
                assert scope.cancelled_caught
    with pytest.raises(StorageError, match="refuses: Authentication"):
        async with RedisEventBus(server.url):
            pass
    with pytest.raises(StorageError, match=r"WRONGPASS|Authentication"):
        async with RedisEventBus(f"redis://:wrong@{address}"):
            pass
    with pytest.raises(StorageError, match="out of range"):
        async with RedisEventBus(f"redis://:pass%20word@{address}/99"):
            pass


async def test_a_unix_socket(tmp_path_factory, event_store):
    binary = redis_binary()
    if binary is None:
        pytest.skip("no redis-server on PATH")
    socket = tmp_path_factory.mktemp("s") / "redis"
    with RedisServer(binary, settings=("--unixsocket", str(socket))):
        async with RedisEventBus(f"unix://{socket}") as bus, bus.subscribe() as stream:
            await bus.publish(await stored(event_store, 1))
            assert len(await receive(stream, 1)) == 1


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl, to make a certificate")
async def test_tls_checks_the_certificate_and_its_name(tmp_path_factory, event_store):
    binary = redis_binary()
    if binary is None:
        pytest.skip("no redis-server on PATH")
    directory = tmp_path_factory.mktemp("tls")
    key, certificate = directory / "key", directory / "certificate"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=test"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key)]
    await anyio.run_process([*command, "-out", str(certificate)])
    port = secrets.choice(range(10_000, 32_000))
    settings = (
        *("--tls-port", str(port), "--tls-auth-clients", "no"),
        *("--tls-cert-file", str(certificate), "--tls-key-file", str(key)),
    )
    with RedisServer(binary, settings=settings):
        trusted = f"ssl_ca_certs={certificate}&ssl_check_hostname=true"
        url = f"rediss://localhost:{port}/0?{trusted}"
        async with RedisEventBus(url) as bus, bus.subscribe() as stream:
            await bus.publish(await stored(event_store, 100))
            assert len(await receive(stream, 100)) == 100
        for wrong in (f"rediss://localhost:{port}", f"rediss://127.0.0.1:{port}?{trusted}"):
            with pytest.raises(StorageError, match=r"(?i)certificate"):
                async with RedisEventBus(wrong):
                    pass


def test_without_coredis_it_is_said_which_extra_brings_it():
    script = (
        "import sys; sys.modules['coredis'] = None\n"
        "try:\n    import eventsource_anyio.bus.redis\n"
        "except ImportError as error:\n    print(error)"
    )
    said = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert "pip install 'eventsource-anyio[redis]'" in said.stdout


def test_a_url_of_something_else():
    with pytest.raises(ValueError, match="redis://"):
        RedisEventBus("nats://localhost")
