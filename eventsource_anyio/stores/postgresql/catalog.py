"""What the doctor asks the server. It looks names up, and so fails at nothing that is missing."""

from __future__ import annotations

SESSION = """
SELECT current_user::text, r.rolsuper, pg_is_in_recovery(),
    extract(epoch FROM clock_timestamp())::float8,
    (SELECT sum(numbackends)::int FROM pg_stat_database), r.rolconnlimit, d.datconnlimit
FROM pg_roles r, pg_database d WHERE r.rolname = current_user AND d.datname = current_database()
"""
# What is there of the names wanted, by whom it may be used, and the bodies of the functions.
OBJECTS = """
SELECT want.name, want.privilege, coalesce(c.oid, p.oid) IS NOT NULL,
    CASE WHEN p.oid IS NOT NULL THEN has_function_privilege(p.oid, want.privilege)
        WHEN c.relkind = 'S' THEN has_sequence_privilege(c.oid, want.privilege)
        WHEN c.oid IS NOT NULL THEN has_table_privilege(c.oid, want.privilege) END,
    p.prosrc
FROM unnest($2::text[], $3::text[]) want(name, privilege)
LEFT JOIN pg_namespace n ON n.nspname = $1
LEFT JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = want.name
    AND want.privilege <> 'EXECUTE'
LEFT JOIN pg_proc p ON p.pronamespace = n.oid AND p.proname = want.name
    AND want.privilege = 'EXECUTE'
UNION ALL SELECT $1, 'USAGE', true, has_schema_privilege(oid, 'USAGE'), NULL
FROM pg_namespace WHERE nspname = $1
"""
INDEXES = """
SELECT want.name FROM unnest($2::text[]) want(name) WHERE NOT EXISTS (
    SELECT FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
    JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = $1 AND c.relname = want.name AND i.indisvalid)
"""
EVENTS = """
SELECT c.relpersistence = 'u', row_security_active(c.oid),
    EXISTS (SELECT FROM pg_subscription_rel WHERE srrelid = c.oid),
    pg_has_role(c.relowner, 'USAGE'), (SELECT coalesce(string_agg(p, ', '), '')
        FROM unnest(ARRAY['UPDATE', 'DELETE', 'TRUNCATE']) p WHERE has_table_privilege(c.oid, p)),
    s.seqcache, s.seqcycle OR s.seqincrement <> 1, t.tgenabled::text, t.tgtype::int
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_class q ON q.relnamespace = n.oid AND q.relname = $3
LEFT JOIN pg_sequence s ON s.seqrelid = q.oid
LEFT JOIN pg_trigger t ON t.tgrelid = c.oid AND t.tgname = 'announce'
WHERE n.nspname = $1 AND c.relname = $2
"""
POSITIONS = """
SELECT coalesce((SELECT max(position) FROM es.events), 0),
    (SELECT last_value - (NOT is_called)::int FROM es.positions)
"""
# An insert of no rows, which has to leave the lock that every insert takes.
REHEARSAL = """
DO $$
DECLARE
    before bigint := coalesce(pg_sequence_last_value('es.positions'::regclass), 0);
BEGIN
    INSERT INTO es.events SELECT * FROM es.events WHERE false;
    IF NOT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2
            AND classid = 'es.positions'::regclass::oid AND pid = pg_backend_pid()
            AND (objid::bigint - before) & 4294967295
                <= coalesce(pg_sequence_last_value('es.positions'::regclass), 0) - before) THEN
        RAISE EXCEPTION 'not announced';
    END IF;
END
$$
"""
# Who has appended and not committed, by the lock that announces it. A transaction that is prepared
# has no session, and is known by its number.
HOLDERS = """
SELECT DISTINCT l.virtualtransaction, l.pid, coalesce(a.application_name, ''), a.usename::text,
    extract(epoch FROM clock_timestamp() - coalesce(a.xact_start, p.prepared))::float8, p.gid
FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid
LEFT JOIN pg_locks x ON x.virtualtransaction = l.virtualtransaction AND x.pid IS NULL
    AND l.pid IS NULL AND x.locktype = 'transactionid'
LEFT JOIN pg_prepared_xacts p ON p.transaction = x.transactionid
WHERE l.locktype = 'advisory' AND l.objsubid = 2
    AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND l.classid = (SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = $1 AND c.relname = $2)
"""
