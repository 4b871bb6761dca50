"""The relay of the outbox: at least once, in order by key, whatever fails and whoever dies."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from random import Random
from typing import Any
from uuid import uuid4

import anyio
import pytest

from eventsource_anyio import (
    EventStore,
    InMemoryEventStore,
    OutboxMessage,
    StorageError,
    StoreClosedError,
)
from eventsource_anyio.relay import OutboxRelay
from eventsource_anyio.relay.lease import COLLECTION, Lease, LeaseLostError
from eventsource_anyio.repositories.outbox import StoredMessage
from eventsource_anyio.testing import cancel_at_every_checkpoint
from tests.every_store import make_store, open_store, which_store
from tests.projecting import open_elsewhere
from tests.read_models import until
from tests.receiving import NEVER, PATIENCE, Receiver, add, message, pending, running

__all__ = ["make_store", "open_elsewhere", "open_store", "which_store"]

pytestmark = pytest.mark.usefixtures("again_soon")


class Poison:
    """Fails at some payloads, as long as they are in it."""

    def __init__(self, *payloads: str) -> None:
        self.payloads = set(payloads)

    async def __call__(self, stored: StoredMessage) -> None:
        if stored.message.payload.decode() in self.payloads:
            raise ValueError(f"poison {stored.message.payload.decode()}")


class Away:
    """Cannot be reached, as long as it is `away`."""

    def __init__(self, error: type[Exception] = ConnectionError) -> None:
        self.away = True
        self.error = error
        self.calls = 0

    async def __call__(self, stored: StoredMessage) -> None:
        self.calls += 1
        if self.away:
            raise self.error("there is nobody")


def impatient(store: EventStore, receiver: Receiver, **options: Any) -> OutboxRelay:
    settings: dict[str, Any] = {"attempts": 3, "retry_after": 0.001, "batch_size": 10, **options}
    return OutboxRelay(store, receiver, **settings)


async def delivered(store: EventStore) -> None:
    async def empty() -> bool:
        return not await store.outbox.pending(1)

    await until(empty)


# -- delivering -------------------------------------------------------------------------------


async def test_what_waits_is_delivered_oldest_first_and_removed(store: EventStore):
    expected = [payload for n in range(25) for payload in await add(store, "ab"[n % 2], n)]
    receiver = Receiver()
    async with running(impatient(store, receiver)):
        await delivered(store)
    assert [one.payload.decode() for one in receiver.received] == expected
    assert [len(call) for call in receiver.calls] == [10, 10, 5]


async def test_what_is_delivered_is_the_message(store: EventStore):
    given = OutboxMessage("orders", b"\0\xff", "key", {"a": [1, None, "\0"]})
    found: list[StoredMessage] = []

    async def deliver(messages: Any) -> None:
        found.extend(messages)

    async with running(OutboxRelay(store, deliver)):
        await store.outbox.add(given)
        await delivered(store)
    assert [one.message for one in found] == [given]
    assert abs((datetime.now(UTC) - found[0].recorded_at).total_seconds()) < 60


async def test_a_message_wakes_the_relay_when_it_is_committed(store: EventStore):
    """It polls no more than once an hour, so somebody has to tell it."""
    receiver, hint = Receiver(), store.outbox.hint

    async def waits() -> None:
        await until(lambda: hint._waiting)

    async with running(impatient(store, receiver, poll_every=NEVER)):
        for number in range(2):
            await waits()
            await receiver.has(*await add(store, "a", number))
            await waits()
            async with store.transaction() as tx:
                await tx.outbox.add(message("b", number))
                await tx.documents.save("other", "thing", number)
                await anyio.wait_all_tasks_blocked()
                assert len(receiver.of("b")) == number
            await receiver.has(f"b:{number}")
            if not isinstance(store, InMemoryEventStore):
                await waits()
                await _add_with_sql(store, message("c", number))
                await receiver.has(f"c:{number}")
        await delivered(store)


async def _add_with_sql(store: Any, one: OutboxMessage) -> None:
    from sqlalchemy import text

    async with store.transaction() as tx:
        await tx.execute(text("SELECT 1"))
        await tx.outbox.add(one)


async def test_other_processes_messages_are_found_by_polling(
    store: EventStore, elsewhere: EventStore
):
    receiver = Receiver()
    async with running(impatient(store, receiver, poll_every=0.02)):
        for number in range(3):
            await receiver.has(*await add(elsewhere, "a", number))


async def test_what_is_rolled_back_is_not_delivered(store: EventStore):
    receiver = Receiver()
    async with running(impatient(store, receiver)):
        with pytest.raises(KeyError):
            async with store.transaction() as tx:
                await tx.outbox.add(message("a", 1))
                raise KeyError
        await receiver.has(*await add(store, "b", 1))
    assert receiver.once == ["b:1"]


# -- failing ----------------------------------------------------------------------------------


async def test_a_receiver_that_fails_at_random_gets_every_key_in_order(store: EventStore):
    random, failures = Random(5), 0

    async def before(stored: StoredMessage) -> None:
        nonlocal failures
        if random.randrange(8) == 0:
            failures += 1
            raise OSError("away") if random.randrange(4) == 0 else ValueError("at random")

    receiver = Receiver(before)
    keys, first = "abcde", {key: [f"{key}:{n}" for n in range(12)] for key in "abcde"}
    for number in range(6):
        for key in keys:
            await add(store, key, number)
    async with running(impatient(store, receiver, attempts=100, retry_after=0.0001)):
        for number in range(6, 12):
            for key in keys:
                await add(store, key, number)
        await delivered(store)
    assert failures > 5
    assert {key: receiver.of(key) for key in keys} == first


async def test_what_fails_for_the_last_time_is_set_aside_and_its_key_behind_it(store: EventStore):
    poison = Poison("a:1")
    receiver = Receiver(poison)
    relay = impatient(store, receiver)
    async with running(relay):
        await add(store, "a", 0, 1, 2)
        await receiver.has(*await add(store, "b", 0, 1, 2))
        await delivered(store)
        await add(store, "a", 3)
        await receiver.has(*await add(store, "b", 3))
        await delivered(store)
        assert receiver.of("a") == ["a:0"]
        assert sum(call == ["a:1"] for call in receiver.calls) == 3

        (parked,) = await relay.parked()
        assert (parked.topic, parked.key, parked.messages) == ("t", "a", 3)
        assert parked.error == "ValueError: poison a:1"
        assert abs((datetime.now(UTC) - parked.since).total_seconds()) < 60
        kept = await relay.parked_messages(parked)
        assert [one.message.payload for one in kept] == [b"a:1", b"a:2", b"a:3"]
        first = await relay.parked_messages(parked, limit=1)
        assert first == kept[:1]
        statistics = relay.statistics()
        assert (statistics.state, statistics.parked, statistics.failing) == ("running", 1, 0)
        assert statistics.delivered == 5

        poison.payloads = {"a:2"}  # one after the other is mended, and the next one fails
        with pytest.raises(ValueError, match="poison a:2"):
            await relay.retry_parked(parked)
        (parked,) = await relay.parked()
        assert (parked.messages, parked.error) == (2, "ValueError: poison a:2")
        poison.payloads = set()
        assert await relay.retry_parked(parked) == 2
        assert await relay.parked() == []
        await receiver.has(*await add(store, "a", 4))
        assert await relay.retry_parked(parked) == 0
    assert receiver.of("a") == [f"a:{number}" for number in range(5)]


async def test_what_is_discarded_is_never_delivered(store: EventStore):
    poison = Poison("a:0")
    receiver = Receiver(poison)
    relay = impatient(store, receiver, batch_size=2)
    async with running(relay):
        await add(store, "a", *range(7))
        await delivered(store)
        (parked,) = await relay.parked()
        assert await relay.discard_parked(parked) == 7
        assert await relay.parked() == []
        assert await relay.parked_messages(parked) == []
        await receiver.has(*await add(store, "a", 7))
        assert await relay.discard_parked(parked) == 0
    assert receiver.once == ["a:7"]


async def test_messages_without_a_key_wait_for_nobody(store: EventStore):
    receiver = Receiver(Poison(":1", ":3"))
    relay = impatient(store, receiver)
    async with running(relay):
        await add(store, "", *range(5))
        await delivered(store)
        parked = await relay.parked()
        assert [(one.key, one.messages) for one in parked] == [("", 1), ("", 1)]
        assert await relay.discard_parked(parked[0]) == 1
        (left,) = await relay.parked()
        assert left.id == parked[1].id
    assert sorted(receiver.once) == [":0", ":2", ":4"]


async def test_a_key_is_one_of_its_topic(store: EventStore):
    """Keys of two topics, put together in such a way that their texts are the same."""
    receiver = Receiver(Poison("x=1:1"))
    relay = impatient(store, receiver)
    given = [message("x=1", 1, "t"), message("1", 1, "t=x"), message("x=1", 1, "u")]
    receiver.before = Poison("x=1:1")
    async with running(relay):
        await store.outbox.add(*given)
        await delivered(store)
    assert receiver.once == ["1:1"]
    parked = await relay.parked()
    found = {(one.topic, one.key, one.messages) for one in parked}
    assert found == {("t", "x=1", 1), ("u", "x=1", 1)}
    for one in parked:
        (kept,) = await relay.parked_messages(one)
        assert kept.message.topic == one.topic


async def test_a_failing_key_waits_alone_however_much_of_it_there_is(store: EventStore):
    """More than is looked at in one go, and nothing is to be tried again within this test."""
    receiver = Receiver(Poison("a:0"))
    relay = impatient(store, receiver, retry_after=NEVER, poll_every=NEVER)
    await add(store, "a", *range(35))
    async with running(relay):
        for number in range(3):
            await receiver.has(*await add(store, "b", number))
        await until(lambda: relay.statistics().delivered == 3)
        statistics = relay.statistics()
        assert (statistics.state, statistics.failing, statistics.parked) == ("retrying", 1, 0)
        assert statistics.error == "ValueError: poison a:0"
        assert statistics.lag_seconds > 0
    assert receiver.of("a") == []
    assert await pending(store) == [f"a:{number}" for number in range(35)]
    assert relay.statistics().state == "stopped"


@pytest.mark.parametrize("error", [ConnectionRefusedError, TimeoutError, ZeroDivisionError])
async def test_a_receiver_that_is_away_is_waited_for(store: EventStore, error: type[Exception]):
    away = Away(error)
    receiver = Receiver(away)
    relay = impatient(store, receiver, attempts=1, outages=(OSError, ZeroDivisionError))
    expected = [*await add(store, "a", 0, 1), *await add(store, "b", 0, 1)]
    async with running(relay):
        await until(lambda: away.calls > 3)
        statistics = relay.statistics()
        assert (statistics.state, statistics.parked) == ("retrying", 0)
        assert statistics.error == f"{error.__name__}: there is nobody"
        away.away = False
        await delivered(store)
        assert relay.statistics().error is None
    assert receiver.once == expected
    assert await relay.parked() == []


async def test_it_can_be_stopped_while_the_receiver_is_away(store: EventStore):
    away = Away()
    relay = impatient(store, Receiver(away), lease=NEVER)
    await add(store, "a", 0)
    async with running(relay):
        await until(lambda: away.calls > 2)
        relay.stop()
        await relay.wait_stopped()
    assert await pending(store) == ["a:0"]
    receiver = Receiver()  # the lease was given back
    async with running(impatient(store, receiver, lease=NEVER)):
        await delivered(store)


async def test_a_retry_and_the_relay_share_a_key_in_order(store: EventStore):
    """While one message is delivered by a retry, the relay sets more of its key aside."""
    receiver = Receiver(Poison("a:0"))
    relay = impatient(store, receiver)
    async with running(relay) as tasks:
        await add(store, "a", 0)
        await delivered(store)
        (parked,) = await relay.parked()
        reached, go_on = anyio.Event(), anyio.Event()

        async def before(stored: StoredMessage) -> None:
            if stored.message.payload == b"a:0":
                reached.set()
                await go_on.wait()

        receiver.before = before
        counts: list[int] = []

        async def retry() -> None:
            counts.append(await relay.retry_parked(parked))

        tasks.start_soon(retry)
        await reached.wait()
        await add(store, "a", 1, 2)
        await delivered(store)  # it was set aside
        go_on.set()
        await receiver.has("a:0", "a:1", "a:2")
        await until(lambda: counts)
        await receiver.has(*await add(store, "a", 3))
    assert counts == [3]
    assert receiver.of("a") == ["a:0", "a:1", "a:2", "a:3"]
    assert [call for call in receiver.calls if call == ["a:0"]] == [["a:0"]] * 4  # not once more


# -- one at a time ----------------------------------------------------------------------------


async def test_of_two_relays_one_delivers_until_it_is_stopped(
    store: EventStore, elsewhere: EventStore
):
    first, second = Receiver(), Receiver()
    one = impatient(store, first, lease=0.3, poll_every=0.01)
    other = impatient(elsewhere, second, lease=0.3, poll_every=0.01)
    async with running(one, other):
        for number in range(10):
            await first.has(*await add(store, "a", number))
        assert one.statistics().state == "running"
        assert other.statistics().state == "waiting"
        await delivered(store)
        one.stop()
        await one.wait_stopped()
        for number in range(10, 20):
            await second.has(*await add(store, "a", number))
        assert one.statistics().state == "stopped"
        assert other.statistics().state == "running"
    assert len(first.received) == len(second.received) == 10


async def test_a_long_delivery_keeps_the_lease(store: EventStore, elsewhere: EventStore):
    go_on = anyio.Event()

    async def before(stored: StoredMessage) -> None:
        await go_on.wait()

    first, second = Receiver(before), Receiver()
    await add(store, "a", 0)
    async with running(impatient(store, first, lease=0.3)):
        await until(lambda: first.calls)
        async with running(impatient(elsewhere, second, lease=0.3)):
            await anyio.sleep(1)  # for it to take over, which it must not
            go_on.set()
            await delivered(store)
    assert second.calls == []


@pytest.mark.parametrize("poison", [False, True])
async def test_who_has_lost_the_lease_takes_nothing_out(store: EventStore, poison: bool):
    """It finds out only when it says what it has delivered, or wants to set it aside."""
    reached, go_on = anyio.Event(), anyio.Event()

    async def before(stored: StoredMessage) -> None:
        reached.set()
        await go_on.wait()
        if poison:
            raise ValueError("poison")

    relay = impatient(store, Receiver(before), lease=NEVER, attempts=1)
    await add(store, "a", 0)
    async with running(relay):
        await reached.wait()
        await store.documents.save(COLLECTION, "outbox", {"owner": "another one"})
        go_on.set()
        await until(lambda: relay.statistics().state == "waiting")
        assert relay.statistics().delivered == 0
    assert await pending(store) == ["a:0"]
    assert await relay.parked() == []
    document = await store.documents.get(COLLECTION, "outbox")
    assert document is not None
    assert document.value == {"owner": "another one"}


async def test_a_relay_that_loses_its_lease_ends_its_delivery_and_waits(store: EventStore):
    reached, cancelled = anyio.Event(), anyio.Event()

    async def before(stored: StoredMessage) -> None:
        reached.set()
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.set()

    relay = impatient(store, Receiver(before), lease=0.3)
    await add(store, "a", 0)
    async with running(relay):
        await reached.wait()
        await store.documents.save(COLLECTION, "outbox", {"owner": "another one"})
        await cancelled.wait()
        await until(lambda: relay.statistics().state == "waiting")
        relay.stop()


async def test_one_that_was_paused_asks_before_it_delivers_more(store: EventStore):
    """Nothing of it ran meanwhile, so nothing of it has found out that the lease is gone."""

    async def before(stored: StoredMessage) -> None:
        await store.documents.save(COLLECTION, "outbox", {"owner": "another one"})
        time.sleep(0.4)  # noqa: ASYNC251  (as if the process was stopped)
        raise ValueError("take it apart")

    receiver = Receiver(before)
    relay = impatient(store, receiver, lease=0.6)
    await add(store, "a", 1, 2)
    async with running(relay):
        await until(lambda: relay.statistics().state == "waiting")
        relay.stop()
    assert receiver.calls == [["a:1", "a:2"]]


class TestLease:
    async def test_it_is_held_by_one_and_passed_on(self, store: EventStore, elsewhere: EventStore):
        one, other = Lease(store, "x", NEVER), Lease(elsewhere, "x", NEVER)
        assert await one.take()
        assert not await other.take()
        await one.commit(_adding("1"))
        assert not await other.take()
        with pytest.raises(LeaseLostError):
            await other.commit(_adding("2"))
        await one.release()
        with pytest.raises(LeaseLostError):
            await one.commit(_adding("3"))
        assert await other.take()
        assert not await one.take()
        await other.commit(_adding("4"))
        assert await _added(store) == ["1", "4"]

    async def test_who_is_silent_is_taken_over_from_and_stores_nothing(self, store: EventStore):
        one, other = Lease(store, "x", NEVER), Lease(store, "x", 0.2)
        assert await one.take()
        await one.commit(_adding("1"))
        assert not await other.take()
        begun = anyio.current_time()
        await until(other.take)
        assert anyio.current_time() - begun >= 0.19
        with pytest.raises(LeaseLostError):
            await one.commit(_adding("2"))
        with pytest.raises(LeaseLostError):
            await one.release()
        await other.commit(_adding("3"))
        assert await _added(store) == ["1", "3"]

    async def test_who_says_so_in_time_keeps_it(self, store: EventStore):
        one, other = Lease(store, "x", NEVER), Lease(store, "x", 0.2)
        assert await one.take()
        end = anyio.current_time() + 0.6
        while anyio.current_time() < end:
            await one.commit(_adding(str(uuid4())))
            assert not await other.take()
            await anyio.sleep(0.02)

    async def test_a_write_that_was_cut_off_is_found_out_about(self, store: EventStore):
        one = Lease(store, "x", NEVER)
        number = 0

        async def write() -> bool:
            assert await one.take()
            await one.commit(_adding(str(number)))
            return True

        async def check(result: bool | None) -> None:
            nonlocal number
            other = Lease(store, "x", NEVER)
            assert not await other.take() or result is None
            await one.take()
            with anyio.fail_after(PATIENCE):
                number += 1
                try:
                    await one.commit(_adding(f"{number}"))
                except LeaseLostError:  # the other one took what this one never had
                    assert result is None
                    await other.release()
                else:
                    await one.release()
            number += 1

        assert await cancel_at_every_checkpoint(write, check) >= 2


class LosingAnswers(InMemoryEventStore):
    """The next write is stored, and its answer lost, as with a connection that breaks then."""

    lose = False

    async def _write(self, steps: Any) -> Any:
        results = await super()._write(steps)
        if self.lose:
            self.lose = False
            raise StorageError("there was no answer to COMMIT")
        return results


async def test_a_write_whose_answer_was_lost_costs_no_lease():
    async with LosingAnswers() as store:
        lease = Lease(store, "x", NEVER)
        assert await lease.take()
        store.lose = True
        with pytest.raises(StorageError):
            await lease.commit(_adding("1"))
        await lease.commit(_adding("2"))
        assert await _added(store) == ["1", "2"]
        store.lose = True
        with pytest.raises(StorageError):
            await lease.release()
        assert await Lease(store, "x", NEVER).take()


async def test_a_removal_whose_answer_was_lost_is_not_delivered_again():
    async with LosingAnswers() as store:
        receiver = Receiver()

        async def before(stored: StoredMessage) -> None:
            store.lose = True

        receiver.before = before
        async with running(impatient(store, receiver)):
            await add(store, "a", 1)
            await delivered(store)
            receiver.before = Poison("b:1")
            await add(store, "b", 1, 2)
            await delivered(store)
    assert receiver.once == ["a:1"]
    assert len(receiver.received) == 1


def _adding(key: str) -> Any:
    return lambda tx: tx.documents.add("added", key, None)


async def _added(store: EventStore) -> list[str]:
    return [one.key for one in await store.documents.list("added")]


# -- cancellation, and the end ----------------------------------------------------------------


async def test_cancelled_at_every_checkpoint_nothing_is_lost_or_out_of_order(store: EventStore):
    poison = Poison("b:1")
    expected: dict[str, list[str]] = {"a": [], "b": [], "c": []}
    one: OutboxRelay

    async def before(stored: StoredMessage) -> None:
        if stored.message.payload.decode() == expected["c"][-1]:
            one.stop()
        await poison(stored)

    receiver = Receiver(before)

    def relay() -> OutboxRelay:
        return impatient(store, receiver, attempts=1, batch_size=3, lease=NEVER)

    async def add_some() -> None:
        first = len(expected["a"])
        for number in range(first, first + 3):
            for key, payloads in expected.items():
                payloads += await add(store, key, number)

    async def deliver() -> None:
        nonlocal one
        one = relay()
        await one.run()

    async def check(_: object) -> None:
        nonlocal one
        one = relay()
        left = [*await pending(store), *await _set_aside(one)]
        for payloads in expected.values():
            assert set(payloads) <= {*left, *receiver.once}
        await add_some()
        with anyio.fail_after(PATIENCE):  # at once: the lease was given back
            await one.run()
        async with running(one):  # what was behind a parked one
            await delivered(store)
        for key in "ac":
            assert receiver.of(key) == expected[key]
        assert receiver.of("b") == expected["b"][:1]
        assert await _set_aside(one) == expected["b"][1:]
        await add_some()

    await add_some()
    assert await cancel_at_every_checkpoint(deliver, check) >= 5
    poison.payloads.clear()
    with anyio.fail_after(PATIENCE):
        one = relay()
        await one.run()
    (parked,) = await one.parked()
    assert await one.retry_parked(parked) == parked.messages
    assert receiver.of("b") == expected["b"]


async def _set_aside(relay: OutboxRelay) -> list[str]:
    return [
        one.message.payload.decode()
        for parked in await relay.parked()
        for one in await relay.parked_messages(parked, limit=10**6)
    ]


async def test_a_retry_cancelled_at_every_checkpoint_loses_nothing(store: EventStore):
    poison = Poison()
    receiver = Receiver(poison)
    relay = impatient(store, receiver, attempts=1)
    expected: list[str] = []

    async def set_some_aside() -> None:
        poison.payloads = {f"a:{len(expected)}"}
        expected.extend(await add(store, "a", *range(len(expected), len(expected) + 3)))
        async with running(relay):
            await delivered(store)
        poison.payloads = set()

    async def retry() -> int:
        (parked,) = await relay.parked()
        return await relay.retry_parked(parked)

    async def check(result: int | None) -> None:
        left = await _set_aside(relay)
        assert set(expected) <= {*left, *receiver.once}
        assert left == expected[len(expected) - len(left) :]
        assert receiver.of("a") == expected[: len(receiver.of("a"))]
        if result:
            assert (left, receiver.of("a")) == ([], expected)
        await set_some_aside()

    await set_some_aside()
    assert await cancel_at_every_checkpoint(retry, check) >= 5


async def test_a_store_that_is_closed_ends_it_with_its_error(store: EventStore):
    relay = impatient(store, Receiver(), poll_every=0.01, lease=0.3)
    with anyio.fail_after(PATIENCE):
        with pytest.RaisesGroup(StoreClosedError):
            async with anyio.create_task_group() as tasks:
                await tasks.start(relay.run)
                await store.__aexit__(None, None, None)
        await relay.wait_stopped()


async def test_it_is_run_once_at_a_time(store: EventStore):
    relay = impatient(store, Receiver())
    await relay.wait_stopped()
    for _ in range(2):
        async with running(relay):
            with pytest.raises(RuntimeError, match="running already"):
                await relay.run()


@pytest.mark.parametrize(
    "wrong",
    [
        {"lease": 0},
        {"poll_every": -1},
        {"retry_after": 0},
        {"batch_size": 0},
        {"batch_size": True},
        {"attempts": 0},
        {"attempts": 1.5},
    ],
)
def test_settings_that_make_no_sense(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be a number"):
        OutboxRelay(InMemoryEventStore(), Receiver(), **wrong)


async def test_arguments_that_make_no_sense(store: EventStore):
    with pytest.raises(TypeError, match="async function"):
        OutboxRelay(store, "t")  # type: ignore[arg-type]
    relay = impatient(store, Receiver(Poison("a:0")), attempts=1)
    await add(store, "a", 0)
    async with running(relay):
        await delivered(store)
    (parked,) = await relay.parked()
    with pytest.raises(ValueError, match="limit"):
        await relay.parked_messages(parked, limit=0)
