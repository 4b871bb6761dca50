"""The contract of checkpoints and the outbox; that of documents is in `documents`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from uuid import UUID, uuid4

import anyio
import pytest
from anyio.lowlevel import checkpoint

from ..errors import (
    CheckpointConflictError,
    StoreClosedError,
)
from ..ids import AggregateId
from ..metadata import event_metadata
from ..repositories.checkpoint import CheckpointRepository
from ..repositories.outbox import OutboxMessage, OutboxRepository
from ..stores.interface import EventStore
from .cancelling import cancel_at_every_checkpoint
from .samples import Happened

LARGEST = 2**63 - 1


def message(text: str = "", message_id: UUID | None = None) -> OutboxMessage:
    return OutboxMessage("topic", text.encode(), message_id=message_id or uuid4())


async def pending(store: EventStore, limit: int = 100) -> list[str]:
    """The payloads of what is pending, in order."""
    return [one.message.payload.decode() for one in await store.outbox.pending(limit)]


async def content(store: EventStore, *names: str) -> tuple[list[AggregateId], list[int], list[str]]:
    """Whose events there are, where the checkpoints are, and what is pending."""
    owners = [stored.aggregate_id async for stored in store.read_all()]
    return owners, [await store.checkpoints.get(name) for name in names], await pending(store)


async def assert_checkpoint(call: Callable[[], Awaitable[object]]) -> None:
    """It can be cancelled, and lets others have their turn."""
    with anyio.CancelScope() as scope:
        scope.cancel()
        await call()
    assert scope.cancelled_caught
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await checkpoint()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(others)
        await checkpoint()
        before = turns
        await call()
        await call()  # theirs may have come before the first one
        assert turns > before
        tasks.cancel_scope.cancel()


class RepositoryContract:
    # -- checkpoints

    async def test_a_checkpoint_is_0_until_it_is_saved(self, store: EventStore) -> None:
        checkpoints = store.checkpoints
        assert await checkpoints.get("reader") == 0
        for position in (7, 8, 3, 3, 0, LARGEST):
            await checkpoints.save("reader", position)
            assert await checkpoints.get("reader") == position
        assert await checkpoints.get("another") == 0

    async def test_every_name_is_a_checkpoint_of_its_own(self, store: EventStore) -> None:
        names = ["a", "A", " a", "a ", "a-b", "a_b", "a%b", "ü/7 'x' \"y\"", "😀", "1", "n" * 255]
        for position, name in enumerate(names, 1):
            await store.checkpoints.save(name, position, expected=0)
        assert [await store.checkpoints.get(name) for name in names] == list(
            range(1, len(names) + 1)
        )

    async def test_a_checkpoint_is_saved_only_where_it_is_expected(self, store: EventStore) -> None:
        checkpoints = store.checkpoints
        await checkpoints.save("reader", 5, expected=0)
        await checkpoints.save("reader", 9, expected=5)
        for expected in (0, 5, 8, 10, LARGEST):
            with pytest.raises(CheckpointConflictError, match="'reader' is at 9") as raised:
                await checkpoints.save("reader", 12, expected=expected)
            error = raised.value
            assert (error.name, error.expected, error.actual) == ("reader", expected, 9)
        assert await checkpoints.get("reader") == 9
        with pytest.raises(CheckpointConflictError, match="never saved") as raised:
            await checkpoints.save("another", 1, expected=9)
        assert raised.value.actual == 0
        assert await checkpoints.get("another") == 0
        await checkpoints.save("reader", 0)  # to read everything again
        await checkpoints.save("reader", 1, expected=0)
        assert await checkpoints.get("reader") == 1

    @pytest.mark.parametrize("begun", [0, 7])
    async def test_one_of_many_wins_at_an_expected_checkpoint(
        self, store: EventStore, begun: int
    ) -> None:
        if begun:
            await store.checkpoints.save("shared", begun)
        won: list[int] = []

        async def save(number: int) -> None:
            try:
                await store.checkpoints.save("shared", number, expected=begun)
            except CheckpointConflictError as error:
                assert error.actual >= 100  # noqa: PT017
            else:
                won.append(number)

        async with anyio.create_task_group() as tasks:
            for number in range(100, 120):
                tasks.start_soon(save, number)
        assert len(won) == 1
        assert await store.checkpoints.get("shared") == won[0]

    async def test_readers_that_save_concurrently_disturb_neither_each_other_nor_appends(
        self, store: EventStore
    ) -> None:
        async def follow(name: str) -> None:
            for position in range(5):
                assert await store.checkpoints.get(name) == position
                await store.checkpoints.save(name, position + 1, expected=position)
                await store.append_events(name, "Thing", [Happened(position)], position)

        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(follow, str(number))
        assert [await store.checkpoints.get(str(number)) for number in range(20)] == [5] * 20
        assert len([stored async for stored in store.read_all()]) == 100

    async def test_what_is_no_checkpoint_is_refused(self, store: EventStore) -> None:
        for name, position, expected, error, why in (
            ("", 1, None, ValueError, "name must have 1 to 255 characters"),
            ("n" * 256, 1, None, ValueError, "name must have 1 to 255 characters"),
            ("a\0", 1, None, ValueError, "name holds a character"),
            ("\ud800", 1, None, ValueError, "name holds a character"),
            (7, 1, None, TypeError, "name must be a string"),
            ("a", -1, None, ValueError, "position must be a position from 0"),
            ("a", 2**63, None, ValueError, "position must be a position from 0"),
            ("a", "1", None, TypeError, "position must be a position"),
            ("a", True, None, TypeError, "position must be a position"),
            ("a", 1, -1, ValueError, "expected must be a position from 0"),
            ("a", 1, "0", TypeError, "expected must be a position"),
            ("a", 1, False, TypeError, "expected must be a position"),
        ):
            with pytest.raises(error, match=why):
                await store.checkpoints.save(name, position, expected=expected)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
            if "name" in why:
                with pytest.raises(error, match=why):
                    await store.checkpoints.get(name)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        assert await store.checkpoints.get("a") == 0

    # -- the outbox

    async def test_a_message_comes_back_as_it_was_added(self, store: EventStore) -> None:
        before = datetime.now(UTC)
        every_byte = bytes(range(256))
        added = [
            OutboxMessage("orders", b'{"id": 7}', key="customer-7", metadata={"deep": [1, None]}),
            OutboxMessage("ü" * 255, every_byte, message_id=uuid4()),
            OutboxMessage("t", b"", "ü'\"%"),
        ]
        assert await pending(store) == []
        await store.outbox.add(*added[:2])
        await store.outbox.add(added[2])
        found = await store.outbox.pending()
        assert [one.message for one in found] == added
        assert [one.message.metadata for one in found] == [{"deep": [1, None]}, {}, {}]
        assert type(found[1].message.payload) is bytes
        positions = [one.position for one in found]
        assert positions == sorted(set(positions))
        assert positions[0] >= 1
        for one in found:
            assert one.recorded_at.utcoffset() == timedelta(0)
            assert before - timedelta(seconds=1) < one.recorded_at < before + timedelta(minutes=1)

    async def test_a_message_has_the_metadata_of_its_context(self, store: EventStore) -> None:
        own = OutboxMessage("t", b"", metadata={"user": "bob"})
        with event_metadata(correlation_id="request-7", user="ann"):
            await store.outbox.add(message(), own)
            async with store.transaction() as tx:
                await tx.outbox.add(message())
        plain, own_too, in_transaction = await store.outbox.pending()
        assert plain.message.metadata == {"correlation_id": "request-7", "user": "ann"}
        assert own_too.message.metadata == {"correlation_id": "request-7", "user": "bob"}
        assert in_transaction.message.metadata == plain.message.metadata

    async def test_the_oldest_are_pending_first(self, store: EventStore) -> None:
        texts = [str(number) for number in range(120)]
        await store.outbox.add(*map(message, texts[:70]))
        for text in texts[70:80]:
            await store.outbox.add(message(text))
        await store.outbox.add(*map(message, texts[80:]))
        assert await pending(store, 1) == ["0"]
        assert await pending(store, 75) == texts[:75]
        assert len(await store.outbox.pending()) == 100
        assert await pending(store, 2**70) == texts
        found = await store.outbox.pending(30)
        later = await store.outbox.pending(30, after=found[-1].position)
        assert [one.message.payload.decode() for one in [*found, *later]] == texts[:60]
        assert await store.outbox.pending(after=2**70) == []

    async def test_what_was_delivered_is_not_pending(self, store: EventStore) -> None:
        messages = [message(text) for text in "abcde"]
        await store.outbox.add(*messages)
        gone = [messages[1].message_id, messages[3].message_id]
        await store.outbox.delivered(iter(gone))
        assert await pending(store) == ["a", "c", "e"]
        await store.outbox.delivered([*gone, uuid4(), messages[0].message_id, gone[0]])
        assert await pending(store) == ["c", "e"]
        await store.outbox.delivered([])
        await store.outbox.add()
        assert await pending(store) == ["c", "e"]

    async def test_adding_the_same_message_again_changes_nothing(self, store: EventStore) -> None:
        first, second = message("first"), message("second")
        await store.outbox.add(first, second, first)
        before = await store.outbox.pending()
        assert [one.message for one in before] == [first, second]
        await store.outbox.add(message("other", first.message_id), message("third"), second)
        assert list(await store.outbox.pending())[:2] == list(before)
        async with store.transaction() as tx:
            await tx.outbox.add(message("another", first.message_id))
        assert list(await store.outbox.pending())[:2] == list(before)
        assert await pending(store) == ["first", "second", "third"]

    async def test_positions_of_the_outbox_grow_for_ever(self, store: EventStore) -> None:
        one = message("again")
        last = 0
        for _ in range(3):
            await store.outbox.add(one, message())
            positions = [stored.position for stored in await store.outbox.pending()]
            assert last < positions[0] < positions[1]
            last = positions[1]
            await store.outbox.delivered(
                stored.message.message_id for stored in await store.outbox.pending()
            )
            assert await pending(store) == []

    async def test_adding_concurrently_loses_and_doubles_nothing(self, store: EventStore) -> None:
        twice = message("twice")

        async def add(number: int) -> None:
            for nth in range(4):
                await store.outbox.add(message(f"{number} {nth} 0"), message(f"{number} {nth} 1"))
            await store.outbox.add(twice)

        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(add, number)
        found = await store.outbox.pending(1000)
        assert len({one.position for one in found}) == len(found) == 161
        texts = [one.message.payload.decode() for one in found]
        assert texts.count("twice") == 1
        for number in range(20):
            mine = [text for text in texts if text.startswith(f"{number} ")]
            assert mine == sorted(mine)
            assert len(mine) == 8

    async def test_what_is_no_message_is_refused_and_nothing_is_added(
        self, store: EventStore
    ) -> None:
        good = message()
        for wrong, error, why in (
            (OutboxMessage("t", b"", metadata={"pair": (1, 2)}), ValueError, "come back as"),
            (OutboxMessage("t", b"", metadata={"o": object()}), ValueError, "is not JSON"),
            ("t", TypeError, "give OutboxMessages, not str"),
            ([good], TypeError, "give OutboxMessages, not list"),
        ):
            with pytest.raises(error, match=why):
                await store.outbox.add(good, wrong)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
            async with store.transaction() as tx:
                with pytest.raises(error, match=why):
                    await tx.outbox.add(good, wrong)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        for limit in (0, -1, "7", None, True):
            with pytest.raises(ValueError, match="limit must be a number from 1"):
                await store.outbox.pending(limit)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        await store.outbox.add(good)
        for ids, why in (
            (good.message_id, "not one"),
            (good, "not one"),
            ([good], "a message id is a UUID, not OutboxMessage"),
            ([good.message_id, str(good.message_id)], "a message id is a UUID, not str"),
        ):
            with pytest.raises(TypeError, match=why):
                await store.outbox.delivered(ids)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        assert [one.message for one in await store.outbox.pending()] == [good]

    # -- cancelled, and closed

    async def test_every_call_is_a_checkpoint(self, store: EventStore) -> None:
        async with store.transaction() as tx:
            for checkpoints, outbox in (
                (store.checkpoints, store.outbox),
                (tx.checkpoints, tx.outbox),
            ):
                for call in _calls(checkpoints, outbox):
                    await assert_checkpoint(call)
                await assert_checkpoint(outbox.add)
                await assert_checkpoint(partial(outbox.delivered, []))

    async def test_a_cancelled_save_has_happened_or_not(self, store: EventStore) -> None:
        at = 0

        async def save() -> bool:
            await store.checkpoints.save("reader", at + 1, expected=at)
            return True

        async def check(result: bool | None) -> None:
            nonlocal at
            found = await store.checkpoints.get("reader")
            assert found in ((at + 1,) if result else (at, at + 1))
            at = found

        assert await cancel_at_every_checkpoint(save, check) >= 1

    async def test_cancelled_messages_are_all_there_or_none(self, store: EventStore) -> None:
        messages: list[OutboxMessage] = []

        async def add() -> bool:
            messages[:] = message("one"), message("two")
            await store.outbox.add(*messages)
            return True

        async def delivered() -> bool:
            await store.outbox.add(*messages)
            await store.outbox.delivered([one.message_id for one in messages])
            return True

        async def check_added(result: bool | None) -> None:
            assert len(await pending(store)) in ((2,) if result else (0, 2))
            await store.outbox.delivered([one.message_id for one in messages])
            assert await pending(store) == []

        async def check_delivered(result: bool | None) -> None:
            assert len(await pending(store)) in ((0,) if result else (0, 2))

        assert await cancel_at_every_checkpoint(add, check_added) >= 1
        assert await cancel_at_every_checkpoint(delivered, check_delivered) >= 2

    async def test_a_cancelled_look_leaves_everything_as_it_is(self, store: EventStore) -> None:
        await store.checkpoints.save("reader", 7)
        await store.outbox.add(message("one"))

        async def look() -> tuple[int, int]:
            return await store.checkpoints.get("reader"), len(await store.outbox.pending())

        async def check(result: tuple[int, int] | None) -> None:
            assert result in ((7, 1), None)
            assert await content(store, "reader") == ([], [7], ["one"])

        assert await cancel_at_every_checkpoint(look, check) >= 2

    async def test_the_repositories_of_a_closed_store_say_so(self, store: EventStore) -> None:
        checkpoints, outbox = store.checkpoints, store.outbox
        with pytest.raises(StoreClosedError):
            async with store.transaction() as tx:
                await tx.checkpoints.save("reader", 1)
                await store.__aexit__(None, None, None)
        for call in _calls(checkpoints, outbox):
            with pytest.raises(StoreClosedError, match="async with"):
                await call()


def _calls(
    checkpoints: CheckpointRepository, outbox: OutboxRepository
) -> list[Callable[[], Awaitable[object]]]:
    return [
        lambda: checkpoints.get("reader"),
        lambda: checkpoints.save("reader", 1),
        lambda: outbox.add(message()),
        outbox.pending,
        lambda: outbox.delivered([uuid4()]),
    ]
