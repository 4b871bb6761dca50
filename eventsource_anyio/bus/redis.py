"""The event bus over Redis Streams, by coredis."""

from __future__ import annotations

from ..stores.interface import EventStore
from .interface import FailurePolicy
from .partitioned import BrokerEventBus
from .redis_broker import RedisBroker
from .redis_connection import RedisConnections
from .sharing import Start


class RedisEventBus(BrokerEventBus):
    """Events between processes through Redis 6.2 or later, on asyncio and Trio natively.

    `url` is `redis://user:password@host:6379/0`, `rediss://` for TLS, or `unix:///path`. All keys
    begin with `prefix`, which names the log: buses with the same one hear each other. Each
    partition keeps about its last `keep` events. The rest is as in `BrokerEventBus`.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "eventsource",
        keep: int = 100_000,
        subscription: str | None = None,
        partitions: int = 8,
        start: Start = "new",
        catch_up: EventStore | None = None,
        lease: float = 5.0,
        attempts: int = 5,
        retry_after: float = 0.1,
        on_failure: FailurePolicy | None = None,
        buffer: int = 1024,
        remembered: int = 4096,
    ) -> None:
        if not isinstance(keep, int) or isinstance(keep, bool) or keep < 1:
            raise ValueError(f"keep must be a number of events from 1, not {keep!r}")
        super().__init__(
            RedisBroker(RedisConnections(url), prefix, keep),
            subscription=subscription,
            partitions=partitions,
            start=start,
            catch_up=catch_up,
            lease=lease,
            attempts=attempts,
            retry_after=retry_after,
            on_failure=on_failure,
            buffer=buffer,
            remembered=remembered,
        )
