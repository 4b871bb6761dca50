"""The bus over NATS JetStream: the contract of every bus, and what a broker's adds to it."""

from __future__ import annotations

from uuid import uuid4

import pytest

from eventsource_anyio.bus.nats import NATSEventBus
from eventsource_anyio.testing import EventBusContract


class TestNATSEventBus(EventBusContract):
    @pytest.fixture
    def bus(self, nats_url: str) -> NATSEventBus:
        return NATSEventBus(
            nats_url, name=uuid4().hex, subscription="test", retry_after=0.01, keep=2000
        )
