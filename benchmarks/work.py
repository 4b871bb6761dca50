"""What our stores do, the same on each; each piece opens its store, and warms it up."""

from __future__ import annotations

from time import perf_counter

import anyio
import attrs
from anyio.abc import TaskStatus

from eventsource_anyio import ANY, AggregateRepository, EventStore

from .events import PLACED, AllSent, Order
from .suite import Found, per_second

LOADED = 1000  # events of most streams
LARGE = 10_000
BATCH = 100
_WARM_TASKS = 40
_END = 30.0  # seconds that a subscriber may be behind when the last event was appended


@attrs.frozen
class Filled:
    """A store that is only read: an aggregate of each size, and others of 1,000 events."""

    streams: int
    sizes: tuple[int, ...]

    @property
    def events(self) -> int:
        return self.streams * LOADED + sum(size for size in self.sizes if size != LOADED)


def case(tasks: int, events: int, contended: bool) -> str:
    """What an append is called in all results."""
    who = "1 task" if tasks == 1 else f"{tasks:,} tasks"
    what = "1 event" if events == 1 else f"{events} events"
    return f"{who}, {what}, {'one stream' if contended else 'own streams'}"


async def warm(store: EventStore) -> None:
    """Open its connections, and have its statements prepared."""
    async with anyio.create_task_group() as group:
        for number in range(_WARM_TASKS):
            group.start_soon(store.append_events, f"warm-{number}", "Order", [PLACED], ANY)
    await store.append_events("warm-0", "Order", [PLACED], ANY)
    await store.append_events("warm-1", "Order", [PLACED], ANY)


async def appends(
    store: EventStore, tasks: int, events: int, contended: bool, seconds: float
) -> Found:
    """Each task appends to its own stream at an exact version; or all of them to one, at any."""
    async with store:
        await warm(store)
        return per_second(*await _append(store, tasks, events, contended, seconds))


async def _append(
    store: EventStore, tasks: int, events: int, contended: bool, seconds: float
) -> tuple[int, float]:
    """Until the time is over, but each task once at least: a busy machine is slow, not at zero."""
    done = 0
    batch = [PLACED] * events

    async def append(number: int) -> None:
        nonlocal done
        version = 0
        while not version or perf_counter() < begun + seconds:
            if contended:
                await store.append_events("order", "Order", batch, ANY)
            else:
                await store.append_events(f"order-{number}", "Order", batch, version)
            version += events
        done += version

    begun = perf_counter()
    if tasks == 1:
        await append(0)
    else:
        async with anyio.create_task_group() as group:
            for number in range(tasks):
                group.start_soon(append, number)
    return done, perf_counter() - begun


async def followed(
    store: EventStore, tasks: int, events: int, contended: bool, seconds: float
) -> Found:
    """The same appends while a subscriber follows; how many events it missed.

    Positions come in order, or it is an error; so what is missing at the last event never comes.
    """
    seen = 0

    async def follow(*, task_status: TaskStatus[None]) -> None:
        nonlocal seen
        last = await store.last_position()
        async with store.subscribe(after=last) as subscription:
            task_status.started()
            async for stored in subscription:
                if stored.position <= last:
                    raise AssertionError(f"position {stored.position} came after {last}")
                last = stored.position
                if isinstance(stored.event, AllSent):
                    return
                seen += 1

    async with store:
        await warm(store)
        async with anyio.create_task_group() as group:
            await group.start(follow)
            done, took = await _append(store, tasks, events, contended, seconds)
            await store.append_events("end", "Order", [AllSent(done)], ANY)
            group.cancel_scope.deadline = anyio.current_time() + _END
        return {**per_second(done, took), "missed": done - seen, "committed": done}


async def loads(store: EventStore, size: int, seconds: float, new: Filled | None = None) -> Found:
    """An aggregate, loaded and folded, again and again; of a store that is new, or is filled."""
    async with store:
        if new:
            await put_in(store, new)
        repository = AggregateRepository(store, Order)
        loaded = await repository.load(f"order-{size}")
        if loaded.version != size:
            raise AssertionError(f"{loaded.version} events were loaded of {size}")
        done = 0
        begun = perf_counter()
        while (now := perf_counter()) < begun + seconds:
            await repository.load(f"order-{size}")
            done += 1
        return {"ms": (now - begun) / done * 1000}


async def read_all(
    store: EventStore, events: int, seconds: float, new: Filled | None = None
) -> Found:
    """The whole store, as typed objects, again and again."""
    async with store:
        if new:
            await put_in(store, new)
        await anext(store.read_all())
        read = 0
        begun = perf_counter()
        while (now := perf_counter()) < begun + seconds:
            before = read
            async for _ in store.read_all():
                read += 1
            if read - before != events:
                raise AssertionError(f"{read - before:,} events were read of {events:,}")
        return per_second(read, now - begun)


async def fill(store: EventStore, what: Filled) -> None:
    """Streams whose events are not side by side."""
    async with store:
        await put_in(store, what)


async def put_in(store: EventStore, what: Filled) -> None:
    names = [f"order-{size}" for size in what.sizes if size == LOADED]
    names += [f"other-{number}" for number in range(what.streams - len(names))]
    for step in range(LOADED // BATCH):
        for name in names:
            await store.append_events(name, "Order", [PLACED] * BATCH, step * BATCH)
        for size in what.sizes:
            if size != LOADED:
                share = [PLACED] * (size * BATCH // LOADED)
                await store.append_events(f"order-{size}", "Order", share, step * len(share))
