"""A transaction: appends that are collected, and written together when its block ends."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from types import TracebackType
from typing import Self, TypeAlias

from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint

from ..events import DomainEvent, NewEvent
from ..ids import AggregateId
from ..metadata import Metadata
from .records import Append, AppendResult, ExpectedVersion, encode_append

Write: TypeAlias = Callable[[Sequence[Append]], Awaitable[Sequence[AppendResult]]]


class Transaction:
    """Appends that are stored together when the block ends, or not at all.

    `results` holds one result an append, in order, once the block has ended; nothing inside the
    block, by this transaction or anybody else, sees its events before.
    """

    __slots__ = ("_appends", "_open", "_write", "results")

    def __init__(self, write: Write) -> None:
        self._write = write
        self._appends: list[Append] = []
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
        if not self._open:
            raise RuntimeError(
                "a transaction is used inside its block: async with store.transaction() as tx: …"
            )
        append = encode_append(aggregate_id, aggregate_type, events, expected_version, metadata)
        await checkpoint()
        self._appends.append(append)

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
            return
        if not self._appends:
            await checkpoint()
            return
        self.results = tuple(await self._write(self._appends))
