"""The bus of one process: the contract of every bus, and what it promises beyond that."""

from __future__ import annotations

import pytest

from eventsource_anyio import InMemoryEventBus
from eventsource_anyio.testing import EventBusContract


class TestInMemoryEventBus(EventBusContract):
    @pytest.fixture
    def bus(self) -> InMemoryEventBus:
        return InMemoryEventBus()
