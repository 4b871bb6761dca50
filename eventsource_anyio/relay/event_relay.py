"""Events out of the store, to a bus or anything else: a projection whose read model is elsewhere.

- It has no table: where it stands is its checkpoint, and what it has yet to deliver are the events
  behind it. So no event can be missing from it, whoever has appended it, and how.
- A batch is delivered in the block of the transaction that moves the checkpoint, but as it writes
  nothing by that transaction, nothing of it is begun before the block ends: a slow delivery holds
  no lock and no connection.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, TypeAlias

from anyio.lowlevel import checkpoint

from ..bus.interface import EventBus
from ..errors import StorageError
from ..events import DomainEvent, StoredEvent
from ..projections import Projection
from ..stores.interface import Transaction

DeliverEvents: TypeAlias = Callable[[Sequence[StoredEvent]], Awaitable[object]]

OUTAGES: tuple[type[Exception], ...] = (OSError, StorageError)


class EventRelay(Projection[Transaction]):
    """Delivers events **at least once**, and those of a stream in order. A projection: give it to a
    `ProjectionCoordinator`, which shares the work among processes and takes over from dead ones.

    `deliver` is a bus, or is awaited with some events, in order, and returns once they are where
    they are to be. An event comes again after a failure or a crash, so the receiver knows it by its
    `event_id`. Then later events of its stream may come again too, and those that came before.

    An error of `outages` says that the receiver is away: the same events are delivered again until
    it is back. (`ConnectionError` and `TimeoutError` are `OSError`s.) Any other error is the
    event's: after `attempts` it is set aside, with the later ones of its stream, and other streams
    go on; see `ProjectionCoordinator.parked`. With `on_failure="stop"` the relay stops instead.

    A new one begins with the first event that is stored, or as `Projection.after` has it.
    `ProjectionCoordinator.rebuild` has everything delivered again, which refills a bus that has
    lost its data.
    """

    def __init__(
        self,
        deliver: EventBus | DeliverEvents,
        *,
        name: str,
        event_types: Sequence[str | type[DomainEvent]] = (),
        aggregate_types: Sequence[str] = (),
        after: int | Literal["now"] = 0,
        shards: int = 1,
        batch_size: int = 500,
        attempts: int = 5,
        retry_after: float = 0.1,
        on_failure: Literal["stop", "park"] = "park",
        outages: tuple[type[Exception], ...] = OUTAGES,
    ) -> None:
        self._deliver = deliver_by(deliver)
        self._outages = outages
        self.name = name
        self.event_types = event_types
        self.aggregate_types = aggregate_types
        self.after = after
        self.shards = shards
        self.batch_size = batch_size
        self.attempts = attempts
        self.retry_after = retry_after
        self.on_failure = on_failure

    async def handle_batch(self, events: Sequence[StoredEvent], tx: Transaction) -> None:
        """Deliver them."""
        await self._deliver(events)

    def is_outage(self, error: Exception) -> bool:
        return isinstance(error, self._outages)

    async def reset(self, tx: Transaction) -> None:
        """There is nothing to empty: what was delivered cannot be taken back."""
        await checkpoint()


def deliver_by(target: EventBus | DeliverEvents) -> DeliverEvents:
    if isinstance(target, EventBus):
        return target.publish
    if not callable(target):
        raise TypeError(
            f"events are delivered by an EventBus or an async function, not by {target!r}"
        )
    return target
