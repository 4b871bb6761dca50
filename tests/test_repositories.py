"""Checkpoints, the outbox and documents: what the contract of stores leaves open."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from enum import IntEnum, StrEnum
from pathlib import Path

import anyio
import attrs
import pytest

from eventsource_anyio import (
    ANY,
    NO_STREAM,
    CheckpointConflictError,
    DuplicateEventError,
    EventStore,
    InMemoryEventStore,
    NewEvent,
    OutboxMessage,
    SQLiteEventStore,
    StorageError,
    StoredEvent,
)
from eventsource_anyio.errors import DocumentConflictError
from eventsource_anyio.testing.samples import Ended, Happened, append_numbers

connect = sqlite3.connect


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.db"


@pytest.fixture(name="store")
async def open_store(path: Path) -> AsyncIterator[SQLiteEventStore]:
    async with SQLiteEventStore(path, synchronous="NORMAL") as store:
        yield store


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What SQLite is asked by the stores of a test, in order."""
    statements: list[str] = []

    def traced(*args: object, **options: object) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*args, **options)  # type: ignore[call-overload]
        connection.set_trace_callback(statements.append)
        return connection

    monkeypatch.setattr(sqlite3, "connect", traced)
    return statements


def execute(path: Path, statement: str) -> list[tuple[object, ...]]:
    connection = connect(path)
    found = connection.execute(statement).fetchall()
    connection.commit()
    connection.close()
    return found


async def read(store: EventStore) -> list[StoredEvent]:
    return [stored async for stored in store.read_all()]


async def pending(store: EventStore) -> list[bytes]:
    return [one.message.payload for one in await store.outbox.pending()]


# -- messages ---------------------------------------------------------------------------------


def test_a_message_has_an_id_and_nothing_else_by_default():
    one, two = OutboxMessage("orders", b"1"), OutboxMessage("orders", b"1")
    assert (one.topic, one.payload, one.key, one.metadata) == ("orders", b"1", "", {})
    assert one.message_id < two.message_id
    assert one != two
    assert one == attrs.evolve(two, message_id=one.message_id)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        one.topic = "others"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("wrong", "error", "why"),
    [
        ({"topic": ""}, ValueError, "topic must have 1 to 255 characters"),
        ({"topic": "t" * 256}, ValueError, "topic must have 1 to 255 characters"),
        ({"topic": "t\0"}, ValueError, "topic holds a character"),
        ({"topic": None}, TypeError, "topic must be a string"),
        ({"key": "k" * 256}, ValueError, "key must have 1 to 255 characters"),
        ({"key": "\ud800"}, ValueError, "key holds a character"),
        ({"key": 7}, TypeError, "key must be a string"),
        ({"key": None}, TypeError, "key must be a string"),
        ({"payload": "text"}, TypeError, "payload must be bytes, not str: encode it"),
        ({"payload": bytearray(b"1")}, TypeError, "payload must be bytes, not bytearray"),
        ({"payload": None}, TypeError, "payload must be bytes"),
        ({"message_id": "7"}, TypeError, "message_id"),
        ({"message_id": None}, TypeError, "message_id"),
    ],
)
def test_what_cannot_be_a_message_is_refused_at_once(wrong, error, why):
    with pytest.raises(error, match=why):
        OutboxMessage(**{"topic": "t", "payload": b"", **wrong})


class Text(StrEnum):
    TOPIC = "topic"


class Number(IntEnum):
    SEVEN = 7


class Payload(bytes):
    pass


@pytest.mark.parametrize("in_memory", [True, False])
async def test_what_is_stored_comes_back_as_plain_values(store: SQLiteEventStore, in_memory: bool):
    async with InMemoryEventStore() as other:
        either = other if in_memory else store
        await either.checkpoints.save(Text.TOPIC, Number.SEVEN)
        await either.outbox.add(OutboxMessage(Text.TOPIC, Payload(b"1"), Text.TOPIC))
        await either.documents.save(Text.TOPIC, Text.TOPIC, {Text.TOPIC: [Number.SEVEN]})
        (document,) = await either.documents.list("topic")
        assert type(document.key) is str
        assert repr(document.value) == "{'topic': [7]}"
        assert type(await either.checkpoints.get("topic")) is int
        (found,) = await either.outbox.pending()
        for value, plain in ((found.message.topic, str), (found.message.key, str)):
            assert type(value) is plain
        assert type(found.message.payload) is bytes


async def test_a_store_in_memory_that_is_opened_again_has_everything():
    store = InMemoryEventStore()
    for version in (1, 2):
        async with store:
            async with store.transaction() as tx:
                await tx.checkpoints.save("reader", version, expected=version - 1)
                await tx.outbox.add(OutboxMessage("t", b"%d" % version))
                await tx.documents.add("c", str(version), version)
            assert len(await pending(store)) == len(await store.documents.list("c")) == version


# -- in the file ------------------------------------------------------------------------------


async def test_a_file_that_is_opened_again_has_everything(path: Path):
    async with SQLiteEventStore(path) as store:
        await store.checkpoints.save("reader", 7)
        await store.outbox.add(OutboxMessage("t", b"1", "k", {"user": "ann"}))
        await store.documents.save_all("c", {"a": {"b": [1e300]}, "ü": None})
        before = [*await store.outbox.pending(), *await store.documents.list("c")]
    async with SQLiteEventStore(path) as store:
        assert await store.checkpoints.get("reader") == 7
        assert [*await store.outbox.pending(), *await store.documents.list("c")] == before


async def test_positions_of_an_outbox_that_was_empty_do_not_start_again(path: Path):
    positions: list[int] = []
    for _ in range(3):
        async with SQLiteEventStore(path, synchronous="NORMAL") as store:
            await store.outbox.add(OutboxMessage("t", b""))
            (stored,) = await store.outbox.pending()
            positions.append(stored.position)
            await store.outbox.delivered([stored.message.message_id])
    assert positions == [1, 2, 3]


async def test_a_message_that_was_broken_in_the_file_is_reported_and_can_be_mended(
    path: Path, store: SQLiteEventStore
):
    message = OutboxMessage("t", b"1", metadata={"user": "ann"})
    await store.outbox.add(message)
    for broken in ("'{\"user\"'", "CAST(x'ff' AS TEXT)", "'[]'"):
        execute(path, f"UPDATE outbox SET metadata = {broken}")
        with pytest.raises(StorageError, match=f"Message {message.message_id}.*\n.*\n") as raised:
            await store.outbox.pending()
        assert "position 1" in str(raised.value)
    execute(path, 'UPDATE outbox SET metadata = \'{"user":"bob"}\'')
    assert [one.message.metadata for one in await store.outbox.pending()] == [{"user": "bob"}]


async def test_a_document_that_was_broken_in_the_file_is_reported_and_can_be_mended(
    path: Path, store: SQLiteEventStore
):
    revision = await store.documents.add("c", "a", 1)
    for broken in ("'{\"user\"'", "CAST(x'22ff22' AS TEXT)", "''"):
        execute(path, f"UPDATE documents SET value = {broken}")
        for call in (store.documents.get("c", "a"), store.documents.list("c")):
            with pytest.raises(StorageError, match=r"'a' of 'c' cannot be read\.\n.*\n"):
                await call
    execute(path, "UPDATE documents SET value = '{\"mended\": 1}'")
    found = await store.documents.get("c", "a")
    assert found is not None
    assert (found.value, found.revision) == ({"mended": 1}, revision)


async def test_stores_on_one_file_see_each_others_checkpoints_and_messages(
    path: Path, store: SQLiteEventStore
):
    async with SQLiteEventStore(path, synchronous="NORMAL") as other:
        await store.checkpoints.save("reader", 1, expected=0)
        with pytest.raises(CheckpointConflictError):
            await other.checkpoints.save("reader", 2, expected=0)
        await other.checkpoints.save("reader", 2, expected=1)
        revision = await store.documents.add("c", "a", 1)
        with pytest.raises(DocumentConflictError):
            await other.documents.add("c", "a", 2)
        await other.documents.save("c", "a", 2, expected=revision)
        with pytest.raises(DocumentConflictError):
            await store.documents.save("c", "a", 3, expected=revision)
        message = OutboxMessage("t", b"1")
        await store.outbox.add(message)
        await other.outbox.delivered([message.message_id])
        assert await store.checkpoints.get("reader") == 2
        assert await pending(store) == []
        # What one of them knows of versions and positions is not outdated by its own savepoints.
        for number in range(3):
            for one in (store, other):
                async with one.transaction() as tx:
                    await tx.append_events("a", "Thing", [Happened(number)], ANY)
                    await tx.checkpoints.save("reader", number)
        assert [stored.position for stored in await read(store)] == list(range(1, 7))


# -- sharing a commit -------------------------------------------------------------------------


async def test_units_share_a_commit_and_a_conflict_is_its_own_callers_only(
    path: Path, statements: list[str]
):
    known = NewEvent(Happened(-1))
    outcomes: dict[int, type[Exception]] = {}

    async def write(number: int) -> None:
        try:
            if number % 5 == 0:
                await store.append_events(str(number), "Thing", [Happened(number)] * 2, NO_STREAM)
            elif number % 5 == 1:
                async with store.transaction() as tx:
                    await tx.append_events(str(number), "Thing", [Happened(number)], NO_STREAM)
                    await tx.checkpoints.save(str(number), number)
                    await tx.outbox.add(OutboxMessage("t", b"%d" % number))
            elif number % 5 == 2:
                async with store.transaction() as tx:
                    await tx.append_events("shared", "Thing", [Happened(number)], ANY)
                    await tx.outbox.add(OutboxMessage("t", b"wrong"))
                    await tx.checkpoints.save(str(number), number, expected=99)
            elif number % 5 == 3:
                async with store.transaction() as tx:
                    await tx.checkpoints.save(str(number), number)
                    await tx.append_events("shared", "Thing", [Happened(number)], ANY)
                    await tx.append_events(str(number), "Thing", [Ended(), known], ANY)
            else:
                await store.append_events("shared", "Thing", [Happened(number)], ANY)
        except (CheckpointConflictError, DuplicateEventError) as error:
            outcomes[number] = type(error)

    async with SQLiteEventStore(path, synchronous="NORMAL") as store:
        await store.append_events("known", "Thing", [known], ANY)
        statements.clear()
        async with anyio.create_task_group() as tasks:
            for number in range(100):
                tasks.start_soon(write, number)
        assert statements.count("COMMIT") < 20
        assert statements.count("ROLLBACK") == 0
        kinds = {2: CheckpointConflictError, 3: DuplicateEventError}
        assert outcomes == {
            number: kinds[number % 5] for number in range(100) if number % 5 in kinds
        }
        events = await read(store)
        assert [stored.position for stored in events] == list(range(1, 82))
        shared = await store.get_events("shared", "Thing")
        assert [stored.version for stored in shared] == list(range(1, 21))
        assert sorted(await pending(store)) == sorted(b"%d" % n for n in range(1, 100, 5))
        saved = [await store.checkpoints.get(str(number)) for number in range(100)]
        assert saved == [number if number % 5 == 1 else 0 for number in range(100)]


async def test_appends_among_other_units_still_go_many_in_a_statement(
    path: Path, statements: list[str]
):
    async with SQLiteEventStore(path, synchronous="NORMAL") as store:
        statements.clear()
        async with anyio.create_task_group() as tasks:
            for number in range(100):
                tasks.start_soon(append_numbers, store, 1, str(number))
            tasks.start_soon(store.checkpoints.save, "reader", 1)
            for number in range(100):
                tasks.start_soon(append_numbers, store, 1, str(number))
        assert await store.last_position() == 200
        assert len([one for one in statements if one.startswith("INSERT INTO events")]) < 50


async def test_nothing_to_add_or_to_take_out_is_no_transaction(path: Path, statements: list[str]):
    async with SQLiteEventStore(path, synchronous="NORMAL") as store:
        statements.clear()
        await store.outbox.add()
        await store.outbox.delivered([])
        await store.documents.save_all("c", {})
        await store.documents.get_all("c", [])
        async with store.transaction() as tx:
            await tx.outbox.add()
            await tx.documents.save_all("c", {})
        assert statements == []


async def test_a_disk_that_is_full_fails_what_does_not_fit_and_nothing_else(
    path: Path, monkeypatch: pytest.MonkeyPatch
):
    def small(*args: object, **options: object) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*args, **options)  # type: ignore[call-overload]
        connection.execute("PRAGMA max_page_count = 60")
        return connection

    monkeypatch.setattr(sqlite3, "connect", small)

    async def write(name: str, payload: bytes) -> None:
        async with store.transaction() as tx:
            await tx.append_events(name, "Thing", [Happened()], NO_STREAM)
            await tx.checkpoints.save(name, 1)
            await tx.outbox.add(OutboxMessage("t", name.encode()), OutboxMessage("t", payload))
            await tx.append_events(name, "Thing", [Ended()], 1)

    async def fail() -> None:
        with pytest.raises(StorageError, match="full"):
            await write("large", bytes(400_000))

    async with SQLiteEventStore(path, synchronous="NORMAL") as store:
        async with anyio.create_task_group() as tasks:
            for number in range(5):
                tasks.start_soon(write, str(number), b"")
                tasks.start_soon(append_numbers, store, 1, f"plain{number}")
            tasks.start_soon(fail)
        assert len(await read(store)) == 15
        assert await store.checkpoints.get("large") == 0
        assert [await store.checkpoints.get(str(number)) for number in range(5)] == [1] * 5
        assert len(await pending(store)) == 10
        await write("after", b"")
