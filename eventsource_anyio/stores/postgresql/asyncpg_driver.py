"""asyncpg behind the driver contract, on asyncio and, by the guest, on Trio."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Protocol, cast

import anyio
from anyio.lowlevel import checkpoint_if_cancelled

from ...cleanup import shielded_cleanup
from .driver import Connection, Driver, DriverError, Row, add_said
from .dsn import parse_dsn

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from ...guest import Guest


_GRACE = 0.5
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_FIRST, _LAST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)


class RawConnection(Protocol):
    """What is used of `asyncpg.Connection`, which has no types."""

    def fetch(self, query: str, *args: object) -> Coroutine[object, object, list[Row]]: ...
    def execute(self, query: str) -> Coroutine[object, object, str]: ...
    def add_listener(
        self, channel: str, callback: Callable[..., None]
    ) -> Coroutine[object, object, None]: ...
    def set_type_codec(
        self,
        typename: str,
        *,
        schema: str,
        encoder: Callable[..., object],
        decoder: Callable[..., object],
        format: str,  # noqa: A002  (asyncpg's)
    ) -> Coroutine[object, object, None]: ...
    def add_termination_listener(self, callback: Callable[..., None]) -> None: ...
    def is_closed(self) -> bool: ...
    def is_in_transaction(self) -> bool: ...
    def close(self, *, timeout: float | None = None) -> Coroutine[object, object, None]: ...
    def terminate(self) -> None: ...


Connect = Callable[[], Coroutine[object, object, RawConnection]]


def connect_by_dsn(dsn: str) -> Connect:
    try:
        import asyncpg  # type: ignore[import-untyped]  # pyright: ignore[reportMissingTypeStubs]
    except ImportError as error:
        raise _missing("asyncpg") from error
    connect = cast("Callable[..., Coroutine[object, object, RawConnection]]", asyncpg.connect)  # pyright: ignore[reportUnknownMemberType]
    parsed = parse_dsn(dsn)
    parsed.check_for_asyncpg()

    def connect_now() -> Coroutine[object, object, RawConnection]:
        plain, settings = parsed.for_asyncpg()
        return connect(plain, server_settings=settings, timeout=parsed.patience)

    return connect_now


def check_engine(engine: AsyncEngine) -> None:
    if not hasattr(engine, "sync_engine") or engine.dialect.driver != "asyncpg":
        raise TypeError(
            f"the store is given a DSN or an AsyncEngine of SQLAlchemy on asyncpg, not {engine!r}: "
            "create_async_engine('postgresql+asyncpg://…')"
        )


def connect_by_engine(engine: AsyncEngine) -> Connect:
    """Connections made by an engine, with all that it was configured with, and then our own."""

    async def connect() -> RawConnection:
        pooled = await engine.raw_connection()
        raw: Any = pooled.driver_connection
        pooled.detach()
        return raw  # type: ignore[no-any-return]

    return connect


def engine_by_dsn(dsn: str, size: int) -> AsyncEngine:
    """An engine for transactions with SQL in them."""
    try:
        from sqlalchemy.ext.asyncio import create_async_engine
    except ImportError as error:
        raise _missing("sqlalchemy") from error
    return create_async_engine(
        "postgresql+asyncpg://", async_creator=connect_by_dsn(dsn), pool_size=size
    )


def _missing(package: str) -> ImportError:
    return ImportError(
        f"{package} is not installed, which PostgreSQLEventStore needs. It comes with an extra: "
        "pip install 'eventsource-anyio[postgresql]'"
    )


class AsyncpgDriver(Driver):
    def __init__(self, guest: Guest, connect: Connect) -> None:
        self._guest = guest
        self._connect = connect

    async def connect(self) -> Connection:
        connecting, grace = anyio.CancelScope(shield=True), anyio.CancelScope(shield=True)
        outcome: RawConnection | Exception | None = None
        # asyncpg, cancelled while it talks about TLS, complains to the event loop. So a cancelled
        # caller gives it a moment to finish.
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_cancel_later, connecting, grace)
                with connecting:
                    try:
                        outcome = await self._guest.run(self._connected())
                    except Exception as error:  # noqa: BLE001  (raised below, outside the group)
                        outcome = error
                grace.cancel()  # it is over: nobody need wait for it
                tasks.cancel_scope.cancel()
        except BaseException:
            if outcome is not None and not isinstance(outcome, Exception):
                _Connection(self._guest, outcome).abandon()
            raise
        if isinstance(outcome, Exception) or outcome is None:
            await checkpoint_if_cancelled()
            failed = outcome or TimeoutError("the connection attempt was given up")
            raise translated(failed, lost=True) from failed
        return _Connection(self._guest, outcome)

    async def _connected(self) -> RawConnection:
        raw = await self._connect()
        # Nothing is awaited here.
        await raw.set_type_codec(
            "timestamptz",
            schema="pg_catalog",
            encoder=_microseconds,
            decoder=_Moments(),
            format="tuple",
        )
        return raw


def _microseconds(moment: datetime) -> tuple[int]:
    return ((moment - _EPOCH) // _MICROSECOND,)


class _Moments:
    """Makes the moments of rows, of which those beside each other have often been stored together:
    asyncpg's own way takes half of the time that it takes to read an event."""

    __slots__ = ("_known", "_moment")

    def __init__(self) -> None:
        self._known = (0,)
        self._moment = _EPOCH

    def __call__(self, microseconds: tuple[int]) -> datetime:
        if microseconds != self._known:
            try:
                self._moment = _EPOCH + timedelta(0, 0, microseconds[0])
            except OverflowError:
                self._moment = _LAST if microseconds[0] > 0 else _FIRST  # as asyncpg has them
            self._known = microseconds
        return self._moment


async def _cancel_later(connecting: anyio.CancelScope, grace: anyio.CancelScope) -> None:
    try:
        await anyio.sleep_forever()
    finally:
        with grace:
            await anyio.sleep(_GRACE)
        connecting.cancel()


class _Connection(Connection):
    def __init__(self, guest: Guest, raw: RawConnection) -> None:
        self._guest = guest
        self._raw = raw
        self._heard = anyio.Event()
        self._said: set[str] = set()
        self._abandoned = False

    @property
    def usable(self) -> bool:
        return not (self._abandoned or self._raw.is_closed())

    async def fetch(self, statement: str, *values: object) -> Sequence[Row]:
        try:
            return await self._guest.run(self._raw.fetch(statement, *values))
        except Exception as error:
            raise self._failure(error) from error

    async def run(self, script: str) -> None:
        try:
            await self._guest.run(self._raw.execute(script))
        except Exception as error:
            raise self._failure(error) from error

    async def listen(self, channel: str) -> None:
        try:
            await self._guest.run(self._raw.add_listener(channel, self._notified))
        except Exception as error:
            raise self._failure(error) from error
        self._raw.add_termination_listener(self._notified)

    def _notified(self, _: object, *about: object) -> None:
        if about:  # by whom, where, what; or it is closed
            add_said(self._said, cast("str", about[-1]))
        self._heard.set()

    async def heard(self) -> AbstractSet[str]:
        await self._heard.wait()
        if self.usable:
            self._heard = anyio.Event()
        said, self._said = self._said, set()
        return said

    async def close(self) -> None:
        with shielded_cleanup():
            try:
                await self._guest.run(self._raw.close(timeout=5))
            except Exception:  # noqa: BLE001  (it is gone, which is what was asked for)
                self.abandon()

    def abandon(self) -> None:
        self._abandoned = True
        with suppress(RuntimeError):  # the guest's loop was closed, and the connection with it
            self._guest.loop.call_soon_threadsafe(self._raw.terminate)

    def _failure(self, error: Exception) -> DriverError:
        # asyncpg, told of its end in the middle of something, may only say that it is confused.
        confused = getattr(error, "sqlstate", None) is None
        failure = translated(error, lost=confused or self._raw.is_closed())
        if failure.lost:
            self.abandon()
        return failure


def translated(error: Exception, *, lost: bool) -> DriverError:
    sqlstate: object = getattr(error, "sqlstate", None)
    detail: object = getattr(error, "detail", None)
    message = str(error) or type(error).__name__
    # SQLAlchemy's adapter has it one further down.
    original: object = getattr(error, "orig", None)
    if sqlstate is None and isinstance(original, Exception):
        return translated(original, lost=lost)
    if isinstance(sqlstate, str):
        if detail:
            message = f"{message} ({detail})"
        return DriverError(message, sqlstate, lost=lost or sqlstate.startswith(("08", "57P")))
    return DriverError(f"{type(error).__name__}: {message}", lost=lost)
