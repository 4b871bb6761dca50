"""Having one version of a projection serve in place of another, from one position on.

- First the candidate has to be close behind. Then the shards of both versions are told to stand
  still at one position, `until`, which none of them has passed. Readers go on reading the old one.
- When all of them stand there, one transaction makes the candidate serve and lets it go on. So
  the old version reacts to everything up to there, and the new one to everything after it.
- An old version that nobody runs any more gets nowhere, and is not waited for. If there is
  something that it has not reacted to, nothing is done; otherwise it stays behind.
- The old version goes on standing still, and it can be promoted again.
- Every step is decided by what the documents say alone. So it can be interrupted anywhere, begun
  again by anybody, and done by several at once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from time import monotonic

import anyio
from attrs import evolve

from ..errors import DocumentConflictError, ProjectionStoppedError
from ..stores.interface import EventStore, Transaction
from .base import reacts
from .holding import OPTIMISTIC, Held, free
from .members import Members
from .parked import ParkedRepository
from .runner import Runner, key_of
from .serving import COLLECTION as SERVING
from .serving import Serving, ServingRepository
from .shards import Shard, ShardRepository

_CLOSE = 3.0  # a candidate that needs no longer to get to where the store is, is close behind it
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.2


class Promotion:
    """Of a candidate; `versions` are all of its name that are known here."""

    def __init__(
        self,
        store: EventStore,
        candidate: Runner,
        versions: Sequence[Runner],
        members: Members,
        look_soon: Callable[[], None],
        verify: Callable[[Transaction], Awaitable[bool]] | None,
    ) -> None:
        self._store = store
        self._candidate = candidate
        self._versions = versions
        self._members = members
        self._look_soon = look_soon
        self._verify = verify
        self._projection = candidate.projection
        self._serving = ServingRepository(store)
        self._held: Held | None = None
        self._close = False
        self._conflicts = 0
        self._pause = _FIRST_PAUSE

    async def run(self) -> None:
        """Return when the candidate serves."""
        try:
            while not await self._step():
                pass
            self._held = None
        finally:
            if self._held is not None:
                await self._held.clean_up()
            self._look_soon()

    async def _step(self) -> bool:
        """Whether the candidate serves."""
        self._check_running()
        serving = await self._serving.get(self._projection.name)
        if serving is None:  # somebody has to run it first
            return await self._wait()
        if serving.version == self._projection.version:
            await self._abandon()
            return True
        if self._projection.version in serving.dropped:
            raise ValueError(
                f"{self._projection.name!r}, version {self._projection.version}, was dropped.\n"
                "  Nothing of it is left that could serve.\n"
                "  Have it built again by rebuild(name, version=…) first."
            )
        old = ShardRepository(self._store, serving.name, serving.version)
        before, after = await old.all(), await self._candidate.shards.all()
        await self._check_parked(serving)
        abandoned = await self._is_abandoned(serving, before, after)
        if not after or not (before or abandoned):
            return await self._wait()
        if abandoned:
            self._check_reactions(serving, before, after)
        needed = after if abandoned else (*before, *after)
        untils = {shard.until for shard in (*before, *after)}
        until = untils.pop() if len(untils) == 1 else None
        if until is not None:
            self._held = self._held_by(serving, old, holding=True)
            if all(shard.position == until for shard in needed):
                return await self._switch(serving, (old, before), after, until)
            return await self._wait()
        if not self._close:
            return await self._catch_up(after)
        return await self._hold(serving, (old, before), after)

    # Its steps -----------------------------------------------------------------------------------

    async def _catch_up(self, after: Sequence[Shard]) -> bool:
        standing = [(self._candidate.shards, one) for one in after if one.until is not None]
        if standing:  # it has served before, or somebody was interrupted
            await free(self._store, standing)
            self._look_soon()
            return False
        target, begun = await self._store.last_position(), monotonic()
        while min((one.position for one in after), default=-1) < target:
            self._check_running()
            if any(one.until is not None for one in after):
                return False  # somebody else is at it
            await self._wait()
            after = await self._candidate.shards.all()
        self._close = monotonic() - begun <= _CLOSE + self._projection.batch_seconds
        self._pause = _FIRST_PAUSE
        return False

    async def _hold(
        self,
        serving: Serving,
        before: tuple[ShardRepository, Sequence[Shard]],
        after: Sequence[Shard],
    ) -> bool:
        old, shards = before
        self._held = held = self._held_by(serving, old, holding=True)
        if self._conflicts >= OPTIMISTIC:
            await held.stand_still()
            shards, after = await old.all(), await self._candidate.shards.all()
        until = max(shard.position for shard in (*shards, *after))
        try:
            async with self._store.transaction() as tx:
                for repository, some in ((old, shards), (self._candidate.shards, after)):
                    for shard in some:
                        moved = evolve(shard, until=until, owner=None)
                        await repository.save(tx.documents, moved)
        except DocumentConflictError:
            self._conflicts += 1
        else:
            self._look_soon()
        return False

    async def _switch(
        self,
        serving: Serving,
        before: tuple[ShardRepository, Sequence[Shard]],
        after: Sequence[Shard],
        until: int,
    ) -> bool:
        old, shards = before
        try:
            async with self._store.transaction() as tx:
                if self._verify is not None and not await self._verify(tx):
                    raise RuntimeError(
                        f"{self._projection.name!r}, version {self._projection.version}, was not "
                        f"promoted.\n  verify(tx) did not return True at position {until}.\n"
                        f"  Version {serving.version} goes on serving, and the candidate goes on "
                        "being built: look into it, rebuild it, or promote it again."
                    )
                await self._projection.take_over(tx)
                promoted = evolve(serving, version=self._projection.version)
                await self._serving.save(tx.documents, promoted)
                for shard in shards:
                    await old.save(tx.documents, evolve(shard, owner=None))
                for shard in after:
                    moved = evolve(shard, until=None, owner=None, quiet=until)
                    await self._candidate.shards.save(tx.documents, moved)
        except Exception as error:
            # It may be due to somebody else who has promoted it, or let go what was held, or has
            # just taken a shard.
            found = [*await old.all(), *await self._candidate.shards.all()]
            stands = all(shard.until == until for shard in found)
            taken = isinstance(error, DocumentConflictError) and error.collection in (
                *(old.collection, self._candidate.shards.collection),
                SERVING,
            )
            if found == [*shards, *after] or (stands and not taken):
                raise
            return False
        return True

    async def _abandon(self) -> None:
        """Let go what the promotion of another version was killed at."""
        while True:
            all_of = [(one.shards, await one.shards.all()) for one in self._versions]
            untils = {shard.until for shard in await self._candidate.shards.all()} - {None}
            held = [
                (repository, shard)
                for repository, shards in all_of
                for shard in shards
                if shard.until in untils
            ]
            if not held or await free(self._store, held):
                break
        if held:
            self._look_soon()

    async def _wait(self) -> bool:
        await anyio.sleep(self._pause)
        self._pause = min(self._pause * 1.5, _LONGEST_PAUSE)
        return False

    # What it needs -------------------------------------------------------------------------------

    def _held_by(self, serving: Serving, old: ShardRepository, *, holding: bool) -> Held:
        held = _HeldForPromotion(self._store, serving, [old, self._candidate.shards])
        held.holding = holding
        return held

    def _check_running(self) -> None:
        for one in self._versions:
            if one.progress.failed is not None and (one.serving or one is self._candidate):
                raise ProjectionStoppedError(
                    one.projection.name, one.projection.version
                ) from one.progress.failed

    async def _is_abandoned(
        self, serving: Serving, before: Sequence[Shard], after: Sequence[Shard]
    ) -> bool:
        """Whether the serving version is behind, and nobody runs it."""
        places = [shard.position for shard in after] + [shard.until or 0 for shard in before]
        if before and min(shard.position for shard in before) >= max(places, default=0):
            return False
        return not await self._members.any_runs(key_of(serving.name, serving.version))

    def _check_reactions(
        self, serving: Serving, before: Sequence[Shard], after: Sequence[Shard]
    ) -> None:
        """Raise if nobody would react to what the candidate has passed and the other has not."""
        old = [one for one in self._versions if one.projection.version == serving.version]
        if not reacts(self._projection) or (old and not reacts(old[0].projection)):
            return
        reached = min((shard.position for shard in before), default=0)
        position = max(shard.position for shard in after)
        if reached < position:
            raise ValueError(
                f"{serving.name!r}, version {self._projection.version}, cannot be promoted: nobody "
                f"runs version {serving.version}.\n"
                f"  It has reacted to events up to position {reached}, and to those up to "
                f"{position} neither of the two would.\n"
                f"  Give version {serving.version} to a coordinator that runs, and promote again."
            )

    async def _check_parked(self, serving: Serving) -> None:
        known = [one.projection for one in self._versions]
        old = [one for one in known if one.version == serving.version]
        if old and not any(reacts(one) for one in (*old, self._projection)):
            return
        parked = await ParkedRepository(self._store, serving.name, serving.version).all()
        if parked:
            raise ValueError(
                f"{serving.name!r}, version {self._projection.version}, cannot be promoted: in "
                f"version {serving.version} {len(parked)} streams are parked.\n"
                "  What is parked was not reacted to by the one, and would not be by the other.\n"
                "  Call retry_parked() or discard_parked() for each of them first."
            )


class _HeldForPromotion(Held):
    """It is not let go any more once the candidate serves."""

    def __init__(
        self, store: EventStore, serving: Serving, repositories: Sequence[ShardRepository]
    ) -> None:
        super().__init__(store, repositories)
        self._before = serving
        self._serving = ServingRepository(store)

    async def _may_go(self) -> bool:
        serving = await self._serving.get(self._before.name)
        return serving is not None and serving.version == self._before.version
