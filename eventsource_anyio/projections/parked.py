"""Streams that are set aside: the dead letters of a projection.

The event that failed stays in the store, and so do the later ones of its stream, which wait behind
it. What is kept here is which: a document a stream, with the first and the last version that wait.

- A batch that meets an event of a parked stream moves the document's `last`, where it has the
  revision that was known; a retry deletes it likewise. So either the batch finds the stream parked,
  and the retry finds the event, or the other way round: no event is lost or handled twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import cast
from uuid import UUID

from attrs import evolve, frozen

from ..errors import EventDecodeError
from ..events import StoredEvent
from ..ids import slice_of
from ..repositories.document import Document, DocumentRepository
from ..stores.interface import EventStore

_PAGE = 1000


@frozen
class ParkedStream:
    """Events of one stream that were set aside: those of versions `first` to `last`, which the
    projection wants, `events` of them. `error` is what the first one failed with last."""

    stream_id: str
    first: int
    last: int
    events: int
    error: str
    since: datetime
    revision: UUID | None = None

    def extended(self, event: StoredEvent | EventDecodeError) -> ParkedStream:
        """With one more event behind."""
        return evolve(self, last=event.version, events=self.events + 1)


def parked_at(event: StoredEvent | EventDecodeError, error: BaseException) -> ParkedStream:
    return ParkedStream(
        event.stream_id, event.version, event.version, 1, error_text(error), datetime.now(UTC)
    )


def error_text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".replace("\0", "")[:2000]


class ParkedRepository:
    """The parked streams of one version of a projection."""

    def __init__(self, store: EventStore, name: str, version: int) -> None:
        self._store = store
        self.collection = f"projections/{name}/{version}/parked"

    async def all(self) -> list[ParkedStream]:
        """By their stream ids."""
        found: list[ParkedStream] = []
        after = ""
        while True:
            page = await self._store.documents.list(self.collection, after=after, limit=_PAGE)
            found += [_parked(one) for one in page]
            if len(page) < _PAGE:
                return found
            after = page[-1].key

    async def of(self, slices: range) -> dict[str, ParkedStream]:
        return {one.stream_id: one for one in await self.all() if slice_of(one.stream_id) in slices}

    async def get(self, stream_id: str) -> ParkedStream | None:
        document = await self._store.documents.get(self.collection, stream_id)
        return None if document is None else _parked(document)

    async def save(self, documents: DocumentRepository, parked: ParkedStream) -> ParkedStream:
        """It as it is after this; `DocumentConflictError` if somebody else has changed it."""
        value: Mapping[str, object] = {
            "first": parked.first,
            "last": parked.last,
            "events": parked.events,
            "error": parked.error,
            "since": parked.since.isoformat(),
        }
        if parked.revision is None:
            revision = await documents.add(self.collection, parked.stream_id, value)
        else:
            revision = await documents.save(
                self.collection, parked.stream_id, value, expected=parked.revision
            )
        return evolve(parked, revision=revision)

    async def remove(self, documents: DocumentRepository, parked: ParkedStream) -> None:
        await documents.delete(self.collection, parked.stream_id, expected=parked.revision)


def _parked(document: Document) -> ParkedStream:
    value = cast("dict[str, object]", document.value)
    return ParkedStream(
        document.key,
        cast("int", value["first"]),
        cast("int", value["last"]),
        cast("int", value["events"]),
        cast("str", value["error"]),
        datetime.fromisoformat(cast("str", value["since"])),
        document.revision,
    )
