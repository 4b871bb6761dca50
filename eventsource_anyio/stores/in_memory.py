"""The in-memory store: the reference for what a store does, and the fake for a user's tests.

Invariants:
- `_records[position - 1]` is the record at a position; positions have no gaps.
- `_write` changes everything between two checkpoints, so no reader sees half of an append.
- `_outbox` is in the order of positions, because a position is given out when it is added to.
- Who hands its events on before they are stored (`on_append`) is the only writer until they are:
  others wait. So what it was told of versions and positions stays true, and nobody else sees it.
- It keeps what was encoded, and decodes at every read, as a database would: what a database would
  refuse, or would not give back the same, is refused here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from heapq import nsmallest
from itertools import dropwhile, islice
from typing import TypeAlias
from uuid import UUID

import anyio
from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint
from msgspec import Struct

from ..errors import StoreClosedError
from ..ids import AggregateId, slice_of, stream_id_of
from ..repositories.checkpoint import SaveCheckpoint
from ..repositories.document import (
    DeleteDocument,
    DeleteDocuments,
    Document,
    DocumentChange,
    EncodedDocument,
    changes,
    decode_document,
    revision_after,
)
from ..repositories.outbox import (
    AddMessages,
    EncodedMessage,
    OutboxStep,
    RemoveMessages,
    StoredMessage,
    decode_message,
)
from .hints import Hints
from .interface import EventStore
from .reading import Page, PageRequest
from .records import EPOCH, Append, AppendResult, EncodedEvent, Read, Step, decode_stored
from .signal import AppendSignal
from .transaction import Follow, Transaction

_Record: TypeAlias = tuple[EncodedEvent, AggregateId, str, int, datetime]
_SEARCHED_AT_MOST = 10_000


class _Staged(Struct, frozen=True):
    """What steps come to, beside the events, which are in the store's lists already."""

    results: list[AppendResult]
    checkpoints: dict[str, int]
    messages: list[OutboxStep]
    documents: dict[tuple[str, str], DocumentChange]


class _Claim(Struct, frozen=True):
    """Of the task that is the only writer, and when it no longer is."""

    task: int
    over: anyio.Event


class InMemoryEventStore(EventStore):
    """A store that lives as long as its object; opened again, it still has its events.

    For tests, and for programs that need no durability. It belongs to one event loop at a time.
    """

    def __init__(self) -> None:
        self._records: list[_Record] = []
        self._streams: dict[AggregateId, dict[str, list[int]]] = {}
        self._positions: dict[int, int] = {}  # by the event id as a number, which hashes faster
        self._checkpoints: dict[str, int] = {}
        self._outbox: dict[UUID, tuple[EncodedMessage, int, datetime]] = {}
        self._messages = 0
        self._documents: dict[str, dict[str, EncodedDocument]] = {}
        self._signal: AppendSignal | None = None
        self._claim: _Claim | None = None
        self._recorded_at = EPOCH  # of what is being appended
        self._own_hints = Hints(everywhere=True)

    def transaction(self) -> Transaction:
        return Transaction(self._write, self._look_ups(), self._write_inline)

    async def _open(self) -> None:
        await checkpoint()
        if self._signal is not None:
            raise RuntimeError("this InMemoryEventStore is open already")
        self._signal = AppendSignal()
        self._signal.advance(len(self._records))

    async def _close(self) -> None:
        signal, self._signal = self._signal, None
        if signal is not None:
            signal.close(type(self).__name__)
        await cancel_shielded_checkpoint()

    def _opened(self) -> AppendSignal:
        if self._signal is None:
            raise StoreClosedError(type(self).__name__)
        return self._signal

    async def last_position(self) -> int:
        await checkpoint()
        self._opened()
        return len(self._records)

    async def _write(self, steps: Sequence[Step]) -> Sequence[AppendResult]:
        await checkpoint()
        if self._claim is not None:
            await self._unclaimed()
        return self._store(steps, self._now())

    async def _write_inline(self, steps: Sequence[Step], follow: Follow) -> Sequence[AppendResult]:
        await checkpoint()
        await self._unclaimed()
        self._opened()
        claim = self._claim = _Claim(anyio.get_current_task().id, anyio.Event())
        try:
            before, now = len(self._records), self._now()
            results = self._stage(steps, now).results
            self._forget(before)
            return self._store([*steps, *await follow(results)], now)
        finally:
            self._claim = None
            claim.over.set()

    async def _unclaimed(self) -> None:
        while (claim := self._claim) is not None:
            if claim.task == anyio.get_current_task().id:
                raise RuntimeError(
                    "this task is called by on_append, for a transaction that is the only writer "
                    "meanwhile, so the call would wait for itself. Use the transaction that is "
                    "given: `tx.documents`, `tx.checkpoints`, `tx.outbox`."
                )
            await claim.over.wait()

    def _now(self) -> datetime:
        now = datetime.now(UTC)
        return max(now, self._records[-1][-1]) if self._records else now

    def _store(self, steps: Sequence[Step], now: datetime) -> Sequence[AppendResult]:
        signal = self._opened()
        staged = self._stage(steps, now)
        # None of these can fail, so they come when all that can has not.
        self._checkpoints.update(staged.checkpoints)
        for step in staged.messages:
            self._change_outbox(step)
        for change in staged.documents.values():
            self._change_document(change)
        signal.advance(len(self._records))
        return staged.results

    def _stage(self, steps: Sequence[Step], now: datetime) -> _Staged:
        """Append, and find out what else is to be done; or raise, and have done nothing."""
        self._recorded_at = now
        before = len(self._records)
        results: list[AppendResult] = []
        saved: dict[str, int] = {}
        messages: list[OutboxStep] = []
        documents: dict[tuple[str, str], DocumentChange] = {}
        try:
            for step in steps:
                if isinstance(step, Append):
                    results.append(self._append(step))
                elif isinstance(step, SaveCheckpoint):
                    step.check(saved.get(step.name, self._checkpoints.get(step.name, 0)))
                    saved[step.name] = step.position
                elif isinstance(step, AddMessages | RemoveMessages):
                    messages.append(step)
                elif isinstance(step, DeleteDocuments):
                    stored = [
                        (step.collection, key) for key in self._documents.get(step.collection, ())
                    ]
                    for name in [*stored, *(one for one in documents if one[0] == step.collection)]:
                        documents[name] = DeleteDocument(*name, None)
                else:
                    for change in changes(step):
                        name = (change.collection, change.key)
                        known = documents.get(name) or self._document(*name)
                        change.check(revision_after(known) if known else None)
                        documents[name] = change
        except BaseException:
            self._forget(before)
            raise
        return _Staged(results, saved, messages, documents)

    def _change_outbox(self, step: OutboxStep) -> None:
        if isinstance(step, AddMessages):
            now = datetime.now(UTC)
            for message in step.messages:
                if message.message_id not in self._outbox:
                    self._messages += 1
                    self._outbox[message.message_id] = (message, self._messages, now)
        else:
            for message_id in step.message_ids:
                self._outbox.pop(message_id, None)

    def _document(self, collection: str, key: str) -> EncodedDocument | None:
        return self._documents.get(collection, {}).get(key)

    def _change_document(self, change: DocumentChange) -> None:
        of_collection = self._documents.setdefault(change.collection, {})
        if isinstance(change, EncodedDocument):
            of_collection[change.key] = change
        else:
            of_collection.pop(change.key, None)

    def _append(self, append: Append) -> AppendResult:
        aggregate_type, aggregate_id = append.aggregate_type, append.aggregate_id
        stream = self._stream(aggregate_type, aggregate_id)
        records, positions = self._records, self._positions
        stored = {
            encoded.event_id: self._decode(positions[encoded.event_id.int])
            for encoded in append.events
            if encoded.event_id.int in positions
        }
        if stored:
            return append.repeated(stored)
        version, position = len(stream), len(records)
        if not append.expects(version):
            meanwhile = [
                records[stream[one - 1] - 1][0].event_type for one in append.unexpected(version)
            ]
            raise append.conflict(version, meanwhile)
        now = self._recorded_at
        if not stream:
            stream = self._streams.setdefault(aggregate_id, {}).setdefault(aggregate_type, [])
        for offset, encoded in enumerate(append.events, 1):
            records.append((encoded, aggregate_id, aggregate_type, version + offset, now))
            stream.append(position + offset)
            positions[encoded.event_id.int] = position + offset
        return append.result(version + 1, position + 1, now)

    def _stream(self, aggregate_type: str, aggregate_id: AggregateId) -> list[int]:
        return self._streams.get(aggregate_id, {}).get(aggregate_type, [])

    def _forget(self, last: int) -> None:
        """Take back what a failed unit of appends has added after this position."""
        while len(self._records) > last:
            encoded, aggregate_id, aggregate_type, _, _ = self._records.pop()
            self._streams[aggregate_id][aggregate_type].pop()
            del self._positions[encoded.event_id.int]

    def _decode(self, position: int) -> Read:
        encoded, aggregate_id, aggregate_type, version, recorded_at = self._records[position - 1]
        return decode_stored(
            encoded.event_id,
            encoded.event_type,
            aggregate_id,
            aggregate_type,
            version,
            position,
            recorded_at,
            encoded.occurred_at,
            encoded.metadata_json,
            encoded.schema_version,
            encoded.payload,
        )

    async def _read(self, request: PageRequest) -> Page:
        await checkpoint()
        self._opened()
        # A stream is a list of positions, the whole store is the range of them: one way to read.
        positions: Sequence[int] = (
            range(1, len(self._records) + 1)
            if request.stream is None
            else self._stream(*request.stream)
        )
        step = -1 if request.backwards else 1
        first, last = (len(positions), 1) if request.backwards else (1, len(positions))
        if request.start is not None:
            first = min(first, request.start) if request.backwards else request.start
        if request.stop is not None:
            last = max(last, request.stop) if request.backwards else min(last, request.stop)
        found: list[Read] = []
        resume, searched = first, 0
        while (last - resume) * step >= 0:
            if len(found) == request.limit or searched == _SEARCHED_AT_MOST:
                return Page(found, resume, at_end=False)
            position = positions[resume - 1]
            if self._matches(request, position):
                found.append(self._decode(position))
            resume += step
            searched += 1
        return Page(found, resume, at_end=True)

    def _matches(self, request: PageRequest, position: int) -> bool:
        encoded, aggregate_id, aggregate_type, _, _ = self._records[position - 1]
        if request.event_types and encoded.event_type not in request.event_types:
            return False
        if request.aggregate_types and aggregate_type not in request.aggregate_types:
            return False
        if request.slices is None:
            return True
        first, last = request.slices
        return first <= slice_of(stream_id_of(aggregate_type, aggregate_id)) <= last

    async def _wait(self, after: int) -> None:
        await self._opened().wait(after)

    async def _aggregate_types(self, aggregate_id: AggregateId) -> Sequence[str]:
        await checkpoint()
        self._opened()
        streams = self._streams.get(aggregate_id, {})
        return sorted(kind for kind, stream in streams.items() if stream)

    async def _checkpoint(self, name: str) -> int:
        await checkpoint()
        self._opened()
        return self._checkpoints.get(name, 0)

    async def _pending(self, limit: int, after: int) -> Sequence[StoredMessage]:
        await checkpoint()
        self._opened()
        return [
            decode_message(
                message.message_id,
                message.topic,
                message.key,
                message.payload,
                message.metadata_json,
                position,
                recorded_at,
            )
            for message, position, recorded_at in islice(
                dropwhile(lambda one: one[1] <= after, self._outbox.values()), limit
            )
        ]

    async def _documents_by_key(self, collection: str, keys: Sequence[str]) -> Sequence[Document]:
        await checkpoint()
        self._opened()
        stored = self._documents.get(collection, {})
        return [_decoded(stored[key]) for key in keys if key in stored]

    async def _documents_after(self, collection: str, after: str, limit: int) -> Sequence[Document]:
        await checkpoint()
        self._opened()
        stored = self._documents.get(collection, {})
        keys = nsmallest(min(limit, len(stored)), (key for key in stored if key > after))
        return [_decoded(stored[key]) for key in keys]


def _decoded(document: EncodedDocument) -> Document:
    return decode_document(
        document.collection, document.key, document.revision, document.value_json
    )
