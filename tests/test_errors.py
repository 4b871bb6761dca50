"""Errors: what they say, what they hold, and that both survive a way through another process."""

from __future__ import annotations

import copy
import pickle
import re
import shutil
from uuid import UUID

import attrs
import pytest

from eventsource_anyio import (
    NO_STREAM,
    STREAM_EXISTS,
    AggregateNotFoundError,
    CheckpointConflictError,
    ConcurrencyError,
    DomainEvent,
    DuplicateEventError,
    EventDecodeError,
    EventDefinitionError,
    EventEncodeError,
    EventSourceError,
    SQLiteEventStore,
    StorageError,
    StoreClosedError,
    errors,
)
from eventsource_anyio.errors import (
    DocumentConflictError,
    FellBehindError,
    ProjectionStoppedError,
    PublishError,
)

EVENT_ID = UUID("01998f20-0000-7000-8000-000000000007")
REVISION = UUID("01998f20-0000-7000-8000-000000000008")


class RefusedError(Exception):
    """Of a handler; its copies are equal."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RefusedError) and self.args == other.args

    def __hash__(self) -> int:
        return hash(self.args)


def told(
    error: EventSourceError, what: str, why: str, remedy: str, **attributes: object
) -> tuple[EventSourceError, str, dict[str, object]]:
    """An error, its whole message in its three parts, and all that it holds besides."""
    return error, f"{what}\n  {why}\n  {remedy}", attributes


ANEW = "Load the aggregate again and decide anew; AggregateRepository.execute() does both."

ERRORS = [
    told(
        EventEncodeError("Sold", "$.lines[2].price", "nan came back as None"),
        "Sold cannot be stored: $.lines[2].price: nan came back as None.",
        "Nothing of this append was stored.",
        "Give the field a value of its annotated type, or correct the annotation.",
        event_type="Sold",
        path="$.lines[2].price",
        reason="nan came back as None",
    ),
    told(
        EventDecodeError(
            event_type="Sold",
            stream_id="Shop-7",
            version=3,
            position=12,
            path="$.price",
            reason="Expected `int`, got `str`",
            remedy="Correct Sold.",
            payload=b'{"price":"1"}\xff',
        ),
        "Sold in Shop-7, version 3, position 12, cannot be read: "
        "$.price: Expected `int`, got `str`.",
        "The event is still stored, unchanged, and the events around it can be read.",
        "Correct Sold.",
        event_type="Sold",
        stream_id="Shop-7",
        version=3,
        position=12,
        path="$.price",
        reason="Expected `int`, got `str`",
        payload=b'{"price":"1"}\xff',
    ),
    told(
        ConcurrencyError("Shop-7", 2, 5, ["Sold", "Closed", "Sold"]),
        "Shop-7 is at version 5, expected 2.",
        "Another writer appended 3 events (2 Sold, Closed) meanwhile.",
        ANEW,
        stream_id="Shop-7",
        expected=2,
        actual=5,
    ),
    told(
        ConcurrencyError("Shop-7", NO_STREAM, 1, ["Sold"]),
        "Shop-7 is at version 1, expected NO_STREAM.",
        "Another writer appended 1 event (Sold) meanwhile.",
        ANEW,
        stream_id="Shop-7",
        expected=NO_STREAM,
        actual=1,
    ),
    told(
        ConcurrencyError("Shop-7", 2, 500),  # too many to be told one by one
        "Shop-7 is at version 500, expected 2.",
        "Another writer appended to it meanwhile.",
        ANEW,
        stream_id="Shop-7",
        expected=2,
        actual=500,
    ),
    told(
        ConcurrencyError("Shop-7", 9, 5),
        "Shop-7 is at version 5, expected 9.",
        "The expected version was never reached; it may be that of another stream.",
        ANEW,
        stream_id="Shop-7",
        expected=9,
        actual=5,
    ),
    told(
        ConcurrencyError("Shop-7", STREAM_EXISTS, 0),
        "Shop-7 does not exist, expected STREAM_EXISTS.",
        "No event has been appended to it yet.",
        ANEW,
        stream_id="Shop-7",
        expected=STREAM_EXISTS,
        actual=0,
    ),
    told(
        CheckpointConflictError("balances", 5, 9),
        "Checkpoint 'balances' is at 9, expected 5.",
        "Another reader of this name saved it meanwhile; nothing of this call was stored.",
        "Get it again and go on from there; without `expected` it is set wherever it is.",
        name="balances",
        expected=5,
        actual=9,
    ),
    told(
        CheckpointConflictError("balances", 5, 0),
        "Checkpoint 'balances' is at 0, expected 5.",
        "It was never saved, or it was set back; nothing of this call was stored.",
        "Get it again and go on from there; without `expected` it is set wherever it is.",
        name="balances",
        expected=5,
        actual=0,
    ),
    told(
        DocumentConflictError("leases", "balances", EVENT_ID, REVISION),
        f"Document 'balances' of 'leases' is at revision {REVISION}, expected revision {EVENT_ID}.",
        "Somebody else saved it meanwhile; nothing of this call was stored.",
        "Get it again and decide anew; `save` without `expected` stores it in any case.",
        collection="leases",
        key="balances",
        expected=EVENT_ID,
        actual=REVISION,
    ),
    told(
        DocumentConflictError("leases", "balances", None, REVISION),
        f"Document 'balances' of 'leases' is at revision {REVISION}, expected none.",
        "Somebody else saved it meanwhile; nothing of this call was stored.",
        "Get it again and decide anew; `save` without `expected` stores it in any case.",
        collection="leases",
        key="balances",
        expected=None,
        actual=REVISION,
    ),
    told(
        DocumentConflictError("leases", "balances", REVISION, None),
        f"Document 'balances' of 'leases' does not exist, expected revision {REVISION}.",
        "It was deleted, or never added; nothing of this call was stored.",
        "Get it again and decide anew; `save` without `expected` stores it in any case.",
        collection="leases",
        key="balances",
        expected=REVISION,
        actual=None,
    ),
    told(
        ProjectionStoppedError("sales", 2),
        "Projection 'sales', version 2, is not running.",
        "An event failed for the last time (see the cause), or the coordinator is not running.",
        "Mend the handler and call coordinator.resume(), or await tasks.start(coordinator.run).",
        name="sales",
        version=2,
    ),
    told(
        PublishError([RefusedError(1), RefusedError(2)]),
        "Handlers have failed that the events were published to.",
        "RefusedError(1).\n  RefusedError(2).",
        "The events are stored, and everybody else has had them. Mend the handler; published "
        "again, they reach who has failed only.\n"
        "  A bus that is given on_failure=… tells that in place of the publisher.",
        errors=(RefusedError(1), RefusedError(2)),
    ),
    told(
        FellBehindError(3, 9),
        "This receiver has missed events between the positions 4 and 9.",
        "It was too slow: a bus keeps a bounded number of events, and waits for nobody.",
        "Read them by store.subscribe(after=3) until its position is 9, or subscribe with "
        "catch_up=store, which does so. Then go on receiving.",
        after=3,
        until=9,
    ),
    told(
        DuplicateEventError(EVENT_ID, "Shop-7", "it belongs to Shop-8, version 1"),
        f"Event {EVENT_ID} is already stored and cannot be appended to Shop-7: "
        "it belongs to Shop-8, version 1.",
        "An event id stands for one event; only the very same append may be repeated.",
        "Give a new event a new id: leave event_id out, and NewEvent makes one.",
        event_id=EVENT_ID,
        stream_id="Shop-7",
        reason="it belongs to Shop-8, version 1",
    ),
    told(
        AggregateNotFoundError("Shop-7", " at version 9"),
        "Shop-7 does not exist at version 9.",
        "No event of it has been stored (or it has another aggregate type).",
        "Check the id. A new aggregate is made by its class, or by AggregateRepository.execute().",
        stream_id="Shop-7",
    ),
    told(
        StoreClosedError("SQLiteEventStore"),
        "SQLiteEventStore is not open.",
        "Its constructor does no I/O; a store is open inside its `async with` block only.",
        "Write `async with SQLiteEventStore(...) as store:` around everything that uses it.",
    ),
    # These two are given their message by who raises them.
    told(StorageError("It.\n  Why.\n  Do."), "It.", "Why.", "Do."),
    told(EventDefinitionError("It.\n  Why.\n  Do."), "It.", "Why.", "Do."),
]

every_error = pytest.mark.parametrize(
    ("error", "message", "attributes"),
    ERRORS,
    ids=[f"{type(error).__name__}-{number}" for number, (error, _, _) in enumerate(ERRORS)],
)


def in_house_form(message: str) -> bool:
    """What happened, and below it, indented: why, and what to do; each a sentence."""
    return re.fullmatch(r"\S.+\.(\n  \S.+\.){2,}", message) is not None


def test_every_error_class_is_looked_at_here():
    every = {
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, EventSourceError)
    }
    assert {type(error) for error, _, _ in ERRORS} == every - {EventSourceError}


@every_error
def test_what_it_says_and_what_it_holds(error, message, attributes):
    assert str(error) == message
    assert {name: getattr(error, name) for name in attributes} == attributes
    assert vars(error) == attributes
    assert in_house_form(message)


@every_error
def test_it_can_be_pickled_and_copied(error, message, attributes):
    copies = [pickle.loads(pickle.dumps(error, n)) for n in range(pickle.HIGHEST_PROTOCOL + 1)]
    for one in (*copies, copy.copy(error), copy.deepcopy(error)):
        assert type(one) is type(error)
        assert (str(one), one.args) == (message, (message,))
        assert vars(one) == attributes
        assert one is not error


def test_notes_are_pickled_too():
    error = ConcurrencyError("Shop-7", 2, 5)
    error.add_note("of publishing")
    assert pickle.loads(pickle.dumps(error)).__notes__ == ["of publishing"]
    assert error.__notes__ == ["of publishing"]


class ShopClosedError(AggregateNotFoundError):
    """An error of a user's own, derived from one of ours."""

    def __init__(self, shop: int, *, until: str) -> None:
        super().__init__(f"Shop-{shop}")
        self.until = until


def test_an_error_derived_from_one_of_these_can_be_pickled():
    error = pickle.loads(pickle.dumps(ShopClosedError(7, until="Monday")))
    assert type(error) is ShopClosedError
    assert str(error).startswith("Shop-7 does not exist.\n")
    assert (error.stream_id, error.until) == ("Shop-7", "Monday")


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (EventDefinitionError, TypeError),
        (EventEncodeError, ValueError),
        (EventDecodeError, ValueError),
        (AggregateNotFoundError, LookupError),
    ],
)
def test_it_is_what_python_would_call_it_too(error, builtin):
    assert issubclass(error, builtin)
    assert issubclass(error, EventSourceError)


def test_a_class_that_is_refused_says_why_and_what_to_do():
    messages: list[str] = []
    for annotation in ("object", "list", "Missing"):

        class Unstorable(DomainEvent):
            __annotations__ = {"value": annotation}

        with pytest.raises(EventDefinitionError, match=r"Unstorable\.value") as raised:
            attrs.frozen(Unstorable)
        messages.append(str(raised.value))
    for name, value in (("event_type", ""), ("schema_version", 0)):
        with pytest.raises(EventDefinitionError, match=rf"Named\.{name} cannot be") as raised:
            attrs.frozen(type("Named", (DomainEvent,), {name: value}))
        messages.append(str(raised.value))
    assert [message for message in messages if not in_house_form(message)] == []


async def test_a_database_that_fails_says_why_and_what_to_do(tmp_path):
    shutil.copy(__file__, tmp_path / "text")
    for path in (tmp_path, tmp_path / "missing" / "events.db", tmp_path / "text"):
        with pytest.raises(StorageError) as raised:
            async with SQLiteEventStore(path):
                pytest.fail("it was opened")
        assert str(raised.value).startswith(f"{path} cannot be opened as an event store.\n  ")
        assert len(str(raised.value).splitlines()) == 3
