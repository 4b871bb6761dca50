"""Single-stream views, on every store."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from random import Random
from typing import Generic, Literal, TypeVar
from uuid import UUID, uuid4

import anyio
import attrs
import pytest

from eventsource_anyio import ANY, DomainEvent, EventStore, StoredEvent, Transaction
from eventsource_anyio.errors import EventDefinitionError, ProjectionStoppedError
from eventsource_anyio.projections import (
    Projection,
    ProjectionCoordinator,
    SingleStreamView,
    evolves,
    handles,
)
from eventsource_anyio.projections.serving import COLLECTION as SERVING
from eventsource_anyio.testing import cancel_at_every_checkpoint
from eventsource_anyio.testing.samples import Happened, append_numbers
from tests.every_store import make_store, open_store, which_store

__all__ = ["make_store", "open_store", "which_store"]

pytestmark = pytest.mark.usefixtures("saved_soon")

V = TypeVar("V")


@attrs.frozen
class Opened(DomainEvent):
    event_type = "views.Opened"
    owner: str


@attrs.frozen
class Moved(DomainEvent):
    event_type = "views.Moved"
    amount: Decimal


@attrs.frozen
class MovedAbroad(Moved):
    event_type = "views.MovedAbroad"


@attrs.frozen
class Closed(DomainEvent):
    event_type = "views.Closed"


@attrs.frozen
class AccountView:
    owner: str
    balance: Decimal = Decimal()
    version: int = 0


class Accounts(SingleStreamView[AccountView]):
    name = "accounts"
    aggregate_type = "Account"

    @evolves(Opened)
    def opened(self, view: AccountView | None, event: StoredEvent[Opened]) -> AccountView:
        assert view is None
        return AccountView(event.event.owner, version=event.version)

    @evolves(Moved)
    def moved(self, view: AccountView, event: StoredEvent[Moved]) -> AccountView:
        assert event.version == view.version + 1
        balance = view.balance + event.event.amount
        return attrs.evolve(view, balance=balance, version=event.version)

    @evolves(Closed)
    def closed(self, view: AccountView, event: StoredEvent[Closed]) -> None:
        return None


async def run(store: EventStore, *projections: Projection) -> None:
    """Until they have got to the last event."""
    coordinator = ProjectionCoordinator(store, projections)
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            await tasks.start(coordinator.run)
            await coordinator.wait_for(await store.last_position())
            coordinator.stop()


async def append(store: EventStore, aggregate_id: UUID | str, *events: DomainEvent) -> None:
    await store.append_events(aggregate_id, "Account", events, ANY)


async def test_each_stream_is_folded_into_one_document(store: EventStore) -> None:
    ann = uuid4()
    accounts = Accounts()
    assert await accounts.get(store, ann) is None
    assert await accounts.list(store) == {}
    await append(store, ann, Opened("ann"), Moved(Decimal("1.10")), MovedAbroad(Decimal("2.20")))
    await append(store, "bob", Opened("bob"), Moved(Decimal(-1)), Happened(1), Closed())
    await append(store, "cyd", Opened("cyd"))
    await store.append_events("cyd", "Other", [Opened("nobody")], ANY)
    await append_numbers(store, 3, "dot", "Account")
    await run(store, accounts)
    assert await accounts.get(store, ann) == AccountView("ann", Decimal("3.30"), 3)
    assert await accounts.get(store, str(ann)) == AccountView("ann", Decimal("3.30"), 3)
    for aggregate_id in ("bob", "dot", "nobody"):
        assert await accounts.get(store, aggregate_id) is None
    assert set(await accounts.list(store)) == {ann, "cyd"}
    document = await store.documents.get("views/accounts/1", "Account-cyd")
    assert document is not None
    assert document.value == {"owner": "cyd", "balance": "0", "version": 1}
    # Opened anew after it was closed, and closed again in another batch.
    await append(store, "bob", Opened("rob"), Moved(Decimal(7)))
    await run(store, accounts)
    assert await accounts.get(store, "bob") == AccountView("rob", Decimal(7), 6)
    await append(store, "bob", Closed())
    await run(store, accounts)
    assert await accounts.get(store, "bob") is None


async def test_views_are_listed_in_pages_by_aggregate_id(store: EventStore) -> None:
    ids: list[UUID | str] = [*(uuid4() for _ in range(7)), *(f"x{n:02}" for n in range(6))]
    for aggregate_id in ids:
        await append(store, aggregate_id, Opened(str(aggregate_id)))
    accounts = Accounts()
    await run(store, accounts)
    for limit in (1, 4, 100):
        seen: list[UUID | str] = []
        while page := await accounts.list(store, after=seen[-1] if seen else None, limit=limit):
            assert len(page) == min(limit, len(ids) - len(seen))
            assert [view.owner for view in page.values()] == [str(one) for one in page]
            seen += page
        assert seen == sorted(ids, key=str)
    with pytest.raises(ValueError, match="limit must be"):
        await accounts.list(store, limit=0)
    with pytest.raises(TypeError, match="aggregate_id must be"):
        await accounts.get(store, 7)  # type: ignore[arg-type]


async def fill(store: EventStore, streams: int, events: int) -> dict[str, AccountView]:
    """Open accounts and move money, and what is to become of it."""
    random = Random(7)
    expected: dict[str, AccountView] = {}
    for number in range(streams):
        await append(store, f"s{number:02}", Opened(f"owner {number}"))
        expected[f"s{number:02}"] = AccountView(f"owner {number}", version=1)
    left = events
    while left > 0:
        stream = f"s{random.randrange(streams):02}"
        moves = [Moved(Decimal(random.randrange(-500, 500)) / 100) for _ in range(min(left, 25))]
        left -= len(moves)
        await append(store, stream, *moves)
        view = expected[stream]
        balance = view.balance + sum(one.amount for one in moves)
        expected[stream] = AccountView(view.owner, balance, view.version + len(moves))
    return expected


async def test_thousands_of_events_in_many_batches_and_shards(
    store: EventStore, make_store: Callable[[], EventStore]
) -> None:
    expected = await fill(store, 40, 3000)
    small, sharded = Accounts(), Accounts()
    small.batch_size = 97
    sharded.name, sharded.shards = "sharded", 2
    await run(store, small, sharded)
    for view in (small, sharded):
        assert await view.list(store) == expected
    await store.__aexit__(None, None, None)
    async with make_store() as again:  # after a restart they go on where they were
        for view in (Accounts(), sharded):
            assert await view.list(again) == expected
        await append(again, "s07", Moved(Decimal(1)))
        before = expected["s07"]
        expected["s07"] = AccountView(before.owner, before.balance + 1, before.version + 1)
        await run(again, Accounts(), sharded)
        for view in (Accounts(), sharded):
            assert await view.list(again) == expected


async def test_cancelled_at_any_checkpoint_every_event_counts_once(store: EventStore) -> None:
    accounts = Accounts()
    accounts.batch_size = 10
    expected = await fill(store, 3, 30)

    async def follow() -> None:
        coordinator = ProjectionCoordinator(store, [accounts], lease=0.05)
        async with anyio.create_task_group() as tasks:
            await tasks.start(coordinator.run)
            await coordinator.wait_for(await store.last_position())
            coordinator.stop()

    async def more(_: None) -> None:
        view = expected["s01"]
        expected["s01"] = AccountView(view.owner, view.balance + 1, view.version + 1)
        await append(store, "s01", Moved(Decimal(1)))

    with anyio.fail_after(100):
        assert await cancel_at_every_checkpoint(follow, more) >= 4
        await follow()
    assert await accounts.list(store) == expected


async def test_a_fold_that_fails_stores_nothing_of_its_event(store: EventStore) -> None:
    class Refusing(Accounts):
        on_failure: Literal["stop", "park"] = "park"
        attempts = 2
        retry_after = 0.001

        @evolves(Moved)
        def moved(self, view: AccountView, event: StoredEvent[Moved]) -> AccountView:
            if event.event.amount == 13:
                raise KeyError("thirteen")
            return super().moved(view, event)

    moves = [Moved(Decimal(number)) for number in (1, 13, 5)]
    await append(store, "a", Opened("a"), *moves)
    await append(store, "b", Opened("b"), moves[0])
    refusing = Refusing()
    await run(store, refusing)
    assert await refusing.list(store) == {
        "a": AccountView("a", Decimal(1), 2),
        "b": AccountView("b", Decimal(1), 2),
    }
    refusing.name, refusing.on_failure = "stopping", "stop"
    with pytest.raises(ProjectionStoppedError) as stopped:
        await run_to_failure(store, refusing)
    assert isinstance(stopped.value.__cause__, KeyError)
    # b comes after the event that it has stopped at
    assert await refusing.list(store) == {"a": AccountView("a", Decimal(1), 2)}


async def run_to_failure(store: EventStore, projection: Projection) -> None:
    coordinator = ProjectionCoordinator(store, [projection])
    failure: Exception | None = None
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            await tasks.start(coordinator.run)
            try:
                await coordinator.wait_for(await store.last_position())
            except ProjectionStoppedError as error:
                failure = error
            coordinator.stop()
    assert failure is not None
    raise failure


@attrs.frozen
class OtherView:
    owner: str
    limit: int


class OtherAccounts(SingleStreamView[OtherView]):
    name = "accounts"
    aggregate_type = "Account"
    event_types = (Opened, Moved)
    attempts = 1

    def evolve(self, view: OtherView | None, event: StoredEvent) -> OtherView | None:
        if isinstance(event.event, Opened):
            return OtherView(event.event.owner, 7)
        assert view is not None
        return view


class WrongAccounts(OtherAccounts):
    name = "wrong"

    def evolve(self, view: OtherView | None, event: StoredEvent) -> OtherView | None:
        return OtherView("ann", "7")  # type: ignore[arg-type]


async def test_a_class_that_has_changed_says_so(store: EventStore) -> None:
    await append(store, "a", Opened("ann"))
    await run(store, Accounts())
    with pytest.raises(ValueError, match="the stored view of Account-a cannot be read") as error:
        await OtherAccounts().get(store, "a")
    error.match(r"\$\.limit: it is missing")
    error.match("raise the projection's version; or rebuild it")
    with pytest.raises(ValueError, match="cannot be read"):
        await OtherAccounts().list(store)
    await append(store, "a", Moved(Decimal(1)))
    with pytest.raises(ProjectionStoppedError) as stopped:
        await run_to_failure(store, OtherAccounts())
    assert "raise the projection's version" in str(stopped.value.__cause__)
    with pytest.raises(ProjectionStoppedError) as stopped:
        await run_to_failure(store, WrongAccounts())
    assert "the view of Account-a cannot be stored: $.limit" in str(stopped.value.__cause__)


async def test_readers_find_the_version_that_serves(store: EventStore) -> None:
    await append(store, "a", Opened("ann"))
    old, new = Accounts(), Accounts()
    new.version = 2
    await run(store, old)
    documents = store.documents
    await documents.save("views/accounts/1", "Account-a", {"owner": "old"})
    await run(store, old, new)
    for one in (old, new):
        assert await one.get(store, "a") == AccountView("old")
    either = [AccountView("old"), AccountView("ann", version=1)]

    async def read() -> None:
        for _ in range(10):
            for one in (old, new):
                assert await one.get(store, "a") in either
                assert await one.get(store, "none") is None
                assert next(iter((await one.list(store)).values())) in either

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        tasks.start_soon(read)
        await documents.save(SERVING, "accounts", {"version": 2})
        async with store.transaction() as tx:
            await old.reset(tx)
    assert await documents.list("views/accounts/1") == []
    for one in (old, new):
        assert await one.get(store, "a") == AccountView("ann", version=1)
        assert await one.list(store) == {"a": AccountView("ann", version=1)}


class Swapping(Accounts):
    """After it has looked what serves, version 2 takes over and 1 is dropped."""

    async def _serving(self, store: EventStore) -> str:
        found = await super()._serving(store)
        if found.endswith("/1"):
            async with store.transaction() as tx:
                await tx.documents.save(SERVING, "accounts", {"version": 2})
                await tx.documents.delete_all("views/accounts/1")
        return found


async def test_a_reader_misses_nothing_when_its_version_is_dropped(store: EventStore) -> None:
    for read in (lambda: Swapping().get(store, "a"), lambda: Swapping().list(store)):
        await store.documents.save(SERVING, "accounts", {"version": 1})
        for version in (1, 2):
            await store.documents.save(f"views/accounts/{version}", "Account-a", {"owner": "ann"})
        assert await read() in (AccountView("ann"), {"a": AccountView("ann")})


async def test_a_handler_may_be_called_for_one_event(store: EventStore) -> None:
    await append(store, "a", Opened("ann"), Moved(Decimal(1)))
    accounts = Accounts()
    for event in await store.get_events("a"):
        async with store.transaction() as tx:
            await accounts.handle(event, tx)
    assert await accounts.get(store, "a") == AccountView("ann", Decimal(1), 2)
    async with store.transaction() as tx:
        await accounts.reset(tx)
    assert await accounts.list(store) == {}


def test_views_that_cannot_be_are_refused_where_they_are_defined():
    with pytest.raises(TypeError, match="is not an attrs class"):

        class OfInt(SingleStreamView[int]):
            pass

    @attrs.frozen
    class Odd:
        call: Callable[[], None]

    with pytest.raises(EventDefinitionError, match="Odd"):

        class OfOdd(SingleStreamView[Odd]):
            pass

    with pytest.raises(TypeError, match="mark its methods with @evolves"):

        class Handles(SingleStreamView[AccountView]):
            @handles(Opened)
            async def opened(self, event: StoredEvent, tx: Transaction) -> None: ...

    with pytest.raises(TypeError, match="is async, and nobody would await it"):

        class Async(SingleStreamView[AccountView]):
            @evolves(Opened)
            async def opened(self, view: AccountView | None, event: StoredEvent) -> None: ...

    with pytest.raises(ValueError, match="'-'"):

        class Dashed(SingleStreamView[AccountView]):
            aggregate_type = "a-b"

    with pytest.raises(TypeError, match="needs event classes"):
        evolves()

    class Nameless(SingleStreamView[AccountView]):
        name = "nameless"

    class Generically(SingleStreamView[V], Generic[V]):
        name = "generically"
        aggregate_type = "Account"

    unusable: list[Projection] = [Nameless(), Generically()]
    for projection in unusable:
        with pytest.raises(TypeError, match="needs the class of its view and an aggregate_type"):
            projection.filters()

    class Concretely(Generically[AccountView]):
        @evolves(Moved)
        def moved(self, view: AccountView, event: StoredEvent[Moved]) -> AccountView:
            return view

    class Derived(Concretely):
        aggregate_types = ()

    options = Concretely().filters()
    assert options.event_types == ("views.Moved", "views.MovedAbroad")
    assert options.aggregate_types == ("Account",)
    assert Derived().filters().event_types == options.event_types
    assert OtherAccounts().filters().event_types == ("views.Opened", "views.Moved")
