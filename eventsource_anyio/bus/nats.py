"""The event bus over NATS JetStream, by nats-py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..stores.interface import EventStore
from .interface import FailurePolicy
from .nats_broker import NATSBroker
from .partitioned import BrokerEventBus
from .sharing import Start

if TYPE_CHECKING:
    from ..guest import Guest


class NATSEventBus(BrokerEventBus):
    """Events between processes through NATS 2.11 or later; on Trio, nats-py runs in a `Guest`.

    `servers` are one URL or several of one cluster: `nats://user:password@host:4222`, `tls://…`.
    `name` is the log's: buses with the same one hear each other. Each partition keeps at least its
    last `keep` events, in `replicas` servers of the cluster; both are what whoever makes the log
    says. `options` are more of nats-py's for connecting, such as `user_credentials` or `tls`. The
    `guest` is its own, or the one given. The rest is as in `BrokerEventBus`.
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
        super().__init__(
            NATSBroker(
                servers, name=name, keep=keep, replicas=replicas, options=options, guest=guest
            ),
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
