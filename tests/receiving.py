"""For tests of relays: a receiver that notes what it was given, and can be made to fail."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from uuid import UUID

import anyio
from anyio.abc import TaskGroup

from eventsource_anyio import EventStore, OutboxMessage
from eventsource_anyio.relay import OutboxRelay
from eventsource_anyio.repositories.outbox import StoredMessage

PATIENCE = 30
NEVER = 3600.0


async def nothing(message: StoredMessage) -> None:
    pass


class Receiver:
    """What it was given, again and again among it; `once` is that of a receiver that knows ids."""

    def __init__(self, before: Callable[[StoredMessage], Awaitable[None]] = nothing) -> None:
        self.before = before  # awaited before a message counts as received; may raise
        self.calls: list[list[str]] = []
        self.received: list[OutboxMessage] = []
        self._changed = anyio.Event()

    async def __call__(self, messages: Sequence[StoredMessage]) -> None:
        self.calls.append([one.message.payload.decode() for one in messages])
        for one in messages:
            await self.before(one)
            self.received.append(one.message)
            self._changed.set()
            self._changed = anyio.Event()

    @property
    def once(self) -> list[str]:
        """The payloads, each at its first time."""
        first: dict[UUID, str] = {}
        for one in self.received:
            first.setdefault(one.message_id, one.payload.decode())
        return list(first.values())

    def of(self, key: str) -> list[str]:
        return [text for text in self.once if text.startswith(f"{key}:")]

    async def has(self, *payloads: str) -> None:
        """Return once it has all of them."""
        with anyio.fail_after(PATIENCE):
            while not set(payloads) <= set(self.once):
                await self._changed.wait()


def message(key: str, number: int, topic: str = "t") -> OutboxMessage:
    return OutboxMessage(topic, f"{key}:{number}".encode(), key)


async def add(store: EventStore, key: str, *numbers: int) -> list[str]:
    """Add messages of a key; their payloads."""
    await store.outbox.add(*[message(key, number) for number in numbers])
    return [f"{key}:{number}" for number in numbers]


async def pending(store: EventStore) -> list[str]:
    return [one.message.payload.decode() for one in await store.outbox.pending(10**6)]


@asynccontextmanager
async def running(*relays: OutboxRelay) -> AsyncIterator[TaskGroup]:
    """They have started; they are stopped at the end of the block."""
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            for relay in relays:
                await tasks.start(relay.run)
            yield tasks
            for relay in relays:
                relay.stop()
