"""eventsourcing, in an environment of its own.

As its manual has it: an Application configured by environment variables, with the default lock of
the table, which loses no event; threads for what happens at the same time. Events are put into the
application's event store, so nothing of its aggregates is measured but loading one. Who appends to
a stream that others append to asks for its version, and again on a conflict.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from decimal import Decimal
from random import Random
from threading import Thread
from time import monotonic_ns, perf_counter, sleep
from typing import Any
from urllib.parse import unquote, urlsplit
from uuid import UUID, uuid4

import psutil
from eventsourcing.application import Application  # type: ignore[import-not-found]
from eventsourcing.domain import Aggregate  # type: ignore[import-not-found]
from eventsourcing.persistence import (  # type: ignore[import-not-found]
    IntegrityError,
    Tracking,
    TrackingRecorder,
)
from eventsourcing.postgres import PostgresTrackingRecorder  # type: ignore[import-not-found]
from eventsourcing.projection import (  # type: ignore[import-not-found]
    Projection,
    ProjectionRunner,
)

from .peer_serve import serve

Found = Mapping[str, float]

CONNECTIONS = 20
LOADED, BATCH, PAGE = 1000, 100, 1000
_END = 20.0  # seconds that its subscriber may be behind when the last event was appended


class Order(Aggregate):  # type: ignore[misc]
    def __init__(self, size: int) -> None:
        self.amount = Decimal(0)

    @staticmethod
    def create_id(size: int) -> UUID:
        return UUID(int=size)

    class Placed(Aggregate.Event):  # type: ignore[misc]
        customer: str
        amount: Decimal
        items: list[str]
        at: datetime
        note: str

        def apply(self, aggregate: Order) -> None:
            aggregate.amount += self.amount

    class Sent(Aggregate.Event):  # type: ignore[misc]
        given: int


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


# -- where ------------------------------------------------------------------------------------


def _environment(where: str) -> dict[str, str]:
    if not where:
        return {"PERSISTENCE_MODULE": "eventsourcing.popo", "IS_SNAPSHOTTING_ENABLED": "y"}
    if "://" not in where:
        return {
            "PERSISTENCE_MODULE": "eventsourcing.sqlite",
            "SQLITE_DBNAME": where,
            "SQLITE_LOCK_TIMEOUT": "30",
            "IS_SNAPSHOTTING_ENABLED": "y",
        }
    url = urlsplit(where)
    return {
        "PERSISTENCE_MODULE": "eventsourcing.postgres",
        "POSTGRES_DBNAME": url.path.removeprefix("/"),
        "POSTGRES_HOST": unquote(url.hostname or "127.0.0.1"),
        "POSTGRES_PORT": str(url.port or 5432),
        "POSTGRES_USER": unquote(url.username or "postgres"),
        "POSTGRES_PASSWORD": unquote(url.password or "none"),
        "POSTGRES_POOL_SIZE": str(CONNECTIONS),
        "POSTGRES_MAX_OVERFLOW": "0",
        "POSTGRES_CONNECT_TIMEOUT": "60",
        "IS_SNAPSHOTTING_ENABLED": "y",
    }


def opened(where: str) -> Any:
    return Application(env=_environment(where))


def schema(where: str) -> Found:
    with opened(where):
        return {}


def append(app: Any, order: UUID, first: int, count: int) -> None:
    """Append events to an order that has `first` of them."""
    app.events.put([placed(order, first + 1 + n) for n in range(count)])


def append_to_one(app: Any, order: UUID, count: int, end: float) -> int:
    """Append to a stream that others append to; again on a conflict; not after the end."""
    while perf_counter() < end:
        last = app.recorder.select_events(order, desc=True, limit=1)
        try:
            append(app, order, last[0].originator_version if last else 0, count)
        except IntegrityError:
            continue
        return count
    return 0


def put_in(app: Any, streams: int, sizes: Sequence[int]) -> None:
    """Its aggregates begin with an event of their creation, which is one of the size."""
    for size in sizes:
        app.save(Order(size))
    names = [UUID(int=size) for size in sizes if size == LOADED]
    names += [uuid4() for _ in range(streams - len(names))]
    for step in range(LOADED // BATCH):
        for name in names:
            _share(app, name, step * BATCH, BATCH)
        for size in sizes:
            if size != LOADED:
                share = size * BATCH // LOADED
                _share(app, UUID(int=size), step * share, share)


def _share(app: Any, order: UUID, first: int, count: int) -> None:
    created = first == 0 and order.int < 2**32
    if count > created:
        append(app, order, first + created, count - created)


def fill(where: str, streams: int, sizes: Sequence[int]) -> Found:
    with opened(where) as app:
        put_in(app, streams, sizes)
        for size in sizes:
            app.take_snapshot(UUID(int=size))
    return {}


# -- the work ---------------------------------------------------------------------------------


def _append(
    app: Any, threads: int, events: int, contended: bool, seconds: float
) -> tuple[int, float]:
    one_stream = uuid4()

    def one(order: UUID) -> int:
        count = 0
        while (not count and not contended) or perf_counter() < begun + seconds:
            if contended:
                count += append_to_one(app, one_stream, events, begun + seconds)
            else:
                append(app, order, count, events)
                count += events
        return count

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(lambda _: append(app, uuid4(), 0, 1), range(CONNECTIONS)))
    with ThreadPoolExecutor(threads) as pool:
        begun = perf_counter()
        done = sum(pool.map(one, [uuid4() for _ in range(threads)]))
        return done, perf_counter() - begun


def appends(where: str, tasks: int, events: int, contended: bool, seconds: float) -> Found:
    with opened(where) as app:
        done, took = _append(app, tasks, events, contended, seconds)
        return {"events/s": done / took}


def followed(where: str, tasks: int, events: int, contended: bool, seconds: float) -> Found:
    """The same, while a subscription of its recorder is read."""
    seen: set[tuple[object, int]] = set()
    end = uuid4()
    with opened(where) as app:
        with app.recorder.subscribe(gt=app.recorder.max_notification_id()) as subscription:

            def follow() -> None:
                for notification in subscription:
                    if notification.originator_id == end:
                        return
                    seen.add((notification.originator_id, notification.originator_version))

            reader = Thread(target=follow, daemon=True)
            reader.start()
            done, took = _append(app, tasks, events, contended, seconds)
            append(app, end, 0, 1)
            reader.join(_END)
    committed = done + CONNECTIONS  # each connection was warmed up by one
    return {"events/s": done / took, "missed": committed - len(seen), "committed": committed}


def loads(where: str, size: int, snapshot: bool, seconds: float) -> Found:
    with opened(where) as app:
        if not where:
            put_in(app, int(size == LOADED), [size])
            app.take_snapshot(UUID(int=size))
        repository = app.repository
        if not snapshot:
            repository.snapshot_store = None
        assert repository.get(UUID(int=size)).version == size
        done = 0
        begun = perf_counter()
        while (now := perf_counter()) < begun + seconds:
            repository.get(UUID(int=size))
            done += 1
        return {"ms": (now - begun) / done * 1000}


def read_all(where: str, streams: int, sizes: Sequence[int], seconds: float) -> Found:
    """All as objects, in pages."""
    with opened(where) as app:
        if not where:
            put_in(app, streams, sizes)
        read = 0
        begun = perf_counter()
        while (now := perf_counter()) < begun + seconds:
            read += _read(app)
        return {"events/s": read / (now - begun)}


def _read(app: Any) -> int:
    start, read = 1, 0
    while True:
        page = app.recorder.select_notifications(start, PAGE)
        for notification in page:
            app.mapper.to_domain_event(notification)
        read += len(page)
        if len(page) < PAGE:
            return read
        start = page[-1].id + 1


class TotalsView(TrackingRecorder, ABC):  # type: ignore[misc]
    @abstractmethod
    def add(self, order: UUID, amount: Decimal, tracking: Tracking) -> None: ...


class PostgresTotals(PostgresTrackingRecorder, TotalsView):  # type: ignore[misc]
    def add(self, order: UUID, amount: Decimal, tracking: Tracking) -> None:
        statement = (
            "INSERT INTO totals AS t (order_id, amount, events) VALUES (%s, %s, 1) "
            "ON CONFLICT (order_id) DO UPDATE SET amount = t.amount + excluded.amount, "
            "events = t.events + 1"
        )
        with self.datastore.transaction(commit=True) as cursor:
            self._insert_tracking(cursor, tracking)
            cursor.execute(statement, (str(order), amount), prepare=True)


class Totals(Projection):  # type: ignore[misc]
    name = "totals"
    handled = 0

    def process_event(self, domain_event: Any, tracking: Tracking) -> None:
        amount = getattr(domain_event, "amount", Decimal(0))
        self.view.add(domain_event.originator_id, amount, tracking)
        self.handled += 1


def catch_up(where: str, seconds: float) -> Found:
    """A projection with SQL, one statement an event, and its tracking: as far as it comes."""
    begun = perf_counter()
    with ProjectionRunner(
        application_class=Application,
        projection_class=Totals,
        view_class=PostgresTotals,
        env=_environment(where),
    ) as runner:
        runner.run_forever(timeout=seconds)
        return {"events/s": runner.projection.handled / (perf_counter() - begun)}


def latency(where: str, writers: int, pause: float, seconds: float) -> Found:
    """From the append to the subscription's reader, in one process."""
    took: list[int] = []
    end = uuid4()
    streams = [uuid4() for _ in range(writers)]

    def send(stream: UUID, version: int, given: int) -> None:
        app.events.put(
            [
                Order.Sent(
                    originator_id=stream,
                    originator_version=version + 1,
                    timestamp=Order.Sent.create_timestamp(),
                    given=given,
                )
            ]
        )

    def writer(number: int) -> int:
        pauses, version = Random(number), 1
        due = perf_counter()
        while perf_counter() < until:
            if pause:
                due += pause * 2 * pauses.random()
                sleep(max(due - perf_counter(), 0))
            send(streams[number], version, monotonic_ns())
            version += 1
        return version - 1

    with opened(where) as app:
        for stream in streams:
            send(stream, 0, 0)
        with app.recorder.subscribe(gt=app.recorder.max_notification_id()) as subscription:

            def follow() -> None:
                for notification in subscription:
                    event = app.mapper.to_domain_event(notification)
                    if event.originator_id == end:
                        return
                    took.append(monotonic_ns() - event.given)

            reader = Thread(target=follow, daemon=True)
            reader.start()
            with ThreadPoolExecutor(writers) as pool:
                until = perf_counter() + seconds
                sent = sum(pool.map(writer, range(writers)))
                took_seconds = perf_counter() - until + seconds
            send(end, 0, 0)
            reader.join(_END)
    took.sort()
    return {
        "p50 ms": took[len(took) // 2] / 1e6,
        "p99 ms": took[len(took) * 99 // 100] / 1e6,
        "missed": sent - len(took),
        "committed": sent,
        "appends/s": sent / took_seconds,
    }


def memory_of_appends(where: str, count: int) -> Found:
    """kB for each of the appends that are all under way, a thread each."""
    with opened(where) as app:
        append(app, uuid4(), 0, 1)
        process = psutil.Process()
        start = highest = process.memory_info().rss

        def one(number: int) -> None:
            nonlocal highest
            append(app, uuid4(), 0, 1)
            if number % 100 == 0:
                highest = max(highest, process.memory_info().rss)

        threads = [Thread(target=one, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {"kB": (max(highest, process.memory_info().rss) - start) / count / 1e3}


def memory_of_a_stream(where: str) -> Found:
    """MB above the start, at the highest, while everything is read in pages."""
    with opened(where) as app:
        process = psutil.Process()
        page = app.recorder.select_notifications(1, 1)
        start = highest = process.memory_info().rss
        while page:
            page = app.recorder.select_notifications(page[-1].id + 1, PAGE)
            for notification in page:
                app.mapper.to_domain_event(notification)
            highest = max(highest, process.memory_info().rss)
        return {"MB": (highest - start) / 1e6}


if __name__ == "__main__":
    operations: Sequence[Callable[..., Found]] = (
        *(schema, fill, appends, followed, loads, read_all, catch_up, latency),
        *(memory_of_appends, memory_of_a_stream),
    )
    serve({operation.__name__: operation for operation in operations})
