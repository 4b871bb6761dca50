"""NATS JetStream as a broker: partitions are streams, entries are in a bucket."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .broker import Broker, Entry, Message, Reading, ReceivedMessage
from .nats_bucket import Bucket
from .nats_partitions import Partitions
from .nats_session import Session, check_name, check_number

if TYPE_CHECKING:
    from ..guest import Guest


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
        check_name("name", name)
        check_number("keep", keep)
        check_number("replicas", replicas)
        self._session = Session("NATSEventBus", servers, options, guest, self._forget)
        connection = self._session.connection
        config = {"storage": "file", "num_replicas": replicas}
        self._partitions = Partitions(connection, name, config, keep)
        self._bucket = Bucket(connection, name, config)

    async def open(self) -> None:
        await self._session.open(self._bucket.make)

    async def close(self) -> None:
        await self._session.close()
        self._partitions.close()

    async def send(self, messages: Sequence[Message]) -> None:
        await self._session.run(self._partitions.send, messages)

    async def read(self, after: Mapping[int, str], limit: int, wait: float) -> Reading:
        return await self._session.run(self._partitions.read, after, limit, wait)

    async def read_back(self, partition: int, upto: str, limit: int) -> Sequence[ReceivedMessage]:
        return await self._session.run(self._partitions.read_back, partition, upto, limit)

    async def ends(self, partitions: Sequence[int]) -> Mapping[int, str]:
        return await self._session.run(self._partitions.ends, partitions)

    async def get(self, key: str) -> Entry | None:
        return await self._session.run(self._bucket.get, key)

    async def list(self, directory: str) -> Sequence[Entry]:
        return await self._session.run(self._bucket.list, directory)

    async def put(self, key: str, value: bytes, expected: str | None) -> str:
        return await self._session.run(self._bucket.put, key, value, expected)

    async def delete(self, key: str, expected: str) -> None:
        await self._session.run(self._bucket.delete, key, expected)

    def _forget(self) -> None:
        self._partitions.forget()
        self._bucket.forget()
