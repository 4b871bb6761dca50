"""Messages that are set aside: the dead letters of the outbox.

They are taken out of the outbox, so that they are in nobody's way, and kept in documents: one for
each key that has any, and one for each of its messages.

- Whoever sets aside or takes out a message writes the document of its key too, where it has the
  revision that was known. So of the relay, which sets more of a key aside, and somebody who has
  them delivered, one finds out about the other: none is lost, and none is overtaken.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from hashlib import blake2b
from typing import cast
from uuid import UUID

from attrs import evolve, frozen

from ..errors import DocumentConflictError
from ..metadata import encode_metadata
from ..projections.parked import error_text
from ..repositories.document import Document, DocumentRepository
from ..repositories.outbox import decode_message
from ..stores.interface import EventStore, StoredMessage, Transaction

KEYS = "relays/outbox/parked keys"
MESSAGES = "relays/outbox/parked messages"
_PAGE = 1000


def key_id(stored: StoredMessage) -> str:
    """Under what it waits for others: its topic and key; by itself, if it has no key."""
    message = stored.message
    own = message.key or message.message_id.bytes
    text = f"{len(message.topic)}:{message.topic}".encode()
    text += b"=" + own.encode() if isinstance(own, str) else b"#" + own
    return blake2b(text, digest_size=16).hexdigest()


@frozen
class ParkedKey:
    """Messages of one key of a topic that were set aside, `messages` of them; one without a key
    stands for itself. `error` is what the first of them failed with last."""

    topic: str
    key: str
    messages: int
    error: str
    since: datetime
    id: str
    revision: UUID | None = None


def parked_at(stored: StoredMessage, error: BaseException) -> ParkedKey:
    message = stored.message
    text, now = error_text(error), datetime.now(UTC)
    return ParkedKey(message.topic, message.key, 0, text, now, key_id(stored))


@frozen
class ParkedMessage:
    message: StoredMessage
    document: str
    revision: UUID


class ParkedMessages:
    """Those of the outbox of a store."""

    def __init__(self, store: EventStore) -> None:
        self._store = store

    async def keys(self) -> list[ParkedKey]:
        """The longest parked first."""
        found: list[ParkedKey] = []
        after = ""
        while True:
            page = await self._store.documents.list(KEYS, after=after, limit=_PAGE)
            found += map(_parked, page)
            if len(page) < _PAGE:
                return sorted(found, key=lambda one: (one.since, one.id))
            after = page[-1].key

    async def get(self, parked_id: str) -> ParkedKey | None:
        document = await self._store.documents.get(KEYS, parked_id)
        return None if document is None else _parked(document)

    async def messages(self, parked: ParkedKey, limit: int) -> list[ParkedMessage]:
        """The first of its messages, in order."""
        prefix = f"{parked.id}/"
        page = await self._store.documents.list(MESSAGES, after=prefix, limit=limit)
        return [_message(one) for one in page if one.key.startswith(prefix)]

    async def set_aside(
        self, tx: Transaction, parked: ParkedKey, messages: Sequence[StoredMessage]
    ) -> ParkedKey:
        """With these behind what is there; it as it is after this."""
        for one in messages:
            await tx.documents.add(MESSAGES, f"{parked.id}/{one.position:019}", _value(one))
        await tx.outbox.delivered([one.message.message_id for one in messages])
        return await self.save(
            tx.documents, evolve(parked, messages=parked.messages + len(messages))
        )

    async def save(self, documents: DocumentRepository, parked: ParkedKey) -> ParkedKey:
        """`DocumentConflictError` if somebody else has changed it."""
        value = {
            "topic": parked.topic,
            "key": parked.key,
            "messages": parked.messages,
            "error": parked.error,
            "since": parked.since.isoformat(),
        }
        if parked.revision is None:
            revision = await documents.add(KEYS, parked.id, value)
        else:
            revision = await documents.save(KEYS, parked.id, value, expected=parked.revision)
        return evolve(parked, revision=revision)

    async def failed(self, parked: ParkedKey, error: Exception) -> None:
        """Keep what the first of its messages has failed with now."""
        known = await self.get(parked.id)
        if known is not None:
            with suppress(DocumentConflictError):
                await self.save(self._store.documents, evolve(known, error=error_text(error)))

    async def remove(self, parked: ParkedKey) -> None:
        """It has no messages; unless somebody has set one aside meanwhile."""
        with suppress(DocumentConflictError):
            await self._store.documents.delete(KEYS, parked.id, expected=parked.revision)

    async def take_out(self, parked: ParkedKey, messages: Sequence[ParkedMessage]) -> bool:
        """Forget some of its messages; False if somebody else has forgotten any of them."""
        while (known := await self.get(parked.id)) is not None:
            try:
                async with self._store.transaction() as tx:
                    for one in messages:
                        await tx.documents.delete(MESSAGES, one.document, expected=one.revision)
                    left = known.messages - len(messages)
                    if left > 0:
                        await self.save(tx.documents, evolve(known, messages=left))
                    else:
                        await tx.documents.delete(KEYS, known.id, expected=known.revision)
                return True
            except DocumentConflictError as error:
                if error.collection == MESSAGES:
                    return False
        return False


def _value(stored: StoredMessage) -> dict[str, object]:
    message = stored.message
    return {
        "topic": message.topic,
        "key": message.key,
        "message_id": str(message.message_id),
        "payload": b64encode(message.payload).decode(),
        "metadata": encode_metadata(message.metadata),  # as text: JSON may hold what this cannot
        "position": stored.position,
        "recorded_at": stored.recorded_at.isoformat(),
    }


def _message(document: Document) -> ParkedMessage:
    value = cast("dict[str, str]", document.value)
    message = decode_message(
        UUID(value["message_id"]),
        value["topic"],
        value["key"],
        b64decode(value["payload"]),
        value["metadata"],
        cast("int", cast("object", value["position"])),
        datetime.fromisoformat(value["recorded_at"]),
    )
    return ParkedMessage(message, document.key, document.revision)


def _parked(document: Document) -> ParkedKey:
    value = cast("dict[str, str]", document.value)
    return ParkedKey(
        value["topic"],
        value["key"],
        cast("int", cast("object", value["messages"])),
        value["error"],
        datetime.fromisoformat(value["since"]),
        document.key,
        document.revision,
    )
