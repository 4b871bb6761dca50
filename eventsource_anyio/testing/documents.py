"""The contract of documents by themselves: values that come back, revisions to compare."""

from __future__ import annotations

import json
import struct
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from math import inf, isfinite, nan
from random import Random
from uuid import UUID, uuid4

import anyio
import pytest

from ..errors import DocumentConflictError, StoreClosedError
from ..repositories.document import Document, DocumentRepository
from ..stores.interface import EventStore
from .cancelling import cancel_at_every_checkpoint
from .repositories import assert_checkpoint

_random = Random(7)  # noqa: S311  (no secret)
_floats = [struct.unpack("d", _random.randbytes(8))[0] for _ in range(300)]
FLOATS = [
    *(0.0, -0.0, 0.1, 1.0, -1.5, 1e15, 1e16, -1e17, 1e22, 1e23, 1e100, 1.7976931348623157e308),
    *(5e-324, 2.2250738585072014e-308, 1e-7, 1234567890123456789.0, 2.0**53, 2.0**63, 0.1 + 0.2),
    *filter(isfinite, _floats),
]
TEXTS = ["", " ", "a\nb\t\r\x01\x7f", "\"'\\", "\\u0000", "ü%_", "\u2028\ufeff\uffff", "😀", "1e16"]
VALUES: list[object] = [
    *(None, True, False, 0, -1, 2**53 + 1, -(2**63), 2**64 - 1, 10**30, "", [], {}, [[]], [1e300]),
    *(FLOATS, TEXTS, [{}, [None, [True]], "text", 0.5]),
    {text: [text, number] for number, text in enumerate(TEXTS)},
    {"nested": {"once": {"more": [{"b": 1, "a": [1e17, {"e": -1e16}]}]}}, ",-1.5e3": ":1e16"},
    json.loads("[" * 300 + "]" * 300),
    "x" * 100_000,
    list(range(5000)),
]
# No index entry of a database may be too long for them, also where it cannot be compressed.
LONG = "".join([chr(_random.randrange(0x10000, 0x20000)) for _ in range(648)])
KEYS = ["a", "A", " a", "a ", "a-b", "a%b", "'\"\\", "\n", "ü/7", "\uffff", "😀", "k" * 1000, LONG]


async def values(store: EventStore, collection: str = "c", limit: int = 100) -> dict[str, object]:
    """What is in a collection."""
    return {one.key: one.value for one in await store.documents.list(collection, limit=limit)}


async def document(store: EventStore, key: str, collection: str = "c") -> Document:
    found = await store.documents.get(collection, key)
    assert found is not None
    return found


def types(value: object) -> object:
    """What a value is made of, as `==` takes 1, 1.0 and True for the same."""
    if isinstance(value, Mapping):
        return {key: types(item) for key, item in value.items()}  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    if isinstance(value, list):
        return [types(item) for item in value]  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    return type(value)


class DocumentContract:
    async def test_a_value_comes_back_as_it_was_saved(self, store: EventStore) -> None:
        for number, value in enumerate(VALUES):
            key = str(number)
            revision = await store.documents.add("c", key, value)
            found = await document(store, key)
            assert (found.key, found.value, found.revision) == (key, value, revision)
            assert types(found.value) == types(value)
        await store.documents.save_all("all", {str(n): one for n, one in enumerate(VALUES)})
        for number, value in enumerate(VALUES):
            found = await document(store, str(number), "all")
            assert found.value == value
            assert types(found.value) == types(value)

    async def test_every_key_of_every_collection_is_a_document_of_its_own(
        self, store: EventStore
    ) -> None:
        documents = store.documents
        collections = ["c", "C", "c ", "ü'\"%"]
        for collection in collections:
            assert await documents.get(collection, "a") is None
            for key in KEYS:
                await documents.add(collection, key, [collection, key])
        for collection in collections:
            assert await values(store, collection) == {key: [collection, key] for key in KEYS}
            found = await documents.get_all(collection, iter([*KEYS, "none", KEYS[0]]))
            assert {key: one.value for key, one in found.items()} == {
                key: [collection, key] for key in KEYS
            }
            assert list(found) == KEYS
        await documents.add("x" * 255, "y" * 1000, 1)
        assert (await document(store, "y" * 1000, "x" * 255)).value == 1
        assert await documents.get_all("c", []) == {}
        assert await documents.get_all("nothing", ["a"]) == {}

    async def test_a_document_that_is_there_is_not_added(self, store: EventStore) -> None:
        first = await store.documents.add("c", "a", 1)
        with pytest.raises(DocumentConflictError, match=f"'a' of 'c' is at revision {first}") as at:
            await store.documents.add("c", "a", 2)
        error = at.value
        assert (error.collection, error.key) == ("c", "a")
        assert (error.expected, error.actual) == (None, first)
        assert await document(store, "a") == Document("a", 1, first)

    async def test_a_document_is_saved_wherever_it_is(self, store: EventStore) -> None:
        for value in (1, {"a": 2}, None):
            revision = await store.documents.save("c", "a", value)
            assert await document(store, "a") == Document("a", value, revision)

    async def test_a_document_is_saved_and_deleted_only_where_it_is_expected(
        self, store: EventStore
    ) -> None:
        documents = store.documents
        first = await documents.save("c", "a", 1)
        second = await documents.save("c", "a", 2, expected=first)
        for expected in (first, uuid4(), UUID(int=0)):
            for call in (
                partial(documents.save, "c", "a", 3, expected=expected),
                partial(documents.delete, "c", "a", expected=expected),
            ):
                with pytest.raises(DocumentConflictError, match="saved it meanwhile") as raised:
                    await call()
                assert (raised.value.expected, raised.value.actual) == (expected, second)
            for call in (
                partial(documents.save, "c", "none", 3, expected=expected),
                partial(documents.delete, "c", "none", expected=expected),
            ):
                with pytest.raises(DocumentConflictError, match="does not exist") as raised:
                    await call()
                assert (raised.value.expected, raised.value.actual) == (expected, None)
        assert await documents.list("c") == [Document("a", 2, second)]
        await documents.delete("c", "a", expected=second)
        assert await values(store) == {}

    async def test_what_is_deleted_is_gone_and_may_be_added_anew(self, store: EventStore) -> None:
        documents = store.documents
        await documents.delete("c", "a")
        revisions: list[UUID] = []
        for number in range(3):
            revisions.append(await documents.add("c", "a", number))
            await documents.add("c", "b", number)
            for key in ("a", "b", "a"):
                await documents.delete("c", key)
            assert await documents.get("c", "a") is None
            assert await documents.get_all("c", ["a", "b"]) == {}
            assert await documents.list("c") == []
        assert len(set(revisions)) == 3
        assert revisions == sorted(revisions)
        await documents.add("c", "a", 9)
        for revision in revisions:
            with pytest.raises(DocumentConflictError):
                await documents.save("c", "a", 7, expected=revision)

    async def test_many_are_saved_at_once(self, store: EventStore) -> None:
        first = await store.documents.add("c", "0001", "old")
        await store.documents.save_all("c", {f"{number:04}": number for number in range(1200)})
        await store.documents.save_all("c", {})
        assert await values(store, limit=2000) == {f"{n:04}": n for n in range(1200)}
        found = await store.documents.get_all("c", [f"{number:04}" for number in range(1200)])
        assert len({one.revision for one in found.values()} | {first}) == 1201
        await store.documents.save("c", "0001", 7, expected=found["0001"].revision)

    async def test_documents_are_listed_by_key_in_pages(self, store: EventStore) -> None:
        keys = [*KEYS, *map(str, range(110))]
        Random(1).shuffle(keys)  # noqa: S311
        for key in keys:
            await store.documents.save("c", key, key)
        await store.documents.save("b", "b", 1)
        await store.documents.save("d", "d", 1)
        in_order = sorted(keys)  # which in Python is that of code points
        assert [one.key for one in await store.documents.list("c")] == in_order[:100]
        for limit in (1, 7, 200, 2**70):
            seen: list[str] = []
            while page := await store.documents.list(
                "c", after=seen[-1] if seen else "", limit=limit
            ):
                assert len(page) == min(limit, len(keys) - len(seen))
                assert [one.value for one in page] == [one.key for one in page]
                seen += [one.key for one in page]
            assert seen == in_order
        after = await store.documents.list("c", after="between")
        assert [one.key for one in after] == [key for key in in_order if key > "between"]

    @pytest.mark.parametrize("begun", [False, True])
    async def test_one_of_many_writes_a_document(self, store: EventStore, begun: bool) -> None:
        before = await store.documents.add("c", "shared", 0) if begun else None
        won: list[UUID] = []
        lost: list[UUID | None] = []

        async def write(number: int) -> None:
            documents = store.documents
            try:
                if number % 2:
                    async with store.transaction() as tx:
                        await tx.documents.save_all("c", {"a": 1, "z": 1})
                        if before:
                            revision = await tx.documents.save("c", "shared", 1, expected=before)
                        else:
                            revision = await tx.documents.add("c", "shared", 1)
                elif before:
                    revision = await documents.save("c", "shared", 1, expected=before)
                else:
                    revision = await documents.add("c", "shared", 1)
            except DocumentConflictError as error:
                lost.append(error.actual)
            else:
                won.append(revision)

        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(write, number)
        assert len(won) == 1
        assert lost == won * 19
        assert await document(store, "shared") == Document("shared", 1, won[0])

    async def test_those_who_compare_and_try_again_lose_nothing(self, store: EventStore) -> None:
        await store.documents.add("c", "count", 0)

        async def count() -> None:
            for _ in range(3):
                while True:
                    found = await document(store, "count")
                    assert isinstance(found.value, int)
                    try:
                        await store.documents.save(
                            "c", "count", found.value + 1, expected=found.revision
                        )
                        break
                    except DocumentConflictError:
                        pass

        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                for _ in range(6):
                    tasks.start_soon(count)
        assert (await document(store, "count")).value == 18

    async def test_what_is_no_document_is_refused_and_nothing_is_saved(
        self, store: EventStore
    ) -> None:
        documents = store.documents
        for collection, key, error, why in (
            ("", "a", ValueError, "collection must have 1 to 255 characters"),
            ("c" * 256, "a", ValueError, "collection must have 1 to 255 characters"),
            ("c\0", "a", ValueError, "collection holds a character"),
            (7, "a", TypeError, "collection must be a string"),
            ("c", "", ValueError, "key must have 1 to 1000 characters"),
            ("c", "k" * 1001, ValueError, "key must have 1 to 1000 characters"),
            ("c", "\ud800", ValueError, "key holds a character"),
            ("c", None, TypeError, "key must be a string"),
            ("c", "😀" * 650, ValueError, "at most 2600 bytes of UTF-8 together, not 2601"),
        ):
            for call in _calls(documents, collection, key)[2:]:  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
                with pytest.raises(error, match=why):
                    await call()
        deep: list[object] = []
        for _ in range(100_000):
            deep = [deep]
        for value, why in (
            (nan, r"nan would come back as None"),
            ({"a": [1, {"b": inf}]}, r"\$\['a'\]\[1\]\['b'\]: inf would come back as None"),
            ((1, 2), r"\(1, 2\) would come back as \[1, 2\]"),
            ({1: 2}, "would come back as"),
            ({"a": {1}}, "would come back as"),
            (uuid4(), "would come back as"),
            (b"a", "would come back as"),
            ("a\0", r"U\+0000"),
            ({"a": ["\\\0"]}, r"U\+0000"),
            ({"\0": 1}, r"U\+0000"),
            (["\ud800"], "surrogates"),
            (object(), "type object"),
            (deep, "recursion"),
            (10**5000, "digits"),
        ):
            for call in (
                partial(documents.save, "c", "bad", value),
                partial(documents.add, "c", "bad", value),
                partial(documents.save_all, "c", {"good": 1, "bad": value}),
            ):
                with pytest.raises(ValueError, match="document 'bad' of 'c' cannot be") as raised:
                    await call()
                raised.match(why)
        for expected in ("7", 7, b"", True):
            for call in (
                partial(documents.save, "c", "a", 1, expected=expected),  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
                partial(documents.delete, "c", "a", expected=expected),  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
            ):
                with pytest.raises(TypeError, match="expected must be a revision"):
                    await call()
        for limit in (0, -1, "7", None, True):
            with pytest.raises(ValueError, match="limit must be a number from 1"):
                await documents.list("c", limit=limit)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        for after in ("a\0", "k" * 1001):
            with pytest.raises(ValueError, match="after "):
                await documents.list("c", after=after)
        with pytest.raises(TypeError, match="not one"):
            await documents.get_all("c", "a")
        assert await documents.list("c") == []

    # -- cancelled, and closed

    async def test_every_call_for_a_document_is_a_checkpoint(self, store: EventStore) -> None:
        async with store.transaction() as tx:
            for documents in (store.documents, tx.documents):
                for call in _calls(documents):
                    await assert_checkpoint(call)
                await assert_checkpoint(partial(documents.get_all, "c", []))
                await assert_checkpoint(partial(documents.save_all, "c", {}))

    async def test_a_cancelled_call_for_a_document_has_happened_or_not(
        self, store: EventStore
    ) -> None:
        at: Document | None = None
        runs = 0

        async def save() -> UUID:
            nonlocal runs
            runs += 1
            if at is None:
                return await store.documents.add("c", "a", runs)
            return await store.documents.save("c", "a", runs, expected=at.revision)

        async def save_all() -> bool:
            nonlocal runs
            runs += 1
            await store.documents.save_all("many", {"a": runs, "b": runs})
            return True

        async def delete() -> bool:
            await store.documents.save("gone", "a", 1)
            await store.documents.delete("gone", "a")
            return True

        async def check(result: UUID | None) -> None:
            nonlocal at
            found = await store.documents.get("c", "a")
            if result is not None:
                assert found == Document("a", runs, result)
            else:
                assert found == at or (found is not None and found.value == runs)
            at = found

        async def check_all(result: bool | None) -> None:
            found = await values(store, "many")
            assert found.get("a") == found.get("b")
            assert not result or found == {"a": runs, "b": runs}

        async def check_gone(result: bool | None) -> None:
            assert not result or await values(store, "gone") == {}

        assert await cancel_at_every_checkpoint(save, check) >= 1
        assert await cancel_at_every_checkpoint(save_all, check_all) >= 1
        assert await cancel_at_every_checkpoint(delete, check_gone) >= 2

    async def test_a_cancelled_look_up_of_documents_leaves_the_store_whole(
        self, store: EventStore
    ) -> None:
        await store.documents.save_all("c", {"a": 1, "b": 2})

        async def look() -> tuple[object, ...]:
            documents = store.documents
            found = await documents.get("c", "a")
            both = await documents.get_all("c", ["b", "a"])
            return found and found.value, list(both), len(await documents.list("c"))

        async def check(result: tuple[object, ...] | None) -> None:
            assert result in ((1, ["b", "a"], 2), None)
            assert await values(store) == {"a": 1, "b": 2}

        assert await cancel_at_every_checkpoint(look, check) >= 3

    async def test_the_documents_of_a_closed_store_say_so(self, store: EventStore) -> None:
        documents = store.documents
        with pytest.raises(StoreClosedError):
            async with store.transaction() as tx:
                await tx.documents.save("c", "a", 1)
                await store.__aexit__(None, None, None)
        for call in _calls(documents):
            with pytest.raises(StoreClosedError, match="async with"):
                await call()


def _calls(
    documents: DocumentRepository, collection: str = "c", key: str = "a"
) -> list[Callable[[], Awaitable[object]]]:
    return [
        lambda: documents.list(collection, after="a", limit=7),
        lambda: documents.delete_all(collection),
        lambda: documents.get(collection, key),
        lambda: documents.get_all(collection, ["z", key]),
        lambda: documents.save(collection, key, 1),
        lambda: documents.save_all(collection, {"z": 1, key: 1}),
        lambda: documents.delete(collection, key),
        lambda: documents.add(collection, key if key != "a" else str(uuid4()), 1),
    ]
