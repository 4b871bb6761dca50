"""Handlers of one process: each with its queue, called with one event after another.

- A delivery is an event for one handler, with the publisher's context variables, which the handler
  sees. It is done when the handler has returned, failed, or can no longer be called.
- A publisher waits for its receipt: all of its deliveries, and those of what handlers have
  published while they had them. So a handler that publishes never waits for itself, and all that
  fails because of an event reaches whoever published it.
- A handler drops what it has had already, unless it has failed at it.
- Queues are bounded. Publishers wait for room; handlers that publish cannot, since room may be made
  only by themselves, so they are refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextvars import Context, ContextVar, copy_context
from types import coroutine
from typing import TypeVar, cast

import anyio

from ..errors import PublishError
from ..events import DomainEvent, StoredEvent
from .filtering import EventFilter
from .interface import EventHandler, FailurePolicy
from .recent import RecentIds

T = TypeVar("T")


class Receipt:
    """What a publisher waits for."""

    __slots__ = ("_done", "errors", "left")

    def __init__(self) -> None:
        self.left = 0
        self.errors: list[Exception] = []
        self._done: anyio.Event | None = None

    def one_less(self) -> None:
        self.left -= 1
        if not self.left and self._done is not None:
            self._done.set()

    async def wait(self) -> None:
        if self.left:
            self._done = anyio.Event()
            await self._done.wait()

    def check(self) -> None:
        """`PublishError` if anything has failed."""
        if self.errors:
            raise PublishError(self.errors) from self.errors[0]


class Delivery:
    """An event for one handler; without a receipt nobody waits for it."""

    __slots__ = ("active", "context", "receipt", "stored")

    def __init__(self, stored: StoredEvent, context: Context, receipt: Receipt | None) -> None:
        self.stored = stored
        self.context = context
        self.receipt = receipt
        self.active = False


_current: ContextVar[Delivery | None] = ContextVar("eventsource_anyio_delivery", default=None)


def current_delivery() -> Delivery | None:
    """The one whose handler this runs in, if it has not returned yet."""
    delivery = _current.get()
    return delivery if delivery is not None and delivery.active else None


class Handler:
    """A handler and its queue."""

    __slots__ = ("_call", "_filter", "_had", "_made_room", "_wake", "name", "queue")

    def __init__(
        self,
        call: EventHandler,
        event_types: tuple[str | type[DomainEvent], ...],
        made_room: Callable[[], None],
        remembered: int,
    ) -> None:
        if not callable(call):
            raise TypeError(f"a handler is an async function of a stored event, not {call!r}")
        self.name: str = getattr(call, "__qualname__", repr(call))
        self.queue: deque[Delivery] = deque()
        self._call = call
        self._made_room = made_room
        self._had = RecentIds(remembered)
        self._filter = EventFilter(event_types)
        self._wake: anyio.Event | None = None

    def add(self, events: Sequence[StoredEvent], receipt: Receipt | None) -> None:
        wants, is_new = self._filter.wants, self._had.add
        wanted = [stored for stored in events if wants(stored) and is_new(stored.event_id)]
        if wanted:
            if receipt is not None:
                receipt.left += len(wanted)
            self.queue.extend(Delivery(stored, copy_context(), receipt) for stored in wanted)
            self.wake()

    def wake(self) -> None:
        if self._wake is not None:
            self._wake.set()
            self._wake = None

    async def wait(self) -> None:
        """Until it is woken."""
        self._wake = anyio.Event()
        await self._wake.wait()

    async def handle_next(self, policy: FailurePolicy | None) -> None:
        """Call it with the first of its queue; `PublishError` if it fails and nobody else is told.

        What cuts it off fails the delivery too.
        """
        delivery = self.queue.popleft()
        self._made_room()
        delivery.active = True
        delivery.context.run(_current.set, delivery)
        receipt, error = delivery.receipt, None
        try:
            await _in_context(delivery.context, self._handle(delivery.stored))
        except Exception as raised:  # noqa: BLE001 - the publisher, or the policy, is told
            error = raised
            self._had.forget(delivery.stored.event_id)
            error.add_note(f"in handler {self.name} of {_told(delivery.stored)}")
        except BaseException:
            self._cut_off(delivery)
            raise
        finally:
            delivery.active = False
        try:
            if error is not None and policy is not None:
                try:
                    await policy(delivery.stored, error)
                    error = None
                except Exception as raised:  # noqa: BLE001 - likewise
                    error = raised
            if error is not None and receipt is None:
                raise PublishError([error]) from error
            if error is not None and receipt is not None:
                receipt.errors.append(error)
        finally:
            if receipt is not None:
                receipt.one_less()

    def give_up(self) -> None:
        """Nobody will call it: those who wait are told."""
        while self.queue:
            self._cut_off(self.queue.popleft())

    def _cut_off(self, delivery: Delivery) -> None:
        self._had.forget(delivery.stored.event_id)
        if delivery.receipt is not None:
            error = RuntimeError("run() was cut off before the handler had returned")
            error.add_note(f"in handler {self.name} of {_told(delivery.stored)}")
            delivery.receipt.errors.append(error)
            delivery.receipt.one_less()

    async def _handle(self, stored: StoredEvent) -> None:
        await self._call(stored)


def _told(stored: StoredEvent) -> str:
    return f"{stored.event_type}, {stored.stream_id}, version {stored.version}"


@coroutine
def _in_context(
    context: Context, work: Coroutine[object, object, T]
) -> Generator[object, object, T]:
    """Await a coroutine whose steps see these context variables, in the task that awaits it."""
    value: object = None
    error: BaseException | None = None
    while True:
        try:
            if error is None:
                wanted = context.run(work.send, value)
            else:
                wanted = context.run(work.throw, error)
        except StopIteration as stop:
            return cast("T", stop.value)
        finally:
            error = None
        try:
            value = yield wanted
        except BaseException as raised:  # noqa: BLE001 - it belongs to the coroutine
            error = raised
