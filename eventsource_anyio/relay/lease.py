"""One at a time: a lease, which is a document, whose revision is the fencing token.

- Who has the lease writes its document again and again, and with everything that it stores, always
  where it has the revision that was written last. Whoever takes it over writes it too; so nothing
  of the one before can be stored any more, however late it wakes up.
- One whose document has kept its revision for `seconds`, by the clock of whoever looks, is dead; no
  clocks are compared.
- The revision is known before it is stored. So after a write that was cut off, it is found out
  whether it was stored.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from math import inf
from typing import cast
from uuid import UUID, uuid4

import anyio

from ..errors import DocumentConflictError
from ..stores.interface import EventStore, Transaction

COLLECTION = "relays/leases"


class LeaseLostError(Exception):
    """Somebody else has it."""


async def nothing(tx: Transaction) -> None:
    """Nothing is to be stored but that the lease is still held."""


class Lease:
    def __init__(self, store: EventStore, key: str, seconds: float) -> None:
        self._store = store
        self._key = key
        self._seconds = seconds
        self._me = str(uuid4())
        self._revision: UUID | None = None  # None: it is not held
        self._attempted: UUID | None = None  # what may have been stored in place of it
        self._seen: tuple[UUID | None, float] = (None, 0.0)
        self._confirmed = -inf
        self._turn = anyio.Lock()

    @property
    def age(self) -> float:
        """For how many seconds nobody has looked whether it is still held."""
        return anyio.current_time() - self._confirmed

    async def take(self) -> bool:
        """Whether it is held after this: it is free, or whoever has it is dead."""
        document = await self._store.documents.get(COLLECTION, self._key)
        if document is not None and document.revision != self._attempted:
            owner = cast("dict[str, str | None]", document.value)["owner"]
            revision, since = self._seen
            if owner is not None and revision != document.revision:
                self._seen = (document.revision, anyio.current_time())
                return False
            if owner is not None and anyio.current_time() - since < self._seconds:
                return False
        try:
            await self._write(self._me, document.revision if document else None, nothing)
        except DocumentConflictError:  # somebody else was faster
            return False
        return True

    async def commit(self, write: Callable[[Transaction], Awaitable[object]]) -> None:
        """Store something, if the lease is still held, which it is for `seconds` more then.

        `LeaseLostError` if it is not, and then nothing was stored.
        """
        async with self._turn:
            await self._settle()
            try:
                await self._write(self._me, self._revision, write)
            except DocumentConflictError as error:
                if error.collection != COLLECTION:
                    raise
                self._revision = self._attempted = None
                raise LeaseLostError from error

    async def release(self) -> None:
        """Let somebody else have it at once."""
        async with self._turn:
            await self._settle()
            await self._write(None, self._revision, nothing)
            self._revision = self._attempted = None

    async def _write(
        self,
        owner: str | None,
        expected: UUID | None,
        write: Callable[[Transaction], Awaitable[object]],
    ) -> None:
        begun = anyio.current_time()
        async with self._store.transaction() as tx:
            documents, value = tx.documents, {"owner": owner}
            if expected is None:
                self._attempted = await documents.add(COLLECTION, self._key, value)
            else:
                self._attempted = await documents.save(
                    COLLECTION, self._key, value, expected=expected
                )
            await write(tx)
        self._revision, self._confirmed = self._attempted, begun

    async def _settle(self) -> None:
        """Find out whether what was attempted last is stored."""
        if self._attempted != self._revision:
            document = await self._store.documents.get(COLLECTION, self._key)
            found = document.revision if document else None
            self._revision = found if found in (self._revision, self._attempted) else None
            self._attempted = self._revision
        if self._revision is None:
            raise LeaseLostError
