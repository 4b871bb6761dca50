"""Having the shards of a version stand still, so that something can be done to all of them at once.

- What is written to a shard's document takes it from whoever runs it. It is taken anew, by whoever
  looks next, and stands still while its position is at `until`.
- Batches are committed all the time, and each changes a document. So a transaction over all shards
  is tried as it is, and where it meets batches again and again, they are held one by one first.
- What is held has to be let go, also by who fails or is cancelled. Who is killed cannot: then it
  stands still until the same is done again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import suppress

from attrs import evolve

from ..cleanup import shielded_cleanup
from ..errors import DocumentConflictError, EventSourceError
from ..stores.interface import EventStore
from .shards import Shard, ShardRepository

_logger = logging.getLogger("eventsource_anyio.projections")
OPTIMISTIC = 3  # how often a transaction over all shards is tried before they are held


class Held:
    """The shards of some versions, and letting them go."""

    def __init__(self, store: EventStore, repositories: Iterable[ShardRepository]) -> None:
        self._store = store
        self._repositories = list(repositories)
        self.holding = False

    async def stand_still(self) -> None:
        """Each shard stays where it is."""
        self.holding = True
        for repository in self._repositories:
            for key in [shard.key for shard in await repository.all()]:
                while not await self._hold(repository, key):
                    pass

    async def _hold(self, repository: ShardRepository, key: str) -> bool:
        for shard in await repository.all():
            if shard.key == key and shard.until != shard.position:
                with suppress(DocumentConflictError):
                    held = evolve(shard, until=shard.position, owner=None)
                    await repository.save(self._store.documents, held)
                    return True
                return False
        return True

    async def let_go(self) -> None:
        """They go on."""
        while not await self._let_go():
            pass
        self.holding = False

    async def _let_go(self) -> bool:
        held = [
            (repository, shard)
            for repository in self._repositories
            for shard in await repository.all()
            if shard.until is not None
        ]
        if not await self._may_go():
            return True
        return await free(self._store, held)

    async def _may_go(self) -> bool:
        return True

    async def clean_up(self) -> None:
        """Let them go if they are held, in a scope that is cancelled or after an error."""
        if self.holding:
            with shielded_cleanup():
                try:
                    await self.let_go()
                except EventSourceError as error:
                    names = ", ".join(one.collection for one in self._repositories)
                    _logger.error("%s: they stand still until this is done again: %s", names, error)


async def free(store: EventStore, shards: Iterable[tuple[ShardRepository, Shard]]) -> bool:
    """Have these go on, all or none; False: somebody has written one meanwhile."""
    try:
        async with store.transaction() as tx:
            for repository, shard in shards:
                await repository.save(tx.documents, evolve(shard, until=None, owner=None))
    except DocumentConflictError:
        return False
    return True
