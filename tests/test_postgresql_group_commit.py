"""Appends that are made at the same time: what they share, and what stays each caller's own."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from random import Random
from time import perf_counter
from typing import Any, Literal, Self
from uuid import UUID, uuid4

import anyio
import psycopg
import pytest
from anyio import to_thread
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint

from eventsource_anyio import (
    ANY,
    NO_STREAM,
    STREAM_EXISTS,
    AppendResult,
    ConcurrencyError,
    DuplicateEventError,
    NewEvent,
    StorageError,
    StoreClosedError,
)
from eventsource_anyio.stores.postgresql import PostgreSQLEventStore, batch, group_commit
from eventsource_anyio.testing import cancel_at_every_checkpoint
from eventsource_anyio.testing.samples import Ended, Happened, numbers
from tests.every_store import DRIVERS

ASYNCIO_LOOPS = ["asyncio", *(["uvloop"] if sys.platform != "win32" else [])]
LANES = 2
FILLERS = [f"filler {number}" for number in range(20)]  # in both lanes
APPEND = (
    "SELECT eventsource.append_event('Thing', %s, -1, gen_random_uuid(), "
    "'eventsource_anyio.testing.Ended', 1, NULL, NULL, '{}')"
)


class Database:
    """A store's database, looked at from outside."""

    def __init__(self, dsn: str, driver: Literal["asyncpg", "psycopg"]) -> None:
        self.dsn = dsn
        self.driver = driver
        self.sessions = ExitStack()
        self._session = self.connect(autocommit=True)

    def store(self) -> PostgreSQLEventStore:
        return PostgreSQLEventStore(self.dsn, driver=self.driver)

    def connect(self, **options: Any) -> psycopg.Connection:
        session = psycopg.connect(self.dsn, application_name="observer", **options)
        self.sessions.callback(session.close)
        return session

    def rows(self, statement: str, *values: object) -> list[Any]:
        return self._session.execute(statement.encode(), values).fetchall()

    def stuck(self) -> int:
        """How many connections wait for somebody who has locked a table."""
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            "AND wait_event_type = 'Lock' AND wait_event = 'relation'"
        )
        return int(self.rows(waiting)[0][0])

    def connections(self) -> int:
        """Those of stores."""
        sessions = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            "AND backend_type = 'client backend' AND application_name <> 'observer'"
        )
        return int(self.rows(sessions)[0][0])

    def transactions(self, pattern: str = "%") -> int:
        """How many transactions have stored the events of such streams."""
        stored = (
            "SELECT count(DISTINCT xmin::text) FROM eventsource.events WHERE aggregate_id LIKE %s"
        )
        return int(self.rows(stored, pattern)[0][0])

    def ids(self) -> set[UUID]:
        return {row[0] for row in self.rows("SELECT event_id FROM eventsource.events")}


class Gate:
    """No append gets through while it is shut; those that come meanwhile queue up behind.

    Inside the block of a task group, so that it is open again when the tasks are waited for.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._session = database.connect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.open()

    async def shut(
        self, store: PostgreSQLEventStore, tasks: TaskGroup, *streams: str, lanes: int = 1
    ) -> None:
        """Returns when an append to one of these streams is stuck in each lane."""
        self.lock()
        for stream in streams:
            tasks.start_soon(store.append_events, stream, "Thing", [Happened(-1)], ANY)
        await until(lambda: self._database.stuck() == lanes)

    def lock(self) -> None:
        self._session.execute("LOCK TABLE eventsource.events IN EXCLUSIVE MODE")

    def open(self) -> None:
        self._session.rollback()


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(20):
        while not condition():  # noqa: ASYNC110  (what is asked knows of no event)
            await anyio.sleep(0.001)


def locked(database: Database, stream: str) -> Callable[[], None]:
    """A transaction of another process has the lock of a stream, until this is called."""
    session = database.connect()
    key = "hashtextextended(%s, 'eventsource.events'::regclass::oid::bigint)"
    session.execute(f"SELECT pg_advisory_xact_lock({key})".encode(), (f"Thing-{stream}",))
    return session.rollback


@contextmanager
def held(database: Database, stream: str) -> Iterator[psycopg.Connection]:
    """A stream that a transaction of another process has appended to, and not committed yet."""
    session = database.connect()
    session.execute(APPEND.encode(), (stream,))
    try:
        yield session
    finally:
        session.rollback()


@pytest.fixture(params=DRIVERS)
def database(request: pytest.FixtureRequest, migrated_dsn: str) -> Iterator[Database]:
    dsn = migrated_dsn
    # asyncpg, cancelled natively while it talks about TLS, complains to asyncio's loop.
    database = Database(f"{dsn}{'&' if '?' in dsn else '?'}sslmode=disable", request.param)
    with database.sessions:
        yield database


@pytest.fixture
async def store(database: Database) -> AsyncIterator[PostgreSQLEventStore]:
    async with database.store() as store:
        yield store


@pytest.fixture
async def other(database: Database) -> AsyncIterator[PostgreSQLEventStore]:
    """Another process, as far as the database can tell."""
    async with database.store() as store:
        yield store


async def together(*calls: Callable[[], Awaitable[object]]) -> list[Any]:
    """The outcomes of calls that are made at the same time, and in this order: results, errors."""
    outcomes: list[Any] = [None] * len(calls)

    async def run(number: int, call: Callable[[], Awaitable[object]]) -> None:
        turn = turns[number]
        await turn.wait()
        turns[number + 1].set()
        try:
            outcomes[number] = await call()
        except Exception as error:  # noqa: BLE001  (an outcome)
            outcomes[number] = error

    turns = [anyio.Event() for _ in range(len(calls) + 1)]
    turns[0].set()
    with anyio.fail_after(25):
        async with anyio.create_task_group() as tasks:
            for number, call in enumerate(calls):
                tasks.start_soon(run, number, call)
    return outcomes


def appending(
    store: PostgreSQLEventStore, stream: str, events: Sequence[Any], expected: Any = ANY
) -> Callable[[], Awaitable[AppendResult]]:
    return lambda: store.append_events(stream, "Thing", events, expected)


async def behind_the_gate(
    store: PostgreSQLEventStore, database: Database, *calls: Callable[[], Awaitable[object]]
) -> list[Any]:
    """As `together`, but all of them are waiting before the first of them is sent."""
    outcomes: list[Any] = []

    async def run() -> None:
        outcomes.extend(await together(*calls))

    async with anyio.create_task_group() as tasks:
        with Gate(database) as gate:
            await gate.shut(store, tasks, *FILLERS, lanes=LANES)
            tasks.start_soon(run)
            await anyio.wait_all_tasks_blocked()
    return outcomes


def assert_whole(database: Database) -> None:
    """Versions have no gaps, and grow with the positions."""
    rows = database.rows(
        "SELECT aggregate_id, array_agg(version ORDER BY position) FROM eventsource.events "
        "GROUP BY aggregate_id"
    )
    for _, versions in rows:
        assert versions == list(range(1, len(versions) + 1))


# -- what is shared ---------------------------------------------------------------------------


async def test_concurrent_appends_share_transactions(
    store: PostgreSQLEventStore, database: Database
):
    calls = [appending(store, f"own {number}", [Happened(number)]) for number in range(500)]
    results = await behind_the_gate(store, database, *calls)
    assert [numbers(result.events) for result in results] == [[number] for number in range(500)]
    assert {result.version for result in results} == {1}
    assert len({result.position for result in results}) == 500
    assert LANES <= database.transactions("own %") <= 3 * LANES
    stored = {event.position: event async for event in store.read_all()}
    assert all(stored[result.position] == result.events[0] for result in results)


@pytest.mark.parametrize("kinds", [["One"], ["One", "Two"]])
@pytest.mark.parametrize("events", [[Happened], [Happened, lambda _: Ended()]])
@pytest.mark.parametrize("count", [1, 2])
async def test_a_batch_of_one_kind_and_one_of_several(
    store: PostgreSQLEventStore, database: Database, kinds: Any, events: Any, count: int
):
    streams = [
        (f"nr {number}", kinds[number % len(kinds)], [events[number % len(events)](number)] * count)
        for number in range(20)
    ]
    calls = [
        partial(store.append_events, aggregate_id, kind, those, NO_STREAM)
        for aggregate_id, kind, those in streams
    ]
    results = await behind_the_gate(store, database, *calls)
    assert database.transactions("nr %") <= 2 * LANES
    for result, (aggregate_id, kind, those) in zip(results, streams, strict=True):
        stream = await store.get_events(aggregate_id, kind)
        assert [stored.event for stored in stream] == those
        assert stream.events == result.events
    assert_whole(database)


def test_a_program_of_the_version_before_may_go_on(database: Database):
    """It names the type of each stream and of each event."""
    call = (
        "SELECT statuses, versions FROM eventsource.append_events(%s, %s, '{}', %s, '{}', '{}', "
        "'{}', %s, %s, '{}', '{}', '{}', %s, false, false)"
    )
    for expected, statuses in ((0, [0, 0]), (0, [2, 2]), (1, [0, 0])):
        ids = [uuid4(), uuid4()]
        values = (["One", "Two"], ["a", "a"], [expected] * 2, ids, ["X", "Y"], ["{}", "{}"])
        assert database.rows(call, *values)[0][0] == statuses
    stored = "SELECT aggregate_type, version, event_type FROM eventsource.events ORDER BY position"
    assert database.rows(stored) == [
        ("One", 1, "X"),
        ("Two", 1, "Y"),
        ("One", 2, "X"),
        ("Two", 2, "Y"),
    ]


@pytest.mark.parametrize("alone", [False, True])
def test_the_functions_answer_as_a_model_does(database: Database, alone: bool):
    """For every expectation, met or not, and what is believed of a stream, right or wrong."""
    one = (
        "SELECT status, version FROM eventsource.append_event('T', %s, %s, %s, 'E', 1, NULL, NULL, "
        "'{}')"
    )
    many = (
        "SELECT statuses, versions FROM eventsource.append_events('{T}', %s, %s, %s, '{}', '{}', "
        "'{}', %s, '{E}', '{}', '{}', '{}', %s, false, false)"
    )
    random = Random(7)
    streams: dict[str, int] = {}
    stored: list[UUID] = []
    met: set[tuple[str, int]] = set()
    for number in range(1000):
        some = [f"{number // 10} {letter}" for letter in "abcd"]
        names = random.choices(some, k=1 if alone else random.randint(2, 3))
        begin = dict(streams)
        asked: list[int] = []
        ids: list[UUID] = []
        statuses: list[int] = []
        versions: list[int] = []
        for name in names:
            version = streams.get(name, 0)
            kind, expected = random.choice(
                [
                    ("exact", version),
                    ("behind", max(version - random.randint(1, 3), 0)),
                    ("ahead", version + random.randint(1, 3)),
                    ("any", -1),
                    ("exists", -2),
                    ("believed", -3 - version),
                    ("believed too little", -3 - max(version - random.randint(0, 9), 0)),
                    ("believed too much", -3 - version - random.randint(1, 9)),
                ]
            )
            holds = expected in (version, -1) or expected < -2 or (expected == -2 and version > 0)
            # One that is stored is only found where the version alone does not say enough.
            again = bool(stored) and begin.get(name, 0) > 0 and expected != begin[name]
            again = again and random.random() < 0.4
            ids.append(random.choice(stored) if again else uuid4())
            asked.append(expected)
            versions.append(version)
            status = 1 if again else 0 if holds else 2
            statuses.append(status)
            met.add((kind, status))
            if status == 0:
                streams[name] = version + 1
        if len(set(ids)) < len(ids):
            streams = begin
            continue
        if alone:
            answers = database.rows(one, names[0], asked[0], ids[0])
            assert answers == [(statuses[0], versions[0])]
        else:
            same = [names.index(name) + 1 for name in names]
            same_as = same if len(set(names)) < len(names) else []
            values = (names, same_as, asked, ids, ["{}"] * len(names))
            assert database.rows(many, *values) == [(statuses, versions)]
        stored += [one for one, status in zip(ids, statuses, strict=True) if status == 0]
    assert met >= {("exact", 0), ("ahead", 2), ("behind", 2), ("behind", 1), ("any", 0), ("any", 1)}
    assert met >= {("exists", 0), ("exists", 2), ("believed", 0), ("believed", 1)}
    assert met >= {("believed too little", 0), ("believed too much", 0), ("believed too much", 1)}
    assert_whole(database)


async def test_each_of_a_batch_has_an_outcome_of_its_own(
    store: PostgreSQLEventStore, database: Database
):
    known = NewEvent(Happened(1))
    first = await store.append_events("known", "Thing", [known], NO_STREAM)
    forged = NewEvent(Happened(2), event_id=known.event_id)
    kinds: list[tuple[Any, Any, Any]] = [
        ([Happened(0)], NO_STREAM, 1),
        ([Happened(0), Ended()], ANY, 2),
        ([Happened(0)], 3, ConcurrencyError),
        ([Happened(0)], STREAM_EXISTS, ConcurrencyError),
        ([known], ANY, DuplicateEventError),
        ([Ended(), forged], 0, DuplicateEventError),
    ]
    calls, asked = [], []
    for number in range(120):
        events, expected, _ = kinds[number % len(kinds)]
        asked.append(kinds[number % len(kinds)][2])
        calls.append(appending(store, f"own {number}", events, expected))
    # These need no error of the server to be told apart, so they share a transaction.
    calls.append(appending(store, "known", [known], NO_STREAM))
    calls.append(appending(store, "known", [forged], STREAM_EXISTS))
    calls.append(appending(store, "known", [Ended()], NO_STREAM))
    outcomes = await behind_the_gate(store, database, *calls)
    got = [
        outcome.version if isinstance(outcome, AppendResult) else type(outcome)
        for outcome in outcomes[:120]
    ]
    assert got == asked
    assert outcomes[120] == first
    assert isinstance(outcomes[121], DuplicateEventError)
    assert isinstance(outcomes[122], ConcurrencyError)
    expected_streams = {f"own {number}" for number in range(120) if number % 6 < 2}
    rows = database.rows("SELECT DISTINCT aggregate_id FROM eventsource.events")
    assert {row[0] for row in rows} == expected_streams | {"known", *FILLERS}
    assert_whole(database)


async def test_conflicts_among_many_do_not_divide_a_batch(
    store: PostgreSQLEventStore, database: Database
):
    calls = [
        appending(store, f"own {number}", [Ended()], NO_STREAM if number % 2 else 1)
        for number in range(100)
    ]
    outcomes = await behind_the_gate(store, database, *calls)
    assert [type(outcome) for outcome in outcomes] == [ConcurrencyError, AppendResult] * 50
    assert database.transactions("own %") <= LANES


async def test_a_lone_append_goes_at_once(store: PostgreSQLEventStore, database: Database):
    """No timer: one after another, they take as long as with a bare connection, or nearly so.

    As soon as the machine is not busy with something else.
    """
    session = database.connect(autocommit=True)
    ratios: list[float] = []
    for attempt in range(50):
        begun = perf_counter()
        for number in range(50):
            session.execute(APPEND.encode(), (f"bare {attempt} {number}",))
        bare = perf_counter() - begun
        begun = perf_counter()
        for number in range(50):
            await store.append_events(f"lone {attempt} {number}", "Thing", [Ended()], ANY)
        ratios.append((perf_counter() - begun) / bare)
        if ratios[-1] < 8:
            break
    assert ratios[-1] < 8, ratios
    assert database.transactions("lone %") == 50 * len(ratios)


async def test_appends_to_one_stream_are_in_the_order_they_were_made_in(
    store: PostgreSQLEventStore, database: Database
):
    made: list[int] = []

    async def append(number: int) -> None:
        made.append(number)
        result = await store.append_events("one", "Thing", [Happened(number)], ANY)
        assert numbers(result.events) == [number]

    async with anyio.create_task_group() as tasks:
        for number in range(500):
            tasks.start_soon(append, number)
    events = (await store.get_events("one", "Thing")).events
    assert numbers(events) == made
    assert [event.position for event in events] == sorted(event.position for event in events)
    assert database.transactions() <= 6


async def test_exact_versions_in_one_batch_succeed_in_their_sequence(
    store: PostgreSQLEventStore, database: Database
):
    expected = [1, 0, 2, 3, 2, NO_STREAM, 3, 4, STREAM_EXISTS, 4]
    calls = [appending(store, "x", [Happened(n)], one) for n, one in enumerate(expected)]
    outcomes = await behind_the_gate(store, database, *calls)
    got = [
        outcome.version if isinstance(outcome, AppendResult) else outcome.actual
        for outcome in outcomes
    ]
    assert got == [0, 1, 1, 1, 1, 1, 1, 1, 2, 2]
    await store.append_events("y", "Thing", [Ended()], NO_STREAM)
    calls = [appending(store, "y", [Happened(n)], n) for n in (1, 2, 1, 3, 7, 4)]
    outcomes = await behind_the_gate(store, database, *calls)
    types = [type(outcome) for outcome in outcomes]
    conflict, result = ConcurrencyError, AppendResult
    assert types == [result, result, conflict, result, conflict, result]
    assert outcomes[2].actual == 3
    assert numbers((await store.get_events("y", "Thing")).events) == [1, 2, 3, 4]
    assert database.transactions("y") == 2
    assert_whole(database)


async def test_ten_thousand_appends_at_once(store: PostgreSQLEventStore, database: Database):
    positions: list[int] = []

    async def append(number: int) -> None:
        events = [Happened(number)] * (1 + number % 3)
        result = await store.append_events(str(number % 5000), "Thing", events, ANY)
        positions.append(result.position)

    with anyio.fail_after(25):
        async with anyio.create_task_group() as tasks:
            for number in range(10_000):
                tasks.start_soon(append, number)
    assert len(set(positions)) == 10_000
    assert len(database.ids()) == sum(1 + number % 3 for number in range(10_000))
    assert_whole(database)


async def test_more_than_the_queue_holds_wait_outside(
    store: PostgreSQLEventStore, database: Database, monkeypatch: pytest.MonkeyPatch
):
    """The queue of a lane is bounded; a thousand wait for room in it, and may give up."""
    monkeypatch.setattr(group_commit, "_BATCHES_AT_MOST", 20)
    lanes, at_most = store._opened().lanes, batch.APPENDS_AT_MOST
    bound = group_commit._BATCHES_AT_MOST * at_most
    with anyio.fail_after(28):
        async with anyio.create_task_group() as tasks:
            with Gate(database) as gate:
                await gate.shut(store, tasks, "one")
                async with anyio.create_task_group() as waiting:
                    for number in range(bound + 1000):
                        waiting.start_soon(
                            store.append_events, "one", "Thing", [Happened(number)], ANY
                        )
                    await anyio.wait_all_tasks_blocked()
                    queued = max(sum(len(batch.jobs) for batch in lane._waiting) for lane in lanes)
                    assert bound - at_most <= queued <= bound
                    waiting.cancel_scope.cancel()
    assert (await store.append_events("one", "Thing", [Ended()], ANY)).version == 2
    assert len(database.ids()) == 2


async def test_who_waits_outside_of_the_queue_goes_in_its_turn(
    store: PostgreSQLEventStore, database: Database, monkeypatch: pytest.MonkeyPatch
):
    """Nobody overtakes, and whoever gives up holds nobody up."""
    monkeypatch.setattr(group_commit, "_BATCHES_AT_MOST", 2)
    made: list[int] = []
    scopes = [anyio.CancelScope() for _ in range(2000)]

    async def append(number: int) -> None:
        with scopes[number]:
            made.append(number)
            await store.append_events("one", "Thing", [Happened(number)], ANY)

    with anyio.fail_after(25):
        async with anyio.create_task_group() as tasks:
            with Gate(database) as gate:
                await gate.shut(store, tasks, "one")
                for number in range(1500):
                    tasks.start_soon(append, number)
                await anyio.wait_all_tasks_blocked()
                given_up = {*made[600:700], *made[::10]}
                for number in given_up:
                    scopes[number].cancel()
            await until(lambda: len(database.ids()) > 300)
            for number in range(1500, 2000):  # while there is room, or about to be
                tasks.start_soon(append, number)
    stored = numbers((await store.get_events("one", "Thing")).events)
    assert stored == [-1, *(number for number in made if number not in given_up)]


# -- who gives up -----------------------------------------------------------------------------


async def test_a_leader_that_is_cancelled_at_any_checkpoint_harms_nobody(
    store: PostgreSQLEventStore, database: Database
):
    runs = 0
    gate = Gate(database)
    followed = anyio.Event()
    mine = NewEvent(Happened(0))
    results: list[AppendResult] = []

    async def follow(number: int) -> None:
        stream = "x" if number % 2 else f"other {runs} {number}"
        results.append(await store.append_events(stream, "Thing", [Happened(number)], ANY))

    async def followers() -> None:
        await anyio.wait_all_tasks_blocked()  # the leader waits, or has given up
        async with anyio.create_task_group() as following:
            for number in range(1, 7):
                following.start_soon(follow, number)
            await anyio.wait_all_tasks_blocked()
            gate.open()
        followed.set()

    async def prepare() -> None:
        nonlocal runs, followed, mine
        runs += 1
        followed = anyio.Event()
        mine = NewEvent(Happened(0))
        results.clear()
        await gate.shut(store, tasks, "x")
        tasks.start_soon(followers)

    async def lead() -> AppendResult:
        return await store.append_events("x", "Thing", [mine], ANY)

    async def check(result: AppendResult | None) -> None:
        await followed.wait()
        assert sorted(number for one in results for number in numbers(one.events)) == [*range(1, 7)]
        assert (mine.event_id in database.ids()) == (result is not None)
        assert_whole(database)
        await prepare()

    with anyio.fail_after(25):
        async with anyio.create_task_group() as tasks:
            with gate:
                await prepare()
                assert await cancel_at_every_checkpoint(lead, check) >= 2
                await followed.wait()


async def test_an_append_that_is_cancelled_in_the_queue_is_not_sent(
    store: PostgreSQLEventStore, database: Database
):
    """A leader, and a follower; their batch goes without them, or not at all."""
    scopes = [anyio.CancelScope() for _ in range(10)]

    async def append(number: int) -> None:
        with scopes[number]:
            await store.append_events("x", "Thing", [Happened(number)], ANY)

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            with Gate(database) as gate:
                await gate.shut(store, tasks, "x")
                async with anyio.create_task_group() as all_give_up:
                    for number in range(3):
                        all_give_up.start_soon(
                            store.append_events, "x", "Thing", [Happened(number)], ANY
                        )
                    await anyio.wait_all_tasks_blocked()
                    all_give_up.cancel_scope.cancel()
                for number in range(10):
                    tasks.start_soon(append, number)
                    await anyio.wait_all_tasks_blocked()
                for number in (0, 1, 5, 9):
                    scopes[number].cancel()
                await anyio.wait_all_tasks_blocked()
    assert [number for number in range(10) if scopes[number].cancelled_caught] == [0, 1, 5, 9]
    assert numbers((await store.get_events("x", "Thing")).events) == [-1, 2, 3, 4, 6, 7, 8]


async def test_an_append_that_was_sent_is_finished_and_returns(
    store: PostgreSQLEventStore, database: Database
):
    """Cancelled, it waits for the server all the same; a batch of others is not stopped either."""
    results: list[AppendResult] = []
    raised: list[int] = []

    async def append(scope: anyio.CancelScope, number: int) -> None:
        with scope:
            results.append(await store.append_events("x", "Thing", [Happened(number)], ANY))
            await checkpoint()
        if scope.cancelled_caught:
            raised.append(number)

    scopes = [anyio.CancelScope() for _ in range(2)]
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            with Gate(database) as gate:
                await gate.shut(store, tasks, lanes=0)
                for number in range(2):
                    tasks.start_soon(append, scopes[number], number)
                    await until(lambda: database.stuck() == 1)
                await anyio.wait_all_tasks_blocked()
                scopes[0].cancel()  # it is in the server
                scopes[1].cancel()  # it is in the queue
                await until(lambda: raised == [1])
    assert [numbers(result.events) for result in results] == [[0]]
    assert raised == [1, 0]
    assert numbers((await store.get_events("x", "Thing")).events) == [0]


async def test_random_deadlines_say_what_was_stored(
    store: PostgreSQLEventStore, database: Database
):
    """What returned is in the table, what raised is not, and each may be repeated."""
    random = Random(11)
    events = [[NewEvent(Happened(n)) for _ in range(1 + n % 2)] for n in range(2000)]
    returned: dict[int, AppendResult] = {}
    raised: set[int] = set()

    async def append(number: int, patience: float) -> None:
        stream = str(number % 300)
        with anyio.move_on_after(patience) as scope:
            returned[number] = await store.append_events(stream, "Thing", events[number], ANY)
        if scope.cancelled_caught and number not in returned:
            raised.add(number)

    with anyio.fail_after(25):
        begun = anyio.current_time()
        async with anyio.create_task_group() as tasks:  # they say how long it takes here
            for number in range(500):
                tasks.start_soon(append, number, 25)
        took = anyio.current_time() - begun
        for first in range(500, 2000, 500):  # more than all lanes send at once
            async with anyio.create_task_group() as tasks:
                for number in range(first, first + 500):
                    tasks.start_soon(append, number, took * random.random() ** 2)
    stored = database.ids()
    assert len(returned) + len(raised) == 2000
    assert len(returned) > 50
    assert len(raised) > 50
    for number in range(2000):
        there = [event.event_id in stored for event in events[number]]
        assert there == [number in returned] * len(events[number])
    calls = [appending(store, str(n % 300), events[n], NO_STREAM) for n in returned]
    assert await together(*calls) == list(returned.values())
    again = [appending(store, str(n % 300), events[n]) for n in range(2000)]
    results = await together(*again)
    assert all(isinstance(result, AppendResult) for result in results)
    assert len(database.ids()) == sum(map(len, events))
    assert_whole(database)


@pytest.mark.parametrize("anyio_backend", ASYNCIO_LOOPS, indirect=True)
async def test_a_native_cancel_harms_nobody_else(store: PostgreSQLEventStore, database: Database):
    """At each turn of the loop, of a leader and of others; in one stream and in several."""
    import asyncio

    with anyio.fail_after(25):
        for turns in range(40):
            appends = [
                asyncio.ensure_future(
                    store.append_events("x" if n % 2 else f"{turns} {n}", "Thing", [Ended()], ANY)
                )
                for n in range(8)
            ]
            for _ in range(turns):
                await asyncio.sleep(0)
            victims = {turns % 8, (turns + 3) % 8, 0 if turns % 3 else 1}
            for victim in victims:
                appends[victim].cancel()
            outcomes = await asyncio.gather(*appends, return_exceptions=True)
            stored = database.ids()
            for n, outcome in enumerate(outcomes):
                if isinstance(outcome, AppendResult):
                    assert outcome.events[0].event_id in stored
                else:
                    assert n in victims
                    assert isinstance(outcome, asyncio.CancelledError)
    assert_whole(database)


@pytest.mark.parametrize("anyio_backend", ASYNCIO_LOOPS, indirect=True)
async def test_when_every_task_is_cancelled_natively_a_repeat_finds_out(
    store: PostgreSQLEventStore, database: Database
):
    import asyncio

    random = Random(5)
    events = [NewEvent(Happened(n)) for n in range(600)]
    with anyio.fail_after(25):
        for first in range(0, 600, 100):
            appends = {
                n: asyncio.ensure_future(
                    store.append_events(str(n % 50), "Thing", [events[n]], ANY)
                )
                for n in range(first, first + 100)
            }
            order = list(appends)
            random.shuffle(order)
            for n in order:
                appends[n].cancel()
                if random.random() < 0.3:
                    await asyncio.sleep(0)
            outcomes = await asyncio.gather(*appends.values(), return_exceptions=True)
            stored = database.ids()
            for n, outcome in zip(appends, outcomes, strict=True):
                if isinstance(outcome, AppendResult):
                    assert events[n].event_id in stored
                else:
                    assert isinstance(outcome, asyncio.CancelledError)
        again = [appending(store, str(n % 50), [events[n]]) for n in range(600)]
        results = await together(*again)
    assert all(isinstance(result, AppendResult) for result in results)
    assert len(database.ids()) == 600
    assert_whole(database)


@pytest.mark.parametrize("anyio_backend", ASYNCIO_LOOPS, indirect=True)
async def test_a_native_cancel_of_a_leader_in_the_server_leaves_its_batch(
    store: PostgreSQLEventStore, database: Database
):
    """The others of its batch are sent again, and stored once."""
    import asyncio

    events = [NewEvent(Happened(n)) for n in range(6)]

    def append(number: int) -> Any:
        return asyncio.ensure_future(store.append_events("x", "Thing", [events[number]], ANY))

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            with Gate(database) as second:
                with Gate(database) as gate:
                    await gate.shut(store, tasks, "x")
                    appends = [append(number) for number in range(6)]
                    await anyio.wait_all_tasks_blocked()
                    # The second one is shut as soon as the first is open, and the append gone.
                    tasks.start_soon(to_thread.run_sync, second.lock)
                    await until(lambda: database.stuck() == 2)
                await until(lambda: database.stuck() == 1 and len(database.ids()) == 1)
                appends[0].cancel()
                appends[3].cancel()
                await asyncio.wait([appends[0]])
            await asyncio.wait(appends)
    for number in (1, 2, 4, 5):
        assert numbers(appends[number].result().events) == [number]
    stored = numbers((await store.get_events("x", "Thing")).events)
    assert [number for number in stored if number not in (-1, 0, 3)] == [1, 2, 4, 5]
    assert len(stored) == len(set(stored))


# -- a stream that somebody else appends to ---------------------------------------------------


async def test_appends_to_a_busy_stream_keep_their_order(
    store: PostgreSQLEventStore, database: Database
):
    """In the batch that finds it busy, in those that wait behind it, and those made later."""
    made: list[int] = []

    async def append(number: int) -> None:
        made.append(number)
        await store.append_events("x", "Thing", [Happened(number)], ANY)

    with anyio.fail_after(25):
        async with anyio.create_task_group() as tasks:
            with Gate(database) as gate:
                await gate.shut(store, tasks, *FILLERS, lanes=LANES)
                free = locked(database, "x")
                for number in range(600):  # more than one batch
                    tasks.start_soon(append, number)
                await anyio.wait_all_tasks_blocked()
            for number in range(600, 700):
                tasks.start_soon(append, number)
            # Meanwhile everybody else goes on, in both lanes.
            for number in range(40):
                await store.append_events(f"beside {number}", "Thing", [Ended()], ANY)
            assert database.rows("SELECT 1 FROM eventsource.events WHERE aggregate_id = 'x'") == []
            free()
    assert numbers((await store.get_events("x", "Thing")).events) == made
    assert len(made) == 700
    assert_whole(database)


async def test_whoever_asks_for_a_busy_stream_may_give_up(
    store: PostgreSQLEventStore, database: Database
):
    """At any checkpoint; those behind it go on, and what it made is not there."""
    runs = 0
    ended = anyio.Event()
    mine = NewEvent(Happened(0))

    async def ask() -> AppendResult:
        return await store.append_events(f"x {runs}", "Thing", [mine], ANY)

    async def others(session: psycopg.Connection) -> None:
        await anyio.wait_all_tasks_blocked()
        async with anyio.create_task_group() as following:
            for _ in range(3):
                following.start_soon(store.append_events, f"x {runs}", "Thing", [Ended()], ANY)
            for number in range(4):
                await store.append_events(f"beside {number}", "Thing", [Ended()], ANY)
            session.rollback()
        ended.set()

    def prepare() -> None:
        nonlocal runs, ended, mine
        runs += 1
        ended, mine = anyio.Event(), NewEvent(Happened(0))
        session = database.connect()
        session.execute(APPEND.encode(), (f"x {runs}",))
        tasks.start_soon(others, session)

    async def check(result: AppendResult | None) -> None:
        await ended.wait()
        events = (await store.get_events(f"x {runs}", "Thing")).events
        assert len(events) == (4 if result else 3)
        assert (mine.event_id in database.ids()) == (result is not None)
        prepare()

    with anyio.fail_after(28):
        async with anyio.create_task_group() as tasks:
            prepare()
            assert await cancel_at_every_checkpoint(ask, check) >= 3
            await ended.wait()


@pytest.mark.parametrize("anyio_backend", ASYNCIO_LOOPS, indirect=True)
async def test_a_native_cancel_of_whoever_asks_for_a_busy_stream(
    store: PostgreSQLEventStore, database: Database
):
    """At each turn of the loop: the others get through as soon as the stream is free."""
    import asyncio

    with anyio.fail_after(28):
        for turns in range(30):
            stream = f"x {turns}"
            with held(database, stream):
                appends = [
                    asyncio.ensure_future(store.append_events(stream, "Thing", [Ended()], ANY))
                    for _ in range(4)
                ]
                for _ in range(turns):
                    await asyncio.sleep(0)
                appends[0].cancel()
                if turns % 2:
                    appends[1].cancel()
                await asyncio.sleep(0)
            await asyncio.gather(*appends, return_exceptions=True)
            assert all(isinstance(one.result(), AppendResult) for one in appends[2:])
            # And the stream is as any other again.
            await store.append_events(stream, "Thing", [Ended()], ANY)
    assert_whole(database)


# -- repeats ----------------------------------------------------------------------------------


@pytest.mark.parametrize("expected", [ANY, NO_STREAM, 0])
@pytest.mark.parametrize("count", [1, 3])
async def test_a_repeat_at_the_same_time_returns_the_same_result(
    store: PostgreSQLEventStore,
    other: PostgreSQLEventStore,
    database: Database,
    expected: Any,
    count: int,
):
    """In one batch, over two stores, and both."""
    events = [[NewEvent(Happened(n)) for n in range(count)] for _ in range(4)]
    calls = [appending(store, "in one batch", events[0], expected) for _ in range(20)]
    outcomes = await behind_the_gate(store, database, *calls)
    both = [store, other]
    calls = [appending(both[n % 2], "over two", events[1], expected) for n in range(20)]
    outcomes += await together(*calls)
    calls = [appending(both[n % 2], "both", events[2], expected) for n in range(20)]
    outcomes += await behind_the_gate(store, database, *calls)
    for first in (0, 20, 40):
        one = outcomes[first]
        assert isinstance(one, AppendResult)
        assert one.version == count
        assert outcomes[first : first + 20] == [one] * 20
    stored = [len(await store.get_events(name)) for name in ("in one batch", "over two", "both")]
    assert stored == [count] * 3
    assert_whole(database)


async def test_an_event_id_that_is_used_twice_in_a_batch_is_its_callers_trouble(
    store: PostgreSQLEventStore, database: Database
):
    event = NewEvent(Happened(1))
    forged = NewEvent(Happened(2), event_id=event.event_id)
    calls = [appending(store, f"own {number}", [Ended()], NO_STREAM) for number in range(30)]
    calls[10:10] = [
        appending(store, "x", [event], NO_STREAM),
        appending(store, "x", [forged], ANY),
        appending(store, "x", [Ended(), forged], ANY),
        appending(store, "x", [event, NewEvent(Ended())], 0),
    ]
    outcomes = await behind_the_gate(store, database, *calls)
    types = [type(outcome) for outcome in outcomes]
    assert types[10:14] == [AppendResult] + [DuplicateEventError] * 3
    assert types[:10] + types[14:] == [AppendResult] * 30
    assert len(await store.get_events("x")) == 1
    # In another stream, which one is the first to be sent depends on the lanes.
    event = NewEvent(Happened(3))
    calls = [appending(store, f"y {number}", [event], NO_STREAM) for number in range(6)]
    calls += [appending(store, f"z {number}", [Ended()], NO_STREAM) for number in range(20)]
    outcomes = await behind_the_gate(store, database, *calls)
    types = [type(outcome) for outcome in outcomes]
    assert sorted(types[:6], key=str) == [DuplicateEventError] * 5 + [AppendResult]
    assert types[6:] == [AppendResult] * 20
    assert_whole(database)


async def test_a_constraint_of_the_users_is_not_tried_for_ever(
    store: PostgreSQLEventStore, database: Database
):
    database.connect(autocommit=True).execute(
        "CREATE UNIQUE INDEX one_number ON eventsource.events ((payload::jsonb->>'number'))"
    )
    await store.append_events("a", "Thing", [Happened(1)], ANY)
    with anyio.fail_after(10):
        with pytest.raises(StorageError, match="23505"):
            await store.append_events("b", "Thing", [Happened(1)], ANY)
        with pytest.raises(StorageError, match="23505"):
            async with store.transaction() as tx:
                await tx.append_events("b", "Thing", [Ended()], ANY)
                await tx.append_events("b", "Thing", [Happened(1)], ANY)
    assert [event.aggregate_id async for event in store.read_all()] == ["a"]


# -- closing ----------------------------------------------------------------------------------


async def test_closing_refuses_what_waits_and_finishes_what_was_sent(
    store: PostgreSQLEventStore, database: Database, monkeypatch: pytest.MonkeyPatch
):
    """In the queue, outside of it, and behind a busy stream; nobody is left hanging."""
    monkeypatch.setattr(group_commit, "_BATCHES_AT_MOST", 1)
    outcomes: list[object] = []

    async def append(stream: str) -> None:
        try:
            outcomes.append(await store.append_events(stream, "Thing", [Ended()], ANY))
        except StoreClosedError as error:
            outcomes.append(error)

    async def close() -> None:
        await store.__aexit__(None, None, None)
        outcomes.append("closed")

    free = locked(database, "busy")
    with anyio.fail_after(25):
        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(append, "busy")
            for number in range(4):
                await store.append_events(f"beside {number}", "Thing", [Ended()], ANY)
            with Gate(database) as gate:
                await gate.shut(store, tasks, "x")
                for _ in range(1000):
                    tasks.start_soon(append, "x")
                await anyio.wait_all_tasks_blocked()
                tasks.start_soon(close)
                # All but those that ask for the busy stream, if they are just doing so.
                await until(lambda: len(outcomes) >= 1000)
                assert "closed" not in outcomes
    free()
    outcomes.remove("closed")
    assert len(outcomes) == 1005
    assert all(isinstance(outcome, StoreClosedError) for outcome in outcomes)
    with pytest.raises(StoreClosedError):
        await store.append_events("x", "Thing", [Ended()], ANY)
    rows = database.rows("SELECT aggregate_id FROM eventsource.events ORDER BY position")
    assert [row[0] for row in rows] == [*(f"beside {number}" for number in range(4)), "x"]
    await until(lambda: database.connections() == 0)
