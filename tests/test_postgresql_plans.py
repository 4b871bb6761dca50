"""The indexes that PostgreSQL takes, where its statistics mislead it or say nothing."""

from __future__ import annotations

from itertools import product

import asyncpg  # type: ignore[import-untyped]
import attrs
import pytest
from msgspec.structs import replace

from eventsource_anyio import ANY, DomainEvent, PostgreSQLEventStore, ReadOptions
from eventsource_anyio.stores.postgresql.schema import Schema
from eventsource_anyio.stores.postgresql.statements import Statements
from eventsource_anyio.stores.reading import PageRequest

# asyncpg is used beside the store, and it is the server that is asked: one event loop is enough.
pytestmark = pytest.mark.parametrize("anyio_backend", ["asyncio"], scope="module")


@attrs.frozen
class Counted(DomainEvent):
    number: int


FILL = """
INSERT INTO eventsource.events (version, recorded_at, event_id, schema_version, event_type,
    aggregate_type, aggregate_id, payload)
SELECT 1, now(), gen_random_uuid(), 1, 'Counted', $1, $1 || n, '{"number":1}'
FROM generate_series(1, 20000) n
"""
SCANS = """
SELECT indexrelname, idx_scan FROM pg_stat_all_indexes WHERE schemaname = 'eventsource'
"""


async def test_a_stream_is_found_by_its_own_index(postgresql_dsn: str) -> None:
    """Also when the statistics know nothing of its aggregate type, which has many events."""
    store = PostgreSQLEventStore(postgresql_dsn, connections=1)
    await store.migrate()
    connection = await asyncpg.connect(postgresql_dsn)
    await connection.execute("ALTER TABLE eventsource.events SET (autovacuum_enabled = false)")
    await connection.execute(FILL, "Known")
    await connection.execute("ANALYZE eventsource.events")
    await connection.execute(FILL, "New")
    await connection.execute("SELECT pg_stat_reset()")
    async with store:
        for number in range(8):  # more than the five times that a plan is made for its values
            await store.append_events("New9", "New", [Counted(number)], ANY)
            await store.append_events("New8", "New", [Counted(1), Counted(2)], ANY)
            async with store.transaction() as tx:
                await tx.append_events("New7", "New", [Counted(number)], ANY)
                await tx.append_events(f"6-{number}", "New", [Counted(number)], 0)
            assert len(await store.get_events("New9")) == number + 2
            backwards = ReadOptions(backwards=True, limit=1, event_types=(Counted,))
            async for stored in store.read_stream("New-New8", backwards):
                assert stored.version == 2 * number + 3
    # Closed: the server's process reports what it did before it ends, and is waited for.
    while await connection.fetchval(
        "SELECT count(*) > 1 FROM pg_stat_activity WHERE datname = current_database()"
    ):
        pass
    scans = dict(await connection.fetch(SCANS))
    await connection.close()
    assert scans["events_version"] >= 8 * 6
    assert scans["events_aggregate_type"] == 0
    assert scans["events_event_type"] == 0


@pytest.mark.parametrize("plans", ["force_custom_plan", "force_generic_plan"])
async def test_slices_change_no_plan(postgresql_dsn: str, plans: str) -> None:
    """The planner does not know how many events are in a slice, and is not asked."""
    store = PostgreSQLEventStore(postgresql_dsn, connections=1)
    await store.migrate()
    connection = await asyncpg.connect(postgresql_dsn)
    for kind in ("One", "Two", "Three"):
        await connection.execute(FILL, kind)
    await connection.execute("VACUUM ANALYZE eventsource.events")
    await connection.execute(f"SET plan_cache_mode = {plans}")
    statements = Statements(Schema())

    async def plan(request: PageRequest) -> tuple[set[str], set[str]]:
        """The indexes and what else there is, of a page in the middle."""
        statement, values = statements.page(request, 5_001, 55_000, request.limit)
        types = ["bigint"] * 3 + ["text[]"] * (len(values) - 3)
        if request.slices:
            types[-2:] = ["bigint"] * 2
        await connection.execute(f"PREPARE page ({', '.join(types)}) AS {statement}")
        given = ", ".join(
            f"'{{{','.join(value)}}}'" if isinstance(value, list) else str(value)
            for value in values
        )
        rows = await connection.fetch(f"EXPLAIN (COSTS OFF) EXECUTE page ({given})")
        await connection.execute("DEALLOCATE page")
        steps = [row[0].strip().removeprefix("->  ") for row in rows]
        return (
            {step for step in steps if "Index" in step and " using " in step},
            {step for step in steps if "Scan on" in step or "Gather" in step}
            - {"Subquery Scan on every"},
        )

    for event_types, aggregate_types, backwards in product(
        ((), ("Counted",), ("Counted", "unknown")), ((), ("One",), ("One", "Three")), (False, True)
    ):
        request = PageRequest(None, None, None, backwards, 500, event_types, aggregate_types, None)
        indexes, others = await plan(request)
        assert indexes
        assert not others
        assert await plan(replace(request, slices=(7, 7))) == (indexes, set())
    await connection.close()
