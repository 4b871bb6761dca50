"""The input: a log in CSV with a row for everything that happened to a fine; read, or made up."""

import csv
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from random import Random
from typing import TypeAlias
from uuid import UUID, uuid5

import attrs

from .fines import Appeal, Fine

CASE, ACTIVITY, TIME = "case:concept:name", "concept:name", "time:timestamp"
AMOUNTS = ("amount", "expense", "paymentAmount", "totalPaymentAmount")
COLUMNS = (CASE, ACTIVITY, TIME, "dismissal", *AMOUNTS)
NAMESPACE = UUID("5a1f0c52-7d0e-5c55-9f43-2f8b1f6f7a10")


class InputError(Exception):
    """Nothing of the input can be used."""


@attrs.frozen
class Row:
    line: int
    id: UUID  # the same whenever the same row is read
    at: datetime
    fields: dict[str, str]

    @property
    def dismissal(self) -> str | None:
        return None if self.fields["dismissal"] in ("", "NIL") else self.fields["dismissal"]

    def money(self, column: str) -> Decimal:
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,2})?", self.fields[column]):
            raise ValueError(f"{column} should be such as 36.0, not {self.fields[column]!r}")
        return Decimal(self.fields[column])


COMMANDS: dict[str, Callable[[Fine, Row], None]] = {
    "Create Fine": lambda fine, row: fine.create(row.money("amount"), row.dismissal),
    "Send Fine": lambda fine, row: fine.send(row.money("expense")),
    "Insert Fine Notification": lambda fine, row: fine.notify(row.at.date()),
    "Add penalty": lambda fine, row: fine.add_penalty(row.money("amount"), row.at.date()),
    "Payment": lambda fine, row: fine.pay(row.money("paymentAmount")),
    "Send for Credit Collection": lambda fine, row: fine.give_to_collection(),
    "Insert Date Appeal to Prefecture": lambda fine, row: fine.advance_appeal(Appeal.FILED),
    "Send Appeal to Prefecture": lambda fine, row: fine.advance_appeal(Appeal.SENT, row.dismissal),
    "Receive Result Appeal from Prefecture": lambda fine, row: fine.advance_appeal(Appeal.ANSWERED),
    "Notify Result Appeal to Offender": lambda fine, row: fine.advance_appeal(Appeal.CLOSED),
}
Refused: TypeAlias = list[tuple[int, str]]  # the number of a line, and why it was left out


def read(lines: Iterable[str], refused: Refused) -> dict[str, list[Row]]:
    """The rows of every case, in the order of their times."""
    numbered = ((line, text) for line, text in enumerate(lines, 1) if text.strip())
    header = next(csv.reader([next(numbered, (1, ""))[1]]))
    if missing := [column for column in COLUMNS if column not in header]:
        raise InputError(f"line 1 should name the columns, but lacks {', '.join(missing)}")
    cases: dict[str, list[Row]] = {}
    seen: dict[UUID, int] = {}
    for line, text in numbered:
        try:
            row = _row(line, header, text)
            if seen.setdefault(row.id, line) != line:
                raise ValueError(f"it repeats line {seen[row.id]}")
            cases.setdefault(row.fields[CASE], []).append(row)
        except (ValueError, OverflowError, csv.Error) as error:
            refused.append((line, str(error)))
    return {case: sorted(rows, key=lambda row: row.at) for case, rows in cases.items()}


def _row(line: int, header: list[str], text: str) -> Row:
    values = next(csv.reader([text]))
    if len(values) != len(header):
        raise ValueError(f"it has {len(values)} fields, but line 1 has {len(header)}")
    fields = {column: values[header.index(column)] for column in COLUMNS}
    if fields[ACTIVITY] not in COMMANDS:
        raise ValueError(f"{fields[ACTIVITY]!r} is no activity of such a log")
    Fine(fields[CASE])  # or it is no aggregate id
    at = datetime.fromisoformat(fields[TIME])
    if at.tzinfo is None:
        raise ValueError(f"{TIME} should end in an offset such as +01:00, not {fields[TIME]!r}")
    at.astimezone(UTC)  # or it is too close to the end of time
    return Row(line, uuid5(NAMESPACE, "|".join(fields.values())), at, fields)


# How cases go, a letter a command (p pays a part; the last way is refused), and how many of 100 do.
LETTERS = dict(zip("CSNAPXFGRT", COMMANDS, strict=True))
VARIANTS = ("CSNAX", "CP", "CS", "CSNAP", "CSNApP", "CSNpAp", "CSNFAG", "CSNFAGRTP", "CPS")
WEIGHTS = (36, 22, 17, 12, 4, 4, 2, 2, 1)


def made_up(cases: int) -> Iterator[str]:
    """The lines of a log of so many cases: always the same, and more cases only add to them."""
    random = Random(157)  # noqa: S311  (nothing here is secret)
    yield ",".join(COLUMNS)
    for number in range(1, cases + 1):
        (variant,) = random.choices(VARIANTS, WEIGHTS)
        amount = Decimal(random.choice(("22.0", "33.6", "36.0", "74.5", "148.0")))
        at = datetime(2001, 1, 1, tzinfo=timezone(timedelta(hours=1)))
        at += timedelta(days=random.randrange(4000))
        owed = paid = Decimal(0)
        for step in variant:
            charge = {"C": amount, "S": Decimal("13.5"), "A": amount}.get(step, Decimal(0))
            payment = {"P": owed, "p": round(owed / 2, 2)}.get(step, Decimal(0))
            owed, paid = owed + charge - payment, paid + payment
            values: dict[str, dict[str, object]] = {
                "C": {"amount": amount, "dismissal": "NIL"},
                "S": {"expense": charge},
                "A": {"amount": 2 * amount},
                "P": {"paymentAmount": payment, "totalPaymentAmount": paid},
                "G": {"dismissal": "#" if variant.endswith("G") else "NIL"},
            }
            row = values.get(step.upper(), {})
            row |= {CASE: f"M{number}", ACTIVITY: LETTERS[step.upper()], TIME: at}
            yield ",".join(str(row.get(column, "")) for column in COLUMNS)
            at += timedelta(days=random.randint(60, 120))
