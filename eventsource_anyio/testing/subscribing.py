"""The contract of subscriptions: nothing missed, nothing doubled, in order, and woken."""

from __future__ import annotations

import anyio
import pytest
from anyio.lowlevel import checkpoint

from ..errors import EventDecodeError
from ..events import StoredEvent
from ..stores.interface import ANY, EventStore, ReadOptions
from .reading import forgotten
from .samples import Ended, Happened, append_numbers, numbers


async def take(
    store: EventStore, count: int, after: int = 0, options: ReadOptions | None = None
) -> list[StoredEvent]:
    """The next events of a new subscription; fails if they do not come."""
    events: list[StoredEvent] = []
    with anyio.fail_after(20):
        async with store.subscribe(after=after, options=options) as subscription:
            while len(events) < count:
                events.append(await anext(subscription))
    return events


class SubscribeContract:
    async def test_it_reads_what_is_there_and_then_waits(self, store: EventStore) -> None:
        await append_numbers(store, 3)
        seen: list[int] = []
        async with store.subscribe(options=ReadOptions(batch_size=2)) as subscription:

            async def follow() -> None:
                async for stored in subscription:
                    seen.extend(numbers([stored]))
                    if len(seen) == 5:
                        return

            with anyio.fail_after(20):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(follow)
                    await anyio.wait_all_tasks_blocked()
                    await store.append_events("b", "Thing", [Happened(7)], ANY)
                    await anyio.wait_all_tasks_blocked()
                    await store.append_events("b", "Thing", [Happened(8)], ANY)
        assert seen == [0, 1, 2, 7, 8]

    async def test_it_begins_after_a_position(self, store: EventStore) -> None:
        await append_numbers(store, 4)
        first, second = await take(store, 2)
        assert numbers(await take(store, 2, after=second.position)) == [2, 3]
        assert numbers(await take(store, 3, after=first.position)) == [1, 2, 3]

    async def test_new_events_only(self, store: EventStore) -> None:
        await append_numbers(store, 3)
        async with store.subscribe(after=await store.last_position()) as subscription:
            await store.append_events("b", "Thing", [Happened(9)], ANY)
            with anyio.fail_after(20):
                assert numbers([await anext(subscription)]) == [9]

    async def test_position_follows_what_was_handed_out_or_filtered_out(
        self, store: EventStore
    ) -> None:
        await store.append_events("a", "Thing", [Happened(1), Ended(), Happened(2)], ANY)
        options = ReadOptions(event_types=(Ended,))
        async with store.subscribe(options=options) as subscription:
            assert subscription.position == 0
            ended = await anext(subscription)
            assert ended.event == Ended()
            assert ended.position <= subscription.position <= await store.last_position()
            with anyio.move_on_after(0.05):
                await anext(subscription)
            assert subscription.position == await store.last_position()
            await store.append_events("a", "Thing", [Ended()], ANY)
            with anyio.fail_after(20):
                assert (await anext(subscription)).version == 4

    async def test_position_is_a_checkpoint_at_every_event(self, store: EventStore) -> None:
        await append_numbers(store, 7)
        async with store.subscribe(options=ReadOptions(batch_size=3)) as subscription:
            for number in range(6):
                await anext(subscription)
                assert numbers(await take(store, 1, after=subscription.position)) == [number + 1]

    async def test_many_subscribers_see_every_event_once_in_order(self, store: EventStore) -> None:
        total, seen = 120, [list[int]() for _ in range(8)]

        async def follow(mine: list[int]) -> None:
            async with store.subscribe(options=ReadOptions(batch_size=7)) as subscription:
                async for stored in subscription:
                    mine.append(stored.position)
                    if len(mine) % 10 == 0:
                        await checkpoint()
                    if len(mine) == total:
                        return

        async def append(number: int) -> None:
            for _ in range(5):
                await append_numbers(store, 3, str(number))

        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                for mine in seen:
                    tasks.start_soon(follow, mine)
                for number in range(8):
                    tasks.start_soon(append, number)
        expected = [stored.position async for stored in store.read_all()]
        assert len(expected) == total
        assert seen == [expected] * len(seen)

    async def test_an_event_that_cannot_be_read_does_not_end_it(self, store: EventStore) -> None:
        await store.append_events("a", "Thing", [Happened(1), Ended(), Happened(2)], ANY)
        with forgotten(Ended.event_type):
            async with store.subscribe() as subscription:
                await anext(subscription)
                with pytest.raises(EventDecodeError):
                    await anext(subscription)
                assert (await anext(subscription)).event == Happened(2)

    async def test_it_is_read_inside_its_block_and_entered_once(self, store: EventStore) -> None:
        await append_numbers(store, 1)
        manager = store.subscribe()
        async with manager as subscription:
            await anext(subscription)
        with pytest.raises(RuntimeError, match="inside its block"):
            await anext(subscription)
        with pytest.raises(RuntimeError, match="entered once"):
            await manager.__aenter__()

    async def test_an_error_of_the_callers_arrives_as_it_is(self, store: EventStore) -> None:
        await append_numbers(store, 1)
        with pytest.raises(KeyError):
            async with store.subscribe() as subscription:
                async for _ in subscription:
                    raise KeyError("the caller's own")
