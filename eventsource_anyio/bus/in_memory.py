"""The bus of one process."""

from __future__ import annotations

from collections.abc import Sequence

import anyio
from anyio import TASK_STATUS_IGNORED
from anyio.abc import TaskStatus
from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint, checkpoint_if_cancelled
from attrs import frozen

from ..events import DomainEvent, StoredEvent
from ..exception_groups import only_error
from ..stores.interface import EventStore
from .filtering import EventFilter
from .handling import Handler, Receipt, current_delivery
from .interface import EventBus, EventHandler, FailurePolicy
from .recent import RecentIds
from .ring import Ring, RingStream

# A turn of the loop costs several times what publishing an event does, so publishers who need not
# wait take one only so often; a cancellation is seen each time.
_EVENTS_A_TURN = 16


@frozen
class InMemoryBusStatistics:
    """`published` events since it was made, to `streams` and `handlers` of now, with `queued`
    deliveries that no handler has been called with yet."""

    published: int
    streams: int
    handlers: int
    queued: int


class InMemoryEventBus(EventBus):
    """For one process; it keeps the last `buffer` events for those who are slow.

    It needs not be entered, nor run for `publish` in the foreground: without `run()` handlers are
    called in the publisher's own task, one after another, and a publisher that is cancelled
    meanwhile waits for them.

    `on_failure` is called with the event and the error of each handler that fails. Without it the
    publisher is told; where it does not wait, because of `background`, the error ends `run()`.
    """

    def __init__(self, *, buffer: int = 1024, on_failure: FailurePolicy | None = None) -> None:
        if not isinstance(buffer, int) or isinstance(buffer, bool) or buffer < 1:
            raise ValueError(f"buffer must be a number of events from 1, not {buffer!r}")
        self._buffer = buffer
        self._policy = on_failure
        self._ring = Ring(buffer)
        self._handlers: list[Handler] = []
        self._recent = RecentIds(buffer)
        self._published = 0
        self._since_turn = 0
        self._order = anyio.Lock(fast_acquire=True)
        self._here = anyio.Lock(fast_acquire=True)
        self._running = False  # new deliveries are for run()
        self._stop = anyio.Event()
        self._stopped: anyio.Event | None = None

    async def publish(self, events: Sequence[StoredEvent], background: bool = False) -> None:
        await checkpoint_if_cancelled()
        outer = current_delivery()
        receipt = outer.receipt if outer is not None else None if background else Receipt()
        self._check_running(background)
        for start in range(0, len(events), self._buffer):
            chunk = events[start : start + self._buffer]
            if not self._order.locked() and self._has_room(len(chunk)):
                self._give_out(chunk, receipt)
            elif outer is not None:
                raise RuntimeError(
                    "Nothing was published: queues are full, and a handler that publishes cannot "
                    "wait for room, since it may be the one to make it.\n"
                    f"  Give the bus a larger buffer (it is {self._buffer}), or publish elsewhere."
                )
            else:
                async with self._order:
                    while not self._has_room(len(chunk)):
                        await self._ring.wait_for_room()
                        self._check_running(background)
                    self._check_running(background)
                    self._give_out(chunk, receipt)
            if outer is None and receipt is not None and not self._running:
                await self._handle_here(receipt)
        if outer is None and receipt is not None:
            if receipt.left:
                self._since_turn = 0
                await receipt.wait()
            receipt.check()
        if self._since_turn >= _EVENTS_A_TURN or not events:
            self._since_turn = 0
            await cancel_shielded_checkpoint()

    def register(self, handler: EventHandler, *event_types: str | type[DomainEvent]) -> None:
        if self._stopped is not None:
            raise RuntimeError("register handlers before run() is started")
        self._handlers.append(Handler(handler, event_types, self._ring.make_room, self._buffer))

    def subscribe(
        self,
        *event_types: str | type[DomainEvent],
        catch_up: EventStore | None = None,
        backpressure: bool = False,
    ) -> RingStream:
        """With `backpressure`, publishers wait where this receiver is `buffer` events behind."""
        if catch_up is not None and backpressure:
            raise ValueError("a receiver that is waited for has nothing to catch up with")
        return RingStream(self._ring, EventFilter(event_types), catch_up, backpressure)

    async def run(self, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        if self._stopped is not None:
            raise RuntimeError("this bus is running already")
        self._running = True
        self._stop, self._stopped = anyio.Event(), anyio.Event()
        done = False
        try:
            async with self._here:  # until those who began without it are done
                async with anyio.create_task_group() as tasks:
                    for handler in self._handlers:
                        tasks.start_soon(self._run, handler)
                    task_status.started()
                    await self._stop.wait()
            done = True
        except BaseExceptionGroup as group:
            raise only_error(group) from None
        finally:
            self._running = False
            if not done:
                for handler in self._handlers:
                    handler.give_up()
            self._stopped.set()
            self._stopped = None

    def stop(self) -> None:
        self._running = False
        self._stop.set()
        for handler in self._handlers:
            handler.wake()
        self._ring.make_room()  # who waits in the background looks again, and is refused

    async def wait_stopped(self) -> None:
        if self._stopped is None:
            await checkpoint()
        else:
            await self._stopped.wait()

    def statistics(self) -> InMemoryBusStatistics:
        """What it has done, and has to do."""
        queued = sum(len(handler.queue) for handler in self._handlers)
        streams, handlers = len(self._ring.streams), len(self._handlers)
        return InMemoryBusStatistics(self._published, streams, handlers, queued)

    def _has_room(self, count: int) -> bool:
        queues = all(len(one.queue) + count <= self._buffer for one in self._handlers)
        return queues and self._ring.has_room(count)

    def _give_out(self, events: Sequence[StoredEvent], receipt: Receipt | None) -> None:
        """Synchronous, so that all have the events in one order, and nobody a part of them."""
        new = [one for one in events if self._recent.add(one.event_id)]
        self._published += len(new)
        self._since_turn += len(new)
        self._ring.publish(new)
        for handler in self._handlers:
            handler.add(events, receipt)  # each has its own memory: it may have failed

    async def _run(self, handler: Handler) -> None:
        while handler.queue or self._running:
            if handler.queue:
                await handler.handle_next(self._policy)
            else:
                await handler.wait()

    async def _handle_here(self, receipt: Receipt) -> None:
        # A handler is not the publisher's, so the publisher's cancellation is none of its concern.
        with anyio.CancelScope(shield=True):
            async with self._here:
                while receipt.left:  # the queues are in order, so what is before it comes first
                    for handler in self._handlers:
                        if handler.queue:
                            await handler.handle_next(self._policy)

    def _check_running(self, background: bool) -> None:
        if background and not self._running:
            raise RuntimeError(
                "Nothing was published: in the background it is for run() to call the handlers, "
                "and nobody runs it.\n"
                "  Start it first: await tasks.start(bus.run)"
            )

    async def _open(self) -> None:
        await checkpoint()

    async def _close(self) -> None:
        self._ring.close()
        await cancel_shielded_checkpoint()
