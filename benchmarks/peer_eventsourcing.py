"""eventsourcing on PostgreSQL, in an environment of its own; prints JSON.

PYTHON peer_eventsourcing.py fill DSN EVENTS        an aggregate of 1,000 events, and others
PYTHON peer_eventsourcing.py measure DSN FILLED SECONDS

As its manual has it: an Application configured by POSTGRES_* variables, with the default lock of
the table, which loses no event; threads for what happens at the same time. Events are put into the
application's event store, so nothing of its aggregates is measured but loading one. Nothing here
imports eventsource_anyio.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from decimal import Decimal
from importlib.metadata import version
from threading import Thread
from time import perf_counter
from urllib.parse import unquote, urlsplit
from uuid import UUID, uuid4

from eventsourcing.application import Application  # type: ignore[import-not-found]
from eventsourcing.domain import Aggregate  # type: ignore[import-not-found]

CONNECTIONS = 20
ORDER = UUID(int=1)  # the aggregate of 1,000 events
LOADED, BATCH = 1000, 100
PAGE = 1000


class Order(Aggregate):  # type: ignore[misc]
    def __init__(self) -> None:
        self.amount = Decimal(0)

    @staticmethod
    def create_id() -> UUID:
        return ORDER

    class Placed(Aggregate.Event):  # type: ignore[misc]
        customer: str
        amount: Decimal
        items: list[str]
        at: datetime
        note: str

        def apply(self, aggregate: Order) -> None:
            aggregate.amount += self.amount


def placed(order: UUID, number: int) -> Order.Placed:
    return Order.Placed(
        originator_id=order,
        originator_version=number,
        timestamp=Order.Placed.create_timestamp(),
        customer="customer-4711",
        amount=Decimal("129.90"),
        items=["A-1000-blue", "B-2000-red", "C-3000-green"],
        at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        note="please ring twice, the dog is friendly",
    )


def opened(dsn: str) -> Application:
    url = urlsplit(dsn)
    return Application(
        env={
            "PERSISTENCE_MODULE": "eventsourcing.postgres",
            "POSTGRES_DBNAME": url.path.removeprefix("/"),
            "POSTGRES_HOST": unquote(url.hostname or "127.0.0.1"),
            "POSTGRES_PORT": str(url.port or 5432),
            "POSTGRES_USER": unquote(url.username or "postgres"),
            "POSTGRES_PASSWORD": unquote(url.password or "none"),
            "POSTGRES_POOL_SIZE": str(CONNECTIONS),
            "POSTGRES_MAX_OVERFLOW": "0",
            "POSTGRES_CONNECT_TIMEOUT": "30",
        }
    )


def append(app: Application, order: UUID, first: int, count: int) -> None:
    """Append events to an order that has `first` of them."""
    app.events.put([placed(order, first + 1 + n) for n in range(count)])


def fill(app: Application, events: int) -> None:
    app.save(Order())
    orders = [ORDER, *(uuid4() for _ in range(events // LOADED - 1))]
    for first in range(0, LOADED, BATCH):
        for order in orders:
            begun = max(first, 1) if order == ORDER else first
            append(app, order, begun, first + BATCH - begun)


def appends(app: Application, threads: int, seconds: float) -> float:
    """Appends a second, each thread to a stream of its own."""

    def one(order: UUID) -> int:
        count = 0
        while perf_counter() < begun + seconds:
            append(app, order, count, 1)
            count += 1
        return count

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(lambda _: append(app, uuid4(), 0, 1), range(CONNECTIONS)))
    with ThreadPoolExecutor(threads) as pool:
        begun = perf_counter()
        done = sum(pool.map(one, [uuid4() for _ in range(threads)]))
        return done / (perf_counter() - begun)


def load(app: Application, seconds: float) -> float:
    """Milliseconds to load the aggregate of 1,000 events."""
    assert app.repository.get(ORDER).version == LOADED
    done = 0
    begun = perf_counter()
    while (now := perf_counter()) < begun + seconds:
        app.repository.get(ORDER)
        done += 1
    return (now - begun) / done * 1000


def read_all(app: Application) -> float:
    """Events a second, all of them as objects, in pages."""
    start, read = 1, 0
    begun = perf_counter()
    while True:
        page = app.recorder.select_notifications(start, PAGE)
        for notification in page:
            app.mapper.to_domain_event(notification)
        read += len(page)
        if len(page) < PAGE:
            return read / (perf_counter() - begun)
        start = page[-1].id + 1


def missed(app: Application, writers: int, appended: int) -> tuple[int, int]:
    """Events that a subscription never sees, and of how many."""
    seen: set[tuple[object, int]] = set()
    sizes = [1 + n % 5 for n in range(appended)]
    end = uuid4()

    def write(order: UUID) -> None:
        first = 0
        for size in sizes:
            append(app, order, first, size)
            first += size

    with app.recorder.subscribe(gt=app.recorder.max_notification_id()) as subscription:

        def follow() -> None:
            for notification in subscription:
                if notification.originator_id == end:
                    return
                seen.add((notification.originator_id, notification.originator_version))

        reader = Thread(target=follow, daemon=True)
        reader.start()
        with ThreadPoolExecutor(writers) as pool:
            list(pool.map(write, [uuid4() for _ in range(writers)]))
        append(app, end, 0, 1)
        reader.join(60)
    committed = writers * sum(sizes)
    return committed - len(seen), committed


def measure(dsn: str, filled: str, seconds: float) -> dict[str, object]:
    found: dict[str, object] = {"version": version("eventsourcing")}
    with opened(dsn) as app:
        found["1 task, appends/s"] = appends(app, 1, seconds)
        found["64 tasks, appends/s"] = appends(app, 64, seconds)
        lost, of = missed(app, 8, 50)
        found["missed by a reader that follows"], found["of events"] = lost, of
    with opened(filled) as app:
        found["load 1,000 events, ms"] = load(app, seconds)
        found["read everything, events/s"] = read_all(app)
    return found


if __name__ == "__main__":
    match sys.argv[1:]:
        case "fill", dsn, events:
            with opened(dsn) as app:
                fill(app, int(events))
        case "measure", dsn, filled, seconds:
            print(json.dumps(measure(dsn, filled, float(seconds))))
        case _:
            sys.exit(__doc__)
