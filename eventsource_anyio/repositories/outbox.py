"""The outbox: messages for the world outside, stored with the events they tell of.

A relay reads what is pending, delivers it, and says so. What was delivered and not said to be so is
delivered again: at least once, and the receiver knows it by its message id.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import datetime
from typing import TypeAlias
from uuid import UUID

import anyio
import attrs
from anyio.lowlevel import checkpoint
from msgspec import DecodeError, Struct

from ..errors import StorageError
from ..ids import check_name, uuid7
from ..metadata import Metadata, decode_metadata, encode_metadata, merge_metadata

_LARGEST = 2**63 - 1


def _topic(value: str) -> str:
    return check_name("topic", value)


def _key(value: str) -> str:
    return check_name("key", value) if value != "" else ""


def _payload(value: bytes) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError(f"payload must be bytes, not {type(value).__name__}: encode it first")
    return bytes(value)


@attrs.frozen
class OutboxMessage:
    """A message to deliver: what, where to, and under which id.

    `topic` and `key` are the receiving side's names; messages of one key are those whose order
    matters. `metadata` is JSON, stored over the context's (see `event_metadata`). `message_id`
    tells the receiver what it has got already.
    """

    topic: str = attrs.field(converter=_topic)
    payload: bytes = attrs.field(converter=_payload)
    key: str = attrs.field(default="", converter=_key)
    metadata: Metadata = attrs.field(factory=dict[str, object])
    message_id: UUID = attrs.field(factory=uuid7, validator=attrs.validators.instance_of(UUID))


class StoredMessage(Struct, frozen=True):
    """A message in the outbox. `position` counts from 1 and grows, with gaps."""

    message: OutboxMessage
    position: int
    recorded_at: datetime


class EncodedMessage(Struct, frozen=True, gc=False):
    """A message, ready to be stored; `metadata_json` is None where there is none."""

    message_id: UUID
    topic: str
    key: str
    payload: bytes
    metadata_json: str | None


class AddMessages(Struct, frozen=True, gc=False):
    """A step of a unit of writing: add messages, in order, except those whose id is there."""

    messages: Sequence[EncodedMessage]


class RemoveMessages(Struct, frozen=True, gc=False):
    """A step of a unit of writing: take messages out; an id that is not there is ignored."""

    message_ids: Sequence[UUID]


OutboxStep: TypeAlias = AddMessages | RemoveMessages


class OutboxHint:
    """Tells who waits, on one event loop, that the same store object has added messages.

    It may be lost, and knows nothing of other processes: so nobody waits for it alone. `count` is
    read before looking, and waited for after.
    """

    __slots__ = ("_waiting", "count")

    def __init__(self) -> None:
        self.count = 0
        self._waiting: set[anyio.Event] = set()

    def wake(self) -> None:
        self.count += 1
        for event in self._waiting:
            event.set()

    async def wait(self, count: int) -> None:
        """Return once it is beyond this."""
        if self.count > count:
            await checkpoint()
            return
        event = anyio.Event()
        self._waiting.add(event)
        try:
            await event.wait()
        finally:
            self._waiting.discard(event)


class OutboxRepository:
    """Messages that are stored, and not known to be delivered."""

    __slots__ = ("_read", "_write", "hint")

    def __init__(
        self,
        read: Callable[[int, int], Awaitable[Sequence[StoredMessage]]],
        write: Callable[[Sequence[OutboxStep]], Awaitable[object]],
        hint: OutboxHint,
    ) -> None:
        self._read = read
        self._write = write
        self.hint = hint

    async def add(self, *messages: OutboxMessage) -> None:
        """Store them, all or none. One whose id is pending already changes nothing."""
        encoded = [_encode(message) for message in messages]
        if encoded:
            await self._write((AddMessages(encoded),))
            self.hint.wake()
        else:
            await checkpoint()

    async def pending(self, limit: int = 100, *, after: int = 0) -> Sequence[StoredMessage]:
        """Those that were not delivered yet, the oldest first.

        With `after` those behind that position, to page on. It is no checkpoint: what was added by
        a slower transaction may turn up before it.
        """
        for what, value, least in (("limit", limit, 1), ("after", after, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{what} must be a number from {least}, not {value!r}")
        return await self._read(min(limit, _LARGEST), min(after, _LARGEST))

    async def delivered(self, message_ids: Iterable[UUID]) -> None:
        """Take them out. Ids that are not there are ignored, so it may be said again."""
        if isinstance(message_ids, UUID | StoredMessage | OutboxMessage):
            raise TypeError(f"give a list of message ids, not one: [{message_ids!r}]")
        ids = list(message_ids)
        for one in ids:
            if not isinstance(one, UUID):
                raise TypeError(f"a message id is a UUID, not {type(one).__name__}: {one!r}")
        await (self._write((RemoveMessages(ids),)) if ids else checkpoint())


def _encode(message: OutboxMessage) -> EncodedMessage:
    if not isinstance(message, OutboxMessage):
        raise TypeError(f"give OutboxMessages, not {type(message).__name__}: {message!r}")
    return EncodedMessage(
        message.message_id,
        message.topic,
        message.key,
        message.payload,
        encode_metadata(merge_metadata(message.metadata)),
    )


def decode_message(
    message_id: UUID,
    topic: str,
    key: str,
    payload: bytes,
    metadata_json: str | bytes | None,
    position: int,
    recorded_at: datetime,
) -> StoredMessage:
    """The message as `OutboxRepository.pending` gives it."""
    try:
        metadata = decode_metadata(metadata_json)
    except (DecodeError, UnicodeError) as error:
        raise StorageError(
            f"Message {message_id} of the outbox, position {position}, cannot be read.\n"
            f"  Its metadata is not JSON: {error}.\n"
            "  Correct the metadata where the message is stored."
        ) from error
    return StoredMessage(
        OutboxMessage(topic, payload, key, metadata, message_id), position, recorded_at
    )
