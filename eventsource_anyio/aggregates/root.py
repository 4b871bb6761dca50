"""Aggregates: what a repository loads and saves, and the imperative way to write one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Iterator
from inspect import iscoroutinefunction
from typing import ClassVar, TypeVar, cast

import attrs

from ..dispatch import check_marked, marked, marked_methods
from ..events import DomainEvent, NewEvent, StoredEvent
from ..ids import AggregateId, check_aggregate_type, normalize_aggregate_id, stream_id_of

F = TypeVar("F", bound=Callable[..., None])
_MARK = "__eventsource_applies__"


@attrs.define(eq=False, slots=False)
class Aggregate(ABC):
    """A stream's state, its version, and the events that are not stored yet.

    Not written by users, who write an `AggregateRoot` or a `Decider`.
    """

    aggregate_id: AggregateId = attrs.field(
        converter=normalize_aggregate_id, on_setattr=attrs.setters.frozen
    )
    _version: int = attrs.field(default=0, init=False, repr=False)
    _uncommitted: list[NewEvent] = attrs.field(factory=list[NewEvent], init=False, repr=False)

    @property
    def stream_id(self) -> str:
        """Its stream's name: the aggregate's type, `-`, and its id."""
        return stream_id_of(self._aggregate_type(), self.aggregate_id)

    @property
    def version(self) -> int:
        """The version of the last event in the state, counting those that are not stored yet."""
        return self._version

    @property
    def uncommitted_events(self) -> tuple[NewEvent, ...]:
        """What `AggregateRepository.save` will append. Their ids are made already, so saving again
        after a cancellation stores nothing twice."""
        return tuple(self._uncommitted)

    def apply(self, event: DomainEvent | NewEvent) -> None:
        """Change the state by a new event, and keep it to be saved.

        A `NewEvent` carries metadata, an id, or when it occurred. If the state cannot be changed by
        it, it is not kept.
        """
        new = event if isinstance(event, NewEvent) else NewEvent(event)
        self._evolve((new.event,))
        self._uncommitted.append(new)
        self._version += 1

    def replay(self, stored: Iterable[StoredEvent]) -> None:
        """Change the state by stored events, the next ones of the stream; none of them is kept."""
        version = self._version

        def events() -> Iterator[DomainEvent]:
            nonlocal version
            for one in stored:
                version = one.version
                yield one.event

        self._evolve(events())
        self._version = version

    def mark_committed(self, stored: Iterable[NewEvent]) -> None:
        """These of the uncommitted events have been stored."""
        ids = {new.event_id for new in stored}
        self._uncommitted = [new for new in self._uncommitted if new.event_id not in ids]

    @abstractmethod
    def perform(self, command: object, *args: object, **kwargs: object) -> None:
        """Carry out a command, in the form that `AggregateRepository.execute` takes it in."""

    @abstractmethod
    def _aggregate_type(self) -> str: ...

    @abstractmethod
    def _evolve(self, events: Iterable[DomainEvent]) -> None: ...


_Applier = Callable[[Aggregate, DomainEvent], None]


class _Appliers(dict[type, _Applier]):
    """The method for each event class; a subclass of one is looked up once, and remembered."""

    aggregate: str = ""

    def __missing__(self, event_class: type) -> _Applier:
        for base in event_class.__mro__[1:]:
            if base in self:
                self[event_class] = self[base]
                return self[base]
        name = event_class.__name__
        raise TypeError(
            f"{self.aggregate} has no method for {name}.\n"
            f"  The event is in its stream, or is being applied, and every event of a stream needs "
            f"one.\n"
            f"  Write a method with @applies({name}); if nothing changes by it, its body is `pass`."
        )


def applies(*event_classes: type[DomainEvent]) -> Callable[[F], F]:
    """Mark the method of an aggregate that changes its state by these events.

    It is called with the event, for new events and stored ones alike, so it decides and refuses
    nothing. It also serves the subclasses of an event class that have no method of their own.
    """
    check_marked(_MARK, event_classes)

    def mark(method: F) -> F:
        if iscoroutinefunction(method):
            raise TypeError(f"{method.__qualname__} is async, and nobody would await it")
        return marked(_MARK, event_classes, method)

    return mark


@attrs.define(eq=False, slots=False)
class AggregateRoot(Aggregate):
    """The base of an aggregate whose methods check the rules, and `apply` what has happened.

    A subclass is constructed with its `aggregate_id` alone; it is a plain class that sets its state
    in `__init__`, or an attrs class whose fields all have defaults. `aggregate_type` names its
    streams, and is the name of the class unless it is pinned in the class body.
    """

    aggregate_type: ClassVar[str]
    _appliers: ClassVar[_Appliers]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.aggregate_type = check_aggregate_type(cls.__dict__.get("aggregate_type", cls.__name__))
        methods = marked_methods(cls, _MARK)
        cls._appliers = _Appliers({one: getattr(cls, name) for one, name in methods.items()})
        cls._appliers.aggregate = cls.__name__

    @classmethod
    def check_applies(cls, event_class: type[DomainEvent]) -> None:
        """`TypeError` if it has no method for these events, so that none may be in its stream."""
        cls._appliers[event_class]

    def perform(self, command: object, *args: object, **kwargs: object) -> None:
        result = cast("Callable[..., object]", command)(self, *args, **kwargs)
        if isinstance(result, Coroutine):
            result.close()
            raise TypeError(
                f"{command!r} is async, but a command decides on the aggregate's state alone, and "
                "may be called again. Await what it needs before, and give it as an argument."
            )

    def _aggregate_type(self) -> str:
        return self.aggregate_type

    def _evolve(self, events: Iterable[DomainEvent]) -> None:
        appliers = self._appliers
        for event in events:
            appliers[type(event)](self, event)


TRoot = TypeVar("TRoot", bound=AggregateRoot)
