"""Connections to Redis that own no task: requests and replies, in the caller's own.

coredis speaks the protocol (its parser, its errors, its URLs). Its client is not used: each of its
connections is two tasks in a task group around the caller's code, which dies with the caller's
scope, before clean-up could use it, and turns errors into groups.

- A connection is used by one call at a time. One whose call was cancelled or failed is closed: what
  it would answer belongs to nobody.
- An idle connection has nothing to read. One that has was closed by the server, and is not used.
- Everything that fails is a `StorageError`, which says whether anything may have been done.
"""

from __future__ import annotations

import select
import sys
from collections.abc import Mapping, Sequence
from hashlib import sha1
from ssl import SSLContext, create_default_context
from typing import TypeAlias, cast

import anyio
from anyio.abc import ByteStream, SocketAttribute

from ..cleanup import shielded_cleanup
from ..errors import StorageError, StoreClosedError

try:
    from coredis.exceptions import NoScriptError, RedisError
    from coredis.parser import NotEnoughData, Parser
    from coredis.pool import ConnectionPool
except ImportError as error:  # pragma: no cover - coredis is there where this is tested
    raise ImportError(
        "RedisEventBus needs coredis, which is not installed.\n"
        "  It is an extra, so that the library stays small for those who do without.\n"
        "  pip install 'eventsource-anyio[redis]'"
    ) from error

Argument: TypeAlias = str | bytes | int
Command: TypeAlias = tuple[Argument, ...]
Reply: TypeAlias = "bytes | int | list[Reply] | RedisError | None"

_FAILURES = (
    *(OSError, anyio.BrokenResourceError, anyio.ClosedResourceError),
    *(anyio.EndOfStream, anyio.IncompleteRead),
)
_CONNECT, _ANSWER = 10.0, 30.0  # seconds
_IDLE = 16
_RECEIVED_AT_ONCE = 1 << 18


class Script:
    """Lua that is sent once, and then called by its hash."""

    __slots__ = ("sha", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = sha1(text.encode(), usedforsecurity=False).hexdigest()


class RedisConnections:
    """Those to one server, made when there is need of them."""

    def __init__(self, url: str, user: str = "RedisEventBus") -> None:
        if not url.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError(
                "url must begin with redis://, rediss:// or unix://, such as "
                f"redis://:password@host:6379/0, not {url.partition(':')[0]!r}"
            )
        pool = ConnectionPool.from_url(url, decode_components=True)
        given = cast("Mapping[str, object]", pool.connection_kwargs)
        location = pool.location
        self._path = cast("str | None", getattr(location, "path", None))
        self._address = (
            cast("str", getattr(location, "host", "")),
            cast("int", getattr(location, "port", 0)),
        )
        context = given.get("ssl_context")
        if context is not None and "ssl_" not in url:
            context = create_default_context()  # coredis would not check the host's name
        self._ssl = cast("SSLContext | None", context)
        self._handshake = _handshake(given)
        self.name = self._path or f"{self._address[0]}:{self._address[1]}"
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()
        self._user = user
        self._open = False

    def open(self) -> None:
        self._open = True

    async def close(self) -> None:
        """Whoever waits for an answer is told by `StoreClosedError`."""
        self._open = False
        with shielded_cleanup():
            while self._idle:
                await self._idle.pop().close()
            for connection in tuple(self._busy):
                await connection.close()

    async def call(self, *commands: Command, wait: float = 0.0) -> list[Reply]:
        """The answers to some commands that are sent together; `wait` is for how long they block.

        `StorageError` if one of them is an error, after all were done.
        """
        replies = await self._call(commands, wait)
        for reply in replies:
            if isinstance(reply, RedisError):
                raise self._refused(reply)
        return replies

    async def run(self, script: Script, keys: Sequence[str], *arguments: Argument) -> Reply:
        """The answer of a script."""
        rest = (len(keys), *keys, *arguments)
        (reply,) = await self._call((("EVALSHA", script.sha, *rest),), 0.0)
        if isinstance(reply, NoScriptError):
            (reply,) = await self._call((("EVAL", script.text, *rest),), 0.0)
        if isinstance(reply, RedisError):
            raise self._refused(reply)
        return reply

    async def _call(self, commands: Sequence[Command], wait: float) -> list[Reply]:
        if not self._open:
            raise StoreClosedError(self._user)
        connection = await self._take()
        self._busy.add(connection)
        done = False
        try:
            with anyio.fail_after(wait + _ANSWER):
                replies = await connection.call(commands)
            done = True
        except _FAILURES as error:
            if not self._open:
                raise StoreClosedError(self._user) from None
            raise StorageError(
                f"Redis at {self.name} does not answer: {_text(error)}.\n"
                "  The connection was lost; whether the call was done is not known.\n"
                "  Make it again: what is published twice is received once."
            ) from error
        finally:
            self._busy.discard(connection)
            if done and self._open and len(self._idle) < _IDLE:
                self._idle.append(connection)
            else:
                await connection.close()
        return replies

    async def _take(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_alive():
                return connection
            await connection.close()
        try:
            with anyio.fail_after(_CONNECT):
                connection = _Connection(await self._connect())
        except _FAILURES as error:
            raise StorageError(
                f"Redis at {self.name} cannot be reached: {_text(error)}.\n"
                "  Nothing of this call was done.\n"
                "  Check the URL, and whether the server is running."
            ) from error
        done = False
        try:
            if self._handshake:
                with anyio.fail_after(_CONNECT):
                    replies = await connection.call(self._handshake)
                for reply in replies:
                    if isinstance(reply, RedisError):
                        raise self._refused(reply)
            done = True
        except _FAILURES as error:
            raise StorageError(
                f"Redis at {self.name} does not let us in: {_text(error)}.\n"
                "  Nothing of this call was done.\n"
                "  Check the URL: its user, password and database."
            ) from error
        finally:
            if not done:
                await connection.close()
        return connection

    async def _connect(self) -> ByteStream:
        if self._path is not None:
            return await anyio.connect_unix(self._path)
        host, port = self._address
        if self._ssl is None:
            return await anyio.connect_tcp(host, port)
        return await anyio.connect_tcp(
            host, port, ssl_context=self._ssl, tls=True, tls_standard_compatible=False
        )

    def _refused(self, error: RedisError) -> StorageError:
        failure = StorageError(
            f"Redis at {self.name} refuses: {type(error).__name__}: {error}.\n"
            "  The call was not done, or not all of it.\n"
            "  Mend what the server says, and make the call again."
        )
        failure.__cause__ = error
        return failure


class _Connection:
    __slots__ = ("_closed", "_parser", "_socket", "_stream")

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._parser = Parser()
        self._socket = stream.extra(SocketAttribute.raw_socket)  # noqa: S610 - no Django
        self._closed = False

    async def call(self, commands: Sequence[Command]) -> list[Reply]:
        await self._stream.send(b"".join(map(_packed, commands)))
        replies: list[Reply] = []
        parse, count = self._parser.parse, len(commands)
        while True:
            while len(replies) < count and not isinstance(parsed := parse(), NotEnoughData):
                replies.append(cast("Reply", parsed[1]))
            if len(replies) == count:
                return replies
            self._parser.feed(await self._stream.receive(_RECEIVED_AT_ONCE))

    def is_alive(self) -> bool:
        """Whether there is nothing to read, not even an end."""
        if self._closed:
            return False
        if sys.platform == "win32":
            return not select.select([self._socket], [], [], 0)[0]
        look = select.poll()
        look.register(self._socket.fileno(), select.POLLIN)
        return not look.poll(0)

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            await anyio.aclose_forcefully(self._stream)


def _handshake(given: Mapping[str, object]) -> Sequence[Command]:
    commands: list[Command] = []
    username, password = given.get("username"), given.get("password")
    if password is not None:
        account = (username, password) if username is not None else (password,)
        commands.append(("AUTH", *cast("tuple[str, ...]", account)))
    if given.get("db"):
        commands.append(("SELECT", cast("int", given["db"])))
    return commands


def _packed(command: Command) -> bytes:
    parts = [b"*%d\r\n" % len(command)]
    for argument in command:
        data = argument if isinstance(argument, bytes) else str(argument).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(parts)


def _text(error: BaseException) -> str:
    if isinstance(error, anyio.EndOfStream):
        return "it has closed the connection"
    if isinstance(error, TimeoutError) and not error.args:
        return "it took too long"
    return str(error) or type(error).__name__
