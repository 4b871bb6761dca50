"""The SQLite store against the in-memory one, which is the reference.

Whatever is done, in whatever order, both answer the same: results, positions, errors and their
messages. Only the time of recording is each store's own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, nullcontext
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, TypeAlias
from uuid import UUID

import anyio
import attrs
import pytest
from anyio.from_thread import start_blocking_portal
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from msgspec.structs import replace

from eventsource_anyio import (
    ANY,
    NO_STREAM,
    STREAM_EXISTS,
    AppendResult,
    DomainEvent,
    EventDecodeError,
    EventStore,
    EventStream,
    InMemoryEventStore,
    NewEvent,
    OutboxMessage,
    ReadOptions,
    SQLiteEventStore,
    StoredEvent,
    Subscription,
    Transaction,
)
from eventsource_anyio.errors import DocumentConflictError
from eventsource_anyio.ids import SLICES, slice_of
from eventsource_anyio.stores.interface import Document, StoredMessage
from eventsource_anyio.testing.reading import forgotten
from eventsource_anyio.testing.samples import Ended, Happened
from tests.conftest import LOOPS

HUGE = 2**64
SOME_DAY = datetime(2001, 2, 3, 4, 5, 6, 7, UTC)
RIGHT = "the version that the stream is at"
OURS = [slice_of(f"{kind}-{of}") for kind in ("Thing", "Other") for of in ("a", UUID(int=1), "ü/7")]
TYPES = (Happened.event_type, Ended.event_type)

aggregate_ids = st.sampled_from(["a", "b", UUID(int=1), str(UUID(int=1)), "ü/7"])
aggregate_types = st.sampled_from(["Thing", "Other"])
events = st.builds(Happened, st.integers(-9, 9), st.text(max_size=3)) | st.just(Ended())
drafts = st.lists(
    st.builds(
        NewEvent,
        events,
        event_id=st.just(UUID(int=0)),
        metadata=st.sampled_from([{}, {"user": "ann"}, {"deep": [1, {"ü": None}]}]),
        occurred_at=st.sampled_from([None, SOME_DAY]),
    ),
    min_size=1,
    max_size=4,
)
expectations = st.sampled_from([ANY, NO_STREAM, STREAM_EXISTS, RIGHT, RIGHT, HUGE]) | st.integers(
    0, 8
)
unknown_types = st.sampled_from([None, None, None, *TYPES])
firsts = st.sampled_from([0, 0, 0, 1, 2, 3, 5, 8, 20, HUGE])
lasts = st.sampled_from([None, None, None, 0, 1, 4, 9, 20, HUGE])
some_types = st.sampled_from([(), (), TYPES[:1], TYPES[1:], TYPES, ("unheard of",)])
some_aggregate_types = st.sampled_from([(), (), ("Thing",), ("Other", "unheard of")])
some_slices = st.sampled_from(
    [None, None, range(512), range(512, SLICES), range(300, 900), *(range(s, s + 1) for s in OURS)]
)
batch_sizes = st.sampled_from([1, 2, 3, 5, 500, HUGE])


def options(**bounds: st.SearchStrategy[Any]) -> st.SearchStrategy[ReadOptions]:
    return st.builds(
        ReadOptions,
        **bounds,
        backwards=st.booleans(),
        limit=lasts,
        event_types=some_types,
        batch_size=batch_sizes,
    )


@attrs.frozen
class Attempt:
    """An append, whether it succeeded or not; it can be made again."""

    aggregate_id: UUID | str
    aggregate_type: str
    events: Sequence[NewEvent]
    expected: Any


@attrs.frozen
class Save:
    """A checkpoint to save, in a store or in a transaction."""

    name: str
    position: int
    expected: int | None

    async def __call__(self, target: EventStore | Transaction) -> None:
        await target.checkpoints.save(self.name, self.position, expected=self.expected)


@attrs.frozen
class Add:
    messages: Sequence[OutboxMessage]

    async def __call__(self, target: EventStore | Transaction) -> None:
        await target.outbox.add(*self.messages)


@attrs.frozen
class Change:
    """A document to write or delete, where it is absent, or at the revision that it is at now."""

    kind: str
    key: str
    value: object
    expects: bool

    async def __call__(self, target: EventStore | Transaction) -> None:
        documents = target.documents
        expected: UUID | None = None
        if self.expects:
            found = await documents.get("c", self.key)
            expected = found.revision if found else UUID(int=0)
        if self.kind == "add":
            await documents.add("c", self.key, self.value)
        elif self.kind == "save":
            await documents.save("c", self.key, self.value, expected=expected)
        elif self.kind == "save all":
            await documents.save_all("c", {self.key: self.value, "b": self.value})
        else:
            await documents.delete("c", self.key, expected=expected)


@attrs.frozen
class Delivered:
    message_ids: Sequence[UUID]

    async def __call__(self, target: EventStore | Transaction) -> None:
        await target.outbox.delivered(self.message_ids)


NAMES = ("one", "two")
message_ids = st.integers(1, 5).map(lambda number: UUID(int=number))
messages = st.builds(
    OutboxMessage,
    st.sampled_from(["t", "ü"]),
    st.binary(max_size=2),
    metadata=st.sampled_from([{}, {"user": "ann"}]),
    message_id=message_ids,
)
asides = (
    st.builds(Save, st.sampled_from(NAMES), st.integers(0, 3), st.none() | st.integers(0, 3))
    | st.builds(Add, st.lists(messages, max_size=3))
    | st.builds(Delivered, st.lists(message_ids, max_size=3))
    | st.builds(
        Change,
        st.sampled_from(["add", "save", "save all", "delete"]),
        st.sampled_from(["a", "b", "ü"]),
        st.integers(0, 9) | st.just({"ü": [None, 1e17]}),
        st.booleans(),
    )
)


@attrs.define
class Following:
    """A subscription to each store."""

    options: ReadOptions
    subscriptions: list[Subscription]

    @property
    def position(self) -> int:
        reference, sqlite = self.subscriptions
        assert sqlite.position == reference.position
        return reference.position


Operation: TypeAlias = Callable[..., Awaitable[object]]


async def outcome(operation: Operation, *arguments: Any) -> object:
    try:
        return comparable(await operation(*arguments))
    except Exception as error:  # noqa: BLE001  (whatever it is, both raise it)
        return comparable(error)


def comparable(answer: object) -> object:
    """The answer without the time at which it was recorded."""
    match answer:
        case StoredEvent(recorded_at=recorded_at, occurred_at=occurred_at):
            given = SOME_DAY if occurred_at == SOME_DAY else recorded_at
            assert occurred_at == given
            moment = occurred_at if occurred_at != recorded_at else SOME_DAY.replace(year=1970)
            return replace(answer, recorded_at=SOME_DAY, occurred_at=moment)
        case Document():
            return (answer.key, answer.value)  # each store has revisions of its own
        case DocumentConflictError():
            return (answer.key, answer.expected is None, answer.actual is None)
        case StoredMessage():
            return answer.message  # positions have gaps, in SQLite where an id was there already
        case AppendResult():
            return (answer.version, answer.position, comparable(answer.events))
        case EventStream():
            return (attrs.evolve(answer, events=()), comparable(answer.events))
        case EventDecodeError():
            return (str(answer), answer.payload)
        case Exception():
            return (type(answer), str(answer))
        case list() | tuple():
            return [comparable(one) for one in answer]
        case _:
            return answer


async def take(
    iterator: AsyncIterator[StoredEvent], count: int | None = None
) -> list[StoredEvent | EventDecodeError]:
    """The next events, and the errors in place of those that cannot be read."""
    taken: list[StoredEvent | EventDecodeError] = []
    with anyio.fail_after(20):
        while count is None or len(taken) < count:
            try:
                taken.append(await anext(iterator))
            except StopAsyncIteration:
                break
            except EventDecodeError as error:
                taken.append(error)
    return taken


class Stores(RuleBasedStateMachine):
    backend: ClassVar[tuple[str, dict[str, Any]]]
    attempts = Bundle[Attempt]("attempts")
    followings = Bundle[Following]("followings")

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.call = self.stack.enter_context(start_blocking_portal(*self.backend)).call
        path = Path(self.stack.enter_context(TemporaryDirectory())) / "events.db"
        self.stores = (InMemoryEventStore(), SQLiteEventStore(path, synchronous="NORMAL"))
        self.used_ids = 0
        self.all_followings: list[Following] = []
        self.open()

    def open(self) -> None:
        for store in self.stores:
            self.call(store.__aenter__)

    def close(self) -> None:
        for store in self.stores:
            self.call(store.__aexit__, None, None, None)

    def teardown(self) -> None:
        with self.stack:
            for batch_size in (1, 2, 3):
                following = self.follow(0, batch_size=batch_size)
                for most in (1, 1, 2, None):
                    self.take_what_is_new(following, most)
            self.reopen()
            for batch_size, backwards in product((1, 2, 3, 500), (False, True)):
                options = ReadOptions(batch_size=batch_size, backwards=backwards)
                self.both(lambda store, options=options: take(store.read_all(options)))
            self.close()

    def both(self, operation: Operation, unknown: str | None = None) -> Any:
        """The outcome of the operation, which is the same in both stores."""

        async def run() -> list[object]:
            return [await outcome(operation, store) for store in self.stores]

        with forgotten(unknown) if unknown else nullcontext():
            reference, sqlite = self.call(run)
        assert sqlite == reference
        return reference

    def new(self, drafts: Sequence[NewEvent]) -> list[NewEvent]:
        """The drafts with ids of their own, the same for both stores."""
        self.used_ids += len(drafts)
        last = self.used_ids
        return [attrs.evolve(one, event_id=UUID(int=last - nth)) for nth, one in enumerate(drafts)]

    def version(self, attempt: Attempt) -> int:
        async def version(store: EventStore) -> int:
            return (await store.get_events(attempt.aggregate_id, attempt.aggregate_type)).version

        found: int = self.both(version)
        return found

    def append(self, attempt: Attempt, unknown: str | None = None) -> None:
        expected = self.version(attempt) if attempt.expected is RIGHT else attempt.expected
        arguments = (attempt.aggregate_id, attempt.aggregate_type, attempt.events, expected)
        self.both(lambda store: store.append_events(*arguments), unknown)

    # Appending

    @initialize(target=attempts, drafts=st.lists(drafts, min_size=3, max_size=5))
    def append_something_to_begin_with(self, drafts: Sequence[Sequence[NewEvent]]) -> Any:
        begun = [
            Attempt(of, "Thing", self.new(events), ANY)
            for of, events in zip("aaabb", drafts, strict=False)
        ]
        for attempt in begun:
            self.append(attempt)
        return multiple(*begun)

    @rule(target=attempts, of=aggregate_ids, kind=aggregate_types, drafts=drafts, at=expectations)
    def append_something_new(
        self, of: UUID | str, kind: str, drafts: Sequence[NewEvent], at: Any
    ) -> Attempt:
        attempt = Attempt(of, kind, self.new(drafts), at)
        self.append(attempt)
        return attempt

    @rule(attempt=attempts, at=expectations, unknown=unknown_types)
    def append_it_again(self, attempt: Attempt, at: Any, unknown: str | None) -> None:
        self.append(attrs.evolve(attempt, expected=at), unknown)

    @rule(attempt=attempts, of=aggregate_ids, kind=aggregate_types, at=expectations)
    def append_it_elsewhere(self, attempt: Attempt, of: UUID | str, kind: str, at: Any) -> None:
        self.append(Attempt(of, kind, attempt.events, at))

    @rule(attempt=attempts, more=drafts, at=expectations, data=st.data())
    def append_some_of_it_among_others(
        self, attempt: Attempt, more: Sequence[NewEvent], at: Any, data: st.DataObject
    ) -> None:
        events = data.draw(st.permutations([*attempt.events, *self.new(more)]))
        count = data.draw(st.integers(1, len(events)))
        self.append(attrs.evolve(attempt, events=events[:count], expected=at))

    @rule(attempt=attempts, event=events, at=expectations)
    def append_another_event_under_its_id(
        self, attempt: Attempt, event: DomainEvent, at: Any
    ) -> None:
        first, *others = attempt.events
        changed = [attrs.evolve(first, event=event), *others]
        self.append(attrs.evolve(attempt, events=changed, expected=at))

    @rule(
        new=st.lists(st.tuples(aggregate_ids, aggregate_types, drafts), max_size=8),
        again=st.lists(attempts, max_size=4),
        asides=st.lists(asides, max_size=6),
        data=st.data(),
    )
    def write_in_transactions_that_end_at_once(
        self,
        new: Sequence[tuple[UUID | str, str, Sequence[NewEvent]]],
        again: Sequence[Attempt],
        asides: Sequence[Save | Add | Change | Delivered],
        data: st.DataObject,
    ) -> None:
        """One after another in the reference; together, and in the same order, in SQLite."""
        appends = [Attempt(of, kind, self.new(events), ANY) for of, kind, events in new]
        units: list[list[Attempt | Save | Add | Change | Delivered]] = [[]]
        for step in data.draw(st.permutations([*appends, *again, *asides])):
            if isinstance(step, Attempt):
                expected = data.draw(
                    st.just(ANY) | expectations.filter(lambda one: one is not RIGHT)
                )
                step = attrs.evolve(step, expected=expected)
            units[-1].append(step)
            if data.draw(st.booleans()):
                units.append([])

        async def begin(
            store: EventStore, unit: Sequence[Attempt | Save | Add | Change | Delivered]
        ) -> Transaction:
            tx = await store.transaction().__aenter__()
            for one in unit:
                if isinstance(one, Attempt):
                    await tx.append_events(
                        one.aggregate_id, one.aggregate_type, one.events, one.expected
                    )
                else:
                    await one(tx)
            return tx

        async def end(tx: Transaction, turn: anyio.Event, next_turn: anyio.Event) -> object:
            await turn.wait()
            next_turn.set()  # for after this one is in the queue, where it goes without a pause
            await tx.__aexit__(None, None, None)
            return tx.results

        async def run() -> None:
            reference, sqlite = self.stores
            now = anyio.Event()
            now.set()
            # All begin before the first one ends: what they read is the same in both stores.
            begun = [await begin(reference, unit) for unit in units]
            expected = [await outcome(end, tx, now, now) for tx in begun]
            begun = [await begin(sqlite, unit) for unit in units]
            turns = [now, *(anyio.Event() for _ in units)]
            with anyio.fail_after(20):
                async with anyio.create_task_group() as tasks:
                    ended = [
                        tasks.create_task(outcome(end, tx, *turns[nth : nth + 2]))
                        for nth, tx in enumerate(begun)
                    ]
            assert [one.return_value for one in ended] == expected

        self.call(run)

    # Beside the events

    @rule(aside=asides)
    def write_something_else(self, aside: Save | Add | Change | Delivered) -> None:
        self.both(aside)

    @rule(limit=st.sampled_from([1, 2, HUGE]))
    def read_the_outbox(self, limit: int) -> None:
        self.both(lambda store: store.outbox.pending(limit))

    @invariant()
    def they_have_the_same_beside_the_events(self) -> None:
        async def look(store: EventStore) -> object:
            found = [await store.checkpoints.get(name) for name in NAMES]
            documents = [*await store.documents.list("c")]
            return [*found, *await store.outbox.pending(), *documents]

        self.both(look)

    # Reading

    @rule(
        options=options(
            from_position=firsts,
            to_position=lasts,
            aggregate_types=some_aggregate_types,
            slices=some_slices,
        ),
        unknown=unknown_types,
    )
    def read_all(self, options: ReadOptions, unknown: str | None) -> None:
        self.both(lambda store: take(store.read_all(options)), unknown)

    @rule(
        attempt=attempts,
        options=options(from_version=firsts, to_version=lasts),
        unknown=unknown_types,
    )
    def read_stream(self, attempt: Attempt, options: ReadOptions, unknown: str | None) -> None:
        stream_id = f"{attempt.aggregate_type}-{attempt.aggregate_id}"
        self.both(lambda store: take(store.read_stream(stream_id, options)), unknown)

    @rule(
        attempt=attempts,
        kind=st.none() | aggregate_types,
        first=firsts,
        unknown=unknown_types,
    )
    def get_events(
        self, attempt: Attempt, kind: str | None, first: int, unknown: str | None
    ) -> None:
        self.both(lambda store: store.get_events(attempt.aggregate_id, kind, first), unknown)

    @invariant()
    def they_end_at_the_same_position(self) -> None:
        self.both(lambda store: store.last_position())

    # Subscribing

    def subscribe(self, options: ReadOptions, after: int) -> list[Subscription]:
        return [
            self.call(store.subscribe(after=after, options=options).__aenter__)
            for store in self.stores
        ]

    @rule(
        target=followings,
        after=firsts.filter(lambda after: after != HUGE),
        event_types=some_types,
        aggregate_types=some_aggregate_types,
        slices=some_slices,
        batch_size=batch_sizes,
    )
    def follow(self, after: int, **filters: Any) -> Following:
        options = ReadOptions(**filters)
        following = Following(options, self.subscribe(options, after))
        self.all_followings.append(following)
        return following

    @rule(following=followings, most=st.integers(1, 9), unknown=unknown_types)
    def take_what_is_new(
        self, following: Following, most: int | None, unknown: str | None = None
    ) -> None:
        rest = attrs.evolve(following.options, from_position=following.position + 1, limit=most)
        expected = [one.position for one in self.both(lambda store: take(store.read_all(rest)))]
        with forgotten(unknown) if unknown else nullcontext():
            reference, sqlite = [
                self.call(take, one, len(expected)) for one in following.subscriptions
            ]
        # What is in them may have been decoded when its type was known, or when it was not; SQLite
        # decodes an event when it is its turn, the reference by the page.
        assert [one.position for one in reference] == expected
        assert [one.position for one in sqlite] == expected
        for mine, other in zip(sqlite, reference, strict=True):
            if isinstance(mine, StoredEvent) and isinstance(other, StoredEvent):
                assert comparable([mine]) == comparable([other])

    @rule()
    def reopen(self) -> None:
        self.close()
        self.open()
        for following in self.all_followings:
            following.subscriptions = self.subscribe(following.options, following.position)


@pytest.mark.timeout(600)  # after a failure, Hypothesis looks for the shortest way to it
def test_both_stores_answer_the_same(anyio_backend: tuple[str, dict[str, Any]]) -> None:
    class StoresOnThisLoop(Stores):
        backend = anyio_backend

    # The examples are the same on every loop: the stores are compared on one, and the loops by few.
    examples = settings().max_examples
    if anyio_backend != LOOPS["asyncio"]:
        examples //= 5
    run_state_machine_as_test(
        StoresOnThisLoop, settings=settings(stateful_step_count=40, max_examples=examples)
    )
