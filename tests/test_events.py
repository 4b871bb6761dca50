"""Events: their classes and versions, what is stored with them, and what cannot be read again."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import sqlite3
import sys
import time
from collections import Counter
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from enum import Enum, StrEnum
from functools import partial
from hashlib import md5
from pathlib import Path
from typing import Any, ClassVar
from uuid import RFC_4122, UUID, uuid4

import anyio
import attr
import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventsource_anyio import (
    ANY,
    NO_STREAM,
    STREAM_EXISTS,
    DomainEvent,
    EventDecodeError,
    EventDefinitionError,
    EventStore,
    NewEvent,
    ReadOptions,
    StoredEvent,
    caused_by,
    event_metadata,
    upcaster,
)
from eventsource_anyio.events import registered
from eventsource_anyio.ids import (
    SLICES,
    check_aggregate_type,
    normalize_aggregate_id,
    parse_stream_id,
    slice_of,
    stream_id_of,
    uuid7,
)


@attrs.frozen
class LetterSent(DomainEvent):
    to: str
    pages: int = 1


@attrs.frozen
class LetterRead(DomainEvent):
    event_type: ClassVar[str] = "letter.read"
    schema_version: ClassVar[int] = 3

    by: str


@pytest.fixture(params=["event_store", "sqlite_event_store"])
def store(request: pytest.FixtureRequest) -> EventStore:
    """Each of the stores in its turn."""
    found: EventStore = request.getfixturevalue(request.param)
    return found


async def append(store: EventStore, *events: DomainEvent | NewEvent) -> list[StoredEvent]:
    return list((await store.append_events("ann", "Person", events, ANY)).events)


async def decode_error(store: EventStore, version: int = 1) -> EventDecodeError:
    """What reading this one event of Ann's raises."""
    options = ReadOptions(from_version=version, to_version=version)
    with pytest.raises(EventDecodeError) as raised:
        await anext(store.read_stream("Person-ann", options))
    return raised.value


# -- event classes ----------------------------------------------------------------------------


def test_an_event_is_stored_under_the_name_of_its_class_unless_it_is_pinned():
    assert (LetterSent.event_type, LetterSent.schema_version) == ("LetterSent", 1)
    assert (LetterRead.event_type, LetterRead.schema_version) == ("letter.read", 3)


def test_a_subclass_has_a_name_and_a_version_of_its_own():
    @attrs.frozen
    class LetterReadAloud(LetterRead):
        to: str

    assert (LetterReadAloud.event_type, LetterReadAloud.schema_version) == ("LetterReadAloud", 1)
    assert (LetterRead.event_type, LetterRead.schema_version) == ("letter.read", 3)


async def test_a_subclass_is_stored_with_its_own_fields_and_those_of_its_base(store):
    @attrs.frozen
    class LetterSentAbroad(LetterSent):
        country: str = "NL"

    sent = LetterSentAbroad("bob", 2, "BE")
    await append(store, sent, LetterSent("bob", 2))
    abroad, home = [stored.event for stored in await store.get_events("ann")]
    assert (type(abroad), abroad) == (LetterSentAbroad, sent)
    assert (type(home), home) == (LetterSent, LetterSent("bob", 2))


@pytest.mark.parametrize(
    "decorate",
    [
        pytest.param(attrs.frozen, id="frozen"),
        pytest.param(attrs.define, id="define"),
        pytest.param(partial(attrs.frozen, slots=False), id="unslotted"),
        pytest.param(partial(attrs.define, slots=False), id="unslotted-define"),
        pytest.param(partial(attrs.frozen, kw_only=True), id="kw-only"),
        pytest.param(partial(attr.s, auto_attribs=True), id="attr.s"),
    ],
)
async def test_an_event_may_be_any_attrs_class(store, decorate):
    @decorate
    class Decorated(DomainEvent):
        number: int
        names: list[str] = attrs.field(factory=list)

    event = Decorated(number=7, names=["a", "ü"])  # type: ignore[call-arg]
    await append(store, event)
    (stored,) = await store.get_events("ann")
    assert (type(stored.event), stored.event) == (Decorated, event)
    assert stored.event_type == "Decorated"


def test_a_field_cannot_take_a_name_that_describes_the_class():
    with pytest.raises(EventDefinitionError) as raised:

        @attrs.frozen
        class Typed(DomainEvent):
            event_type: str  # type: ignore[misc]

    assert str(raised.value) == (
        f"{__name__}.test_a_field_cannot_take_a_name_that_describes_the_class.<locals>.Typed"
        ".event_type is a field, but the name is taken.\n"
        "  event_type of an event class describes the class.\n"
        "  Annotate it as ClassVar, or give the field another name."
    )
    with pytest.raises(EventDefinitionError, match=r"Versioned\.schema_version is a field"):

        @attrs.frozen
        class Versioned(DomainEvent):
            schema_version: int = 2  # type: ignore[misc]


@pytest.mark.parametrize("name", [7, None, "", "a\0b", "\ud800", "two\nlines"], ids=ascii)
def test_a_name_is_text_that_can_be_stored(name):
    with pytest.raises(EventDefinitionError, match=r"Nameless\.event_type cannot be"):

        @attrs.frozen
        class Nameless(DomainEvent):
            event_type: ClassVar[str] = name


@pytest.mark.parametrize("version", [0, -1, True, "2", 1.0, None], ids=repr)
def test_a_schema_version_counts_from_1(version):
    with pytest.raises(EventDefinitionError, match=r"Unversioned\.schema_version cannot"):

        @attrs.frozen
        class Unversioned(DomainEvent):
            schema_version: ClassVar[int] = version


async def test_a_name_belongs_to_one_class(event_store):
    with pytest.raises(EventDefinitionError) as raised:

        @attrs.frozen
        class Thief(DomainEvent):
            event_type: ClassVar[str] = "letter.read"

    assert str(raised.value) == (
        f"{__name__}.test_a_name_belongs_to_one_class.<locals>.Thief"
        " cannot be stored as 'letter.read'.\n"
        f"  {__name__}.LetterRead is stored under this name already.\n"
        "  Pin another one: event_type: ClassVar[str] = '…'."
    )
    await append(event_store, LetterRead("bob"))
    assert (await event_store.get_events("ann"))[0].event == LetterRead("bob")


def test_a_class_that_was_refused_is_no_event_class_and_leaves_its_name_free():
    class LetterRefused(DomainEvent):
        anything: object

    with pytest.raises(EventDefinitionError, match=r"LetterRefused\.anything: object could not"):
        attrs.frozen(slots=False)(LetterRefused)  # in place, so there is a class to look at
    with pytest.raises(TypeError, match="LetterRefused is not"):
        registered(LetterRefused)

    @attrs.frozen
    class Accepted(DomainEvent):
        event_type: ClassVar[str] = "LetterRefused"

    assert registered(Accepted).name == "LetterRefused"


async def test_a_class_without_attrs_is_refused_when_it_is_appended(store):
    class Undecorated(LetterSent):
        pass

    class Bare(DomainEvent):
        pass

    class NoEvent:
        pass

    for event, message in (
        (Undecorated("bob"), "Undecorated is not an attrs class. Decorate it with @attrs.frozen."),
        (Bare(), "Bare is not an attrs class. Decorate it with @attrs.frozen."),
        (NoEvent(), "NoEvent is not an event class. Write `class NoEvent(DomainEvent)`."),
    ):
        with pytest.raises(TypeError) as raised:
            await store.append_events("ann", "Person", [event], ANY)
        assert str(raised.value) == message
    assert await store.last_position() == 0


# -- classes that change ----------------------------------------------------------------------


async def test_a_module_that_is_reloaded_replaces_its_classes(store, tmp_path, monkeypatch):
    source = tmp_path / "reloaded_events.py"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    head = "import attrs\nfrom eventsource_anyio import DomainEvent\n@attrs.frozen\n"
    source.write_text(f"{head}class Reloaded(DomainEvent):\n    number: int\n")
    module = importlib.import_module("reloaded_events")
    monkeypatch.delitem(sys.modules, "reloaded_events", raising=False)
    monkeypatch.setitem(sys.modules, "reloaded_events", module)
    before = module.Reloaded(1)
    await append(store, before)

    source.write_text(f"{head}class Reloaded(DomainEvent):\n    number: int\n    note: str = '-'\n")
    importlib.reload(module)
    await append(store, module.Reloaded(2, "new"))
    first, second = [stored.event for stored in await store.get_events("ann")]
    assert type(first) is type(second) is module.Reloaded is not type(before)
    assert (first, second) == (module.Reloaded(1, "-"), module.Reloaded(2, "new"))


def moved_1() -> Any:
    """The event class `Moved` as it was at first."""

    @attrs.frozen
    class Moved(DomainEvent):
        __qualname__ = "Moved"

        address: str

    return Moved


def moved_2() -> Any:
    """The same class later: the address in two fields."""

    @attrs.frozen
    class Moved(DomainEvent):
        __qualname__ = "Moved"
        schema_version: ClassVar[int] = 2

        street: str
        town: str

    return Moved


def moved_3() -> Any:
    """The same class today: with the country."""

    @attrs.frozen
    class Moved(DomainEvent):
        __qualname__ = "Moved"
        schema_version: ClassVar[int] = 3

        street: str
        town: str
        country: str

    return Moved


def split_address(payload: dict[str, Any]) -> dict[str, Any]:
    street, town = payload.pop("address").split(", ")
    return payload | {"street": street, "town": town}


def add_country(payload: dict[str, Any]) -> dict[str, Any]:
    payload["country"] = "NL"
    return payload


async def test_old_versions_go_through_one_upcaster_after_another(store):
    await append(store, moved_1()("Kade 1, Delft"))
    await append(store, moved_2()("Markt 2", "Gouda"))
    moved = moved_3()
    await append(store, moved("Plein 3", "Gent", "BE"))
    assert upcaster(moved, from_version=1)(split_address) is split_address
    upcaster(moved, from_version=2)(add_country)
    stream = await store.get_events("ann")
    assert [stored.event for stored in stream] == [
        moved("Kade 1", "Delft", "NL"),
        moved("Markt 2", "Gouda", "NL"),
        moved("Plein 3", "Gent", "BE"),
    ]
    assert [stored.schema_version for stored in stream] == [1, 2, 3]
    assert stream.events == tuple([stored async for stored in store.read_all()])


async def test_upcasting_changes_nothing_that_is_stored(store):
    (stored,) = await append(store, moved_1()("Kade 1, Delft"))
    upcaster(moved_2(), from_version=1)(split_address)
    for _ in range(2):
        assert (await store.get_events("ann"))[0].event.town == "Delft"
    moved = moved_1()
    (again,) = await store.get_events("ann")
    assert again.event == moved("Kade 1, Delft")
    assert again.event_id == stored.event_id


async def test_a_missing_upcaster_is_named(store):
    await append(store, moved_1()("Kade 1, Delft"))
    upcaster(moved_3(), from_version=1)(split_address)
    error = await decode_error(store)
    assert str(error) == (
        "Moved in Person-ann, version 1, position 1, cannot be read: "
        "$: there is no upcaster of 'Moved' from schema version 2.\n"
        "  The event is still stored, unchanged, and the events around it can be read.\n"
        "  Write one: @upcaster(Moved, from_version=2)."
    )


async def test_an_upcaster_that_fails_is_named_with_its_error(store):
    await append(store, moved_1()("Delft"))
    upcaster(moved_2(), from_version=1)(split_address)
    error = await decode_error(store)
    assert "$: its upcaster from schema version 1 failed: ValueError(" in str(error)
    assert str(error).endswith("\n  Correct the upcaster.")
    assert isinstance(error.__cause__, ValueError)


async def test_an_upcaster_that_forgets_to_return_is_told_so(store):
    await append(store, moved_1()("Kade 1, Delft"))
    moved = moved_3()
    upcaster(moved, from_version=1)(lambda payload: None)  # type: ignore[arg-type,return-value]
    upcaster(moved, from_version=2)(add_country)
    error = await decode_error(store)
    assert "its upcaster from schema version 1 failed" in error.reason
    assert "it returned None, not the payload" in error.reason


async def test_what_the_upcasters_made_has_to_fit_the_class(store):
    await append(store, moved_1()("Kade 1, Delft"))
    upcaster(moved_2(), from_version=1)(lambda payload: {"street": "Kade 1", "town": 2613})
    error = await decode_error(store)
    assert (error.path, error.reason) == ("$.town", "Expected `str`, got `int`")


async def test_an_event_of_a_newer_program_is_not_guessed_at(store):
    await append(store, moved_3()("Plein 3", "Gent", "BE"))
    moved_2()
    assert str(await decode_error(store)) == (
        "Moved in Person-ann, version 1, position 1, cannot be read: "
        "$: it was stored at schema version 3, this program knows 2.\n"
        "  The event is still stored, unchanged, and the events around it can be read.\n"
        "  A newer program wrote it. Update this one."
    )


@pytest.mark.parametrize("from_version", [-1, 0, 3, 4])
def test_an_upcaster_that_would_never_be_called_is_refused(from_version):
    with pytest.raises(ValueError, match=r"Moved is at schema version 3, so .* never be called"):
        upcaster(moved_3(), from_version=from_version)


def test_an_upcaster_is_for_an_event_class():
    with pytest.raises(TypeError, match="str is not an event class"):
        upcaster(str, from_version=1)  # type: ignore[arg-type]


# -- events that cannot be read ---------------------------------------------------------------


async def test_the_error_tells_everything_about_the_event(store):
    @attrs.frozen
    class Weighed(DomainEvent):
        __qualname__ = "Weighed"
        grams: list[int]

    await append(store, LetterSent("bob"), Weighed([1, 2, 3]), LetterSent("eve"))

    @attrs.frozen
    class Weighed(DomainEvent):  # type: ignore[no-redef]
        __qualname__ = "Weighed"
        grams: list[str]

    error = await decode_error(store, 2)
    assert (error.event_type, error.stream_id) == ("Weighed", "Person-ann")
    assert (error.version, error.position) == (2, 2)
    assert (error.path, error.reason) == ("$.grams[0]", "Expected `str`, got `int`")
    assert error.payload == b'{"grams":[1,2,3]}'
    assert str(error) == (
        "Weighed in Person-ann, version 2, position 2, cannot be read: "
        "$.grams[0]: Expected `str`, got `int`.\n"
        "  The event is still stored, unchanged, and the events around it can be read.\n"
        "  Correct Weighed, or raise its schema_version and write an upcaster from the stored one."
    )


async def test_an_event_type_that_nobody_has_defined_is_named(tmp_path, sqlite_event_store):
    await append(sqlite_event_store, LetterSent("bob"), LetterSent("eve"))
    edit(tmp_path, "UPDATE events SET event_type = 'letter.lost' WHERE version = 1")
    assert str(await decode_error(sqlite_event_store)) == (
        "letter.lost in Person-ann, version 1, position 1, cannot be read: "
        "$: there is no event class of the name 'letter.lost'.\n"
        "  The event is still stored, unchanged, and the events around it can be read.\n"
        "  Import the module that defines the class, or pin its event_type to this name."
    )


def edit(folder: Path, statement: str) -> None:
    """Change the file of the SQLite store behind its back."""
    with closing(sqlite3.connect(folder / "events.db")) as connection, connection:
        connection.execute(statement)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        ("", "Input data was truncated"),
        ('{"to":"bo', "Input data was truncated"),
        ("not json", "JSON is malformed"),
        ("null", "Expected `object`, got `null`"),
        ("[]", "Expected `object`, got `array`"),
        ('{"pages":2}', "it is missing, and has no default"),
        ('{"to":null}', "Expected `str`, got `null`"),
    ],
    ids=["empty", "cut", "no-json", "null", "array", "missing", "wrong"],
)
async def test_a_broken_payload_costs_only_its_own_event(
    tmp_path, sqlite_event_store, payload, reason
):
    await append(sqlite_event_store, *(LetterSent(name) for name in ("ann", "bob", "eve")))
    edit(tmp_path, f"UPDATE events SET payload = '{payload}' WHERE version = 2")
    for reader in (sqlite_event_store.read_all(), sqlite_event_store.read_stream("Person-ann")):
        assert (await anext(reader)).event == LetterSent("ann")
        with pytest.raises(EventDecodeError) as raised:
            await anext(reader)
        assert reason in raised.value.reason
        assert raised.value.payload == payload.encode()
        assert (await anext(reader)).event == LetterSent("eve")
        with pytest.raises(StopAsyncIteration):
            await anext(reader)
    with pytest.raises(EventDecodeError):
        await sqlite_event_store.get_events("ann")


@pytest.mark.parametrize("column", ["payload", "metadata"])
@pytest.mark.parametrize(
    ("value", "stored"),
    [
        ("x'7b22746f223aff7d'", b'{"to":\xff}'),
        ("CAST(x'7b22746f223a22ff227d' AS TEXT)", b'{"to":"\xff"}'),
        ("'[1]'", b"[1]"),
    ],
    ids=["blob", "no-utf-8", "array"],
)
async def test_broken_bytes_cost_only_their_own_event(
    tmp_path, sqlite_event_store, column, value, stored
):
    await append(sqlite_event_store, *(LetterSent(name) for name in ("ann", "bob", "eve")))
    edit(tmp_path, f"UPDATE events SET {column} = {value} WHERE version = 2")
    reader = sqlite_event_store.read_all()
    assert (await anext(reader)).event == LetterSent("ann")
    with pytest.raises(EventDecodeError) as raised:
        await anext(reader)
    assert raised.value.path.startswith("metadata" if column == "metadata" else "$")
    if column == "payload":
        assert raised.value.payload == stored
    assert (await anext(reader)).event == LetterSent("eve")


@pytest.mark.parametrize(
    "payload", ["", "[1]", '{"address":' + "[" * 100_000], ids=["empty", "array", "deep"]
)
async def test_an_old_payload_that_is_broken_never_reaches_an_upcaster(
    tmp_path, sqlite_event_store, payload
):
    await append(sqlite_event_store, moved_1()("Kade 1, Delft"))
    edit(tmp_path, f"UPDATE events SET payload = '{payload}'")
    upcaster(moved_2(), from_version=1)(lambda payload: pytest.fail("called"))
    assert (await decode_error(sqlite_event_store)).payload == payload.encode()


async def test_fields_of_a_newer_program_are_left_out(tmp_path, sqlite_event_store):
    await append(sqlite_event_store, LetterSent("bob"))
    edit(tmp_path, """UPDATE events SET payload = '{"to":"bob","pages":2,"stamp":"blue"}'""")
    (stored,) = await sqlite_event_store.get_events("ann")
    assert stored.event == LetterSent("bob", 2)


# -- what is appended, and what comes back ----------------------------------------------------


def test_a_new_event_is_an_event_with_an_id_that_is_made_once():
    new = NewEvent(LetterSent("bob"))
    assert new.event == LetterSent("bob")
    assert (new.event_id.version, new.event_id) == (7, new.event_id)
    assert (new.metadata, new.occurred_at) == ({}, None)
    assert NewEvent(LetterSent("bob")).event_id != new.event_id


def test_a_new_event_refuses_what_could_not_be_stored():
    class NoEvent:
        pass

    for not_an_event in (NoEvent(), LetterSent, None, {"to": "bob"}):
        with pytest.raises(TypeError, match="DomainEvent"):
            NewEvent(not_an_event)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="UUID"):
        NewEvent(LetterSent("bob"), event_id=str(uuid4()))  # type: ignore[arg-type]
    for not_a_moment in (datetime(2026, 1, 2), "2026-01-02T00:00:00Z", 7):  # noqa: DTZ001
        with pytest.raises(ValueError, match="occurred_at must be a datetime with a time zone"):
            NewEvent(LetterSent("bob"), occurred_at=not_a_moment)  # type: ignore[arg-type]
    west = timezone(timedelta(hours=-1))
    with pytest.raises(ValueError, match=r"occurred_at .* is outside of the years 1 to 9999"):
        NewEvent(LetterSent("bob"), occurred_at=datetime.max.replace(tzinfo=west))


async def test_new_and_stored_events_cannot_be_changed(event_store):
    new = NewEvent(LetterSent("bob"))
    (stored,) = await append(event_store, new)
    for event, name in ((new, "event_id"), (stored, "version"), (stored, "metadata")):
        with pytest.raises(AttributeError):
            setattr(event, name, None)


def let_the_clock_tick() -> None:
    now = uuid7().int >> 64
    while uuid7().int >> 64 == now:
        pass


async def test_event_ids_sort_by_the_time_of_the_append(store):
    for name in ("ann", "bob", "eve"):
        await append(store, LetterSent(name))
        let_the_clock_tick()
    ids = [stored.event_id for stored in await store.get_events("ann")]
    assert {event_id.version for event_id in ids} == {7}
    assert sorted(ids) == ids


async def test_moments_come_back_in_utc(store):
    moment = datetime(2020, 2, 29, 23, 30, tzinfo=timezone(timedelta(hours=-8)))
    (appended,) = await append(store, NewEvent(LetterSent("bob"), occurred_at=moment))
    (stored,) = await store.get_events("ann")
    assert appended == stored
    assert stored.occurred_at == moment
    assert (stored.occurred_at.tzinfo, stored.recorded_at.tzinfo) == (UTC, UTC)


async def test_stored_events_can_be_pickled_copied_and_compared(store):
    with event_metadata(user="ann"):
        await append(store, LetterSent("bob"))
    await append(store, LetterSent("eve"))
    events = list(await store.get_events("ann"))
    assert pickle.loads(pickle.dumps(events)) == events
    assert copy.deepcopy(events) == events
    assert [json.dumps(stored.metadata) for stored in events] == ['{"user": "ann"}', "{}"]
    assert events[0] != events[1]


# -- metadata ---------------------------------------------------------------------------------


async def test_inner_blocks_add_to_outer_ones_and_end_with_them(store):
    with event_metadata(user="ann", host="h"):
        with event_metadata(user="bob", step=1):
            await append(store, LetterSent("1"))
        await append(store, LetterSent("2"))
        with pytest.raises(KeyError), event_metadata(user="eve"):
            raise KeyError("left by an exception")
        await append(store, LetterSent("3"))
    await append(store, LetterSent("4"))
    assert [stored.metadata for stored in await store.get_events("ann")] == [
        {"user": "bob", "host": "h", "step": 1},
        {"user": "ann", "host": "h"},
        {"user": "ann", "host": "h"},
        {},
    ]


async def test_tasks_started_inside_inherit_it_and_others_have_none_of_it(store):
    inside, over = anyio.Event(), anyio.Event()

    async def append_after(event: anyio.Event, name: str) -> None:
        await event.wait()
        await store.append_events(name, "Person", [LetterSent(name)], ANY)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(append_after, inside, "started before")
        with event_metadata(user="ann"):
            inside.set()
            await append_after(inside, "the task itself")
            tasks.start_soon(append_after, over, "started inside")
        tasks.start_soon(append_after, over, "started after")
        over.set()
    assert {stored.aggregate_id: stored.metadata async for stored in store.read_all()} == {
        "started before": {},
        "the task itself": {"user": "ann"},
        "started inside": {"user": "ann"},
        "started after": {},
    }


async def test_correlation_and_causation_ids_may_be_uuids_or_text(store):
    correlation_id, causation_id = uuid4(), uuid4()
    with event_metadata(correlation_id=correlation_id, causation_id=str(causation_id)):
        await append(store, LetterSent("bob"))
    await append(store, NewEvent(LetterSent("bob"), metadata={"correlation_id": correlation_id}))
    first, second = await store.get_events("ann")
    assert first.correlation_id == second.correlation_id == str(correlation_id)
    assert (first.causation_id, second.causation_id) == (str(causation_id), None)


async def test_caused_by_links_a_chain_and_keeps_other_metadata(store):
    with event_metadata(user="ann", correlation_id="case 7"):
        (first,) = await append(store, LetterSent("1"))
        with caused_by(first):
            (second,) = await append(store, LetterSent("2"))
        (sibling,) = await append(store, LetterSent("3"))
    with caused_by(second):
        (third,) = await append(store, LetterSent("4"))
    assert [stored.correlation_id for stored in (first, second, sibling, third)] == ["case 7"] * 4
    assert [stored.causation_id for stored in (first, second, sibling, third)] == [
        None,
        str(first.event_id),
        None,
        str(second.event_id),
    ]
    assert (second.metadata["user"], third.metadata.get("user")) == ("ann", None)


async def test_metadata_that_is_not_json_is_refused_before_anything_is_stored(store):
    for value in (object(), (1, 2), {1: "one"}, float("nan"), "\ud800", uuid4(), datetime.now(UTC)):
        with pytest.raises(ValueError, match="metadata"), event_metadata(value=value):
            await append(store, LetterSent("bob"))
    assert await store.last_position() == 0
    with event_metadata(numbers=[2**70, -1.5, True, None], nested={"a": {"b": []}}):
        (stored,) = await append(store, LetterSent("bob"))
    assert stored.metadata == {"numbers": [2**70, -1.5, True, None], "nested": {"a": {"b": []}}}
    assert (await store.get_events("ann"))[0] == stored


# -- ids --------------------------------------------------------------------------------------


def test_uuid7_is_a_uuid_of_its_version_and_tells_the_time():
    before = time.time_ns() // 1_000_000
    made = uuid7()
    after = time.time_ns() // 1_000_000
    assert (made.version, made.variant) == (7, RFC_4122)
    assert before <= made.int >> 80 <= after


def test_uuid7_never_repeats_and_follows_the_clock():
    made = [uuid7() for _ in range(20_000)]
    assert len(set(made)) == len(made)
    assert {(one.version, one.variant) for one in made} == {(7, RFC_4122)}
    moments = [one.int >> 64 for one in made]
    assert sorted(moments) == moments
    let_the_clock_tick()
    assert uuid7() > max(made)
    assert all(type(one) is UUID for one in made)


@pytest.mark.parametrize("text", ["a", "case 7/ü", "x" * 255, "1-2-3", UUID(int=3**80).hex, "😀"])
def test_an_aggregate_id_of_text_stays_as_it_is(text):
    assert normalize_aggregate_id(text) == text


def test_a_uuid_and_its_canonical_text_are_one_aggregate_id():
    uuid = uuid4()
    assert normalize_aggregate_id(uuid) is uuid
    assert normalize_aggregate_id(str(uuid)) == uuid
    for other in (str(uuid).upper() + "X", f"{{{uuid}}}", uuid.urn, "x" * 8 + "-" + "x" * 27):
        assert normalize_aggregate_id(other) == other
    if (upper := str(uuid).upper()) != str(uuid):
        assert normalize_aggregate_id(upper) == upper


@pytest.mark.parametrize("bad", ["", "x" * 256, "a\0", "\udfff"], ids=ascii)
def test_an_aggregate_id_and_a_type_are_text_that_any_database_stores(bad):
    with pytest.raises(ValueError, match="aggregate_id"):
        normalize_aggregate_id(bad)
    with pytest.raises(ValueError, match="aggregate_type"):
        check_aggregate_type(bad)


@pytest.mark.parametrize("bad", [7, None, b"a", 1.5], ids=repr)
def test_an_aggregate_id_and_a_type_are_text(bad):
    with pytest.raises(TypeError, match=r"aggregate_id must be a UUID or a string.*Convert it"):
        normalize_aggregate_id(bad)
    with pytest.raises(TypeError, match="aggregate_type must be a string"):
        check_aggregate_type(bad)
    with pytest.raises(TypeError, match="stream_id must be a string"):
        parse_stream_id(bad)


def test_an_aggregate_type_holds_no_dash():
    assert check_aggregate_type("bank.Account_2") == "bank.Account_2"
    with pytest.raises(ValueError, match="'bank-account' holds a '-'"):
        check_aggregate_type("bank-account")


@pytest.mark.parametrize("kind", [StrEnum, "str, Enum"], ids=["StrEnum", "str-Enum"])
async def test_members_of_an_enum_name_the_stream_of_their_text(store, kind):
    if kind is StrEnum:

        class Kind(StrEnum):
            PERSON = "Person"
            ANN = "ann"
    else:

        class Kind(str, Enum):  # type: ignore[no-redef]  # noqa: UP042  (many a program has one)
            PERSON = "Person"
            ANN = "ann"

    new = NewEvent(LetterSent("bob"))
    result = await store.append_events(Kind.ANN, Kind.PERSON, [new], NO_STREAM)
    assert result.events[0].stream_id == "Person-ann"
    assert await store.append_events("ann", "Person", [new], NO_STREAM) == result
    assert await store.append_events(Kind.ANN, Kind.PERSON, [new], NO_STREAM) == result


@pytest.mark.parametrize(
    ("aggregate_type", "aggregate_id"),
    [
        ("Account", "a"),
        ("Account", "-"),
        ("Account", "a-b-c"),
        ("Account", uuid4()),
        ("T" * 255, "x" * 255),
    ],
    ids=["plain", "dash", "dashes", "uuid", "long"],
)
def test_a_stream_id_is_taken_apart_as_it_was_put_together(aggregate_type, aggregate_id):
    stream_id = stream_id_of(aggregate_type, aggregate_id)
    assert parse_stream_id(stream_id) == (aggregate_type, aggregate_id)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_a_slice_is_the_last_ten_bits_of_the_first_32_of_the_md5(stream_id):
    first_32 = int(md5(stream_id.encode(), usedforsecurity=False).hexdigest()[:8], 16)
    assert slice_of(stream_id) == first_32 & 1023


def test_streams_are_divided_evenly():
    counts = Counter(slice_of(f"Account-{number}") for number in range(64 * SLICES))
    assert counts.keys() == set(range(SLICES))
    assert 25 < min(counts.values()) < max(counts.values()) < 110


async def test_a_stream_with_the_longest_ids_can_be_read(store):
    result = await store.append_events("x" * 255, "T" * 255, [LetterSent("bob")], NO_STREAM)
    stream_id = result.events[0].stream_id
    assert [stored async for stored in store.read_stream(stream_id)] == list(result.events)


@pytest.mark.parametrize("bad", ["", "Account", "-", "-a", "Account-", "A" * 256 + "-a", "a-\0"])
def test_what_is_no_stream_id_is_refused(bad):
    with pytest.raises(ValueError, match=r"not a stream id|aggregate_type|aggregate_id"):
        parse_stream_id(bad)


@pytest.mark.parametrize("constant", [ANY, NO_STREAM, STREAM_EXISTS], ids=str)
def test_an_expected_version_stays_itself(constant):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(constant, protocol)) is constant
    assert copy.copy(constant) is constant
    assert copy.deepcopy([constant])[0] is constant


def test_an_expected_version_reads_as_it_is_written():
    assert [repr(one) for one in (ANY, NO_STREAM, STREAM_EXISTS)] == [
        "ANY",
        "NO_STREAM",
        "STREAM_EXISTS",
    ]
    assert f"{ANY} {NO_STREAM!s} {STREAM_EXISTS!r}" == "ANY NO_STREAM STREAM_EXISTS"
    assert len({ANY, NO_STREAM, STREAM_EXISTS}) == 3
