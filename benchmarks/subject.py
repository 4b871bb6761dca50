"""Our store on PostgreSQL, on one event loop, by one driver."""

from __future__ import annotations

from typing import Literal, TypeAlias

import attrs

from eventsource_anyio import PostgreSQLEventStore

from .suite import ours

Driver: TypeAlias = Literal["", "asyncpg", "psycopg"]


@attrs.frozen
class Subject:
    loop: str
    driver: Driver = ""

    def __str__(self) -> str:
        return ours(self.loop, self.driver)


def opened(dsn: str, schema: str = "", driver: Driver = "") -> PostgreSQLEventStore:
    return PostgreSQLEventStore(dsn, schema=schema or "eventsource", driver=driver or None)


async def migrate(dsn: str, schema: str = "") -> None:
    await opened(dsn, schema).migrate()
