"""Given events, when a command, then events: tests of an aggregate without any store.

::

    given(Account, Opened("ann")).when(Account.deposit, 5).then(Deposited(5))
    given(account, Opened("ann")).when(Withdraw(7)).then_raises(NotEnough)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, cast, overload

import attrs

from ..aggregates.decider import C, Decider, DeciderAggregate, E, S
from ..aggregates.root import Aggregate, AggregateRoot, TRoot
from ..events import DomainEvent
from ..ids import AggregateId

TAggregate = TypeVar("TAggregate", bound=Aggregate)
P = ParamSpec("P")


@overload
def given(
    aggregate: type[TRoot], *events: DomainEvent, aggregate_id: AggregateId = ...
) -> Scenario[TRoot]: ...
@overload
def given(
    aggregate: Decider[S, C, E], *events: E, aggregate_id: AggregateId = ...
) -> Scenario[DeciderAggregate[S, C, E]]: ...
def given(
    aggregate: type[AggregateRoot] | Decider[S, C, E],
    *events: DomainEvent,
    aggregate_id: AggregateId = "given",
) -> Scenario[Any]:
    """An aggregate, of a class or of a decider, to which these events have happened."""
    if isinstance(aggregate, Decider):
        return Scenario(DeciderAggregate(aggregate_id, decider=aggregate), events)
    return Scenario(aggregate(aggregate_id), events)


class Scenario(Generic[TAggregate]):
    """What has happened to an aggregate; `when` comes next."""

    def __init__(self, aggregate: TAggregate, events: Sequence[DomainEvent]) -> None:
        for event in events:
            aggregate.apply(event)
        aggregate.mark_committed(aggregate.uncommitted_events)
        self.aggregate = aggregate

    @overload
    def when(
        self: Scenario[DeciderAggregate[S, C, E]], command: C
    ) -> Outcome[DeciderAggregate[S, C, E]]: ...
    @overload
    def when(
        self,
        command: Callable[Concatenate[TAggregate, P], object],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Outcome[TAggregate]: ...
    def when(self, command: object, *args: object, **kwargs: object) -> Outcome[Any]:
        """Call a method of the aggregate with these arguments, or give a decider its command."""
        error: Exception | None = None
        try:
            self.aggregate.perform(command, *args, **kwargs)
        except Exception as raised:  # noqa: BLE001  (it is what `then_raises` looks at)
            error = raised
        return Outcome(self.aggregate, error)


class Outcome(Generic[TAggregate]):
    """What a command has led to; it says nothing until one of its `then` methods is called."""

    def __init__(self, aggregate: TAggregate, error: Exception | None) -> None:
        self.aggregate = aggregate
        self.error = error

    def then(self, *events: DomainEvent) -> Self:
        """Exactly these new events, in this order; none if none are given."""
        if self.error is not None:
            raise AssertionError(
                f"expected {_count(len(events))}, but {self.error!r} was raised"
            ) from self.error
        actual = [new.event for new in self.aggregate.uncommitted_events]
        if actual != list(events):
            raise AssertionError(_difference(events, actual))
        return self

    def then_raises(self, error: type[Exception], containing: str = "") -> Self:
        """The command was refused with this error, and its message contains the text."""
        if not isinstance(self.error, error) or containing not in str(self.error):
            wanted = f"{error.__name__}{f' containing {containing!r}' if containing else ''}"
            if self.error is not None:
                raise AssertionError(
                    f"expected {wanted}, but {self.error!r} was raised"
                ) from self.error
            actual = [new.event for new in self.aggregate.uncommitted_events]
            listed = "".join(f"\n  + {event!r}" for event in actual)
            raise AssertionError(
                f"expected {wanted}, but the command was accepted with "
                f"{_count(len(actual))}{listed}"
            )
        return self


def _count(number: int) -> str:
    return f"{number or 'no'} event{'s' * (number != 1)}"


def _difference(expected: Sequence[DomainEvent], actual: Sequence[DomainEvent]) -> str:
    lines = [f"expected {_count(len(expected))}, got {_count(len(actual))}"]
    for index in range(max(len(expected), len(actual))):
        wanted = expected[index] if index < len(expected) else None
        got = actual[index] if index < len(actual) else None
        if wanted == got:
            lines.append(f"  = {got!r}")
            continue
        if wanted is not None:
            lines.append(f"  - {wanted!r}")
        if got is not None:
            lines.append(f"  + {got!r}")
        if wanted is not None and type(wanted) is type(got):
            for field in attrs.fields(cast("type[attrs.AttrsInstance]", type(wanted))):
                before, after = getattr(wanted, field.name), getattr(got, field.name)
                if before != after:
                    lines.append(f"      {field.name}: expected {before!r}, got {after!r}")
    return "\n".join(lines)
