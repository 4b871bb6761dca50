"""Running projections: in one process or many, until somebody stops it.

- `run` owns the only tasks: one a shard, which reads, handles and commits, and itself, which looks
  again and again who else is there and what is to be run here.
- An error in a handler ends with its projection. What ends `run` is a store that was closed, or a
  bug, and it comes out as itself.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Never, cast

import anyio
from anyio.abc import TaskGroup, TaskStatus
from anyio.lowlevel import checkpoint

from ..cleanup import shielded_cleanup
from ..errors import ProjectionStoppedError, StorageError, StoreClosedError
from ..exception_groups import only_error
from ..stores.interface import AppendResult, EventStore, Transaction
from .base import Projection, check_projection
from .members import Members
from .parked import ParkedStream
from .progress import ProjectionStatistics
from .promoting import Promotion
from .rebuilding import BuildProgress, Measured, Rebuilding
from .retrying import Retrying
from .runner import Runner
from .serving import Serving, ServingRepository
from .telling import Telling

_logger = logging.getLogger("eventsource_anyio.projections")


class ProjectionCoordinator:
    """Runs projections on a store: `await tasks.start(coordinator.run)`.

    Any number of coordinators may run the same projections, in one process or in many: they share
    the shards of each, and take over those of one that died. `lease` is for how many seconds one
    may be silent before the others take it for dead; clocks need not agree. One that was only slow
    can commit nothing any more once it was taken for dead.

    The projections' state is in `store.documents`, in collections that begin with `projections/`.
    """

    def __init__(
        self, store: EventStore, projections: Iterable[Projection[Never]], *, lease: float = 5.0
    ) -> None:
        if not lease > 0:
            raise ValueError(f"lease must be a number of seconds above 0, not {lease!r}")
        given = [cast("Projection[Transaction]", one) for one in projections]
        if not given:
            raise ValueError("there is no projection to run: projections is empty")
        for projection in given:
            check_projection(projection)
        self._store = store
        self._lease = lease
        self._served: dict[str, Serving] = {}
        self._telling = Telling(store)
        self._runners = {
            (one.name, one.version): Runner(
                store, one, self._look_soon, self._served, self._telling
            )
            for one in given
        }
        if len(self._runners) < len(given):
            raise ValueError("two projections have the same name and version")
        self._measured = {key: Measured() for key in self._runners}
        self._head = 0
        self._running = False
        self._stopping = False
        self._waiting: anyio.CancelScope | None = None
        self._look_again = False
        self._stopped = anyio.Event()

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Run them, until `stop` is called or it is cancelled.

        It has started once it has its part of the shards, has read where they stand, and follows
        the store. `StorageError` if the store cannot be reached then; later it waits for it.
        """
        if self._running:
            raise RuntimeError("this coordinator is running already")
        self._running, self._stopping, self._stopped = True, False, anyio.Event()
        for runner in self._runners.values():
            runner.running = True
        members = Members(self._store, self._lease)
        try:
            await self._run(members, task_status)
        except BaseExceptionGroup as group:
            raise only_error(group) from None
        finally:
            try:
                with shielded_cleanup():
                    await self._leave(members)
            finally:
                for runner in self._runners.values():
                    runner.running = False
                    runner.progress.moved()
                self._running = False
                self._stopped.set()

    async def _run(self, members: Members, task_status: TaskStatus[None]) -> None:
        async with anyio.create_task_group() as tasks:
            await self._look(members, tasks)
            background, telling = anyio.CancelScope(), anyio.CancelScope()
            tasks.start_soon(self._background, background)
            tasks.start_soon(self._telling.run, telling)
            task_status.started()
            while not self._stopping:
                await self._pause()
                if not self._stopping:
                    try:
                        await self._look(members, tasks)
                    except StorageError as error:
                        # What runs goes on: it can commit as long as nobody has taken it over.
                        _logger.warning("the coordinators cannot be looked at: %s", error)
                        self._look_again = False
            background.cancel()
            for runner in self._runners.values():
                runner.stop()
            while any(runner.runs for runner in self._runners.values()):
                if not await self._pause():  # nobody takes over what is being finished
                    with suppress(StorageError):
                        await self._say_alive(members)
            telling.cancel()

    async def _pause(self) -> bool:
        """A third of the lease, or until there is something to look at: whether there is."""
        if not self._look_again:
            with anyio.move_on_after(self._lease / 3) as self._waiting:
                await anyio.sleep_forever()
            self._waiting = None
        look, self._look_again = self._look_again, False
        return look

    async def _say_alive(self, members: Members) -> Mapping[str, Collection[str]]:
        runners = self._runners.values()
        return await members.look([one.key for one in runners if one.progress.failed is None])

    async def _background(self, scope: anyio.CancelScope) -> None:
        with scope:
            async with anyio.create_task_group() as tasks:
                for runner in self._runners.values():
                    tasks.start_soon(runner.projection.background)

    async def _look(self, members: Members, tasks: TaskGroup) -> None:
        runners = self._runners.values()
        live = await self._say_alive(members)
        self._head = max(self._head, await self._store.last_position())
        for runner in runners:
            oldest = self._oldest(runner.projection.name)
            await runner.look(members.me, live, tasks, oldest=oldest)

    async def _leave(self, members: Members) -> None:
        try:
            await members.leave()
        except (StorageError, StoreClosedError) as error:
            _logger.warning("the others will wait for the end of the lease: %s", error)

    def _look_soon(self) -> None:
        self._look_again = True
        if self._waiting is not None:
            self._waiting.cancel()

    def stop(self) -> None:
        """Have each shard finish its batch and be given back; then `run` returns."""
        self._stopping = True
        if self._waiting is not None:
            self._waiting.cancel()

    async def wait_stopped(self) -> None:
        """Return when `run` has returned, at once if it was never called."""
        if self._running:
            await self._stopped.wait()
        else:
            await checkpoint()

    async def wait_for(self, target: int | AppendResult, projection: str | None = None) -> None:
        """Return when the projections have got to a position, such as that of an own append.

        All of them, or the one of this name (its version that serves). Waits as long as it takes:
        bound it by a cancel scope. Woken by what runs here, and on PostgreSQL by other processes;
        on SQLite what they run is looked at, soon and then every 50 ms.

        Raises:
            ProjectionStoppedError: one has failed, or the coordinator is not running, or a version
                that is not known here has taken over.
        """
        position = target if isinstance(target, int) else target.position
        await checkpoint()
        names = {name for name, _ in self._runners} if projection is None else {projection}
        for name in sorted(names):
            versions = self._versions(name)
            arrived: set[Runner] = set()
            while True:
                wanted = [one for one in versions if one.serving or projection is None] or versions
                # One that another version has taken over from would be waited for in vain.
                left = [one for one in wanted if one not in arrived and not await one.is_retired()]
                if left and await left[0].wait_for(position):
                    arrived.add(left[0])
                elif not left and arrived:
                    break
                elif not left:
                    raise ProjectionStoppedError(name, wanted[0].projection.version)

    def _versions(self, name: str) -> list[Runner]:
        found = [one for one in self._runners.values() if one.projection.name == name]
        if not found:
            names = ", ".join(sorted({name for name, _ in self._runners}))
            raise ValueError(f"there is no projection {name!r} here; there are: {names}")
        return found

    def _oldest(self, name: str) -> int:
        """Which version serves as long as nobody has decided."""
        return min(one.projection.version for one in self._versions(name))

    def statistics(self) -> Sequence[ProjectionStatistics]:
        """Where each of them stands, as it is known here without asking anybody."""
        runners = [one for one in self._runners.values() if not one.dropped]
        head = max(self._head, *(one.position for one in self._runners.values()))
        return [one.statistics(head) for one in runners]

    def resume(self, name: str) -> None:
        """Try again what has failed for the last time, from the event it failed at."""
        for runner in self._versions(name):
            runner.progress.begin_again()
        self._look_soon()

    # Operations ----------------------------------------------------------------------------------
    # They act on documents alone, so they work whether this coordinator runs, or another one, or
    # none. `version` is the one that serves where it is not given.

    async def progress(self, name: str, *, version: int | None = None) -> BuildProgress:
        """How far it has been built, as the store has it. Ask again and again to see the rate."""
        runner = await self._version(name, version)
        shards = await runner.shards.all()
        untils = [one.until for one in shards if one.until is not None]
        target = await self._store.last_position()
        if untils and len(untils) == len(shards):  # it stands still, or is about to
            target = min(target, *untils)
        position = min((one.position for one in shards), default=0)
        measured = self._measured[name, runner.projection.version]
        return measured.progress(runner.projection, position, target)

    async def parked(self, name: str, *, version: int | None = None) -> Sequence[ParkedStream]:
        """The streams that are set aside, by their ids."""
        return await (await self._version(name, version)).parked.all()

    async def retry_parked(self, name: str, stream_id: str, *, version: int | None = None) -> int:
        """Handle the events of a stream that are set aside, in order, each in a transaction.

        Returns how many; 0 if the stream is not parked. What the projection raises comes out; then
        the stream is parked from the event that it was raised at. While this runs, the projection
        may go on, and set aside more of the stream, which is handled too.
        """
        runner = await self._version(name, version)
        return await Retrying(self._store, runner.projection).retry(stream_id)

    async def discard_parked(self, name: str, stream_id: str, *, version: int | None = None) -> int:
        """Never handle those events; how many. The later ones of the stream are handled again."""
        runner = await self._version(name, version)
        return await Retrying(self._store, runner.projection).discard(stream_id)

    async def rebuild(self, name: str, *, version: int | None = None) -> None:
        """Empty the read model, and have it built from the beginning, by whoever runs it.

        It returns once it is emptied. Nobody has to wait for the rest, which resumes by itself; see
        `progress` and `wait_for`. What is parked is handled with everything else. A projection
        that reacts does not do so again; `ValueError` if there are parked streams that it has not
        reacted to yet. A version that was dropped is built again.
        """
        runner = await self._version(name, version)
        try:
            await self._rebuilding(runner).rebuild()
            await self._changed(runner, started_over=True)
        finally:  # it may be done though it was cancelled
            self._look_soon()

    async def promote(
        self,
        name: str,
        version: int,
        *,
        verify: Callable[[Never], Awaitable[bool]] | None = None,
    ) -> None:
        """Have this version serve in place of the one that does, which stands still from then on.

        Both are run, here or elsewhere. This waits until the candidate is close behind; then both
        stop at the same position, and one transaction calls `verify`, has the candidate
        `take_over`, and lets it go on. So of two versions that react, one does for each event. If
        nobody runs the serving version any more, it is not waited for, and stays behind.

        Cancelled or failed before that, nothing has changed. Killed, both may stand still until
        this is called again; called with the version that serves, it lets it go on.

        Raises:
            RuntimeError: `verify` has not returned True.
            ValueError: there are events that the serving version has not reacted to, of parked
                streams, or because nobody runs it.
            ProjectionStoppedError: one of the two has failed here.
        """
        candidate = await self._version(name, version)
        check = cast("Callable[[Transaction], Awaitable[bool]] | None", verify)
        versions = self._versions(name)
        members = Members(self._store, self._lease)
        await Promotion(self._store, candidate, versions, members, self._look_soon, check).run()
        await self._changed(candidate)

    async def drop(self, name: str, version: int) -> None:
        """Empty the read model of a version that does not serve, and run it nowhere any more.

        `ValueError` if it serves.
        """
        runner = await self._version(name, version)
        try:
            await self._rebuilding(runner).drop()
            await self._changed(runner, started_over=True)
        finally:
            self._look_soon()

    async def _changed(self, runner: Runner, *, started_over: bool = False) -> None:
        """Have what is done here next find it as it has just been changed."""
        name = runner.projection.name
        served = await ServingRepository(self._store).get(name)
        if served is not None:
            self._served[name] = served
        for one in self._versions(name):
            one.changed(started_over=started_over and one is runner)
            self._telling.moved(one.key)

    def _rebuilding(self, runner: Runner) -> Rebuilding:
        oldest = self._oldest(runner.projection.name)
        return Rebuilding(self._store, runner.projection, oldest=oldest)

    async def _version(self, name: str, version: int | None) -> Runner:
        versions = self._versions(name)
        if version is None:
            serving = await ServingRepository(self._store).get(name)
            version = serving.version if serving else self._oldest(name)
        for one in versions:
            if one.projection.version == version:
                return one
        given = ", ".join(str(one.projection.version) for one in versions)
        raise ValueError(
            f"Version {version} of projection {name!r} is not known here.\n"
            f"  This coordinator was given: {given}.\n"
            "  Give it the projection of that version too, or name one of these by version=…"
        )
