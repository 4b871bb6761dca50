"""What can be done to parked streams: have them handled after all, or forget them.

See `parked` for why nothing is lost or handled twice while the projection goes on.
"""

from __future__ import annotations

import logging
from contextlib import suppress

from attrs import evolve

from ..errors import DocumentConflictError, StorageError
from ..events import StoredEvent
from ..ids import slice_of
from ..stores.interface import EventStore, ReadOptions, Transaction
from .base import Projection, reacts
from .parked import ParkedRepository, ParkedStream, error_text
from .serving import ServingRepository
from .shards import ShardRepository

_logger = logging.getLogger("eventsource_anyio.projections")


class Retrying:
    """The parked streams of one version of a projection."""

    def __init__(self, store: EventStore, projection: Projection[Transaction]) -> None:
        name, version = projection.name, projection.version
        self._store = store
        self._projection = projection
        self._parked = ParkedRepository(store, name, version)
        self._shards = ShardRepository(store, name, version)
        self._serving = ServingRepository(store)
        self._reacts = reacts(projection)

    async def retry(self, stream_id: str) -> int:
        """Handle what is parked of a stream, in order; how many events that were."""
        handled = 0
        while (parked := await self._parked.get(stream_id)) is not None:
            try:
                async for event in self._store.read_stream(stream_id, self._options(parked)):
                    left = await self._handle(parked, event)
                    handled += 1
                    if left is None:
                        return handled
                    parked = left
                await self._parked.remove(self._store.documents, parked)
            except Exception as error:
                # It may be due to somebody else, who has changed what is parked: they were faster.
                if await self._parked.get(stream_id) == parked:
                    await self._failed(parked, error)
                    raise
        return handled

    async def _handle(self, parked: ParkedStream, event: StoredEvent) -> ParkedStream | None:
        """What is parked after this event."""
        react = self._reacts and await self._is_to_react(event)
        left = None
        if event.version < parked.last:
            left = evolve(parked, first=event.version + 1, events=max(parked.events - 1, 1))
        async with self._store.transaction() as tx:
            await self._projection.handle_batch([event], tx)
            if react:
                await self._projection.react(event, tx)
            if left is None:
                await self._parked.remove(tx.documents, parked)
            else:
                left = await self._parked.save(tx.documents, left)
        return left

    async def _is_to_react(self, event: StoredEvent) -> bool:
        # In this order: a version that has come to serve meanwhile has been given its `quiet` too.
        serving = await self._serving.get(self._projection.name)
        if serving is None or serving.version != self._projection.version:
            return False
        return any(
            slice_of(event.stream_id) in shard.slices and event.position > shard.quiet
            for shard in await self._shards.all()
        )

    async def _failed(self, parked: ParkedStream, error: Exception) -> None:
        with suppress(DocumentConflictError, StorageError):
            again = evolve(parked, error=error_text(error))
            await self._parked.save(self._store.documents, again)

    def _options(self, parked: ParkedStream) -> ReadOptions:
        filters = self._projection.filters()
        return ReadOptions(
            from_version=parked.first,
            to_version=parked.last,
            event_types=filters.event_types,
            batch_size=filters.batch_size,
        )

    async def discard(self, stream_id: str) -> int:
        """Forget what is parked of a stream; how many events that were."""
        while (parked := await self._parked.get(stream_id)) is not None:
            with suppress(DocumentConflictError):
                await self._parked.remove(self._store.documents, parked)
                _logger.warning(
                    "%s, version %d: discarded %d events of %s, versions %d to %d, set aside after "
                    "%s",
                    *(self._projection.name, self._projection.version, parked.events, stream_id),
                    *(parked.first, parked.last, parked.error),
                )
                return parked.events
        return 0
