"""The contract of appending: expected versions, atomicity, idempotency, transactions, metadata."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from enum import IntEnum
from uuid import UUID, uuid4

import anyio
import pytest

from ..errors import ConcurrencyError, DuplicateEventError, EventEncodeError
from ..events import NewEvent, caused_by
from ..metadata import event_metadata
from ..stores.interface import ANY, NO_STREAM, STREAM_EXISTS, EventStore
from .samples import Ended, Happened, append_numbers, numbers


class AppendContract:
    async def test_append_returns_version_position_and_events(self, store: EventStore) -> None:
        first = await store.append_events("a", "Thing", [Happened(1), Happened(2)], NO_STREAM)
        second = await store.append_events("b", "Thing", [Ended()], 0)
        assert (first.version, second.version) == (2, 1)
        assert first.position < second.position
        assert [stored.version for stored in first.events] == [1, 2]
        assert first.events[1].position == first.position
        assert [stored async for stored in store.read_all()] == [*first.events, *second.events]

    async def test_a_stored_event_knows_where_it_belongs(self, store: EventStore) -> None:
        before = datetime.now(UTC)
        new = NewEvent(Happened(7), metadata={"user": "ann"})
        await store.append_events("n-1", "Thing", [new], NO_STREAM)
        (stored,) = await store.get_events("n-1", "Thing")
        assert stored.event == Happened(7)
        assert stored.event_id == new.event_id
        assert stored.event_type == Happened.event_type
        assert (stored.aggregate_type, stored.aggregate_id) == ("Thing", "n-1")
        assert stored.stream_id == "Thing-n-1"
        assert (stored.version, stored.schema_version) == (1, 1)
        assert stored.metadata == {"user": "ann"}
        assert stored.recorded_at.utcoffset() == timedelta(0)
        assert before - timedelta(seconds=1) < stored.recorded_at < before + timedelta(minutes=1)
        assert stored.occurred_at == stored.recorded_at

    async def test_occurred_at_keeps_the_moment(self, store: EventStore) -> None:
        moment = datetime(1999, 12, 31, 23, 59, 59, 123456, timezone(timedelta(hours=-5)))
        await store.append_events("a", "Thing", [NewEvent(Ended(), occurred_at=moment)], ANY)
        (stored,) = await store.get_events("a", "Thing")
        assert stored.occurred_at == moment
        assert stored.occurred_at.utcoffset() == timedelta(0)

    async def test_events_that_are_stored_together_keep_what_is_their_own(
        self, store: EventStore
    ) -> None:
        def event(number: int) -> NewEvent:
            moment = datetime(2020, 1, number, tzinfo=UTC) if number % 2 else None
            own: dict[str, object] = {"number": number} if number % 3 else {}
            kind = Ended() if number % 5 == 0 else Happened(number)
            return NewEvent(kind, metadata=own, occurred_at=moment)

        async def append(number: int) -> None:
            events = [event(number * 4 + more) for more in range(1, 1 + number % 3 + 1)]
            result = await store.append_events(f"s-{number}", "Thing", events, NO_STREAM)
            stored = [*await store.get_events(f"s-{number}", "Thing")]
            assert stored == [*result.events]
            assert [one.event_id for one in stored] == [new.event_id for new in events]
            for one, new in zip(stored, events, strict=True):
                assert one.event == new.event
                assert one.metadata == new.metadata
                assert one.occurred_at == (new.occurred_at or one.recorded_at)

        async with anyio.create_task_group() as tasks:
            for number in range(7):
                tasks.start_soon(append, number)

    async def test_a_uuid_comes_back_as_a_uuid_and_a_string_as_a_string(
        self, store: EventStore
    ) -> None:
        uuid = uuid4()
        for aggregate_id in (uuid, "case 7/ü", uuid.hex, str(uuid).upper()):
            await store.append_events(aggregate_id, "Thing", [Ended()], NO_STREAM)
        assert [stored.aggregate_id async for stored in store.read_all()] == [
            uuid,
            "case 7/ü",
            uuid.hex,
            str(uuid).upper(),
        ]

    async def test_a_uuid_and_its_text_name_one_stream(self, store: EventStore) -> None:
        uuid = uuid4()
        await store.append_events(uuid, "Thing", [Ended()], NO_STREAM)
        await store.append_events(str(uuid), "Thing", [Ended()], 1)
        stream = await store.get_events(str(uuid), "Thing")
        assert [stored.aggregate_id for stored in stream] == [uuid, uuid]
        assert isinstance(stream[1].aggregate_id, UUID)

    @pytest.mark.parametrize("expected", [NO_STREAM, 0, ANY])
    async def test_expectations_that_a_new_stream_meets(
        self, store: EventStore, expected: int
    ) -> None:
        assert (await store.append_events("a", "Thing", [Ended()], expected)).version == 1

    @pytest.mark.parametrize("expected", [STREAM_EXISTS, 1, 5])
    async def test_expectations_that_a_new_stream_does_not_meet(
        self, store: EventStore, expected: int
    ) -> None:
        with pytest.raises(ConcurrencyError, match="Thing-a does not exist, expected") as raised:
            await store.append_events("a", "Thing", [Ended()], expected)
        assert (raised.value.actual, raised.value.expected) == (0, expected)
        assert await store.last_position() == 0

    @pytest.mark.parametrize("expected", [STREAM_EXISTS, 2, ANY])
    async def test_expectations_that_a_stream_meets(self, store: EventStore, expected: int) -> None:
        await append_numbers(store, 2)
        assert (await store.append_events("a", "Thing", [Ended()], expected)).version == 3

    @pytest.mark.parametrize("expected", [NO_STREAM, 0, 1, 3])
    async def test_expectations_that_a_stream_does_not_meet(
        self, store: EventStore, expected: int
    ) -> None:
        await append_numbers(store, 2)
        with pytest.raises(ConcurrencyError, match="Thing-a is at version 2, expected"):
            await store.append_events("a", "Thing", [Ended(), Ended()], expected)
        assert len(await store.get_events("a", "Thing")) == 2

    async def test_a_version_may_be_any_kind_of_integer(self, store: EventStore) -> None:
        class Version(IntEnum):
            NEW = 0
            FIRST = 1

        await store.append_events("a", "Thing", [Ended()], Version.NEW)
        await store.append_events("a", "Thing", [Ended(), Ended()], Version.FIRST)
        with pytest.raises(ConcurrencyError, match="Thing-a is at version 3, expected"):
            await store.append_events("a", "Thing", [Ended()], Version.FIRST)

    async def test_a_conflict_says_what_came_between(self, store: EventStore) -> None:
        await append_numbers(store, 2)
        await store.append_events("a", "Thing", [Ended()], ANY)
        with pytest.raises(ConcurrencyError) as raised:
            await store.append_events("a", "Thing", [Ended()], 1)
        assert f"2 events ({Happened.event_type}, {Ended.event_type})" in str(raised.value)

    async def test_streams_of_two_types_with_one_id_are_two(self, store: EventStore) -> None:
        await append_numbers(store, 2, "a", "Thing")
        await append_numbers(store, 3, "a", "Other")
        assert len(await store.get_events("a", "Thing")) == 2
        assert len(await store.get_events("a", "Other")) == 3

    async def test_appending_concurrently_loses_and_doubles_nothing(
        self, store: EventStore
    ) -> None:
        async def append(number: int) -> None:
            await store.append_events("shared", "Thing", [Happened(number)] * 2, ANY)
            await store.append_events(str(number), "Own", [Ended()], NO_STREAM)

        async with anyio.create_task_group() as tasks:
            for number in range(50):
                tasks.start_soon(append, number)
        shared = await store.get_events("shared", "Thing")
        assert [stored.version for stored in shared] == list(range(1, 101))
        assert numbers(shared)[::2] == numbers(shared)[1::2]
        assert sorted(numbers(shared)[::2]) == list(range(50))
        positions = [stored.position async for stored in store.read_all()]
        assert len(positions) == 150
        assert positions == sorted(set(positions))

    async def test_one_of_many_wins_at_an_exact_version(self, store: EventStore) -> None:
        outcomes: list[str] = []

        async def append(number: int) -> None:
            try:
                await store.append_events("a", "Thing", [Happened(number)], NO_STREAM)
            except ConcurrencyError:
                outcomes.append("conflict")
            else:
                outcomes.append("stored")

        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(append, number)
        assert sorted(outcomes) == ["conflict"] * 19 + ["stored"]
        assert len(await store.get_events("a", "Thing")) == 1

    async def test_an_append_may_be_repeated(self, store: EventStore) -> None:
        events = [NewEvent(Happened(1)), NewEvent(Happened(2))]
        original = await store.append_events("a", "Thing", events, NO_STREAM)
        await store.append_events("a", "Thing", [Ended()], ANY)
        for expected in (NO_STREAM, ANY, STREAM_EXISTS, 2, 3, 77):
            assert await store.append_events("a", "Thing", events, expected) == original
        assert len(await store.get_events("a", "Thing")) == 3

    async def test_repeating_concurrently_stores_once(self, store: EventStore) -> None:
        events = [NewEvent(Happened(1)), NewEvent(Happened(2))]
        positions: set[int] = set()

        async def append() -> None:
            result = await store.append_events("a", "Thing", events, NO_STREAM)
            positions.add(result.position)

        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(append)
        assert len(positions) == 1
        assert len(await store.get_events("a", "Thing")) == 2

    async def test_an_event_id_stands_for_one_event(self, store: EventStore) -> None:
        first, second = NewEvent(Happened(1)), NewEvent(Happened(2))
        await store.append_events("a", "Thing", [first, second], NO_STREAM)
        other = NewEvent(Happened(9), event_id=first.event_id)
        another_type = NewEvent(Ended(), event_id=first.event_id)
        for aggregate_id, events, why in (
            ("b", [first], "belongs to Thing-a"),
            ("a", [other], "another event under this id"),
            ("a", [another_type], "another event under this id"),
            ("a", [second, first], "not appended in this order"),
            ("a", [NewEvent(Ended()), first], "are new"),
            ("a", [first, NewEvent(Ended())], "are new"),
        ):
            for expected in (ANY, 0, 2):
                with pytest.raises(DuplicateEventError, match=why):
                    await store.append_events(aggregate_id, "Thing", events, expected)
        assert [stored.event async for stored in store.read_all()] == [Happened(1), Happened(2)]

    async def test_bad_arguments_are_refused_and_store_nothing(self, store: EventStore) -> None:
        twice = NewEvent(Ended())
        for aggregate_id, aggregate_type, events, expected, error, why in (
            ("a", "Thing", [], ANY, ValueError, "nothing to append"),
            ("", "Thing", [Ended()], ANY, ValueError, "aggregate_id"),
            ("a\0", "Thing", [Ended()], ANY, ValueError, "aggregate_id"),
            ("\ud800", "Thing", [Ended()], ANY, ValueError, "aggregate_id"),
            (7, "Thing", [Ended()], ANY, TypeError, "aggregate_id"),
            ("a", "", [Ended()], ANY, ValueError, "aggregate_type"),
            ("a", "Some-Thing", [Ended()], ANY, ValueError, "'-'"),
            ("a", "Thing", [Ended()], -1, ValueError, "expected_version"),
            ("a", "Thing", [Ended()], None, TypeError, "expected_version"),
            ("a", "Thing", Ended(), ANY, TypeError, "list of events"),
            ("a", "Thing", ["Ended"], ANY, TypeError, "not an event class"),
            ("a", "Thing", [twice, twice], ANY, ValueError, "same event_id"),
            ("a", "Thing", [Ended(), Happened("7")], ANY, EventEncodeError, r"\$\.number"),  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        ):
            with pytest.raises(error, match=why):
                await store.append_events(aggregate_id, aggregate_type, events, expected)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match="would come back as"):
            await store.append_events("a", "Thing", [Ended()], ANY, metadata={"pair": (1, 2)})
        assert await store.last_position() == 0

    async def test_metadata_of_the_event_the_append_and_the_context(
        self, store: EventStore
    ) -> None:
        correlation_id = uuid4()
        with event_metadata(correlation_id=correlation_id, user="ann", host="h"):
            with event_metadata(user="bob"):
                await store.append_events(
                    "a",
                    "Thing",
                    [Ended(), NewEvent(Ended(), metadata={"step": {"of": [1, None, 2.5]}})],
                    ANY,
                    metadata={"step": 1, "host": "i"},
                )
        await store.append_events("a", "Thing", [Ended()], ANY)
        plain, own, after = await store.get_events("a", "Thing")
        assert plain.metadata == {
            "correlation_id": str(correlation_id),
            "user": "bob",
            "host": "i",
            "step": 1,
        }
        assert own.metadata == {**plain.metadata, "step": {"of": [1, None, 2.5]}}
        assert after.metadata == {}
        assert (plain.correlation_id, plain.causation_id) == (str(correlation_id), None)

    async def test_effects_point_to_their_cause(self, store: EventStore) -> None:
        first = (await store.append_events("a", "Thing", [Ended()], ANY)).events[0]
        with caused_by(first):
            second = (await store.append_events("b", "Thing", [Ended()], ANY)).events[0]
        with caused_by(second):
            third = (await store.append_events("c", "Thing", [Ended()], ANY)).events[0]
        assert (first.correlation_id, first.causation_id) == (None, None)
        assert (second.correlation_id, second.causation_id) == (str(first.event_id),) * 2
        assert third.correlation_id == str(first.event_id)
        assert third.causation_id == str(second.event_id)

    async def test_a_transaction_stores_all_of_its_appends(self, store: EventStore) -> None:
        async with store.transaction() as tx:
            await tx.append_events("a", "Thing", [Happened(1)], NO_STREAM)
            await tx.append_events("b", "Thing", [Happened(2), Happened(3)], NO_STREAM)
            await tx.append_events("a", "Thing", [Happened(4)], 1)
            assert await store.last_position() == 0
        assert [result.version for result in tx.results] == [1, 2, 2]
        events = [stored async for stored in store.read_all()]
        assert numbers(events) == [1, 2, 3, 4]
        assert [one for result in tx.results for one in result.events] == events

    async def test_a_transaction_stores_all_or_nothing(self, store: EventStore) -> None:
        await append_numbers(store, 1, "b")
        known = NewEvent(Ended())
        await store.append_events("c", "Thing", [known], ANY)
        with pytest.raises(ConcurrencyError):
            async with store.transaction() as tx:
                await tx.append_events("a", "Thing", [Happened(1), Happened(2)], NO_STREAM)
                await tx.append_events("b", "Thing", [Happened(1)], NO_STREAM)
        with pytest.raises(DuplicateEventError):
            async with store.transaction() as tx:
                await tx.append_events("a", "Thing", [Happened(1), Happened(2)], NO_STREAM)
                await tx.append_events("a", "Thing", [Happened(3), known], ANY)
        with pytest.raises(KeyError):
            async with store.transaction() as tx:
                await tx.append_events("a", "Thing", [Happened(1)], NO_STREAM)
                raise KeyError("the caller's own")
        assert len(await store.get_events("a", "Thing")) == 0
        assert (await store.append_events("a", "Thing", [Ended()], NO_STREAM)).version == 1
        assert len([stored async for stored in store.read_all()]) == 3

    async def test_a_transaction_is_used_once_and_inside_its_block(self, store: EventStore) -> None:
        async with store.transaction() as tx:
            pass
        with pytest.raises(RuntimeError, match="inside its block"):
            await tx.append_events("a", "Thing", [Ended()], ANY)
        with pytest.raises(RuntimeError, match="used once"):
            await tx.__aenter__()
