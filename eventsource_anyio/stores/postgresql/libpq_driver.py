"""libpq behind the driver contract: natively on asyncio and Trio, by psycopg's low-level bindings.

- libpq never waits here. A call gives it all there is to send and takes what has arrived, until the
  answer has come to its end; in between, anyio waits for the socket.
- A statement is prepared in the flush in which a connection first uses it. How the server wants its
  values is asked once a driver, so its very first use is two round trips.
- A cancelled call is stopped on the server and its answer taken to the end. If it was done already,
  then that is the outcome: cancelled means not done, as long as the connection is not lost with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from functools import partial
from math import inf
from socket import SOCK_STREAM

import anyio
from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint, checkpoint_if_cancelled

from ...cleanup import shielded_cleanup
from .driver import Connection, Driver, DriverError, Row, add_said
from .dsn import parse_dsn

try:
    import psycopg
    from psycopg import pq
    from psycopg.adapt import AdaptersMap, Dumper, Transformer
    from psycopg.conninfo import make_conninfo

    if pq.version() < 170000:  # the first that cancels without blocking
        raise ImportError(f"it has libpq {pq.version() // 10000}, and 17 is needed")
except ImportError as error:
    raise ImportError(
        f"psycopg cannot be used: {error}. PostgreSQLEventStore(driver='psycopg') needs it. It "
        "comes with an extra: pip install 'eventsource-anyio[psycopg]'"
    ) from error

_STOP_WITHIN = 5.0
_PAUSE = 0.02
_BINARY = pq.Format.BINARY
_BAD = pq.ConnStatus.BAD
_GOOD = (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK, pq.ExecStatus.EMPTY_QUERY)
_POLL = pq.PollingStatus
_WAITS = {_POLL.READING: anyio.wait_readable, _POLL.WRITING: anyio.wait_writable}
# libpq keeps the SQLSTATE of a refused connection to itself; the server may speak English.
_REFUSALS = re.compile(
    r"FATAL: +(?:(?P<_28P01>password authentication failed)"
    r"|(?P<_28000>.* authentication failed|(no )?pg_hba\.conf|role .* (does not exist|is not perm))"
    r"|(?P<_3D000>database .* does not exist)|(?P<_57P03>the database system is )"
    r"|(?P<_42704>unrecognized configuration parameter)|(?P<_22023>invalid value for parameter)"
    r"|(?P<_55P02>parameter .* cannot be )|(?P<_42501>permission denied to set parameter)"
    r"|(?P<_53300>sorry, too many clients|too many connections|remaining connection slots))"
)


class _Int4(Dumper):
    oid = 23
    format = _BINARY

    def dump(self, obj: int) -> bytes:
        return obj.to_bytes(4, "big", signed=True)  # psycopg's own cuts off what is too large


_ADAPTERS = AdaptersMap(psycopg.adapters)
_ADAPTERS.register_dumper(None, _Int4)


class LibpqDriver(Driver):
    """Connects as libpq does: DSN, environment, password file, TLS, several hosts."""

    def __init__(self, dsn: str) -> None:
        self._dsn = parse_dsn(dsn)
        self._statements: dict[str, _Statement] = {}

    async def connect(self) -> Connection:
        patience = self._dsn.patience
        with anyio.move_on_after(patience):
            try:
                pgconn = pq.PGconn.connect_start(await self._conninfo())
                try:
                    if pgconn.status == _BAD or not await _polled(pgconn, pgconn.connect_poll):
                        raise _refused(pgconn)
                    pgconn.nonblocking = 1
                except BaseException:
                    pgconn.finish()
                    raise
                return _Connection(pgconn, self._statements)
            except psycopg.Error as error:
                raise DriverError(str(error), lost=True) from error
        raise DriverError(f"there was no answer within {patience:g} s", lost=True)

    async def _conninfo(self) -> bytes:
        """The DSN with the addresses of its hosts. libpq would look them up too, but block."""
        given = self._dsn.for_libpq()
        if "host" in given and "hostaddr" not in given:
            hosts = [
                (name, address, port)
                for name, port in zip(
                    given["host"].split(","), given["port"].split(","), strict=True
                )
                for address in await _addresses(name)
            ]
            if not hosts:
                raise DriverError(f"{given['host']}: no address is known", lost=True)
            given["host"], given["hostaddr"], given["port"] = map(
                ",".join, zip(*hosts, strict=True)
            )
        return make_conninfo("", **given).encode()


async def _addresses(name: str) -> Iterable[str]:
    if not name or name.startswith(("/", "@")):
        return [""]  # a Unix socket
    with suppress(OSError, UnicodeError):
        found = await anyio.getaddrinfo(name, None, type=SOCK_STREAM)
        return dict.fromkeys(str(address[0]) for *_, address in found)
    return ()


async def _polled(connection: pq.abc.PGconn | pq.abc.PGcancelConn, poll: Callable[[], int]) -> bool:
    state = _POLL.WRITING
    while wait := _WAITS.get(state):
        await wait(connection.socket)  # the next one may be of another host
        state = _POLL(poll())
    return state == _POLL.OK


class _Statement:
    """What the server said of a statement; it holds in any connection."""

    def __init__(self, name: bytes, sql: bytes, described: pq.abc.PGresult) -> None:
        self.name = name
        self.sql = sql
        self.types = [described.param_type(number) for number in range(described.nparams)]
        self.formats = [_BINARY] * len(self.types)
        self._adapter = Transformer(_ADAPTERS)  # without a connection, so times are in UTC
        self._adapter.set_dumper_types(self.types, _BINARY)

    def dump(self, values: Sequence[object]) -> Sequence[pq.abc.Buffer | None]:
        if len(values) != len(self.types):  # psycopg would read beyond its list
            raise TypeError(f"{len(self.types)} values are needed, not {len(values)}")
        return self._adapter.dump_sequence(values, ())

    def load(self, result: pq.abc.PGresult) -> Sequence[Row]:
        self._adapter.set_pgresult(result)
        rows = self._adapter.load_rows(0, result.ntuples, tuple)
        self._adapter.set_pgresult(None)  # it is not kept
        return rows


class _Connection(Connection):
    def __init__(self, pgconn: pq.abc.PGconn, statements: dict[str, _Statement]) -> None:
        self._pgconn = pgconn
        self._statements = statements
        self._prepared: set[bytes] = set()

    @property
    def usable(self) -> bool:
        with suppress(psycopg.Error):
            self._pgconn.consume_input()  # why the server closed it, if it did
            self._pgconn.consume_input()  # and that it did
        return self._pgconn.status != _BAD

    async def fetch(self, statement: str, *values: object) -> Sequence[Row]:
        await checkpoint_if_cancelled()
        pgconn = self._pgconn
        try:
            known = self._statements.get(statement) or await self._describe(statement)
            dumped = known.dump(values)
            new = b"" if known.name in self._prepared else known.name
            prepare = partial(pgconn.send_prepare, new, known.sql, known.types)
            send = partial(pgconn.send_query_prepared, known.name, dumped, known.formats, _BINARY)
            *_, result = await self._answer(*([prepare, send] if new else [send]), new=new)
            return known.load(result)
        except DriverError:
            raise
        except Exception as error:
            raise DriverError(f"{type(error).__name__}: {error}") from error

    async def _describe(self, statement: str) -> _Statement:
        sql = statement.encode()
        prepare = partial(self._pgconn.send_prepare, b"", sql)
        describe = partial(self._pgconn.send_describe_prepared, b"")
        *_, described = await self._answer(prepare, describe)
        known = _Statement(b"es_%d" % len(self._statements), sql, described)
        return self._statements.setdefault(statement, known)

    async def run(self, script: str) -> None:
        await checkpoint_if_cancelled()
        await self._answer(partial(self._pgconn.send_query, script.encode()), pipeline=False)

    async def listen(self, channel: str) -> None:
        await self.run('LISTEN "{}"'.format(channel.replace('"', '""')))

    async def heard(self) -> AbstractSet[str]:
        await checkpoint()
        said = set[str]()
        with suppress(psycopg.Error, anyio.ClosedResourceError):
            while not self._take_said(said):
                await anyio.wait_readable(self._pgconn.socket)
                self._pgconn.consume_input()
        return said

    def _take_said(self, said: set[str]) -> bool:
        while notification := self._pgconn.notifies():
            add_said(said, notification.extra.decode(errors="replace"))
        return bool(said)

    async def close(self) -> None:
        self.abandon()  # libpq says good-bye, as far as it can without waiting
        await cancel_shielded_checkpoint()

    def abandon(self) -> None:
        with suppress(psycopg.Error):
            anyio.notify_closing(self._pgconn.socket)
        self._pgconn.finish()

    async def _answer(
        self, *sends: Callable[[], None], new: bytes = b"", pipeline: bool = True
    ) -> list[pq.abc.PGresult]:
        """Send, and take the results up to the end; the first is that of preparing `new`."""
        results: list[pq.abc.PGresult] = []
        lost: Exception | None = None
        try:
            if pipeline:
                sends = (self._pgconn.enter_pipeline_mode, *sends, self._pgconn.pipeline_sync)
            else:
                self._pgconn.exit_pipeline_mode()
            for send in sends:
                send()
            await self._gather(results)
        except Exception as error:  # noqa: BLE001  (raised below, if the server did not say why)
            lost = error
            self.abandon()
        except BaseException as error:
            done = await self._stop(results) and all(result.status in _GOOD for result in results)
            cancelled = isinstance(error, anyio.get_cancelled_exc_class())
            if not (done and cancelled and anyio.current_effective_deadline() == -inf):
                raise
        finally:
            if new and results and results[0].status in _GOOD:
                self._prepared.add(new)
        for result in results:
            if result.status not in _GOOD:
                raise _failed(result, lost=lost is not None) from lost
        if lost is not None:
            raise DriverError(str(lost), lost=True) from lost
        return results

    async def _gather(self, results: list[pq.abc.PGresult]) -> None:
        """Send the rest and take results up to the end; once more, if it was cancelled."""
        while self._pgconn.flush():
            with anyio.move_on_after(_PAUSE):  # or the server waits for us to read, as libpq does
                await anyio.wait_writable(self._pgconn.socket)
        while not self._take(results):
            await anyio.wait_readable(self._pgconn.socket)
            self._pgconn.consume_input()

    def _take(self, results: list[pq.abc.PGresult]) -> bool:
        """Take the results that have arrived; true at the end."""
        while not self._pgconn.is_busy():
            result = self._pgconn.get_result()
            if result is not None and result.status != pq.ExecStatus.PIPELINE_SYNC:
                results.append(result)
            elif result is not None or self._pgconn.pipeline_status == pq.PipelineStatus.OFF:
                return True
            elif self._pgconn.status == _BAD:
                raise psycopg.OperationalError(self._pgconn.get_error_message())
        return False

    async def _stop(self, results: list[pq.abc.PGresult]) -> bool:
        """Have the server stop, and take the answer to its end; false if the connection is lost."""
        ended, pause = False, 0.0
        try:
            with shielded_cleanup(), anyio.move_on_after(_STOP_WITHIN), suppress(Exception):
                while not ended:
                    self._pgconn.consume_input()
                    with anyio.move_on_after(pause):
                        await self._gather(results)
                        ended = True
                    if not ended:
                        # The server forgets the request if it has not got the statement yet.
                        cancel = self._pgconn.cancel_conn()
                        cancel.start()
                        if not await _polled(cancel, cancel.poll):
                            break
                        pause = 2 * pause or _PAUSE
        finally:
            if not ended:
                self.abandon()
        return ended


def _refused(pgconn: pq.abc.PGconn) -> DriverError:
    refusal = _REFUSALS.search(pgconn.error_message.decode(errors="replace"))
    known = "_28P01" if pgconn.needs_password else refusal and refusal.lastgroup
    return DriverError(pgconn.get_error_message(), known[1:] if known else "", lost=True)


def _failed(result: pq.abc.PGresult, *, lost: bool) -> DriverError:
    codes = pq.DiagnosticField
    sqlstate, message, detail = (
        (result.error_field(code) or b"").decode(errors="replace")
        for code in (codes.SQLSTATE, codes.MESSAGE_PRIMARY, codes.MESSAGE_DETAIL)
    )
    message = (message or result.get_error_message()) + (f" ({detail})" if detail else "")
    return DriverError(message, sqlstate, lost=lost)
