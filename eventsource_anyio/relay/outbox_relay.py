"""Messages out of the outbox, to a broker or anything else: one relay at a time, in order by key.

Nothing ends it but `stop`, a cancellation, a closed store, or a bug: whatever else fails is tried
again. `run` owns its tasks: one that delivers, and one that says meanwhile that it is alive.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial

import anyio
from anyio.abc import TaskStatus
from anyio.lowlevel import checkpoint

from ..cleanup import shielded_cleanup
from ..errors import DocumentConflictError, StorageError, StoreClosedError
from ..exception_groups import only_error
from ..projections.progress import Progress
from ..stores.interface import EventStore, StoredMessage
from .delivering import Delivering, DeliverMessages, Settings, Waiting
from .event_relay import OUTAGES
from .lease import Lease, LeaseLostError, nothing
from .outbox_statistics import OutboxStatistics, State
from .parked_messages import ParkedKey, ParkedMessages

_logger = logging.getLogger("eventsource_anyio.relay")


class OutboxRelay:
    """Delivers the messages of a store's outbox: `await tasks.start(relay.run)`.

    `deliver` is awaited with some messages, oldest first, and returns once they are where their
    topics have them go; then they are removed. **At least once**, and those of a topic with the
    same key in order; the receiver knows by the `message_id` what it has got already. Messages
    without a key have no order.

    Any number may be run, in one process or in many: one of them delivers, and another one takes
    over if it is silent for `lease` seconds. One that was only slow can remove nothing any more;
    what it was delivering comes twice.

    An error of `outages` says that the receiver is away: the same messages are delivered again
    until it is back. Any other error is a message's: it is tried `attempts` times, after pauses
    that begin with `retry_after` seconds and double, and then it and the later ones of its key are
    set aside until somebody has them retried or discarded. Other keys go on all the while.

    A message that is added by this store object is delivered at once, one of another process
    within `poll_every` seconds.
    """

    def __init__(
        self,
        store: EventStore,
        deliver: DeliverMessages,
        *,
        lease: float = 5.0,
        poll_every: float = 1.0,
        batch_size: int = 100,
        attempts: int = 5,
        retry_after: float = 0.1,
        outages: tuple[type[Exception], ...] = OUTAGES,
    ) -> None:
        if not callable(deliver):
            raise TypeError(f"messages are delivered by an async function, not by {deliver!r}")
        for what, seconds in (
            ("lease", lease),
            ("poll_every", poll_every),
            ("retry_after", retry_after),
        ):
            if not seconds > 0:
                raise ValueError(f"{what} must be a number of seconds above 0, not {seconds!r}")
        for what, number in (("batch_size", batch_size), ("attempts", attempts)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{what} must be a number from 1, not {number!r}")
        self._store = store
        self._deliver = deliver
        self._settings = Settings(lease, poll_every, batch_size, attempts, retry_after, outages)
        self._messages = ParkedMessages(store)
        self._progress = Progress()
        self._waiting = Waiting()
        self._delivering: Delivering | None = None  # None: it does not have the lease
        self._running = False
        self._stopped = anyio.Event()

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Deliver, or wait to take over, until `stop` is called or it is cancelled.

        It has started once it has the lease, or knows who has. `StorageError` if the store cannot
        be reached then; later it waits for it.
        """
        if self._running:
            raise RuntimeError("this relay is running already")
        self._running, self._stopped = True, anyio.Event()
        waiting = self._waiting = Waiting()
        lease = Lease(self._store, "outbox", self._settings.lease)
        try:
            held = await lease.take()
            task_status.started()
            while not waiting.stopping:
                try:
                    if held:
                        await self._serve(lease)
                    else:
                        await waiting.pause(partial(anyio.sleep, self._settings.lease / 3))
                    held = not waiting.stopping and await lease.take()
                except StorageError as error:
                    held = False
                    await waiting.back_off(error)
        finally:
            try:
                with shielded_cleanup(), suppress(LeaseLostError, DocumentConflictError):
                    await lease.release()
            except (StorageError, StoreClosedError) as error:
                _logger.warning("outbox: the others wait for the end of the lease: %s", error)
            finally:
                self._running = False
                self._stopped.set()

    def stop(self) -> None:
        """Finish the delivery at hand, and let another relay go on; then `run` returns."""
        self._waiting.stop()

    async def wait_stopped(self) -> None:
        """Return when `run` has returned, at once if it was never called."""
        if self._running:
            await self._stopped.wait()
        else:
            await checkpoint()

    def statistics(self) -> OutboxStatistics:
        """How it is getting on, as it is known here without asking anybody."""
        delivering, progress = self._delivering, self._progress
        failing = len(delivering.failing) if delivering else 0
        parked = len(delivering.parked or ()) if delivering else 0
        oldest = delivering.oldest if delivering else None
        lag = 0.0 if oldest is None else (datetime.now(UTC) - oldest).total_seconds()
        state: State = "stopped"
        if self._running:
            state = "waiting"
            if delivering is not None:
                state = "retrying" if failing or self._waiting.pauses else "running"
        return OutboxStatistics(
            state,
            progress.handled,
            progress.rate,
            max(lag, 0.0),
            failing,
            parked,
            self._waiting.error,
        )

    # What is set aside ---------------------------------------------------------------------------
    # It is in the store, so these work whether this relay runs, or another one, or none.

    async def parked(self) -> Sequence[ParkedKey]:
        """The keys whose messages are set aside, the longest parked first."""
        return await self._messages.keys()

    async def parked_messages(
        self, parked: ParkedKey, *, limit: int = 100
    ) -> Sequence[StoredMessage]:
        """The first of its messages, in order; the very first is the one that failed."""
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ValueError(f"limit must be a number from 1, not {limit!r}")
        return [one.message for one in await self._messages.messages(parked, limit)]

    async def retry_parked(self, parked: ParkedKey) -> int:
        """Deliver its messages now, in order, one by one; how many those were.

        What `deliver` raises comes out, and then the rest stays set aside. While this runs, the
        relay may set aside more of the key, which is delivered too; later ones are delivered as
        ever.
        """
        delivered = 0
        while (known := await self._messages.get(parked.id)) is not None:
            found = await self._messages.messages(known, self._settings.batch_size)
            if not found:
                await self._messages.remove(known)
            for one in found:
                try:
                    await self._deliver([one.message])
                except Exception as error:
                    with suppress(StorageError):
                        await self._messages.failed(known, error)
                    raise
                if not await self._messages.take_out(known, [one]):
                    break  # somebody else is at it too
                delivered += 1
        return delivered

    async def discard_parked(self, parked: ParkedKey) -> int:
        """Never deliver its messages; how many. Later ones of the key are delivered again."""
        discarded = 0
        while (known := await self._messages.get(parked.id)) is not None:
            found = await self._messages.messages(known, self._settings.batch_size)
            if not found:
                await self._messages.remove(known)
            elif await self._messages.take_out(known, found):
                discarded += len(found)
        if discarded:
            _logger.warning(
                "outbox: discarded %d messages of key %r of %r, set aside after %s",
                *(discarded, parked.key, parked.topic, parked.error),
            )
        return discarded

    # While it has the lease ----------------------------------------------------------------------

    async def _serve(self, lease: Lease) -> None:
        """Deliver, until it is stopped, or the lease is lost."""
        given = (self._store, self._deliver, self._settings)
        self._delivering = Delivering(*given, lease, self._waiting, self._progress)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._renew, lease, tasks.cancel_scope)
                try:
                    await self._delivering.run()
                except LeaseLostError:
                    _logger.info("outbox: another relay has taken over")
                tasks.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise only_error(group) from None
        finally:
            self._delivering = None

    async def _renew(self, lease: Lease, serving: anyio.CancelScope) -> None:
        """Say again and again that it is alive, however long a delivery takes."""
        while True:
            await anyio.sleep(self._settings.lease / 3)
            try:
                if lease.age >= self._settings.lease / 3:
                    await lease.commit(nothing)
            except StorageError as error:
                _logger.warning("outbox: the lease cannot be renewed: %s", error)
            except LeaseLostError:
                _logger.info("outbox: another relay has taken over")
                serving.cancel()
                return
