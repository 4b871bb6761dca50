"""What we ship for tests, tested: scenarios, the contract of stores, cancellation, fixtures."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any
from uuid import UUID
from zlib import crc32

import anyio
import attrs
import pytest
from anyio.lowlevel import checkpoint
from msgspec.structs import replace

from eventsource_anyio import (
    ANY,
    AggregateRoot,
    AppendResult,
    Decider,
    DomainEvent,
    EventDecodeError,
    InMemoryEventStore,
    ReadOptions,
    StoredEvent,
    applies,
)
from eventsource_anyio.repositories.document import Document, DocumentChange, changes
from eventsource_anyio.repositories.outbox import OutboxStep
from eventsource_anyio.stores.interface import (
    AddMessages,
    Append,
    DeleteDocument,
    Page,
    PageRequest,
    RemoveMessages,
    SaveCheckpoint,
    SaveDocuments,
    Step,
)
from eventsource_anyio.testing import cancel_at_every_checkpoint, given


@attrs.frozen
class HallOpened(DomainEvent):
    seats: int


@attrs.frozen
class SeatTaken(DomainEvent):
    row: str
    seat: int = 1


class SoldOut(Exception):  # noqa: N818  (an error of the domain, in its words)
    pass


class Hall(AggregateRoot):
    def __init__(self, aggregate_id: UUID | str) -> None:
        super().__init__(aggregate_id)
        self.left = 0

    def open(self, seats: int) -> None:
        self.apply(HallOpened(seats))

    def take(self, row: str, *seats: int) -> None:
        for seat in seats:
            if not self.left:
                raise SoldOut(f"{row}{seat}")
            self.apply(SeatTaken(row, seat))

    @applies(HallOpened)
    def _opened(self, event: HallOpened) -> None:
        self.left = event.seats

    @applies(SeatTaken)
    def _taken(self, event: SeatTaken) -> None:
        self.left -= 1


@attrs.frozen
class Take:
    row: str
    seats: Sequence[int]


def decide(command: Take, left: int) -> list[HallOpened | SeatTaken]:
    if left < len(command.seats):
        raise SoldOut(f"{command.row}{command.seats[left]}")
    return [SeatTaken(command.row, seat) for seat in command.seats]


def evolve(left: int, event: HallOpened | SeatTaken) -> int:
    return event.seats if isinstance(event, HallOpened) else left - 1


hall = Decider("Hall", initial=int, decide=decide, evolve=evolve)


# -- given, when, then ------------------------------------------------------------------------


def test_a_scenario_of_a_root_that_holds():
    outcome = given(Hall, HallOpened(3), SeatTaken("A")).when(Hall.take, "B", 1, 2)
    assert outcome.then(SeatTaken("B", 1), SeatTaken("B", 2)) is outcome
    assert (outcome.aggregate.left, outcome.aggregate.version) == (0, 4)
    given(Hall).when(Hall.open, seats=3).then(HallOpened(3))
    given(Hall, HallOpened(3)).when(Hall.take, "A").then()


def test_a_scenario_of_a_decider_that_holds():
    outcome = given(hall, HallOpened(3), SeatTaken("A")).when(Take("B", [1, 2]))
    assert outcome.then(SeatTaken("B", 1), SeatTaken("B", 2)) is outcome
    assert (outcome.aggregate.state, outcome.aggregate.version) == (0, 4)
    given(hall, HallOpened(3)).when(Take("A", [])).then()


def test_a_scenario_of_a_refusal_that_holds():
    outcome = given(Hall, HallOpened(1)).when(Hall.take, "A", 1, 2)
    assert outcome.then_raises(SoldOut, "A2") is outcome
    outcome.then_raises(Exception)
    assert isinstance(outcome.error, SoldOut)
    given(hall).when(Take("A", [1])).then_raises(SoldOut, containing="A1")


def test_an_aggregate_of_a_scenario_may_be_given_its_id():
    assert given(Hall).aggregate.stream_id == "Hall-given"
    assert given(hall, aggregate_id="7").aggregate.stream_id == "Hall-7"


def test_what_was_given_has_to_be_the_aggregates():
    with pytest.raises(TypeError, match="Hall has no method for Unseen"):

        @attrs.frozen
        class Unseen(DomainEvent):
            pass

        given(Hall, Unseen())


def take(row: str, *seats: int) -> Any:
    """What came of taking seats in a hall of five."""
    return given(Hall, HallOpened(5)).when(Hall.take, row, *seats)


@pytest.mark.parametrize(
    ("check", "message"),
    [
        pytest.param(
            lambda: take("A", 1).then(SeatTaken("A", 2)),
            "expected 1 event, got 1 event\n"
            "  - SeatTaken(row='A', seat=2)\n"
            "  + SeatTaken(row='A', seat=1)\n"
            "      seat: expected 2, got 1",
            id="a-field",
        ),
        pytest.param(
            lambda: take("A", 1, 2).then(SeatTaken("A", 1), SeatTaken("B", 3)),
            "expected 2 events, got 2 events\n"
            "  = SeatTaken(row='A', seat=1)\n"
            "  - SeatTaken(row='B', seat=3)\n"
            "  + SeatTaken(row='A', seat=2)\n"
            "      row: expected 'B', got 'A'\n"
            "      seat: expected 3, got 2",
            id="fields",
        ),
        pytest.param(
            lambda: take("A", 1).then(HallOpened(5)),
            "expected 1 event, got 1 event\n"
            "  - HallOpened(seats=5)\n"
            "  + SeatTaken(row='A', seat=1)",
            id="another-event",
        ),
        pytest.param(
            lambda: take("A", 1).then(SeatTaken("A", 1), SeatTaken("A", 2)),
            "expected 2 events, got 1 event\n"
            "  = SeatTaken(row='A', seat=1)\n"
            "  - SeatTaken(row='A', seat=2)",
            id="missing",
        ),
        pytest.param(
            lambda: take("A", 1, 2).then(SeatTaken("A", 1)),
            "expected 1 event, got 2 events\n"
            "  = SeatTaken(row='A', seat=1)\n"
            "  + SeatTaken(row='A', seat=2)",
            id="too-many",
        ),
        pytest.param(
            lambda: take("A", 1).then(),
            "expected no events, got 1 event\n  + SeatTaken(row='A', seat=1)",
            id="none-expected",
        ),
        pytest.param(
            lambda: take("A").then(SeatTaken("A", 1)),
            "expected 1 event, got no events\n  - SeatTaken(row='A', seat=1)",
            id="none-decided",
        ),
        pytest.param(
            lambda: given(hall, HallOpened(2)).when(Take("A", [1, 2])).then(SeatTaken("A", 2)),
            "expected 1 event, got 2 events\n"
            "  - SeatTaken(row='A', seat=2)\n"
            "  + SeatTaken(row='A', seat=1)\n"
            "      seat: expected 2, got 1\n"
            "  + SeatTaken(row='A', seat=2)",
            id="of-a-decider",
        ),
        pytest.param(
            lambda: given(Hall).when(Hall.take, "A", 1).then(SeatTaken("A", 1)),
            "expected 1 event, but SoldOut('A1') was raised",
            id="refused",
        ),
        pytest.param(
            lambda: given(Hall).when(Hall.take, "A", 1).then(),
            "expected no events, but SoldOut('A1') was raised",
            id="refused-none-expected",
        ),
        pytest.param(
            lambda: take("A").then_raises(SoldOut),
            "expected SoldOut, but the command was accepted with no events",
            id="accepted-with-nothing",
        ),
        pytest.param(
            lambda: take("A", 1, 2).then_raises(SoldOut, "A3"),
            "expected SoldOut containing 'A3', but the command was accepted with 2 events\n"
            "  + SeatTaken(row='A', seat=1)\n"
            "  + SeatTaken(row='A', seat=2)",
            id="accepted",
        ),
        pytest.param(
            lambda: given(hall).when(Take("A", [1])).then_raises(KeyError),
            "expected KeyError, but SoldOut('A1') was raised",
            id="another-error",
        ),
        pytest.param(
            lambda: given(hall).when(Take("A", [1])).then_raises(SoldOut, "A2"),
            "expected SoldOut containing 'A2', but SoldOut('A1') was raised",
            id="another-text",
        ),
    ],
)
def test_a_scenario_that_does_not_hold_says_what_differs(check, message):
    with pytest.raises(AssertionError) as raised:
        check()
    assert str(raised.value) == message
    if "was raised" in message:
        assert isinstance(raised.value.__cause__, SoldOut)


# -- the contract of stores -------------------------------------------------------------------


class UnusualStore(InMemoryEventStore):
    """Right, if unusual: small pages, empty ones among them, and more checkpoints than needed."""

    _empty = False

    async def _read(self, request: PageRequest) -> Page:
        await checkpoint()
        self._empty = not self._empty
        if self._empty and request.start is not None:
            return Page((), request.start, at_end=False)
        return await super()._read(replace(request, limit=min(request.limit, 2)))

    async def _write(self, steps: Sequence[Step]) -> Sequence[AppendResult]:
        await checkpoint()
        return await super()._write(steps)


class ForgetsTheVersion(InMemoryEventStore):
    """It appends, whatever version was expected."""

    def _append(self, append: Append) -> AppendResult:
        return super()._append(replace(append, expected_version=ANY))


class KeepsHalf(InMemoryEventStore):
    """It keeps what was written before a transaction failed."""

    def _forget(self, last: int) -> None:
        pass


class StopsHalfWay(InMemoryEventStore):
    """It can be cancelled between two events of one append."""

    async def _write(self, steps: Sequence[Step]) -> Sequence[AppendResult]:
        results: list[AppendResult] = []
        for step in steps:
            if isinstance(step, Append):
                for event in step.events[:-1]:
                    await super()._write([replace(step, events=[event])])
                    step = replace(step, expected_version=ANY)
                step = replace(step, events=step.events[-1:])
            results.extend(await super()._write([step]))
        return results


class TakesEventsTwice(InMemoryEventStore):
    """It knows no event ids."""

    def _append(self, append: Append) -> AppendResult:
        self._positions.clear()
        return super()._append(append)


class LosesTheOrder(InMemoryEventStore):
    """It gives the events of a page in any order."""

    async def _read(self, request: PageRequest) -> Page:
        page = await super()._read(request)
        return Page(page.events[::-1], page.resume, page.at_end)


class LosesOneAPage(InMemoryEventStore):
    """It goes on one event too far."""

    async def _read(self, request: PageRequest) -> Page:
        page = await super()._read(request)
        step = -1 if request.backwards else 1
        return page if page.at_end else Page(page.events, page.resume + step, at_end=False)


class IgnoresFilters(InMemoryEventStore):
    """It gives all events, whatever types were asked for."""

    def _matches(self, request: PageRequest, position: int) -> bool:
        return True


class MissesTheLastSlice(InMemoryEventStore):
    """It takes ranges of slices as Python does, without the last one."""

    def _matches(self, request: PageRequest, position: int) -> bool:
        if request.slices is not None:
            first, last = request.slices
            request = replace(request, slices=(first, last - 1))
        return super()._matches(request, position)


class DividesInItsOwnWay(InMemoryEventStore):
    """Its slices are all there, but not those of other stores."""

    def _matches(self, request: PageRequest, position: int) -> bool:
        _, aggregate_id, aggregate_type, _, _ = self._records[position - 1]
        first, last = request.slices or (0, 1023)
        return first <= crc32(f"{aggregate_type}-{aggregate_id}".encode()) & 1023 <= last


class Hasty(AsyncIterator[StoredEvent]):
    """It has taken an event before it can be cancelled."""

    def __init__(self, events: AsyncIterator[StoredEvent]) -> None:
        self._events = events

    async def __anext__(self) -> StoredEvent:
        event = await anext(self._events)
        await checkpoint()
        return event


class ConsumesWhenCancelled(InMemoryEventStore):
    """A reader of it that is cancelled misses an event."""

    def read_all(self, options: ReadOptions | None = None) -> AsyncIterator[StoredEvent]:
        return Hasty(super().read_all(options))


class RaisesGroups(InMemoryEventStore):
    """It runs a task group around the work."""

    async def _write(self, steps: Sequence[Step]) -> Sequence[AppendResult]:
        async with anyio.create_task_group():
            return await super()._write(steps)
        raise AssertionError("a task group never swallows")


class FailsByPage(InMemoryEventStore):
    """One event that it cannot read costs a whole page."""

    async def _read(self, request: PageRequest) -> Page:
        page = await super()._read(request)
        for event in page.events:
            if isinstance(event, EventDecodeError):
                raise event
        return page


class NeverPauses(InMemoryEventStore):
    """It appends without a checkpoint."""

    async def _write(self, steps: Sequence[Step]) -> Sequence[AppendResult]:
        signal = self._opened()
        results = [self._append(step) for step in steps if isinstance(step, Append)]
        signal.advance(len(self._records))
        return results


class ForgetsTheCheckpoint(InMemoryEventStore):
    """It saves a checkpoint, wherever it was expected."""

    async def _write(self, steps: Sequence[Step]) -> Sequence[AppendResult]:
        return await super()._write(
            [
                replace(one, expected=None) if isinstance(one, SaveCheckpoint) else one
                for one in steps
            ]
        )


class ComparesTooEarly(InMemoryEventStore):
    """Somebody else may save a checkpoint between the comparison and the saving of it."""

    async def _write(self, steps: Sequence[Step]) -> Sequence[AppendResult]:
        for step in steps:
            if isinstance(step, SaveCheckpoint):
                step.check(await self._checkpoint(step.name))
        await checkpoint()
        return await super()._write(
            [
                replace(one, expected=None) if isinstance(one, SaveCheckpoint) else one
                for one in steps
            ]
        )


class WritesOneAfterAnother(InMemoryEventStore):
    """A step that fails leaves those before it stored."""

    async def _write(self, steps: Sequence[Step]) -> Sequence[AppendResult]:
        return [result for step in steps for result in await super()._write([step])]


class WritesEventsOnly(InMemoryEventStore):
    """It knows nothing of checkpoints and messages."""

    async def _write(self, steps: Sequence[Step]) -> Sequence[AppendResult]:
        return await super()._write([step for step in steps if isinstance(step, Append)])


class TakesMessagesTwice(InMemoryEventStore):
    """A message that is pending already takes another place."""

    def _change_outbox(self, step: OutboxStep) -> None:
        if isinstance(step, AddMessages):
            super()._change_outbox(RemoveMessages([one.message_id for one in step.messages]))
        super()._change_outbox(step)


class StartsAgain(InMemoryEventStore):
    """The outbox counts from 1 whenever it is empty."""

    def _change_outbox(self, step: OutboxStep) -> None:
        if not self._outbox:
            self._messages = 0
        super()._change_outbox(step)


def unconditional(step: Step) -> Step:
    if isinstance(step, SaveDocuments):
        documents = [replace(one, expected=None, absent=False) for one in step.documents]
        return SaveDocuments(documents)
    return replace(step, expected=None) if isinstance(step, DeleteDocument) else step


class ForgetsTheRevision(InMemoryEventStore):
    """It writes a document, whatever revision was expected."""

    async def _write(self, steps: Sequence[Step]) -> Sequence[AppendResult]:
        return await super()._write([unconditional(step) for step in steps])


class ComparesRevisionsTooEarly(InMemoryEventStore):
    """Somebody else may save a document between the comparison and the saving of it."""

    async def _write(self, steps: Sequence[Step]) -> Sequence[AppendResult]:
        for step in steps:
            if isinstance(step, SaveDocuments | DeleteDocument):
                for change in changes(step):
                    found = await self._documents_by_key(change.collection, [change.key])
                    change.check(found[0].revision if found else None)
        await checkpoint()
        return await super()._write([unconditional(step) for step in steps])


class KeepsDocuments(InMemoryEventStore):
    """Deleted documents are still there."""

    def _change_document(self, change: DocumentChange) -> None:
        if not isinstance(change, DeleteDocument):
            super()._change_document(change)


class OneCollection(InMemoryEventStore):
    """It takes no notice of collections when it lists."""

    async def _documents_after(self, collection: str, after: str, limit: int) -> Sequence[Document]:
        await checkpoint()
        found: list[Document] = []
        for name in self._documents:
            found += await super()._documents_after(name, after, limit)
        return found[:limit]


class ListsByAge(InMemoryEventStore):
    """It lists documents in the order in which they were added."""

    async def _documents_after(self, collection: str, after: str, limit: int) -> Sequence[Document]:
        keys = [key for key in self._documents.get(collection, {}) if key > after]
        return await self._documents_by_key(collection, keys[:limit])


class StaysOpen(InMemoryEventStore):
    """It is used after it was closed, as if nothing had happened."""

    async def _close(self) -> None:
        if self._signal is not None:
            self._signal.close("StaysOpen")


SUITE = """
import pytest
from eventsource_anyio.testing import EventStoreContract

@pytest.fixture
def anyio_backend(loop):
    return loop

class TestStore(EventStoreContract):
    @pytest.fixture
    async def store(self, store_class):
        async with store_class() as store:
            yield store
"""


class Contract:
    """The contract suite, for a class of stores, in a project of its own."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self._pytester = pytester
        pytester.makepyfile(SUITE)
        pytester.makeini("[pytest]\nanyio_mode = auto\nfilterwarnings = error\n")

    def run(self, store_class: type[InMemoryEventStore], only: str = "") -> tuple[int, int]:
        """How many tests passed and failed, of all or of those with this name."""

        class Plugin:
            @pytest.fixture(params=["asyncio", "trio"])
            def loop(self, request: pytest.FixtureRequest) -> str:
                loop: str = request.param
                return loop

            @pytest.fixture
            def store_class(self) -> type[InMemoryEventStore]:
                return store_class

        ran = self._pytester.inline_run(
            *("-q", "--tb=no", "-p", "no:cacheprovider", "-k", only), plugins=[Plugin()]
        )
        passed, skipped, failed = ran.listoutcomes()
        assert not skipped
        return len(passed), len(failed)


@pytest.fixture
def contract(pytester: pytest.Pytester) -> Contract:
    return Contract(pytester)


def test_the_contract_holds_for_a_store_that_is_right(contract):
    """Also for an unusual one; the others are held to it in tests of their own."""
    passed, failed = contract.run(UnusualStore)
    assert failed == 0
    assert passed > 100


@pytest.mark.parametrize(
    ("store_class", "test"),
    [
        (ForgetsTheVersion, "test_expectations_that_a_stream_does_not_meet"),
        (ForgetsTheVersion, "test_one_of_many_wins_at_an_exact_version"),
        (KeepsHalf, "test_a_transaction_stores_all_or_nothing"),
        (StopsHalfWay, "test_a_cancelled_append_is_whole_or_not_there"),
        (StopsHalfWay, "test_a_cancelled_transaction_is_whole_or_not_there"),
        (TakesEventsTwice, "test_an_append_may_be_repeated"),
        (TakesEventsTwice, "test_an_event_id_stands_for_one_event"),
        (LosesTheOrder, "test_appending_concurrently_loses_and_doubles_nothing"),
        (LosesTheOrder, "test_append_returns_version_position_and_events"),
        (LosesOneAPage, "test_a_cancelled_read_has_consumed_nothing"),
        (IgnoresFilters, "test_filters"),
        (IgnoresFilters, "test_slices_are_combined_with_the_other_options"),
        (IgnoresFilters, "test_a_subscription_to_slices_gets_their_events_only"),
        (MissesTheLastSlice, "test_every_event_is_in_one_of_the_ranges_that_do_not_overlap"),
        (DividesInItsOwnWay, "test_the_slice_of_a_stream_never_changes"),
        (ConsumesWhenCancelled, "test_a_cancelled_read_has_consumed_nothing"),
        (RaisesGroups, "test_expectations_that_a_new_stream_does_not_meet"),
        (FailsByPage, "test_an_event_that_cannot_be_read_costs_only_itself"),
        (FailsByPage, "test_an_event_that_cannot_be_read_does_not_end_it"),
        (NeverPauses, "test_a_cancelled_append_is_whole_or_not_there"),
        (NeverPauses, "test_every_call_is_a_checkpoint"),
        (ForgetsTheCheckpoint, "test_a_checkpoint_is_saved_only_where_it_is_expected"),
        (ForgetsTheCheckpoint, "test_one_of_many_wins_at_an_expected_checkpoint"),
        (ComparesTooEarly, "test_one_of_many_wins_at_an_expected_checkpoint"),
        (WritesOneAfterAnother, "test_a_conflict_takes_everything_of_a_transaction_back"),
        (WritesOneAfterAnother, "test_a_cancelled_transaction_of_everything_is_whole_or_not_there"),
        (WritesEventsOnly, "test_a_transaction_stores_everything_at_its_end"),
        (TakesMessagesTwice, "test_adding_the_same_message_again_changes_nothing"),
        (StartsAgain, "test_positions_of_the_outbox_grow_for_ever"),
        (StaysOpen, "test_a_closed_store_says_so"),
        (WritesOneAfterAnother, "test_a_conflict_takes_documents_and_everything_else_back"),
        (WritesEventsOnly, "test_documents_are_stored_together_with_everything_else"),
        (ForgetsTheRevision, "test_a_document_that_is_there_is_not_added"),
        (ForgetsTheRevision, "test_a_document_is_saved_and_deleted_only_where_it_is_expected"),
        (ForgetsTheRevision, "test_what_others_do_to_a_document_meanwhile_is_a_conflict"),
        (ComparesRevisionsTooEarly, "test_one_of_many_writes_a_document"),
        (ComparesRevisionsTooEarly, "test_a_step_sees_what_was_done_to_a_document_before_it"),
        (KeepsDocuments, "test_what_is_deleted_is_gone_and_may_be_added_anew"),
        (OneCollection, "test_every_key_of_every_collection_is_a_document_of_its_own"),
        (ListsByAge, "test_documents_are_listed_by_key_in_pages"),
        (StaysOpen, "test_the_documents_of_a_closed_store_say_so"),
        (StaysOpen, "test_the_repositories_of_a_closed_store_say_so"),
    ],
)
def test_the_contract_finds_out_a_store_that_is_wrong(contract, store_class, test):
    passed, failed = contract.run(store_class, only=test)
    assert passed == 0
    assert failed > 0


# -- cancel_at_every_checkpoint ---------------------------------------------------------------


async def test_it_cancels_once_at_each_checkpoint_and_ends_with_a_whole_run():
    reached: list[int] = []
    results: list[str | None] = []

    async def operation() -> str:
        reached.append(0)
        for _ in range(3):
            await checkpoint()
            reached[-1] += 1
        return "done"

    async def afterwards(result: str | None) -> None:
        results.append(result)
        await checkpoint()  # it is not cancelled itself

    assert await cancel_at_every_checkpoint(operation, afterwards) == 3
    assert reached == [0, 1, 2, 3]
    assert results == [None, None, None, "done"]


async def test_it_runs_what_has_no_checkpoint_once():
    results: list[int | None] = []

    async def operation() -> int:
        return 7

    async def afterwards(result: int | None) -> None:
        results.append(result)

    assert await cancel_at_every_checkpoint(operation, afterwards) == 0
    assert results == [7]


async def test_it_gives_the_result_of_what_was_finished_in_spite_of_the_cancellation():
    results: list[str | None] = []

    async def operation() -> str:
        with anyio.CancelScope(shield=True):
            await checkpoint()
        return "done"

    async def afterwards(result: str | None) -> None:
        results.append(result)

    assert await cancel_at_every_checkpoint(operation, afterwards) == 1
    assert results == ["done", "done"]


async def test_it_cancels_waiting_for_others_too():
    """The others go on: only the operation is cancelled."""
    helped = 0

    async def operation() -> None:
        async with anyio.create_task_group() as tasks:
            event = anyio.Event()
            tasks.start_soon(help_out, event)
            await event.wait()

    async def help_out(event: anyio.Event) -> None:
        nonlocal helped
        helped += 1
        event.set()

    async def afterwards(_: None) -> None:
        pass

    assert await cancel_at_every_checkpoint(operation, afterwards) >= 1
    assert helped >= 1


async def test_it_finds_what_is_left_half_done():
    account = {"ann": 10, "bob": 0}

    async def transfer() -> None:
        account["ann"] -= 1
        await checkpoint()
        account["bob"] += 1

    async def afterwards(_: None) -> None:
        assert sum(account.values()) == 10

    with pytest.raises(AssertionError):
        await cancel_at_every_checkpoint(transfer, afterwards)


async def test_an_error_of_the_operation_arrives_as_it_is():
    error = KeyError("the operation's own")

    async def operation() -> None:
        await checkpoint()
        await checkpoint()
        raise error

    async def afterwards(_: None) -> None:
        pass

    with pytest.raises(KeyError) as raised:
        await cancel_at_every_checkpoint(operation, afterwards)
    assert raised.value is error


async def test_the_clean_up_of_a_cancelled_operation_may_await():
    cleaned = 0

    async def operation() -> None:
        nonlocal cleaned
        try:
            await checkpoint()
        finally:
            with anyio.CancelScope(shield=True):
                await checkpoint()
                cleaned += 1

    async def afterwards(_: None) -> None:
        pass

    assert await cancel_at_every_checkpoint(operation, afterwards) == 2
    assert cleaned == 3


# -- the plugin -------------------------------------------------------------------------------


@pytest.mark.parametrize("_", [1, 2])
async def test_the_fixtures_are_open_and_empty_for_every_test(event_store, sqlite_event_store, _):
    for store in (event_store, sqlite_event_store):
        assert await store.last_position() == 0
        await store.append_events("a", "Hall", [HallOpened(5)], ANY)
        assert await store.last_position() == 1


def test_the_fixtures_are_there_in_any_project(pytester):
    pytester.makeini("[pytest]\nanyio_mode = auto\nfilterwarnings = error\n")
    pytester.makepyfile("""
        from pathlib import Path
        from eventsource_anyio import InMemoryEventStore, SQLiteEventStore

        async def test_them(event_store, sqlite_event_store, tmp_path):
            assert type(event_store) is InMemoryEventStore
            assert type(sqlite_event_store) is SQLiteEventStore
            assert await event_store.last_position() == await sqlite_event_store.last_position()
            assert (tmp_path / "events.db").is_file()
    """)
    pytester.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(passed=2)
    described = pytester.runpytest_inprocess("--fixtures", "-p", "no:cacheprovider")
    described.stdout.fnmatch_lines(
        ["event_store*", "    An empty, open in-memory store.", "sqlite_event_store*"]
    )
