"""Which partitions of a subscription this process runs.

- The living members share the partitions evenly, each knowing its part from the same list: none has
  to be told.
- A partition is taken where it has no owner, or one that is dead, and given back where others have
  too few.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Literal, TypeAlias

import anyio
from anyio.abc import TaskGroup
from msgspec.structs import replace

from ..errors import StorageError, StoreClosedError
from ..stores.interface import EventStore
from .broker import Broker, EntryConflictError
from .consuming import Consuming, PartitionRun
from .delivering import Handlers
from .encoding import opened
from .leases import Lease, LeaseRepository, Members, Standing
from .letters import DeadLetterRepository

Start: TypeAlias = Literal["new", "first"] | int
_logger = logging.getLogger("eventsource_anyio.bus")
_LOOKS = 10


class Sharing:
    """One subscription in one process, while `run` runs."""

    def __init__(
        self,
        broker: Broker,
        subscription: str,
        partitions: int,
        handlers: Handlers,
        letters: DeadLetterRepository,
        *,
        start: Start,
        lease: float,
        remembered: int,
        catch_up: EventStore | None,
    ) -> None:
        self.missed = 0
        self._broker = broker
        self._partitions = partitions
        self._start: Start = start
        self._lease = lease
        self._catch_up = catch_up
        self._members = Members(broker, subscription, lease)
        self._leases = LeaseRepository(broker, subscription)
        self._shared = Consuming(
            broker,
            subscription,
            partitions,
            self._leases,
            letters,
            handlers,
            remembered,
            catch_up,
            self._count_missed,
        )
        self._runs: dict[int, PartitionRun] = {}
        self._owned_by = ""
        self._begun = False
        self._stopping = False
        self._look_again = False
        self._waiting: anyio.CancelScope | None = None

    def _count_missed(self) -> None:
        self.missed += 1

    @property
    def owned(self) -> Sequence[int]:
        return sorted(self._runs)

    def stop(self) -> None:
        self._stopping = True
        if self._waiting is not None:
            self._waiting.cancel()

    async def run(self, tasks: TaskGroup) -> None:
        """Take part until `stop`, and finish what is at hand."""
        while not self._stopping:
            await self._pause()
            if not self._stopping:
                try:
                    await self.look(tasks)
                except StorageError as error:
                    # What runs goes on: it can save as long as nobody has taken it over.
                    _logger.warning("the members of a subscription cannot be seen: %s", error)
                    self._look_again = False
        for run in self._runs.values():
            run.stop()
        while self._runs:
            if not await self._pause():  # nobody takes over what is being finished
                with suppress(StorageError):
                    await self._members.look()

    async def leave(self) -> None:
        try:
            await self._members.leave()
        except (EntryConflictError, StorageError, StoreClosedError) as error:
            _logger.warning("the others will wait for the end of the lease: %s", error)

    async def _pause(self) -> bool:
        """A third of the lease, or until there is something to look at: whether there is."""
        if not self._look_again:
            with anyio.move_on_after(self._lease / 3) as self._waiting:
                await anyio.sleep_forever()
            self._waiting = None
        look, self._look_again = self._look_again, False
        return look

    async def look(self, tasks: TaskGroup) -> None:
        """Run the partitions that are this one's part."""
        live = await self._members.look()
        for _ in range(_LOOKS):  # others look at the same time, and one of them was faster
            with suppress(EntryConflictError):
                await self._look(live, tasks)
                return

    async def _look(self, live: Collection[str], tasks: TaskGroup) -> None:
        me = self._members.me
        if me != self._owned_by:  # what ran under another id has been taken away
            for run in self._runs.values():
                run.cancel()
            self._owned_by = me
        leases = await self._leases.all()
        if len(leases) < self._partitions:
            await self._create([one for one in range(self._partitions) if one not in leases])
            leases = await self._leases.all()
        self._begun = True
        for partition, run in self._runs.items():
            if partition not in leases or leases[partition].standing.owner != me:
                run.cancel()
        sharing = sorted(live)
        whole, over = divmod(self._partitions, len(sharing))
        share = whole + (sharing.index(me) < over)
        for lease in await self._free(leases.values(), live):
            if len(self._runs) < share:
                taken = await self._leases.save(lease, replace(lease.standing, owner=me))
                run = PartitionRun(self._shared, taken, self._run_ended)
                self._runs[taken.partition] = run
                await tasks.start(run.run)
        for run in list(self._runs.values())[share:]:
            run.stop()

    async def _free(self, leases: Collection[Lease], live: Collection[str]) -> Sequence[Lease]:
        """Those that nobody runs; not those of one that has joined since it was looked."""
        me = self._members.me
        free: list[Lease] = []
        gone: dict[str, bool] = {}
        for lease in leases:
            owner = lease.standing.owner
            if lease.partition in self._runs or (owner in live and owner != me):
                continue
            if owner is not None and owner != me and owner not in gone:
                gone[owner] = not await self._members.has(owner)
            if owner is None or owner == me or gone[owner]:
                free.append(lease)
        return free

    async def _create(self, partitions: Sequence[int]) -> None:
        """Where the subscription begins, in partitions where it has not begun yet.

        One that this process has run before was lost with the broker's data: then nothing of what
        is there now was handled.
        """
        ends = await self._broker.ends(partitions)
        position = 0 if self._catch_up is None else await self._catch_up.last_position()
        for partition in partitions:
            standing = Standing("")
            if isinstance(self._start, int):
                offset = "" if self._catch_up is None else ends[partition]
                standing = Standing(offset, self._start, self._start, position)
            elif self._start == "new" and not self._begun:
                standing = Standing(ends[partition], position)
                if not position and ends[partition]:
                    last = await self._broker.read_back(partition, ends[partition], 1)
                    envelope = opened(last[0]) if last else None
                    standing = replace(standing, position=envelope.position if envelope else 0)
            with suppress(EntryConflictError):
                await self._leases.create(partition, standing)

    def _run_ended(self, run: PartitionRun) -> None:
        if self._runs.get(run.partition) is run:
            del self._runs[run.partition]
        self._look_again = True
        if self._waiting is not None:
            self._waiting.cancel()
