"""The domain: a traffic fine, from its creation until it is paid, dismissed or given away."""

from datetime import date, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import ClassVar

import attrs

from .. import AggregateRoot, DomainEvent, applies

State = StrEnum("State", "NEW OPEN PAID COLLECTION DISMISSED")
Appeal = StrEnum("Appeal", "NONE FILED SENT ANSWERED CLOSED")  # in this order


class FineError(Exception):
    """Something that cannot happen to a fine as it is; the message says why."""


@attrs.frozen
class FineCreated(DomainEvent):
    amount: Decimal
    dismissal: str | None = None


@attrs.frozen
class FineSent(DomainEvent):
    expense: Decimal


@attrs.frozen
class OffenderNotified(DomainEvent):
    on: date


@attrs.frozen
class PenaltyAdded(DomainEvent):
    penalty: Decimal


@attrs.frozen
class PaymentReceived(DomainEvent):
    event_type: ClassVar[str] = "FinePaymentReceived"  # other payments may come to be stored too
    amount: Decimal


@attrs.frozen
class AppealAdvanced(DomainEvent):
    to: Appeal
    dismissal: str | None = None


@attrs.frozen
class GivenToCollection(DomainEvent):
    owed: Decimal


@attrs.define(eq=False)
class Fine(AggregateRoot):
    """One fine, by its case number. Its methods are the rules: all hold, or nothing happens."""

    state: State = State.NEW
    amount: Decimal = Decimal(0)
    owed: Decimal = Decimal(0)
    sent: bool = False
    due: date | None = None
    penalized: bool = False
    appeal: Appeal = Appeal.NONE

    def create(self, amount: Decimal, dismissal: str | None = None) -> None:
        self._check(amount > 0, f"a fine cannot be {amount}", State.NEW)
        self.apply(FineCreated(amount, dismissal))

    def send(self, expense: Decimal) -> None:
        self._check(not self.sent, "it was sent before")
        self._check(expense >= 0, f"sending cannot cost {expense}")
        self.apply(FineSent(expense))

    def notify(self, on: date) -> None:
        self._check(self.sent, "it was not sent, so nobody can have got it")
        self._check(self.due is None, "the offender was notified before")
        self.apply(OffenderNotified(on))

    def add_penalty(self, new_amount: Decimal, on: date) -> None:
        self._check(not self.penalized, "it has a penalty already")
        self._check(self.due is not None, "the offender was not notified")
        self._check(self.due is None or on >= self.due, f"the offender can pay until {self.due}")
        self._check(new_amount > self.amount, f"{new_amount} is not above {self.amount}")
        self.apply(PenaltyAdded(new_amount - self.amount))

    def pay(self, amount: Decimal) -> None:
        self._check(0 < amount <= self.owed, f"{self.owed} is owed, so {amount} cannot be paid")
        self.apply(PaymentReceived(amount))

    def advance_appeal(self, to: Appeal, dismissal: str | None = None) -> None:
        self._check(self.due is not None, "the offender was not notified")
        steps = list(Appeal)
        follows = steps.index(to) == steps.index(self.appeal) + 1
        self._check(follows, f"an appeal cannot be {to} when {self.appeal}")
        self.apply(AppealAdvanced(to, dismissal))

    def give_to_collection(self) -> None:
        self._check(self.penalized, "it has no penalty yet")
        self._check(self.appeal in (Appeal.NONE, Appeal.CLOSED), f"an appeal is {self.appeal}")
        self.apply(GivenToCollection(self.owed))

    def _check(self, holds: bool, otherwise: str, state: State = State.OPEN) -> None:
        if self.state is not state:
            holds, otherwise = False, f"its state is {self.state}, not {state}"
        if not holds:
            raise FineError(f"{self.aggregate_id}: {otherwise}")

    @applies(FineCreated)
    def _created(self, event: FineCreated) -> None:
        self.state, self.amount, self.owed = State.OPEN, event.amount, event.amount
        if event.dismissal is not None:
            self.state, self.owed = State.DISMISSED, Decimal(0)

    @applies(FineSent)
    def _sent(self, event: FineSent) -> None:
        self.sent = True
        self.owed += event.expense

    @applies(OffenderNotified)
    def _notified(self, event: OffenderNotified) -> None:
        self.due = event.on + timedelta(days=60)

    @applies(PenaltyAdded)
    def _penalized(self, event: PenaltyAdded) -> None:
        self.penalized = True
        self.owed += event.penalty

    @applies(PaymentReceived)
    def _paid(self, event: PaymentReceived) -> None:
        self.owed -= event.amount
        if not self.owed:
            self.state = State.PAID

    @applies(AppealAdvanced)
    def _appealed(self, event: AppealAdvanced) -> None:
        self.appeal = event.to
        if event.dismissal is not None:
            self.state, self.owed = State.DISMISSED, Decimal(0)

    @applies(GivenToCollection)
    def _given(self, event: GivenToCollection) -> None:
        self.state = State.COLLECTION
