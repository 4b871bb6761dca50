"""Brokers, each by itself: what the bus over them relies on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from uuid import uuid4

import pytest

from eventsource_anyio.bus.nats_broker import NATSBroker
from eventsource_anyio.bus.redis_broker import RedisBroker
from eventsource_anyio.bus.redis_connection import RedisConnections
from eventsource_anyio.testing.broker_failures import BrokerFailureContract
from eventsource_anyio.testing.brokers import BrokerContract
from eventsource_anyio.testing.nats import NATSServer, nats_binary
from eventsource_anyio.testing.redis import RedisServer, redis_binary


@pytest.fixture(scope="module")
def own_nats_server(nats_server: object) -> Iterator[NATSServer]:
    """One that may be killed."""
    binary = nats_binary()
    if binary is None:
        pytest.skip("no nats-server to start: only one that is not ours to kill")
    with NATSServer(binary) as server:
        yield server


class TestNATSBroker(BrokerContract):
    @pytest.fixture
    def new_broker(self, nats_url: str) -> Callable[[], NATSBroker]:
        name = uuid4().hex
        return lambda: NATSBroker(nats_url, name=name, keep=100)


class TestNATSBrokerFailures(BrokerFailureContract):
    @pytest.fixture
    def server(self, own_nats_server: NATSServer) -> NATSServer:
        return own_nats_server

    @pytest.fixture
    def new_broker(self, server: NATSServer) -> Callable[[], NATSBroker]:
        name = uuid4().hex
        return lambda: NATSBroker(server.url, name=name, keep=10_000)


@pytest.fixture(scope="module")
def own_redis_server(redis_server: object) -> Iterator[RedisServer]:
    """One that may be killed."""
    binary = redis_binary()
    if binary is None:
        pytest.skip("no redis-server to start: only one that is not ours to kill")
    with RedisServer(binary) as server:
        yield server


class TestRedisBroker(BrokerContract):
    @pytest.fixture
    def new_broker(self, redis_url: str) -> Callable[[], RedisBroker]:
        prefix = uuid4().hex
        return lambda: RedisBroker(RedisConnections(redis_url), prefix, 1000)


class TestRedisBrokerFailures(BrokerFailureContract):
    @pytest.fixture
    def server(self, own_redis_server: RedisServer) -> RedisServer:
        return own_redis_server

    @pytest.fixture
    def new_broker(self, server: RedisServer) -> Callable[[], RedisBroker]:
        prefix = uuid4().hex
        return lambda: RedisBroker(RedisConnections(server.url), prefix, 10_000)
