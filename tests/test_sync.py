"""The store from code that is not async: a loop in a thread of its own, and who may call it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from itertools import islice
from pathlib import Path

import anyio
import anyio.to_thread
import attrs
import pytest
import trio

from eventsource_anyio import (
    ANY,
    NO_STREAM,
    AggregateRepository,
    ConcurrencyError,
    Decider,
    DomainEvent,
    EventDecodeError,
    EventStore,
    InMemoryEventStore,
    ReadOptions,
    SQLiteEventStore,
    StorageError,
    StoreClosedError,
    SyncRunner,
    event_metadata,
)
from eventsource_anyio.testing.reading import forgotten
from eventsource_anyio.testing.samples import Ended, Happened, append_numbers, numbers

PATIENCE = 20.0  # for what would otherwise hang; nothing here takes a second


@pytest.fixture(params=["asyncio", "trio"])
def backend(request: pytest.FixtureRequest) -> str:
    """The loop inside the runner; the tests themselves are on none."""
    loop: str = request.param
    return loop


@pytest.fixture(params=["in-memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> EventStore:
    """A store that is not open: the runner opens it."""
    if request.param == "sqlite":
        return SQLiteEventStore(tmp_path / "events.db", synchronous="NORMAL")
    return InMemoryEventStore()


@pytest.fixture
def runner(store: EventStore, backend: str) -> Iterator[SyncRunner]:
    with SyncRunner(store, backend=backend) as runner:
        yield runner


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for thread in threading.enumerate():
        # Trio keeps its idle worker threads for a while, for whoever runs Trio next.
        if thread not in before and not thread.name.startswith("Trio thread"):
            thread.join(PATIENCE)
            assert not thread.is_alive(), thread


def in_threads(count: int, function: Callable[[int], object]) -> list[object]:
    """The results of the function, called in so many threads that begin at the same time."""
    barrier = threading.Barrier(count)

    def run(number: int) -> object:
        barrier.wait(PATIENCE)
        return function(number)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(run, range(count)))


# -- call -------------------------------------------------------------------------------------


def test_a_call_returns_what_awaiting_it_would(runner, store):
    result = runner.call(store.append_events, "a", "Thing", [Happened(1)], NO_STREAM, metadata={})
    assert result.version == 1
    assert runner.call(store.last_position) == 1
    assert tuple(runner.call(store.get_events, "a", aggregate_type="Thing")) == result.events


def test_a_call_raises_what_awaiting_it_would(runner, store):
    error = KeyError("the caller's own")

    async def fail() -> None:
        raise error

    with pytest.raises(KeyError) as raised:
        runner.call(fail)
    assert raised.value is error
    runner.call(append_numbers, store, 2)
    with pytest.raises(ConcurrencyError, match="Thing-a is at version 2, expected NO_STREAM"):
        runner.call(store.append_events, "a", "Thing", [Ended()], NO_STREAM)


@attrs.frozen
class BellRung(DomainEvent):
    times: int


bell: Decider[int, int, BellRung] = Decider(
    "Bell",
    initial=int,
    decide=lambda times, rung: [BellRung(times)],
    evolve=lambda rung, event: rung + event.times,
)


def test_repositories_are_called_like_stores(runner, store):
    bells = AggregateRepository(store, bell)
    for times in (1, 2):
        runner.call(bells.execute, "b", times)
    assert runner.call(bells.load, "b").state == 3
    assert runner.call(bells.load, "b", version=1).state == 1


def test_the_callers_metadata_and_context_variables_are_seen(runner, store):
    mood: ContextVar[str] = ContextVar("mood", default="none")

    async def change() -> str:
        seen = mood.get()
        mood.set("changed in the loop")
        return seen

    mood.set("calm")
    assert runner.call(change) == "calm"
    assert mood.get() == "calm"
    with event_metadata(user="ann"):
        runner.call(append_numbers, store, 1)
        with runner.context(store.transaction()) as transaction:
            runner.call(transaction.append_events, "b", "Thing", [Ended()], ANY)
    runner.call(append_numbers, store, 1)
    found = [stored.metadata for stored in runner.iterate(store.read_all())]
    assert found == [{"user": "ann"}, {"user": "ann"}, {}]


def test_many_threads_call_at_once(runner, store):
    bells = AggregateRepository(store, bell)

    def work(number: int) -> object:
        with event_metadata(thread=number):
            for _ in range(5):
                runner.call(bells.execute, "shared", 1)
            runner.call(append_numbers, store, 2, f"own {number}")
        return [stored.metadata for stored in runner.call(store.get_events, f"own {number}")]

    assert in_threads(20, work) == [[{"thread": number}] * 2 for number in range(20)]
    assert runner.call(bells.load, "shared").state == 100
    assert len(list(runner.iterate(store.read_all()))) == 140


# -- context ----------------------------------------------------------------------------------


def test_a_transaction_is_stored_when_its_block_ends(runner, store):
    with runner.context(store.transaction()) as transaction:
        runner.call(transaction.append_events, "a", "Thing", [Happened(1)], NO_STREAM)
        runner.call(transaction.append_events, "b", "Thing", [Happened(2)], NO_STREAM)
        assert runner.call(store.last_position) == 0
    assert [result.version for result in transaction.results] == [1, 1]
    assert numbers(list(runner.iterate(store.read_all()))) == [1, 2]


def test_an_exception_of_the_block_arrives_as_it_is_and_stores_nothing(runner, store):
    error = KeyError("the caller's own")
    with pytest.raises(KeyError) as raised, runner.context(store.transaction()) as transaction:
        runner.call(transaction.append_events, "a", "Thing", [Ended()], ANY)
        raise error
    assert raised.value is error
    assert runner.call(store.last_position) == 0


def test_what_fails_at_the_end_of_the_block_is_raised_there(runner, store):
    with pytest.raises(ConcurrencyError), runner.context(store.transaction()) as transaction:
        runner.call(transaction.append_events, "a", "Thing", [Ended()], 7)
    assert transaction.results == ()


def test_a_subscription_gives_every_event_as_it_comes(runner, store):
    runner.call(append_numbers, store, 3)
    with runner.context(store.subscribe(after=0, options=ReadOptions(batch_size=2))) as events:
        assert numbers(list(islice(runner.iterate(events), 2))) == [0, 1]
        assert events.position == 2
        assert numbers(list(islice(runner.iterate(events), 1))) == [2]  # it has taken no more
        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(lambda: list(islice(runner.iterate(events), 2)))
            runner.call(append_numbers, store, 2, "b")
            assert numbers(coming.result(PATIENCE)) == [0, 1]
    with pytest.raises(RuntimeError, match="inside its block"):
        next(runner.iterate(events))


# -- iterate ----------------------------------------------------------------------------------


def test_it_gives_what_async_for_would(runner, store):
    runner.call(append_numbers, store, 700)
    assert numbers(list(runner.iterate(store.read_stream("Thing-a")))) == list(range(700))
    backwards = ReadOptions(backwards=True, limit=600, batch_size=7)
    assert numbers(list(runner.iterate(store.read_all(backwards)))) == list(range(699, 99, -1))
    assert list(runner.iterate(store.read_stream("Thing-b"))) == []


def test_it_may_be_left_at_any_time(runner, store):
    runner.call(append_numbers, store, 10)
    for taken in (0, 1, 10):
        events = runner.iterate(store.read_all(ReadOptions(batch_size=3)))
        assert len(list(islice(events, taken))) == taken
        del events
    assert runner.call(store.last_position) == 10


def test_an_event_that_cannot_be_read_costs_only_itself(runner, store):
    for number in range(3):
        runner.call(append_numbers, store, 4, str(number))
        runner.call(store.append_events, str(number), "Thing", [Ended()], ANY)
    seen: list[int] = []
    errors: list[int] = []
    reader = store.read_all(ReadOptions(batch_size=7))
    with forgotten(Ended.event_type):
        for _ in range(3):
            with pytest.raises(EventDecodeError) as raised:
                for stored in runner.iterate(reader):
                    seen.extend(numbers([stored]))
            errors.append(raised.value.position)
            assert len(seen) == 4 * len(errors)
        assert list(runner.iterate(reader)) == []
    assert seen == [0, 1, 2, 3] * 3
    assert errors == [5, 10, 15]


# -- where it may be called -------------------------------------------------------------------


def uses(runner: SyncRunner, store: EventStore) -> list[Callable[[], object]]:
    """Every way to use a runner, and to start another one."""
    return [
        lambda: runner.call(store.last_position),
        lambda: next(runner.iterate(store.read_all())),
        runner.context(store.transaction()).__enter__,
        SyncRunner(InMemoryEventStore()).__enter__,
    ]


def check_refused(runner: SyncRunner, store: EventStore) -> int:
    refused = 0
    for use in uses(runner, store):
        with pytest.raises(RuntimeError, match="a thread that runs an event loop, which it would"):
            use()
        refused += 1
    return refused


def test_it_is_refused_in_a_loop_of_asyncio(runner, store):
    async def main() -> int:
        return check_refused(runner, store)

    assert asyncio.run(main()) == 4


@pytest.mark.parametrize("outside", ["asyncio", "trio"])
def test_it_is_refused_in_a_loop_of_anyio(runner, store, outside):
    async def main() -> int:
        return check_refused(runner, store)

    assert anyio.run(main, backend=outside) == 4


def test_it_is_refused_in_a_loop_of_trio(runner, store):
    async def main() -> int:
        return check_refused(runner, store)

    assert trio.run(main) == 4


def test_it_is_refused_in_its_own_loop(runner, store):
    async def main() -> int:
        return check_refused(runner, store)

    assert runner.call(main) == 4


def test_the_refusal_says_what_to_do(runner, store):
    async def main() -> None:
        runner.call(store.last_position)

    with pytest.raises(RuntimeError) as raised:
        anyio.run(main)
    assert str(raised.value) == (
        "SyncRunner.call was called in a thread that runs an event loop, which it would block for "
        "ever. Await the store's own methods there; to call synchronous code from there, use "
        "`await anyio.to_thread.run_sync(…)`."
    )


@pytest.mark.parametrize("outside", ["asyncio", "trio"])
def test_it_works_in_a_worker_thread_of_any_loop(runner, store, outside):
    def work() -> list[int]:
        runner.call(append_numbers, store, 2)
        with runner.context(store.transaction()) as transaction:
            runner.call(transaction.append_events, "b", "Thing", [Happened(7)], NO_STREAM)
        return numbers(list(runner.iterate(store.read_all())))

    async def main() -> list[int]:
        return await anyio.to_thread.run_sync(work)

    assert anyio.run(main, backend=outside) == [0, 1, 7]


def test_it_works_in_threads_of_asyncio_and_trio_themselves(runner, store):
    async def of_asyncio() -> int:
        return await asyncio.to_thread(runner.call, store.last_position)

    async def of_trio() -> int:
        return await trio.to_thread.run_sync(runner.call, store.last_position)

    runner.call(append_numbers, store, 3)
    assert (asyncio.run(of_asyncio()), trio.run(of_trio)) == (3, 3)


def test_it_works_in_a_worker_thread_of_its_own_loop(runner, store):
    """A view that is called by the loop's own thread pool, say."""

    async def main() -> int:
        return await anyio.to_thread.run_sync(runner.call, store.last_position)

    assert runner.call(main) == 0


# -- its life ---------------------------------------------------------------------------------


def test_it_is_used_inside_its_block(store, backend):
    runner = SyncRunner(store, backend=backend)

    def check() -> None:
        for use in uses(runner, store)[:3]:
            with pytest.raises(RuntimeError, match="the SyncRunner is not running"):
                use()

    check()
    with runner:
        assert runner.call(store.last_position) == 0
    check()


def test_it_runs_once_at_a_time_and_may_be_started_again(store, backend):
    runner = SyncRunner(store, backend=backend)
    for count in (2, 4):
        with runner as entered:
            assert entered is runner
            with pytest.raises(RuntimeError, match="this SyncRunner is running already"):
                runner.__enter__()
            runner.call(append_numbers, store, 2)
            assert runner.call(store.last_position) == count


def test_an_exception_leaves_it_as_it_is_and_closes_the_store(store, backend):
    error = KeyError("the caller's own")
    with pytest.raises(KeyError) as raised, SyncRunner(store, backend=backend) as runner:
        runner.call(append_numbers, store, 1)
        raise error
    assert raised.value is error
    with pytest.raises(StoreClosedError):
        anyio.run(store.last_position, backend=backend)


def test_a_store_that_cannot_be_opened_says_so(tmp_path, backend):
    runner = SyncRunner(SQLiteEventStore(tmp_path / "missing" / "events.db"), backend=backend)
    for _ in range(2):
        with pytest.raises(StorageError, match="cannot be opened as an event store"), runner:
            pytest.fail("it was entered")
    with pytest.raises(RuntimeError, match="not running"):
        runner.call(anyio.sleep, 0)


def test_a_loop_that_does_not_exist_says_so():
    with (
        pytest.raises(LookupError, match="gevent"),
        SyncRunner(InMemoryEventStore(), backend="gevent"),
    ):
        pytest.fail("it was entered")


def test_its_end_wakes_a_thread_that_waits_for_events(store, backend):
    with ThreadPoolExecutor(1) as threads:
        with SyncRunner(store, backend=backend) as runner:
            entered = threading.Event()

            def follow() -> None:
                with runner.context(store.subscribe()) as events:
                    entered.set()
                    for _ in runner.iterate(events):
                        pass

            following = threads.submit(follow)
            assert entered.wait(PATIENCE)
            runner.call(anyio.wait_all_tasks_blocked)
        with pytest.raises((StoreClosedError, RuntimeError), match=r"not open|not running"):
            following.result(PATIENCE)


def test_its_end_does_not_wait_for_a_thread_inside_a_context(store, backend):
    with ThreadPoolExecutor(1) as threads:
        with SyncRunner(store, backend=backend) as runner:
            entered, ended = threading.Event(), threading.Event()

            def transact() -> None:
                with runner.context(store.transaction()) as transaction:
                    runner.call(transaction.append_events, "a", "Thing", [Ended()], ANY)
                    entered.set()
                    assert ended.wait(PATIENCE)

            transacting = threads.submit(transact)
            assert entered.wait(PATIENCE)
        ended.set()
        with pytest.raises(RuntimeError):  # what it meant to store is not stored, and it is told
            transacting.result(PATIENCE)
    with SyncRunner(store, backend=backend) as runner:
        assert runner.call(store.last_position) == 0
