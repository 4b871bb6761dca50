"""Projections that are updated in the transaction of the append, by whoever appends.

The stores know nothing of them: they are called by `Transaction.on_append`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Never, cast

import attrs

from ..events import StoredEvent
from ..stores.interface import EventStore, Transaction
from .base import Projection, check_projection
from .serving import ServingRepository


class Inline:
    """Projections whose read models change with the events, in one transaction.

    Given to an `AggregateRepository(…, inline=…)`, or to `tx.on_append(…)` of any transaction; so
    whatever appends events that they want has to be given it. A reader who sees an event sees what
    follows from it. If a projection fails, its error comes out of the append, and nothing was
    stored; so none is tried again, set aside or run in shards.

    It takes its time from the appends: see `Transaction.on_append` for who waits. SQL that adds to
    a row is right however many append at once; a document is, if only one stream changes it, as
    with a `SingleStreamView`, or if it is saved where it has the revision that was read
    (`DocumentConflictError`: append again). Do not give the same projections to a coordinator.
    """

    def __init__(self, *projections: Projection[Never]) -> None:
        given = [cast("Projection[Transaction]", one) for one in projections]
        if not given:
            raise ValueError("there is no projection to run inline")
        for projection in given:
            check_projection(projection)
        self._wanted = [(one, one.filters()) for one in given]

    async def __call__(self, events: Sequence[StoredEvent], tx: Transaction) -> None:
        """Handle what has just been appended, each projection what it wants of it."""
        for projection, wanted in self._wanted:
            chosen = [
                event
                for event in events
                if (not wanted.event_types or event.event_type in wanted.event_types)
                and (not wanted.aggregate_types or event.aggregate_type in wanted.aggregate_types)
            ]
            if chosen:
                await projection.handle_batch(chosen, tx)
                for event in chosen:
                    await projection.react(event, tx)

    async def rebuild(self, store: EventStore) -> None:
        """Empty the read models and make them of all events, in many transactions.

        For a projection that is new, or has a new `version`, which serves from then on. **Stop
        whatever appends its events meanwhile**: what is appended would be handled before, or not
        at all. `react` is not called. If it is interrupted, do it again.

        Raises:
            RuntimeError: there were such appends all the same; do it again.
        """
        for projection, _ in self._wanted:
            await _rebuild(store, projection)


async def _rebuild(store: EventStore, projection: Projection[Transaction]) -> None:
    wanted = projection.filters()
    until = await store.last_position()
    async with store.transaction() as tx:
        await projection.reset(tx)
    batch: list[StoredEvent] = []
    if until:
        async for event in store.read_all(attrs.evolve(wanted, to_position=until)):
            batch.append(event)
            if len(batch) == projection.batch_size:
                await _handle(store, projection, batch)
                batch = []
        await _handle(store, projection, batch)
    later = attrs.evolve(wanted, from_position=until + 1, limit=1)
    async for event in store.read_all(later):
        raise RuntimeError(
            f"{event.event_type} was appended to {event.stream_id} while projection "
            f"{projection.name!r} was being rebuilt.\n"
            "  What was appended meanwhile may have been handled too early, or not at all.\n"
            "  Stop what appends, and rebuild it again."
        )
    versions = ServingRepository(store)
    serving = await versions.get_or_add(projection.name, projection.version)
    if serving.version != projection.version:
        async with store.transaction() as tx:
            await projection.take_over(tx)
            now = attrs.evolve(serving, version=projection.version)
            await versions.save(tx.documents, now)


async def _handle(
    store: EventStore, projection: Projection[Transaction], batch: Sequence[StoredEvent]
) -> None:
    if batch:
        async with store.transaction() as tx:
            await projection.handle_batch(batch, tx)
