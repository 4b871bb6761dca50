"""NATS JetStream as a broker, on both loops."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from anyio.lowlevel import cancel_shielded_checkpoint

from ..cleanup import shielded_cleanup
from ..errors import StorageError
from .broker import Broker, Entry, Message, Reading, ReceivedMessage
from .nats_bucket import Bucket
from .nats_connection import Connection, NoAnswererError, RefusedError
from .nats_jetstream import NO_STREAM
from .nats_partitions import Partitions

if TYPE_CHECKING:
    from ..guest import Guest

P = ParamSpec("P")
T = TypeVar("T")

_NAME = re.compile(r"[A-Za-z0-9_-]{1,200}")
_OLDEST = (2, 11)  # of servers: the first that can be asked for many messages at once


class NATSBroker(Broker):
    """Over one connection of nats-py, in a guest on Trio.

    What it makes is named by `name`: streams `<name>_events_<partition>`, a bucket `<name>`. They
    are kept in `replicas` servers of a cluster. At least the last `keep` messages of each partition
    are kept, and at most as many of NATS, which have up to a hundred each. `options` are more of
    nats-py's, such as `user_credentials` or `tls`.
    """

    def __init__(
        self,
        servers: str | Sequence[str],
        *,
        name: str = "eventsource",
        keep: int = 100_000,
        replicas: int = 1,
        options: Mapping[str, object] | None = None,
        guest: Guest | None = None,
    ) -> None:
        if not _NAME.fullmatch(name):
            raise ValueError(f"name must be of ASCII letters, digits, - and _, not {name!r}")
        for what, value in (("keep", keep), ("replicas", replicas)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{what} must be a number from 1, not {value!r}")
        servers = [servers] if isinstance(servers, str) else list(servers)
        if not servers:
            raise ValueError("servers must be the URL of one, such as nats://localhost, or several")
        config = {"storage": "file", "num_replicas": replicas}
        self._connection = Connection(servers, {"name": f"eventsource {name}", **(options or {})})
        self._partitions = Partitions(self._connection, name, config, keep)
        self._bucket = Bucket(self._connection, name, config)
        self._given_guest = guest
        self._opened: tuple[Guest, AsyncExitStack] | None = None

    async def open(self) -> None:
        from ..guest import Guest  # it imports asyncio, which a Trio program may do without

        if self._opened is not None:
            raise RuntimeError("this connection to NATS is open already")
        async with AsyncExitStack() as stack:
            guest = self._given_guest or Guest()
            if guest is not self._given_guest:
                await stack.enter_async_context(guest)
            stack.push_async_callback(self._close, guest)
            await guest.run(self._connect())
            self._opened = guest, stack.pop_all()

    async def _connect(self) -> None:
        await self._connection.open()
        version = self._connection.version
        if version < _OLDEST:
            raise StorageError(
                f"NATS at {self._connection.where} is too old: version {version[0]}.{version[1]}.\n"
                "  It cannot be asked for many messages at once.\n"
                f"  Use a server of version {_OLDEST[0]}.{_OLDEST[1]} or newer."
            )
        self._forget()
        await self._translated(self._bucket.make)

    async def _close(self, guest: Guest) -> None:
        with shielded_cleanup():
            await guest.run(self._connection.close())
        self._partitions.close()

    async def close(self) -> None:
        opened, self._opened = self._opened, None
        if opened is None:
            await cancel_shielded_checkpoint()
        else:
            await opened[1].aclose()

    async def send(self, messages: Sequence[Message]) -> None:
        await self._run(self._partitions.send, messages)

    async def read(self, after: Mapping[int, str], limit: int, wait: float) -> Reading:
        return await self._run(self._partitions.read, after, limit, wait)

    async def read_back(self, partition: int, upto: str, limit: int) -> Sequence[ReceivedMessage]:
        return await self._run(self._partitions.read_back, partition, upto, limit)

    async def ends(self, partitions: Sequence[int]) -> Mapping[int, str]:
        return await self._run(self._partitions.ends, partitions)

    async def get(self, key: str) -> Entry | None:
        return await self._run(self._bucket.get, key)

    async def list(self, directory: str) -> Sequence[Entry]:
        return await self._run(self._bucket.list, directory)

    async def put(self, key: str, value: bytes, expected: str | None) -> str:
        return await self._run(self._bucket.put, key, value, expected)

    async def delete(self, key: str, expected: str) -> None:
        await self._run(self._bucket.delete, key, expected)

    async def _run(
        self, work: Callable[P, Coroutine[object, object, T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        if self._opened is None:
            raise StorageError(
                f"NATS at {self._connection.where} is not connected to.\n"
                "  Nothing of this call was done.\n"
                "  A bus is open inside its `async with` block only."
            )
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
                f"NATS at {self._connection.where} has no JetStream.\n"
                "  Nothing of this call was done.\n"
                "  Start the server with -js, or with jetstream {} in its configuration."
            ) from None
        except RefusedError as error:
            raise StorageError(
                f"NATS at {self._connection.where} has refused: {error}.\n"
                "  Nothing of this call was done.\n"
                "  The number is JetStream's error code. Mend what it names, then make the call "
                "again."
            ) from error

    def _forget(self) -> None:
        self._partitions.forget()
        self._bucket.forget()
