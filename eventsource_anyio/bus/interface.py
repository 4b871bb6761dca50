"""The event bus: what every bus promises to those who publish and those who listen.

The store is the truth, and a bus is how others hear of what is in it: fast, bounded, and not to be
relied upon for what must never be missed. That is what `EventStore.subscribe`, projections and
relays are for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Self, TypeAlias

from anyio import TASK_STATUS_IGNORED
from anyio.abc import ObjectReceiveStream, TaskStatus

from ..events import DomainEvent, StoredEvent
from ..stores.interface import EventStore

EventHandler: TypeAlias = Callable[[StoredEvent], Awaitable[object]]
FailurePolicy: TypeAlias = Callable[[StoredEvent, Exception], Awaitable[object]]


class EventBus(ABC):
    """Live fan-out of stored events to handlers, called by the bus, and to receive streams.

    An async context manager, open inside its block. Events of one stream arrive in the order in
    which they were published. An event that is published again (it has the same id) is dropped, as
    far as the bus remembers, but for a handler that has failed at it.
    """

    async def __aenter__(self) -> Self:
        await self._open()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._close()

    @abstractmethod
    async def publish(self, events: Sequence[StoredEvent], background: bool = False) -> None:
        """Give events to everybody who listens now.

        In one process: return when every handler has them handled, or, with `background`, queued;
        that needs a running `run()`. Through a broker: return when the broker has them stored, or,
        with `background`, when they are queued for `run()` to send.

        A cancelled publisher cancels no handler.

        Raises:
            PublishError: handlers have failed, after all of them were called. Not with
                `background`, nor where the bus was given a policy for failures.
            StorageError: the broker failed.
            RuntimeError: with `background`, nobody runs `run()`.
        """

    @abstractmethod
    def register(self, handler: EventHandler, *event_types: str | type[DomainEvent]) -> None:
        """Have a handler called with each event of these types, one after another.

        Through a broker, that is the events of each stream.
        A class stands for its subclasses too; no types means all events. Different handlers run
        concurrently while `run()` does. Handlers are registered before it is started.
        """

    @abstractmethod
    def subscribe(
        self, *event_types: str | type[DomainEvent], catch_up: EventStore | None = None
    ) -> AbstractAsyncContextManager[ObjectReceiveStream[StoredEvent], None]:
        """A bounded stream of the events that are published from now on; types as in `register`.

        A receiver that is too slow for it never holds up a publisher. With `catch_up`, it is given
        what it has missed by reading this store; else it is told once, by `FellBehindError`, and
        goes on with what comes then. A cancelled `receive` has consumed nothing. The stream ends
        when the bus is closed.
        """

    @abstractmethod
    async def run(self, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        """Call the handlers and send what is queued, until `stop()`; a task of the caller's.

        Once it has said that it is started, nothing that is published later is missed by a handler.
        """

    @abstractmethod
    def stop(self) -> None:
        """Have `run` finish what is queued, and return."""

    @abstractmethod
    async def wait_stopped(self) -> None:
        """Return when `run` has returned, at once if it is not running."""

    @abstractmethod
    async def _open(self) -> None:
        """Connect. `StorageError` says what is wrong with the broker."""

    @abstractmethod
    async def _close(self) -> None:
        """Let go of everything, shielded from cancellation; receive streams end."""
