"""A read model of one document a stream, folded from the stream's events.

- A batch reads the documents of its streams at once, folds in memory, and writes them at once.
- A stream's events are all in one shard, so nobody else changes its document meanwhile.
- The documents of a version are in a collection of their own. Which version serves may change at
  any moment, and what served may be dropped after that: a reader that finds nothing looks again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import iscoroutinefunction
from typing import ClassVar, Generic, TypeVar, cast, get_args, get_origin

import attrs
from msgspec.json import decode

from ..codec import Codec, PayloadError
from ..dispatch import check_marked, marked, marked_methods
from ..events import DomainEvent, StoredEvent, names_under
from ..ids import (
    AggregateId,
    check_aggregate_type,
    normalize_aggregate_id,
    parse_stream_id,
    stream_id_of,
)
from ..repositories.document import Document
from ..stores.interface import EventStore, ReadOptions, Transaction
from .base import Projection
from .serving import ServingRepository

V = TypeVar("V")
F = TypeVar("F", bound=Callable[..., object])
_MARK = "__eventsource_evolves__"


def evolves(*event_classes: type[DomainEvent]) -> Callable[[F], F]:
    """Mark the method of a `SingleStreamView` that changes the view by these events, and their
    subclasses.

    It is called with the view and the stored event, as `SingleStreamView.evolve` is, and returns
    the view after it.
    """
    check_marked(_MARK, event_classes)

    def mark(method: F) -> F:
        if iscoroutinefunction(method):
            raise TypeError(f"{method.__qualname__} is async, and nobody would await it")
        return marked(_MARK, event_classes, method)

    return mark


class SingleStreamView(Projection[Transaction], Generic[V]):
    """A projection that folds each stream into one document: `SingleStreamView[AccountView]`.

    `AccountView` is an attrs class of the user's, which the project's codec can store.
    `aggregate_type` says which streams. Methods marked with `@evolves`, or `evolve`, say what
    follows from an event; `get` and `list` read. Everything else is as with any `Projection`.
    """

    aggregate_type: str
    _codec: ClassVar[Codec[object]]
    _evolves_otherwise: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls._methods:
            raise TypeError(
                f"{cls.__name__} is a view: mark its methods with @evolves, not @handles"
            )
        cls._methods = {**marked_methods(cls, _MARK)}
        cls._evolves_otherwise |= "evolve" in vars(cls)
        view = _view_of(cls)
        if view is not None:
            if not attrs.has(view):
                raise TypeError(
                    f"{cls.__name__} is a view of {view!r}, which is not an attrs class. "
                    "Decorate it with @attrs.frozen."
                )
            cls._codec = cast("Codec[object]", Codec(view))
        if "aggregate_type" in vars(cls):
            cls.aggregate_type = check_aggregate_type(cls.aggregate_type)
            cls.aggregate_types = (cls.aggregate_type,)

    def evolve(self, view: V | None, event: StoredEvent) -> V | None:
        """The view after an event, by its `@evolves` method unless it is overridden.

        `view` is None where there is none: before the first event, or after None was returned,
        which deletes it. It depends on its arguments alone.
        """
        method = self._method_for(type(event.event))
        return view if method is None else cast("V | None", getattr(self, method)(view, event))

    async def handle(self, event: StoredEvent, tx: Transaction) -> None:
        await self.handle_batch((event,), tx)

    async def handle_batch(self, events: Sequence[StoredEvent], tx: Transaction) -> None:
        collection = self._collection(self.version)
        stored = await tx.documents.get_all(collection, [event.stream_id for event in events])
        views = {key: self._decode(document) for key, document in stored.items()}
        after: dict[str, V | None] = {**views}
        for event in events:
            after[event.stream_id] = self.evolve(after.get(event.stream_id), event)
        kept = {key: self._encode(key, view) for key, view in after.items() if view is not None}
        await tx.documents.save_all(collection, kept)
        for key in stored.keys() - kept.keys():
            await tx.documents.delete(collection, key)

    async def reset(self, tx: Transaction) -> None:
        await tx.documents.delete_all(self._collection(self.version))

    async def get(self, store: EventStore, aggregate_id: AggregateId) -> V | None:
        """The view of an aggregate, of the version that serves; None if there is none."""
        key = stream_id_of(self.aggregate_type, normalize_aggregate_id(aggregate_id))
        collection = await self._serving(store)
        while True:
            document = await store.documents.get(collection, key)
            if document is not None:
                return self._decode(document)
            before, collection = collection, await self._serving(store)
            if collection == before:
                return None

    async def list(
        self, store: EventStore, *, after: AggregateId | None = None, limit: int = 100
    ) -> Mapping[AggregateId, V]:
        """The first views after that of an aggregate, by aggregate id, in the order of its text."""
        key = ""
        if after is not None:
            key = stream_id_of(self.aggregate_type, normalize_aggregate_id(after))
        collection = await self._serving(store)
        while True:
            page = await store.documents.list(collection, after=key, limit=limit)
            before, collection = collection, await self._serving(store)
            if collection == before:
                return {parse_stream_id(one.key)[1]: self._decode(one) for one in page}

    def filters(self) -> ReadOptions:
        if not hasattr(type(self), "_codec") or not hasattr(self, "aggregate_type"):
            raise TypeError(
                f"{type(self).__name__} needs the class of its view and an aggregate_type: "
                f"class {type(self).__name__}(SingleStreamView[AccountView]): "
                'aggregate_type = "Account"'
            )
        options = super().filters()
        if options.event_types or self._evolves_otherwise:
            return options
        names = names_under(cast("Mapping[type[DomainEvent], str]", self._methods))
        return attrs.evolve(options, event_types=names)

    def _collection(self, version: int) -> str:
        return f"views/{self.name}/{version}"

    async def _serving(self, store: EventStore) -> str:
        serving = await ServingRepository(store).get(self.name)
        return self._collection(self.version if serving is None else serving.version)

    def _encode(self, key: str, view: V) -> object:
        try:
            return decode(self._codec.encode(view))
        except PayloadError as error:
            raise ValueError(
                f"the view of {key} cannot be stored: {error.path}: {error.reason}.\n"
                f"  Projection {self.name!r}, version {self.version}, has folded it.\n"
                "  Give the field a value of its annotated type, or correct the annotation."
            ) from error

    def _decode(self, document: Document) -> V:
        try:
            return cast("V", self._codec.convert(cast("dict[str, object]", document.value)))
        except PayloadError as error:
            raise ValueError(
                f"the stored view of {document.key} cannot be read: {error.path}: {error.reason}.\n"
                f"  The class of the views of projection {self.name!r} has changed since it was "
                "stored, or another version serves.\n"
                "  Give new fields a default, or raise the projection's version; or rebuild it."
            ) from error


def _view_of(cls: type) -> type | None:
    """What `cls` was subclassed with in brackets, if that is a class."""
    for base in vars(cls).get("__orig_bases__", ()):
        origin = get_origin(base)
        if isinstance(origin, type) and issubclass(origin, SingleStreamView):
            (view,) = get_args(base)
            return None if isinstance(view, TypeVar) else cast("type", view)
    return None
