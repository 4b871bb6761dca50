"""The events that the contract suites append."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar
from uuid import UUID

import attrs

from ..events import DomainEvent, StoredEvent
from ..stores.interface import ANY, EventStore


@attrs.frozen
class Happened(DomainEvent):
    event_type: ClassVar[str] = "eventsource_anyio.testing.Happened"

    number: int = 0
    note: str = ""


@attrs.frozen
class Ended(DomainEvent):
    event_type: ClassVar[str] = "eventsource_anyio.testing.Ended"


def numbers(events: Iterable[StoredEvent]) -> list[int]:
    return [stored.event.number for stored in events if isinstance(stored.event, Happened)]


async def append_numbers(
    store: EventStore, count: int, aggregate_id: UUID | str = "a", aggregate_type: str = "Thing"
) -> None:
    """Append `Happened(0)` to `Happened(count - 1)` in one append."""
    await store.append_events(
        aggregate_id, aggregate_type, [Happened(number) for number in range(count)], ANY
    )
