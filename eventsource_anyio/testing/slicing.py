"""The contract of slices: streams divided among readers, for ever in the same way."""

from __future__ import annotations

from itertools import product
from uuid import UUID

import anyio
import pytest

from ..ids import SLICES, parse_stream_id, slice_of
from ..stores.interface import ANY, EventStore, ReadOptions
from .reading import read
from .samples import Ended, Happened, append_numbers
from .subscribing import take

KNOWN_SLICES = {
    "Thing-a": 916,
    "Thing-b": 355,
    "Other-a": 582,
    "Thing-42": 464,
    "Thing-a-b-c": 914,
    "Thing- ": 614,
    "Thing-'; --": 807,
    "Thing-00000000-0000-0000-0000-000000000001": 926,
    "Thing-6f1c8a52-3d0e-7b44-9c1f-0a2b3c4d5e6f": 654,
    "Thing-6F1C8A52-3D0E-7B44-9C1F-0A2B3C4D5E6F": 687,  # a string, and no UUID
    "Thing-Zo\u00eb": 402,
    "Thing-Zoe\u0308": 88,
    "Gr\u00f6\u00dfe-\u00df/7": 775,
    "Thing-\u5c71\u7530": 391,
    "Thing-\U0001f6b2": 186,
    f"Thing-{'x' * 255}": 656,
}


async def fill(store: EventStore) -> None:
    """Streams of both kinds of ids and in all quarters of the slices, their events mixed."""
    for number in range(3):
        for stream_id in KNOWN_SLICES:
            aggregate_type, aggregate_id = parse_stream_id(stream_id)
            events = [Happened(number), Ended()]
            await store.append_events(aggregate_id, aggregate_type, events, ANY)


class SliceContract:
    async def test_the_slice_of_a_stream_never_changes(self, store: EventStore) -> None:
        await fill(store)
        for stream_id, number in KNOWN_SLICES.items():
            assert slice_of(stream_id) == number
            found = await read(store, ReadOptions(slices=range(number, number + 1)))
            assert {(stored.stream_id, stored.slice) for stored in found} == {(stream_id, number)}
            assert len(found) == 6

    @pytest.mark.parametrize("ranges", [1, 2, 3, 8, 100])
    async def test_every_event_is_in_one_of_the_ranges_that_do_not_overlap(
        self, store: EventStore, ranges: int
    ) -> None:
        await fill(store)
        # And each known slice in a range of its own, between two that end and begin there.
        known = {one + end for one in KNOWN_SLICES.values() for end in (0, 1)}
        begin = {*range(0, SLICES, SLICES // ranges), *known}
        found: list[int] = []
        for first, last in zip(sorted(begin), [*sorted(begin)[1:], SLICES], strict=True):
            part = [
                one.position for one in await read(store, ReadOptions(slices=range(first, last)))
            ]
            assert part == sorted(part)
            found += part
        assert sorted(found) == [stored.position for stored in await read(store)]

    @pytest.mark.parametrize("batch_size", [2, 100])
    async def test_slices_are_combined_with_the_other_options(
        self, store: EventStore, batch_size: int
    ) -> None:
        await fill(store)
        every = await read(store)
        low, high = every[5].position, every[-6].position
        for slices, event_types, aggregate_types, backwards, bounded in product(
            (range(391, 655), range(700, SLICES), range(1), range(SLICES)),
            ((), (Ended.event_type,), (Ended.event_type, Happened.event_type, "unknown")),
            ((), ("Other", "Gr\u00f6\u00dfe"), ("Thing",)),
            (False, True),
            (False, True),
        ):
            options = ReadOptions(
                slices=slices,
                event_types=event_types,
                aggregate_types=aggregate_types,
                backwards=backwards,
                from_position=low if bounded else 0,
                to_position=high if bounded else None,
                limit=7 if bounded else None,
                batch_size=batch_size,
            )
            expected = [
                stored
                for stored in (reversed(every) if backwards else every)
                if stored.slice in slices
                and (not event_types or stored.event_type in event_types)
                and (not aggregate_types or stored.aggregate_type in aggregate_types)
                and (not bounded or low <= stored.position <= high)
            ]
            assert await read(store, options) == expected[: options.limit], options

    async def test_a_subscription_to_slices_gets_their_events_only(self, store: EventStore) -> None:
        await fill(store)
        options = ReadOptions(slices=range(355, 465), batch_size=2)  # of 42, b, Zoë and 山田
        every = await read(store)
        expected = [stored for stored in every if stored.slice in range(355, 465)]
        assert len(expected) == 24
        assert await take(store, 24, options=options) == expected
        last = await store.last_position()
        async with store.subscribe(after=last, options=options) as subscription:
            for number in range(3):
                await append_numbers(store, 2, "a")
                await append_numbers(store, 1, "b")
                with anyio.fail_after(20):
                    stored = await anext(subscription)
                assert (stored.stream_id, stored.version) == ("Thing-b", 7 + number)
                assert stored.position <= subscription.position <= await store.last_position()

    async def test_the_position_moves_over_other_slices(self, store: EventStore) -> None:
        options = ReadOptions(slices=range(355, 356), batch_size=2)
        async with store.subscribe(options=options) as subscription:
            await append_numbers(store, 9, "a")
            with anyio.move_on_after(0.05):
                await anext(subscription)
            assert subscription.position == await store.last_position()
            await append_numbers(store, 9, UUID(int=1))
            await append_numbers(store, 1, "b")
            with anyio.fail_after(20):
                assert (await anext(subscription)).stream_id == "Thing-b"

    async def test_slices_that_make_no_sense_are_refused(self, store: EventStore) -> None:
        for bad in (
            *(range(0), range(5, 5), range(1025), range(-1, 5), range(1024, 1025)),
            *(range(0, 8, 2), range(8, 0, -1), 7, (0, 8), slice(0, 8)),
        ):
            with pytest.raises(ValueError, match=r"slices must be a range within range\(0, 1024\)"):
                ReadOptions(slices=bad)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        for good in (range(SLICES), range(1), range(1023, SLICES)):
            assert ReadOptions(slices=good).slices == good
        with pytest.raises(ValueError, match="slices has no meaning for read_stream"):
            store.read_stream("Thing-a", ReadOptions(slices=range(256)))
