"""The bus over Redis Streams: the contract of every bus, and what a broker's adds to it."""

from __future__ import annotations

from uuid import uuid4

import pytest

from eventsource_anyio.bus.redis import RedisEventBus
from eventsource_anyio.testing import EventBusContract


class TestRedisEventBus(EventBusContract):
    @pytest.fixture
    def bus(self, redis_url: str) -> RedisEventBus:
        return RedisEventBus(
            redis_url, prefix=uuid4().hex, subscription="test", retry_after=0.01, keep=2000
        )
