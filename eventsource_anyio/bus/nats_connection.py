"""nats-py's connection, and the calls that are in flight on it.

- All of it runs on asyncio: on Trio inside the guest, where whoever calls it has to be.
- A call has a subject of its own, under one inbox, that answers are sent to. nats-py's requests
  would wait out their time when the connection is lost; these fail at once.
- When the connection is lost, the next call makes another one, which listens to what the former
  has listened to. nats-py could do so by itself, but would then send what it has kept of calls that
  have failed, try in the background for ever, and leave tasks behind when it is closed meanwhile.
- Of nats-py, `flush` and `rtt` are not used: cancelled, they break its reading task.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote
from uuid import uuid4

import anyio
from msgspec import MsgspecError, Struct
from msgspec.json import decode, encode

from ..cleanup import shielded_cleanup
from ..errors import StorageError

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

_ANSWER = 5.0  # seconds that the server may take to answer
_LOOK = 0.25  # seconds between looks whether a connection is closed that has not said so
_OPTIONS: Mapping[str, Any] = {
    "ping_interval": 10,  # a silent connection is given up when the second one is not answered
    "max_outstanding_pings": 1,
}

A = TypeVar("A", bound="Answer")
Listener = Callable[["Msg"], Awaitable[None]]


class NoAnswererError(Exception):
    """Internal: there is nothing at the subject that a call was sent to."""


class RefusedError(Exception):
    """Internal: JetStream has not done what it was asked for."""

    def __init__(self, code: int, description: str) -> None:
        super().__init__(f"{description} ({code})")
        self.code = code


class _Refusal(Struct, frozen=True):
    err_code: int = 0
    description: str = "no reason given"


class Answer(Struct, frozen=True, kw_only=True):
    """What JetStream answers; more fields in subclasses."""

    error: _Refusal | None = None


class Call:
    """What is sent, and its answers; with `many`, those until one that has a status."""

    __slots__ = ("_done", "answers", "headers", "lost", "many", "payload", "subject")

    def __init__(
        self,
        subject: str,
        payload: bytes,
        headers: dict[str, str] | None = None,
        *,
        many: bool = False,
    ) -> None:
        self.subject = subject
        self.payload = payload
        self.headers = headers
        self.many = many
        self.begin()

    def begin(self) -> None:
        """Be sent, maybe again."""
        self.answers: list[Msg] = []
        self.lost = False
        self._done = anyio.Event()

    def answer(self, message: Msg) -> None:
        self.answers.append(message)
        if not self.many or status_of(message):
            self._done.set()

    def lose(self) -> None:
        """There will be no answer."""
        self.lost = not self._done.is_set()
        self._done.set()

    @property
    def done(self) -> bool:
        return self._done.is_set()

    async def wait(self) -> None:
        await self._done.wait()
        if self.lost:
            raise ConnectionError("the connection was lost")

    def decoded(self, answer: type[A]) -> A:
        """The one answer of JetStream; `RefusedError` if that is an error."""
        try:
            found = decode(self.answers[0].data, type=answer)
        except MsgspecError as error:
            raise RefusedError(0, f"an answer that is not JetStream's: {error}") from error
        if found.error is not None:
            raise RefusedError(found.error.err_code, found.error.description)
        return found


class Connection:
    """A connection to one of some servers, all of one cluster."""

    def __init__(self, servers: Sequence[str], options: Mapping[str, object]) -> None:
        _check_installed()
        self._servers = list(servers)
        self._options = options
        self._client: Client | None = None
        self._opening = anyio.Lock()
        self._closed = True
        self._inbox = ""
        self._calls: dict[str, tuple[Client, Call]] = {}
        self._number = 0
        self._listening: dict[str, tuple[Listener, Subscription]] = {}
        self.on_change: Callable[[], None] = lambda: None  # it was lost, or made anew

    @property
    def where(self) -> str:
        """The servers, without what is secret in their URLs."""
        return ", ".join(server.rpartition("@")[2] for server in self._servers)

    async def open(self) -> None:
        self._opening = anyio.Lock()  # of asyncio
        self._closed = False
        await self._connected()

    async def close(self) -> None:
        client, self._client, self._closed = self._client, None, True
        self._listening.clear()
        if client is not None:
            await _end(client)

    async def listen(self, subject: str, listener: Listener) -> None:
        """Have a function called with each message, from now on and over reconnections."""
        client = await self._connected()
        self._listening[subject] = listener, await _subscribe(client, subject, listener)

    async def stop_listening(self, subject: str) -> None:
        _, subscription = self._listening.pop(subject)
        if self._client is not None and not self._client.is_closed:
            await subscription.unsubscribe()

    @property
    def version(self) -> tuple[int, int]:
        """Of the server."""
        client = self._client
        version = client.connected_server_version if client is not None else None
        return (version.major, version.minor) if version is not None else (0, 0)

    async def api(self, subject: str, request: object, answer: type[A]) -> A:
        """Ask JetStream for something; `RefusedError` if it says no."""
        call = Call(f"$JS.API.{subject}", encode(request))
        await self.ask([call])
        return call.decoded(answer)

    async def ask(self, calls: Sequence[Call], *, once: bool = False) -> None:
        """Send calls, one after the other, and return when all of them are answered.

        If the connection is lost meanwhile they are sent again, unless that is to be `once`.
        """
        client = await self._connected()
        for call in calls:
            self._check_size(call, client.max_payload)
        try:
            await self._ask(client, calls)
        except _LostError as error:
            if once:
                raise self._unanswered(error.why) from error.why
            try:
                await self._ask(await self._connected(), calls)
            except (_LostError, StorageError) as again:
                raise self._unanswered(error.why) from again
        if any(status_of(call.answers[-1]) == "503" for call in calls):
            raise NoAnswererError

    async def _ask(self, client: Client, calls: Sequence[Call]) -> None:
        tokens: list[str] = []
        try:
            with anyio.move_on_after(_ANSWER) as patience:
                for call in calls:
                    call.begin()
                    self._number += 1
                    tokens.append(str(self._number))
                    self._calls[tokens[-1]] = client, call
                    reply = f"{self._inbox}.{tokens[-1]}"
                    await client.publish(call.subject, call.payload, reply, call.headers)
                for call in calls:
                    while not call.done:
                        with anyio.move_on_after(_LOOK):
                            await call.wait()
                        if not call.done and client.is_closed:
                            call.lose()
                    await call.wait()
        except Exception as error:  # of nats-py, which has no connection any more
            raise _LostError(error) from error
        finally:
            for token in tokens:
                del self._calls[token]
        if patience.cancelled_caught:
            raise self._unanswered(TimeoutError(f"nothing came within {_ANSWER:g} s"))

    async def send(self, subject: str, payload: bytes, reply: str) -> None:
        """Send something whose answers are listened to."""
        client = await self._connected()
        try:
            await client.publish(subject, payload, reply)
        except Exception as error:
            raise self._not_sent(error) from error

    def new_inbox(self) -> str:
        """A subject to be listened to that is nobody else's."""
        return f"{self._options.get('inbox_prefix', '_INBOX')}.{uuid4().hex}"

    async def _answered(self, message: Msg) -> None:
        found = self._calls.get(message.subject.rpartition(".")[2])
        if found is not None:
            found[1].answer(message)

    # Connecting ------------------------------------------------------------------------------

    async def _connected(self) -> Client:
        if (client := self._client) is not None and client.is_connected:
            return client
        if self._closed:
            raise self._not_sent(ConnectionError("it is closed here"))
        async with self._opening:
            client, self._client = self._client, None
            if client is None or not client.is_connected:
                if client is not None:
                    await _end(client)
                client = await self._connect()
            if self._closed:
                await _end(client)
                raise self._not_sent(ConnectionError("it is closed here"))
            self._client = client
            return client

    async def _connect(self) -> Client:
        """Tries every server once."""
        from nats.aio.client import Client

        for number, server in enumerate(self._servers, 1):
            client = Client()
            try:
                await self._connect_to(client, server)
            except BaseException as error:
                await _end(client)
                if not isinstance(error, Exception):
                    raise
                if number == len(self._servers):
                    raise self._not_sent(error) from error
            else:
                self.on_change()
                return client
        raise AssertionError

    async def _connect_to(self, client: Client, server: str) -> None:
        connecting = True

        async def failed(error: Exception) -> None:
            if connecting:
                raise error  # or nats-py would try for ever; what matters later ends calls

        async def lost() -> None:
            for whose, call in self._calls.values():
                if whose is client:
                    call.lose()
            self.on_change()

        options: dict[str, Any] = {**_OPTIONS, **_account(server), **self._options}
        await client.connect(
            server, allow_reconnect=False, error_cb=failed, closed_cb=lost, **options
        )
        connecting = False
        self._inbox = client.new_inbox()
        await _subscribe(client, f"{self._inbox}.*", self._answered)
        for subject, (listener, _) in list(self._listening.items()):
            self._listening[subject] = listener, await _subscribe(client, subject, listener)

    # Errors ----------------------------------------------------------------------------------

    def _check_size(self, call: Call, most: int) -> None:
        if len(call.payload) > most:
            raise StorageError(
                f"{len(call.payload)} bytes are more than NATS at {self.where} takes at once.\n"
                "  Nothing of this call was done.\n"
                f"  Keep events small, or raise max_payload, which is {most}, in the server's "
                "configuration."
            )

    def _not_sent(self, error: Exception) -> StorageError:
        return StorageError(
            f"NATS at {self.where} cannot be reached: {_told(error)}.\n"
            "  Nothing of this call was done.\n"
            "  Check that the server runs there and lets this user in. Each call connects anew."
        )

    def _unanswered(self, error: Exception) -> StorageError:
        return StorageError(
            f"NATS at {self.where} does not answer: {_told(error)}.\n"
            "  Whether anything of this call was done is not known.\n"
            "  Make the call again: what is sent twice is dropped by those who receive it."
        )


class _LostError(Exception):
    def __init__(self, why: Exception) -> None:
        self.why = why


def _account(server: str) -> Mapping[str, str]:
    """What a URL says of the user, which nats-py would take with its %-escapes."""
    account, at, _ = server.partition("://")[2].rpartition("@")
    user, colon, password = account.partition(":")
    if not at:
        return {}
    return (
        {"user": unquote(user), "password": unquote(password)}
        if colon
        else {"token": unquote(user)}
    )


async def _end(client: Client) -> None:
    with shielded_cleanup(), suppress(Exception):  # of a connection that is broken anyway
        await client.close()
    # When it breaks while something is to be sent, nats-py forgets to close it.
    transport: Any = getattr(client, "_transport", None)
    if transport is not None:
        transport.close()


def _told(error: Exception) -> str:
    return str(error).removeprefix("nats: ") or type(error).__name__


async def _subscribe(client: Client, subject: str, listener: Listener) -> Subscription:
    return await client.subscribe(subject, cb=listener)  # pyright: ignore[reportUnknownMemberType]


def status_of(message: Msg) -> str:
    """The status that a message has in place of a payload; empty if it has none."""
    headers = message.headers
    return headers.get("Status", "") if headers and not message.data else ""


def _check_installed() -> None:
    if find_spec("nats") is None:
        raise ImportError(
            "nats-py is not installed, which buses and work queues on NATS need. It comes with an "
            "extra: pip install 'eventsource-anyio[nats]'"
        )
