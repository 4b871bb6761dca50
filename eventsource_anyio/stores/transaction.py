"""A transaction: steps that are collected, and written together when its block ends."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from types import TracebackType
from typing import Self, TypeAlias

from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint
from msgspec import Struct

from ..events import DomainEvent, NewEvent
from ..ids import AggregateId
from ..metadata import Metadata
from ..repositories.checkpoint import CheckpointRepository
from ..repositories.document import (
    DeleteDocument,
    Document,
    DocumentChange,
    DocumentRepository,
    SaveDocuments,
    changes,
    decode_document,
)
from ..repositories.outbox import OutboxRepository, StoredMessage
from .records import AppendResult, ExpectedVersion, Step, encode_append

Write: TypeAlias = Callable[[Sequence[Step]], Awaitable[Sequence[AppendResult]]]


class LookUps(Struct, frozen=True):
    """How a store looks up what it keeps beside its events: see the methods of these names."""

    checkpoint: Callable[[str], Awaitable[int]]
    pending: Callable[[int], Awaitable[Sequence[StoredMessage]]]
    documents_by_key: Callable[[str, Sequence[str]], Awaitable[Sequence[Document]]]
    documents_after: Callable[[str, str, int], Awaitable[Sequence[Document]]]


class Transaction:
    """Appends, checkpoints, messages and documents, stored together when the block ends, or not.

    `results` holds one result an append, in order, once the block has ended; nobody sees anything
    of it before, not inside the block either, but for documents: inside it they are what the block
    has made of them.
    """

    __slots__ = (
        "__weakref__",
        "_documents",
        "_look_ups",
        "_open",
        "_steps",
        "_write",
        "results",
    )

    def __init__(self, write: Write, look_ups: LookUps) -> None:
        self._write = write
        self._look_ups = look_ups
        self._steps: list[Step] = []
        self._documents: dict[tuple[str, str], DocumentChange] = {}
        self._open: bool | None = None
        self.results: tuple[AppendResult, ...] = ()

    async def append_events(
        self,
        aggregate_id: AggregateId,
        aggregate_type: str,
        events: Iterable[DomainEvent | NewEvent],
        expected_version: ExpectedVersion | int,
        *,
        metadata: Metadata | None = None,
    ) -> None:
        """As `EventStore.append_events`, but stored at the end of the block.

        Arguments are checked and encoded at once. The expected version is that of the stream with
        this transaction's earlier appends in it.
        """
        append = encode_append(aggregate_id, aggregate_type, events, expected_version, metadata)
        await self._add((append,))

    @property
    def checkpoints(self) -> CheckpointRepository:
        """As `EventStore.checkpoints`, but saved, and compared, at the end of the block."""
        self._check_open()
        return CheckpointRepository(self._look_ups.checkpoint, self._add)

    @property
    def outbox(self) -> OutboxRepository:
        """As `EventStore.outbox`, but added to, and taken from, at the end of the block."""
        self._check_open()
        return OutboxRepository(self._look_ups.pending, self._add)

    @property
    def documents(self) -> DocumentRepository:
        """As `EventStore.documents`, but written, and compared, at the end of the block.

        What is read is what is stored, and over it what the block has written so far.
        """
        self._check_open()
        return DocumentRepository(self._by_key, self._after, self._add)

    async def __aenter__(self) -> Self:
        await checkpoint()
        if self._open is not None:
            raise RuntimeError("a transaction is used once; call store.transaction() for a new one")
        self._open = True
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open = False
        if exc_type is not None:
            await cancel_shielded_checkpoint()
        elif self._steps:
            await self._commit()
        else:
            await checkpoint()

    def _check_open(self) -> None:
        if not self._open:
            raise RuntimeError(
                "a transaction is used inside its block: async with store.transaction() as tx: …"
            )

    async def _add(self, steps: Sequence[Step]) -> None:
        await checkpoint()
        self._check_open()
        self._steps += steps
        for step in steps:
            if isinstance(step, SaveDocuments | DeleteDocument):
                for change in changes(step):
                    self._documents[change.collection, change.key] = change

    async def _by_key(self, collection: str, keys: Sequence[str]) -> Sequence[Document]:
        written = self._documents
        found = [_made(written[collection, key]) for key in keys if (collection, key) in written]
        unwritten = [key for key in keys if (collection, key) not in written]
        if unwritten:
            found += await self._look_ups.documents_by_key(collection, unwritten)
        else:
            await checkpoint()
        return [document for document in found if document is not None]

    async def _after(self, collection: str, after: str, limit: int) -> Sequence[Document]:
        own = {
            key: change
            for (its, key), change in self._documents.items()
            if its == collection and key > after
        }
        stored = await self._look_ups.documents_after(collection, after, limit + len(own))
        found = [document for document in stored if document.key not in own]
        found += [made for change in own.values() if (made := _made(change)) is not None]
        return sorted(found, key=lambda document: document.key)[:limit]

    async def _commit(self) -> None:
        self.results = tuple(await self._write(self._steps))


def _made(change: DocumentChange) -> Document | None:
    """The document as it is after a change; None if there is none."""
    if isinstance(change, DeleteDocument):
        return None
    return decode_document(change.collection, change.key, change.revision, change.value_json)
