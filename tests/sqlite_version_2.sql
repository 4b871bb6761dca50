-- What version 2 of the SQLite store made: as version 1, and a checkpoint and a message.
PRAGMA journal_mode = WAL;
BEGIN IMMEDIATE;

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
);
CREATE TABLE checkpoints (
    name TEXT PRIMARY KEY,
    position INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE outbox (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    message_id BLOB NOT NULL UNIQUE,
    topic TEXT NOT NULL,
    key TEXT NOT NULL,
    payload BLOB NOT NULL,
    metadata TEXT,
    recorded_at INTEGER NOT NULL
);
PRAGMA application_id = 1702260340;
PRAGMA user_version = 2;

INSERT INTO events VALUES
(1, 'Thing', 'a', 1, x'00000000000000000000000000000001', 'eventsource_anyio.testing.Happened',
    1, 1700000000000000, NULL, '{"user":"ann"}', '{"number":7,"note":"old"}'),
(2, 'Thing', 'a', 2, x'00000000000000000000000000000002', 'eventsource_anyio.testing.Ended',
    1, 1700000000000001, 1600000000000000, NULL, '{}');
INSERT INTO checkpoints VALUES ('old', 2);
INSERT INTO outbox VALUES
(7, x'00000000000000000000000000000003', 'topic', '', x'01', NULL, 1700000000000002);
COMMIT;
