"""What a broker does for a bus, in a handful of calls; everything else is written once, above them.

- Messages are kept in partitions, each in the order in which they were sent. An offset is a place
  in a partition, a string that only the broker understands; `""` is before the first message that
  was ever sent.
- A broker keeps a bounded number of messages, and may be emptied. Whoever reads after an offset is
  told if messages after it may be gone that it has not read.
- Entries are small values by key, each with a revision that is another one after every write, and
  never comes back. They are what leases, checkpoints and dead letters are made of: whoever writes
  one says which revision it is to have, so the revision is a fencing token, as in the shards of
  projections.
- A key is a directory and a name in it, parts joined by `/`; each part is made of ASCII letters,
  digits, `-`, `_` and `=`, and may be long (1,000 characters and more).
- Calls are cancellable, and leave the broker usable. What fails is a `StorageError`; a call that
  fails may be made again, and then `send` may have stored messages twice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence

from msgspec import Struct


class Message(Struct, frozen=True, gc=False):
    """What is sent; `message_id` is the event's id."""

    partition: int
    message_id: str
    payload: bytes


class ReceivedMessage(Struct, frozen=True, gc=False):
    """A message, and its place in its partition."""

    partition: int
    offset: str
    message_id: str
    payload: bytes


class Reading(Struct, frozen=True, gc=False):
    """What was read. `lost` are partitions of which messages after the offset, before the first one
    that was read, were dropped, or may have been because the log was lost and begun again."""

    messages: Sequence[ReceivedMessage]
    lost: Collection[int] = ()


class Entry(Struct, frozen=True, gc=False):
    """A small value under a key."""

    key: str
    value: bytes
    revision: str


class EntryConflictError(Exception):
    """Internal: an entry is not at the expected revision, and was not written."""


class Broker(ABC):
    """A connection, or several; opened and closed once."""

    @abstractmethod
    async def open(self) -> None:
        """Connect, and make what is missing there. `StorageError` says what is wrong."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of everything, shielded from cancellation."""

    @abstractmethod
    async def send(self, messages: Sequence[Message]) -> None:
        """Store messages, in order; they are stored durably when it returns.

        Of what fails or is cancelled, the first messages of each partition may be stored.
        """

    @abstractmethod
    async def read(self, after: Mapping[int, str], limit: int, wait: float) -> Reading:
        """Up to about `limit` messages of these partitions, after an offset of each.

        Those of one partition are in order. Waits for the first one for up to `wait` seconds, and
        returns none if there is none. An offset of a log that was lost since counts as `""`.
        Cancelled, nothing is consumed: nothing ever is.
        """

    @abstractmethod
    async def read_back(self, partition: int, upto: str, limit: int) -> Sequence[ReceivedMessage]:
        """The last messages of a partition up to an offset, which is included; in any order."""

    @abstractmethod
    async def ends(self, partitions: Sequence[int]) -> Mapping[int, str]:
        """The offset of the last message of each partition; what is sent later is after it."""

    @abstractmethod
    async def get(self, key: str) -> Entry | None: ...

    @abstractmethod
    async def list(self, directory: str) -> Sequence[Entry]:
        """The entries whose keys are this, `/` and one part more, in any order."""

    @abstractmethod
    async def put(self, key: str, value: bytes, expected: str | None) -> str:
        """Store a value over the one at this revision, or, with None, where there is none.

        Returns the new revision. `EntryConflictError` if it is at another one.
        """

    @abstractmethod
    async def delete(self, key: str, expected: str) -> None:
        """Delete an entry that is at this revision; `EntryConflictError` if it is not."""
