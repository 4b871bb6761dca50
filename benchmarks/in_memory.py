"""The store in memory, and what needs no store: folding events."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from functools import partial
from time import perf_counter
from uuid import uuid4

import anyio

from eventsource_anyio import InMemoryEventStore, StoredEvent

from . import work
from .events import STEPS, Counter
from .plan import Plan
from .suite import NAME, Found, Piece, Suite, anyios, on, ours, per_second

STORE = "memory"
_FOLDED = 50_000
_WAITING = (128, 1000)


def fold() -> Found:
    """Rebuild an aggregate with eight event types."""
    now = datetime.now(UTC)
    stored = [
        StoredEvent(STEPS[n % 8](n), uuid4(), "", "a", "Counter", n + 1, n + 1, now, now, {}, 1)
        for n in range(_FOLDED)
    ]
    counter = Counter("a")
    begun = perf_counter()
    counter.replay(stored)
    seconds = perf_counter() - begun
    if counter.total != sum(range(_FOLDED)):
        raise AssertionError("the fold is wrong")
    return per_second(_FOLDED, seconds)


async def wake_ups(waiting: int, seconds: float) -> Found:
    """Tasks that wait for an event of anyio's, and wait for the next one as soon as it was set.

    What each append among many costs on an event loop, whatever the store does.
    """
    woken = 0
    ended = False
    event, back = anyio.Event(), anyio.Event()

    async def wait() -> None:
        nonlocal woken
        while not ended:
            await event.wait()
            woken += 1
            if woken % waiting == 0:
                back.set()

    async with anyio.create_task_group() as tasks:
        for _ in range(waiting):
            tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        begun = perf_counter()
        while not ended:
            ended = perf_counter() > begun + seconds
            before, event, back = event, anyio.Event(), anyio.Event()
            before.set()
            await back.wait()
    return {"µs": (perf_counter() - begun) / woken * 1e6}


def _opened(loop: str, run: Callable[..., Awaitable[Found]], *how: object) -> Found:
    return on(loop, run, InMemoryEventStore(), *how)


def add(suite: Suite, plan: Plan) -> None:
    seconds = plan.embedded
    for tasks, events, contended in plan.embedded_appends:
        case = work.case(tasks, events, contended)
        for loop in plan.loops:
            appends = partial(_opened, loop, work.appends, tasks, events, contended, seconds)
            suite.add(Piece("append", STORE, case, ours(loop)), appends)
        for peer in plan.peers:
            asked = partial(
                peer.ask,
                "appends",
                where="",
                tasks=tasks,
                events=events,
                contended=contended,
                seconds=seconds,
            )
            suite.add(Piece("append", STORE, case, peer.name), asked)
    for size in plan.filled.sizes:
        small = work.Filled(int(size == work.LOADED), (size,))
        case = f"{size:,} events"
        for loop in plan.loops:
            piece = Piece("load", STORE, case, ours(loop))
            suite.add(piece, partial(_opened, loop, work.loads, size, seconds, small))
        for peer in plan.peers:
            for snapshot, name in ((False, peer.name), (True, f"{peer.name}, snapshot")):
                asked = partial(
                    peer.ask, "loads", where="", size=size, snapshot=snapshot, seconds=seconds
                )
                suite.add(Piece("load", STORE, case, name), asked)
    few = work.Filled(5, (10, work.LOADED))
    case = "everything"
    for loop in plan.loops:
        piece = Piece("read", STORE, case, ours(loop))
        suite.add(piece, partial(_opened, loop, work.read_all, few.events, seconds, few))
    for peer in plan.peers:
        asked = partial(
            peer.ask, "read_all", where="", streams=few.streams, sizes=few.sizes, seconds=seconds
        )
        suite.add(Piece("read", STORE, case, peer.name), asked)
    for tasks, events, contended in plan.followed:
        case = work.case(tasks, events, contended)
        for loop in plan.loops:
            followed = partial(_opened, loop, work.followed, tasks, events, contended, seconds)
            suite.add(Piece("append, with a subscriber", STORE, case, ours(loop)), followed)
    suite.add(Piece("fold", STORE, "8 event types", NAME), fold)
    for waiting in _WAITING:
        for loop in plan.loops:
            piece = Piece("wake-up of a task", STORE, f"{waiting:,} that wait", anyios(loop))
            suite.add(piece, partial(on, loop, wake_ups, waiting, seconds))
