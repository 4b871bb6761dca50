"""One version of a projection in one coordinator: which shards it runs, and where they all stand.

- The live coordinators that run a projection share its shards evenly, each knowing its part from
  the same list: none has to be told.
- A shard is taken where it has no owner, or one that is dead, and given back where there are others
  who have too few.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress

import anyio
from anyio.abc import TaskGroup
from attrs import evolve

from ..errors import DocumentConflictError, ProjectionStoppedError
from ..stores.interface import EventStore, Transaction
from .base import Projection
from .members import COLLECTION
from .parked import ParkedRepository
from .progress import Progress, ProjectionStatistics, State
from .running import ShardRun
from .serving import Serving, ServingRepository
from .shards import Shard, ShardRepository
from .telling import Telling

# Seconds until who waits looks elsewhere without having been told: where nobody may tell, and where
# somebody does, unless it is lost.
_LOOK_ELSEWHERE = {False: (0.002, 0.05), True: (0.05, 1.0)}
_LOOKS = 10


def key_of(name: str, version: int) -> str:
    """What a coordinator says that it runs."""
    return f"{name}@{version}"


class Runner:
    def __init__(
        self,
        store: EventStore,
        projection: Projection[Transaction],
        ended: Callable[[], None],
        served: dict[str, Serving],
        telling: Telling,
    ) -> None:
        self.projection = projection
        self.shards = ShardRepository(store, projection.name, projection.version)
        self.parked = ParkedRepository(store, projection.name, projection.version)
        self.progress = Progress(telling.stir)
        self.key = key_of(projection.name, projection.version)
        self._telling = telling
        telling.add(self.key, self)
        self.running = False
        self._store = store
        self._serving = ServingRepository(store)
        self._served = served  # by name; what one version finds out all of them know
        self._times_changed = 0
        self._known: Sequence[Shard] = ()
        self._runs: dict[str, ShardRun] = {}
        self._owned_by = ""
        self._ended = ended

    # Sharing -------------------------------------------------------------------------------------

    async def look(
        self, me: str, live: Mapping[str, Collection[str]], tasks: TaskGroup, *, oldest: int
    ) -> None:
        """Run the shards that are this coordinator's part; `oldest` is the version that serves
        where none does yet."""
        for _ in range(_LOOKS):  # others look at the same time, and one of them was faster
            with suppress(DocumentConflictError):
                await self._look(me, live, tasks, oldest)
                return

    async def _look(
        self, me: str, live: Mapping[str, Collection[str]], tasks: TaskGroup, oldest: int
    ) -> None:
        await self._read(oldest)
        if not self._known and not self.dropped:
            after = self.projection.after
            if after == "now":
                after = await self._store.last_position()
            await self.shards.create(self.projection.shards, after=after)
            await self._look(me, live, tasks, oldest)
            return
        if me != self._owned_by:  # what ran under another id has been taken away
            self._cancel_all()
            self._owned_by = me
        shards = {shard.key: shard for shard in self._known}
        for key, run in self._runs.items():
            if key not in shards or shards[key].owner != me:
                run.cancel()
        free = await self._free(me, live)
        share = self._share(me, live)
        if len(self._runs) < share and await self.shards.arrange(free, self.projection.shards):
            await self._look(me, live, tasks, oldest)
            return
        for shard in free:
            if len(self._runs) < share:
                await self._take(shard, me, tasks)
            elif shard.owner == me:  # it could not be given back when its run ended
                await self.shards.save(self._store.documents, evolve(shard, owner=None))
        for run in list(self._runs.values())[share:]:
            run.stop()
        self.progress.moved()

    async def _free(self, me: str, live: Mapping[str, Collection[str]]) -> list[Shard]:
        """Those that nobody runs; not those of one that has joined since it was looked."""
        free = [
            shard
            for shard in self._known
            if shard.key not in self._runs
            and (shard.owner in (None, me) or self.key not in live.get(shard.owner or "", ()))
        ]
        unknown = {shard.owner for shard in free if shard.owner} - {me, *live}
        joined = await self._store.documents.get_all(COLLECTION, unknown) if unknown else ()
        return [shard for shard in free if shard.owner not in joined]

    def _share(self, me: str, live: Mapping[str, Collection[str]]) -> int:
        sharing = sorted(one for one, keys in live.items() if self.key in keys)
        if self.progress.failed is not None or self.dropped:
            return 0
        if me not in sharing:  # it was resumed since it looked
            return 0
        whole, over = divmod(len(self._known), len(sharing))
        return whole + (sharing.index(me) < over)

    async def _take(self, shard: Shard, me: str, tasks: TaskGroup) -> None:
        with suppress(DocumentConflictError):  # somebody else was faster
            taken = await self.shards.save(self._store.documents, evolve(shard, owner=me))
            run = ShardRun(
                self._store,
                self.projection,
                taken,
                self.shards,
                self.parked,
                self.progress,
                serving=self.serving,
                ended=self._run_ended,
            )
            self._runs[taken.key] = run
            await tasks.start(run.run)

    def _run_ended(self, run: ShardRun) -> None:
        if self._runs.get(run.shard.key) is run:
            del self._runs[run.shard.key]
        self.progress.moved()
        self._ended()

    @property
    def runs(self) -> int:
        """How many shards are run here, those that are being finished among them."""
        return len(self._runs)

    def stop(self) -> None:
        for run in self._runs.values():
            run.stop()

    def _cancel_all(self) -> None:
        for run in self._runs.values():
            run.cancel()

    def changed(self, *, started_over: bool = False) -> None:
        """Somebody here has just changed its documents: all of its shards were set to the
        beginning or removed, or another version serves."""
        self._times_changed += 1
        if started_over:
            self._cancel_all()
            self._runs.clear()
            self._known = [evolve(one, position=0, owner=None, until=None) for one in self._known]
            self.progress.begin_again()
        self.progress.moved()

    async def _read(self, oldest: int | None = None) -> None:
        while True:  # what was on its way here while they were changed is not true any more
            times = self._times_changed
            known = await self.shards.all()
            if oldest is not None:  # after the shards: see `serving`
                served = await self._serving.get_or_add(self.projection.name, oldest)
                if times == self._times_changed:
                    self._served[self.projection.name] = served
            if times == self._times_changed:
                self._known = known
                return

    @property
    def serving(self) -> bool:
        served = self._served.get(self.projection.name)
        return served is not None and served.version == self.projection.version

    @property
    def dropped(self) -> bool:
        served = self._served.get(self.projection.name)
        return served is not None and self.projection.version in served.dropped

    # Where it stands -----------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """How far all shards have got, as far as is known here."""
        return min([self._position_of(shard) for shard in self._known], default=0)

    def _position_of(self, shard: Shard) -> int:
        run = self._runs.get(shard.key)
        # What is known may be from before ranges were split: then it is where the whole range was.
        return run.position if run and run.shard.last == shard.last else shard.position

    async def is_retired(self) -> bool:
        """Whether another version serves, and this one is to go no further."""
        if self._standing and not self.serving:
            await self._read()  # it may have been let go since
        return self.dropped or (self._standing and not self.serving)

    @property
    def _standing(self) -> bool:
        return any(shard.until is not None for shard in self._known)

    async def wait_for(self, position: int) -> bool:
        """True when every shard, here or elsewhere, has got there; False if they will not."""
        asked_at: float | None = None
        times = self.progress.times_moved
        try:
            while True:
                retired = await self.is_retired()
                self._check_running()
                if self._known and self.position >= position:
                    return True
                if retired:
                    return False
                elsewhere = any(shard.key not in self._runs for shard in self._known)
                behind_here = any(run.position < position for run in self._runs.values())
                if behind_here or not elsewhere:
                    await self.progress.wait()
                    continue
                if asked_at is None:
                    asked_at = anyio.current_time()
                    self._telling.wait_begins(self.key, position)
                await self._wait_elsewhere(position, anyio.current_time() - asked_at, times)
                times = self.progress.times_moved
                await self._read()
        finally:
            if asked_at is not None:
                self._telling.wait_ends(self.key, position)

    async def _wait_elsewhere(self, position: int, waited: float, times_moved: int) -> None:
        """Until there may be something to see, since it was so often that something has moved."""
        shortest, longest = _LOOK_ELSEWHERE[self._telling.everywhere]
        with anyio.move_on_after(min(max(waited / 2, shortest), longest)) as scope:
            await self.progress.wait(times_moved)
        if scope.cancelled_caught:
            self._telling.ask(self.key, position)

    # What others say: see Told -------------------------------------------------------------------

    def wanted(self, position: int) -> None:
        self.progress.wanted.add(position)
        for run in self._runs.values():
            run.save_soon()
        self._telling.stir()

    def reached(self) -> bool:
        wanted = self.progress.wanted
        if not (wanted and self._runs):
            return False
        return wanted.take(min(run.shard.position for run in self._runs.values()))

    def look_again(self) -> None:
        self.progress.moved()

    def _check_running(self) -> None:
        failed = self.progress.failed
        if failed is not None or not self.running:
            raise ProjectionStoppedError(self.projection.name, self.projection.version) from failed

    def statistics(self, head: int) -> ProjectionStatistics:
        progress, position = self.progress, self.position
        behind = max(head - position, 0)
        state: State = "stopped"
        if progress.failed is not None:
            state = "failed"
        elif self.running:
            state = "waiting" if not self._runs else "running"
            if progress.retrying:
                state = "retrying"
        return ProjectionStatistics(
            self.projection.name,
            self.projection.version,
            self.serving,
            state,
            position,
            behind,
            progress.age if behind else 0.0,
            progress.handled,
            progress.rate,
            len(self._runs),
            len(self._known),
            progress.error,
        )
