"""A connection to NATS from either loop: where the guest is, and where errors become our own."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from anyio.lowlevel import cancel_shielded_checkpoint

from ..cleanup import shielded_cleanup
from ..errors import StorageError, StoreClosedError
from .nats_connection import Connection, NoAnswererError, RefusedError
from .nats_jetstream import NO_STREAM

if TYPE_CHECKING:
    from ..guest import Guest

P = ParamSpec("P")
T = TypeVar("T")

_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")
_OLDEST = (2, 11)  # of servers: the first that can be asked for many messages at once


class Session:
    """What is open for as long as a bus or a queue is; `forget` is called when streams are gone."""

    def __init__(
        self,
        owner: str,
        servers: str | Sequence[str],
        options: Mapping[str, object] | None,
        guest: Guest | None,
        forget: Callable[[], None],
    ) -> None:
        servers = [servers] if isinstance(servers, str) else list(servers)
        if not servers:
            raise ValueError("servers must be the URL of one, such as nats://localhost, or several")
        self.connection = Connection(servers, {"name": "eventsource-anyio", **(options or {})})
        self._owner = owner
        self._given_guest = guest
        self._forget = forget
        self._opened: tuple[Guest, AsyncExitStack] | None = None

    async def open(self, first: Callable[[], Coroutine[object, object, object]]) -> None:
        """Connect, and do something first; closed again if that fails."""
        from ..guest import Guest  # it imports asyncio, which a Trio program may do without

        if self._opened is not None:
            raise RuntimeError("this connection to NATS is open already")
        async with AsyncExitStack() as stack:
            guest = self._given_guest or Guest()
            if guest is not self._given_guest:
                await stack.enter_async_context(guest)
            stack.push_async_callback(self._close, guest)
            await guest.run(self._connect(first))
            self._opened = guest, stack.pop_all()

    async def _connect(self, first: Callable[[], Coroutine[object, object, object]]) -> None:
        await self.connection.open()
        version = self.connection.version
        if version < _OLDEST:
            raise StorageError(
                f"NATS at {self.connection.where} is too old: version {version[0]}.{version[1]}.\n"
                "  It cannot be asked for many messages at once.\n"
                f"  Use a server of version {_OLDEST[0]}.{_OLDEST[1]} or newer."
            )
        self._forget()
        await self._translated(first)

    async def _close(self, guest: Guest) -> None:
        with shielded_cleanup():
            await guest.run(self.connection.close())

    async def close(self) -> None:
        opened, self._opened = self._opened, None
        if opened is None:
            await cancel_shielded_checkpoint()
        else:
            await opened[1].aclose()

    async def run(
        self, work: Callable[P, Coroutine[object, object, T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        if self._opened is None:
            raise StoreClosedError(self._owner)
        return await self._opened[0].run(self._translated(work, *args, **kwargs))

    async def _translated(
        self, work: Callable[P, Coroutine[object, object, T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Do something, once more where streams were gone; errors as those everybody knows."""
        try:
            try:
                return await work(*args, **kwargs)
            except (NoAnswererError, RefusedError) as error:
                if isinstance(error, RefusedError) and error.code != NO_STREAM:
                    raise
                self._forget()
                return await work(*args, **kwargs)
        except NoAnswererError:
            raise StorageError(
                f"NATS at {self.connection.where} has no JetStream.\n"
                "  Nothing of this call was done.\n"
                "  Start the server with -js, or with jetstream {} in its configuration."
            ) from None
        except RefusedError as error:
            raise StorageError(
                f"NATS at {self.connection.where} has refused: {error}.\n"
                "  Nothing of this call was done.\n"
                "  The number is JetStream's error code. Mend what it names, then make the call "
                "again."
            ) from error


def check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{what} must be of ASCII letters, digits, - and _, not {name!r}")


def check_number(what: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{what} must be a number from 1, not {value!r}")
