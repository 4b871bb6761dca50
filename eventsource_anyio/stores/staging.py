"""Documents as a transaction has them: what is stored, and over it what the block has written."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

from anyio.lowlevel import checkpoint

from ..repositories.document import (
    DeleteDocument,
    DeleteDocuments,
    Document,
    DocumentChange,
    DocumentStep,
    changes,
    decode_document,
)

ByKey: TypeAlias = Callable[[str, Sequence[str]], Awaitable[Sequence[Document]]]
After: TypeAlias = Callable[[str, str, int], Awaitable[Sequence[Document]]]


class StagedDocuments:
    __slots__ = ("_changed", "_emptied", "_stored_after", "_stored_by_key")

    def __init__(self, by_key: ByKey, after: After) -> None:
        self._stored_by_key = by_key
        self._stored_after = after
        self._changed: dict[tuple[str, str], DocumentChange] = {}
        self._emptied: set[str] = set()

    def add(self, step: DocumentStep) -> None:
        if isinstance(step, DeleteDocuments):
            self._emptied.add(step.collection)
            for name in [name for name in self._changed if name[0] == step.collection]:
                del self._changed[name]
        else:
            for change in changes(step):
                self._changed[change.collection, change.key] = change

    async def by_key(self, collection: str, keys: Sequence[str]) -> Sequence[Document]:
        changed = self._changed
        found = [_made(changed[collection, key]) for key in keys if (collection, key) in changed]
        others = [key for key in keys if (collection, key) not in changed]
        if others and collection not in self._emptied:
            found += await self._stored_by_key(collection, others)
        else:
            await checkpoint()
        return [document for document in found if document is not None]

    async def after(self, collection: str, after: str, limit: int) -> Sequence[Document]:
        own = {
            key: change
            for (its, key), change in self._changed.items()
            if its == collection and key > after
        }
        found: list[Document] = []
        if collection in self._emptied:
            await checkpoint()
        else:
            stored = await self._stored_after(collection, after, limit + len(own))
            found = [document for document in stored if document.key not in own]
        found += [made for change in own.values() if (made := _made(change)) is not None]
        return sorted(found, key=lambda document: document.key)[:limit]


def _made(change: DocumentChange) -> Document | None:
    """The document as it is after a change; None if there is none."""
    if isinstance(change, DeleteDocument):
        return None
    return decode_document(change.collection, change.key, change.revision, change.value_json)
