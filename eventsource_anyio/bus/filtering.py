"""Which events somebody listens to."""

from __future__ import annotations

from ..events import DomainEvent, StoredEvent, class_named, names_under, registered


class EventFilter:
    """Events of some types, of classes or by name; a class stands for its subclasses too."""

    __slots__ = ("_classes", "_names", "_wanted")

    def __init__(self, event_types: tuple[str | type[DomainEvent], ...]) -> None:
        self._names = frozenset(one for one in event_types if isinstance(one, str))
        self._classes = tuple(one for one in event_types if not isinstance(one, str))
        for event_class in self._classes:
            registered(event_class)
        self._wanted: dict[type[object], bool] = {}

    @property
    def everything(self) -> bool:
        return not self._names and not self._classes

    def names(self) -> tuple[str, ...]:
        """The names of the types, as far as they are defined by now; empty means all."""
        return tuple({*self._names, *(names_under(self._classes) if self._classes else ())})

    def wants_name(self, event_type: str) -> bool:
        """Whether it wants events of this type, which need not be defined here."""
        if self.everything or event_type in self._names:
            return True
        event_class = class_named(event_type)
        return event_class is not None and issubclass(event_class, self._classes)

    def wants(self, stored: StoredEvent) -> bool:
        event_class = type(stored.event)
        wanted = self._wanted.get(event_class)
        if wanted is None:
            wanted = self.everything or issubclass(event_class, self._classes)
            wanted = self._wanted[event_class] = wanted or stored.event_type in self._names
        return wanted
