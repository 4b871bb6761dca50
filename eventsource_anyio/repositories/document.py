"""Documents: small JSON values under a collection and a key, each with a revision to compare.

- Every write gives a document a new revision, made before it is written. So whoever writes inside a
  transaction knows it before the commit, and no revision ever comes back, also not with a document
  that was deleted and is added again.
- A value is what JSON holds: dict, list, str, int, float, bool, None. What would come back as
  something else, on any store, is refused before anything is written.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import TypeAlias, cast
from uuid import UUID

from anyio.lowlevel import checkpoint
from msgspec import DecodeError, Raw, Struct
from msgspec.json import Decoder, Encoder

from ..codec.difference import difference, show
from ..errors import DocumentConflictError, StorageError
from ..ids import check_name, uuid7

_LARGEST = 2**63 - 1
_LONGEST_KEY = 1000
_BYTES_AT_MOST = 2600  # PostgreSQL's limit to an entry of an index is 2,704, all told

_encode = Encoder().encode
_decode = Decoder().decode
_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
_LARGE_FLOAT = re.compile(rb"(?:^|[:,\[])-?[0-9.]+e[0-9]")


class Document(Struct, frozen=True):
    """A value in a collection, and the revision that its last write has given it."""

    key: str
    value: object
    revision: UUID


class EncodedDocument(Struct, frozen=True, gc=False):
    """A document, ready to be stored if its revision is `expected` (None: whatever it is).

    Where `absent`, it is stored only if there is none.
    """

    collection: str
    key: str
    value_json: str
    revision: UUID
    expected: UUID | None
    absent: bool

    def check(self, actual: UUID | None) -> None:
        """Raise if it may not be stored over this revision; None: there is no document."""
        if (self.absent and actual is not None) or self.expected not in (None, actual):
            raise DocumentConflictError(self.collection, self.key, self.expected, actual)


class SaveDocuments(Struct, frozen=True, gc=False):
    """A step of a unit of writing: store documents, all if each may be, of different keys."""

    documents: Sequence[EncodedDocument]


class DeleteDocument(Struct, frozen=True, gc=False):
    """A step of a unit of writing: delete a document, if it is at `expected` (None: if any)."""

    collection: str
    key: str
    expected: UUID | None

    def check(self, actual: UUID | None) -> None:
        """Raise if what is at this revision may not be deleted; None: there is no document."""
        if self.expected not in (None, actual):
            raise DocumentConflictError(self.collection, self.key, self.expected, actual)


class DeleteDocuments(Struct, frozen=True, gc=False):
    """A step of a unit of writing: delete whatever is in a collection then."""

    collection: str


DocumentStep: TypeAlias = SaveDocuments | DeleteDocument | DeleteDocuments
DocumentChange: TypeAlias = EncodedDocument | DeleteDocument


def changes(step: SaveDocuments | DeleteDocument) -> Sequence[DocumentChange]:
    """What a step does, document by document."""
    return step.documents if isinstance(step, SaveDocuments) else (step,)


def revision_after(change: DocumentChange) -> UUID | None:
    """The revision that a document is at once it was changed; None: there is none any more."""
    return change.revision if isinstance(change, EncodedDocument) else None


class DocumentRepository:
    """Small JSON values, in collections, by key.

    A key has at most 1,000 characters, and with its collection 2,600 bytes of UTF-8.
    """

    __slots__ = ("_after", "_by_key", "_write")

    def __init__(
        self,
        by_key: Callable[[str, Sequence[str]], Awaitable[Sequence[Document]]],
        after: Callable[[str, str, int], Awaitable[Sequence[Document]]],
        write: Callable[[Sequence[DocumentStep]], Awaitable[object]],
    ) -> None:
        self._by_key = by_key
        self._after = after
        self._write = write

    async def get(self, collection: str, key: str) -> Document | None:
        """The document; None if there is none."""
        collection, key = _check_names(collection, key)
        found = await self._by_key(collection, (key,))
        return found[0] if found else None

    async def get_all(self, collection: str, keys: Iterable[str]) -> Mapping[str, Document]:
        """Those of them that exist, by key."""
        collection = check_name("collection", collection)
        if isinstance(keys, str):
            raise TypeError(f"give a list of keys, not one: [{keys!r}]")
        wanted = list(dict.fromkeys([_check_names(collection, key)[1] for key in keys]))
        if not wanted:
            await checkpoint()
            return {}
        found = {document.key: document for document in await self._by_key(collection, wanted)}
        return {key: found[key] for key in wanted if key in found}

    async def list(
        self, collection: str, *, after: str = "", limit: int = 100
    ) -> Sequence[Document]:
        """The first documents whose key comes after this one, by key in the order of code points.

        Those that are added meanwhile are among them or not, as their key has it.
        """
        collection = check_name("collection", collection)
        if after != "":
            after = check_name("after", after, _LONGEST_KEY)
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise ValueError(f"limit must be a number from 1, not {limit!r}")
        return await self._after(collection, after, min(limit, _LARGEST))

    async def add(self, collection: str, key: str, value: object) -> UUID:
        """Store a new document; `DocumentConflictError` if it is there. Its revision."""
        return await self._save(_document(collection, key, value, None, absent=True))

    async def save(
        self, collection: str, key: str, value: object, *, expected: UUID | None = None
    ) -> UUID:
        """Store it, whether it is there or not. Its new revision.

        With `expected` it is stored only if that is its revision now, else `DocumentConflictError`
        is raised. So of several that got the same document one wins.
        """
        return await self._save(_document(collection, key, value, _check_revision(expected)))

    async def save_all(self, collection: str, values: Mapping[str, object]) -> None:
        """Store values by their keys, all or none, whether they are there or not."""
        collection = check_name("collection", collection)
        documents = {
            document.key: document
            for document in [_document(collection, *item, None) for item in values.items()]
        }
        await (
            self._write((SaveDocuments(list(documents.values())),)) if documents else checkpoint()
        )

    async def delete(self, collection: str, key: str, *, expected: UUID | None = None) -> None:
        """Delete it; one that is not there is fine.

        With `expected` it is deleted only if that is its revision now, else
        `DocumentConflictError` is raised.
        """
        collection, key = _check_names(collection, key)
        await self._write((DeleteDocument(collection, key, _check_revision(expected)),))

    async def delete_all(self, collection: str) -> None:
        """Delete every document of a collection; one that is empty is fine."""
        await self._write((DeleteDocuments(check_name("collection", collection)),))

    async def _save(self, document: EncodedDocument) -> UUID:
        await self._write((SaveDocuments((document,)),))
        return document.revision


def _check_names(collection: str, key: str) -> tuple[str, str]:
    collection = check_name("collection", collection)
    key = check_name("key", key, _LONGEST_KEY)
    if 4 * (len(collection) + len(key)) > _BYTES_AT_MOST:
        size = len(collection.encode()) + len(key.encode())
        if size > _BYTES_AT_MOST:
            raise ValueError(
                f"collection and key must have at most {_BYTES_AT_MOST} bytes of UTF-8 together, "
                f"not {size}"
            )
    return collection, key


def _check_revision(expected: UUID | None) -> UUID | None:
    if expected is not None and not isinstance(expected, UUID):
        raise TypeError(f"expected must be a revision, a UUID, not {expected!r}")
    return expected


def _document(
    collection: str, key: str, value: object, expected: UUID | None, *, absent: bool = False
) -> EncodedDocument:
    collection, key = _check_names(collection, key)
    try:
        value_json = _encode_value(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"document {key!r} of {collection!r} cannot be stored: {error}. Its value is made of "
            "dicts with string keys, lists, strings, numbers, booleans and None."
        ) from error
    return EncodedDocument(collection, key, value_json, uuid7(), expected, absent)


def _encode_value(value: object) -> str:
    data = _encode(value)
    again = _decode(data)
    if again != value:
        path, reason = difference(value, again) or ("", f"{show(value)} is not equal to itself")
        raise ValueError(f"${path}: {reason}")
    if _NUL.search(data):
        raise ValueError("a string in it holds the character U+0000, which not every store holds")
    if _LARGE_FLOAT.search(data):
        data = _encode(_written_out(again))
    return data.decode()


def _written_out(value: object) -> object:
    """The value with its large floats in full: a `numeric`, as jsonb has it, makes 1e16 an int."""
    if isinstance(value, float):
        text = format(Decimal(repr(value)), "f")
        return Raw((text if "." in text else f"{text}.0").encode())
    if isinstance(value, dict):
        items = cast("dict[str, object]", value).items()
        return {key: _written_out(item) for key, item in items}
    if isinstance(value, list):
        return [_written_out(item) for item in cast("Sequence[object]", value)]
    return value


def decode_document(collection: str, key: str, revision: UUID, value_json: str | bytes) -> Document:
    """The document as `DocumentRepository.get` gives it."""
    try:
        value: object = _decode(value_json)
    except (DecodeError, UnicodeError) as error:
        raise StorageError(
            f"Document {key!r} of {collection!r} cannot be read.\n"
            f"  Its value is not JSON: {error}.\n"
            "  Correct the value where the document is stored, or save it anew."
        ) from error
    return Document(key, value, revision)
