"""Process managers and their timers, on every store: each event has its consequences once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from random import Random
from typing import ClassVar, cast
from uuid import UUID

import anyio
import attrs
import pytest
from anyio.lowlevel import checkpoint

from eventsource_anyio import (
    ANY,
    AggregateRoot,
    AppendResult,
    Decider,
    DomainEvent,
    EventEncodeError,
    EventStore,
    InMemoryEventStore,
    OutboxMessage,
    StorageError,
    StoredEvent,
    Transaction,
    applies,
)
from eventsource_anyio.errors import ProjectionStoppedError
from eventsource_anyio.projections import (
    PendingTimer,
    ProcessManager,
    ProjectionCoordinator,
    Reaction,
    SystemClock,
    handles,
)
from eventsource_anyio.testing import ManualClock
from tests.every_store import make_store, open_store, which_store

__all__ = ["make_store", "open_store", "which_store"]

pytestmark = pytest.mark.usefixtures("saved_soon")

SIXTY_DAYS = timedelta(days=60)


@attrs.frozen
class Placed(DomainEvent):
    event_type: ClassVar[str] = "process_tests.Placed"

    order: str
    amount: int


@attrs.frozen
class Paid(DomainEvent):
    event_type: ClassVar[str] = "process_tests.Paid"

    order: str


@attrs.frozen
class Begun(DomainEvent):
    event_type: ClassVar[str] = "process_tests.Begun"

    amount: int


@attrs.frozen
class Confirmed(DomainEvent):
    event_type: ClassVar[str] = "process_tests.Confirmed"


@attrs.frozen
class Refused(DomainEvent):
    event_type: ClassVar[str] = "process_tests.Refused"


@attrs.frozen
class Settled(DomainEvent):
    event_type: ClassVar[str] = "process_tests.Settled"


@attrs.frozen
class Overdue(DomainEvent):
    event_type: ClassVar[str] = "process_tests.Overdue"

    number: int = 0


@attrs.frozen
class Reserved(DomainEvent):
    event_type: ClassVar[str] = "process_tests.Reserved"

    amount: int


class TooMuchError(Exception):
    pass


class Account(AggregateRoot):
    aggregate_type: ClassVar[str] = "ProcessTestsAccount"
    reserved = 0

    def reserve(self, *amounts: int) -> None:
        for amount in amounts:
            if amount > 100:
                raise TooMuchError(amount)
            self.apply(Reserved(amount))

    @applies(Reserved)
    def _reserved(self, event: Reserved) -> None:
        self.reserved += event.amount


class Order(AggregateRoot):
    aggregate_type: ClassVar[str] = "ProcessTestsOrder"
    settled = False
    events = 0

    @applies(Begun, Confirmed, Refused, Overdue)
    def _noted(self, event: DomainEvent) -> None:
        self.events += 1

    @applies(Settled)
    def _settled(self, event: Settled) -> None:
        self.settled = True


class Orders(ProcessManager[Order]):
    name = "orders"
    process = Order
    retry_after = 0.001
    look_every = 0.02

    def correlate(self, event: StoredEvent) -> str | None:
        assert isinstance(event.event, Placed | Paid)
        return event.event.order or None

    @handles(Placed)
    async def placed(self, event: StoredEvent[Placed], order: Order, act: Reaction) -> None:
        amount = event.event.amount
        order.apply(Begun(amount))
        await act.execute(Account, "till", Account.reserve, amount)
        await act.send(OutboxMessage("placed", str(order.aggregate_id).encode()))
        await act.schedule(Overdue(), after=SIXTY_DAYS)

    @handles(Begun)
    async def begun(self, event: StoredEvent[Begun], order: Order, act: Reaction) -> None:
        order.apply(Confirmed())

    @handles(Paid)
    async def paid(self, event: StoredEvent[Paid], order: Order, act: Reaction) -> None:
        order.apply(Settled())
        await act.cancel(Overdue)

    @handles(Overdue)
    async def overdue(self, event: StoredEvent[Overdue], order: Order, act: Reaction) -> None:
        if not order.settled:
            await act.send(OutboxMessage("reminder", str(order.aggregate_id).encode()))


def orders(store: EventStore, kind: type[Orders] = Orders, **attributes: object) -> Orders:
    manager = kind(store)
    for name, value in attributes.items():
        setattr(manager, name, value)
    return manager


async def place(store: EventStore, *names: str, amount: int = 1) -> AppendResult:
    """Each in a stream of its own, so that shards have some of them each."""
    result = None
    for name in names:
        result = await store.append_events(name, "Shop", [Placed(name, amount)], ANY)
    assert result is not None
    return result


async def quiet(store: EventStore, *coordinators: ProjectionCoordinator) -> None:
    """Wait until nothing follows from anything any more."""
    position = -1
    while position != (position := await store.last_position()):
        for coordinator in coordinators:
            await coordinator.wait_for(position)


async def run_until_quiet(store: EventStore, manager: Orders) -> None:
    coordinator = ProjectionCoordinator(store, [manager])
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            await tasks.start(coordinator.run)
            await quiet(store, coordinator)
            coordinator.stop()


async def seen(store: EventStore, kind: type[DomainEvent], count: int) -> list[StoredEvent]:
    """Wait until there are so many events of a kind; then they are all that there are."""
    with anyio.fail_after(60):
        async with store.subscribe() as subscription:
            found: list[StoredEvent] = []
            async for event in subscription:
                if isinstance(event.event, kind):
                    found.append(event)
                    if len(found) == count:
                        break
    assert len(await every(store, kind)) == count
    return found


async def every(store: EventStore, kind: type[DomainEvent]) -> list[StoredEvent]:
    return [event async for event in store.read_all() if isinstance(event.event, kind)]


async def messages(store: EventStore) -> Counter[tuple[str, str]]:
    pending = await store.outbox.pending(10_000)
    return Counter((one.message.topic, one.message.payload.decode()) for one in pending)


async def timers(store: EventStore) -> tuple[int, int]:
    collection = "projections/orders/timers"
    by_moment = await store.documents.list(collection, limit=10_000)
    return len(by_moment), len(await store.documents.list(f"{collection}/keys", limit=10_000))


async def check_once(store: EventStore, names: list[str], amount: int = 1) -> None:
    """Every order has been placed, and nothing was done twice for any of them."""
    assert await messages(store) == Counter({("placed", name): 1 for name in names})
    account = [event.event async for event in store.read_stream("ProcessTestsAccount-till")]
    assert account == [Reserved(amount)] * len(names)
    for name in names:
        stream = await store.get_events(name, "ProcessTestsOrder")
        assert [one.event for one in stream] == [Begun(amount), Confirmed()]
    assert await timers(store) == (len(names), len(names))


# What follows from an event ----------------------------------------------------------------------


async def test_each_event_has_its_consequences_once(store: EventStore) -> None:
    names = [str(number) for number in range(12)]
    await place(store, *names[:6])
    manager = orders(store)
    coordinator = ProjectionCoordinator(store, [manager])
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            await tasks.start(coordinator.run)
            await place(store, *names[6:])
            await quiet(store, coordinator)
            coordinator.stop()
    await check_once(store, names)
    await run_until_quiet(store, orders(store))
    await check_once(store, names)


async def test_what_follows_carries_what_caused_it(store: EventStore) -> None:
    placed = (await place(store, "a")).events[0]
    clock = ManualClock()
    clock.advance(SIXTY_DAYS + timedelta(hours=1))
    await run_until_quiet(store, orders(store, clock=clock))
    coordinator = ProjectionCoordinator(store, [orders(store, clock=clock)])
    async with anyio.create_task_group() as tasks:
        await tasks.start(coordinator.run)
        (overdue,) = await seen(store, Overdue, 1)
        coordinator.stop()
    (begun,) = await every(store, Begun)
    (confirmed,) = await every(store, Confirmed)
    (reserved,) = await every(store, Reserved)
    for event in (begun, reserved, overdue):
        assert event.causation_id == str(placed.event_id)
        assert event.correlation_id == str(placed.event_id)
    assert confirmed.causation_id == str(begun.event_id)
    assert confirmed.correlation_id == str(placed.event_id)
    assert overdue.occurred_at == placed.occurred_at + SIXTY_DAYS
    first = (await store.outbox.pending())[0].message
    assert first.metadata["causation_id"] == str(placed.event_id)


async def test_events_of_one_process_in_a_batch_see_each_other(store: EventStore) -> None:
    states: list[tuple[int, int]] = []

    class Twice(Orders):
        @handles(Placed)
        async def placed(self, event: StoredEvent[Placed], order: Order, act: Reaction) -> None:
            states.append((order.events, order.version))
            order.apply(Begun(event.event.amount))
            await act.execute(Account, "till", Account.reserve, 1)
            await act.execute(Account, "till", Account.reserve, 2, 3)
            for _ in range(2):
                await act.schedule(Overdue(len(states)), after=SIXTY_DAYS)
            await act.cancel("of another name")

    await store.append_events("s", "Shop", [Placed("a", 1), Placed("a", 2), Placed("a", 3)], ANY)
    await run_until_quiet(store, orders(store, Twice))
    assert states == [(0, 0), (1, 1), (2, 2)]
    assert [one.event for one in await every(store, Reserved)] == [
        Reserved(1),
        Reserved(2),
        Reserved(3),
    ] * 3
    assert await timers(store) == (1, 1)


async def test_a_version_that_does_not_serve_reacts_to_nothing(store: EventStore) -> None:
    names = ["a", "b", "c"]
    coordinator = ProjectionCoordinator(store, [orders(store), orders(store, version=2)])
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            await tasks.start(coordinator.run)
            await place(store, *names)
            await quiet(store, coordinator)
            coordinator.stop()
    await check_once(store, names)


async def test_an_event_of_no_process_is_left_alone(store: EventStore) -> None:
    await place(store, "a")
    await store.append_events("s", "Shop", [Placed("", 1), Paid("")], ANY)
    await run_until_quiet(store, orders(store))
    await check_once(store, ["a"])


async def test_a_command_that_is_refused_may_be_caught(store: EventStore) -> None:
    calls = 0

    class Careful(Orders):
        @handles(Placed)
        async def placed(self, event: StoredEvent[Placed], order: Order, act: Reaction) -> None:
            nonlocal calls
            calls += 1
            try:
                await act.execute(Account, "till", Account.reserve, 1, event.event.amount)
            except TooMuchError:
                order.apply(Refused())
                await act.execute(Account, "till", Account.reserve, 7)

    events = [Placed("a", 2), Placed("b", 101), Placed("c", 3)]
    await store.append_events("s", "Shop", events, ANY)
    await run_until_quiet(store, orders(store, Careful))
    amounts = [one.event for one in await every(store, Reserved)]
    assert amounts == [Reserved(amount) for amount in (1, 2, 7, 1, 3)]
    assert [one.aggregate_id for one in await every(store, Refused)] == ["b"]
    assert calls == len(events)  # nothing had to be decided anew


async def test_a_command_of_a_decider(store: EventStore) -> None:
    def decide(command: int, state: int) -> list[Reserved]:
        return [Reserved(command + state)]

    def evolve(state: int, event: Reserved) -> int:
        return state + event.amount

    till = Decider("ProcessTestsTill", initial=lambda: 0, decide=decide, evolve=evolve)

    class Deciding(Orders):
        @handles(Placed)
        async def placed(self, event: StoredEvent[Placed], order: Order, act: Reaction) -> None:
            await act.execute(till, "a", event.event.amount)

    await store.append_events("s", "Shop", [Placed("a", 1), Placed("b", 1), Placed("c", 1)], ANY)
    await run_until_quiet(store, orders(store, Deciding))
    assert [one.event for one in await every(store, Reserved)] == [
        Reserved(1),
        Reserved(2),
        Reserved(4),
    ]


# Failures ----------------------------------------------------------------------------------------


async def test_a_handler_that_fails_at_random(store: EventStore) -> None:
    random = Random(4)
    failures = 0

    class Failing(Orders):
        async def react(self, event: StoredEvent, tx: Transaction) -> None:
            self.fail()
            await super().react(event, tx)
            self.fail()

        def fail(self) -> None:
            nonlocal failures
            if random.random() < 0.2:
                failures += 1
                raise RuntimeError("at random")

    names = [str(number) for number in range(25)]
    await place(store, *names)
    await run_until_quiet(store, orders(store, Failing, attempts=100, shards=2))
    assert failures > 10
    await check_once(store, names)


async def test_cancelled_anywhere_and_started_again(store: EventStore) -> None:
    names: list[str] = []
    patience = 1.0
    for number in range(25):
        names.append(str(number))
        await place(store, names[-1])
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                coordinator = ProjectionCoordinator(store, [orders(store, shards=2)])
                tasks.start_soon(coordinator.run)
                for _ in range(int(patience)):
                    await checkpoint()
                scope.cancel()
        patience *= 1.3
    await run_until_quiet(store, orders(store))
    await check_once(store, names)


async def test_a_handler_cancelled_at_each_of_its_checkpoints(store: EventStore) -> None:
    """One event's work, cancelled at its first step, its second, and so on, until it is through."""
    names: list[str] = []
    steps, done = 0, False
    while not done:
        steps = max(steps + 1, steps * 6 // 5)
        name = str(steps)
        names.append(name)
        await place(store, name)

        class Cancelled(Orders):
            async def react(self, event: StoredEvent, tx: Transaction) -> None:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self.cancel_after_steps)
                    await super().react(event, tx)
                    tasks.cancel_scope.cancel()
                nonlocal done
                done = True

            async def cancel_after_steps(self) -> None:
                for _ in range(steps):  # noqa: B023
                    await checkpoint()
                scope.cancel()

        coordinator = ProjectionCoordinator(store, [orders(store, Cancelled)])
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                await tasks.start(coordinator.run)
                await quiet(store, coordinator)
                coordinator.stop()
    await run_until_quiet(store, orders(store))
    await check_once(store, names)


async def test_two_coordinators_of_one_store(store: EventStore) -> None:
    names = [str(number) for number in range(30)]
    coordinators = [
        ProjectionCoordinator(store, [orders(store, shards=4)], lease=1) for _ in range(2)
    ]
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            for coordinator in coordinators:
                await tasks.start(coordinator.run)
            await place(store, *names)
            await quiet(store, *coordinators)
            for coordinator in coordinators:
                coordinator.stop()
    await check_once(store, names)


async def test_an_event_that_cannot_be_reacted_to_is_parked(store: EventStore) -> None:
    await place(store, "a")
    await place(store, "b", amount=101)
    await place(store, "c")
    manager = orders(store, attempts=2, on_failure="park")
    await run_until_quiet(store, manager)
    await check_once(store, ["a", "c"])
    (parked,) = await store.documents.list("projections/orders/1/parked")
    assert parked.key == "Shop-b"


async def test_a_command_where_another_writer_gets_ahead(store: EventStore) -> None:
    decided: list[int] = []

    class Raced(Orders):
        attempts = 1

        @handles(Placed)
        async def placed(self, event: StoredEvent[Placed], order: Order, act: Reaction) -> None:
            def reserve(account: Account, amount: int) -> None:
                decided.append(account.reserved)
                account.reserve(amount)

            await act.execute(Account, "till", reserve, 1)
            if len(decided) <= 6:
                await store.append_events("till", "ProcessTestsAccount", [Reserved(10)], ANY)

    await place(store, "a")
    await run_until_quiet(store, orders(store, Raced))
    assert decided == [0, 10, 20, 30, 40, 50, 60]
    assert [one.event for one in await every(store, Reserved)][-1] == Reserved(1)


# Timers ------------------------------------------------------------------------------------------


async def test_a_timer_fires_once_when_it_is_due(store: EventStore) -> None:
    clock = ManualClock()
    coordinator = ProjectionCoordinator(store, [orders(store, clock=clock, look_every=60.0)])
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            await tasks.start(coordinator.run)
            await place(store, "a", "b")
            await coordinator.wait_for(await store.append_events("s", "Shop", [Paid("b")], ANY))
            clock.advance(SIXTY_DAYS - timedelta(days=1))
            await place(store, "c")
            await coordinator.wait_for(await store.append_events("s", "Shop", [Paid("c")], ANY))
            assert await every(store, Overdue) == []
            clock.advance(timedelta(days=2))
            (fired,) = await seen(store, Overdue, 1)
            assert fired.stream_id == "ProcessTestsOrder-a"
            await quiet(store, coordinator)
            coordinator.stop()
    expected = {("placed", name): 1 for name in "abc"} | {("reminder", "a"): 1}
    assert await messages(store) == Counter(expected)
    assert await timers(store) == (0, 0)


async def test_timers_survive_a_restart(store: EventStore) -> None:
    names = [f"{number:03}" for number in range(150)]
    events = [Placed(name, 1) for name in names]
    await store.append_events("s", "Shop", events, ANY)
    await run_until_quiet(store, orders(store))
    assert await timers(store) == (150, 150)
    clock = ManualClock()
    clock.advance(SIXTY_DAYS * 2)
    coordinator = ProjectionCoordinator(store, [orders(store, clock=clock, look_every=60.0)])
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            await tasks.start(coordinator.run)
            fired = await seen(store, Overdue, 150)
            await quiet(store, coordinator)
            coordinator.stop()
    assert sorted(str(one.aggregate_id) for one in fired) == names
    expected = {(topic, name): 1 for topic in ("placed", "reminder") for name in names}
    assert await messages(store) == Counter(expected)
    assert await timers(store) == (0, 0)


async def test_of_two_that_fire_one_wins(store: EventStore) -> None:
    names = [f"{number:03}" for number in range(60)]
    await store.append_events("s", "Shop", [Placed(name, 1) for name in names], ANY)
    await run_until_quiet(store, orders(store))
    clock = ManualClock()
    managers = [orders(store, clock=clock, look_every=60.0) for _ in range(3)]
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            for manager in managers:
                tasks.start_soon(manager.background)
            await anyio.wait_all_tasks_blocked()
            clock.advance(SIXTY_DAYS * 2)
            while await timers(store) != (0, 0):
                await checkpoint()
            tasks.cancel_scope.cancel()
    fired = await every(store, Overdue)
    assert sorted(str(one.aggregate_id) for one in fired) == names


async def test_firing_cancelled_anywhere_and_done_again(store: EventStore) -> None:
    names = [f"{number:03}" for number in range(120)]
    await store.append_events("s", "Shop", [Placed(name, 1) for name in names], ANY)
    await run_until_quiet(store, orders(store))
    clock = ManualClock()
    clock.advance(SIXTY_DAYS * 2)
    steps = 1.0
    with anyio.fail_after(60):
        while await timers(store) != (0, 0):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(orders(store, clock=clock).background)
                for _ in range(int(steps)):
                    await checkpoint()
                tasks.cancel_scope.cancel()
            steps *= 1.2
    fired = await every(store, Overdue)
    assert sorted(str(one.aggregate_id) for one in fired) == names


class Named(Orders):
    """Timers under keys of their own, by the moment."""

    @handles(Placed)
    async def placed(self, event: StoredEvent[Placed], order: Order, act: Reaction) -> None:
        moment = datetime(2020, 1, 1, tzinfo=UTC) + timedelta(days=event.event.amount)
        for number in range(5):
            await act.schedule(Overdue(number), at=moment, key=str(number))
        await act.cancel("1")
        await act.schedule(Overdue(5), at=moment, key="1")
        await act.cancel("3")
        await act.cancel("unknown")

    @handles(Paid)
    async def paid(self, event: StoredEvent[Paid], order: Order, act: Reaction) -> None:
        await act.cancel("4")
        await act.schedule(Overdue(20), at=datetime(2019, 1, 1, tzinfo=UTC), key="0")


async def test_timers_of_one_instant_and_those_taken_back(store: EventStore) -> None:
    """Set, replaced and cancelled, in the transaction that set them and in a later one."""
    clock = ManualClock(datetime(2018, 1, 1, tzinfo=UTC))
    coordinator = ProjectionCoordinator(store, [orders(store, Named, clock=clock)])
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            await tasks.start(coordinator.run)
            await coordinator.wait_for(await place(store, "a"))
            assert await timers(store) == (4, 4)
            await coordinator.wait_for(await store.append_events("s", "Shop", [Paid("a")], ANY))
            clock.advance(timedelta(days=3650))
            fired = await seen(store, Overdue, 3)
            coordinator.stop()
    numbers = [one.event.number for one in fired if isinstance(one.event, Overdue)]
    assert numbers[0] == 20
    assert sorted(numbers) == [2, 5, 20]
    assert await timers(store) == (0, 0)


async def test_pending_timers_are_seen(store: EventStore) -> None:
    """Of all processes, of one, a page at a time; no more once they are gone."""
    uuid = UUID("00000000-0000-7000-8000-000000000001")
    names = ["a", "a/b", "1/a", str(uuid)]  # none of them is taken for part of another one
    clock = ManualClock(datetime(2018, 1, 1, tzinfo=UTC))
    manager = orders(store, Named, clock=clock)
    assert await manager.pending_timers() == []
    for days, name in enumerate(names):
        await place(store, name, amount=days + 1)
    await run_until_quiet(store, manager)
    found = await manager.pending_timers(limit=1000)
    moments = [datetime(2020, 1, 2 + days, tzinfo=UTC) for days in range(4) for _ in range(4)]
    assert [one.due for one in found] == moments
    assert [one.process_id for one in found[::4]] == ["a", "a/b", "1/a", uuid]
    assert {one.stream_id for one in found[12:]} == {f"ProcessTestsOrder-{uuid}"}
    assert sorted(one.key for one in found[:4]) == ["0", "1", "2", "4"]
    assert {one.event_type for one in found} == {"process_tests.Overdue"}
    paged: list[PendingTimer] = []
    while page := await manager.pending_timers(limit=3, after=paged[-1] if paged else None):
        paged += page
    assert paged == found
    for its in (0, 4, 8, 12):
        assert await manager.pending_timers(found[its].process_id) == found[its : its + 4]
    assert await manager.pending_timers(str(uuid)) == found[12:]
    assert await manager.pending_timers("b") == []
    with pytest.raises(ValueError, match="limit"):
        await manager.pending_timers(limit=0)

    coordinator = ProjectionCoordinator(store, [manager])
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            await tasks.start(coordinator.run)
            clock.advance(timedelta(days=365 * 2 + 2))
            fired = await seen(store, Overdue, 8)
            coordinator.stop()
    assert {one.event_id for one in fired} == {one.event_id for one in found[:8]}
    assert await manager.pending_timers() == found[8:]


async def test_pending_timers_of_one_process_are_many(store: EventStore) -> None:
    class Many(Orders):
        @handles(Placed)
        async def placed(self, event: StoredEvent[Placed], order: Order, act: Reaction) -> None:
            for number in range(event.event.amount):
                due = datetime(2200, 1, 1, tzinfo=UTC) - timedelta(days=number)
                await act.schedule(Overdue(number), at=due, key=f"{number}")

    await place(store, "a", amount=210)
    await place(store, "b", amount=1)
    manager = orders(store, Many)
    await run_until_quiet(store, manager)
    found = await manager.pending_timers("a")
    assert [one.key for one in found] == [str(number) for number in reversed(range(210))]


async def test_a_timer_that_is_due_already_fires_at_once(store: EventStore) -> None:
    """Woken by this process, though it cannot be seen before its transaction has ended."""

    class AtOnce(Orders):
        @handles(Placed)
        async def placed(self, event: StoredEvent[Placed], order: Order, act: Reaction) -> None:
            await act.schedule(Overdue(), after=timedelta(0))

    manager = orders(store, AtOnce, clock=SystemClock(), look_every=1000.0)
    coordinator = ProjectionCoordinator(store, [manager])
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            await tasks.start(coordinator.run)
            for number in range(1, 4):
                await place(store, str(number))
                await seen(store, Overdue, number)
            coordinator.stop()


async def test_a_timer_set_elsewhere_is_noticed(store: EventStore) -> None:
    clock = ManualClock()
    clock.advance(SIXTY_DAYS * 2)
    here = orders(store, clock=clock)
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(here.background)
            await anyio.wait_all_tasks_blocked()
            await place(store, "a")
            await run_until_quiet(store, orders(store, clock=ManualClock()))
            await seen(store, Overdue, 1)
            tasks.cancel_scope.cancel()


async def test_a_timer_that_fires_while_it_is_cancelled(store: EventStore) -> None:
    """Fired between the handler's look and its commit: the event is handled anew."""
    fired = 0

    class Late(Orders):
        attempts = 1

        @handles(Paid)
        async def paid(self, event: StoredEvent[Paid], order: Order, act: Reaction) -> None:
            nonlocal fired
            fired = order.events
            await act.cancel(Overdue)
            while await timers(store) != (0, 0):
                clock.advance(SIXTY_DAYS * 2)
                await checkpoint()
            order.apply(Settled())

    clock = ManualClock()
    coordinator = ProjectionCoordinator(store, [orders(store, Late, clock=clock)])
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            await tasks.start(coordinator.run)
            await place(store, "a")
            await quiet(store, coordinator)
            await store.append_events("s", "Shop", [Paid("a")], ANY)
            await quiet(store, coordinator)
            coordinator.stop()
    assert fired == 3  # begun, confirmed, overdue
    assert len(await every(store, Overdue)) == 1
    assert len(await every(store, Settled)) == 1


async def test_one_that_cannot_be_fired_delays_no_other(
    store: EventStore, caplog: pytest.LogCaptureFixture
) -> None:
    await place(store, "a", "b", "c")
    await run_until_quiet(store, orders(store))
    collection = "projections/orders/timers"
    first = (await store.documents.list(collection))[0]
    assert isinstance(first.value, dict)
    await store.documents.save(collection, first.key, {**first.value, "event_type": "unknown"})
    clock = ManualClock()
    clock.advance(SIXTY_DAYS * 2)
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(orders(store, clock=clock).background)
            await seen(store, Overdue, 2)
            assert "cannot be fired, again in 0.02 s" in caplog.text
            current = await store.documents.get(collection, first.key)
            assert current is not None
            # Mended, such as by a deployment that knows the event.
            await store.documents.save(collection, first.key, first.value)
            await seen(store, Overdue, 3)
            tasks.cancel_scope.cancel()


class Overtaken(InMemoryEventStore):
    """What is listed is out of date once: a timer is cancelled just then."""

    cancelled = False

    async def _documents_after(self, collection, after, limit):
        found = await super()._documents_after(collection, after, limit)
        if found and collection == "projections/orders/timers" and not self.cancelled:
            self.cancelled = True
            await self.append_events("s", "Shop", [Paid("a")], ANY)
            await run_until_quiet(self, orders(self, clock=ManualClock()))
        return found


async def test_a_timer_that_is_cancelled_while_it_fires() -> None:
    async with Overtaken() as store:
        await place(store, "a", "b")
        store.cancelled = True
        await run_until_quiet(store, orders(store, clock=ManualClock()))
        store.cancelled = False
        clock = ManualClock()
        clock.advance(SIXTY_DAYS * 2)
        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(orders(store, clock=clock).background)
                (fired,) = await seen(store, Overdue, 1)
                tasks.cancel_scope.cancel()
        assert fired.aggregate_id == "b"


class Unreachable(InMemoryEventStore):
    """A database that is away for some calls."""

    away = 0

    async def _documents_after(self, collection, after, limit):
        if self.away:
            self.away -= 1
            raise StorageError("away")
        return await super()._documents_after(collection, after, limit)


async def test_storage_that_is_away_is_waited_for() -> None:
    async with Unreachable() as store:
        await place(store, "a")
        await run_until_quiet(store, orders(store))
        store.away = 3
        clock = ManualClock()
        clock.advance(SIXTY_DAYS * 2)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(orders(store, clock=clock).background)
            await seen(store, Overdue, 1)
            tasks.cancel_scope.cancel()
        assert store.away == 0


# What is refused ---------------------------------------------------------------------------------


async def stopped_by(store: EventStore, manager: Orders) -> BaseException | None:
    """What a manager is stopped by, once an order is placed."""
    coordinator = ProjectionCoordinator(store, [manager])
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            await tasks.start(coordinator.run)
            with pytest.raises(ProjectionStoppedError) as stopped:
                await coordinator.wait_for(await place(store, "a"))
            coordinator.stop()
    assert await messages(store) == Counter()
    assert await store.last_position() == (await every(store, Placed))[-1].position
    cause: BaseException | None = stopped.value.__cause__
    return cause


async def test_correlate_returns_an_id_or_none(store: EventStore) -> None:
    class Wrong(Orders):
        def correlate(self, event: StoredEvent) -> str | None:
            return 7  # type: ignore[return-value]

    error = await stopped_by(store, orders(store, Wrong, attempts=1))
    assert isinstance(error, TypeError)
    assert "Wrong.correlate must return the id" in str(error)


MIDNIGHT = datetime(2020, 1, 1, tzinfo=UTC)


REFUSED: dict[str, tuple[Callable[[Order, Reaction], Awaitable[None]], type[Exception], str]] = {
    "a command to itself": (
        lambda order, act: act.execute(Order, order.aggregate_id, Order.apply, Begun(1)),
        ValueError,
        "is the process that reacts",
    ),
    "by the aggregate": (
        lambda order, act: act.execute(Account, "till", Account.reserve, 101),
        TooMuchError,
        "101",
    ),
    "an event its stream cannot hold": (
        lambda order, act: act.schedule(Reserved(1), after=SIXTY_DAYS),
        TypeError,
        "no method for Reserved",
    ),
    "no moment": (
        lambda order, act: act.schedule(Overdue()),
        TypeError,
        "either `after` or `at`",
    ),
    "two moments": (
        lambda order, act: act.schedule(Overdue(), after=SIXTY_DAYS, at=MIDNIGHT),
        TypeError,
        "either `after` or `at`",
    ),
    "no time zone": (
        lambda order, act: act.schedule(Overdue(), at=MIDNIGHT.replace(tzinfo=None)),
        ValueError,
        "with a time zone",
    ),
    "no key": (
        lambda order, act: act.schedule(Overdue(), at=MIDNIGHT, key=""),
        ValueError,
        "key must",
    ),
    "what cannot be stored": (
        lambda order, act: act.schedule(Overdue(cast("int", "x")), at=MIDNIGHT),
        EventEncodeError,
        "number",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
async def test_what_is_refused_has_changed_nothing(what: str) -> None:
    decide, expected, match = REFUSED[what]

    class Refusing(Orders):
        @handles(Placed)
        async def placed(self, event: StoredEvent[Placed], order: Order, act: Reaction) -> None:
            order.apply(Begun(1))
            await act.send(OutboxMessage("placed", b""))
            await decide(order, act)

    async with InMemoryEventStore() as store:
        error = await stopped_by(store, orders(store, Refusing, attempts=2))
        assert isinstance(error, expected)
        assert match in str(error)
        assert await timers(store) == (0, 0)


def test_a_manager_names_the_class_of_its_processes() -> None:
    with pytest.raises(TypeError, match=r"Nameless\.process must be the class"):

        class Nameless(ProcessManager[Order]):
            name = "nameless"

            def correlate(self, event: StoredEvent) -> str | None:
                return None

    class Abstract(ProcessManager[Order]):
        """Without one, it is a base of others."""

    assert issubclass(Abstract, ProcessManager)
