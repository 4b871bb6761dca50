"""Methods of a class that are marked with the event classes they are for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from .events import DomainEvent, registered

F = TypeVar("F", bound=Callable[..., object])


def check_marked(mark: str, event_classes: tuple[type[DomainEvent], ...]) -> None:
    """`TypeError` if one of them is not an event class, or there is none."""
    if not event_classes:
        name = mark.strip("_").rpartition("_")[2]
        raise TypeError(f"{name}() needs event classes, such as @{name}(Deposited)")
    for event_class in event_classes:
        registered(event_class)


def marked(mark: str, event_classes: tuple[type[DomainEvent], ...], method: F) -> F:
    setattr(method, mark, event_classes)
    return method


def marked_methods(cls: type, mark: str) -> dict[type[DomainEvent], str]:
    """The names of the marked methods by event class; a subclass's own win over inherited ones."""
    methods: dict[type[DomainEvent], str] = {}
    for base in reversed(cls.__mro__):
        own: dict[type[DomainEvent], str] = {}
        for name, value in vars(base).items():
            for event_class in getattr(value, mark, ()):
                if event_class in own:
                    raise TypeError(
                        f"{cls.__name__}.{own[event_class]} and .{name} are both for "
                        f"{event_class.__name__}; one of them would never be called."
                    )
                own[event_class] = name
        methods |= own
    return methods
