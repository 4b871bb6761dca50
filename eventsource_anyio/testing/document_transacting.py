"""The contract of documents in transactions: together with everything else, or not at all."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from random import Random
from uuid import UUID

import anyio
import pytest

from ..errors import CheckpointConflictError, ConcurrencyError, DocumentConflictError
from ..repositories.document import Document
from ..stores.interface import NO_STREAM, EventStore
from .cancelling import cancel_at_every_checkpoint
from .documents import document, values
from .repositories import content, message
from .samples import Ended, Happened


class DocumentTransactContract:
    async def test_documents_are_stored_together_with_everything_else(
        self, store: EventStore
    ) -> None:
        first = await store.documents.add("c", "a", 1)
        await store.documents.add("c", "gone", 1)
        async with store.transaction() as tx:
            await tx.append_events("a", "Thing", [Happened(1)], NO_STREAM)
            second = await tx.documents.save("c", "a", 2, expected=first)
            await tx.checkpoints.save("reader", 9, expected=0)
            third = await tx.documents.add("c", "b", 3)
            await tx.documents.save_all("c", {"c": 4, "d": 5})
            await tx.documents.delete("c", "gone")
            await tx.outbox.add(message("new"))
            # Others see what is stored, and the block what it has made of that.
            documents = store.documents
            assert await documents.get("c", "a") == Document("a", 1, first)
            assert await documents.get("c", "b") is None
            assert list(await documents.get_all("c", ["a", "b", "gone"])) == ["a", "gone"]
            assert [one.key for one in await documents.list("c")] == ["a", "gone"]
            documents = tx.documents
            assert await documents.get("c", "a") == Document("a", 2, second)
            assert await documents.get("c", "b") == Document("b", 3, third)
            assert list(await documents.get_all("c", ["b", "a", "gone", "0"])) == ["b", "a"]
            assert await documents.get_all("c", ["gone"]) == {}
            assert [one.key for one in await documents.list("c")] == ["a", "b", "c", "d"]
            assert [one.value for one in await documents.list("c", after="a", limit=2)] == [3, 4]
            assert await documents.list("others") == []
        assert await content(store, "reader") == (["a"], [9], ["new"])
        assert await values(store) == {"a": 2, "b": 3, "c": 4, "d": 5}
        assert (await document(store, "a")).revision == second
        assert (await document(store, "b")).revision == third

    async def test_a_block_sees_a_collection_as_it_has_emptied_and_filled_it(
        self, store: EventStore
    ) -> None:
        await store.documents.save_all("c", {"a": 1, "b": 1})
        async with store.transaction() as tx:
            documents = tx.documents
            await documents.save("c", "c", 2)
            await documents.delete_all("c")
            assert await documents.get("c", "a") is None
            assert await documents.get("c", "c") is None
            assert await documents.list("c") == []
            await documents.save_all("c", {"b": 3, "z": 3})
            assert [one.key for one in await documents.list("c", after="a")] == ["b", "z"]
            assert list(await documents.get_all("c", ["a", "z"])) == ["z"]
            assert [one.key for one in await store.documents.list("c")] == ["a", "b"]
        assert await values(store) == {"b": 3, "z": 3}

    async def test_a_step_sees_what_was_done_to_a_document_before_it(
        self, store: EventStore
    ) -> None:
        first = await store.documents.add("c", "a", 1)
        await store.documents.add("c", "b", 1)
        async with store.transaction() as tx:
            documents = tx.documents
            again = await documents.save("c", "a", 2, expected=first)
            again = await documents.save("c", "a", 3, expected=again)
            await documents.delete("c", "a", expected=again)
            last = await documents.add("c", "a", 4)
            await documents.save_all("c", {"b": 2, "c": 2})
            await documents.delete("c", "b")
            await documents.delete("c", "b")
            new = await documents.add("c", "d", 1)
            await documents.delete("c", "d", expected=new)
        assert await values(store) == {"a": 4, "c": 2}
        assert (await document(store, "a")).revision == last
        before = await store.documents.list("c")

        async def conflict(kind: str) -> UUID | None:
            async with store.transaction() as tx:
                saved = await tx.documents.save("c", "a", 5, expected=last)
                await tx.documents.save("c", "new", 5)
                await tx.documents.delete("c", "c")
                if kind == "stale":
                    await tx.documents.save("c", "a", 6, expected=last)
                    await tx.documents.save("c", "0", 6, expected=last)  # the first one is told
                    return saved
                if kind == "there":
                    await tx.documents.add("c", "a", 6)
                    return saved
                await tx.documents.save("c", "c", 6, expected=saved)
            return None

        for kind in ("stale", "there", "deleted"):
            with pytest.raises(DocumentConflictError) as raised:
                await conflict(kind)
            error = raised.value
            assert (error.key, error.actual is None) == (
                ("c", True) if kind == "deleted" else ("a", False)
            )
            assert error.actual != last
            assert await store.documents.list("c") == before

    async def test_a_collection_is_emptied_at_its_place_among_the_steps(
        self, store: EventStore
    ) -> None:
        many = {f"{number:04}": number for number in range(1200)}
        for collection in ("b", "c", "c/1", "d"):
            await store.documents.save_all(collection, {"a": 1, **many})
        last = UUID(int=0)

        async def empty(*, fail: bool) -> None:
            nonlocal last
            async with store.transaction() as tx:
                await tx.append_events("a", "Thing", [Happened(1)], NO_STREAM)
                await tx.documents.save_all("c", {"a": 2, "new": 2})
                await tx.documents.delete_all("c")
                await tx.documents.add("c", "a", 3)
                last = await tx.documents.add("c", "0007", 3)
                await tx.documents.delete_all("nothing")
                if fail:
                    await tx.documents.add("d", "a", 3)

        with pytest.raises(DocumentConflictError):
            await empty(fail=True)
        assert await values(store, limit=2000) == {"a": 1, **many}
        await empty(fail=False)
        assert await values(store) == {"0007": 3, "a": 3}
        assert (await document(store, "0007")).revision == last
        for collection in ("b", "c/1", "d"):
            assert len(await values(store, collection, limit=2000)) == 1201
        await store.documents.delete_all("b")
        assert await values(store, "b") == {}

    async def test_a_conflict_takes_documents_and_everything_else_back(
        self, store: EventStore
    ) -> None:
        first = await store.documents.add("c", "a", 1)
        await store.documents.add("c", "b", 1)
        await store.append_events("known", "Thing", [Ended()], NO_STREAM)
        await store.checkpoints.save("reader", 3)
        before = await store.documents.list("c")

        async def conflict(kind: str) -> None:
            async with store.transaction() as tx:
                await tx.documents.save_all("c", {"b": 2, "new": 2})
                await tx.checkpoints.save("reader", 9, expected=3)
                await tx.append_events("a", "Thing", [Happened(1)], NO_STREAM)
                await tx.outbox.add(message("new"))
                await tx.documents.add("c", "newer", 2)
                await tx.documents.delete("c", "a", expected=first)
                if kind == "save":
                    await tx.documents.save("c", "b", 2, expected=first)
                elif kind == "save of nothing":
                    await tx.documents.save("c", "0", 2, expected=first)
                elif kind == "delete":
                    await tx.documents.delete("c", "z", expected=first)
                elif kind == "add":
                    await tx.documents.add("c", "b", 2)
                elif kind == "checkpoint":
                    await tx.checkpoints.save("reader", 10, expected=3)
                elif kind == "version":
                    await tx.append_events("known", "Thing", [Ended()], NO_STREAM)
                else:
                    raise KeyError("the caller's own")

        for kind, error in (
            ("save", DocumentConflictError),
            ("save of nothing", DocumentConflictError),
            ("delete", DocumentConflictError),
            ("add", DocumentConflictError),
            ("checkpoint", CheckpointConflictError),
            ("version", ConcurrencyError),
            ("own", KeyError),
        ):
            with pytest.raises(error):
                await conflict(kind)
            assert await store.documents.list("c") == before, kind
            assert await content(store, "reader") == (["known"], [3], []), kind
        await store.documents.add("c", "new", 1)

    async def test_what_others_do_to_a_document_meanwhile_is_a_conflict_at_the_end(
        self, store: EventStore
    ) -> None:
        first = await store.documents.add("c", "a", 1)
        for kind in ("save", "delete", "add"):
            other: UUID | None = None
            with pytest.raises(DocumentConflictError) as raised:
                async with store.transaction() as tx:
                    await tx.append_events("a", "Thing", [Ended()], NO_STREAM)
                    if kind == "add":
                        await tx.documents.add("c", "a", 2)
                        other = await store.documents.add("c", "a", 3)
                    else:
                        await tx.documents.save("c", "a", 2, expected=first)
                        if kind == "save":
                            first = other = await store.documents.save("c", "a", 3)
                            await tx.documents.delete("c", "a")
                        else:
                            await store.documents.delete("c", "a")
            assert raised.value.actual == other
            assert await content(store) == ([], [], [])
        assert await values(store) == {"a": 3}

    async def test_transactions_that_meet_in_any_order_all_come_to_their_end(
        self, store: EventStore
    ) -> None:
        keys = [f"{number}" for number in range(6)]
        done: list[int] = []

        async def write(number: int) -> None:
            order = Random(number).sample(keys, len(keys))  # noqa: S311
            for _ in range(4):
                async with store.transaction() as tx:
                    for nth, key in enumerate(order):
                        if nth == number % 6:
                            await tx.documents.delete("c", key)
                        else:
                            await tx.documents.save("c", key, number)
                    await tx.checkpoints.save(str(number), 1)
            done.append(number)

        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                for number in range(8):
                    tasks.start_soon(write, number)
        assert sorted(done) == list(range(8))
        found = await values(store)
        assert len(found) == 5  # all of one transaction
        assert len(set(map(str, found.values()))) == 1

    async def test_a_transactions_documents_are_written_inside_its_block(
        self, store: EventStore
    ) -> None:
        async with store.transaction() as tx:
            documents = tx.documents
        late: list[Callable[[], Awaitable[object]]] = [
            lambda: documents.save("c", "a", 1),
            lambda: documents.delete("c", "a"),
            lambda: tx.documents.get("c", "a"),
        ]
        for call in late:
            with pytest.raises(RuntimeError, match="inside its block"):
                await call()
        assert await values(store) == {}

    async def test_a_cancelled_transaction_of_documents_is_whole_or_not_there(
        self, store: EventStore
    ) -> None:
        runs = 0
        at = await store.documents.add("c", "shared", 0)

        async def transact() -> UUID:
            nonlocal runs
            runs += 1
            async with store.transaction() as tx:
                await tx.append_events(str(runs), "Thing", [Ended()], NO_STREAM)
                await tx.documents.add("c", str(runs), runs)
                saved = await tx.documents.save("c", "shared", runs, expected=at)
                await tx.checkpoints.save("reader", runs)
            return saved

        async def check(result: UUID | None) -> None:
            nonlocal at
            shared = await document(store, "shared")
            whole = shared.value == runs
            assert whole or result is None
            assert result in (None, shared.revision)
            assert (await store.documents.get("c", str(runs)) is not None) == whole
            assert len(await store.get_events(str(runs), "Thing")) == whole
            assert (await store.checkpoints.get("reader") == runs) == whole
            at = shared.revision

        assert await cancel_at_every_checkpoint(transact, check) >= 4
