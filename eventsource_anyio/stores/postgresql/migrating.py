"""Making the tables, and finding out whether they are there."""

from __future__ import annotations

from ...errors import StorageError
from .driver import Connection
from .pool import Pool
from .schema import Schema, migrations
from .statements import Statements


async def check(pool: Pool, statements: Statements, schema: Schema) -> str:
    """Raise if this is no store that can be used; the name of its channel."""
    ((migrated, events, encoding),) = await pool.fetch(statements.about)
    if encoding != "UTF8":
        raise StorageError(
            f"The database's encoding is {encoding}, and events are stored as UTF8.\n"
            "  Another encoding cannot hold every text.\n"
            "  Create the database anew: CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0."
        )
    version = (await pool.fetch(statements.version))[0][0] if migrated else 0
    if version < statements.newest:
        found = f"is at version {version}" if version else "holds no event store"
        raise StorageError(
            f"Schema {schema.name!r} {found}, and this program needs version {statements.newest}.\n"
            "  Its tables and functions are made, and brought up to date, by migrations.\n"
            "  Run `await store.migrate()` once, as a role that may create them."
        )
    return f"eventsource_{events}"


async def migrate(connection: Connection, schema: Schema, role: str | None) -> None:
    await connection.run("BEGIN ISOLATION LEVEL READ COMMITTED")
    # One after another: those who come later find the work done.
    await connection.fetch(
        "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", f"migrate {schema!r}"
    )
    await connection.run(schema.beginning())
    ((version,),) = await connection.fetch(Statements(schema).version)
    for migration in migrations():
        if migration.version > version:
            await connection.run(schema.step(migration))
    if role is not None:
        await connection.run(schema.grants(role))
    await connection.run("COMMIT")
