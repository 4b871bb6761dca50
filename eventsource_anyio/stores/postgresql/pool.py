"""Connections that are lent one call, or one transaction, at a time.

- At most `size` are open; whoever comes when all are lent waits, in order.
- One that was lost is replaced, and a read that was lost with it is made once more.
- They are given back without a round trip: our calls leave nothing behind in a connection.
"""

from __future__ import annotations

from collections.abc import Sequence

import anyio

from ...cleanup import shielded_cleanup
from ...errors import StoreClosedError
from .driver import Connection, Driver, DriverError, Row


class Pool:
    def __init__(self, driver: Driver, size: int, store: str) -> None:
        self._driver = driver
        self._store = store
        self._size = size
        self._places = anyio.Semaphore(size, fast_acquire=True)
        self._idle: list[Connection] = []  # the one used last comes first
        self._closed = False

    async def acquire(self) -> Connection:
        """A connection, to be given to `release` in any case."""
        await self._places.acquire()
        try:
            if self._closed:
                raise StoreClosedError(self._store)
            while self._idle:
                connection = self._idle.pop()
                if connection.usable:
                    return connection
                connection.abandon()
            return await self._driver.connect()
        except BaseException:
            self._places.release()
            raise

    def release(self, connection: Connection) -> None:
        if connection.usable:
            self._idle.append(connection)
        else:
            connection.abandon()
        self._places.release()

    async def replace(self, lost: Connection) -> Connection:
        """A new connection in the place of one that was lost."""
        lost.abandon()
        return await self._driver.connect()

    async def fetch(self, statement: str, *values: object) -> Sequence[Row]:
        """Run one statement that only reads, on any connection."""
        connection = await self.acquire()
        try:
            return await connection.fetch(statement, *values)
        except DriverError as error:
            if not error.lost:
                raise
            while self._idle:  # which are mostly lost with it, and do not know yet
                self._idle.pop().abandon()
        finally:
            self.release(connection)
        connection = await self.acquire()
        try:
            return await connection.fetch(statement, *values)
        finally:
            self.release(connection)

    async def close(self) -> None:
        """Close them, those that are lent when they are given back, and refuse who comes later."""
        self._closed = True
        with shielded_cleanup():
            for _ in range(self._size):
                await self._places.acquire()
            while self._idle:
                await self._idle.pop().close()
        for _ in range(self._size):
            self._places.release()
