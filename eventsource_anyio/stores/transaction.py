"""A transaction: steps that are collected, and written together when its block ends."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from types import TracebackType
from typing import Self, TypeAlias

from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint
from msgspec import Struct

from ..events import DomainEvent, NewEvent, StoredEvent
from ..ids import AggregateId
from ..metadata import Metadata
from ..repositories.checkpoint import CheckpointRepository
from ..repositories.document import Document, DocumentRepository, DocumentStep
from ..repositories.outbox import AddMessages, OutboxHint, OutboxRepository, StoredMessage
from .records import Append, AppendResult, ExpectedVersion, Step, encode_append
from .staging import StagedDocuments

Write: TypeAlias = Callable[[Sequence[Step]], Awaitable[Sequence[AppendResult]]]
# Given the results of what is being written, it returns the steps that are to be written with it.
Follow: TypeAlias = Callable[[Sequence[AppendResult]], Awaitable[Sequence[Step]]]
WriteInline: TypeAlias = Callable[[Sequence[Step], Follow], Awaitable[Sequence[AppendResult]]]
AppendHandler: TypeAlias = Callable[[Sequence[StoredEvent], "Transaction"], Awaitable[None]]


class LookUps(Struct, frozen=True):
    """How a store looks up what it keeps beside its events: see the methods of these names."""

    checkpoint: Callable[[str], Awaitable[int]]
    pending: Callable[[int, int], Awaitable[Sequence[StoredMessage]]]
    documents_by_key: Callable[[str, Sequence[str]], Awaitable[Sequence[Document]]]
    documents_after: Callable[[str, str, int], Awaitable[Sequence[Document]]]
    outbox_hint: OutboxHint


class Transaction:
    """Appends, checkpoints, messages and documents, stored together when the block ends, or not.

    `results` holds one result an append, in order, once the block has ended; nobody sees anything
    of it before, not inside the block either, but for documents: inside it they are what the block
    has made of them.
    """

    __slots__ = (
        "__weakref__",
        "_documents",
        "_handlers",
        "_handling",
        "_look_ups",
        "_messages",
        "_open",
        "_steps",
        "_write",
        "_write_inline",
        "results",
    )

    def __init__(
        self, write: Write, look_ups: LookUps, write_inline: WriteInline | None = None
    ) -> None:
        self._write = write
        self._write_inline = write_inline
        self._look_ups = look_ups
        self._steps: list[Step] = []
        self._documents = StagedDocuments(look_ups.documents_by_key, look_ups.documents_after)
        self._handlers: list[AppendHandler] = []
        self._handling = False
        self._messages = False  # whether any were added
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
        if self._handling:
            raise RuntimeError(
                "what is called by on_append appends nothing, as nobody would be called for it. "
                "Let a projection of a ProjectionCoordinator append what follows from an event."
            )
        append = encode_append(aggregate_id, aggregate_type, events, expected_version, metadata)
        await self._add((append,))

    def on_append(self, handle: AppendHandler) -> None:
        """Have it called at the end of the block, with the events that are being stored by it.

        They have their versions and positions. What it writes by the transaction that it is given,
        which is this one, is stored together with them, or nothing is: what it raises comes out of
        the block. It is not called for an append that only repeats an earlier one, and reads what
        was committed before. In memory and on SQLite all other writers wait for it; on PostgreSQL
        those of the same streams do, and so do readers, for these events and all that come after.
        So it is quick.
        """
        self._check_open()
        if not self._can_follow():
            raise RuntimeError(
                "this transaction calls nobody for its events: it is part of another one, or of a "
                "store that cannot. Use `store.transaction()`."
            )
        self._handlers.append(handle)

    @property
    def checkpoints(self) -> CheckpointRepository:
        """As `EventStore.checkpoints`, but saved, and compared, at the end of the block."""
        self._check_open()
        return CheckpointRepository(self._look_ups.checkpoint, self._add)

    @property
    def outbox(self) -> OutboxRepository:
        """As `EventStore.outbox`, but added to, and taken from, at the end of the block."""
        self._check_open()
        return OutboxRepository(self._look_ups.pending, self._add, OutboxHint())

    @property
    def documents(self) -> DocumentRepository:
        """As `EventStore.documents`, but written, and compared, at the end of the block.

        What is read is what is stored, and over it what the block has written so far.
        """
        self._check_open()
        return DocumentRepository(self._documents.by_key, self._documents.after, self._add)

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
            if isinstance(step, DocumentStep):
                self._documents.add(step)
            elif isinstance(step, AddMessages):
                self._messages = True

    async def _commit(self) -> None:
        if self._write_inline is not None and self._is_followed():
            results = await self._write_inline(self._steps, self._follow)
        else:
            results = await self._write(self._steps)
        self._stored(results)

    def _stored(self, results: Sequence[AppendResult]) -> None:
        """It is committed."""
        self.results = tuple(results)
        if self._messages:
            self._look_ups.outbox_hint.wake()

    def _can_follow(self) -> bool:
        return self._write_inline is not None

    def _is_followed(self) -> bool:
        """Whether somebody is to be called for the events."""
        return bool(self._handlers) and any(isinstance(step, Append) for step in self._steps)

    async def _follow(self, results: Sequence[AppendResult]) -> Sequence[Step]:
        appends = [step for step in self._steps if isinstance(step, Append)]
        events = [
            event
            for append, result in zip(appends, results, strict=True)
            if append.stored_by(result)
            for event in result.events
        ]
        self._steps = []
        if events:
            self._open = self._handling = True
            try:
                for handle in self._handlers:
                    await handle(events, self)
            finally:
                self._open = self._handling = False
        return self._steps
