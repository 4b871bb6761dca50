"""Every error of this library, each saying what happened, why, and what to do next.

All of them derive from `EventSourceError` and are raised as they are: no error of this library
reaches a caller inside an `ExceptionGroup`. Wrong arguments (an unknown expected version, a
negative limit) are plain `ValueError` and `TypeError`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from uuid import UUID


class EventSourceError(Exception):
    """The base of every error that this library raises for what happened to events."""

    def __reduce__(self) -> tuple[object, ...]:
        # Pickled as its message and attributes: the constructors take something else.
        return _remade, (type(self), self.args), vars(self)


def _remade(error: type[EventSourceError], args: tuple[object, ...]) -> EventSourceError:
    return error.__new__(error, *args)


class EventDefinitionError(EventSourceError, TypeError):
    """An event class cannot be stored and read back the same; raised where the class is defined."""


class EventEncodeError(EventSourceError, ValueError):
    """A value of an event would not come back the same, so nothing of the append was stored.

    `path` names the place in the event, such as `$.lines[2].price`.
    """

    def __init__(self, event_type: str, path: str, reason: str) -> None:
        super().__init__(
            f"{event_type} cannot be stored: {path}: {reason}.\n"
            "  Nothing of this append was stored.\n"
            "  Give the field a value of its annotated type, or correct the annotation."
        )
        self.event_type = event_type
        self.path = path
        self.reason = reason


class EventDecodeError(EventSourceError, ValueError):
    """One stored event cannot be turned into an object; the events around it are not affected.

    An iterator that raised it goes on with the next event when it is asked again. `payload` is what
    the store holds, byte for byte; `path` is `$` where the whole event is meant.
    """

    def __init__(
        self,
        *,
        event_type: str,
        stream_id: str,
        version: int,
        position: int,
        path: str,
        reason: str,
        remedy: str,
        payload: bytes,
    ) -> None:
        super().__init__(
            f"{event_type} in {stream_id}, version {version}, position {position}, "
            f"cannot be read: {path}: {reason}.\n"
            "  The event is still stored, unchanged, and the events around it can be read.\n"
            f"  {remedy}"
        )
        self.event_type = event_type
        self.stream_id = stream_id
        self.version = version
        self.position = position
        self.path = path
        self.reason = reason
        self.payload = payload


class ConcurrencyError(EventSourceError):
    """The stream is not at the expected version, so nothing of this append was stored.

    `expected` is a version or one of `NO_STREAM` and `STREAM_EXISTS`; `actual` is the version the
    stream is at, 0 if it does not exist.
    """

    def __init__(
        self, stream_id: str, expected: object, actual: int, meanwhile: Sequence[str] = ()
    ) -> None:
        found = f"is at version {actual}" if actual else "does not exist"
        if isinstance(expected, int) and expected > actual:
            why = "The expected version was never reached; it may be that of another stream."
        elif meanwhile:
            total = len(meanwhile)
            types = ", ".join(
                name if count == 1 else f"{count} {name}"
                for name, count in Counter(meanwhile).items()
            )
            why = f"Another writer appended {total} event{'s'[: total != 1]} ({types}) meanwhile."
        elif actual:
            why = "Another writer appended to it meanwhile."
        else:
            why = "No event has been appended to it yet."
        super().__init__(
            f"{stream_id} {found}, expected {expected}.\n"
            f"  {why}\n"
            "  Load the aggregate again and decide anew; AggregateRepository.execute() does both."
        )
        self.stream_id = stream_id
        self.expected = expected
        self.actual = actual


class CheckpointConflictError(EventSourceError):
    """The checkpoint is not where it was expected, so nothing of this call was stored.

    `expected` and `actual` are positions; 0 means that it was never saved.
    """

    def __init__(self, name: str, expected: int, actual: int) -> None:
        why = (
            "Another reader of this name saved it meanwhile"
            if actual
            else "It was never saved, or it was set back"
        )
        super().__init__(
            f"Checkpoint {name!r} is at {actual}, expected {expected}.\n"
            f"  {why}; nothing of this call was stored.\n"
            "  Get it again and go on from there; without `expected` it is set wherever it is."
        )
        self.name = name
        self.expected = expected
        self.actual = actual


class DocumentConflictError(EventSourceError):
    """The document is not at the expected revision, so nothing of this call was stored.

    `expected` and `actual` are revisions; None means that there is, or was to be, no document.
    """

    def __init__(
        self, collection: str, key: str, expected: UUID | None, actual: UUID | None
    ) -> None:
        found = f"is at revision {actual}" if actual else "does not exist"
        wanted = f"revision {expected}" if expected else "none"
        why = "Somebody else saved it meanwhile" if actual else "It was deleted, or never added"
        super().__init__(
            f"Document {key!r} of {collection!r} {found}, expected {wanted}.\n"
            f"  {why}; nothing of this call was stored.\n"
            "  Get it again and decide anew; `save` without `expected` stores it in any case."
        )
        self.collection = collection
        self.key = key
        self.expected = expected
        self.actual = actual


class DuplicateEventError(EventSourceError):
    """An event id is in the store already, with another stream or payload; nothing was stored."""

    def __init__(self, event_id: UUID, stream_id: str, reason: str) -> None:
        super().__init__(
            f"Event {event_id} is already stored and cannot be appended to {stream_id}: {reason}.\n"
            "  An event id stands for one event; only the very same append may be repeated.\n"
            "  Give a new event a new id: leave event_id out, and NewEvent makes one."
        )
        self.event_id = event_id
        self.stream_id = stream_id
        self.reason = reason


class AggregateNotFoundError(EventSourceError, LookupError):
    """There is no event of this aggregate, or none as far back as was asked for."""

    def __init__(self, stream_id: str, as_of: str = "") -> None:
        super().__init__(
            f"{stream_id} does not exist{as_of}.\n"
            "  No event of it has been stored (or it has another aggregate type).\n"
            "  Check the id. A new aggregate is made by its class, or by "
            "AggregateRepository.execute()."
        )
        self.stream_id = stream_id


class StoreClosedError(EventSourceError):
    """The store is used before `async with` has opened it, or after it was closed."""

    def __init__(self, store: str) -> None:
        super().__init__(
            f"{store} is not open.\n"
            "  Its constructor does no I/O; a store is open inside its `async with` block only.\n"
            f"  Write `async with {store}(...) as store:` around everything that uses it."
        )


class StorageError(EventSourceError):
    """The database under a store failed, and what that means for the call.

    Nothing of it was stored, unless the message says that this is not known, because the answer was
    lost. In either case the same call, with the same event ids, can be made again.
    """


class ProjectionStoppedError(EventSourceError):
    """What is waited for will not come: the projection has failed, which is the cause, or nobody
    runs it here."""

    def __init__(self, name: str, version: int) -> None:
        super().__init__(
            f"Projection {name!r}, version {version}, is not running.\n"
            "  An event failed for the last time (see the cause), or the coordinator is not "
            "running.\n"
            "  Mend the handler and call coordinator.resume(), or await "
            "tasks.start(coordinator.run)."
        )
        self.name = name
        self.version = version


class PublishError(EventSourceError):
    """Handlers have failed. All the others have had the events.

    `errors` are what they raised, each with a note that names the handler and the event. The first
    one is the cause.
    """

    def __init__(self, errors: Sequence[Exception]) -> None:
        told = [", ".join((repr(error), *getattr(error, "__notes__", ()))) for error in errors[:10]]
        if len(errors) > len(told):
            told.append(f"and {len(errors) - len(told)} more")
        what = "A handler has failed" if len(errors) == 1 else "Handlers have failed"
        lines = "\n".join(f"  {line}." for line in told)
        super().__init__(
            f"{what} that the events were published to.\n"
            f"{lines}\n"
            "  The events are stored, and everybody else has had them. Mend the handler; published "
            "again, they reach who has failed only.\n"
            "  A bus that is given on_failure=… tells that in place of the publisher."
        )
        self.errors = tuple(errors)


class FellBehindError(EventSourceError):
    """A receiver of a bus was too slow, and events that it was to have are gone.

    In the store they are after the position `after`, up to `until`.
    """

    def __init__(self, after: int, until: int) -> None:
        super().__init__(
            f"This receiver has missed events between the positions {after + 1} and {until}.\n"
            "  It was too slow: a bus keeps a bounded number of events, and waits for nobody.\n"
            f"  Read them by store.subscribe(after={after}) until its position is {until}, or "
            "subscribe with catch_up=store, which does so. Then go on receiving."
        )
        self.after = after
        self.until = until
