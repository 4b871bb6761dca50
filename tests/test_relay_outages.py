"""The relay of the outbox on a PostgreSQL server that goes away or loses connections."""

from __future__ import annotations

from random import Random

import anyio
import pytest
from anyio import to_thread

from eventsource_anyio import OutboxMessage, StorageError
from eventsource_anyio.relay import OutboxRelay
from eventsource_anyio.repositories.outbox import StoredMessage
from eventsource_anyio.stores.postgresql import PostgreSQLEventStore
from eventsource_anyio.testing.postgresql import PostgreSQLServer
from tests.read_models import until
from tests.receiving import Receiver, message, running
from tests.test_postgresql_failures import (
    Database,
    database,
    driver,
    network,
    server,
    store,
    template,
)

__all__ = ["database", "driver", "network", "server", "store", "template"]

KEYS = "abcdefg"


class Writing:
    """Adds messages of all keys until it is stopped, through whatever happens."""

    def __init__(self, store: PostgreSQLEventStore) -> None:
        self.store = store
        self.added: dict[str, list[str]] = {key: [] for key in KEYS}
        self.count = 0
        self.next: OutboxMessage | None = None
        self.stopping = self.ended = False

    async def run(self) -> None:
        while not self.stopping or self.next:  # what was sent may be there, and has to be known
            key = KEYS[self.count % len(KEYS)]
            one = self.next = self.next or message(key, self.count)
            try:  # the same message again, in case that its answer was lost
                await self.store.outbox.add(one)
            except StorageError:
                await anyio.sleep(0.01)
                continue
            self.added[key].append(one.payload.decode())
            self.next = None
            self.count += 1
            await anyio.sleep(0.001)
        self.ended = True


async def poison(stored: StoredMessage) -> None:
    if stored.message.key == "g" and stored.position % 5 == 0:
        raise ValueError("poison")


async def finish(
    relay: OutboxRelay, receiver: Receiver, writing: Writing, store: PostgreSQLEventStore
) -> None:
    """Every key has all of its messages, in order, but for what is set aside of one."""

    async def empty() -> bool:
        return not await store.outbox.pending(1)

    await until(relay.parked)  # it depends on the machine when there is something of the kind
    writing.stopping = True
    await until(lambda: writing.ended)
    await until(empty)
    (parked,) = await relay.parked()
    receiver.before = Receiver().before
    assert await relay.retry_parked(parked) == parked.messages
    assert {key: receiver.of(key) for key in KEYS} == writing.added
    assert await relay.parked() == []


async def test_connections_that_are_killed_cost_nothing(
    database: Database, store: PostgreSQLEventStore
):
    random = Random(5)
    receiver, writing = Receiver(poison), Writing(store)
    relay = OutboxRelay(store, receiver, attempts=2, retry_after=0.001, batch_size=20)
    async with running(relay) as tasks:
        tasks.start_soon(writing.run)
        for _ in range(25):
            if pids := database.pids():
                database.terminate(random.choice(pids))
            enough = writing.count + random.randrange(8)
            await until(lambda: writing.count >= enough)  # noqa: B023
            assert relay.statistics().state in ("running", "retrying")
        await finish(relay, receiver, writing, store)


@pytest.mark.parametrize("how", ["restart", "kill"])
async def test_a_server_that_is_restarted_is_waited_for(
    server: PostgreSQLServer, store: PostgreSQLEventStore, how: str
):
    receiver, writing = Receiver(poison), Writing(store)
    relay = OutboxRelay(store, receiver, attempts=2, retry_after=0.001, batch_size=20)
    async with running(relay) as tasks:
        tasks.start_soon(writing.run)
        await until(lambda: writing.count > 40)
        await to_thread.run_sync(server.kill if how == "kill" else server.stop)
        await until(lambda: relay.statistics().state == "retrying")
        await to_thread.run_sync(server.start)
        enough = writing.count + 40
        await until(lambda: writing.count > enough)
        await finish(relay, receiver, writing, store)


@pytest.mark.usefixtures("again_soon")
async def test_it_can_be_stopped_while_the_server_is_away(
    server: PostgreSQLServer, store: PostgreSQLEventStore
):
    receiver = Receiver()
    relay = OutboxRelay(store, receiver, poll_every=0.02, lease=0.5)
    async with running(relay):
        await store.outbox.add(message("a", 1))
        await receiver.has("a:1")
        await to_thread.run_sync(server.stop)
        try:
            await until(lambda: relay.statistics().state == "retrying")
            with anyio.fail_after(15):
                relay.stop()
                await relay.wait_stopped()
        finally:
            await to_thread.run_sync(server.start)
    async with running(relay):  # after the lease
        await store.outbox.add(message("a", 2))
        await receiver.has("a:2")
