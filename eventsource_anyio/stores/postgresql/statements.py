"""What is said to PostgreSQL: the statements of one schema, their values and their answers.

- A UUID is stored as its canonical text, which `normalize_aggregate_id` makes a UUID again.
- An expected version is a number for SQL: -1 for `ANY`, -2 for `STREAM_EXISTS`, and below that
  `ANY` with the version that the stream has reached, as far as is known: it is faster to find.
- Positions have gaps, also within one append.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, TypeAlias
from uuid import UUID

from msgspec import Struct
from msgspec.structs import replace

from ...ids import AggregateId, uuid_of
from ..reading import DecodedRows, PageRequest
from ..records import Append, AppendResult, ExpectedVersion, Read, decode_stored
from .driver import Row
from .schema import Schema, migrations

APPENDED, KNOWN, CONFLICT, BUSY = range(4)
LARGEST = 2**63 - 1
_COLUMNS = (
    "position, version, recorded_at, occurred_at, event_id, schema_version, event_type, "
    "aggregate_type, aggregate_id, metadata, payload"
)
# What `slice_of` computes in Python.
_SLICE = "('x' || left(md5(aggregate_type || '-' || aggregate_id), 8))::bit(32)::bigint & 1023"
Reached: TypeAlias = Mapping[tuple[str, AggregateId], int]
"""Versions that streams have reached at least."""
NOTHING_REACHED: Final[Reached] = {}
_EXPECTED: Mapping[object, int] = {
    ExpectedVersion.ANY: -1,
    ExpectedVersion.STREAM_EXISTS: -2,
    ExpectedVersion.NO_STREAM: 0,
}


class Answer(Struct, frozen=True, gc=False):
    """What became of one append: a status, the version of its stream before, and its positions."""

    status: int
    version: int
    positions: Sequence[int] = ()
    recorded_at: object = None


class Statements:
    """The statements of a schema, each prepared once a connection."""

    def __init__(self, schema: Schema) -> None:
        sql = schema.sql
        self.schema = schema
        self.append_event = sql("SELECT * FROM es.append_event($1, $2, $3, $4, $5, $6, $7, $8, $9)")
        self.append_events = sql(
            "SELECT * FROM es.append_events("
            "$1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)"
        )
        self.by_ids = sql(f"SELECT {_COLUMNS} FROM es.events WHERE event_id = ANY ($1)")  # noqa: S608
        self.types_between = sql(
            "SELECT event_type FROM es.events WHERE (aggregate_id, aggregate_type, version) "
            "BETWEEN ($1, $2, $3::bigint) AND ($1, $2, $4::bigint) "
            "ORDER BY aggregate_id, aggregate_type, version"
        )
        # A loose scan: the types of an id, however many events each has.
        self.aggregate_types = sql(
            "WITH RECURSIVE found(id, kind) AS ("
            "(SELECT aggregate_id, aggregate_type FROM es.events "
            "WHERE (aggregate_id, aggregate_type) >= ($1, '') "
            "ORDER BY aggregate_id, aggregate_type LIMIT 1) UNION ALL "
            "SELECT next.* FROM found CROSS JOIN LATERAL "
            "(SELECT aggregate_id, aggregate_type FROM es.events "
            "WHERE (aggregate_id, aggregate_type) > ($1, found.kind) "
            "ORDER BY aggregate_id, aggregate_type LIMIT 1) next WHERE found.id = $1) "
            "SELECT kind FROM found WHERE id = $1"
        )
        self.safe_position = sql("SELECT es.safe_position($1)")
        self.read_safe = sql(f"SELECT {_COLUMNS} FROM es.read_safe($1, $2, $3, $4)")  # noqa: S608
        self.checkpoint = sql("SELECT position FROM es.checkpoints WHERE name = $1")
        self.save_checkpoint = sql("SELECT saved, actual FROM es.save_checkpoint($1, $2, $3)")
        self.add_messages = sql(
            "INSERT INTO es.outbox (message_id, topic, key, metadata, payload) "
            "SELECT * FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::bytea[]) "
            "ON CONFLICT (message_id) DO NOTHING"
        )
        self.remove_messages = sql("DELETE FROM es.outbox WHERE message_id = ANY ($1::uuid[])")
        self.pending = sql(
            "SELECT message_id, topic, key, payload, metadata, position, recorded_at "
            "FROM es.outbox WHERE position > $2 ORDER BY position LIMIT $1"
        )
        self.write_documents = sql(
            "SELECT conflict, actual FROM es.write_documents($1, $2, $3, $4, $5, $6)"
        )
        # In the order in which `write_documents` locks them.
        self.delete_documents = sql(
            "WITH locked AS MATERIALIZED (SELECT collection, key FROM es.documents "
            "WHERE collection = $1 ORDER BY key FOR UPDATE) "
            "DELETE FROM es.documents d USING locked l "
            "WHERE d.collection = l.collection AND d.key = l.key"
        )
        self.documents_by_key = sql(
            "SELECT key, revision, value::text FROM es.documents "
            "WHERE collection = $1 AND key = ANY ($2::text[])"
        )
        self.documents_after = sql(
            "SELECT key, revision, value::text FROM es.documents "
            "WHERE collection = $1 AND key > $2 ORDER BY key LIMIT $3"
        )
        # One row, whatever is missing: each name is looked up and never just used.
        self.about = sql(
            "SELECT to_regclass('es.migrations') IS NOT NULL, "
            "coalesce(to_regclass('es.events')::oid::bigint, 0), "
            "current_setting('server_encoding')"
        )
        self.version = sql("SELECT coalesce(max(version), 0) FROM es.migrations")
        self.newest = migrations()[-1].version
        self._pages: dict[tuple[bool, bool, bool, bool, bool], str] = {}

    def page(
        self, request: PageRequest, low: int, high: int, limit: int
    ) -> tuple[str, tuple[object, ...]]:
        """The statement of a page between two versions or positions, and its values."""
        values: list[object] = [low, high, min(limit, LARGEST)]
        if request.stream is not None:
            values += (request.stream[0], str(request.stream[1]))
        if request.event_types:
            values.append(list(request.event_types))
        if request.aggregate_types:
            values.append(list(request.aggregate_types))
        if request.slices is not None:
            values += request.slices
        key = (
            request.stream is None,
            request.backwards,
            bool(request.event_types),
            bool(request.aggregate_types),
            request.slices is not None,
        )
        statement = self._pages.get(key)
        if statement is None:
            statement = self._pages[key] = self._page(*key)
        return statement, tuple(values)

    def _page(
        self, whole: bool, backwards: bool, event_types: bool, aggregate_types: bool, slices: bool
    ) -> str:
        if whole:
            where = ["position BETWEEN $1 AND $2"]
            by = "position"
            last = 3
        else:
            # By rows, for the sake of the index: see sql/0001_events.sql.
            bounds = "($5, $4, $1::bigint) AND ($5, $4, $2::bigint)"
            where = [f"(aggregate_id, aggregate_type, version) BETWEEN {bounds}"]
            by = "aggregate_id {0}, aggregate_type {0}, version"
            last = 5
        filters: list[tuple[str, int]] = []
        for column, given in (("event_type", event_types), ("aggregate_type", aggregate_types)):
            if given:
                last += 1
                filters.append((column, last))
        direction = "DESC" if backwards else "ASC"
        order = f"ORDER BY {by.format(direction)} {direction}"
        ordered = f"{order} LIMIT $3"

        def events(where: Sequence[str]) -> str:
            every = f"es.events WHERE {' AND '.join(where)}"
            if not slices:
                return f"{every} {ordered}"
            # OFFSET keeps the planner, which can only guess how many events are in a slice, from
            # choosing another index for it, or several processes.
            one = f"{_SLICE} BETWEEN ${last + 1} AND ${last + 2}"
            return f"(SELECT * FROM {every} {order} OFFSET 0) every WHERE {one} {ordered}"  # noqa: S608

        if not whole or not filters:
            where += [f"{column} = ANY (${number}::text[])" for column, number in filters]
            return self.schema.sql(f"SELECT {_COLUMNS} FROM {events(where)}")  # noqa: S608
        # A page for each type by its index, in order, and the first of them all.
        (column, number), *others = filters
        where += [f"{other} = ANY (${its}::text[])" for other, its in others]
        of_one = events([f"{column} = types.one", *where])
        return self.schema.sql(
            f"SELECT {_COLUMNS} FROM (SELECT DISTINCT unnest(${number}::text[]) AS one) types "  # noqa: S608
            f"CROSS JOIN LATERAL (SELECT * FROM {of_one}) found {ordered}"
        )


def _expected_number(append: Append, reached: Reached) -> int:
    expected = append.expected_version
    if isinstance(expected, int):
        return min(expected, LARGEST)
    if expected is ExpectedVersion.ANY:
        version = reached.get((append.aggregate_type, append.aggregate_id))
        if version is not None:
            return -3 - version
    return _EXPECTED[expected]


def event_values(append: Append, reached: Reached) -> tuple[object, ...]:
    """The values of `append_event`."""
    (event,) = append.events
    return (
        append.aggregate_type,
        str(append.aggregate_id),
        _expected_number(append, reached),
        event.event_id,
        event.event_type,
        event.schema_version,
        event.occurred_at,
        event.metadata_json,
        event.payload,
    )


def events_values(
    appends: Sequence[Append], *, wait: bool, atomic: bool, reached: Reached = NOTHING_REACHED
) -> tuple[object, ...]:
    """The values of `append_events`; what goes without saying is left empty."""
    streams = [(append.aggregate_type, str(append.aggregate_id)) for append in appends]
    same_as: list[int] = []
    if len(set(streams)) < len(streams):
        first: dict[tuple[str, str], int] = {}
        same_as = [first.setdefault(stream, number) for number, stream in enumerate(streams, 1)]
    if len(appends) == 1:
        events = appends[0].events
    else:
        events = [event for append in appends for event in append.events]
    counts: list[int] = []
    numbers: list[int] = []
    places: list[int] = []
    if len(events) > len(appends) > 1:
        for number, append in enumerate(appends, 1):
            count = len(append.events)
            counts.append(count)
            numbers += [number] * count
            places += range(1, count + 1)
    # An array that is too short is filled up with NULL, so one that would hold nothing else is
    # left empty, and one that would hold the same again and again is cut off.
    kinds = [stream[0] for stream in streams]
    types = [event.event_type for event in events]
    schema_versions = [event.schema_version for event in events]
    occurred = [event.occurred_at for event in events]
    metadata = [event.metadata_json for event in events]
    return (
        _once(kinds),
        [stream[1] for stream in streams],
        same_as,
        [_expected_number(append, reached) for append in appends],
        counts,
        numbers,
        places,
        [event.event_id for event in events],
        _once(types),
        [] if schema_versions.count(1) == len(events) else schema_versions,
        occurred if any(occurred) else [],
        metadata if any(metadata) else [],
        [event.payload for event in events],
        wait,
        atomic,
    )


def _once(names: list[str]) -> list[str]:
    return names[:1] if names.count(names[0]) == len(names) else names


def event_answer(row: Row) -> Answer:
    status, version, position, recorded_at = row
    return Answer(status, version or 0, () if position is None else (position,), recorded_at)


def events_answers(appends: Sequence[Append], row: Row) -> list[Answer]:
    statuses, versions, given, recorded_at = row
    answers: list[Answer] = []
    taken = 0
    for append, status, version in zip(appends, statuses, versions, strict=True):
        positions: Sequence[int] = ()
        if status == APPENDED and given is not None:
            positions = given[taken : taken + len(append.events)]
            taken += len(append.events)
        answers.append(Answer(status, version, positions, recorded_at))
    return answers


def appended(append: Append, answer: Answer) -> AppendResult:
    """The result of an append with status 0."""
    positions, recorded_at = answer.positions, answer.recorded_at
    result = append.result(answer.version + 1, positions[0], recorded_at)  # type: ignore[arg-type]
    if positions[-1] == result.position:
        return result
    events = [
        replace(event, position=position)
        for event, position in zip(result.events, positions, strict=True)
    ]
    return AppendResult(result.version, positions[-1], tuple(events))


def aggregate_id_of(text: str) -> AggregateId:
    """The id that was stored as this text."""
    if len(text) == 36 and text[8] == text[13] == text[18] == text[23] == "-":
        try:
            found = uuid_of(bytes.fromhex(text.replace("-", "")))
        except ValueError:
            return text
        if str(found) == text:
            return found
    return text


def decode_rows(rows: Sequence[Row]) -> DecodedRows[Row]:
    """The events of rows that hold `_COLUMNS`."""
    return DecodedRows(rows, _decoded)


def _decoded(rows: Sequence[Row]) -> Iterator[Read]:
    known = ""
    aggregate_id: AggregateId = known
    for (
        position,
        version,
        recorded_at,
        occurred_at,
        event_id,
        schema_version,
        event_type,
        aggregate_type,
        id_text,
        metadata,
        payload,
    ) in rows:
        if id_text != known:
            known = id_text
            aggregate_id = aggregate_id_of(known)
        yield decode_stored(
            event_id,
            event_type,
            aggregate_id,
            aggregate_type,
            version,
            position,
            recorded_at,
            occurred_at,
            metadata,
            schema_version,
            payload,
        )


def by_id(rows: Sequence[Row]) -> dict[UUID, Read]:
    return {row[4]: event for row, event in zip(rows, decode_rows(rows), strict=True)}
