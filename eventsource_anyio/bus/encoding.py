"""Stored events as messages of a broker, and back.

- What is decoded is equal to what was encoded, whatever the store: the event goes by its codec, and
  through upcasters where its reader knows a newer schema than its publisher.
- What a filter or a place in the order needs is outside the payload, so an event that nobody here
  wants is never decoded, and its class need not be defined.
- A partition is a range of slices, so streams stay together, and a store can be read by partition.
"""

from __future__ import annotations

from urllib.parse import quote
from uuid import UUID

from msgspec import DecodeError, MsgspecError, Struct
from msgspec.msgpack import Decoder, Encoder
from msgspec.structs import replace

from ..codec import PayloadError
from ..errors import EventDecodeError, EventEncodeError
from ..events import StoredEvent, registered
from ..ids import SLICES, normalize_aggregate_id, slice_of, stream_id_of
from ..metadata import encode_metadata
from ..stores.interface import decode_stored
from ..stores.records import from_microseconds, to_microseconds
from .broker import Message, ReceivedMessage


class Envelope(Struct, frozen=True, array_like=True, gc=False):
    """A stored event whose event is still encoded."""

    event_type: str
    event_id: UUID
    aggregate_type: str
    aggregate_id: str
    version: int
    position: int
    recorded_at: int
    occurred_at: int
    metadata: str | None
    schema_version: int  # at which it was stored
    payload_version: int  # at which the publisher has encoded it
    payload: bytes

    @property
    def stream_id(self) -> str:
        return stream_id_of(self.aggregate_type, self.aggregate_id)


_encode = Encoder().encode
_decode = Decoder(Envelope).decode


def partition_of(stream_id: str, partitions: int) -> int:
    return slice_of(stream_id) * partitions // SLICES


def slices_of(partition: int, partitions: int) -> range:
    """The slices that are in a partition."""
    return range(
        -(-partition * SLICES // partitions),
        -(-(partition + 1) * SLICES // partitions),
    )


def encode(stored: StoredEvent, partitions: int) -> Message:
    """`EventEncodeError` if a value of the event would not come back the same."""
    kind = registered(type(stored.event))
    try:
        payload = kind.codec.encode(stored.event)
    except PayloadError as error:
        raise EventEncodeError(kind.name, error.path, error.reason) from error
    envelope = Envelope(
        stored.event_type,
        stored.event_id,
        stored.aggregate_type,
        str(stored.aggregate_id),
        stored.version,
        stored.position,
        to_microseconds(stored.recorded_at),
        to_microseconds(stored.occurred_at),
        encode_metadata(stored.metadata),
        stored.schema_version,
        kind.schema_version,
        payload,
    )
    partition = partition_of(stored.stream_id, partitions)
    return Message(partition, str(stored.event_id), _encode(envelope))


def opened(message: ReceivedMessage) -> Envelope | None:
    """What is in a message; None if it is not one of this library's."""
    return open_payload(message.payload)


def open_payload(payload: bytes) -> Envelope | None:
    try:
        return _decode(payload)
    except (DecodeError, MsgspecError):
        return None


def decode(envelope: Envelope) -> StoredEvent | EventDecodeError:
    """The stored event, or the error to raise in its place."""
    stored = decode_stored(
        envelope.event_id,
        envelope.event_type,
        normalize_aggregate_id(envelope.aggregate_id),
        envelope.aggregate_type,
        envelope.version,
        envelope.position,
        from_microseconds(envelope.recorded_at),
        from_microseconds(envelope.occurred_at),
        envelope.metadata,
        envelope.payload_version,
        envelope.payload,
    )
    if isinstance(stored, StoredEvent) and envelope.schema_version != envelope.payload_version:
        return replace(stored, schema_version=envelope.schema_version)
    return stored


def key_part(text: str) -> str:
    """Text as a part of an entry's key."""
    quoted = quote(text, safe="").replace(".", "%2E").replace("~", "%7E")
    return quoted.replace("%", "=")
