"""What is in the SQLite file, and the statements on it, which all run on the worker's thread.

Invariants:
- SQLite has one writer at a time, from `BEGIN IMMEDIATE` to the commit. Positions are given out in
  between, so they become visible in their order, and a reader never sees a gap close.
- `recorded_at` never decreases with the position, also when the clock is set back.
- What is known of the end of the file and of streams' versions holds while SQLite's `data_version`
  stays the same, which it does until another connection commits.
- An id of 16 bytes is a UUID, one of text is a string.
- Moments are whole microseconds since 1970 in UTC.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from time import time_ns
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeGuard
from uuid import UUID

from ...errors import EventSourceError, StorageError
from ...ids import AggregateId, slice_of, stream_id_of, uuid_of
from ..reading import DecodedRows, PageRequest
from ..records import (
    EPOCH,
    Append,
    AppendResult,
    Read,
    Step,
    decode_stored,
    from_microseconds,
    to_microseconds,
)
from .failures import is_locked
from .repositories import CHECKPOINTS, DOCUMENTS, OUTBOX, take_step

if TYPE_CHECKING:
    from sqlite3 import Connection

Synchronous: TypeAlias = Literal["FULL", "NORMAL"]
Unit: TypeAlias = Sequence[Step]
Outcome: TypeAlias = list[AppendResult] | EventSourceError
Row: TypeAlias = tuple[
    int, str, str | bytes, int, bytes, str, int, int, int | None, bytes | None, bytes
]

_APPLICATION_ID = 0x65766E74  # "evnt"
_EVENTS = """
CREATE TABLE events (
    position INTEGER PRIMARY KEY,
    aggregate_type TEXT NOT NULL,
    aggregate_id BLOB NOT NULL,
    version INTEGER NOT NULL,
    event_id BLOB NOT NULL UNIQUE,
    event_type TEXT NOT NULL,
    schema_version INTEGER NOT NULL,
    recorded_at INTEGER NOT NULL,
    occurred_at INTEGER,
    metadata TEXT,
    payload TEXT NOT NULL,
    UNIQUE (aggregate_id, aggregate_type, version)
)
"""
# What each schema version has added to the one before.
_SCHEMA = ((_EVENTS,), (CHECKPOINTS, OUTBOX), (DOCUMENTS,))
_COLUMNS = (
    "position, aggregate_type, aggregate_id, version, event_id, event_type, schema_version, "
    "recorded_at, occurred_at, metadata, payload"
)
# As bytes, because one text that is not UTF-8 would fail the whole page.
_SELECTED = _COLUMNS.replace("metadata, payload", "CAST(metadata AS BLOB), CAST(payload AS BLOB)")
_ROW = "(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
# Statements and how many values they take, for 64 rows, 8, and 1.
_INSERTS = [
    (f"INSERT INTO events ({_COLUMNS}) VALUES {', '.join([_ROW] * rows)}", 11 * rows)  # noqa: S608
    for rows in (64, 8, 1)
]
_VERSION = "SELECT max(version) FROM events WHERE aggregate_id = ? AND aggregate_type = ?"
_LAST = "SELECT position, recorded_at FROM events ORDER BY position DESC LIMIT 1"
_BY_ID = f"SELECT {_SELECTED} FROM events WHERE event_id = ?"  # noqa: S608  (a constant)
_TYPES_BETWEEN = (
    "SELECT event_type FROM events WHERE aggregate_id = ? AND aggregate_type = ? "
    "AND version BETWEEN ? AND ? ORDER BY version"
)
_AGGREGATE_TYPES = (
    "SELECT DISTINCT aggregate_type FROM events WHERE aggregate_id = ? ORDER BY aggregate_type"
)
_LARGEST = 2**63 - 1
_SEARCHED_AT_MOST = 50_000
_HASHED_AT_MOST = 10_000  # by Python, for whose lock the event loop waits meanwhile
_VERSIONS_AT_MOST = 10_000
# How long one attempt waits on its thread for a lock; in between, the caller can be cancelled.
_LOCK_ATTEMPT = 0.05


class SQLiteDatabase:
    """The statements of one file, and what is known of its end."""

    def __init__(self, path: Path, synchronous: Synchronous) -> None:
        self._path = path
        self._synchronous = synchronous
        self.position = 0
        self._position_before = 0
        self._recorded_at = 0
        self._now = EPOCH
        self._values: list[object] = []  # of the rows that are planned and not inserted yet
        self._versions: dict[tuple[str | bytes, str], int] = {}
        self._data_version: int | None = None

    def connect(self, *, one_thread: bool = True) -> Connection:
        import sqlite3

        try:
            connection = sqlite3.connect(
                self._path,
                timeout=_LOCK_ATTEMPT,
                isolation_level=None,
                cached_statements=64,
                check_same_thread=one_thread,
            )
        except sqlite3.Error as error:
            raise self._unusable(
                str(error), "Does its folder exist, and may we write to it?"
            ) from error
        connection.create_function("slice_of", 2, _slice_of, deterministic=True)
        try:
            self._prepare(connection)
        except BaseException as error:
            connection.close()
            if is_locked(error) or isinstance(error, EventSourceError):
                raise
            raise self._unusable(
                str(error), "Is it a SQLite database, and may we write to it?"
            ) from error
        return connection

    def _prepare(self, connection: Connection) -> None:
        connection.execute(f"PRAGMA synchronous = {self._synchronous}")
        self._schema_version(connection)  # before anything of another program's file is changed
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA wal_autocheckpoint = 4000")
        connection.execute("BEGIN IMMEDIATE")
        version = self._schema_version(connection)
        if version < len(_SCHEMA):
            for statements in _SCHEMA[version:]:
                for statement in statements:
                    connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {len(_SCHEMA)}")
        connection.execute("COMMIT")
        self.look(connection)

    def _schema_version(self, connection: Connection) -> int:
        """That of the file, 0 if it is empty; `StorageError` if it is not for us."""
        # The tables first: another process may make them now, and ours come with the id.
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if application == _APPLICATION_ID and version > len(_SCHEMA):
            raise self._unusable(
                f"its schema version is {version}, this program knows {len(_SCHEMA)}",
                "A newer eventsource-anyio made it. Update this program.",
            )
        if application != _APPLICATION_ID and tables:
            raise self._unusable(
                "it holds the tables of another program", "Give the store a file of its own."
            )
        return int(version) if tables else 0

    def _unusable(self, reason: str, remedy: str) -> StorageError:
        return StorageError(
            f"{self._path} cannot be opened as an event store.\n  {reason}\n  {remedy}"
        )

    def look(self, connection: Connection) -> None:
        last = connection.execute(_LAST).fetchone()
        self.position, self._recorded_at = last or (0, 0)

    def begin(self, connection: Connection) -> None:
        connection.execute("BEGIN IMMEDIATE")
        self.begun(connection)

    def begun(self, connection: Connection) -> None:
        """Look what is there; called in a transaction before its first `write`."""
        (data_version,) = connection.execute("PRAGMA data_version").fetchone()
        if data_version != self._data_version or len(self._versions) > _VERSIONS_AT_MOST:
            self._data_version = data_version
            self._versions.clear()
            self.look(connection)
        self._position_before = self.position
        self._recorded_at = max(self._recorded_at, time_ns() // 1000)
        self._now = from_microseconds(self._recorded_at)

    def roll_back(self, connection: Connection) -> None:
        self.position = self._position_before
        self._data_version = None
        self._values = []
        if connection.in_transaction:
            connection.execute("ROLLBACK")

    def write(self, connection: Connection, units: Sequence[Unit]) -> list[Outcome]:
        """Store the steps of each unit or none of them, and return its results or its error."""
        if _only_appends(units):
            return self._append(connection, units)
        outcomes: list[Outcome] = []
        for _, group in groupby(units, lambda unit: _only_appends([unit])):
            alike = list(group)
            if _only_appends(alike):
                outcomes += self._append(connection, alike)
            else:
                outcomes += [self._take_steps(connection, unit) for unit in alike]
        return outcomes

    def _take_steps(self, connection: Connection, unit: Unit) -> Outcome:
        start = self.position
        results: list[AppendResult] = []
        taken: Outcome = results
        connection.execute("SAVEPOINT unit")
        try:
            for step in unit:
                if isinstance(step, Append):
                    (outcome,) = self._append(connection, [[step]])
                    if isinstance(outcome, EventSourceError):
                        raise outcome
                    results += outcome
                else:
                    take_step(connection, step, self._recorded_at)
        except EventSourceError as error:
            connection.execute("ROLLBACK TO unit")
            self._versions.clear()
            self.position = start
            taken = error
        connection.execute("RELEASE unit")
        return taken

    def _append(self, connection: Connection, units: Sequence[Sequence[Append]]) -> list[Outcome]:
        start = self.position
        try:
            outcomes = [self._plan(connection, unit) for unit in units]
            self._insert(connection)
            return outcomes
        except Exception as error:
            if getattr(error, "sqlite_errorname", "") != "SQLITE_CONSTRAINT_UNIQUE":
                raise
        # Some event id is stored already: find out whose by taking everything apart.
        self._take_back(connection, start)
        if len(units) > 1:
            return [outcome for unit in units for outcome in self._append(connection, [unit])]
        if len(units[0]) == 1:
            (append,) = units[0]
            try:
                return [[append.repeated(self._stored(connection, append))]]
            except EventSourceError as error:
                return [error]
        results: list[AppendResult] = []
        for append in units[0]:
            (outcome,) = self._append(connection, [[append]])
            if isinstance(outcome, EventSourceError):
                self._take_back(connection, start)
                return [outcome]
            results += outcome
        return [results]

    def _plan(self, connection: Connection, unit: Sequence[Append]) -> Outcome:
        start = self.position
        try:
            return [self._plan_append(connection, append) for append in unit]
        except EventSourceError as error:
            if self.position != start:
                self._insert(connection)
                self._take_back(connection, start)
            return error

    def _plan_append(self, connection: Connection, append: Append) -> AppendResult:
        aggregate_id, aggregate_type = _column(append.aggregate_id), append.aggregate_type
        stream = (aggregate_id, aggregate_type)
        version = self._versions.get(stream)
        if version is None:
            version = connection.execute(_VERSION, stream).fetchone()[0] or 0
        if not append.expects(version):
            self._insert(connection)
            stored = self._stored(connection, append)
            if stored:
                return append.repeated(stored)
            versions = append.unexpected(version)
            between = (*stream, versions.start, versions.stop - 1)
            found = connection.execute(_TYPES_BETWEEN, between) if versions else ()
            raise append.conflict(version, [row[0] for row in found])
        result = append.result(version + 1, self.position + 1, self._now)
        for encoded in append.events:
            version += 1
            self.position += 1
            self._values += (
                self.position,
                aggregate_type,
                aggregate_id,
                version,
                encoded.event_id.bytes,
                encoded.event_type,
                encoded.schema_version,
                self._recorded_at,
                to_microseconds(encoded.occurred_at) if encoded.occurred_at else None,
                encoded.metadata_json,
                encoded.payload,
            )
        self._versions[stream] = version
        return result

    def _insert(self, connection: Connection) -> None:
        """Insert what is planned, many rows a statement: SQLite works without Python's lock."""
        values, self._values = self._values, []
        first = 0
        for statement, count in _INSERTS:
            while len(values) - first >= count:
                connection.execute(statement, values[first : first + count])
                first += count

    def _take_back(self, connection: Connection, position: int) -> None:
        """Forget what this transaction has planned or inserted after a position."""
        self._values = []
        self._versions.clear()
        self.position = position
        connection.execute("DELETE FROM events WHERE position > ?", (position,))

    def _stored(self, connection: Connection, append: Append) -> dict[UUID, Read]:
        stored: dict[UUID, Read] = {}
        for encoded in append.events:
            rows = connection.execute(_BY_ID, (encoded.event_id.bytes,)).fetchall()
            if rows:
                (stored[encoded.event_id],) = decode_rows(rows)
        return stored

    def aggregate_types(self, connection: Connection, aggregate_id: AggregateId) -> list[str]:
        rows = connection.execute(_AGGREGATE_TYPES, (_column(aggregate_id),)).fetchall()
        return [row[0] for row in rows]

    def page(self, connection: Connection, request: PageRequest) -> tuple[list[Row], int, bool]:
        """The rows of a page, where to resume, and whether it reaches the end."""
        if request.stream is not None:
            return self._stream_page(connection, request)
        self.look(connection)
        low, high = _bounds(request)
        high = min(high, self.position)
        if request.event_types or request.aggregate_types or request.slices:
            at_most = _HASHED_AT_MOST if request.slices else _SEARCHED_AT_MOST
            if request.backwards:
                low = max(low, high - at_most + 1)
            else:
                high = min(high, low + at_most - 1)
        rows = _select(connection, request, "position", low, high)
        if len(rows) == request.limit:
            return rows, rows[-1][0] + (-1 if request.backwards else 1), False
        if request.backwards:
            return rows, low - 1, low <= (request.stop or 1)
        end = self.position if request.stop is None else min(request.stop, self.position)
        return rows, max(low, high + 1), high >= end

    def _stream_page(
        self, connection: Connection, request: PageRequest
    ) -> tuple[list[Row], int, bool]:
        rows = _select(connection, request, "version", *_bounds(request))
        if len(rows) < request.limit:
            return rows, 0, True
        return rows, rows[-1][3] + (-1 if request.backwards else 1), False


def _only_appends(units: Sequence[Unit]) -> TypeGuard[Sequence[Sequence[Append]]]:
    for unit in units:
        for step in unit:
            if type(step) is not Append:
                return False
    return True


def _bounds(request: PageRequest) -> tuple[int, int]:
    low, high = request.start, request.stop
    if request.backwards:
        low, high = high, low
    return min(low or 0, _LARGEST), _LARGEST if high is None else min(high, _LARGEST)


def _select(
    connection: Connection, request: PageRequest, order: str, low: int, high: int
) -> list[Row]:
    where = [f"{order} BETWEEN ? AND ?"]
    values: list[object] = [low, high]
    if request.stream is not None:
        aggregate_type, aggregate_id = request.stream
        where.append("aggregate_id = ? AND aggregate_type = ?")
        values += [_column(aggregate_id), aggregate_type]
    for column, names in (
        ("event_type", request.event_types),
        ("aggregate_type", request.aggregate_types),
    ):
        if names:
            where.append(f"{column} IN ({', '.join('?' * len(names))})")
            values += names
    if request.slices is not None:  # last, because it costs more than all others
        where.append("slice_of(aggregate_type, aggregate_id) BETWEEN ? AND ?")
        values += request.slices
    direction = "DESC" if request.backwards else "ASC"
    statement = (
        f"SELECT {_SELECTED} FROM events WHERE {' AND '.join(where)} "  # noqa: S608  (names of columns and marks only)
        f"ORDER BY {order} {direction} LIMIT ?"
    )
    return connection.execute(statement, (*values, min(request.limit, _LARGEST))).fetchall()


def _column(aggregate_id: AggregateId) -> str | bytes:
    return aggregate_id.bytes if isinstance(aggregate_id, UUID) else aggregate_id


def _slice_of(aggregate_type: str, column: str | bytes) -> int:
    aggregate_id = column if isinstance(column, str) else uuid_of(column)
    return slice_of(stream_id_of(aggregate_type, aggregate_id))


def decode_rows(rows: Sequence[Row]) -> DecodedRows[Row]:
    """The events of rows, in the reader's own task, where its context variables are."""
    return DecodedRows(rows, _decoded)


def _decoded(rows: Sequence[Row]) -> Iterator[Read]:
    known, recorded_at = -1, EPOCH
    for row in rows:
        aggregate_id = row[2]
        if row[7] != known:
            known = row[7]
            recorded_at = from_microseconds(known)
        occurred_at = row[8]
        yield decode_stored(
            uuid_of(row[4]),
            row[5],
            aggregate_id if isinstance(aggregate_id, str) else uuid_of(aggregate_id),
            row[1],
            row[3],
            row[0],
            recorded_at,
            None if occurred_at is None else from_microseconds(occurred_at),
            row[9],
            row[6],
            row[10],
        )
