"""The functional aggregate: three pure functions, and the state they are applied to.

The Decider is Jérémie Chassaing's: https://thinkbeforecoding.com/post/2021/12/17/functional-event-sourcing-decider
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar, cast

import attrs

from ..events import DomainEvent
from ..ids import check_aggregate_type
from .root import Aggregate

S = TypeVar("S")
C = TypeVar("C")
E = TypeVar("E", bound=DomainEvent)


def _aggregate_type(given: str) -> str:
    return check_aggregate_type(given)  # whose cache hides its signature from type checkers


@attrs.frozen
class Decider(Generic[S, C, E]):
    """A consistency boundary as pure functions.

    `initial()` is the state of a stream without events. `decide(command, state)` returns the events
    that follow from a command, none if nothing does, or raises the user's own error to refuse it.
    `evolve(state, event)` returns the state after an event; it refuses nothing.
    """

    aggregate_type: str = attrs.field(converter=_aggregate_type)
    initial: Callable[[], S] = attrs.field(kw_only=True)
    decide: Callable[[C, S], Iterable[E]] = attrs.field(kw_only=True)
    evolve: Callable[[S, E], S] = attrs.field(kw_only=True)


@attrs.define(eq=False, slots=False)
class DeciderAggregate(Aggregate, Generic[S, C, E]):
    """The state of one stream of a decider, as a repository loads it: `state` and `version`."""

    decider: Decider[S, C, E] = attrs.field(kw_only=True, repr=False)
    state: S = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.state = self.decider.initial()

    def decide(self, command: C) -> None:
        """Apply the events that follow from a command, all or, if it is refused, none of them."""
        decided = self.decider.decide(command, self.state)
        if isinstance(decided, DomainEvent) or not isinstance(decided, Iterable):
            raise TypeError(f"decide() must return a list of events, not {decided!r}")
        for event in tuple(decided):
            self.apply(event)

    def perform(self, command: object, *args: object, **kwargs: object) -> None:
        if args or kwargs:
            raise TypeError("a decider is given its command alone, without arguments")
        self.decide(cast("C", command))

    def _aggregate_type(self) -> str:
        return self.decider.aggregate_type

    def _evolve(self, events: Iterable[DomainEvent]) -> None:
        evolve, state = self.decider.evolve, self.state
        for event in events:
            state = evolve(state, cast("E", event))
        self.state = state
