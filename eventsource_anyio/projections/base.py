"""What a projection is: from events to a read model, each event once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from inspect import iscoroutinefunction
from typing import Any, ClassVar, Generic, Literal, Never, TypeVar, cast

from ..dispatch import check_marked, marked, marked_methods
from ..events import DomainEvent, StoredEvent, names_under
from ..ids import SLICES, check_name
from ..stores.interface import ReadOptions, Transaction

TTransaction = TypeVar("TTransaction", bound=Transaction, contravariant=True)
F = TypeVar("F", bound=Callable[..., Coroutine[Any, Any, None]])
_MARK = "__eventsource_handles__"


def handles(*event_classes: type[DomainEvent]) -> Callable[[F], F]:
    """Mark the method of a projection that handles these events, and their subclasses.

    It is async, and called with the stored event and the transaction, as `Projection.handle` is; in
    a `ProcessManager` with the event, the process, and what acts for it.
    """
    check_marked(_MARK, event_classes)

    def mark(method: F) -> F:
        if not iscoroutinefunction(method):
            raise TypeError(f"{method.__qualname__} must be async: async def …(self, event, tx)")
        return marked(_MARK, event_classes, method)

    return mark


class Projection(ABC, Generic[TTransaction]):
    """Events in, a read model out. `ProjectionCoordinator` runs it.

    **Exactly once**: `handle` is given the transaction in which the projection's checkpoint moves,
    so what it writes by `tx` (SQL, documents, messages, appends) is committed with the checkpoint
    or not at all. It may be called again for an event, after a failure or a crash, but then nothing
    of the call before was stored. What it does elsewhere (a mail, another database) is done **at
    least once**; the receiver can tell repetitions by the event's id.

    Events come in the order of their streams. With one shard that is the order of the store; with
    several, each has some of the streams, and they run concurrently, here or in other processes.

    Give each a `name` of its own. A new `version` is another read model, built from the beginning,
    beside the one before. The other attributes may be set in the class or on the object:

    - `event_types` (classes or names) and `aggregate_types` filter; with `@handles` methods the
      former follow from these. What is filtered out costs next to nothing.
    - `after`: the position behind which it begins when it is run for the first time, or `"now"` for
      what is appended from then on. A rebuild begins at the beginning.
    - `shards`: in how many ranges of the 1,024 slices it is run.
    - One transaction has up to `batch_size` events, and no further one once `batch_seconds` are
      over.
    - A failing event is tried `attempts` times, after pauses that begin with `retry_after` seconds
      and double. Then, with `on_failure = "stop"`, this projection stops at it; with `"park"` the
      event, and all later ones of its stream, are set aside until somebody has them retried or
      discarded, while other streams go on.
    """

    name: str
    version: int = 1
    event_types: Sequence[str | type[DomainEvent]] = ()
    aggregate_types: Sequence[str] = ()
    after: int | Literal["now"] = 0
    shards: int = 1
    batch_size: int = 500
    batch_seconds: float = 1.0
    attempts: int = 5
    retry_after: float = 0.1
    on_failure: Literal["stop", "park"] = "stop"

    _methods: ClassVar[dict[type, str]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls._methods = {**marked_methods(cls, _MARK)}

    async def handle(self, event: StoredEvent, tx: TTransaction) -> None:
        """Write what follows from one event, by its `@handles` method unless it is overridden.

        It runs again if something fails, so it keeps no state of its own outside `tx`.
        """
        method = self._method_for(type(event.event))
        if method is not None:
            await getattr(self, method)(event, tx)

    async def handle_batch(self, events: Sequence[StoredEvent], tx: TTransaction) -> None:
        """Write what follows from many events, in order; overridden, it is called in place of
        `handle`, and `batch_seconds` has no meaning."""
        for event in events:
            await self.handle(event, tx)

    async def react(self, event: StoredEvent, tx: TTransaction) -> None:
        """Do what is to be done only once in the life of an event, such as adding a message.

        Called after `handle`, in the same transaction, and only in the version that serves: not
        while another version is built beside it, nor for what is replayed by a rebuild.
        """

    @abstractmethod
    async def reset(self, tx: TTransaction) -> None:
        """Empty the read model; it is about to be built anew, or dropped."""

    async def take_over(self, tx: TTransaction) -> None:
        """Have readers find this version's read model from now on, such as by a view of SQL.

        Called in the transaction in which this version begins to serve in place of another one.
        """

    async def background(self) -> None:
        """What goes on beside the shards, in each coordinator, until it is cancelled as it stops.

        An error that comes out of it ends `ProjectionCoordinator.run`.
        """

    def is_outage(self, error: Exception) -> bool:
        """Whether an error that came out of it is no event's fault: all would fail alike.

        Then it is no attempt, and nothing is set aside: the same events are handled again, after
        pauses of up to five seconds, until that works. None is, unless this is overridden.
        """
        return False

    def filters(self) -> ReadOptions:
        """What it reads of the store."""
        event_types = self.event_types
        if not event_types and self._methods and not overrides(self, "handle"):
            event_types = names_under(cast("dict[type[DomainEvent], str]", self._methods))
        return ReadOptions(
            event_types=cast("tuple[str, ...]", event_types),  # converted, or refused
            aggregate_types=cast("tuple[str, ...]", self.aggregate_types),
            batch_size=self.batch_size,
        )

    def _method_for(self, event_class: type) -> str | None:
        for base in event_class.__mro__:
            if base in self._methods:
                return self._methods[base]
        return None


def overrides(projection: Projection[Never], method: str) -> bool:
    """Whether its class has a method of its own in place of the one of `Projection`."""
    return getattr(type(projection), method) is not getattr(Projection, method)


def reacts(projection: Projection[Never]) -> bool:
    return overrides(projection, "react")


def check_projection(projection: Projection[Any]) -> None:
    """`ValueError` or `TypeError` for what cannot be run."""
    if not isinstance(projection, Projection):
        raise TypeError(f"give Projection objects, not {projection!r}")
    kind = type(projection).__name__
    check_name(f"{kind}.name", getattr(projection, "name", None))
    if len(projection.name) > 150:
        raise ValueError(f"{kind}.name must have at most 150 characters: {projection.name!r}")
    for what, lowest, highest in (
        ("version", 1, 2**31),
        ("shards", 1, SLICES),
        ("batch_size", 1, 100_000),
        ("attempts", 1, 2**31),
    ):
        value = getattr(projection, what)
        if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
            raise ValueError(
                f"{kind}.{what} must be a number from {lowest} to {highest}, not {value!r}"
            )
    after: object = projection.after
    if after != "now" and (isinstance(after, bool) or not isinstance(after, int) or after < 0):
        raise ValueError(f"{kind}.after must be a position from 0, or 'now', not {after!r}")
    for what in ("batch_seconds", "retry_after"):
        if not getattr(projection, what) > 0:
            raise ValueError(
                f"{kind}.{what} must be a number of seconds above 0, not "
                f"{getattr(projection, what)!r}"
            )
    if projection.on_failure not in ("stop", "park"):
        raise ValueError(
            f"{kind}.on_failure must be 'stop' or 'park', not {projection.on_failure!r}"
        )
    projection.filters()
