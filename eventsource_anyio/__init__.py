"""Event sourcing that runs the same core on asyncio and Trio."""

from typing import TYPE_CHECKING

from .aggregates.decider import Decider, DeciderAggregate
from .aggregates.repository import AggregateRepository
from .aggregates.root import AggregateRoot, applies
from .bus.interface import EventBus
from .errors import (
    AggregateNotFoundError,
    CheckpointConflictError,
    ConcurrencyError,
    DuplicateEventError,
    EventDecodeError,
    EventDefinitionError,
    EventEncodeError,
    EventSourceError,
    StorageError,
    StoreClosedError,
)
from .events import DomainEvent, NewEvent, StoredEvent, caused_by, upcaster
from .ids import AggregateId
from .metadata import event_metadata
from .repositories.checkpoint import CheckpointRepository
from .repositories.outbox import OutboxMessage, OutboxRepository
from .stores.in_memory import InMemoryEventStore
from .stores.interface import (
    ANY,
    NO_STREAM,
    STREAM_EXISTS,
    AppendResult,
    EventStore,
    EventStream,
    ReadOptions,
    Subscription,
    Transaction,
)

if TYPE_CHECKING:
    from .bus.in_memory import InMemoryEventBus
    from .projections.base import Projection, handles
    from .projections.coordinator import ProjectionCoordinator
    from .stores.postgresql import PostgreSQLEventStore
    from .stores.sqlite import SQLiteEventStore
    from .sync import SyncRunner
else:
    from .importing import imported_later as _imported_later

    # A program that uses one store should not pay for the import of them all.
    __getattr__, __dir__ = _imported_later(
        globals(),
        {
            "InMemoryEventBus": ".bus.in_memory",
            "PostgreSQLEventStore": ".stores.postgresql",
            "Projection": ".projections.base",
            "ProjectionCoordinator": ".projections.coordinator",
            "SQLiteEventStore": ".stores.sqlite",
            "SyncRunner": ".sync",
            "handles": ".projections.base",
        },
    )

__all__ = [
    "ANY",
    "NO_STREAM",
    "STREAM_EXISTS",
    "AggregateId",
    "AggregateNotFoundError",
    "AggregateRepository",
    "AggregateRoot",
    "AppendResult",
    "CheckpointConflictError",
    "CheckpointRepository",
    "ConcurrencyError",
    "Decider",
    "DeciderAggregate",
    "DomainEvent",
    "DuplicateEventError",
    "EventBus",
    "EventDecodeError",
    "EventDefinitionError",
    "EventEncodeError",
    "EventSourceError",
    "EventStore",
    "EventStream",
    "InMemoryEventBus",
    "InMemoryEventStore",
    "NewEvent",
    "OutboxMessage",
    "OutboxRepository",
    "PostgreSQLEventStore",
    "Projection",
    "ProjectionCoordinator",
    "ReadOptions",
    "SQLiteEventStore",
    "StorageError",
    "StoreClosedError",
    "StoredEvent",
    "Subscription",
    "SyncRunner",
    "Transaction",
    "applies",
    "caused_by",
    "event_metadata",
    "handles",
    "upcaster",
]
