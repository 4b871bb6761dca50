"""Brokers, each by itself: what the bus over them relies on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from uuid import uuid4

import pytest

from eventsource_anyio.bus.nats_broker import NATSBroker
from eventsource_anyio.testing.brokers import BrokerContract, BrokerFailureContract
from eventsource_anyio.testing.nats import NATSServer, nats_binary


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
