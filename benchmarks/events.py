"""The events and the aggregate that are measured."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

import attrs

from eventsource_anyio import AggregateId, AggregateRoot, DomainEvent, applies


@attrs.frozen
class Placed(DomainEvent):
    """An event of a usual size: about 200 bytes of JSON."""

    customer: str
    amount: Decimal
    items: list[str]
    at: datetime
    note: str = ""


PLACED = Placed(
    "customer-4711",
    Decimal("129.90"),
    ["A-1000-blue", "B-2000-red", "C-3000-green"],
    datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    "please ring twice, the dog is friendly",
)


KINDS: list[type[Placed]] = [
    attrs.frozen(type(f"Placed{kind}", (Placed,), {"__module__": __name__})) for kind in range(8)
]


class Order(AggregateRoot):
    """What it was worth: one event type, as cheap as folding can be."""

    def __init__(self, aggregate_id: AggregateId) -> None:
        super().__init__(aggregate_id)
        self.amount = Decimal(0)

    @applies(Placed)
    def _placed(self, event: Placed) -> None:
        self.amount += event.amount


@attrs.frozen
class Sent(DomainEvent):
    """When it was given to the store, by the machine's monotonic clock; 0 to warm up."""

    at: int


@attrs.frozen
class AllSent(DomainEvent):
    """The last one: how many were sent before."""

    count: int


@attrs.frozen
class Step(DomainEvent):
    number: int


STEPS = [type(f"Step{kind}", (Step,), {"__module__": __name__}) for kind in range(8)]
STEPS = [attrs.frozen(step) for step in STEPS]


class Counter(AggregateRoot):
    """Eight event types, a method each."""

    def __init__(self, aggregate_id: str) -> None:
        super().__init__(aggregate_id)
        self.total = 0

    @applies(STEPS[0])
    def _step0(self, event: Step) -> None:
        self.total += event.number

    @applies(STEPS[1])
    def _step1(self, event: Step) -> None:
        self.total += event.number

    @applies(STEPS[2])
    def _step2(self, event: Step) -> None:
        self.total += event.number

    @applies(STEPS[3])
    def _step3(self, event: Step) -> None:
        self.total += event.number

    @applies(STEPS[4])
    def _step4(self, event: Step) -> None:
        self.total += event.number

    @applies(STEPS[5])
    def _step5(self, event: Step) -> None:
        self.total += event.number

    @applies(STEPS[6])
    def _step6(self, event: Step) -> None:
        self.total += event.number

    @applies(STEPS[7])
    def _step7(self, event: Step) -> None:
        self.total += event.number
