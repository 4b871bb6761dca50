"""Cancellation at every checkpoint of an operation, and the contract of a store under it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Generic, TypeVar

import anyio
import pytest

from ..errors import StoreClosedError
from ..events import NewEvent
from ..stores.interface import ANY, NO_STREAM, EventStore, ReadOptions
from ..stores.reading import readable
from .samples import Happened, append_numbers, numbers

T = TypeVar("T")


class _CancelledAt(Generic[T]):
    """Awaits a coroutine, and cancels the scope when it suspends for the nth time."""

    def __init__(self, work: Coroutine[object, object, T], scope: anyio.CancelScope, nth: int):
        self._work = work
        self._scope = scope
        self._left = nth

    def __await__(self) -> Generator[object, object, T]:
        work = self._work.__await__()
        try:
            waits_for = next(work)
            while True:
                self._left -= 1
                if self._left == 0:
                    self._scope.cancel()
                try:
                    sent = yield waits_for
                except BaseException as error:  # noqa: BLE001  (passed on, as it is)
                    waits_for = work.throw(error)
                else:
                    waits_for = work.send(sent)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]


async def cancel_at_every_checkpoint(
    operation: Callable[[], Coroutine[object, object, T]],
    afterwards: Callable[[T | None], Awaitable[object]],
) -> int:
    """Run the operation again and again, cancelled at its first checkpoint, its second, and so on.

    `afterwards` is awaited after each run with the operation's result, or None if the cancellation
    came out of it; it checks that everything is whole. Ends after the first run that has no
    checkpoint left to be cancelled at, and returns how many were.
    """
    cancelled = 0
    while True:
        result: T | None = None
        with anyio.CancelScope() as scope:
            result = await _CancelledAt(operation(), scope, cancelled + 1)
        await afterwards(result)
        if not scope.cancel_called:
            return cancelled
        cancelled += 1


class CancelContract:
    async def test_a_cancelled_append_is_whole_or_not_there(self, store: EventStore) -> None:
        runs = 0
        events: list[NewEvent] = []

        async def append() -> int:
            nonlocal runs, events
            runs += 1
            events = [NewEvent(Happened(runs)), NewEvent(Happened(runs))]
            return (await store.append_events(str(runs), "Thing", events, NO_STREAM)).version

        async def check(result: int | None) -> None:
            stored = await store.get_events(str(runs), "Thing")
            assert len(stored) in ((2,) if result else (0, 2))
            again = await store.append_events(str(runs), "Thing", events, NO_STREAM)
            assert again.version == 2
            assert numbers(await store.get_events(str(runs), "Thing")) == [runs, runs]

        assert await cancel_at_every_checkpoint(append, check) >= 1

    async def test_a_cancelled_transaction_is_whole_or_not_there(self, store: EventStore) -> None:
        runs = 0

        async def transact() -> bool:
            nonlocal runs
            runs += 1
            async with store.transaction() as tx:
                await tx.append_events(f"{runs}a", "Thing", [Happened(1)], NO_STREAM)
                await tx.append_events(f"{runs}b", "Thing", [Happened(2), Happened(3)], NO_STREAM)
            return True

        async def check(result: bool | None) -> None:
            first = await store.get_events(f"{runs}a", "Thing")
            second = await store.get_events(f"{runs}b", "Thing")
            lengths = (len(first), len(second))
            assert lengths in (((1, 2),) if result else ((0, 0), (1, 2)))

        assert await cancel_at_every_checkpoint(transact, check) >= 3

    async def test_a_cancelled_read_has_consumed_nothing(self, store: EventStore) -> None:
        await append_numbers(store, 10)
        seen: list[int] = []
        iterator = store.read_all()

        async def read() -> None:
            nonlocal iterator
            iterator = store.read_all(ReadOptions(batch_size=3))
            seen.clear()
            async for stored in iterator:
                seen.extend(numbers([stored]))

        async def check(_: None) -> None:
            # What was cancelled goes on where it was: nothing is left out, nothing comes twice.
            async for stored in iterator:
                seen.extend(numbers([stored]))
            assert seen == list(range(10))

        assert await cancel_at_every_checkpoint(read, check) >= 4

    async def test_a_cancelled_get_leaves_the_store_whole(self, store: EventStore) -> None:
        await append_numbers(store, 3)

        async def get() -> int:
            return len(await store.get_events("a"))

        async def check(result: int | None) -> None:
            assert result in (3, None)
            assert len(await store.get_events("a", "Thing")) == 3
            assert await store.last_position() >= 3

        assert await cancel_at_every_checkpoint(get, check) >= 1

    async def test_a_cancelled_subscriber_has_consumed_nothing(self, store: EventStore) -> None:
        seen: list[int] = []
        appended = 0
        async with store.subscribe(options=ReadOptions(batch_size=2)) as subscription:

            async def follow() -> None:
                async for stored in subscription:
                    seen.append(stored.version)  # noqa: PERF401  (what was seen before a cancel)

            async def append(until: anyio.CancelScope) -> None:
                nonlocal appended
                while not until.cancel_called:
                    await append_numbers(store, 3)
                    appended += 3
                    await anyio.wait_all_tasks_blocked()

            for nth in range(1, 12):
                with anyio.fail_after(20):
                    async with anyio.create_task_group() as tasks:
                        with anyio.CancelScope() as scope:
                            tasks.start_soon(append, scope)
                            await _CancelledAt(follow(), scope, nth)
                    while len(seen) < appended:
                        seen.append((await anext(subscription)).version)
                assert seen == list(range(1, appended + 1))

    async def test_a_cancelled_batch_of_a_subscriber_has_consumed_nothing(
        self, store: EventStore
    ) -> None:
        await append_numbers(store, 200)
        reached = 0
        for nth in range(1, 12):
            with anyio.fail_after(20):
                async with store.subscribe(options=ReadOptions(batch_size=200)) as subscription:
                    seen: list[int] = []
                    with anyio.CancelScope() as scope:
                        work = _CancelledAt(subscription.next_batch(), scope, nth)
                        seen += numbers(readable(await work))
                    reached += scope.cancelled_caught
                    if not seen:
                        seen += numbers([await anext(subscription)])
                    while len(seen) < 200:
                        seen += numbers(readable(await subscription.next_batch()))
                    assert seen == list(range(200))
        # A page is decoded in parts, so that a large one keeps nobody else from running.
        assert reached >= 3

    async def test_a_caller_that_gave_up_delays_nobody(self, store: EventStore) -> None:
        """Appends with deadlines of nothing, among others: those that returned are there."""
        kept: list[int] = []

        async def append(number: int, patience: float) -> None:
            with anyio.move_on_after(patience):
                await store.append_events(str(number), "Thing", [Happened(number)], NO_STREAM)
                kept.append(number)

        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                for number in range(200):
                    patience = (0, 0.0001, 0.001, 60)[number % 4]
                    tasks.start_soon(append, number, patience)
        stored = {number async for event in store.read_all() for number in numbers([event])}
        assert set(kept) <= stored
        assert set(range(3, 200, 4)) <= stored

    async def test_a_closed_store_says_so(self, store: EventStore) -> None:
        await append_numbers(store, 3)
        iterator = store.read_all(ReadOptions(batch_size=1))
        await anext(iterator)
        outcomes: list[str] = []

        async def follow() -> None:
            try:
                async with store.subscribe(after=3) as subscription:
                    await anext(subscription)
            except StoreClosedError:
                outcomes.append("closed")

        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(follow)
                await anyio.wait_all_tasks_blocked()
                await store.__aexit__(None, None, None)
        assert outcomes == ["closed"]
        with pytest.raises(StoreClosedError, match="async with"):
            await append_numbers(store, 1)
        for reading in (
            anext(iterator),
            store.get_events("a"),
            store.get_events("a", "Thing"),
            store.last_position(),
        ):
            with pytest.raises(StoreClosedError):
                await reading
        await store.__aexit__(None, None, None)

    async def test_errors_arrive_as_they_are(self, store: EventStore) -> None:
        """No exception group: the caller's `except` sees what the caller's code raised."""
        with pytest.raises(KeyError):
            async with store.transaction():
                raise KeyError("the caller's own")
        with pytest.raises(TypeError):
            await store.append_events("a", "Thing", [object()], ANY)  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
