-- Events, and the only way to append them.
--
-- Why no reader misses an event: before a statement inserts, and so before it takes its first
-- position, the trigger `announce` takes a shared advisory lock whose key is the last position given
-- out, and keeps it to the end of the transaction. Whoever reads asks `safe_position` first: no
-- position up to its answer can become visible later. Shared locks wait for nobody, so this order
-- costs writers nothing. The sequence must keep CACHE 1.
--
-- A stream is looked up by comparing rows, which only the index on its versions can do: with `=`, a
-- planner whose statistics know nothing of a new aggregate type takes the index on the type, and
-- reads all of its events.
--
-- Why versions of a stream are in the order of positions: an append holds its stream's lock before
-- it looks for the version, and takes its positions afterwards.

CREATE SEQUENCE es.positions AS bigint CACHE 1;

CREATE TABLE es.events (
    position bigint NOT NULL DEFAULT nextval('es.positions'),
    version bigint NOT NULL,
    recorded_at timestamptz NOT NULL,
    occurred_at timestamptz,
    event_id uuid NOT NULL,
    schema_version integer NOT NULL,
    event_type text COLLATE "C" NOT NULL,
    aggregate_type text COLLATE "C" NOT NULL,
    aggregate_id text COLLATE "C" NOT NULL,
    metadata text,
    payload text NOT NULL,
    CONSTRAINT es_events_position PRIMARY KEY (position),
    CONSTRAINT es_events_event_id UNIQUE (event_id),
    CONSTRAINT es_events_version UNIQUE (aggregate_id, aggregate_type, version)
);
ALTER SEQUENCE es.positions OWNED BY es.events.position;
CREATE INDEX es_events_event_type ON es.events (event_type, position);
CREATE INDEX es_events_aggregate_type ON es.events (aggregate_type, position);

DO $$
BEGIN
    ALTER TABLE es.events ALTER COLUMN payload SET COMPRESSION lz4;
EXCEPTION WHEN feature_not_supported THEN
    NULL; -- a server built without lz4 compresses by its own method
END
$$;
