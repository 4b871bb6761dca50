"""Where a subscription stands: an entry a partition, which is lease and checkpoint in one.

- An entry is written by its owner, always where it has the revision that was written last. So the
  revision is the fencing token: whoever takes a partition over writes its entry, and then the old
  owner, however late it wakes up, finds out as soon as it writes.
- Who is alive is seen, not declared: each member of a subscription has an entry, and writes it
  again and again. One whose revision has not changed for `lease` seconds, by the clock of whoever
  looks, is dead; no clocks are compared. Whoever finds one dead deletes its entry first, if it
  still has that revision, so one that was only slow finds out by its next beat.
"""

from __future__ import annotations

from collections.abc import Collection

import anyio
from msgspec import Struct
from msgspec.json import Decoder, Encoder
from msgspec.structs import replace

from ..ids import uuid7
from .broker import Broker, Entry, EntryConflictError
from .encoding import key_part


class Standing(Struct, frozen=True, omit_defaults=True):
    """How far a subscription has got in a partition, and who goes on from there.

    `position` is that of the last event that was handled, as far as is known. Events up to the
    position `skip` are not handled. Those up to `until` are read in the store first.
    """

    offset: str
    position: int = 0
    skip: int = 0
    until: int = 0
    owner: str | None = None


class Lease(Struct, frozen=True):
    """A partition's entry."""

    partition: int
    standing: Standing
    revision: str


_encode = Encoder().encode
_decode = Decoder(Standing).decode


class LeaseRepository:
    """The partitions of one subscription."""

    def __init__(self, broker: Broker, subscription: str) -> None:
        self._broker = broker
        self._directory = f"subscriptions/{key_part(subscription)}/partitions"

    async def all(self) -> dict[int, Lease]:
        entries = await self._broker.list(self._directory)
        return {one.partition: one for one in map(_lease, entries)}

    async def get(self, partition: int) -> Lease | None:
        entry = await self._broker.get(self._key(partition))
        return None if entry is None else _lease(entry)

    async def create(self, partition: int, standing: Standing) -> None:
        """`EntryConflictError` if somebody else has."""
        await self._broker.put(self._key(partition), _encode(standing), None)

    async def save(self, lease: Lease, standing: Standing) -> Lease:
        """It as it is after this; `EntryConflictError` if somebody else has written it."""
        key, value = self._key(lease.partition), _encode(standing)
        revision = await self._broker.put(key, value, lease.revision)
        return replace(lease, standing=standing, revision=revision)

    def _key(self, partition: int) -> str:
        return f"{self._directory}/{partition:04}"


def _lease(entry: Entry) -> Lease:
    return Lease(int(entry.key.rpartition("/")[2]), _decode(entry.value), entry.revision)


class Members:
    """Who shares the partitions of a subscription, and this one among them."""

    def __init__(self, broker: Broker, subscription: str, lease: float) -> None:
        self._broker = broker
        self._directory = f"subscriptions/{key_part(subscription)}/members"
        self._lease = lease
        self._seen: dict[str, tuple[str, float]] = {}
        self._joined = False
        self.me = str(uuid7())  # those that come later sort last, and move fewer partitions

    async def look(self) -> Collection[str]:
        """Say that this one is alive; all that are. One that was taken for dead has another id."""
        own = await self._broker.get(self._key(self.me)) if self._joined else None
        if own is not None:
            try:
                await self._broker.put(own.key, b"", own.revision)
            except EntryConflictError:
                own = None
        if own is None:
            self.me = str(uuid7())
            self._joined = True
            await self._broker.put(self._key(self.me), b"", None)
        found = {
            one.key.rpartition("/")[2]: one for one in await self._broker.list(self._directory)
        }
        self._seen = {one: seen for one, seen in self._seen.items() if one in found}
        return [
            one for one, entry in found.items() if one == self.me or await self._alive(one, entry)
        ]

    async def has(self, member: str) -> bool:
        return await self._broker.get(self._key(member)) is not None

    async def leave(self) -> None:
        if self._joined and (own := await self._broker.get(self._key(self.me))):
            await self._broker.delete(own.key, own.revision)

    async def _alive(self, member: str, entry: Entry) -> bool:
        now = anyio.current_time()
        revision, since = self._seen.get(member, (None, now))
        if revision != entry.revision:
            self._seen[member] = (entry.revision, now)
            return True
        if now - since < self._lease:
            return True
        del self._seen[member]
        try:
            await self._broker.delete(entry.key, entry.revision)
        except EntryConflictError:
            return True
        return False

    def _key(self, member: str) -> str:
        return f"{self._directory}/{member}"
