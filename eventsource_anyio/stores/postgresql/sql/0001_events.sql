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

-- The lock is taken by the condition, which the server evaluates before each statement at a fifth of
-- the cost of a PL/pgSQL trigger; the function has nothing left to do.
CREATE FUNCTION es.announced() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RETURN NULL;
END
$$;
CREATE TRIGGER announce BEFORE INSERT ON es.events FOR EACH STATEMENT
    WHEN (pg_advisory_xact_lock_shared(
        'es.positions'::regclass::oid::int4,
        (coalesce(pg_sequence_last_value('es.positions'::regclass), 0) & 4294967295)::bit(32)::int4
    ) IS NULL)
    EXECUTE FUNCTION es.announced();

-- The position of the last event up to which every event is visible to any snapshot taken after this
-- call, or will never be. Nothing is looked for if no position beyond `known` was given out.
CREATE FUNCTION es.safe_position(known bigint) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    given_out bigint;
    announced bigint;
BEGIN
    IF pg_is_in_recovery() THEN
        RAISE EXCEPTION 'a replica does not know which appends are in flight'
            USING ERRCODE = 'read_only_sql_transaction';
    END IF;
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'the order of events is read in READ COMMITTED, this transaction is in %',
            upper(current_setting('transaction_isolation'))
            USING ERRCODE = 'invalid_transaction_state';
    END IF;
    -- First what was given out, then which appends are in flight; the caller reads after both.
    SELECT last_value - (NOT is_called)::int INTO given_out FROM es.positions;
    IF given_out <= known THEN
        RETURN given_out;
    END IF;
    SELECT min(given_out - (((given_out & 4294967295) - objid::bigint) & 4294967295))
        INTO announced
        FROM pg_locks
        WHERE locktype = 'advisory' AND objsubid = 2
            AND classid = 'es.positions'::regclass::oid
            AND database = (SELECT oid FROM pg_database WHERE datname = current_database());
    -- The last event up to there, not the last number: one that was rolled back may be given out again
    -- after a crash. What is visible is on disk, and so is what the sequence had given out by then.
    RETURN coalesce((
        SELECT max(e.position) FROM es.events e WHERE e.position <= least(given_out, announced)), 0);
END
$$;

-- Appends one event. The statuses of an append, here and below:
--   0 appended, 1 some of its event ids are stored already, 2 the stream is at another version,
--   3 another transaction is appending to the stream (ask again; `append_events` can wait).
-- The expected version is -1 for any, -2 for a stream that exists. `version` is the stream's before.
CREATE FUNCTION es.append_event(
    aggregate_type text, aggregate_id text, expected bigint, event_id uuid, event_type text,
    schema_version int, occurred timestamptz, metadata text, payload text,
    OUT status int, OUT version bigint, OUT given bigint, OUT recorded timestamptz
) LANGUAGE plpgsql AS $$
#variable_conflict use_variable
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtextextended(
            aggregate_type || '-' || aggregate_id, 'es.events'::regclass::oid::bigint)) THEN
        status := 3;
        RETURN;
    END IF;
    -- In a snapshot of its own: what was committed before the lock was had is seen.
    version := coalesce((
        SELECT CASE WHEN e.aggregate_id = aggregate_id AND e.aggregate_type = aggregate_type
            THEN e.version END
        FROM es.events e
        WHERE (e.aggregate_id, e.aggregate_type, e.version)
            <= (aggregate_id, aggregate_type, 9223372036854775807)
        ORDER BY e.aggregate_id DESC, e.aggregate_type DESC, e.version DESC LIMIT 1), 0);
    IF version <> expected THEN
        IF (version > 0 OR expected <> -1) AND EXISTS (
                SELECT FROM es.events e WHERE e.event_id = event_id) THEN
            status := 1;
            RETURN;
        ELSIF expected <> -1 AND (expected <> -2 OR version = 0) THEN
            status := 2;
            RETURN;
        END IF;
    END IF;
    status := 0;
    recorded := clock_timestamp();
    INSERT INTO es.events (version, recorded_at, occurred_at, event_id, schema_version,
            event_type, aggregate_type, aggregate_id, metadata, payload)
        VALUES (version + 1, recorded, occurred, event_id, schema_version,
            event_type, aggregate_type, aggregate_id, metadata, payload)
        RETURNING position INTO given;
END
$$;

-- Appends to any number of streams in one call, each with a status of its own.
-- If `atomic`, nothing is inserted unless each is 0 or 1; if `wait`, none is 3.
--
-- One element an append, in order: its stream, the number of the first append to the same stream
-- (`same_as`, from 1), the expected version, how many events. One element an event, in order: the
-- number of its append (`append`) and its place in it, from 1. Left empty, `same_as` means that all
-- streams differ; `counts`, `append` and `place` that each append has one event, or that all events
-- are of the only append; `schema_versions` that all are 1.
-- `versions` are those of the streams before each append, `given` the positions of the events of
-- the appends with status 0, in order.
CREATE FUNCTION es.append_events(
    aggregate_types text[], aggregate_ids text[], same_as int[], expected bigint[], counts int[],
    append int[], place int[], event_ids uuid[], event_types text[], schema_versions int[],
    occurred timestamptz[], metadatas text[], payloads text[], wait boolean, atomic boolean,
    OUT statuses int[], OUT versions bigint[], OUT given bigint[], OUT recorded timestamptz
) LANGUAGE plpgsql AS $$
#variable_conflict use_variable
DECLARE
    seed CONSTANT bigint := 'es.events'::regclass::oid::bigint;
    appends CONSTANT int := cardinality(expected);
    latest bigint[];
    free boolean[];
    known bigint[];
    same int;
    version bigint;
BEGIN
    IF wait THEN
        PERFORM pg_advisory_xact_lock(stream.key) FROM (
            SELECT DISTINCT hashtextextended(u.kind || '-' || u.id, seed) AS key
            FROM unnest(aggregate_types, aggregate_ids) u(kind, id) ORDER BY 1
        ) stream;
        free := array_fill(true, ARRAY[appends]);
    ELSE
        SELECT array_agg(pg_try_advisory_xact_lock(hashtextextended(u.kind || '-' || u.id, seed)))
            INTO free FROM unnest(aggregate_types, aggregate_ids) u(kind, id);
    END IF;
    SELECT array_agg(coalesce((
            SELECT CASE WHEN e.aggregate_id = u.id AND e.aggregate_type = u.kind
                THEN e.version END
            FROM es.events e
            WHERE (e.aggregate_id, e.aggregate_type, e.version)
                <= (u.id, u.kind, 9223372036854775807)
            ORDER BY e.aggregate_id DESC, e.aggregate_type DESC, e.version DESC LIMIT 1), 0))
        INTO versions FROM unnest(aggregate_types, aggregate_ids) u(kind, id);
    IF EXISTS (SELECT FROM unnest(versions, expected) u(now, asked)
            WHERE u.now <> u.asked AND (u.now > 0 OR u.asked <> -1)) THEN
        SELECT array_agg(DISTINCT CASE appends WHEN 1 THEN 1 ELSE coalesce(u.append, u.nth) END)
            INTO known
            FROM unnest(append, event_ids) WITH ORDINALITY u(append, id, nth)
            JOIN es.events e ON e.event_id = u.id;
    END IF;
    latest := versions;
    statuses := array_fill(0, ARRAY[appends]);
    FOR i IN 1..appends LOOP
        same := coalesce(same_as[i], i);
        version := latest[same];
        versions[i] := version;
        IF NOT free[same] THEN
            statuses[i] := 3;
        ELSIF i = ANY (known) THEN
            statuses[i] := 1;
        ELSIF version = expected[i] OR expected[i] = -1 OR (expected[i] = -2 AND version > 0) THEN
            latest[same] := version + coalesce(counts[i], 1);
        ELSE
            statuses[i] := 2;
        END IF;
    END LOOP;
    IF (atomic AND statuses && ARRAY[2, 3]) OR NOT 0 = ANY (statuses) THEN
        RETURN; -- an INSERT of no rows would be announced, and wait for locks, all the same
    END IF;
    recorded := clock_timestamp();
    IF appends > 1 THEN
        WITH inserted AS (
            INSERT INTO es.events (version, recorded_at, occurred_at, event_id, schema_version,
                event_type, aggregate_type, aggregate_id, metadata, payload)
            SELECT versions[coalesce(u.append, u.nth)] + coalesce(u.place, 1), recorded,
                u.occurred, u.event_id, coalesce(u.schema_version, 1), u.event_type,
                stream.kind, stream.id, u.metadata, u.payload
            FROM unnest(append, place, event_ids, event_types, schema_versions, occurred, metadatas,
                payloads) WITH ORDINALITY u(append, place, event_id, event_type, schema_version,
                occurred, metadata, payload, nth)
            JOIN unnest(aggregate_types, aggregate_ids) WITH ORDINALITY stream(kind, id, append)
                ON stream.append = coalesce(u.append, u.nth)
            WHERE statuses[coalesce(u.append, u.nth)] = 0
            ORDER BY u.nth
            RETURNING position
        )
        SELECT array_agg(inserted.position) INTO given FROM inserted;
    ELSIF statuses[1] = 0 THEN
        version := versions[1];
        WITH inserted AS (
            INSERT INTO es.events (version, recorded_at, occurred_at, event_id, schema_version,
                event_type, aggregate_type, aggregate_id, metadata, payload)
            SELECT version + u.place, recorded, u.occurred, u.event_id,
                coalesce(u.schema_version, 1), u.event_type, aggregate_types[1], aggregate_ids[1],
                u.metadata, u.payload
            FROM unnest(event_ids, event_types, schema_versions, occurred, metadatas, payloads)
                WITH ORDINALITY u(event_id, event_type, schema_version, occurred, metadata, payload,
                place)
            RETURNING position
        )
        SELECT array_agg(inserted.position) INTO given FROM inserted;
    END IF;
END
$$;
