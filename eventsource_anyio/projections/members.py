"""Which coordinators are alive, by what each of them sees with its own clock.

- Each has a document, and gives it a new revision again and again. One whose revision has not
  changed for `lease` seconds, by the clock of whoever looks, is dead; no clocks are compared.
- Whoever finds one dead deletes its document first, if it still has that revision. So one that was
  only slow finds out by its next beat.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import cast
from uuid import UUID, uuid4

import anyio

from ..errors import DocumentConflictError
from ..repositories.document import Document
from ..stores.interface import EventStore

COLLECTION = "projections/coordinators"
_PAGE = 1000


class Members:
    """The coordinators of a store, and this one among them."""

    def __init__(self, store: EventStore, lease: float) -> None:
        self._store = store
        self._lease = lease
        self._seen: dict[str, tuple[UUID, float]] = {}
        self._joined = False
        self.me = str(uuid4())

    async def look(self, projections: Collection[str]) -> Mapping[str, Collection[str]]:
        """Say that this one is alive and what it runs; the projections of each that is alive.

        A coordinator that was taken for dead has another id from now on.
        """
        value = {"projections": sorted(projections)}
        documents = self._store.documents
        own = await documents.get(COLLECTION, self.me) if self._joined else None
        if own is not None:
            try:
                await documents.save(COLLECTION, self.me, value, expected=own.revision)
            except DocumentConflictError:
                own = None
        if own is None:
            self.me = str(uuid4())
            self._joined = True
            await documents.add(COLLECTION, self.me, value)
        found = await self._all()
        keys = {one.key for one in found}
        self._seen = {key: seen for key, seen in self._seen.items() if key in keys}
        return {
            one.key: cast("dict[str, list[str]]", one.value)["projections"]
            for one in found
            if one.key == self.me or await self._alive(one)
        }

    async def any_runs(self, projection: str) -> bool:
        """Whether one that is alive runs it; seen often enough for a lease, or it counts as alive.

        This one need not have joined.
        """
        for one in await self._all():
            runs = cast("dict[str, list[str]]", one.value)["projections"]
            if projection in runs and await self._alive(one):
                return True
        return False

    async def leave(self) -> None:
        if self._joined:
            await self._store.documents.delete(COLLECTION, self.me)

    async def _all(self) -> list[Document]:
        found: list[Document] = []
        after = ""
        while True:
            page = await self._store.documents.list(COLLECTION, after=after, limit=_PAGE)
            found += page
            if len(page) < _PAGE:
                return found
            after = page[-1].key

    async def _alive(self, document: Document) -> bool:
        now = anyio.current_time()
        revision, since = self._seen.get(document.key, (None, now))
        if revision != document.revision:
            self._seen[document.key] = (document.revision, now)
            return True
        if now - since < self._lease:
            return True
        del self._seen[document.key]
        try:
            await self._store.documents.delete(COLLECTION, document.key, expected=document.revision)
        except DocumentConflictError:
            return True
        return False
