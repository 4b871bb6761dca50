"""What the SQLite file holds beside the events: the tables, and the statements on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from ...ids import uuid_of
from ...repositories.checkpoint import SaveCheckpoint
from ...repositories.document import (
    DeleteDocument,
    DeleteDocuments,
    Document,
    DocumentChange,
    DocumentStep,
    EncodedDocument,
    SaveDocuments,
    changes,
    decode_document,
)
from ...repositories.outbox import AddMessages, OutboxStep, StoredMessage, decode_message
from ..records import from_microseconds

if TYPE_CHECKING:
    from sqlite3 import Connection

MessageRow: TypeAlias = tuple[bytes, str, str, bytes, bytes | None, int, int]
DocumentRow: TypeAlias = tuple[str, bytes, bytes]
OtherStep: TypeAlias = SaveCheckpoint | OutboxStep | DocumentStep

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
DOCUMENTS = """
CREATE TABLE documents (
    collection TEXT NOT NULL,
    key TEXT NOT NULL,
    revision BLOB NOT NULL,
    value TEXT NOT NULL,
    updated_at INTEGER NOT NULL,
    PRIMARY KEY (collection, key)
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
    "FROM outbox WHERE position > ? ORDER BY position LIMIT ?"
)

_REVISION = "SELECT revision FROM documents WHERE collection = ? AND key = ?"
_SAVE_DOCUMENT = (
    "INSERT INTO documents (collection, key, revision, value, updated_at) VALUES (?, ?, ?, ?, ?) "
    "ON CONFLICT (collection, key) DO UPDATE SET revision = excluded.revision, "
    "value = excluded.value, updated_at = excluded.updated_at"
)
_DELETE_DOCUMENT = "DELETE FROM documents WHERE collection = ? AND key = ?"
_DELETE_DOCUMENTS = "DELETE FROM documents WHERE collection = ?"
_BY_KEY = (
    "SELECT key, revision, CAST(value AS BLOB) FROM documents WHERE collection = ? AND key = ?"
)
_AFTER = (
    "SELECT key, revision, CAST(value AS BLOB) FROM documents WHERE collection = ? AND key > ? "
    "ORDER BY key LIMIT ?"
)


def take_step(connection: Connection, step: OtherStep, recorded_at: int) -> None:
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
    elif isinstance(step, SaveDocuments | DeleteDocument):
        for change in changes(step):
            _change_document(connection, change, recorded_at)
    elif isinstance(step, DeleteDocuments):
        connection.execute(_DELETE_DOCUMENTS, (step.collection,))
    else:
        connection.executemany(_REMOVE, [(one.bytes,) for one in step.message_ids])


def _change_document(connection: Connection, change: DocumentChange, recorded_at: int) -> None:
    name = (change.collection, change.key)
    row = connection.execute(_REVISION, name).fetchone()
    change.check(uuid_of(row[0]) if row else None)
    if isinstance(change, EncodedDocument):
        values = (*name, change.revision.bytes, change.value_json, recorded_at)
        connection.execute(_SAVE_DOCUMENT, values)
    else:
        connection.execute(_DELETE_DOCUMENT, name)


def get_checkpoint(connection: Connection, name: str) -> int:
    row = connection.execute(_GET, (name,)).fetchone()
    return row[0] if row else 0


def pending_rows(connection: Connection, limit: int, after: int) -> list[MessageRow]:
    return connection.execute(_PENDING, (after, limit)).fetchall()


def decode_messages(rows: Sequence[MessageRow]) -> list[StoredMessage]:
    return [decode_message(uuid_of(row[0]), *row[1:6], from_microseconds(row[6])) for row in rows]


def documents_by_key(
    connection: Connection, collection: str, keys: Sequence[str]
) -> list[DocumentRow]:
    found = [connection.execute(_BY_KEY, (collection, key)).fetchone() for key in keys]
    return [row for row in found if row]


def documents_after(
    connection: Connection, collection: str, after: str, limit: int
) -> list[DocumentRow]:
    return connection.execute(_AFTER, (collection, after, limit)).fetchall()


def decode_documents(collection: str, rows: Sequence[DocumentRow]) -> list[Document]:
    return [decode_document(collection, row[0], uuid_of(row[1]), row[2]) for row in rows]
