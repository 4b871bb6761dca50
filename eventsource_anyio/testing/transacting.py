"""The contract of transactions: appends, checkpoints and the outbox, together or not at all."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from uuid import uuid4

import anyio
import pytest

from ..errors import CheckpointConflictError, ConcurrencyError, DuplicateEventError
from ..events import NewEvent
from ..stores.interface import ANY, NO_STREAM, AppendResult, EventStore
from .cancelling import cancel_at_every_checkpoint
from .repositories import content, message, pending
from .samples import Ended, Happened, append_numbers


class TransactContract:
    async def test_a_transaction_stores_everything_at_its_end(self, store: EventStore) -> None:
        known = message("known")
        await store.outbox.add(known)
        await store.checkpoints.save("reader", 3)
        async with store.transaction() as tx:
            await tx.checkpoints.save("reader", 9, expected=3)
            await tx.append_events("a", "Thing", [Happened(1), Ended()], NO_STREAM)
            await tx.outbox.add(message("new"), message("newer"))
            await tx.append_events("b", "Thing", [Happened(2)], NO_STREAM)
            await tx.outbox.delivered([known.message_id])
            # Inside the block everybody sees what is stored.
            assert await tx.checkpoints.get("reader") == 3
            assert [one.message for one in await tx.outbox.pending()] == [known]
            assert await content(store, "reader") == ([], [3], ["known"])
        assert [result.version for result in tx.results] == [2, 1]
        assert await content(store, "reader") == (["a", "a", "b"], [9], ["new", "newer"])

    async def test_a_transaction_needs_no_append(self, store: EventStore) -> None:
        async with store.transaction() as tx:
            await tx.checkpoints.save("reader", 1)
            await tx.outbox.add(message("only"))
        assert tx.results == ()
        assert await content(store, "reader") == ([], [1], ["only"])
        assert await store.last_position() == 0

    async def test_a_step_of_a_transaction_sees_those_before_it(self, store: EventStore) -> None:
        one = message("one")
        two = message("two")
        async with store.transaction() as tx:
            await tx.checkpoints.save("reader", 5, expected=0)
            await tx.checkpoints.save("another", 1, expected=0)
            await tx.checkpoints.save("reader", 9, expected=5)
            await tx.outbox.add(one, two)
            await tx.outbox.delivered([one.message_id, two.message_id])
            await tx.outbox.add(message("anew", one.message_id))
            await tx.append_events("a", "Thing", [Ended()], NO_STREAM)
            await tx.append_events("a", "Thing", [Ended()], 1)
        after = (["a", "a"], [9, 1], ["anew"])
        assert await content(store, "reader", "another") == after
        with pytest.raises(CheckpointConflictError) as raised:
            async with store.transaction() as tx:
                await tx.checkpoints.save("reader", 12, expected=9)
                await tx.checkpoints.save("reader", 15, expected=9)
        assert raised.value.actual == 12
        assert await content(store, "reader", "another") == after

    async def test_a_conflict_takes_everything_of_a_transaction_back(
        self, store: EventStore
    ) -> None:
        known, event = message("known"), NewEvent(Ended())
        await store.append_events("b", "Thing", [event], NO_STREAM)
        await store.outbox.add(known)
        await store.checkpoints.save("reader", 3)
        before = await content(store, "reader", "new")
        stored = await store.outbox.pending()

        async def conflict(kind: str) -> None:
            async with store.transaction() as tx:
                await tx.append_events("a", "Thing", [Happened(1), Happened(2)], NO_STREAM)
                await tx.checkpoints.save("reader", 9, expected=3)
                await tx.checkpoints.save("new", 1, expected=0)
                await tx.outbox.add(message("new"), known)
                await tx.outbox.delivered([known.message_id])
                if kind == "checkpoint":
                    await tx.checkpoints.save("reader", 10, expected=3)
                elif kind == "version":
                    await tx.append_events("b", "Thing", [Ended()], NO_STREAM)
                elif kind == "event id":
                    await tx.append_events("a", "Thing", [event], ANY)
                else:
                    raise KeyError("the caller's own")
                await tx.append_events("c", "Thing", [Ended()], NO_STREAM)
                await tx.outbox.add(message("newer"))

        for kind, error in (
            ("checkpoint", CheckpointConflictError),
            ("version", ConcurrencyError),
            ("event id", DuplicateEventError),
            ("own", KeyError),
        ):
            with pytest.raises(error):
                await conflict(kind)
            assert await content(store, "reader", "new") == before
            assert list(await store.outbox.pending()) == list(stored)
        result = await store.append_events("a", "Thing", [Ended()], NO_STREAM)
        assert result.version == 1
        assert await content(store) == (["b", "a"], [], ["known"])

    async def test_what_others_save_during_a_transaction_is_a_conflict_at_its_end(
        self, store: EventStore
    ) -> None:
        with pytest.raises(CheckpointConflictError) as raised:
            async with store.transaction() as tx:
                await tx.checkpoints.save("reader", 1, expected=0)
                await tx.append_events("a", "Thing", [Ended()], NO_STREAM)
                await store.checkpoints.save("reader", 7, expected=0)
                assert await tx.checkpoints.get("reader") == 7
        assert raised.value.actual == 7
        assert await content(store, "reader") == ([], [7], [])

    async def test_a_conflict_among_many_is_its_own_callers_only(self, store: EventStore) -> None:
        """Transactions, appends and saves at once; every third transaction fails."""
        await store.checkpoints.save("taken", 1)
        failed: list[int] = []

        async def transact(number: int) -> None:
            try:
                async with store.transaction() as tx:
                    await tx.append_events(str(number), "Thing", [Happened(number)] * 2, NO_STREAM)
                    await tx.outbox.add(message(str(number)))
                    await tx.checkpoints.save(str(number), number + 1, expected=0)
                    if number % 3 == 0:
                        await tx.checkpoints.save("taken", 2, expected=0)
                    await tx.append_events(str(number), "Thing", [Ended()], 2)
            except CheckpointConflictError:
                failed.append(number)

        async with anyio.create_task_group() as tasks:
            for number in range(30):
                tasks.start_soon(transact, number)
                tasks.start_soon(append_numbers, store, 2, f"plain{number}")
                tasks.start_soon(store.checkpoints.save, f"plain{number}", 1)
        kept = [number for number in range(30) if number % 3]
        assert sorted(failed) == list(range(0, 30, 3))
        assert sorted(await pending(store), key=int) == [str(number) for number in kept]
        for number in range(30):
            whole = number in kept
            stream = await store.get_events(str(number), "Thing")
            assert [stored.version for stored in stream] == ([1, 2, 3] if whole else [])
            assert await store.checkpoints.get(str(number)) == (number + 1 if whole else 0)
            assert len(await store.get_events(f"plain{number}", "Thing")) == 2
            assert await store.checkpoints.get(f"plain{number}") == 1
        assert await store.checkpoints.get("taken") == 1

    async def test_a_transaction_may_be_repeated(self, store: EventStore) -> None:
        event, one = NewEvent(Happened(1)), message("one")
        results: list[tuple[AppendResult, ...]] = []
        for _ in range(3):
            async with store.transaction() as tx:
                await tx.append_events("a", "Thing", [event], NO_STREAM)
                await tx.outbox.add(one)
                await tx.checkpoints.save("reader", 5)
            results.append(tx.results)
        assert results == [results[0]] * 3
        assert await content(store, "reader") == (["a"], [5], ["one"])

    async def test_a_transactions_repositories_are_used_inside_its_block(
        self, store: EventStore
    ) -> None:
        tx = store.transaction()
        async with tx as inside:
            checkpoints, outbox = inside.checkpoints, inside.outbox
            await checkpoints.save("reader", 1)
        late: list[Callable[[], Awaitable[object]]] = [
            lambda: checkpoints.save("reader", 2),
            lambda: outbox.add(message()),
            lambda: outbox.delivered([uuid4()]),
            lambda: inside.checkpoints.save("reader", 2),
            lambda: inside.checkpoints.get("reader"),
            lambda: inside.outbox.pending(5),
        ]
        for call in late:
            with pytest.raises(RuntimeError, match="inside its block"):
                await call()
        assert await content(store, "reader") == ([], [1], [])

    async def test_a_cancelled_transaction_of_everything_is_whole_or_not_there(
        self, store: EventStore
    ) -> None:
        runs = 0
        known = message("known")

        async def transact() -> bool:
            nonlocal runs
            runs += 1
            await store.outbox.add(known)
            async with store.transaction() as tx:
                await tx.append_events(str(runs), "Thing", [Happened(), Ended()], NO_STREAM)
                await tx.checkpoints.save(str(runs), 1, expected=await tx.checkpoints.get("none"))
                await tx.outbox.add(message(str(runs)), message(str(runs)))
                await tx.outbox.delivered([known.message_id])
            return True

        async def check(result: bool | None) -> None:
            found = await pending(store)
            there = (
                len(await store.get_events(str(runs), "Thing")),
                await store.checkpoints.get(str(runs)),
                found.count(str(runs)),
            )
            assert there in (((2, 1, 2),) if result else ((0, 0, 0), (2, 1, 2)))
            assert not (there[1] and "known" in found)

        assert await cancel_at_every_checkpoint(transact, check) >= 5
