"""Where a projection stands: a document a shard, which is lease and checkpoint in one.

- The shards of a version of a projection are ranges of slices that cover all of them.
- A shard's document is written by its owner, in the transaction of each batch, and always where it
  has the revision that was written last. So the revision is the fencing token: whoever takes the
  shard over writes it, and then nothing of the old owner's can be committed any more, however late
  it wakes up.
- Ranges are split and joined only by who owns them, or where nobody does; each keeps its position.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import cast
from uuid import UUID

from attrs import evolve, frozen

from ..ids import SLICES
from ..repositories.document import Document, DocumentRepository
from ..stores.interface import EventStore, Transaction


@frozen
class Shard:
    """A range of slices, both ends included, and where the projection stands in it.

    `owner` is a coordinator's id. Up to `quiet` events are not reacted to, because somebody has.
    Beyond `until`, if it is given, nothing is handled for now.
    """

    first: int
    last: int
    position: int = 0
    owner: str | None = None
    quiet: int = 0
    until: int | None = None
    revision: UUID | None = None

    @property
    def key(self) -> str:
        return f"{self.first:04}"

    @property
    def slices(self) -> range:
        return range(self.first, self.last + 1)


def ranges(count: int) -> list[tuple[int, int]]:
    """That many ranges of slices, as equal as they can be."""
    starts = [number * SLICES // count for number in range(count + 1)]
    return [(start, end - 1) for start, end in pairwise(starts)]


class ShardRepository:
    """The shards of one version of a projection."""

    def __init__(self, store: EventStore, name: str, version: int) -> None:
        self._store = store
        self.collection = f"projections/{name}/{version}/shards"

    async def all(self) -> list[Shard]:
        """By their ranges."""
        return [
            _shard(one) for one in await self._store.documents.list(self.collection, limit=SLICES)
        ]

    async def create(self, count: int, *, after: int = 0) -> None:
        """To begin behind a position; `DocumentConflictError` if somebody else has."""
        async with self._store.transaction() as tx:
            for first, last in ranges(count):
                await self.add(tx.documents, Shard(first, last, after))

    async def add(self, documents: DocumentRepository, shard: Shard) -> None:
        await documents.add(self.collection, shard.key, _value(shard))

    async def save(self, documents: DocumentRepository, shard: Shard) -> Shard:
        """It as it is after this; `DocumentConflictError` if it was written by somebody else."""
        revision = await documents.save(
            self.collection, shard.key, _value(shard), expected=shard.revision
        )
        return evolve(shard, revision=revision)

    async def remove(self, documents: DocumentRepository, shard: Shard) -> None:
        await documents.delete(self.collection, shard.key, expected=shard.revision)

    async def save_all(self, tx: Transaction, shards: Iterable[Shard]) -> None:
        for shard in shards:
            await self.save(tx.documents, shard)

    async def arrange(self, free: Sequence[Shard], count: int) -> bool:
        """Make the free ones fit that many ranges, as far as they can; whether anything changed."""
        changed = False
        for first, last in ranges(count):
            inside = [shard for shard in free if first <= shard.first and shard.last <= last]
            if len(inside) > 1 and _joinable(inside):
                await self._replace(inside, [evolve(inside[0], last=inside[-1].last, owner=None)])
                changed = True
        for shard in free:
            parts = [
                evolve(shard, first=max(first, shard.first), last=min(last, shard.last), owner=None)
                for first, last in ranges(count)
                if first <= shard.last and last >= shard.first
            ]
            if len(parts) > 1:
                await self._replace([shard], parts)
                changed = True
        return changed

    async def _replace(self, old: Sequence[Shard], new: Sequence[Shard]) -> None:
        async with self._store.transaction() as tx:
            for shard in old:
                await self.remove(tx.documents, shard)
            for shard in new:
                await self.add(tx.documents, shard)


def _joinable(shards: Sequence[Shard]) -> bool:
    """Whether they are one range, and stand at one position."""
    adjacent = all(a.last + 1 == b.first for a, b in pairwise(shards))
    stand = {(one.position, max(one.quiet, one.position), one.until) for one in shards}
    return adjacent and len(stand) == 1


def _value(shard: Shard) -> dict[str, object]:
    return {
        "first": shard.first,
        "last": shard.last,
        "position": shard.position,
        "owner": shard.owner,
        "quiet": shard.quiet,
        "until": shard.until,
    }


def _shard(document: Document) -> Shard:
    value = cast("dict[str, int]", document.value)
    return Shard(
        value["first"],
        value["last"],
        value["position"],
        cast("str | None", value["owner"]),
        value["quiet"],
        value["until"],
        document.revision,
    )
