"""Blue and green: a version of a projection takes over from another one, on every store."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio
import pytest
from attrs import evolve
from sqlalchemy import text

from eventsource_anyio import EventStore, StoredEvent, Transaction
from eventsource_anyio.errors import DocumentConflictError, ProjectionStoppedError
from eventsource_anyio.projections import Projection, ProjectionCoordinator
from eventsource_anyio.projections.shards import ShardRepository
from eventsource_anyio.stores.sql_transaction import SQLTransaction
from eventsource_anyio.testing.cancelling import cancel_at_every_checkpoint
from eventsource_anyio.testing.samples import Happened, append_numbers

from .every_store import make_store, open_store, which_store
from .projecting import (
    LEASE,
    NAME,
    PATIENCE,
    Broken,
    Reacting,
    Recording,
    add,
    failing,
    open_elsewhere,
    positions,
    reactions,
    run_for_a_while,
    seen,
)

__all__ = ["make_store", "open_elsewhere", "open_store", "which_store"]

pytestmark = pytest.mark.usefixtures("saved_soon")


def both(*, shards: tuple[int, int] = (1, 2)) -> list[Reacting]:
    return [Reacting(1, shards[0]), Reacting(2, shards[1])]


@asynccontextmanager
async def running(*coordinators: ProjectionCoordinator) -> AsyncIterator[None]:
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            for coordinator in coordinators:
                await tasks.start(coordinator.run)
            yield
            for coordinator in coordinators:
                coordinator.stop()


async def readers(store: EventStore) -> object:
    document = await store.documents.get("readers", "version")
    return None if document is None else document.value


async def check_reactions(store: EventStore) -> Sequence[object]:
    """Each event was reacted to, once; the versions that did, in order, without repetitions."""
    found = await reactions(store)
    assert [position for position, _ in found] == await positions(store)
    versions = [version for _, version in found]
    return [one for number, one in enumerate(versions) if versions[number - 1 : number] != [one]]


async def test_a_version_takes_over_and_back(store: EventStore) -> None:
    coordinator = ProjectionCoordinator(store, both())
    await append_numbers(store, 20)
    async with running(coordinator):
        await coordinator.promote(NAME, 2)
        assert await readers(store) == 2
        assert {one.version: one.serving for one in coordinator.statistics()}[1] is False
        await coordinator.wait_for(await add(store, "b", 1, 2, 3), NAME)
        assert await seen(store, 1) == list(range(1, 21))
        assert await seen(store, 2) == list(range(1, 24))
        await coordinator.promote(NAME, 2)  # it serves already

        await coordinator.promote(NAME, 1)
        assert await readers(store) == 1
        await coordinator.wait_for(await add(store, "b", 4), NAME)
        assert await seen(store, 1) == list(range(1, 25))
        assert await seen(store, 2) == list(range(1, 24))
    assert await check_reactions(store) == [1, 2, 1]


@pytest.mark.parametrize("shards", [(1, 1), (3, 2)])
async def test_versions_take_over_while_others_run_and_append(
    store: EventStore, elsewhere: EventStore, shards: tuple[int, int]
) -> None:
    """Two coordinators run both; a third one, which runs nothing, promotes."""
    here = ProjectionCoordinator(store, both(shards=shards), lease=LEASE)
    there = ProjectionCoordinator(elsewhere, both(shards=shards), lease=LEASE)
    promoting = ProjectionCoordinator(store, both(shards=shards))
    done = False

    async def append() -> None:
        number = 0
        while not done:
            number += 1
            last = await add(store, f"{number % 7}", number)
            await here.wait_for(last - 30, NAME)

    await append_numbers(store, 30)
    async with running(here, there):
        await here.wait_for(30)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(append)
            await promoting.promote(NAME, 2)
            await here.wait_for(await add(store, "b", 1), NAME)
            await promoting.promote(NAME, 1)
            done = True
        await here.wait_for(await add(store, "b", 2), NAME)
    assert await check_reactions(store) == [1, 2, 1]
    assert await seen(store, 1) == await positions(store)


async def test_who_waits_is_served_by_the_version_that_took_over(store: EventStore) -> None:
    coordinator = ProjectionCoordinator(store, both())
    await append_numbers(store, 3)
    async with running(coordinator):
        await coordinator.wait_for(3)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(coordinator.wait_for, 4, NAME)
            tasks.start_soon(coordinator.wait_for, 4)
            await anyio.wait_all_tasks_blocked()
            await coordinator.promote(NAME, 2)
            await add(store, "b", 1)
    assert await seen(store, 1) == [1, 2, 3]


async def test_who_knows_only_the_old_version_does_not_wait_in_vain(store: EventStore) -> None:
    old = ProjectionCoordinator(store, [Reacting(1)], lease=LEASE)
    await append_numbers(store, 3)
    async with running(old, ProjectionCoordinator(store, [Reacting(2)], lease=LEASE)):
        await ProjectionCoordinator(store, both()).promote(NAME, 2)
        with pytest.raises(ProjectionStoppedError):
            await old.wait_for(await add(store, "b", 1))
        with pytest.raises(ValueError, match=r"Version 2 of .* is not known here"):
            await old.rebuild(NAME)


@pytest.mark.parametrize("answer", [False, Broken, DocumentConflictError])
async def test_who_fails_verification_is_not_promoted(store: EventStore, answer: object) -> None:
    asked = 0

    async def verify(tx: Transaction) -> bool:
        nonlocal asked
        asked += 1
        assert await seen(store, 2) == await seen(store, 1) == await positions(store)
        if isinstance(answer, type):
            raise Broken if answer is Broken else DocumentConflictError("mine", "k", None, None)
        return asked > 1

    coordinator = ProjectionCoordinator(store, both())
    await append_numbers(store, 20)
    async with running(coordinator):
        with pytest.raises(
            answer if isinstance(answer, type) else RuntimeError,
            match=None if isinstance(answer, type) else r"version 2, was not promoted\.\n  verify",
        ):
            await coordinator.promote(NAME, 2, verify=verify)
        assert asked == 1
        assert await readers(store) is None
        await coordinator.wait_for(await add(store, "b", 1))  # both go on
        assert await seen(store, 2) == await seen(store, 1) == await positions(store)
        if answer is False:
            await coordinator.promote(NAME, 2, verify=verify)
            await coordinator.wait_for(await add(store, "b", 2))
            assert await check_reactions(store) == [1, 2]
        else:
            assert await check_reactions(store) == [1]


async def test_a_failing_take_over_changes_nothing(store: EventStore) -> None:
    class Failing(Reacting):
        async def take_over(self, tx: Transaction) -> None:
            await super().take_over(tx)
            raise Broken

    coordinator = ProjectionCoordinator(store, [Reacting(1), Failing(2)])
    await append_numbers(store, 3)
    async with running(coordinator):
        with pytest.raises(Broken):
            await coordinator.promote(NAME, 2)
        await coordinator.wait_for(await add(store, "b", 1))
        assert await readers(store) is None
        assert await check_reactions(store) == [1]


async def test_a_cancelled_promotion_can_be_done_again(store: EventStore) -> None:
    """It is cancelled in one direction and in the other, in turn, and then done."""
    coordinator = ProjectionCoordinator(store, both(shards=(1, 1)))
    await append_numbers(store, 3)
    version = 2

    async def again(_: object) -> None:
        nonlocal version
        # Not promoted, the one that serves goes on; promoted, the candidate does.
        await coordinator.wait_for(await add(store, "b", 1), NAME)
        await coordinator.promote(NAME, version)
        assert await readers(store) == version
        await coordinator.wait_for(await add(store, "b", 2), NAME)
        assert await seen(store, version) == await positions(store)
        assert len(await check_reactions(store)) > 1
        version = 3 - version

    async with running(coordinator):
        await coordinator.wait_for(3)
        checkpoints = await cancel_at_every_checkpoint(
            lambda: coordinator.promote(NAME, version), again
        )
    assert checkpoints >= 20


@pytest.mark.parametrize("version", [1, 2])
async def test_who_was_killed_promoting_can_go_on_or_give_up(
    store: EventStore, version: int
) -> None:
    coordinator = ProjectionCoordinator(store, both())
    await append_numbers(store, 10)
    await run_for_a_while(coordinator, store)
    async with store.transaction() as tx:  # as it is written by a promotion
        for one in (1, 2):
            shards = ShardRepository(store, NAME, one)
            for shard in await shards.all():
                await shards.save(tx.documents, evolve(shard, until=10, owner=None))
    await add(store, "b", 1)
    async with running(coordinator):
        await coordinator.promote(NAME, version)
        await coordinator.wait_for(await add(store, "b", 2), NAME)
        if version == 1:
            await coordinator.wait_for(12)
        assert await seen(store, 2) == await positions(store)
        assert len(await seen(store, 1)) == (12 if version == 1 else 10)
    assert await check_reactions(store) == ([1] if version == 1 else [1, 2])


async def test_several_may_promote_at_once(store: EventStore, elsewhere: EventStore) -> None:
    here = ProjectionCoordinator(store, both(), lease=LEASE)
    there = ProjectionCoordinator(elsewhere, both(), lease=LEASE)
    await append_numbers(store, 30)
    async with running(here, there):
        async with anyio.create_task_group() as tasks:
            for coordinator in (here, there, here):
                tasks.start_soon(coordinator.promote, NAME, 2)
        last = await add(store, "b", 1)
        await here.wait_for(last, NAME)
        await there.wait_for(last, NAME)
    assert await check_reactions(store) == [1, 2]


async def test_a_version_that_has_failed_is_not_waited_for(store: EventStore) -> None:
    _, before = failing(2)
    candidate = Reacting(2, before=before)
    candidate.on_failure = "stop"
    coordinator = ProjectionCoordinator(store, [Reacting(1), candidate])
    await append_numbers(store, 5)
    async with running(coordinator):
        with pytest.raises(ProjectionStoppedError) as raised:
            await coordinator.promote(NAME, 2)
        assert isinstance(raised.value.__cause__, Broken)
        await coordinator.wait_for(5, NAME)


async def test_what_is_parked_has_to_be_reacted_to_first(store: EventStore) -> None:
    wrong, before = failing(2)
    old, new = Reacting(1, before=before), Reacting(2)
    coordinator = ProjectionCoordinator(store, [old, new])
    await add(store, "a", 1, 2, 3)
    async with running(coordinator):
        await coordinator.wait_for(3)
        with pytest.raises(ValueError, match="in version 1 1 streams are parked"):
            await coordinator.promote(NAME, 2)
        wrong.clear()
        assert await coordinator.retry_parked(NAME, "Thing-a") == 2
        await coordinator.promote(NAME, 2)
        await coordinator.wait_for(await add(store, "a", 4))
    assert await check_reactions(store) == [1, 2]


async def test_what_the_new_version_has_parked_is_reacted_to_once(store: EventStore) -> None:
    """Up to where it took over the old version has, and from there on it does itself."""
    wrong, before = failing(2)
    coordinator = ProjectionCoordinator(store, [Reacting(1), Reacting(2, before=before)])
    await add(store, "a", 1, 2, 3)
    async with running(coordinator):
        await coordinator.promote(NAME, 2)
        await coordinator.wait_for(await add(store, "a", 4))
        assert await seen(store, 2) == [1]
        wrong.clear()
        assert await coordinator.retry_parked(NAME, "Thing-a") == 3
    assert await check_reactions(store) == [1, 2]


async def test_a_candidate_that_is_rebuilt_reacts_to_nothing(store: EventStore) -> None:
    coordinator = ProjectionCoordinator(store, both())
    await append_numbers(store, 5)
    async with running(coordinator):
        await coordinator.wait_for(5)
        await coordinator.rebuild(NAME, version=2)
        await coordinator.promote(NAME, 2)
        await coordinator.wait_for(await add(store, "b", 1))
        assert await seen(store, 2) == [1, 2, 3, 4, 5, 6]
    assert await check_reactions(store) == [1, 2]


# -- drop -------------------------------------------------------------------------------------


async def test_the_old_version_is_dropped_and_stays_so(
    store: EventStore, elsewhere: EventStore
) -> None:
    here = ProjectionCoordinator(store, both(), lease=LEASE)
    there = ProjectionCoordinator(elsewhere, both(), lease=LEASE)
    await append_numbers(store, 5)
    async with running(here, there):
        with pytest.raises(ValueError, match="version 1, cannot be dropped: it is the version"):
            await here.drop(NAME, 1)
        await here.promote(NAME, 2)
        await here.drop(NAME, 1)
        await here.drop(NAME, 1)
        last = await add(store, "b", 1)
        await here.wait_for(last)
        await there.wait_for(last, NAME)
        assert await seen(store, 1) == []
        assert await seen(store, 2) == [1, 2, 3, 4, 5, 6]
        assert [one.version for one in here.statistics()] == [2]
        for kind in ("shards", "parked"):
            assert await store.documents.list(f"projections/{NAME}/1/{kind}") == []
        with pytest.raises(ValueError, match=r"version 1, was dropped\.(.|\n)*rebuild"):
            await here.promote(NAME, 1)
    await run_for_a_while(ProjectionCoordinator(store, both()), store)
    assert await seen(store, 1) == []

    async with running(here):  # it can be had again
        await here.rebuild(NAME, version=1)
        await here.promote(NAME, 1)
        await here.wait_for(await add(store, "b", 2))
        assert await seen(store, 1) == await positions(store)
    assert await check_reactions(store) == [1, 2, 1]


async def test_a_candidate_can_be_dropped_while_it_is_built(store: EventStore) -> None:
    at = anyio.Event()

    async def before(event: StoredEvent) -> None:
        if event.position == 30:
            at.set()
            await anyio.sleep_forever()

    coordinator = ProjectionCoordinator(store, [Reacting(1), Reacting(2, before=before)])
    await append_numbers(store, 50)
    async with running(coordinator):
        await at.wait()
        await coordinator.drop(NAME, 2)
        await coordinator.wait_for(50)
        assert await seen(store, 2) == []
        assert await seen(store, 1) == await positions(store)


async def test_a_cancelled_drop_can_be_done_again(store: EventStore) -> None:
    coordinator = ProjectionCoordinator(store, [Recording(1), Recording(2)])
    await append_numbers(store, 4)
    async with running(coordinator):

        async def again(_: object) -> None:
            await coordinator.drop(NAME, 2)
            assert await seen(store, 2) == []
            await coordinator.rebuild(NAME, version=2)
            await coordinator.wait_for(4)
            assert await seen(store, 2) == [1, 2, 3, 4]

        await again(None)
        assert await cancel_at_every_checkpoint(lambda: coordinator.drop(NAME, 2), again) >= 5


# -- SQL --------------------------------------------------------------------------------------


class Orders(Projection[SQLTransaction]):
    """The read model that readers find as the view `orders`, whichever version serves."""

    name = "orders"
    batch_size = 10

    def __init__(self, version: int) -> None:
        self.version = version
        self.table = f"orders_v{version}"

    async def handle(self, event: StoredEvent, tx: SQLTransaction) -> None:
        assert isinstance(event.event, Happened)
        values = {"position": event.position, "number": event.event.number}
        insert = text(f"INSERT INTO {self.table} (position, number) VALUES (:position, :number)")
        await tx.execute(insert, values)

    async def reset(self, tx: SQLTransaction) -> None:
        await tx.execute(text(f"DELETE FROM {self.table}"))

    async def take_over(self, tx: SQLTransaction) -> None:
        await show_version(tx, self.version)


async def show_version(tx: SQLTransaction, version: int) -> None:
    columns = f"SELECT position, number, {version} AS version FROM orders_v{version}"
    if "postgresql" in type(tx).__module__:
        await tx.execute(text(f"CREATE OR REPLACE VIEW orders AS {columns}"))
    else:
        await tx.execute(text("DROP VIEW IF EXISTS orders"))
        await tx.execute(text(f"CREATE VIEW orders AS {columns}"))


def sql(store: EventStore):
    assert hasattr(store, "transaction")
    return store.transaction()


@pytest.mark.parametrize("which", ["SQLite", "PostgreSQL"], indirect=True)
async def test_readers_see_no_error_and_no_partial_table(
    store: EventStore, elsewhere: EventStore
) -> None:
    async with sql(store) as tx:
        for version in (1, 2):
            columns = "position BIGINT PRIMARY KEY, number BIGINT NOT NULL"
            await tx.execute(text(f"CREATE TABLE orders_v{version} ({columns})"))
        await show_version(tx, 1)
    coordinator = ProjectionCoordinator(store, [Orders(1), Orders(2)])
    versions: list[int] = []
    stop = False
    last = (await store.append_events("a", "Thing", [Happened(1)] * 200, 0)).position

    async def read() -> None:
        """What is there is never less than it was, and has no gap."""
        count = 0
        while not stop:
            async with sql(elsewhere) as tx:
                query = text(
                    "SELECT count(*), max(position), sum(number), max(version) FROM orders"
                )
                found, highest, total, version = (await tx.execute(query)).one()
            if found:
                assert found == highest == total
                assert found >= count
                count = found
                if version not in versions[-1:]:
                    versions.append(version)
            await anyio.lowlevel.checkpoint()

    async def append() -> None:
        nonlocal last
        while not stop:
            last = await add(store, "b", 1)
            await coordinator.wait_for(last - 20, "orders")

    async def verify(tx: SQLTransaction) -> bool:
        same = text(
            "SELECT (SELECT sum(number) FROM orders_v1) = (SELECT sum(number) FROM orders_v2)"
        )
        return bool((await tx.execute(same)).scalar_one())

    async def seen_by_readers(version: int) -> None:
        while versions[-1:] != [version]:  # noqa: ASYNC110
            await anyio.sleep(0.01)

    async with running(coordinator):
        async with anyio.create_task_group() as tasks:
            await coordinator.wait_for(200, "orders")
            tasks.start_soon(read)
            tasks.start_soon(append)
            await seen_by_readers(1)
            await coordinator.promote("orders", 2, verify=verify)
            await seen_by_readers(2)
            await coordinator.drop("orders", 1)
            await coordinator.rebuild("orders", version=1)
            await coordinator.promote("orders", 1, verify=verify)
            await seen_by_readers(1)
            stop = True
        await coordinator.wait_for(last, "orders")
        async with sql(store) as tx:
            assert (await tx.execute(text("SELECT count(*) FROM orders"))).scalar_one() == last
    assert versions == [1, 2, 1]


# An old version that nobody runs -----------------------------------------------------------------


async def leave_behind(store: EventStore, old: Recording) -> None:
    """It serves, and stands at 20 of 30."""
    await append_numbers(store, 20)
    await run_for_a_while(ProjectionCoordinator(store, [old]), store)
    await append_numbers(store, 10, "b")


@pytest.mark.parametrize("known", [True, False])
async def test_an_old_version_that_nobody_runs_is_not_waited_for(
    store: EventStore, known: bool
) -> None:
    await leave_behind(store, Recording(1, 2))
    coordinator = ProjectionCoordinator(store, [Recording(2, 2)])
    promoting = ProjectionCoordinator(store, [Recording(1), Recording(2)]) if known else coordinator
    async with running(coordinator):
        await promoting.promote(NAME, 2)
        assert await readers(store) == 2
        await coordinator.wait_for(await add(store, "b", 1), NAME)
        assert len(await seen(store, 1)) == 20
        assert await seen(store, 2) == await positions(store)
    # Run again, it can have its place back.
    coordinator = ProjectionCoordinator(store, [Recording(1, 2), Recording(2, 2)])
    async with running(coordinator):
        await coordinator.promote(NAME, 1)
        await coordinator.wait_for(await add(store, "b", 2), NAME)
        assert await seen(store, 1) == await positions(store)


async def test_who_was_killed_with_the_old_version_is_waited_for_as_long_as_its_lease(
    store: EventStore,
) -> None:
    await leave_behind(store, Recording(1))
    shards = ShardRepository(store, NAME, 1)
    for shard in await shards.all():
        await shards.save(store.documents, evolve(shard, owner="killed"))
    value: dict[str, object] = {"projections": [f"{NAME}@1"]}
    await store.documents.add("projections/coordinators", "killed", value)
    beats = 0

    async def beat() -> None:
        nonlocal beats
        for _ in range(5):
            await store.documents.save("projections/coordinators", "killed", value)
            beats += 1
            await anyio.sleep(0.05)

    coordinator = ProjectionCoordinator(store, [Recording(2)], lease=0.6)
    async with running(coordinator):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(beat)
            await coordinator.promote(NAME, 2)
            assert beats == 5
        assert await readers(store) == 2
        await coordinator.wait_for(await add(store, "b", 1), NAME)
        assert await seen(store, 2) == await positions(store)


async def test_what_an_old_version_has_not_reacted_to_it_has_to(store: EventStore) -> None:
    await leave_behind(store, Reacting(1))
    coordinator = ProjectionCoordinator(store, [Reacting(2, 2)])
    async with running(coordinator):
        await coordinator.wait_for(30)
        with pytest.raises(ValueError, match="nobody runs version 1") as refused:
            await coordinator.promote(NAME, 2)
        assert "up to position 20, and to those up to 30 neither" in str(refused.value)
        await coordinator.wait_for(await add(store, "b", 1))  # nothing stands still
        async with running(ProjectionCoordinator(store, [Reacting(1)])):
            await coordinator.promote(NAME, 2)
        await coordinator.wait_for(await add(store, "b", 2))
    assert await check_reactions(store) == [1, 2]


async def test_an_old_version_that_reacts_to_nothing_may_stay_behind(store: EventStore) -> None:
    await leave_behind(store, Recording(1))
    coordinator = ProjectionCoordinator(store, [Reacting(2)])
    async with running(coordinator):
        await coordinator.wait_for(30)
        await ProjectionCoordinator(store, [Recording(1), Reacting(2)]).promote(NAME, 2)
        await coordinator.wait_for(await add(store, "b", 1))
    assert [position for position, _ in await reactions(store)] == [31]
