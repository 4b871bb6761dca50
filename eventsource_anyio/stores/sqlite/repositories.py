"""Checkpoints and the outbox in the SQLite file: their tables, and the statements on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from ...ids import uuid_of
from ...repositories.checkpoint import SaveCheckpoint
from ...repositories.outbox import AddMessages, OutboxStep, StoredMessage, decode_message
from ..records import from_microseconds

if TYPE_CHECKING:
    from sqlite3 import Connection

MessageRow: TypeAlias = tuple[bytes, str, str, bytes, bytes | None, int, int]

CHECKPOINTS = """
CREATE TABLE checkpoints (
    name TEXT PRIMARY KEY,
    position INTEGER NOT NULL
) WITHOUT ROWID
"""
# AUTOINCREMENT, because an outbox is empty now and then, and its positions never start again.
OUTBOX = """
CREATE TABLE outbox (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    message_id BLOB NOT NULL UNIQUE,
    topic TEXT NOT NULL,
    key TEXT NOT NULL,
    payload BLOB NOT NULL,
    metadata TEXT,
    recorded_at INTEGER NOT NULL
)
"""
_GET = "SELECT position FROM checkpoints WHERE name = ?"
_SAVE = "INSERT OR REPLACE INTO checkpoints (name, position) VALUES (?, ?)"
_ADD = (
    "INSERT INTO outbox (message_id, topic, key, payload, metadata, recorded_at) "
    "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (message_id) DO NOTHING"
)
_REMOVE = "DELETE FROM outbox WHERE message_id = ?"
_PENDING = (
    "SELECT message_id, topic, key, payload, CAST(metadata AS BLOB), position, recorded_at "
    "FROM outbox ORDER BY position LIMIT ?"
)


def take_step(connection: Connection, step: SaveCheckpoint | OutboxStep, recorded_at: int) -> None:
    if isinstance(step, SaveCheckpoint):
        step.check(get_checkpoint(connection, step.name))
        connection.execute(_SAVE, (step.name, step.position))
    elif isinstance(step, AddMessages):
        connection.executemany(
            _ADD,
            [
                (
                    message.message_id.bytes,
                    message.topic,
                    message.key,
                    message.payload,
                    message.metadata_json,
                    recorded_at,
                )
                for message in step.messages
            ],
        )
    else:
        connection.executemany(_REMOVE, [(one.bytes,) for one in step.message_ids])


def get_checkpoint(connection: Connection, name: str) -> int:
    row = connection.execute(_GET, (name,)).fetchone()
    return row[0] if row else 0


def pending_rows(connection: Connection, limit: int) -> list[MessageRow]:
    return connection.execute(_PENDING, (limit,)).fetchall()


def decode_messages(rows: Sequence[MessageRow]) -> list[StoredMessage]:
    return [decode_message(uuid_of(row[0]), *row[1:6], from_microseconds(row[6])) for row in rows]
