"""Which version of each projection serves, and which were dropped: a document a name.

Whoever changes which version serves also writes the shards of both, in the same transaction. So
who reads a shard first and this after it, and then takes the shard, knows whether it serves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast
from uuid import UUID

from attrs import frozen

from ..repositories.document import DocumentRepository
from ..stores.interface import EventStore

COLLECTION = "projections/serving"


@frozen
class Serving:
    name: str
    version: int
    dropped: tuple[int, ...] = ()
    revision: UUID | None = None


class ServingRepository:
    def __init__(self, store: EventStore) -> None:
        self._store = store

    async def get(self, name: str) -> Serving | None:
        """None as long as no version of this name was ever run."""
        document = await self._store.documents.get(COLLECTION, name)
        if document is None:
            return None
        value = cast("Mapping[str, int | list[int]]", document.value)
        dropped = cast("list[int]", value.get("dropped", []))
        return Serving(name, cast("int", value["version"]), tuple(dropped), document.revision)

    async def get_or_add(self, name: str, oldest: int) -> Serving:
        """That the oldest version serves, unless one does; `DocumentConflictError` if somebody
        else finds the same at the same time."""
        found = await self.get(name)
        if found is None:
            revision = await self._store.documents.add(COLLECTION, name, {"version": oldest})
            found = Serving(name, oldest, (), revision)
        return found

    async def save(self, documents: DocumentRepository, serving: Serving) -> None:
        """`DocumentConflictError` if somebody else has changed it."""
        value: dict[str, object] = {"version": serving.version}
        if serving.dropped:
            value["dropped"] = sorted(serving.dropped)
        await documents.save(COLLECTION, serving.name, value, expected=serving.revision)
