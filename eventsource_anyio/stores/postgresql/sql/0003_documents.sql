-- Small JSON values by collection and key, each with a revision that its writer made.

CREATE TABLE es.documents (
    collection text COLLATE "C" NOT NULL,
    key text COLLATE "C" NOT NULL,
    revision uuid NOT NULL,
    value jsonb NOT NULL,
    updated_at timestamptz NOT NULL,
    CONSTRAINT es_documents_key PRIMARY KEY (collection, key)
) WITH (fillfactor = 50); -- updated in place, again and again

-- Writes documents, of which no two are the same: all of them or none. One element a document: a
-- null revision deletes it. It is written only if its revision is `expected`, where that is not
-- null, and if there is none, where `absent`. `conflict` is the number, from 1, of the first that
-- is at another revision, `actual`, or does not exist; null if all were written.
--
-- Every call locks its documents in the order of their keys, those too that are not there yet: two
-- calls, or two transactions of one call each, never wait for each other. So it first inserts what
-- is missing and locks the rest, by an update that changes nothing, and compares when nobody else
-- can change anything any more.
CREATE FUNCTION es.write_documents(
    collections text[], keys text[], revisions uuid[], contents text[], expected uuid[],
    absent boolean[], OUT conflict int, OUT actual uuid
) LANGUAGE plpgsql AS $$
DECLARE
    now CONSTANT timestamptz := clock_timestamp();
    added bigint[] := '{}';
    gone record;
BEGIN
    IF true = ANY (absent) OR cardinality(array_remove(expected, NULL)) > 0
            OR array_position(revisions, NULL) IS NOT NULL THEN
        WITH asked AS MATERIALIZED (
            SELECT u.* FROM unnest(collections, keys, revisions, contents)
                WITH ORDINALITY u(collection, key, revision, content, nth)
        ), inserted AS (
            INSERT INTO es.documents AS d (collection, key, revision, value, updated_at)
            SELECT a.collection, a.key, coalesce(a.revision, gen_random_uuid()),
                coalesce(a.content, 'null')::jsonb, now
            FROM asked a ORDER BY a.collection COLLATE "C", a.key COLLATE "C"
            ON CONFLICT (collection, key) DO UPDATE SET updated_at = now WHERE false
            RETURNING d.collection, d.key
        )
        SELECT coalesce(array_agg(a.nth), '{}') INTO added
            FROM asked a JOIN inserted i ON i.collection = a.collection AND i.key = a.key;
        -- In a snapshot of its own: what was committed before the locks were had is seen.
        SELECT found.nth, found.revision INTO conflict, actual FROM (
            SELECT u.nth, u.expected, u.absent, CASE WHEN u.nth <> ALL (added) THEN (
                SELECT d.revision FROM es.documents d
                WHERE d.collection = u.collection AND d.key = u.key) END AS revision
            FROM unnest(collections, keys, expected, absent)
                WITH ORDINALITY u(collection, key, expected, absent, nth)
            ) found
            WHERE (found.absent AND found.revision IS NOT NULL)
                OR (found.expected IS NOT NULL AND found.revision IS DISTINCT FROM found.expected)
            ORDER BY found.nth LIMIT 1;
        -- One by one, for the sake of the index: a join of few with many may be planned otherwise.
        FOR gone IN
            SELECT u.collection, u.key FROM unnest(collections, keys, revisions)
                WITH ORDINALITY u(collection, key, revision, nth)
            WHERE CASE WHEN conflict IS NULL THEN u.revision IS NULL ELSE u.nth = ANY (added) END
        LOOP
            DELETE FROM es.documents d WHERE d.collection = gone.collection AND d.key = gone.key;
        END LOOP;
        IF conflict IS NOT NULL THEN
            RETURN;
        END IF;
    END IF;
    INSERT INTO es.documents AS d (collection, key, revision, value, updated_at)
        SELECT u.collection, u.key, u.revision, u.content::jsonb, now
        FROM unnest(collections, keys, revisions, contents)
            WITH ORDINALITY u(collection, key, revision, content, nth)
        WHERE u.revision IS NOT NULL AND u.nth <> ALL (added)
        ORDER BY u.collection COLLATE "C", u.key COLLATE "C"
        ON CONFLICT (collection, key) DO UPDATE SET revision = excluded.revision,
            value = excluded.value, updated_at = excluded.updated_at;
END
$$;
