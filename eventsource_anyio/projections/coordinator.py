"""Running projections: in one process or many, until somebody stops it.

- `run` owns the only tasks: one a shard, which reads, handles and commits, and itself, which looks
  again and again who else is there and what is to be run here.
- An error in a handler ends with its projection. What ends `run` is a store that was closed, or a
  bug, and it comes out as itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Never, cast

import anyio
from anyio.abc import TaskGroup, TaskStatus
from anyio.lowlevel import checkpoint

from ..cleanup import shielded_cleanup
from ..errors import StorageError
from ..stores.interface import AppendResult, EventStore, Transaction
from .base import Projection, check_projection
from .members import Members
from .progress import ProjectionStatistics
from .runner import Runner

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
        self._runners = {
            (one.name, one.version): Runner(store, one, self._look_soon) for one in given
        }
        if len(self._runners) < len(given):
            raise ValueError("two projections have the same name and version")
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
            raise _only(group) from None
        finally:
            self._running = False
            try:
                with shielded_cleanup():
                    await self._leave(members)
            finally:
                for runner in self._runners.values():
                    runner.running = False
                    runner.progress.moved()
                self._stopped.set()

    async def _run(self, members: Members, task_status: TaskStatus[None]) -> None:
        async with anyio.create_task_group() as tasks:
            await self._look(members, tasks)
            background = anyio.CancelScope()
            tasks.start_soon(self._background, background)
            task_status.started()
            while not self._stopping:
                if not self._look_again:
                    with anyio.move_on_after(self._lease / 3) as self._waiting:
                        await anyio.sleep_forever()
                    self._waiting = None
                self._look_again = False
                if not self._stopping:
                    try:
                        await self._look(members, tasks)
                    except StorageError as error:
                        # What runs goes on: it can commit as long as nobody has taken it over.
                        _logger.warning("the coordinators cannot be looked at: %s", error)
            background.cancel()
            for runner in self._runners.values():
                runner.stop()

    async def _background(self, scope: anyio.CancelScope) -> None:
        with scope:
            async with anyio.create_task_group() as tasks:
                for runner in self._runners.values():
                    tasks.start_soon(runner.projection.background)

    async def _look(self, members: Members, tasks: TaskGroup) -> None:
        runners = self._runners.values()
        live = await members.look([one.key for one in runners if one.progress.failed is None])
        self._head = max(self._head, await self._store.last_position())
        for runner in runners:
            oldest = min(v for name, v in self._runners if name == runner.projection.name)
            await runner.look(members.me, live, tasks, oldest=oldest)

    async def _leave(self, members: Members) -> None:
        try:
            await members.leave()
        except StorageError as error:
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
        bound it by a cancel scope. Woken by what runs here; shards of other processes are looked
        at again and again.

        Raises:
            ProjectionStoppedError: one has failed, or the coordinator is not running.
        """
        position = target if isinstance(target, int) else target.position
        await checkpoint()
        for runner in self._chosen(projection):
            await runner.wait_for(position)

    def _chosen(self, name: str | None) -> Sequence[Runner]:
        if name is None:
            return list(self._runners.values())
        found = [one for one in self._runners.values() if one.projection.name == name]
        if not found:
            names = ", ".join(sorted({name for name, _ in self._runners}))
            raise ValueError(f"there is no projection {name!r} here; there are: {names}")
        return [one for one in found if one.serving] or found

    def statistics(self) -> Sequence[ProjectionStatistics]:
        """Where each of them stands, as it is known here without asking anybody."""
        head = max(self._head, *(one.position for one in self._runners.values()))
        return [one.statistics(head) for one in self._runners.values()]

    def resume(self, name: str) -> None:
        """Try again what has failed for the last time, from the event it failed at."""
        for runner in self._runners.values():
            if runner.projection.name == name:
                runner.progress.begin_again()
        self._chosen(name)
        self._look_soon()


def _only(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one error of a group that holds but one, however deep."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
