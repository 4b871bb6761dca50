"""What is done with the input: it is imported, each case through its aggregate, and folded."""

from collections.abc import Iterable
from datetime import datetime, timedelta
from decimal import Decimal

import attrs
from anyio import create_task_group

from .. import EventStore, NewEvent, ReadOptions
from . import fines
from .fines import Fine, FineError, State
from .log import ACTIVITY, COMMANDS, Refused, Row


def decide(number: str, rows: Iterable[Row], refused: Refused) -> list[NewEvent]:
    """The events of a case, each with the id and the time of its row."""
    fine = Fine(number)
    events: list[NewEvent] = []
    for row in rows:
        try:
            COMMANDS[row.fields[ACTIVITY]](fine, row)
        except (FineError, ValueError) as error:
            refused.append((row.line, f"{row.fields[ACTIVITY]}: {error}"))
        else:
            event = fine.uncommitted_events[-1].event
            events.append(NewEvent(event, event_id=row.id, occurred_at=row.at))
    return events


async def import_cases(
    store: EventStore, cases: Iterable[tuple[str, list[Row]]], refused: Refused
) -> tuple[int, int]:
    """Append what the store has not got yet; how many events that is, and how many it had."""
    left, new, known = iter(cases), 0, 0

    async def work() -> None:
        nonlocal new, known
        for number, rows in left:
            events = decide(number, rows, refused)
            stored = await store.get_events(number, Fine.aggregate_type)
            known += stored.version
            if any(a.event_id != b.event_id for a, b in zip(stored, events, strict=False)):
                refused.append((rows[0].line, f"{number}: other events of it are stored already"))
            elif later := events[stored.version :]:
                await store.append_events(number, Fine.aggregate_type, later, stored.version)
                new += len(later)

    async with create_task_group() as workers:  # their appends share commits
        for _ in range(100):
            workers.start_soon(work)
    return new, known


@attrs.define
class Course:
    """How a fine has gone so far."""

    created: datetime
    last: datetime
    state: State = State.OPEN
    owed: Decimal = Decimal(0)

    @property
    def days(self) -> int:
        return round((self.last - self.created) / timedelta(days=1))


async def courses(store: EventStore) -> dict[str, Course]:
    """A read model: the course of every fine, folded from the events of the whole store."""
    found: dict[str, Course] = {}
    async for stored in store.read_all(ReadOptions(aggregate_types=(Fine.aggregate_type,))):
        at = stored.occurred_at
        course = found.setdefault(str(stored.aggregate_id), Course(at, at))
        course.last = at
        match stored.event:
            case fines.FineCreated(dismissal=str()) | fines.AppealAdvanced(dismissal=str()):
                course.state, course.owed = State.DISMISSED, Decimal(0)
            case fines.FineCreated(amount=more) | fines.FineSent(expense=more):
                course.owed += more
            case fines.PenaltyAdded(penalty=more):
                course.owed += more
            case fines.PaymentReceived(amount=paid):
                course.owed -= paid
                course.state = State.OPEN if course.owed else State.PAID
            case fines.GivenToCollection():
                course.state = State.COLLECTION
            case _:
                pass
    return found
