"""The tables and functions of a store in PostgreSQL, and the migrations that make them.

The files in `sql/` are the migrations, in the order of their numbers, and never change once they
were released. In them `es.` stands for the schema and the prefix. A migration only adds, so that
programs of the version before go on working while a new one is rolled out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

import attrs

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")
_ROLE = re.compile(r"[^\0\"]{1,63}")


@attrs.frozen
class Migration:
    """One file of `sql/`: its number, its name and what is in it."""

    version: int
    name: str
    sql: str


@cache
def migrations() -> Sequence[Migration]:
    from importlib.resources import files  # slow to import

    found = [
        Migration(int(file.name[:4]), file.name[5:-4], file.read_text(encoding="utf-8"))
        for file in files("eventsource_anyio.stores.postgresql").joinpath("sql").iterdir()
        if file.name.endswith(".sql")
    ]
    return tuple(sorted(found, key=lambda one: one.version))


def _name(value: str) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError(
            f"a schema is named by a letter and then letters, digits and '_', 40 at most, "
            f"not {value!r}"
        )
    return value


def _prefix(value: str) -> str:
    return _name(value) if value != "" else ""


@attrs.frozen
class Schema:
    """Where the tables are: in a schema, their names after a prefix."""

    name: str = attrs.field(default="eventsource", converter=_name)
    prefix: str = attrs.field(default="", converter=_prefix)

    def sql(self, template: str) -> str:
        """Put the names in: `es.events` is a table or function, `es_events` a constraint."""
        where = f'"{self.name}".'

        def named(found: re.Match[str]) -> str:
            return f'{where if found[1] == "." else ""}"{self.prefix}{found[2]}"'

        # In one go, and not inside the names that were put in: they may begin with es_ as well.
        return re.sub(r'(?<!")\bes([._])([a-z_]+)', named, template)

    def beginning(self) -> str:
        """What comes before the first migration; it may be run again."""
        # Not IF NOT EXISTS, which asks for the privilege to create schemas where there is one.
        return self.sql(
            f"""DO $$
BEGIN
    IF to_regnamespace('"{self.name}"') IS NULL THEN
        CREATE SCHEMA "{self.name}";
    END IF;
END
$$;
CREATE TABLE IF NOT EXISTS es.migrations (
    version integer NOT NULL,
    name text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT es_migrations_version PRIMARY KEY (version)
);
"""
        )

    def step(self, migration: Migration) -> str:
        recorded = (
            f"INSERT INTO es.migrations (version, name) "  # noqa: S608  (a file's own number and name)
            f"VALUES ({migration.version}, '{migration.name}');\n"
        )
        return self.sql(f"{migration.sql}\n{recorded}")

    def grants(self, role: str) -> str:
        """What a role needs to use the store, and no more: it cannot change or delete an event."""
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise ValueError(f"role must be the name of a role, not {role!r}")
        granted = self.sql(
            f"""GRANT USAGE ON SCHEMA "{self.name}" TO :role;
GRANT SELECT, INSERT ON es.events TO :role;
GRANT SELECT, USAGE ON SEQUENCE es.positions TO :role;
GRANT EXECUTE ON FUNCTION es.announce, es.safe_position, es.read_safe, es.append_event,
    es.append_events TO :role;
GRANT SELECT, INSERT, UPDATE ON es.checkpoints TO :role;
GRANT EXECUTE ON FUNCTION es.save_checkpoint TO :role;
GRANT SELECT, INSERT, DELETE ON es.outbox TO :role;
GRANT SELECT, INSERT, UPDATE, DELETE ON es.documents TO :role;
GRANT EXECUTE ON FUNCTION es.write_documents TO :role;
GRANT SELECT ON es.migrations TO :role;
"""
        )
        return granted.replace(":role", f'"{role}"')


def migration_sql(
    *, schema: str = "eventsource", prefix: str = "", after: int = 0, role: str | None = None
) -> str:
    """The SQL that `PostgreSQLEventStore.migrate()` runs, as one transaction, to be read or run.

    `after` leaves out the migrations up to that version. `role` adds the grants for the role that
    the application runs as.
    """
    where = Schema(schema, prefix)
    parts = [where.beginning(), *(where.step(one) for one in migrations() if one.version > after)]
    if role is not None:
        parts.append(where.grants(role))
    return "\n".join(["BEGIN;", *parts, "COMMIT;", ""])
