"""Another process on the same SQLite file: the tests of `test_sqlite_processes.py` start it.

    python sqlite_writer.py MODE BACKEND ITS_OPTIONS_AS_JSON ARGUMENT...

It says lines on its standard output, and is told lines on its standard input.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Awaitable, Callable
from random import randint
from uuid import uuid4

import anyio

from eventsource_anyio import (
    ANY,
    AppendResult,
    CheckpointConflictError,
    ConcurrencyError,
    EventStore,
    NewEvent,
    OutboxMessage,
    SQLiteEventStore,
)
from eventsource_anyio.testing.samples import Happened, numbers


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


async def told() -> str:
    line: str = await anyio.to_thread.run_sync(sys.stdin.readline)
    return line.rstrip("\n")


async def append(path: str, name: str, times: str) -> None:
    """Append pairs of events to a shared stream, and count a shared counter up."""

    async def append_pairs() -> None:
        for number in range(int(times)):
            pair = [Happened(number, name), Happened(number, name)]
            await store.append_events("shared", "Thing", pair, ANY)

    async def count_up() -> None:
        for _ in range(int(times)):
            while not await counted(store):
                pass

    async with SQLiteEventStore(path, synchronous="NORMAL") as store:
        say("ready")
        await told()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(append_pairs)
            tasks.start_soon(count_up)


async def counted(store: EventStore) -> bool:
    """Append the number after the counter's last one, unless somebody was faster."""
    counter = await store.get_events("all", "Counter")
    last = numbers(counter)[-1] if counter else 0
    try:
        await store.append_events("all", "Counter", [Happened(last + 1)], counter.version)
    except ConcurrencyError:
        return False
    return True


async def hand_over(path: str, name: str, times: str) -> None:
    """Count a shared checkpoint up, with an event and a message each time, among others that do."""
    won = 0
    async with SQLiteEventStore(path, synchronous="NORMAL") as store:
        say("ready")
        await told()
        while won < int(times):
            position = await store.checkpoints.get("shared")
            try:
                async with store.transaction() as tx:
                    await tx.append_events(name, "Thing", [Happened(position + 1)], ANY)
                    await tx.outbox.add(OutboxMessage(name, str(position + 1).encode()))
                    await tx.checkpoints.save("shared", position + 1, expected=position)
            except CheckpointConflictError:
                continue
            won += 1


async def load(path: str, synchronous: str) -> None:
    """Write for ever, and say what was acknowledged: a line for every append or transaction."""
    async with SQLiteEventStore(path, synchronous=synchronous) as store:  # type: ignore[arg-type]
        async with anyio.create_task_group() as tasks:
            for number in range(4):
                tasks.start_soon(load_appends, store, f"own{number}")
                tasks.start_soon(load_transactions, store, f"own{number}")


async def load_appends(store: EventStore, own: str) -> None:
    while True:
        for aggregate_id in (own, "shared"):
            events = a_unit(randint(1, 6))
            acknowledge(await store.append_events(aggregate_id, "Thing", events, ANY))


async def load_transactions(store: EventStore, own: str) -> None:
    while True:
        events = a_unit(randint(2, 6))
        async with store.transaction() as tx:
            await tx.append_events("shared", "Thing", events[:1], ANY)
            await tx.outbox.add(OutboxMessage("t", b"", message_id=events[1].event_id))
            await tx.append_events(own, "Other", events[1:], ANY)
        acknowledge(*tx.results)


def a_unit(size: int) -> list[NewEvent]:
    """Events that are stored together; the note of each names the unit and says how many."""
    note = f"{uuid4()} {size}"
    return [NewEvent(Happened(number, note)) for number in range(size)]


def acknowledge(*results: AppendResult) -> None:
    stored = [stored for result in results for stored in result.events]
    say(json.dumps([[str(one.event_id), one.stream_id, one.version] for one in stored]))


async def open_files() -> None:
    """Open each file that is told, and append to it."""
    while path := await told():
        async with SQLiteEventStore(path, synchronous="NORMAL") as store:
            await store.append_events(uuid4(), "Thing", [Happened()], ANY)
        say("done")


if __name__ == "__main__":
    mode, backend, options, *arguments = sys.argv[1:]
    modes: dict[str, Callable[..., Awaitable[None]]]
    modes = {"append": append, "hand_over": hand_over, "load": load, "open_files": open_files}
    anyio.run(modes[mode], *arguments, backend=backend, backend_options=json.loads(options))
