"""Fixtures for the tests of applications, loaded by pytest wherever this package is installed.

They work with anyio's plugin: each is open on the loop that the test runs on.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ..stores.in_memory import InMemoryEventStore
from ..stores.sqlite import SQLiteEventStore


@pytest.fixture
async def event_store(anyio_backend: object) -> AsyncIterator[InMemoryEventStore]:
    """An empty, open in-memory store."""
    async with InMemoryEventStore() as store:
        yield store


@pytest.fixture
async def sqlite_event_store(
    anyio_backend: object, tmp_path: Path
) -> AsyncIterator[SQLiteEventStore]:
    """An empty, open SQLite store in the test's temporary directory."""
    async with SQLiteEventStore(tmp_path / "events.db") as store:
        yield store
