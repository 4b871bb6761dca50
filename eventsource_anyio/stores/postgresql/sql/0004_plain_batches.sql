-- `append_events` as before, and faster where nothing is special about a batch: each append is of one
-- event, to a stream of its own, which is at the version that was expected. Then no loop looks at
-- each of them, and the insert joins nothing.
--
-- `aggregate_types` and `event_types` may hold one element if it is that of all.
CREATE OR REPLACE FUNCTION es.append_events(
    aggregate_types text[], aggregate_ids text[], same_as int[], expected bigint[], counts int[],
    append int[], place int[], event_ids uuid[], event_types text[], schema_versions int[],
    occurred timestamptz[], metadatas text[], payloads text[], wait boolean, atomic boolean,
    OUT statuses int[], OUT versions bigint[], OUT given bigint[], OUT recorded timestamptz
) LANGUAGE plpgsql AS $$
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
            SELECT DISTINCT hashtextextended(coalesce(u.kind, one_kind) || '-' || u.id, seed) AS key
            FROM unnest(aggregate_types, aggregate_ids) u(kind, id) ORDER BY 1
        ) stream;
        free := array_fill(true, ARRAY[appends]);
    ELSE
        SELECT array_agg(pg_try_advisory_xact_lock(
                hashtextextended(coalesce(u.kind, one_kind) || '-' || u.id, seed)))
            INTO free FROM unnest(aggregate_types, aggregate_ids) u(kind, id);
        plain := plain AND NOT false = ANY (free);
    END IF;
    -- In a snapshot of its own: what was committed before the locks were had is seen.
    SELECT array_agg(coalesce((
            SELECT CASE WHEN e.aggregate_id = u.id AND e.aggregate_type = coalesce(u.kind, one_kind)
                THEN e.version END
            FROM es.events e
            WHERE (e.aggregate_id, e.aggregate_type, e.version)
                <= (u.id, coalesce(u.kind, one_kind), 9223372036854775807)
            ORDER BY e.aggregate_id DESC, e.aggregate_type DESC, e.version DESC LIMIT 1), 0))
        INTO versions FROM unnest(aggregate_types, aggregate_ids) u(kind, id);
    IF EXISTS (SELECT FROM unnest(versions, expected) u(now, asked)
            WHERE u.now <> u.asked AND (u.now > 0 OR u.asked <> -1)) THEN
        plain := false;
        SELECT array_agg(DISTINCT CASE appends WHEN 1 THEN 1 ELSE coalesce(u.append, u.nth) END)
            INTO known
            FROM unnest(append, event_ids) WITH ORDINALITY u(append, id, nth)
            JOIN es.events e ON e.event_id = u.id;
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
            ELSIF version = expected[i] OR expected[i] = -1 OR (expected[i] = -2 AND version > 0) THEN
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
    IF plain AND appends > 1 AND cardinality(append) = 0 THEN
        WITH inserted AS (
            INSERT INTO es.events (version, recorded_at, occurred_at, event_id, schema_version,
                event_type, aggregate_type, aggregate_id, metadata, payload)
            SELECT u.version + 1, recorded, u.occurred, u.event_id, coalesce(u.schema_version, 1),
                coalesce(u.event_type, one_type), coalesce(u.kind, one_kind), u.id,
                u.metadata, u.payload
            FROM unnest(versions, aggregate_types, aggregate_ids, event_ids, event_types,
                schema_versions, occurred, metadatas, payloads)
                u(version, kind, id, event_id, event_type, schema_version, occurred, metadata,
                payload)
            RETURNING position
        )
        SELECT array_agg(inserted.position) INTO given FROM inserted;
    ELSIF appends > 1 THEN
        WITH inserted AS (
            INSERT INTO es.events (version, recorded_at, occurred_at, event_id, schema_version,
                event_type, aggregate_type, aggregate_id, metadata, payload)
            SELECT versions[coalesce(u.append, u.nth)] + coalesce(u.place, 1), recorded,
                u.occurred, u.event_id, coalesce(u.schema_version, 1),
                coalesce(u.event_type, one_type), coalesce(stream.kind, one_kind), stream.id,
                u.metadata, u.payload
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
    ELSE
        version := versions[1];
        WITH inserted AS (
            INSERT INTO es.events (version, recorded_at, occurred_at, event_id, schema_version,
                event_type, aggregate_type, aggregate_id, metadata, payload)
            SELECT version + u.place, recorded, u.occurred, u.event_id,
                coalesce(u.schema_version, 1), coalesce(u.event_type, one_type), one_kind,
                aggregate_ids[1], u.metadata, u.payload
            FROM unnest(event_ids, event_types, schema_versions, occurred, metadatas, payloads)
                WITH ORDINALITY u(event_id, event_type, schema_version, occurred, metadata, payload,
                place)
            RETURNING position
        )
        SELECT array_agg(inserted.position) INTO given FROM inserted;
    END IF;
END
$$;
