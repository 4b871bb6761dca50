"""The gap stress test in its short form, and that it fails where the store's order is broken."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import anyio
import attrs
import psycopg
import pytest
from anyio.lowlevel import checkpoint

from eventsource_anyio import ANY, StorageError
from eventsource_anyio.stores.postgresql import PostgreSQLEventStore
from eventsource_anyio.testing import gap_stress as module
from eventsource_anyio.testing.gap_stress import GapStressResult, SubscriberResult, gap_stress
from eventsource_anyio.testing.samples import Happened

on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
NOBODY_ANNOUNCES = "DROP TRIGGER announce ON scratch.events"
READERS_GO_TO_THE_LAST_POSITION = """
    CREATE OR REPLACE FUNCTION scratch.safe_position(known bigint) RETURNS bigint LANGUAGE sql
    AS 'SELECT last_value FROM scratch.positions'"""
ANNOUNCED_TOO_LATE = """
    DROP TRIGGER announce ON scratch.events;
    CREATE FUNCTION scratch.too_late() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        PERFORM pg_sleep(0.04 * random()), pg_advisory_xact_lock_shared(
            'scratch.positions'::regclass::oid::int4, (min(position) - 1)::int4) FROM inserted;
        RETURN NULL;
    END $$;
    CREATE TRIGGER announce AFTER INSERT ON scratch.events REFERENCING NEW TABLE AS inserted
        FOR EACH STATEMENT EXECUTE FUNCTION scratch.too_late();"""
READ_IN_AN_OLDER_SNAPSHOT = """
    CREATE OR REPLACE FUNCTION scratch.read_safe(known bigint, low bigint, high bigint, most bigint)
    RETURNS SETOF scratch.events LANGUAGE sql AS $$
        WITH safe AS MATERIALIZED (
            SELECT scratch.safe_position(known) AS position FROM pg_sleep(0.01))
        SELECT (jsonb_populate_record(NULL::scratch.events, to_jsonb(safe))).* FROM safe UNION ALL
        (SELECT e.* FROM scratch.events e, safe
        WHERE e.position BETWEEN low AND least(high, safe.position) ORDER BY e.position LIMIT most)
    $$"""
EVENTS_DISAPPEAR = """
    CREATE FUNCTION scratch.vanish() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        DELETE FROM scratch.events WHERE position = NEW.position;
        RETURN NULL;
    END $$;
    CREATE TRIGGER vanish AFTER INSERT ON scratch.events
        FOR EACH ROW WHEN (NEW.position % 5 = 0) EXECUTE FUNCTION scratch.vanish();"""
POSITIONS_FROM_CACHES = "ALTER SEQUENCE scratch.positions CACHE 50"


def ask(dsn: str, statement: str) -> Any:
    """The first value that the statement gives."""
    with psycopg.connect(dsn, autocommit=True) as session:
        answer = session.execute(statement.encode())
        row = answer.fetchone() if answer.description else None
    return row and row[0]


def connections(dsn: str) -> int:
    count: int = ask(dsn, "SELECT count(*) FROM pg_stat_activity WHERE application_name ~ '^gap_'")
    return count


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(30):
        while not condition():
            await checkpoint()


async def assert_ended(dsn: str) -> None:
    """Nothing of a run is left; the server may need a moment to see that it was."""
    await until(lambda: connections(dsn) == 0)
    assert not ask(dsn, "SELECT to_regnamespace('scratch') IS NOT NULL")


async def run_broken(
    dsn: str, broken: str, shown: Callable[[GapStressResult], bool], transactions: int = 2
) -> GapStressResult:
    """The result of a small run with a store that this was done to.

    What it is to show is a matter of chance, and a matter of time on a busy machine.
    """
    for _ in range(5):
        ask(dsn, "DROP SCHEMA IF EXISTS scratch CASCADE")
        await PostgreSQLEventStore(dsn, schema="scratch").migrate()
        ask(dsn, broken)
        result = await gap_stress(
            dsn,
            schema="scratch",
            seconds=1,
            processes=2,
            tasks=8,
            transactions=transactions,
            hold=0.25,
            terminate=False,
            patience=1,
        )
        if shown(result):
            break
    assert shown(result), str(result)
    assert result.failed
    assert not result.ok
    return result


@on_asyncio
async def test_no_subscriber_misses_an_event(postgresql_dsn: str):
    for seconds in (3, 6, 12):  # until it has shown something, which depends on the machine
        result = await gap_stress(postgresql_dsn, schema="scratch", seconds=seconds, hold=0.5)
        assert not result.failed, str(result)
        assert result.left_out == ()
        assert [one.loop for one in result.subscribers] == ["asyncio", "uvloop", "trio"]
        assert {one.delivered for one in result.subscribers} == {result.committed}
        await assert_ended(postgresql_dsn)
        if min(result.rolled_back, result.killed, result.gaps) > 0:
            break
    assert result.ok, str(result)
    assert min(result.committed, result.rolled_back, result.killed, result.gaps) > 0


@pytest.mark.parametrize(
    ("anyio_backend", "broken"),
    [
        ("asyncio", NOBODY_ANNOUNCES),
        ("trio", READERS_GO_TO_THE_LAST_POSITION),
        ("uvloop", ANNOUNCED_TOO_LATE),
        ("uvloop", POSITIONS_FROM_CACHES),
        ("asyncio", READ_IN_AN_OLDER_SNAPSHOT),
    ],
    ids=[
        *("not announced", "read to the last position", "announced too late", "cached positions"),
        "read in an older snapshot",
    ],
    indirect=["anyio_backend"],
)
async def test_it_fails_where_the_order_is_broken(postgresql_dsn: str, broken: str):
    # As long as a transaction holds its appends, nobody passes those that are announced too late.
    transactions = 0 if broken is ANNOUNCED_TOO_LATE else 2

    def shown(result: GapStressResult) -> bool:
        of_versions = broken is POSITIONS_FROM_CACHES
        return result.lost > 0 and (result.out_of_version > 0 or not of_versions)

    result = await run_broken(postgresql_dsn, broken, shown, transactions)
    # What is wrong with the readers is not taken for something wrong in the table.
    assert (result.broken, result.torn) == (0, 0)
    assert ask(postgresql_dsn, "SELECT count(*) FROM scratch.events") == result.committed
    assert not ask(postgresql_dsn, "SELECT to_regclass('scratch.gap_stress') IS NOT NULL")


@on_asyncio
async def test_it_fails_where_acknowledged_events_are_not_there(postgresql_dsn: str):
    await run_broken(
        postgresql_dsn,
        EVENTS_DISAPPEAR,
        lambda result: min(result.broken, result.torn, result.out_of_version) > 0,
    )


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"], indirect=True)
async def test_a_cancelled_run_leaves_nothing_behind(postgresql_dsn: str):
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:

            @tasks.start_soon
            async def run() -> None:
                await gap_stress(postgresql_dsn, schema="scratch", seconds=600, processes=1)

            await until(lambda: connections(postgresql_dsn) > 6)
            tasks.cancel_scope.cancel()
    await assert_ended(postgresql_dsn)


@on_asyncio
async def test_it_appends_to_no_store_that_is_in_use(postgresql_dsn: str):
    store = PostgreSQLEventStore(postgresql_dsn, schema="scratch")
    await store.migrate()
    async with store:
        await store.append_events("a", "Thing", [Happened()], ANY)
        with pytest.raises(ValueError, match="holds events"):
            await gap_stress(postgresql_dsn, schema="scratch")
        assert len(await store.get_events("a")) == 1


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"], indirect=True)
async def test_a_process_that_fails_is_an_error(postgresql_dsn: str, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with anyio.fail_after(60):
        with pytest.raises(RuntimeError, match=r"the process that \w+s on \w+ failed"):
            await gap_stress(postgresql_dsn, schema="scratch", processes=1)
    await assert_ended(postgresql_dsn)


@on_asyncio
async def test_a_database_that_fails_is_an_error():
    with pytest.raises(StorageError):
        await gap_stress("postgresql://127.0.0.1:1/nowhere", schema="scratch")


# -- the verdict ------------------------------------------------------------------------------

SUBSCRIBER = SubscriberResult("trio", 1000, 0, 0, 0, 0, 0, stalled=False)
A, B, C, NONE = b"a", b"b", b"c", b"none"
STORED = {A: (1, 1, "one"), B: (2, 2, "one"), C: (4, 1, "two")}


@pytest.mark.parametrize(
    ("given", "faults"),
    [
        ([(1, 1, A), (2, 2, B), (4, 1, C)], {}),
        ([(1, 1, A), (4, 1, C)], {"lost": 1}),
        ([(1, 1, A), (2, 2, B), (2, 2, B), (4, 1, C), (1, 1, A)], {"twice": 2}),
        ([(4, 1, C), (1, 1, A), (2, 2, B)], {"out_of_order": 1}),
        ([(2, 2, B), (1, 1, A), (4, 1, C)], {"out_of_order": 1, "out_of_stream_order": 1}),
        ([(1, 1, A), (2, 2, B), (3, 1, NONE), (4, 1, C)], {"wrong": 1}),
        ([(1, 1, A), (3, 2, B), (4, 1, C)], {"wrong": 1}),
        ([(1, 1, A), (2, 2, B), (4, 2, C)], {"wrong": 1}),
    ],
)
def test_a_subscriber_is_judged_by_what_is_stored(given, faults: dict[str, int]):
    follower: Any = SimpleNamespace(
        records=lambda: given, setup=SimpleNamespace(loop="trio"), stalled=False
    )
    expected: dict[str, Any] = {"delivered": len({one for *_, one in given}), **faults}
    assert module._judge(STORED, follower) == attrs.evolve(SUBSCRIBER, **expected)


@pytest.mark.parametrize(
    ("said", "broken"),
    [
        ([(1, 1, A), (2, 2, B), (4, 1, C)], 0),
        ([(1, 1, A), (2, 2, B), (4, 1, C), (0, 0, NONE)], 0),
        ([(1, 1, A), (2, 2, B)], 1),
        ([(1, 1, A), (2, 2, B), (0, 0, C)], 1),
        ([(1, 1, A), (2, 2, B), (5, 1, C)], 1),
        ([(1, 1, A), (2, 3, B), (4, 1, C), (5, 1, NONE)], 2),
    ],
)
def test_the_table_is_judged_by_what_was_acknowledged(said, broken: int):
    assert module._broken(STORED, said) == broken


def test_versions_are_to_follow_each_other():
    assert module._out_of_version(STORED) == 0
    assert module._out_of_version({A: (1, 2, "one"), B: (2, 1, "one"), C: (4, 1, "two")}) == 2


RESULT = GapStressResult(
    committed=1000,
    rolled_back=200,
    killed=3,
    gaps=40,
    broken=0,
    torn=0,
    out_of_version=0,
    subscribers=(SUBSCRIBER,),
    left_out=(),
)


def with_subscriber(**changes: Any) -> GapStressResult:
    return attrs.evolve(RESULT, subscribers=(SUBSCRIBER, attrs.evolve(SUBSCRIBER, **changes)))


def test_a_verdict_can_be_read():
    assert RESULT.ok
    assert str(RESULT) == (
        "PASSED: 1,000 events committed, 200 rolled back, 3 connections killed, 40 gaps\n"
        "  trio: 1,000 delivered, 0 lost, 0 twice, 0 out of order, 0 out of stream order\n"
        "  in the table: 0 not as acknowledged, 0 without the rest of their transaction, "
        "0 out of stream order"
    )
    assert str(attrs.evolve(RESULT, left_out=("uvloop",))).endswith(
        "\n  uvloop: left out, not installed"
    )


@pytest.mark.parametrize("fault", ["broken", "torn", "out_of_version"])
def test_one_fault_in_the_table_is_a_failure(fault: str):
    changes: dict[str, Any] = {fault: 1}
    result = attrs.evolve(RESULT, **changes)
    assert (result.failed, result.ok) == (True, False)
    assert str(result).startswith("FAILED: ")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("lost", ", 1 lost"),
        ("twice", ", 1 twice"),
        ("out_of_order", ", 1 out of order"),
        ("out_of_stream_order", ", 1 out of stream order"),
        ("wrong", ", 1 not as stored"),
        ("stalled", ", stalled"),
    ],
)
def test_one_fault_of_one_subscriber_is_a_failure(fault: str, said: str):
    result = with_subscriber(loop="asyncio", **{fault: 1})
    assert (result.failed, result.ok) == (True, False)
    assert said in str(result).splitlines()[2]
    assert result.lost == (fault == "lost")


def test_a_run_without_gaps_has_shown_nothing():
    result = attrs.evolve(RESULT, gaps=0)
    assert (result.failed, result.ok) == (False, False)
    assert str(result).startswith("SHOWED NOTHING: ")


@pytest.mark.parametrize("lost", [0, 1])
def test_the_command_says_and_returns_the_verdict(lost: int, monkeypatch, capsys):
    calls: list[dict[str, object]] = []

    async def instead(dsn: str, **options: object) -> GapStressResult:
        calls.append({"dsn": dsn, **options})
        return with_subscriber(lost=lost if len(calls) == 2 else 0)

    monkeypatch.setattr(module, "gap_stress", instead)
    monkeypatch.setattr(sys, "argv", ["gap_stress", "a dsn", "--seconds", "7", "--runs", "3"])
    with pytest.raises(SystemExit) as raised:
        module.main()
    assert raised.value.code == lost
    assert [(call["dsn"], call["seconds"]) for call in calls] == [("a dsn", 7.0)] * 3
    assert len({call["schema"] for call in calls}) == 3
    said = capsys.readouterr().out
    assert said.count("PASSED") == 3 - lost
    assert said.endswith(f"\n{3 - lost} of 3 runs passed\n")
