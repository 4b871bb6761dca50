"""The contract of reading: bounds, filters, pages, abandonment, what cannot be decoded."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager
from uuid import uuid4

import anyio
import pytest

from .. import events as registry
from ..errors import EventDecodeError
from ..events import StoredEvent
from ..stores.interface import ANY, EventStore, ReadOptions
from ..stores.reading import readable
from .samples import Ended, Happened, append_numbers, numbers


@contextmanager
def forgotten(event_type: str) -> Generator[None]:
    """A program that does not know an event type which another one has stored."""
    known = registry._by_name.pop(event_type)  # pyright: ignore[reportPrivateUsage]
    try:
        yield
    finally:
        registry._by_name[event_type] = known  # pyright: ignore[reportPrivateUsage]


async def read(store: EventStore, options: ReadOptions | None = None) -> list[StoredEvent]:
    return [stored async for stored in store.read_all(options)]


class ReadContract:
    async def test_a_stream_that_does_not_exist_is_empty(self, store: EventStore) -> None:
        stream = await store.get_events("a", "Thing")
        assert (len(stream), stream.version, stream.events) == (0, 0, ())
        assert (stream.aggregate_id, stream.aggregate_type) == ("a", "Thing")
        assert (await store.get_events("a")).aggregate_type is None
        assert [stored async for stored in store.read_stream("Thing-a")] == []
        assert await read(store) == []
        assert await store.last_position() == 0

    async def test_get_events_from_a_version_on(self, store: EventStore) -> None:
        await append_numbers(store, 5)
        stream = await store.get_events("a", "Thing", 3)
        assert numbers(stream) == [2, 3, 4]
        assert (stream.version, stream[0].version) == (5, 3)
        assert numbers(stream[1:]) == [3, 4]
        beyond = await store.get_events("a", "Thing", from_version=9)
        assert (len(beyond), beyond.version) == (0, 5)

    async def test_get_events_finds_the_type_of_an_id(self, store: EventStore) -> None:
        uuid = uuid4()
        await append_numbers(store, 2, uuid, "Thing")
        await append_numbers(store, 1, "x", "Thing")
        stream = await store.get_events(uuid)
        assert (stream.aggregate_type, stream.version) == ("Thing", 2)
        await append_numbers(store, 1, uuid, "Other")
        with pytest.raises(ValueError, match="2 aggregates: Other, Thing"):
            await store.get_events(uuid)

    @pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
    async def test_read_stream_bounds(self, store: EventStore, batch_size: int) -> None:
        await append_numbers(store, 6)
        await append_numbers(store, 2, "other")
        for first, last, backwards, limit, expected in (
            (0, None, False, None, [1, 2, 3, 4, 5, 6]),
            (1, None, False, None, [1, 2, 3, 4, 5, 6]),
            (3, None, False, None, [3, 4, 5, 6]),
            (2, 4, False, None, [2, 3, 4]),
            (2, 99, False, 2, [2, 3]),
            (7, None, False, None, []),
            (5, 2, False, None, []),
            (0, None, True, None, [6, 5, 4, 3, 2, 1]),
            (2, 4, True, None, [4, 3, 2]),
            (0, 99, True, 4, [6, 5, 4, 3]),
            (0, 0, True, None, []),
            (0, None, False, 0, []),
        ):
            options = ReadOptions(
                from_version=first,
                to_version=last,
                backwards=backwards,
                limit=limit,
                batch_size=batch_size,
            )
            found = [stored.version async for stored in store.read_stream("Thing-a", options)]
            assert found == expected, options

    @pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
    async def test_read_all_bounds(self, store: EventStore, batch_size: int) -> None:
        for number in range(6):
            await store.append_events(str(number), "Thing", [Happened(number)], ANY)
        at = [stored.position for stored in await read(store)]
        for first, last, backwards, limit, expected in (
            (0, None, False, None, [0, 1, 2, 3, 4, 5]),
            (at[2], None, False, None, [2, 3, 4, 5]),
            (at[1], at[3], False, None, [1, 2, 3]),
            (at[1], at[5] + 9, False, 2, [1, 2]),
            (at[5] + 1, None, False, None, []),
            (0, None, True, None, [5, 4, 3, 2, 1, 0]),
            (at[1], at[3], True, None, [3, 2, 1]),
            (0, at[5] + 9, True, 4, [5, 4, 3, 2]),
            (at[4], at[2], False, None, []),
        ):
            options = ReadOptions(
                from_position=first,
                to_position=last,
                backwards=backwards,
                limit=limit,
                batch_size=batch_size,
            )
            assert numbers(await read(store, options)) == expected, options

    @pytest.mark.parametrize("batch_size", [1, 2, 100])
    async def test_filters(self, store: EventStore, batch_size: int) -> None:
        for number in range(4):
            kind = "Thing" if number % 2 else "Other"
            await store.append_events(str(number), kind, [Happened(number), Ended()], ANY)

        async def found(**filters: object) -> list[str]:
            options = ReadOptions(batch_size=batch_size, **filters)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
            return [
                f"{stored.aggregate_id}{type(stored.event).__name__[0]}"
                for stored in await read(store, options)
            ]

        assert await found(event_types=[Happened]) == ["0H", "1H", "2H", "3H"]
        assert await found(event_types=["unknown"]) == []
        assert await found(aggregate_types=["Thing"]) == ["1H", "1E", "3H", "3E"]
        assert await found(event_types=[Ended.event_type], aggregate_types=["Thing"]) == [
            "1E",
            "3E",
        ]
        assert await found(event_types=[Ended, Happened], limit=3, backwards=True) == [
            "3E",
            "3H",
            "2E",
        ]
        options = ReadOptions(event_types=(Ended,), batch_size=batch_size)
        (ended,) = [stored async for stored in store.read_stream("Thing-1", options)]
        assert ended.version == 2

    async def test_options_that_make_no_sense_are_refused(self, store: EventStore) -> None:
        for bad in ({"limit": -1}, {"from_version": -1}, {"to_position": "x"}, {"batch_size": 0}):
            with pytest.raises(ValueError, match=next(iter(bad))):
                ReadOptions(**bad)  # pyright: ignore[reportArgumentType]
        with pytest.raises(TypeError, match="tuple"):
            ReadOptions(event_types="Happened")  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match="from_position has no meaning for read_stream"):
            store.read_stream("Thing-a", ReadOptions(from_position=1))
        with pytest.raises(ValueError, match="to_version has no meaning for read_all"):
            store.read_all(ReadOptions(to_version=1))
        with pytest.raises(ValueError, match="backwards has no meaning for subscribe"):
            store.subscribe(options=ReadOptions(backwards=True))
        with pytest.raises(ValueError, match="after"):
            store.subscribe(after=-1)
        for bad_id in ("Thing", "-a", "Thing-", ""):
            with pytest.raises(ValueError, match="stream"):
                store.read_stream(bad_id)

    async def test_a_read_ends_where_the_store_did(self, store: EventStore) -> None:
        """It may see what is appended meanwhile, in order, but always ends."""
        await append_numbers(store, 4)
        seen: list[int] = []
        async for stored in store.read_all(ReadOptions(batch_size=2)):
            seen.append(stored.position)
            if len(seen) < 20:
                await append_numbers(store, 1)
        assert seen == sorted(set(seen))
        assert len(seen) >= 4

    async def test_a_long_stream_is_read_to_its_end(self, store: EventStore) -> None:
        await append_numbers(store, 2_500)
        assert numbers(await store.get_events("a", "Thing")) == list(range(2_500))
        assert numbers(await read(store)) == list(range(2_500))

    async def test_a_stream_is_read_in_batches(self, store: EventStore) -> None:
        await append_numbers(store, 7)
        for options, expected in (
            (ReadOptions(batch_size=3), [0, 1, 2, 3, 4, 5, 6]),
            (ReadOptions(batch_size=3, limit=4, backwards=True), [6, 5, 4, 3]),
            (ReadOptions(batch_size=100, from_version=8), []),
        ):
            iterator = store.read_stream("Thing-a", options)
            found: list[int] = []
            while batch := await iterator.next_batch():
                assert len(batch) <= options.batch_size
                found += numbers(readable(batch))
                assert numbers(readable(batch)) == found[-len(batch) :]  # again
                if len(found) < len(expected):
                    found += numbers([await anext(iterator)])
            assert found == expected
            assert not await iterator.next_batch()
            with pytest.raises(StopAsyncIteration):
                await anext(iterator)

    async def test_a_cancelled_batch_has_consumed_nothing(self, store: EventStore) -> None:
        await append_numbers(store, 4)
        async with store.subscribe() as subscription:
            for reader in (store.read_stream("Thing-a"), subscription):
                found: list[int] = []
                for taken in (0, 1):  # of a page that is not there, and of what is left of one
                    found += numbers([await anext(reader) for _ in range(taken)])
                    with anyio.CancelScope() as scope:
                        scope.cancel()
                        found += numbers(readable(await reader.next_batch()))
                    assert scope.cancelled_caught
                while len(found) < 4:
                    found += numbers(readable(await reader.next_batch()))
                assert found == [0, 1, 2, 3]

    async def test_two_readers_of_one_iterator_are_refused(self, store: EventStore) -> None:
        await append_numbers(store, 2)
        iterator = store.read_all()
        outcomes: list[object] = []

        async def take() -> None:
            try:
                outcomes.append((await anext(iterator)).version)
            except anyio.BusyResourceError:
                outcomes.append("busy")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(take)
            tasks.start_soon(take)
        assert sorted(outcomes, key=str) == [1, "busy"]

    async def test_iterators_can_be_abandoned_anywhere(self, store: EventStore) -> None:
        await append_numbers(store, 5)
        options = ReadOptions(batch_size=2)
        for taken in range(6):
            for iterator in (store.read_all(options), store.read_stream("Thing-a", options)):
                for _ in range(taken):
                    await anext(iterator)
                del iterator
        store.read_all()
        gc.collect()
        async for _ in store.read_all(options):
            break
        gc.collect()
        assert len(await read(store)) == 5

    async def test_an_exhausted_iterator_stays_exhausted(self, store: EventStore) -> None:
        await append_numbers(store, 1)
        iterator = store.read_all()
        await anext(iterator)
        for _ in range(2):
            with pytest.raises(StopAsyncIteration):
                await anext(iterator)

    async def test_an_event_that_cannot_be_read_costs_only_itself(self, store: EventStore) -> None:
        await store.append_events("a", "Thing", [Happened(1), Ended(), Happened(2)], ANY)
        with forgotten(Ended.event_type):
            for iterator in (store.read_all(), store.read_stream("Thing-a")):
                assert (await anext(iterator)).event == Happened(1)
                with pytest.raises(EventDecodeError) as raised:
                    await anext(iterator)
                assert (await anext(iterator)).event == Happened(2)
                error = raised.value
                assert (error.event_type, error.stream_id) == (Ended.event_type, "Thing-a")
                assert (error.version, error.path) == (2, "$")
                assert error.position > 0
                assert error.payload == b"{}"
                assert "no event class of the name" in str(error)
            iterator, kinds = store.read_stream("Thing-a"), list[type]()
            while batch := await iterator.next_batch():
                kinds += map(type, batch)
            assert kinds == [StoredEvent, EventDecodeError, StoredEvent]
            with pytest.raises(EventDecodeError):
                await store.get_events("a", "Thing")
        assert len(await store.get_events("a", "Thing")) == 3
