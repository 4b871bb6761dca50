"""nats-py's connection, and the calls that are in flight on it.

- All of it runs on asyncio: on Trio inside the guest, where whoever calls it has to be.
- A call has a subject of its own, under one inbox, that answers are sent to. nats-py's requests
  would wait out their time when the connection is lost; these fail at once.
- nats-py makes the connection anew by itself. Where it gives up, because the server told it to,
  the next call opens another one, which listens to what the former has listened to.
- Of nats-py, `flush` and `rtt` are not used: cancelled, they break its reading task.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

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
_OPTIONS: Mapping[str, Any] = {
    "max_reconnect_attempts": -1,
    "reconnect_time_wait": 0.1,  # seconds, for each server
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

    __slots__ = ("answers", "done", "error", "headers", "many", "payload", "subject")

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
        self.answers: list[Msg] = []
        self.error: StorageError | None = None
        self.done = anyio.Event()

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
        self._opening: anyio.Lock | None = None  # None means closed
        self._inbox = ""
        self._calls: dict[str, Call] = {}
        self._number = 0
        self._listening: dict[str, tuple[Listener, Subscription]] = {}
        self._trouble: Exception | None = None
        self.on_reconnected: Callable[[], None] = lambda: None

    @property
    def where(self) -> str:
        """The servers, without what is secret in their URLs."""
        return ", ".join(server.rpartition("@")[2] for server in self._servers)

    async def open(self) -> None:
        self._opening = anyio.Lock()
        await self._connected()

    async def close(self) -> None:
        client, self._client, self._opening = self._client, None, None
        self._listening.clear()
        if client is not None:
            with shielded_cleanup():
                await client.close()

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

    async def ask(self, calls: Sequence[Call]) -> None:
        """Send calls, one after the other, and return when all of them are answered."""
        client = await self._connected()
        for call in calls:
            if len(call.payload) > client.max_payload:
                raise StorageError(
                    f"{len(call.payload)} bytes are more than NATS at {self.where} takes at once.\n"
                    "  Nothing of this call was stored.\n"
                    f"  Keep events small, or raise max_payload, which is {client.max_payload}, in "
                    "the server's configuration."
                )
        tokens: list[str] = []
        try:
            with anyio.move_on_after(_ANSWER) as patience:
                for call in calls:
                    self._number += 1
                    tokens.append(str(self._number))
                    self._calls[tokens[-1]] = call
                    reply = f"{self._inbox}.{tokens[-1]}"
                    await client.publish(call.subject, call.payload, reply, call.headers)
                for call in calls:
                    await call.done.wait()
        except Exception as error:  # of nats-py, which has no connection any more
            raise self._unanswered(f"{error}" or type(error).__name__) from error
        finally:
            for token in tokens:
                del self._calls[token]
        if patience.cancelled_caught:
            raise self._unanswered(f"there was no answer within {_ANSWER:g} s")
        for call in calls:
            if call.error is not None:
                raise call.error
            if status_of(call.answers[-1]) == "503":
                raise NoAnswererError

    async def _answered(self, message: Msg) -> None:
        call = self._calls.get(message.subject.rpartition(".")[2])
        if call is not None:
            call.answers.append(message)
            if not call.many or status_of(message):
                call.done.set()

    # Connecting ------------------------------------------------------------------------------

    async def _connected(self) -> Client:
        client = self._client
        if (client is None or client.is_closed) and self._opening is not None:
            async with self._opening:
                if self._client is None or self._client.is_closed:
                    self._client = await self._connect()
            client = self._client
        if client is None or not client.is_connected:
            raise self._not_sent(self._trouble)
        return client

    async def _connect(self) -> Client:
        """Raises after every server was tried once."""
        from nats.aio.client import Client

        client = Client()
        attempts = len(self._servers)

        async def failed(error: Exception) -> None:
            nonlocal attempts
            self._trouble = error
            attempts -= 1
            if attempts == 0:
                raise _EveryServerFailedError  # or it would try for ever

        options: dict[str, Any] = {**_OPTIONS, **self._options}
        try:
            await client.connect(
                self._servers,
                error_cb=failed,
                disconnected_cb=self._disconnected,
                reconnected_cb=self._reconnected,
                **options,
            )
            attempts = 0
            self._inbox = client.new_inbox()
            await _subscribe(client, f"{self._inbox}.*", self._answered)
            for subject, (listener, _) in list(self._listening.items()):
                self._listening[subject] = listener, await _subscribe(client, subject, listener)
        except BaseException as error:
            with shielded_cleanup():
                await client.close()
            if isinstance(error, Exception):
                trouble = self._trouble if isinstance(error, _EveryServerFailedError) else error
                raise self._not_sent(trouble) from trouble
            raise
        self.on_reconnected()
        return client

    async def _disconnected(self) -> None:
        for call in self._calls.values():
            call.error = self._unanswered("the connection was lost")
            call.done.set()

    async def _reconnected(self) -> None:
        self.on_reconnected()

    # Errors ----------------------------------------------------------------------------------

    def _not_sent(self, error: Exception | None) -> StorageError:
        why = f"{error}" or type(error).__name__ if error is not None else "it is not open"
        return StorageError(
            f"NATS at {self.where} cannot be reached: {why}.\n"
            "  Nothing of this call was stored.\n"
            "  Check that the server runs there and lets this user in. It is connected to again "
            "by itself; make the call again then."
        )

    def _unanswered(self, why: str) -> StorageError:
        return StorageError(
            f"NATS at {self.where} did not answer: {why}.\n"
            "  Whether anything of this call was stored is not known.\n"
            "  Make the call again: what is sent twice is dropped by those who receive it."
        )


class _EveryServerFailedError(Exception):
    pass


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
