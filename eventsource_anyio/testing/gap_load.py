"""The processes of the gap stress test: those that append, in every way there is, and subscribers.

    python -m eventsource_anyio.testing.gap_load

Each is told a line, a `Setup`, says that it is ready by a record of zeros, and waits for another
line, the time at which all begin. Then it says a record for each event: its position, version and
id. Where an appender says 0 for both numbers, the event must not be stored. It ends when it has
done its work, or when its standard input ends.

What has an unknown outcome is done again, with the same event ids, until it is known. So of each
event it is known that it is stored, and where, or that it is not.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from functools import partial
from random import Random
from struct import Struct
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar
from uuid import uuid4

import anyio
import anyio.from_thread
import attrs
import msgspec
from anyio.abc import Process
from anyio.lowlevel import current_token

from ..cleanup import shielded_cleanup
from ..errors import ConcurrencyError, StorageError
from ..events import NewEvent
from ..stores.interface import ANY, NO_STREAM, STREAM_EXISTS, AppendResult
from ..stores.postgresql import PostgreSQLEventStore
from ..stores.postgresql.asyncpg_driver import AsyncpgDriver, connect_by_dsn, engine_by_dsn
from ..stores.postgresql.driver import DriverError
from ..stores.postgresql.schema import Schema
from ..stores.postgresql.statements import Statements
from ..stores.postgresql.writing import append_together
from ..stores.records import encode_append
from .samples import Happened

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

T = TypeVar("T")
Events: TypeAlias = Sequence[NewEvent]
Record: TypeAlias = tuple[int, int, bytes]  # position, version, event id
Results: TypeAlias = Sequence[AppendResult]
Appends: TypeAlias = Sequence[tuple[str, Events]]  # to a stream each

RECORD = Struct(">qq16s")
NOTHING = bytes(16)
# Events of aggregates of the second type are stored together with a row of the user's each.
PLAIN, WITH_ROW = "Plain", "WithRow"
_SHARED = ("shared1", "shared2", "shared3")
_PAUSE = 0.01
_SPARSE = 0.3
_TRIES = 1000  # after which an outcome that is still unknown is an error


@attrs.frozen
class Setup:
    """What a process is told; not by its arguments, which anybody on the machine can read."""

    role: str
    loop: str
    dsn: str
    schema: str
    seconds: float
    tasks: int
    transactions: int
    hold: float
    poll_every: float


class Child:
    """A process, seen from outside, and what it said."""

    def __init__(self, setup: Setup, process: Process) -> None:
        self.setup = setup
        self.process = process
        self.ended = self.stalled = False
        self._said = bytearray()
        self._heard = anyio.Event()

    async def listen(self) -> None:
        assert self.process.stdout is not None
        async for said in self.process.stdout:
            self._said += said
            self._heard.set()
        if await self.process.wait():
            raise RuntimeError(f"{self} failed; it said why on the standard error")
        self.ended = True
        self._heard.set()

    async def tell(self, line: bytes) -> None:
        assert self.process.stdin is not None
        with suppress(anyio.BrokenResourceError):  # it failed: `listen` raises
            await self.process.stdin.send(line + b"\n")

    async def until(self, position: int, patience: float) -> bool:
        """Whether it gets that far, or ends; it may be silent for `patience` seconds."""
        while not self.ended:
            last = len(self._said) // RECORD.size - 1
            if last >= 0 and RECORD.unpack_from(self._said, last * RECORD.size)[0] >= position:
                break
            with anyio.move_on_after(patience) as waiting:
                await self._heard.wait()
            if waiting.cancelled_caught:
                self.stalled = True
                return False
            self._heard = anyio.Event()
        return True

    def records(self) -> list[Record]:
        """What it said, but for the first: that it is ready."""
        return list(RECORD.iter_unpack(self._said))[1:]

    def __str__(self) -> str:
        return f"the process that {self.setup.role}s on {self.setup.loop}"


def _say(records: Iterable[Record]) -> None:
    try:
        # It blocks, if the parent does not read; but the parent does.
        os.write(1, b"".join(RECORD.pack(*record) for record in records))
    except BrokenPipeError:
        os._exit(1)  # the parent is gone, and nobody is interested any more


async def _work(setup: Setup) -> None:
    store = PostgreSQLEventStore(
        setup.dsn, schema=setup.schema, connections=3, poll_every=setup.poll_every
    )
    with anyio.CancelScope() as scope:
        async with store:
            _say([(0, 0, NOTHING)])
            if not (began := await anyio.to_thread.run_sync(sys.stdin.buffer.readline)):
                return
            cancel = partial(anyio.from_thread.run_sync, scope.cancel, token=current_token())
            threading.Thread(target=_at_end_of_input, args=(cancel,), daemon=True).start()
            if setup.role == "append":
                await _append(setup, store, float(began))
            else:
                await _subscribe(store)


def _at_end_of_input(call: Callable[[], object]) -> None:
    while os.read(0, 1):
        pass
    with suppress(anyio.RunFinishedError):
        call()


async def _subscribe(store: PostgreSQLEventStore) -> None:
    after = 0
    while True:
        async with store.subscribe(after=after) as subscription:
            for _ in range(1000):  # then another subscription, from where this one is
                try:
                    stored = await anext(subscription)
                except StorageError:
                    await anyio.sleep(_PAUSE)
                else:
                    _say([(stored.position, stored.version, stored.event_id.bytes)])
            after = subscription.position


async def _append(setup: Setup, store: PostgreSQLEventStore, began: float) -> None:
    engine = engine_by_dsn(setup.dsn, setup.transactions)
    writer = _Writer(setup, store, engine, began)
    async with anyio.create_task_group() as tasks:
        for _ in range(setup.tasks):
            tasks.start_soon(writer.append)
        for _ in range(setup.transactions):
            tasks.start_soon(writer.transact)
    await store.guest.run(engine.dispose())


class _RollBackError(Exception):
    """What a user's block raises to roll back."""


class _Writer:
    def __init__(
        self, setup: Setup, store: PostgreSQLEventStore, engine: AsyncEngine, began: float
    ) -> None:
        import asyncpg  # type: ignore[import-untyped]  # pyright: ignore[reportMissingTypeStubs]
        from sqlalchemy import text
        from sqlalchemy.exc import SQLAlchemyError

        # SQLAlchemy lets asyncpg's own through, where a new connection is lost at once.
        driver: Any = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
        self._sql_errors: tuple[type[Exception], ...] = (SQLAlchemyError, OSError, *driver)
        self._store = store
        self._engine = engine
        self._driver = AsyncpgDriver(store.guest, connect_by_dsn(setup.dsn))
        self._statements = Statements(Schema(setup.schema))
        insert = self._statements.schema.sql(
            "INSERT INTO es.gap_stress VALUES ({}) ON CONFLICT DO NOTHING"
        )
        self._insert, self._insert_raw = text(insert.format(":id")), insert.format("$1")
        self._random = Random()  # noqa: S311  (no secret)
        self._hold = setup.hold
        self._began = began
        self._until = anyio.current_time() + setup.seconds

    async def _known(self, call: Callable[[], Awaitable[T]]) -> T:
        """What it returns, called again as long as the outcome is not known."""
        for left in reversed(range(_TRIES)):
            try:
                return await call()
            except (StorageError, DriverError):
                if not left:
                    raise
            await anyio.sleep(_PAUSE)
        raise AssertionError

    async def _sql(self, coroutine: Coroutine[object, object, T]) -> T:
        """Run what is the user's, not the store's, and so raises other errors."""
        try:
            return await self._store.guest.run(coroutine)
        except self._sql_errors as error:
            raise DriverError(str(error)) from error

    def _events(self) -> Events:
        return [NewEvent(Happened(number)) for number in range(self._random.randint(1, 5))]

    async def append(self) -> None:
        """Append to a stream of its own, to shared and to new ones, one or two at once."""
        random, own = self._random, str(uuid4())
        versions = {own: 0}
        while anyio.current_time() < self._until:
            if self._holding() < 0:
                await self._sleep(_SPARSE * random.random())
            (stream,) = random.choices((own, random.choice(_SHARED), str(uuid4())), (7, 1, 2))
            events = self._events()
            version = versions.get(stream)
            expected = random.choice((ANY, NO_STREAM if version is None else version))
            if version and stream != own:
                expected = random.choice((expected, STREAM_EXISTS))
            append = partial(self._store.append_events, stream, PLAIN, events, expected)
            try:
                if random.random() < 0.05:
                    appends = ((stream, events), (random.choice(_SHARED), self._events()))
                    results = await self._known(partial(self._together, appends))
                else:
                    results = [await self._known(append)]
            except ConcurrencyError as error:
                versions[stream] = error.actual
                _say_undone(events)
            else:
                versions[stream] = results[0].version
                _say_done(results)

    async def _together(self, appends: Appends) -> Results:
        async with self._store.transaction() as tx:
            for stream, events in appends:
                await tx.append_events(stream, PLAIN, events, ANY)
        return tx.results

    async def transact(self) -> None:
        """Transactions of a user, each with several appends, and with rows of its own.

        Some are rolled back, all of them have a part that is.
        """
        random, own = self._random, (str(uuid4()), str(uuid4()))
        kinds = (self._in_block, self._in_session, self._in_raw)
        while anyio.current_time() < self._until:
            if (holding := self._holding()) < 0:
                await self._sleep(self._hold + holding)
            streams = sorted({*own, random.choice(_SHARED)})[: random.randint(1, 3)]
            appends = [(stream, self._events()) for stream in streams]
            undone, commit = self._events(), random.random() < 0.8
            unit = partial(random.choice(kinds), appends, (own[0], undone), commit=commit)
            _say_done(await self._known(unit))
            _say_undone(undone)
            if not commit:
                for _, events in appends:
                    _say_undone(events)

    def _holding(self) -> float:
        """For how long appends may be held from now on, the same in all processes.

        Half of the time it is negative, and grows until they may be: as long as an append is held,
        readers wait for it, and would not miss one whose gap is as short as it can be.
        """
        return self._hold - (time.time() - self._began) % (2 * self._hold)

    async def _sleep(self, seconds: float) -> None:
        await anyio.sleep(max(0, min(seconds, self._until - anyio.current_time())))

    async def _pause(self) -> None:
        await self._sleep(min(self._holding(), self._hold * self._random.random() ** 2))

    async def _in_block(
        self, appends: Appends, undone: tuple[str, Events], *, commit: bool
    ) -> Results:
        """In the store's own transaction, with SQL in it."""
        with suppress(_RollBackError):
            async with self._store.transaction() as tx:
                for stream, events in appends:
                    rows = [{"id": one.event_id} for one in events]
                    await self._sql(tx.session.execute(self._insert, rows))
                    await tx.append_events(stream, WITH_ROW, events, ANY)
                    await self._pause()
                if not commit:
                    raise _RollBackError
            return tx.results
        return ()

    async def _in_session(
        self, appends: Appends, undone: tuple[str, Events], *, commit: bool
    ) -> Results:
        """In a session, with a savepoint, and a pause after each append."""
        from sqlalchemy.ext.asyncio import AsyncSession

        session = AsyncSession(self._engine)
        results: list[AppendResult] = []
        try:
            for append in appends:
                results += await self._within(session, *append)
                await self._pause()
            savepoint = session.begin_nested()
            await self._sql(savepoint.start())
            await self._within(session, *undone)
            await self._sql(savepoint.rollback())
            await self._pause()
            await self._sql(session.commit() if commit else session.rollback())
        finally:
            with shielded_cleanup():
                await self._sql(session.close())
        return results if commit else ()

    async def _within(self, session: AsyncSession, stream: str, events: Events) -> Results:
        rows = [{"id": one.event_id} for one in events]
        await self._sql(session.execute(self._insert, rows))
        async with self._store.transaction(within=session) as tx:
            await tx.append_events(stream, WITH_ROW, events, ANY)
        return tx.results

    async def _in_raw(
        self, appends: Appends, undone: tuple[str, Events], *, commit: bool
    ) -> Results:
        """In a connection of asyncpg, by the library's own statement."""
        connection = await self._driver.connect()
        results: list[AppendResult] = []

        async def append(stream: str, events: Events) -> Results:
            for one in events:
                await connection.fetch(self._insert_raw, one.event_id)
            step = encode_append(stream, WITH_ROW, events, ANY, None)
            found = await append_together(connection.fetch, self._statements, [step], wait=True)
            assert found is not None  # it waits
            return found

        try:
            isolation = self._random.choice(("READ COMMITTED", "REPEATABLE READ"))
            await connection.run(f"BEGIN ISOLATION LEVEL {isolation}")
            for one in appends:
                results += await append(*one)
                await self._pause()
            await connection.run("SAVEPOINT undone")
            await append(*undone)
            await connection.run("ROLLBACK TO undone")
            await self._pause()
            await connection.run("COMMIT" if commit else "ROLLBACK")
        finally:
            await connection.close()
        return results if commit else ()


def _say_done(results: Results) -> None:
    events = [stored for result in results for stored in result.events]
    _say((stored.position, stored.version, stored.event_id.bytes) for stored in events)


def _say_undone(events: Events) -> None:
    _say((0, 0, event.event_id.bytes) for event in events)


def main() -> None:
    if line := sys.stdin.buffer.readline():
        setup = msgspec.json.decode(line, type=Setup)
        options = {"use_uvloop": setup.loop == "uvloop"} if setup.loop != "trio" else {}
        backend = "trio" if setup.loop == "trio" else "asyncio"
        anyio.run(_work, setup, backend=backend, backend_options=options)


if __name__ == "__main__":
    main()
