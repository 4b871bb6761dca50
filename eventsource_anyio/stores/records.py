"""What passes between the public interface and a store: encoded appends down, stored events up.

Everything that can be wrong with an append is found while it is encoded, before a store sees it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import TypeAlias
from uuid import UUID

from msgspec import DecodeError, Struct

from ..codec import PayloadError
from ..errors import ConcurrencyError, DuplicateEventError, EventDecodeError, EventEncodeError
from ..events import DomainEvent, NewEvent, StoredEvent, UnreadableError, decode_event, registered
from ..ids import (
    AggregateId,
    check_aggregate_type,
    normalize_aggregate_id,
    stream_id_of,
    uuid7,
)
from ..metadata import Metadata, decode_metadata, encode_metadata, merge_metadata
from ..repositories.checkpoint import SaveCheckpoint
from ..repositories.document import DocumentStep
from ..repositories.outbox import OutboxStep


class ExpectedVersion(Enum):
    """What an append expects of its stream, other than an exact version."""

    ANY = "ANY"
    NO_STREAM = "NO_STREAM"
    STREAM_EXISTS = "STREAM_EXISTS"

    def __str__(self) -> str:
        return self.name

    __repr__ = __str__


EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_TOLD_AT_MOST = 100


def to_microseconds(moment: datetime) -> int:
    return (moment - EPOCH) // _MICROSECOND


def from_microseconds(microseconds: int) -> datetime:
    return EPOCH + timedelta(microseconds=microseconds)


class EncodedEvent(Struct, frozen=True, gc=False):
    """One event of an append, ready to be stored; `payload` and `metadata_json` are JSON."""

    event: DomainEvent
    event_id: UUID
    event_type: str
    schema_version: int
    payload: str
    metadata: Metadata
    metadata_json: str | None
    occurred_at: datetime | None


class Append(Struct, frozen=True, gc=False):
    """Events for the end of one stream, if the stream is at `expected_version`."""

    aggregate_type: str
    aggregate_id: AggregateId
    expected_version: ExpectedVersion | int
    events: Sequence[EncodedEvent]

    @property
    def stream_id(self) -> str:
        return stream_id_of(self.aggregate_type, self.aggregate_id)

    def expects(self, actual: int) -> bool:
        """Whether the stream may be at this version; 0 means that it does not exist."""
        expected = self.expected_version
        if expected is ExpectedVersion.ANY:
            return True
        if expected is ExpectedVersion.NO_STREAM:
            return actual == 0
        if expected is ExpectedVersion.STREAM_EXISTS:
            return actual > 0
        return expected == actual

    def unexpected(self, actual: int) -> range:
        """The versions that a conflict's message speaks of: those after the expected one."""
        expected = self.expected_version
        first = (expected if isinstance(expected, int) else 0) + 1
        return range(first, actual + 1) if actual - first < _TOLD_AT_MOST else range(0)

    def stored_by(self, result: AppendResult) -> bool:
        """Whether it is the result of this call, and not that of an earlier one that it repeats:
        what was stored earlier is read, and so is another object."""
        return result.events[0].event is self.events[0].event

    def conflict(self, actual: int, meanwhile: Sequence[str] = ()) -> ConcurrencyError:
        """The error for a stream at the wrong version; `meanwhile` are `unexpected`'s types."""
        return ConcurrencyError(self.stream_id, self.expected_version, actual, meanwhile)

    def result(self, version: int, position: int, recorded_at: datetime) -> AppendResult:
        """The result, where the first event got this version and position and the rest follow."""
        offset = 0
        stored: list[StoredEvent] = []
        for encoded in self.events:
            stored.append(
                StoredEvent(
                    encoded.event,
                    encoded.event_id,
                    encoded.event_type,
                    self.aggregate_id,
                    self.aggregate_type,
                    version + offset,
                    position + offset,
                    recorded_at,
                    encoded.occurred_at or recorded_at,
                    encoded.metadata,
                    encoded.schema_version,
                )
            )
            offset += 1
        return AppendResult(version + offset - 1, position + offset - 1, tuple(stored))

    def repeated(self, stored: Mapping[UUID, StoredEvent | EventDecodeError]) -> AppendResult:
        """The original result, if `stored` shows that this very append was made before.

        `stored` holds, by id, what the store has of this append's event ids, at least one of them.
        Raises `DuplicateEventError` if that is not the same events in the same stream, in a row.
        """
        before: list[StoredEvent] = []
        for encoded in self.events:
            match = stored.get(encoded.event_id)
            if match is None:
                reason = "other events of the same append are new"
                taken = next(iter(stored))
                raise DuplicateEventError(taken, self.stream_id, reason)
            if isinstance(match, EventDecodeError):
                raise match
            if match.stream_id != self.stream_id:
                reason = f"it belongs to {match.stream_id}, version {match.version}"
            elif not _same(encoded, match):
                reason = f"version {match.version} of the stream is another event under this id"
            elif before and match.version != before[-1].version + 1:
                reason = "its events were not appended in this order"
            else:
                before.append(match)
                continue
            raise DuplicateEventError(encoded.event_id, self.stream_id, reason)
        return AppendResult(before[-1].version, before[-1].position, tuple(before))


def _same(encoded: EncodedEvent, stored: StoredEvent) -> bool:
    if encoded.event_type != stored.event_type:
        return False
    if encoded.event == stored.event:
        return True
    codec = registered(type(stored.event)).codec
    return codec.encode(stored.event).decode() == encoded.payload


Step: TypeAlias = Append | SaveCheckpoint | OutboxStep | DocumentStep


class AppendResult(Struct, frozen=True, gc=False):
    """What an append stored: `version` and `position` of its last event, and the events."""

    version: int
    position: int
    events: tuple[StoredEvent, ...]


def encode_append(
    aggregate_id: AggregateId,
    aggregate_type: str,
    events: Iterable[DomainEvent | NewEvent],
    expected_version: ExpectedVersion | int,
    metadata: Metadata | None,
) -> Append:
    """Check and encode everything, or raise before anything is stored."""
    aggregate_type = check_aggregate_type(aggregate_type)
    aggregate_id = normalize_aggregate_id(aggregate_id)
    if type(expected_version) is not int or expected_version < 0:
        _check_expected(expected_version)
    if isinstance(events, (DomainEvent, NewEvent)):
        raise TypeError(f"events must be a list of events, not one: [{type(events).__name__}(…)]")
    context = merge_metadata(metadata)
    context_json = encode_metadata(context) if context else None
    shared = decode_metadata(context_json)
    encoded: list[EncodedEvent] = []
    for given in events:
        own, own_json, occurred_at = shared, context_json, None
        if isinstance(given, NewEvent):
            event, event_id = given.event, given.event_id
            if given.metadata:
                own_json = encode_metadata(merge_metadata(metadata, given.metadata))
                own = decode_metadata(own_json)
            if given.occurred_at is not None:
                occurred_at = given.occurred_at.astimezone(UTC)
        else:
            event, event_id = given, uuid7()
        kind = registered(type(event))
        try:
            payload = kind.codec.encode(event)
        except PayloadError as error:
            raise EventEncodeError(kind.name, error.path, error.reason) from error
        encoded.append(
            EncodedEvent(
                event,
                event_id,
                kind.name,
                kind.schema_version,
                payload.decode(),
                own,
                own_json,
                occurred_at,
            )
        )
    if not encoded:
        raise ValueError("there is nothing to append: events is empty")
    if len(encoded) > 1 and len({one.event_id for one in encoded}) != len(encoded):
        raise ValueError("two events of one append have the same event_id; each needs its own")
    # A tuple, which the garbage collector lets go of: with many waiting, lists cost a tenth of all.
    return Append(aggregate_type, aggregate_id, expected_version, tuple(encoded))


def _check_expected(expected_version: object) -> None:
    if isinstance(expected_version, ExpectedVersion):
        return
    if not isinstance(expected_version, int) or isinstance(expected_version, bool):
        raise TypeError(
            "expected_version must be ANY, NO_STREAM, STREAM_EXISTS or a version, "
            f"not {expected_version!r}"
        )
    if expected_version < 0:
        raise ValueError(
            f"expected_version must not be negative: {expected_version}. "
            "ANY, NO_STREAM and STREAM_EXISTS stand for what is not an exact version."
        )


Read: TypeAlias = StoredEvent | EventDecodeError


def _stored_metadata(data: str | bytes) -> Metadata:
    try:
        return decode_metadata(data)
    except (DecodeError, UnicodeError) as error:
        raise UnreadableError(
            "metadata", str(error), "Correct the metadata where the event is stored."
        ) from error


def decode_stored(
    event_id: UUID,
    event_type: str,
    aggregate_id: AggregateId,
    aggregate_type: str,
    version: int,
    position: int,
    recorded_at: datetime,
    occurred_at: datetime | None,
    metadata_json: str | bytes | None,
    schema_version: int,
    payload: str | bytes,
) -> Read:
    """The stored event, or the error to raise in its place when a reader reaches it."""
    try:
        event = decode_event(event_type, schema_version, payload)
        metadata: Metadata = _stored_metadata(metadata_json) if metadata_json else {}
    except UnreadableError as error:
        unreadable = EventDecodeError(
            event_type=event_type,
            stream_id=stream_id_of(aggregate_type, aggregate_id),
            version=version,
            position=position,
            path=error.path,
            reason=error.reason,
            remedy=error.remedy,
            payload=payload
            if isinstance(payload, bytes)
            else payload.encode(errors="surrogateescape"),
        )
        unreadable.__cause__ = error.__cause__
        return unreadable
    return StoredEvent(
        event,
        event_id,
        event_type,
        aggregate_id,
        aggregate_type,
        version,
        position,
        recorded_at,
        occurred_at or recorded_at,
        metadata,
        schema_version,
    )
