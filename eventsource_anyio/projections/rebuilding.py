"""Starting a version of a projection over, or dropping it, and how its building gets on.

It is one transaction: the read model is emptied, every shard is back at the beginning and taken
from whoever runs it, what was parked is forgotten. What is handled meanwhile cannot be committed,
or it is emptied too. Then it is built by whoever runs it, so nothing has to be resumed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from time import monotonic

from attrs import evolve, frozen

from ..stores.interface import EventStore, Transaction
from .base import Projection, reacts
from .holding import OPTIMISTIC, Held
from .parked import ParkedRepository, ParkedStream
from .serving import Serving, ServingRepository
from .shards import Shard, ShardRepository

_WINDOW = 10.0


class Rebuilding:
    """One version of a projection; `oldest` serves where none does yet."""

    def __init__(
        self, store: EventStore, projection: Projection[Transaction], *, oldest: int
    ) -> None:
        self._store = store
        self._projection = projection
        self._oldest = oldest
        self._shards = ShardRepository(store, projection.name, projection.version)
        self._parked = ParkedRepository(store, projection.name, projection.version)
        self._serving = ServingRepository(store)
        self._held = Held(store, [self._shards])

    async def rebuild(self) -> None:
        await self._until_done(drop=False)

    async def drop(self) -> None:
        await self._until_done(drop=True)

    async def _until_done(self, *, drop: bool) -> None:
        failures = 0
        try:
            while True:
                known = await self._read()
                try:
                    await (self._drop(*known) if drop else self._rebuild(*known))
                except Exception:
                    # It may be due to somebody who has committed meanwhile.
                    failures += 1
                    if failures > 3 * OPTIMISTIC or await self._read() == known:
                        raise
                else:
                    break
                if failures >= OPTIMISTIC:
                    await self._held.stand_still()
            self._held.holding = False  # what it held is at the beginning now, or gone
        finally:
            await self._held.clean_up()

    async def _rebuild(
        self, shards: Sequence[Shard], serving: Serving | None, parked: Sequence[ParkedStream]
    ) -> None:
        version = self._projection.version
        serves = serving is not None and serving.version == version
        if serves and parked and reacts(self._projection):
            raise ValueError(
                f"{self._name} cannot be rebuilt: {len(parked)} streams are parked.\n"
                "  What is parked was never reacted to, and a rebuild reacts to nothing that it "
                "replays.\n"
                "  Call retry_parked() or discard_parked() for each of them first."
            )
        async with self._store.transaction() as tx:
            await self._projection.reset(tx)
            for shard in shards:
                quiet = max(shard.quiet, shard.position) if serves else shard.quiet
                anew = evolve(shard, position=0, quiet=quiet, owner=None, until=None)
                await self._shards.save(tx.documents, anew)
            for one in parked:
                await self._parked.remove(tx.documents, one)
            if serving is not None and version in serving.dropped:
                dropped = tuple(one for one in serving.dropped if one != version)
                await self._serving.save(tx.documents, evolve(serving, dropped=dropped))

    async def _drop(
        self, shards: Sequence[Shard], serving: Serving | None, parked: Sequence[ParkedStream]
    ) -> None:
        version = self._projection.version
        if serving is None:
            serving = await self._serving.get_or_add(self._projection.name, self._oldest)
        if serving.version == version:
            raise ValueError(
                f"{self._name} cannot be dropped: it is the version that serves.\n"
                "  Readers would find nothing.\n"
                "  promote() another version first."
            )
        async with self._store.transaction() as tx:
            await self._projection.reset(tx)
            for shard in shards:
                await self._shards.remove(tx.documents, shard)
            for one in parked:
                await self._parked.remove(tx.documents, one)
            dropped = tuple({*serving.dropped, version})
            await self._serving.save(tx.documents, evolve(serving, dropped=dropped))

    async def _read(self) -> tuple[list[Shard], Serving | None, list[ParkedStream]]:
        shards = await self._shards.all()
        name = self._projection.name
        return shards, await self._serving.get(name), await self._parked.all()

    @property
    def _name(self) -> str:
        return f"{self._projection.name!r}, version {self._projection.version},"


@frozen
class BuildProgress:
    """How far a version of a projection has been built.

    `position` is how far all of its shards have got and `target` how far they can get now. `rate`
    is in positions a second, of the last ten seconds or since this coordinator was first asked.
    `seconds_left` is None while there is no telling.
    """

    name: str
    version: int
    position: int
    target: int
    rate: float
    seconds_left: float | None

    @property
    def fraction(self) -> float:
        """From 0 to 1."""
        return min(self.position / self.target, 1.0) if self.target else 1.0


class Measured:
    """The rate of a version, from where it stood when somebody asked."""

    def __init__(self) -> None:
        self._asked: deque[tuple[float, int]] = deque()

    def progress(
        self, projection: Projection[Transaction], position: int, target: int
    ) -> BuildProgress:
        asked, now = self._asked, monotonic()
        if asked and asked[-1][1] > position:  # it was started over
            asked.clear()
        asked.append((now, position))
        while asked[0][0] < now - _WINDOW and len(asked) > 2:
            asked.popleft()
        since, before = asked[0]
        rate = (position - before) / (now - since) if now > since else 0.0
        left = max(target - position, 0)
        seconds = 0.0 if not left else left / rate if rate else None
        return BuildProgress(projection.name, projection.version, position, target, rate, seconds)
