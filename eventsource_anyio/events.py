"""Events: the classes a user writes, what is appended, what comes back, and the type registry.

Invariants:
- A class in the registry has a compiled codec: whatever can be appended can be read back equal.
- A wire name belongs to one class. Defining the same class again (a reload, a notebook cell)
  replaces it; another class under the same name is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, ClassVar, Generic, TypeAlias, TypeVar, cast
from uuid import UUID

import attrs
from msgspec import DecodeError, Struct
from msgspec.json import Decoder

from .codec import Codec, PayloadError
from .errors import EventDefinitionError
from .ids import AggregateId, slice_of, stream_id_of, uuid7
from .metadata import Metadata, event_metadata

Payload: TypeAlias = dict[str, object]
Upcast: TypeAlias = Callable[[Payload], Payload]


class DomainEvent:
    """The base of every event class; an attrs class under it is registered when it is defined.

    `event_type` is the name an event is stored under, the class's own name unless it is pinned in
    the class body (`event_type: ClassVar[str] = "account.opened"`), so that a class can be renamed.
    `schema_version` is stored with every event; raise it when the fields change, and give an
    `upcaster` from each older version.

    Raises `EventDefinitionError` at the class definition if a field could not come back the same,
    or if the name belongs to another class.
    """

    __slots__ = ()

    event_type: ClassVar[str]
    schema_version: ClassVar[int]

    @classmethod
    def __attrs_init_subclass__(cls) -> None:
        _register(cls)


TEvent = TypeVar("TEvent", bound=DomainEvent)
if TYPE_CHECKING:
    from typing_extensions import TypeVar as TypeVarWithDefault

    # So that a plain `StoredEvent` means one of any event.
    E_co = TypeVarWithDefault("E_co", bound=DomainEvent, covariant=True, default=DomainEvent)
else:
    E_co = TypeVar("E_co", bound=DomainEvent, covariant=True)


class EventType(Struct, frozen=True):
    """What the registry knows of an event class."""

    name: str
    event_class: type[DomainEvent]
    schema_version: int
    codec: Codec[DomainEvent]
    upcasters: dict[int, Upcast]


_by_name: dict[str, EventType] = {}
_by_class: dict[type, EventType] = {}
_decode_object = Decoder(Payload).decode


def _register(cls: type[DomainEvent]) -> None:
    where = f"{cls.__module__}.{cls.__qualname__}"
    for reserved in ("event_type", "schema_version"):
        if reserved in attrs.fields_dict(cast("type[attrs.AttrsInstance]", cls)):
            raise EventDefinitionError(
                f"{where}.{reserved} is a field, but the name is taken.\n"
                f"  {reserved} of an event class describes the class.\n"
                f"  Annotate it as ClassVar, or give the field another name."
            )
    name = cls.__dict__.get("event_type", cls.__name__)
    version = cls.__dict__.get("schema_version", 1)
    if not isinstance(name, str) or not name or not name.isprintable():
        raise EventDefinitionError(
            f"{where}.event_type cannot be {name!r}.\n"
            "  Events are stored under it, so it is a string of printable characters.\n"
            "  Give it one, or leave it out: the name of the class is the default."
        )
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise EventDefinitionError(
            f"{where}.schema_version cannot be {version!r}.\n"
            "  It is a whole number that counts from 1, stored with every event.\n"
            "  Give it one, or leave it out: 1 is the default."
        )
    other = _by_name.get(name)
    if other is not None:
        holder = f"{other.event_class.__module__}.{other.event_class.__qualname__}"
        if holder != where:
            raise EventDefinitionError(
                f"{where} cannot be stored as {name!r}.\n"
                f"  {holder} is stored under this name already.\n"
                "  Pin another one: event_type: ClassVar[str] = '…'."
            )
    codec: Codec[DomainEvent] = Codec(cls)
    cls.event_type = name
    cls.schema_version = version
    _by_class[cls] = _by_name[name] = EventType(name, cls, version, codec, {})


def registered(cls: type[DomainEvent]) -> EventType:
    """What the registry knows of the class; `TypeError` if it is not an event class."""
    try:
        return _by_class[cls]
    except KeyError:
        pass
    name = getattr(cls, "__name__", repr(cls))
    if isinstance(cls, type) and issubclass(cls, DomainEvent):
        raise TypeError(f"{name} is not an attrs class. Decorate it with @attrs.frozen.")
    raise TypeError(f"{name} is not an event class. Write `class {name}(DomainEvent)`.")


def class_named(name: str) -> type[DomainEvent] | None:
    """The event class of this wire name, if it is defined by now."""
    found = _by_name.get(name)
    return None if found is None else found.event_class


def names_under(event_classes: Iterable[type[DomainEvent]]) -> tuple[str, ...]:
    """The wire names of these event classes and of their subclasses, as far as they are defined."""
    classes = tuple(event_classes)
    return tuple(sorted({one.name for cls, one in _by_class.items() if issubclass(cls, classes)}))


def upcaster(event_class: type[DomainEvent], *, from_version: int) -> Callable[[Upcast], Upcast]:
    """Register a function that turns a payload of `from_version` into one of the version after it.

    It is given the payload as a dict of JSON values, may change it, and returns the new one. Events
    stored at older versions go through one upcaster after another; current ones through none.
    """
    event_type = registered(event_class)
    if not 1 <= from_version < event_type.schema_version:
        raise ValueError(
            f"{event_type.name} is at schema version {event_type.schema_version}, so an upcaster "
            f"from version {from_version} would never be called."
        )

    def register(upcast: Upcast) -> Upcast:
        event_type.upcasters[from_version] = upcast
        return upcast

    return register


def decode_event(name: str, schema_version: int, payload: str | bytes) -> DomainEvent:
    """The event of a stored payload; `UnreadableError` says why there is none."""
    event_type = _by_name.get(name)
    if event_type is None:
        raise UnreadableError(
            "$",
            f"there is no event class of the name {name!r}",
            "Import the module that defines the class, or pin its event_type to this name.",
        )
    try:
        if schema_version == event_type.schema_version:
            return event_type.codec.decode(payload)
        return event_type.codec.convert(_upcast(event_type, schema_version, payload))
    except PayloadError as error:
        raise UnreadableError(
            error.path,
            error.reason,
            f"Correct {event_type.event_class.__qualname__}, or raise its schema_version and "
            "write an upcaster from the stored one.",
        ) from error


def _upcast(event_type: EventType, schema_version: int, payload: str | bytes) -> Payload:
    name, current = event_type.name, event_type.schema_version
    if schema_version > current:
        raise UnreadableError(
            "$",
            f"it was stored at schema version {schema_version}, this program knows {current}",
            "A newer program wrote it. Update this one.",
        )
    try:
        upcasted = _decode_object(payload)
    except (DecodeError, RecursionError, UnicodeError) as error:
        raise PayloadError("$", str(error)) from error
    for version in range(schema_version, current):
        upcast = event_type.upcasters.get(version)
        if upcast is None:
            raise UnreadableError(
                "$",
                f"there is no upcaster of {name!r} from schema version {version}",
                f"Write one: @upcaster({event_type.event_class.__qualname__}, "
                f"from_version={version}).",
            )
        try:
            upcasted = upcast(upcasted)
            if not isinstance(upcasted, dict):
                raise TypeError(f"it returned {upcasted!r}, not the payload")
        except Exception as error:
            raise UnreadableError(
                "$",
                f"its upcaster from schema version {version} failed: {error!r}",
                "Correct the upcaster.",
            ) from error
    return upcasted


class UnreadableError(Exception):
    """Internal: a payload that is no event; stores make an `EventDecodeError` of it."""

    def __init__(self, path: str, reason: str, remedy: str) -> None:
        super().__init__(path, reason, remedy)
        self.path = path
        self.reason = reason
        self.remedy = remedy


def _check_moment(
    instance: object, attribute: attrs.Attribute[datetime | None], value: object
) -> None:
    if value is None:
        return
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise ValueError(
            f"{attribute.name} must be a datetime with a time zone, not {value!r}. "
            "Write datetime.now(UTC), or add tzinfo=."
        )
    try:
        value.astimezone(UTC)
    except OverflowError as error:
        raise ValueError(f"{attribute.name} {value!r} is outside of the years 1 to 9999") from error


@attrs.frozen
class NewEvent:
    """An event to append, with what a bare event leaves to the store.

    `event_id` makes the append idempotent: the same ids may be appended again safely. `occurred_at`
    is when it happened, if that is not when it is appended; it has a time zone.
    """

    event: DomainEvent = attrs.field(validator=attrs.validators.instance_of(DomainEvent))
    event_id: UUID = attrs.field(factory=uuid7, validator=attrs.validators.instance_of(UUID))
    metadata: Metadata = attrs.field(factory=dict[str, object])
    occurred_at: datetime | None = attrs.field(default=None, validator=_check_moment)


class StoredEvent(Struct, Generic[E_co], frozen=True, gc=False):
    """An event as it was stored, with its place in its stream and in the store.

    `version` counts from 1 in the stream; `position` grows through the whole store, with gaps.
    `recorded_at` is the store's time of the append and never decreases within a stream;
    `occurred_at` is what the appender gave, or the same as `recorded_at`. Both are in UTC.

    A msgspec struct, not an attrs class, because reading makes one an event and a struct is made in
    a tenth of the time.
    """

    event: E_co
    event_id: UUID
    event_type: str
    aggregate_id: AggregateId
    aggregate_type: str
    version: int
    position: int
    recorded_at: datetime
    occurred_at: datetime
    metadata: Metadata
    schema_version: int

    @property
    def stream_id(self) -> str:
        """Its stream's name: the aggregate's type, `-`, and its id."""
        return stream_id_of(self.aggregate_type, self.aggregate_id)

    @property
    def slice(self) -> int:
        """Its stream's slice, of the 1,024 that streams are divided into."""
        return slice_of(self.stream_id)

    @property
    def correlation_id(self) -> str | None:
        """What the whole chain of events has in common; None if none was given."""
        return cast("str | None", self.metadata.get("correlation_id"))

    @property
    def causation_id(self) -> str | None:
        """The event id of the event that led to this one; None if none was given."""
        return cast("str | None", self.metadata.get("causation_id"))


@contextmanager
def caused_by(stored: StoredEvent) -> Generator[None]:
    """Mark every event appended inside as an effect of `stored`.

    Its id is their causation id; their correlation id is its own, or its id where it has none.
    """
    event_id = str(stored.event_id)
    correlation_id = stored.correlation_id or event_id
    with event_metadata(correlation_id=correlation_id, causation_id=event_id):
        yield
