"""Aggregates, imperative and functional, and the repository that loads, saves and executes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar
from uuid import UUID, uuid4

import anyio
import attrs
import pytest

from eventsource_anyio import (
    ANY,
    NO_STREAM,
    AggregateNotFoundError,
    AggregateRepository,
    AggregateRoot,
    ConcurrencyError,
    Decider,
    DeciderAggregate,
    DomainEvent,
    DuplicateEventError,
    EventEncodeError,
    EventStore,
    InMemoryEventBus,
    NewEvent,
    StoredEvent,
    applies,
    event_metadata,
)
from eventsource_anyio.testing import cancel_at_every_checkpoint


@attrs.frozen
class PurseOpened(DomainEvent):
    owner: str


@attrs.frozen
class CoinsAdded(DomainEvent):
    amount: int


@attrs.frozen
class CoinsTaken(DomainEvent):
    amount: int


class TooFewCoins(Exception):  # noqa: N818  (an error of the domain, in its words)
    pass


class Purse(AggregateRoot):
    """A plain class."""

    def __init__(self, aggregate_id: UUID | str) -> None:
        super().__init__(aggregate_id)
        self.owner = ""
        self.coins = 0

    def open(self, owner: str) -> None:
        self.apply(PurseOpened(owner))

    def add(self, *amounts: int) -> None:
        for amount in amounts:
            self.apply(CoinsAdded(amount))

    def take(self, amount: int) -> None:
        if amount > self.coins:
            raise TooFewCoins(f"there are only {self.coins}")
        self.apply(CoinsTaken(amount))

    @applies(PurseOpened)
    def _opened(self, event: PurseOpened) -> None:
        self.owner = event.owner

    @applies(CoinsAdded)
    def _added(self, event: CoinsAdded) -> None:
        self.coins += event.amount

    @applies(CoinsTaken)
    def _taken(self, event: CoinsTaken) -> None:
        self.coins -= event.amount


@attrs.define
class Jar(AggregateRoot):
    """An attrs class."""

    coins: int = 0
    seen: list[str] = attrs.field(factory=list)

    def add(self, amount: int) -> None:
        self.apply(CoinsAdded(amount))

    @applies(CoinsAdded, CoinsTaken)
    def _changed(self, event: CoinsAdded | CoinsTaken) -> None:
        self.coins += event.amount if isinstance(event, CoinsAdded) else -event.amount
        self.seen.append(type(event).__name__)


@attrs.frozen
class Add:
    amount: int


@attrs.frozen
class Take:
    amount: int


def decide(command: Add | Take, coins: int) -> Sequence[CoinsAdded | CoinsTaken]:
    if isinstance(command, Add):
        return [CoinsAdded(command.amount)] if command.amount else []
    if command.amount > coins:
        raise TooFewCoins(f"there are only {coins}")
    return [CoinsTaken(command.amount)]


def evolve(coins: int, event: CoinsAdded | CoinsTaken) -> int:
    return coins + event.amount if isinstance(event, CoinsAdded) else coins - event.amount


till = Decider("Till", initial=int, decide=decide, evolve=evolve)


@pytest.fixture(params=["event_store", "sqlite_event_store"])
def store(request: pytest.FixtureRequest) -> EventStore:
    """Each of the stores in its turn."""
    found: EventStore = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def purses(store: EventStore) -> AggregateRepository[Purse]:
    return AggregateRepository(store, Purse)


def purse_of(owner: str, *amounts: int) -> Purse:
    """A new purse with the owner's name as its id."""
    purse = Purse(owner)
    purse.open(owner)
    purse.add(*amounts)
    return purse


async def events_of(store: EventStore, aggregate_id: UUID | str) -> list[DomainEvent]:
    return [stored.event for stored in await store.get_events(aggregate_id)]


# -- the imperative aggregate -----------------------------------------------------------------


def test_apply_changes_the_state_and_keeps_the_event():
    purse = purse_of("ann", 5, 2)
    assert (purse.owner, purse.coins, purse.version) == ("ann", 7, 3)
    assert [new.event for new in purse.uncommitted_events] == [
        PurseOpened("ann"),
        CoinsAdded(5),
        CoinsAdded(2),
    ]
    assert purse.uncommitted_events == purse.uncommitted_events  # the ids are made once
    assert (purse.aggregate_id, purse.stream_id) == ("ann", "Purse-ann")


def test_an_aggregate_may_be_an_attrs_class():
    jar = Jar("j")
    jar.add(5)
    jar.apply(CoinsTaken(2))
    assert (jar.coins, jar.seen, jar.version) == (3, ["CoinsAdded", "CoinsTaken"], 2)
    assert Jar("k").seen == []
    assert repr(jar) == "Jar(aggregate_id='j', coins=3, seen=['CoinsAdded', 'CoinsTaken'])"


def test_a_new_event_is_kept_as_it_was_given():
    yesterday = datetime.now(UTC) - timedelta(days=1)
    new = NewEvent(CoinsAdded(5), metadata={"user": "eve"}, occurred_at=yesterday)
    purse = Purse("ann")
    purse.apply(new)
    assert purse.coins == 5
    assert purse.uncommitted_events == (new,)
    assert purse.uncommitted_events[0] is new


def test_an_id_is_kept_as_stores_keep_it_and_for_good():
    uuid = uuid4()
    purse = Purse(str(uuid))
    assert (purse.aggregate_id, purse.stream_id) == (uuid, f"Purse-{uuid}")
    with pytest.raises(attrs.exceptions.FrozenAttributeError):
        purse.aggregate_id = "other"
    with pytest.raises(ValueError, match="aggregate_id must have 1 to 255 characters"):
        Purse("")
    with pytest.raises(TypeError, match="aggregate_id must be a UUID or a string"):
        Purse(7)  # type: ignore[arg-type]


def test_its_type_is_the_name_of_its_class_unless_it_is_pinned():
    class Pinned(Purse):
        aggregate_type: ClassVar[str] = "purse.v2"

    class Derived(Pinned):
        pass

    @attrs.define
    class PinnedJar(Jar):
        aggregate_type: ClassVar[str] = "jar"

    assert (Purse.aggregate_type, Jar.aggregate_type) == ("Purse", "Jar")
    assert (Pinned.aggregate_type, Derived.aggregate_type) == ("purse.v2", "Derived")
    assert (PinnedJar.aggregate_type, PinnedJar("j").stream_id) == ("jar", "jar-j")


@pytest.mark.parametrize(
    ("name", "error"), [("a-b", ValueError), ("", ValueError), (7, TypeError)], ids=repr
)
def test_a_type_that_cannot_name_streams_is_refused_with_the_class(name, error):
    with pytest.raises(error, match="aggregate_type"):

        class Misnamed(AggregateRoot):
            aggregate_type: ClassVar[str] = name


def test_one_method_may_serve_a_base_class_of_events_and_another_one_of_them():
    @attrs.frozen
    class CoinsMoved(DomainEvent):
        amount: int

    @attrs.frozen
    class CoinsMovedIn(CoinsMoved):
        pass

    @attrs.frozen
    class CoinsMovedOut(CoinsMoved):
        pass

    @attrs.frozen
    class CoinsMovedAbroad(CoinsMovedOut):
        pass

    class Ledger(AggregateRoot):
        def __init__(self, aggregate_id: str) -> None:
            super().__init__(aggregate_id)
            self.calls: list[str] = []

        @applies(CoinsMoved)
        def _moved(self, event: CoinsMoved) -> None:
            self.calls.append(f"moved {event.amount}")

        @applies(CoinsMovedOut)
        def _moved_out(self, event: CoinsMovedOut) -> None:
            self.calls.append(f"out {event.amount}")

    ledger = Ledger("l")
    for _ in range(2):
        for kind in (CoinsMoved, CoinsMovedIn, CoinsMovedOut, CoinsMovedAbroad):
            ledger.apply(kind(len(ledger.calls)))
    assert ledger.calls == [
        *("moved 0", "moved 1", "out 2", "out 3"),
        *("moved 4", "moved 5", "out 6", "out 7"),
    ]


def test_a_subclass_may_override_a_method_or_take_over_its_event():
    class Doubling(Purse):
        def _added(self, event: CoinsAdded) -> None:
            self.coins += 2 * event.amount

        @applies(CoinsTaken)
        def _taken_for_nothing(self, event: CoinsTaken) -> None:
            pass

    doubling = Doubling("ann")
    doubling.open("ann")
    doubling.add(5)
    doubling.take(3)
    assert (doubling.owner, doubling.coins) == ("ann", 10)
    assert purse_of("ann", 5).coins == 5


def test_two_methods_for_one_event_are_refused():
    with pytest.raises(TypeError) as raised:

        class Torn(AggregateRoot):
            @applies(CoinsAdded)
            def _one(self, event: CoinsAdded) -> None: ...

            @applies(CoinsTaken, CoinsAdded)
            def _two(self, event: CoinsTaken | CoinsAdded) -> None: ...

    assert str(raised.value) == (
        "Torn._one and ._two are both for CoinsAdded; one of them would never be called."
    )


def test_an_event_without_a_method_is_named_and_not_kept():
    jar = Jar("j")
    with pytest.raises(TypeError) as raised:
        jar.apply(PurseOpened("ann"))
    assert str(raised.value) == (
        "Jar has no method for PurseOpened.\n"
        "  The event is in its stream, or is being applied, and every event of a stream needs "
        "one.\n"
        "  Write a method with @applies(PurseOpened); if nothing changes by it, its body is `pass`."
    )
    assert (jar.version, jar.uncommitted_events) == (0, ())


def test_an_event_whose_method_raises_is_not_kept():
    class Fragile(Purse):
        def _added(self, event: CoinsAdded) -> None:
            raise OverflowError(event.amount)

    fragile = Fragile("ann")
    fragile.open("ann")
    with pytest.raises(OverflowError, match="7"):
        fragile.add(7)
    assert fragile.version == len(fragile.uncommitted_events) == 1


def test_only_event_classes_can_be_applied():
    with pytest.raises(TypeError, match="needs event classes, such as @applies"):
        applies()
    with pytest.raises(TypeError, match="int is not an event class"):
        applies(CoinsAdded, int)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="DomainEvent"):
        Purse("ann").apply("PurseOpened")  # type: ignore[arg-type]


# -- the functional aggregate -----------------------------------------------------------------


def test_a_decider_is_pure_functions():
    assert till.initial() == 0
    assert till.decide(Take(3), 5) == [CoinsTaken(3)]
    assert till.evolve(5, CoinsTaken(3)) == 2
    with pytest.raises(TooFewCoins):
        till.decide(Take(7), 5)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        till.aggregate_type = "Other"  # type: ignore[misc]
    with pytest.raises(ValueError, match="holds a '-'"):
        attrs.evolve(till, aggregate_type="my-till")


def test_the_aggregate_of_a_decider_has_a_state_and_a_version():
    aggregate = DeciderAggregate("t", decider=till)
    assert (aggregate.state, aggregate.version, aggregate.stream_id) == (0, 0, "Till-t")
    aggregate.decide(Add(5))
    aggregate.decide(Add(0))
    aggregate.decide(Take(2))
    assert (aggregate.state, aggregate.version) == (3, 2)
    assert [new.event for new in aggregate.uncommitted_events] == [CoinsAdded(5), CoinsTaken(2)]
    with pytest.raises(TooFewCoins, match="there are only 3"):
        aggregate.decide(Take(4))
    assert (aggregate.state, aggregate.version) == (3, 2)
    assert repr(aggregate) == "DeciderAggregate(aggregate_id='t', state=3)"


def test_a_decision_that_is_refused_half_way_leaves_nothing():
    def decide_in_steps(command: Add | Take, coins: int) -> Iterator[CoinsAdded]:
        yield CoinsAdded(command.amount)
        if coins + command.amount > 10:
            raise OverflowError(coins)
        yield CoinsAdded(1)

    aggregate = DeciderAggregate("t", decider=attrs.evolve(till, decide=decide_in_steps))
    aggregate.decide(Add(5))
    assert (aggregate.state, aggregate.version) == (6, 2)
    with pytest.raises(OverflowError):
        aggregate.decide(Add(5))
    assert (aggregate.state, aggregate.version, len(aggregate.uncommitted_events)) == (6, 2, 2)


@pytest.mark.parametrize("decided", [CoinsAdded(5), None], ids=repr)
def test_a_decider_that_returns_no_list_is_told_so(decided):
    aggregate = DeciderAggregate("t", decider=attrs.evolve(till, decide=lambda *_: decided))
    with pytest.raises(TypeError) as raised:
        aggregate.decide(Add(5))
    assert str(raised.value) == f"decide() must return a list of events, not {decided!r}"


# -- load -------------------------------------------------------------------------------------


async def test_what_was_saved_is_loaded(purses):
    purse = purse_of("ann", 5)
    saved = await purses.save(purse)
    assert saved is not None
    assert (saved.version, [stored.version for stored in saved.events]) == (2, [1, 2])
    assert (purse.version, purse.uncommitted_events) == (2, ())
    loaded = await purses.load("ann")
    assert type(loaded) is Purse
    assert (loaded.owner, loaded.coins) == ("ann", 5)
    assert (loaded.version, loaded.uncommitted_events) == (2, ())


async def test_an_attrs_aggregate_and_a_decider_are_saved_and_loaded_alike(store):
    jars, tills = AggregateRepository(store, Jar), AggregateRepository(store, till)
    jar = Jar("x")
    jar.add(5)
    await jars.save(jar)
    aggregate = DeciderAggregate("x", decider=till)
    aggregate.decide(Add(7))
    await tills.save(aggregate)
    assert ((await jars.load("x")).coins, (await tills.load("x")).state) == (5, 7)
    assert [stored.stream_id async for stored in store.read_all()] == ["Jar-x", "Till-x"]


async def test_a_uuid_and_its_text_load_the_same(purses):
    uuid = uuid4()
    await purses.execute(uuid, Purse.open, "ann")
    for aggregate_id in (uuid, str(uuid)):
        assert (await purses.load(aggregate_id)).aggregate_id == uuid


async def test_what_does_not_exist_is_not_found(purses):
    await purses.save(purse_of("ann"))
    with pytest.raises(AggregateNotFoundError) as raised:
        await purses.load("bob")
    assert raised.value.stream_id == "Purse-bob"
    assert str(raised.value) == (
        "Purse-bob does not exist.\n"
        "  No event of it has been stored (or it has another aggregate type).\n"
        "  Check the id. A new aggregate is made by its class, or by AggregateRepository.execute()."
    )
    with pytest.raises(LookupError, match="Jar-ann does not exist"):
        await AggregateRepository(purses._store, Jar).load("ann")


async def test_an_event_without_a_method_in_the_stream_is_named(store):
    await store.append_events("j", "Jar", [CoinsAdded(1), PurseOpened("ann")], NO_STREAM)
    with pytest.raises(TypeError, match="Jar has no method for PurseOpened"):
        await AggregateRepository(store, Jar).load("j")


async def test_the_past_by_version(purses):
    await purses.save(purse_of("ann", 1, 10, 100))
    for version, coins in ((1, 0), (2, 1), (3, 11), (4, 111)):
        purse = await purses.load("ann", version=version)
        assert (purse.version, purse.coins) == (version, coins)
    with pytest.raises(AggregateNotFoundError, match="Purse-ann does not exist at version 5"):
        await purses.load("ann", version=5)
    with pytest.raises(AggregateNotFoundError, match="Purse-bob does not exist at version 1"):
        await purses.load("bob", version=1)
    for version in (0, -1):
        with pytest.raises(ValueError, match=f"version must be a number from 1, not {version}"):
            await purses.load("ann", version=version)


NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def at(hours: float, event: DomainEvent) -> NewEvent:
    """An event that occurred so many hours after noon."""
    return NewEvent(event, occurred_at=NOON + timedelta(hours=hours))


async def test_the_past_by_moment(store, purses):
    events = [at(0, PurseOpened("ann")), at(1, CoinsAdded(1)), at(2, CoinsAdded(10))]
    await store.append_events("ann", "Purse", events, NO_STREAM)
    for hours, version in ((0, 1), (0.5, 1), (1, 2), (1.999, 2), (2, 3), (99, 3)):
        purse = await purses.load("ann", at=NOON + timedelta(hours=hours))
        assert purse.version == version
    elsewhere = (NOON + timedelta(hours=1)).astimezone(datetime.now().astimezone().tzinfo)
    assert (await purses.load("ann", at=elsewhere)).version == 2
    with pytest.raises(AggregateNotFoundError, match=r"not exist at 2026-03-01T11:59:00\+00:00"):
        await purses.load("ann", at=NOON - timedelta(minutes=1))
    with pytest.raises(ValueError, match="at must be a datetime with a time zone"):
        await purses.load("ann", at=NOON.replace(tzinfo=None))


async def test_the_past_is_what_was_known_before_the_first_later_event(store, purses):
    """A stream's own order stays: what occurred early and was told late comes late."""
    events = [at(0, PurseOpened("ann")), at(2, CoinsAdded(1)), at(1, CoinsAdded(10))]
    await store.append_events("ann", "Purse", events, NO_STREAM)
    for hours, coins in ((0, 0), (1, 0), (1.5, 0), (2, 11)):
        assert (await purses.load("ann", at=NOON + timedelta(hours=hours))).coins == coins


async def test_the_past_by_both_is_the_earlier_of_the_two(store, purses):
    events = [at(hour, CoinsAdded(1)) for hour in range(5)]
    await store.append_events("ann", "Purse", events, NO_STREAM)
    for version, hours, reached in ((2, 4, 2), (4, 1, 2), (99, 3, 4)):
        moment = NOON + timedelta(hours=hours)
        assert (await purses.load("ann", version=version, at=moment)).version == reached
    with pytest.raises(AggregateNotFoundError, match=r"at 2026-03-01T11:00:00.* at version 2"):
        await purses.load("ann", version=2, at=NOON - timedelta(hours=1))


async def test_the_past_of_a_decider(store):
    tills = AggregateRepository(store, till)
    for amount in (1, 10):
        await tills.execute("t", Add(amount))
    assert [(await tills.load("t", version=version)).state for version in (1, 2)] == [1, 11]


async def test_the_past_cannot_be_changed(store, purses):
    await purses.save(purse_of("ann", 5, 5))
    past = await purses.load("ann", version=2)
    past.add(1)
    with pytest.raises(ConcurrencyError, match="Purse-ann is at version 3, expected 2"):
        await purses.save(past)
    assert (await purses.load("ann")).coins == 10


# -- save -------------------------------------------------------------------------------------


async def test_an_aggregate_is_saved_again_and_again(store, purses):
    purse = purse_of("ann")
    for amount in (1, 2, 3):
        purse.add(amount)
        result = await purses.save(purse)
        assert (result.version, purse.version) == (amount + 1, amount + 1)
    assert await events_of(store, "ann") == [
        PurseOpened("ann"),
        *(CoinsAdded(amount) for amount in (1, 2, 3)),
    ]


async def test_saving_nothing_is_a_checkpoint_all_the_same(purses):
    assert await purses.save(Purse("ann")) is None
    with anyio.CancelScope() as scope:
        scope.cancel()
        await purses.save(Purse("ann"))
    assert scope.cancelled_caught

    ran = False

    async def run() -> None:
        nonlocal ran
        ran = True

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        for _ in range(2):
            await purses.save(Purse("ann"))
        assert ran


async def test_a_conflict_leaves_the_aggregate_as_it_was(store, purses):
    await purses.save(purse_of("ann", 5))
    mine, theirs = await purses.load("ann"), await purses.load("ann")
    theirs.add(1)
    await purses.save(theirs)
    mine.add(2, 3)
    before = mine.uncommitted_events
    for _ in range(2):
        with pytest.raises(ConcurrencyError) as raised:
            await purses.save(mine)
        assert (raised.value.expected, raised.value.actual) == (2, 3)
    assert str(raised.value) == (
        "Purse-ann is at version 3, expected 2.\n"
        "  Another writer appended 1 event (CoinsAdded) meanwhile.\n"
        "  Load the aggregate again and decide anew; AggregateRepository.execute() does both."
    )
    assert (mine.uncommitted_events, mine.version, mine.coins) == (before, 4, 10)
    assert len(await events_of(store, "ann")) == 3


async def test_a_new_aggregate_conflicts_with_one_that_is_there(purses):
    await purses.save(purse_of("ann"))
    with pytest.raises(ConcurrencyError, match="Purse-ann is at version 1, expected 0"):
        await purses.save(purse_of("ann"))


async def test_an_event_that_cannot_be_stored_leaves_the_aggregate_as_it_was(store, purses):
    purse = purse_of("ann")
    purse.add(5)
    purse.apply(CoinsAdded(0.5))  # type: ignore[arg-type]
    with pytest.raises(EventEncodeError, match=r"CoinsAdded cannot be stored: \$\.amount"):
        await purses.save(purse)
    assert len(purse.uncommitted_events) == 3
    assert await store.last_position() == 0


async def test_an_aggregate_of_another_type_is_not_saved(store, purses):
    jar = Jar("ann")
    jar.add(5)
    with pytest.raises(TypeError, match="Jar-ann cannot be saved here: this is the repository of"):
        await purses.save(jar)
    assert await store.last_position() == 0


async def test_saving_again_after_a_cancellation_stores_nothing_twice(store, purses):
    run, purse = 0, Purse("none")

    async def save() -> object:
        nonlocal run, purse
        run += 1
        purse = Purse(str(run))
        purse.open("ann")
        purse.add(5)
        return await purses.save(purse)

    async def save_again(result: object) -> None:
        assert len(await events_of(store, str(run))) in ((2,) if result else (0, 2))
        assert len(purse.uncommitted_events) == (0 if result else 2)
        await purses.save(purse)
        assert (purse.version, purse.uncommitted_events) == (2, ())
        assert await events_of(store, str(run)) == [PurseOpened("ann"), CoinsAdded(5)]

    assert await cancel_at_every_checkpoint(save, save_again) >= 1


# -- execute ----------------------------------------------------------------------------------


async def test_execute_starts_a_new_aggregate_and_goes_on_with_it(store, purses):
    await purses.execute("ann", Purse.open, "ann")
    await purses.execute("ann", Purse.add, 5, 2)
    result = await purses.execute("ann", Purse.take, amount=3)
    assert result is not None
    assert (result.version, [stored.event for stored in result.events]) == (4, [CoinsTaken(3)])
    assert (await purses.load("ann")).coins == 4


async def test_execute_gives_a_decider_its_command(store):
    tills = AggregateRepository(store, till)
    await tills.execute("t", Add(5))
    await tills.execute("t", Take(3))
    assert await tills.execute("t", Add(0)) is None
    assert await events_of(store, "t") == [CoinsAdded(5), CoinsTaken(3)]
    with pytest.raises(TypeError, match="a decider is given its command alone"):
        await tills.execute("t", Add(5), 7)  # type: ignore[call-overload]


async def test_executing_what_decides_nothing_stores_nothing(store, purses):
    assert await purses.execute("ann", Purse.add) is None
    assert await store.last_position() == 0
    with anyio.CancelScope() as scope:
        scope.cancel()
        await purses.execute("ann", Purse.add)
    assert scope.cancelled_caught


async def test_conflicts_are_decided_anew_until_all_is_done(store, purses):
    decided = 0

    def add_one(purse: Purse) -> None:
        nonlocal decided
        decided += 1
        purse.add(1)

    async with anyio.create_task_group() as tasks:
        for _ in range(40):
            tasks.start_soon(purses.execute, "shared", add_one)
    shared = await purses.load("shared")
    assert (shared.coins, shared.version) == (40, 40)
    assert decided > 40  # there were conflicts


async def test_a_rule_holds_under_concurrency(store):
    tills = AggregateRepository(store, till)
    await tills.execute("t", Add(100))
    refused: list[str] = []

    async def take() -> None:
        try:
            await tills.execute("t", Take(10))
        except TooFewCoins as error:
            refused.append(str(error))

    async with anyio.create_task_group() as tasks:
        for _ in range(25):
            tasks.start_soon(take)
    assert ((await tills.load("t")).state, (await tills.load("t")).version) == (0, 11)
    assert refused == ["there are only 0"] * 15


@pytest.mark.parametrize("error", [TooFewCoins("mine"), ConcurrencyError("mine", 1, 2)], ids=repr)
async def test_an_exception_of_the_command_arrives_as_it_is(store, purses, error):
    """Also one that the append might have raised: it is not retried as if that had."""
    calls = 0

    def refuse(purse: Purse) -> None:
        nonlocal calls
        calls += 1
        purse.add(5)
        raise error

    with pytest.raises(type(error)) as raised:
        await purses.execute("ann", refuse)
    assert raised.value is error
    assert calls == 1
    assert await store.last_position() == 0


async def test_only_conflicts_are_decided_anew(store, purses):
    (other,) = (await store.append_events("b", "Purse", [PurseOpened("b")], ANY)).events
    calls = 0

    def take_its_id(purse: Purse) -> None:
        nonlocal calls
        calls += 1
        purse.apply(NewEvent(PurseOpened("ann"), event_id=other.event_id))

    with pytest.raises(DuplicateEventError, match="it belongs to Purse-b"):
        await purses.execute("ann", take_its_id)
    assert calls == 1


async def test_a_cancelled_execute_is_whole_or_not_there(store, purses):
    run = 0

    async def execute() -> object:
        nonlocal run
        run += 1
        return await purses.execute(str(run), Purse.add, 2, 3)

    async def look(result: object) -> None:
        assert len(await events_of(store, str(run))) in ((2,) if result else (0, 2))
        await purses.execute(str(run), Purse.add, 1)
        assert (await purses.load(str(run))).coins in ((6,) if result else (1, 6))

    assert await cancel_at_every_checkpoint(execute, look) >= 2


async def test_a_command_with_an_event_id_of_its_own_may_be_repeated(store, purses):
    run, request_id = 0, uuid4()

    def add_once(purse: Purse, event_id: UUID) -> None:
        purse.apply(NewEvent(CoinsAdded(5), event_id=event_id))

    async def execute() -> object:
        nonlocal run, request_id
        run, request_id = run + 1, uuid4()
        return await purses.execute(str(run), add_once, request_id)

    async def repeat(_: object) -> None:
        for _ in range(2):
            await purses.execute(str(run), add_once, request_id)
        assert await events_of(store, str(run)) == [CoinsAdded(5)]

    await cancel_at_every_checkpoint(execute, repeat)


# -- the bus ----------------------------------------------------------------------------------


class RecordingBus(InMemoryEventBus):
    """Keeps what is published to it, with what the store had at that time; fails on demand."""

    def __init__(self, store: EventStore, failure: Exception | None = None) -> None:
        super().__init__()
        self.published: list[tuple[StoredEvent, ...]] = []
        self.stored: list[int] = []
        self._store = store
        self._failure = failure

    async def publish(self, events: Sequence[StoredEvent], background: bool = False) -> None:
        self.published.append(tuple(events))
        self.stored.append(await self._store.last_position())
        if self._failure is not None:
            raise self._failure


async def test_what_is_stored_is_published_afterwards(store):
    bus = RecordingBus(store)
    purses = AggregateRepository(store, Purse, bus=bus)
    saved = await purses.save(purse_of("ann", 5))
    executed = await purses.execute("ann", Purse.add, 1)
    assert saved is not None
    assert executed is not None
    assert bus.published == [saved.events, executed.events]
    assert bus.stored == [saved.position, executed.position]


async def test_nothing_is_published_unless_something_was_stored(store):
    bus = RecordingBus(store)
    purses = AggregateRepository(store, Purse, bus=bus)
    await store.append_events("ann", "Purse", [PurseOpened("ann")], ANY)
    assert await purses.save(Purse("bob")) is None
    assert await purses.execute("bob", Purse.add) is None
    with pytest.raises(ConcurrencyError):
        await purses.save(purse_of("ann"))
    with pytest.raises(TooFewCoins):
        await purses.execute("ann", Purse.take, 1)
    assert bus.published == []


@pytest.mark.parametrize(
    "failure",
    [RuntimeError("the bus is down"), ConcurrencyError("of the bus", 1, 2)],
    ids=["error", "conflict"],
)
async def test_a_bus_that_fails_says_that_the_events_are_stored(store, failure):
    bus = RecordingBus(store, failure)
    purses = AggregateRepository(store, Purse, bus=bus)
    purse = purse_of("ann", 5)
    calls = 0

    def add(purse: Purse) -> None:
        nonlocal calls
        calls += 1
        purse.add(1)

    for saving, version in ((purses.save(purse), 2), (purses.execute("ann", add), 3)):
        with pytest.raises(type(failure)) as raised:
            await saving
        assert raised.value is failure
        assert raised.value.__notes__[-1] == (
            f"The events are stored (Purse-ann is at version {version}); "
            "only publishing them has failed. Do not save them again."
        )
    assert (purse.uncommitted_events, calls, len(bus.published)) == ((), 1, 2)
    assert (await purses.load("ann")).coins == 6
    assert await purses.save(purse) is None


# -- metadata ---------------------------------------------------------------------------------


async def test_metadata_of_the_context_reaches_the_events_of_aggregates(store, purses):
    purse = Purse("ann")
    purse.open("ann")
    purse.apply(NewEvent(CoinsAdded(5), metadata={"till": 2, "user": "bob"}))
    with event_metadata(correlation_id="case 7", user="eve"):
        await purses.save(purse)
        await purses.execute("ann", Purse.add, 1)
    await purses.execute("ann", Purse.add, 1)
    seven = {"correlation_id": "case 7", "user": "eve"}
    assert [stored.metadata for stored in await store.get_events("ann")] == [
        seven,
        seven | {"till": 2, "user": "bob"},
        seven,
        {},
    ]


# -- types ------------------------------------------------------------------------------------


@pytest.mark.skipif(not importlib.util.find_spec("mypy"), reason="mypy is not installed")
def test_type_checkers_understand_the_api():
    """`typed_api.py` says what they have to find, and what they have to refuse."""
    root = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-m", "mypy", str(Path("tests", "typed_api.py"))],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, ""), result.stdout


# -- what would never be awaited --------------------------------------------------------------


async def test_an_async_command_is_refused_and_stores_nothing(store, purses):
    async def add_later(purse: Purse) -> None:
        purse.add(1)

    with pytest.raises(TypeError, match="is async"):
        await purses.execute("p", add_later)
    assert await store.last_position() == 0


def test_an_async_method_of_an_event_is_refused_where_it_is_defined():
    with pytest.raises(TypeError, match="is async, and nobody would await it"):

        class Late(AggregateRoot):
            @applies(CoinsAdded)  # type: ignore[type-var]
            async def _added(self, event: CoinsAdded) -> None: ...


def test_only_what_was_stored_is_taken_off_the_uncommitted_events():
    purse = Purse("p")
    purse.open("ann")
    stored = purse.uncommitted_events
    purse.add(5)
    purse.mark_committed(stored)
    purse.mark_committed(stored)
    assert [new.event for new in purse.uncommitted_events] == [CoinsAdded(5)]
    assert purse.version == 2
