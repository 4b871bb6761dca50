-- The order in which events become visible, and the functions that append them.

-- Why a function: the server reads the condition of a trigger from its text before each statement,
-- and this one is short. The trigger's own function has nothing left to do, and is never called.
CREATE OR REPLACE FUNCTION es.announce() RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    RETURN pg_advisory_xact_lock_shared(
        'es.positions'::regclass::oid::int4,
        (coalesce(pg_sequence_last_value('es.positions'::regclass), 0) & 4294967295)::bit(32)::int4
    ) IS NULL;
END
$$;
CREATE OR REPLACE FUNCTION es.announced() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RETURN NULL;
END
$$;
CREATE OR REPLACE TRIGGER announce BEFORE INSERT ON es.events FOR EACH STATEMENT
    WHEN (es.announce()) EXECUTE FUNCTION es.announced();

-- The position of the last event up to which every event is visible to any snapshot taken after this
-- call, or will never be. Nothing is looked for if no position beyond `known` was given out.
CREATE OR REPLACE FUNCTION es.safe_position(known bigint) RETURNS bigint LANGUAGE plpgsql AS $$
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
        SELECT max(e.position) FROM es.events e
        WHERE e.position > known AND e.position <= least(given_out, announced)), known);
END
$$;

-- How far it is safe, as the position of a first row that holds nothing else, and then at most `most`
-- events up to there, from `low` to `high`: each statement here sees what the one before relied on.
CREATE OR REPLACE FUNCTION es.read_safe(known bigint, low bigint, high bigint, most bigint)
RETURNS SETOF es.events LANGUAGE plpgsql AS $$
DECLARE
    safe es.events;
BEGIN
    safe.position := es.safe_position(known);
    RETURN NEXT safe;
    RETURN QUERY SELECT e.* FROM es.events e
        WHERE e.position BETWEEN low AND least(high, safe.position) ORDER BY e.position LIMIT most;
END
$$;

-- Appends one event. The statuses of an append, here and below:
--   0 appended, 1 some of its event ids are stored already, 2 the stream is at another version,
--   3 another transaction is appending to the stream (ask again; `append_events` can wait).
-- The expected version is -1 for any, -2 for a stream that exists, and below that any, where the
-- stream is believed to have reached version -3 - expected. `version` is the stream's before.
--
-- A stream's last version is looked for from the version on that it is believed to have, and only if
-- it has not, from the beginning: without a lower bound the server would read what is left of the
-- page of the index, which may hold some hundred versions. The second look is a statement of its own,
-- because each part of a statement costs something, needed or not.
CREATE OR REPLACE FUNCTION es.append_event(
    aggregate_type text, aggregate_id text, expected bigint, event_id uuid, event_type text,
    schema_version int, occurred timestamptz, metadata text, payload text,
    OUT status int, OUT version bigint, OUT given bigint, OUT recorded timestamptz
) LANGUAGE plpgsql AS $$
#variable_conflict use_variable
DECLARE
    believed CONSTANT bigint := CASE WHEN expected < -2 THEN -3 - expected ELSE expected END;
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtextextended(
            aggregate_type || '-' || aggregate_id, 'es.events'::regclass::oid::bigint)) THEN
        status := 3;
        RETURN;
    END IF;
    -- In a snapshot of its own: what was committed before the lock was had is seen.
    SELECT e.version INTO version FROM es.events e
        WHERE (e.aggregate_id, e.aggregate_type, e.version)
            BETWEEN (aggregate_id, aggregate_type, believed)
            AND (aggregate_id, aggregate_type, 9223372036854775807)
        ORDER BY e.aggregate_id DESC, e.aggregate_type DESC, e.version DESC LIMIT 1;
    IF version IS NULL AND believed > 0 THEN
        SELECT e.version INTO version FROM es.events e
            WHERE (e.aggregate_id, e.aggregate_type, e.version)
                BETWEEN (aggregate_id, aggregate_type, 0) AND (aggregate_id, aggregate_type, believed)
            ORDER BY e.aggregate_id DESC, e.aggregate_type DESC, e.version DESC LIMIT 1;
    END IF;
    version := coalesce(version, 0);
    IF version <> expected THEN
        IF (version > 0 OR expected >= 0 OR expected = -2) AND EXISTS (
                SELECT FROM es.events e WHERE e.event_id = event_id) THEN
            status := 1;
            RETURN;
        ELSIF expected >= 0 OR (expected = -2 AND version = 0) THEN
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
CREATE OR REPLACE FUNCTION es.append_events(
    aggregate_types text[], aggregate_ids text[], same_as int[], expected bigint[], counts int[],
    append int[], place int[], event_ids uuid[], event_types text[], schema_versions int[],
    occurred timestamptz[], metadatas text[], payloads text[], wait boolean, atomic boolean,
    OUT statuses int[], OUT versions bigint[], OUT given bigint[], OUT recorded timestamptz
) LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
#variable_conflict use_variable
DECLARE
    seed CONSTANT bigint := 'es.events'::regclass::oid::bigint;
    appends CONSTANT int := cardinality(expected);
    one_kind CONSTANT text := aggregate_types[1];
    one_type CONSTANT text := event_types[1];
    latest bigint[];
    free boolean[];
    known bigint[];
    same int;
    version bigint;
    plain boolean := cardinality(same_as) = 0;
BEGIN
    IF wait THEN
        PERFORM pg_advisory_xact_lock(stream.key) FROM (
            SELECT DISTINCT hashtextextended(
                coalesce(aggregate_types[i], one_kind) || '-' || aggregate_ids[i], seed) AS key
            FROM generate_series(1, appends) i ORDER BY 1
        ) stream;
        free := array_fill(true, ARRAY[appends]);
    ELSE
        SELECT array_agg(pg_try_advisory_xact_lock(hashtextextended(
                coalesce(aggregate_types[i], one_kind) || '-' || aggregate_ids[i], seed)))
            INTO free FROM generate_series(1, appends) i;
        plain := plain AND NOT false = ANY (free);
    END IF;
    -- In a snapshot of its own: what was committed before the locks were had is seen.
    SELECT array_agg(CASE WHEN same_as[u.i] <> u.i THEN 0 ELSE coalesce((
            SELECT e.version FROM es.events e
            WHERE (e.aggregate_id, e.aggregate_type, e.version)
                BETWEEN (u.id, u.kind, u.believed) AND (u.id, u.kind, 9223372036854775807)
            ORDER BY e.aggregate_id DESC, e.aggregate_type DESC, e.version DESC LIMIT 1
        ), CASE WHEN u.believed <= 0 THEN 0 END) END)
        INTO versions FROM (
            SELECT i, aggregate_ids[i] AS id, coalesce(aggregate_types[i], one_kind) AS kind,
                CASE WHEN expected[i] < -2 THEN -3 - expected[i] ELSE expected[i] END AS believed
            FROM generate_series(1, appends) i
        ) u;
    IF array_position(versions, NULL) > 0 THEN
        SELECT array_agg(coalesce(versions[u.i], (
                SELECT e.version FROM es.events e
                WHERE (e.aggregate_id, e.aggregate_type, e.version)
                    BETWEEN (u.id, u.kind, 0) AND (u.id, u.kind, 9223372036854775807)
                ORDER BY e.aggregate_id DESC, e.aggregate_type DESC, e.version DESC LIMIT 1
            ), 0))
            INTO versions FROM (
                SELECT i, aggregate_ids[i] AS id, coalesce(aggregate_types[i], one_kind) AS kind
                FROM generate_series(1, appends) i
            ) u;
    END IF;
    IF NOT plain THEN
        FOR i IN 1..cardinality(same_as) LOOP
            versions[i] := versions[same_as[i]];
        END LOOP;
    END IF;
    IF versions <> expected THEN -- apart from the next condition, which is a query
        IF EXISTS (SELECT FROM unnest(versions, expected) u(now, asked)
                WHERE u.now <> u.asked AND (u.now > 0 OR u.asked >= 0 OR u.asked = -2)) THEN
            -- One by one: a join may be planned as a scan of the whole table, while it is small.
            SELECT array_agg(DISTINCT CASE appends WHEN 1 THEN 1 ELSE coalesce(u.append, u.nth) END)
                INTO known FROM unnest(append, event_ids) WITH ORDINALITY u(append, id, nth)
                WHERE (SELECT true FROM es.events e WHERE e.event_id = u.id LIMIT 1);
            plain := plain AND known IS NULL AND NOT EXISTS (
                SELECT FROM unnest(versions, expected) u(now, asked)
                WHERE u.now <> u.asked AND (u.asked >= 0 OR (u.asked = -2 AND u.now = 0)));
        END IF;
    END IF;
    statuses := array_fill(0, ARRAY[appends]);
    IF NOT plain THEN
        latest := versions;
        FOR i IN 1..appends LOOP
            same := coalesce(same_as[i], i);
            version := latest[same];
            versions[i] := version;
            IF NOT free[same] THEN
                statuses[i] := 3;
            ELSIF i = ANY (known) THEN
                statuses[i] := 1;
            ELSIF version = expected[i] OR (expected[i] < 0 AND (expected[i] <> -2 OR version > 0)) THEN
                latest[same] := version + coalesce(counts[i], 1);
            ELSE
                statuses[i] := 2;
            END IF;
        END LOOP;
        IF (atomic AND statuses && ARRAY[2, 3]) OR NOT 0 = ANY (statuses) THEN
            RETURN; -- an INSERT of no rows would be announced, and wait for locks, all the same
        END IF;
    END IF;
    recorded := clock_timestamp();
    -- Elements by their numbers, here and above: unnest would copy each array.
    WITH inserted AS (
        INSERT INTO es.events (version, recorded_at, occurred_at, event_id, schema_version,
            event_type, aggregate_type, aggregate_id, metadata, payload)
        SELECT versions[u.append] + u.place, recorded, occurred[u.i], event_ids[u.i],
            coalesce(schema_versions[u.i], 1), coalesce(event_types[u.i], one_type),
            coalesce(aggregate_types[u.append], one_kind), aggregate_ids[u.append],
            metadatas[u.i], payloads[u.i]
        FROM (
            SELECT i, CASE appends WHEN 1 THEN 1 ELSE coalesce(append[i], i) END AS append,
                CASE appends WHEN 1 THEN i ELSE coalesce(place[i], 1) END AS place
            FROM generate_series(1, cardinality(event_ids)) i
        ) u
        WHERE plain OR statuses[u.append] = 0
        RETURNING position
    )
    SELECT array_agg(inserted.position) INTO given FROM inserted;
END
$$;
