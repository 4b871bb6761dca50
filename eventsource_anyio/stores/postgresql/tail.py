"""The end of the order that readers may go to, and who waits for it to grow.

- A reader goes as far as `es.safe_position` says and no further; the signal keeps the last answer.
- A hint, by NOTIFY or from an append of this store, only makes somebody look. It may be lost: then
  the next look comes after `poll_every` seconds.
- There is no task: of those who wait, one watches for the others. It has the one connection that
  listens, and asks there too, so that it finds out when the connection is dead.
- On the same channel others send messages, which are passed on by whoever watches. Who hears them
  listens where no reader watches, asks for no position, and makes way for a reader who comes.
- Writers send a hint after their commit, and not again within `_HINT_EVERY` seconds; so a watcher
  that was hinted, or found something, goes on looking for somewhat longer than that, and then less
  and less often.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from math import inf
from time import monotonic

import anyio

from ..hints import Hints
from ..signal import AppendSignal
from .driver import Connection, Driver, DriverError, Row
from .pool import Pool
from .statements import LARGEST, Statements

_HINT_EVERY = 0.01
_AWAKE = 1.5 * _HINT_EVERY
_SOON = 0.0015
_FIRST_RETRY, _LONGEST_RETRY = 0.1, 30.0
_BACK_SOON = 0.01


class Tail:
    def __init__(
        self,
        driver: Driver,
        pool: Pool,
        statements: Statements,
        signal: AppendSignal,
        channel: str,
        poll_every: float,
    ) -> None:
        self._driver = driver
        self._pool = pool
        self._statements = statements
        self._signal = signal
        self._channel = channel
        self._poll_every = poll_every
        self._watched = False
        self._watching: anyio.CancelScope | None = None
        self._listening: Connection | None = None
        self._connecting: tuple[anyio.CancelScope, anyio.Event] | None = None
        self._retry_at = 0.0
        self._retry_after = _FIRST_RETRY
        self._stirred = -inf  # when there was something to look for
        self._hinted = -inf
        self._only_listening: anyio.CancelScope | None = None
        self._reader_waits = False
        self._left_at = -inf
        self._closed = False
        self.hints: Hints = _Messages(self)

    @property
    def position(self) -> int:
        """What is known to be safe."""
        return self._signal.position

    async def safe_position(self) -> int:
        """What is safe now, asked of the server."""
        return await self._ask(self._pool)

    async def read(self, low: int, high: int, limit: int) -> tuple[int, Sequence[Row]]:
        """The same, and events up to there, in one round trip."""
        known = self._signal.position
        safe, *rows = await self._pool.fetch(self._statements.read_safe, known, low, high, limit)
        self._found(safe[0], known)
        return safe[0], rows

    async def wait(self, after: int) -> None:
        """Return when a position beyond this one may be safe, or the server cannot be asked: the
        reader reads, and is told."""
        while self._signal.position <= after and not self._closed:
            if self._watched:
                self._make_way()
                await self._signal.wait(after)
                continue
            self._watched = True
            try:
                if not await self._watch():
                    return
            finally:
                self._leave()
        await self._signal.wait(after)

    def _leave(self) -> None:
        self._watched = False
        self._left_at = monotonic()
        self._signal.wake()  # somebody else has to watch

    def look(self) -> None:
        """An append of this store was committed: have whoever watches look at once."""
        self._stirred = monotonic()
        if self._watching is not None:
            self._watching.cancel()

    async def hint(self, connection: Connection | Pool) -> None:
        """Tell everybody, in this process and others, that an append was committed."""
        self.look()
        now = monotonic()
        if now - self._hinted < _HINT_EVERY:
            return
        self._hinted = now
        try:
            await connection.fetch(f"NOTIFY {self._channel}")
        except DriverError:
            return  # a hint may be lost

    async def tell(self, message: str) -> None:
        """Send a message to everybody, in this process and others."""
        with suppress(DriverError):  # it may be lost
            await self._pool.fetch("SELECT pg_notify($1, $2)", self._channel, message)

    async def listen(self) -> None:
        """See to it that messages are heard, until there is a reader who does."""
        while not self._watched and (soon := self._left_at + _BACK_SOON - monotonic()) > 0:  # noqa: ASYNC110  (nobody tells)
            await anyio.sleep(soon)  # a reader mostly comes back, and that costs less
        if self._watched or self._closed:
            await self._signal.wait(LARGEST)
            return
        self._watched, self._reader_waits = True, False
        try:
            with anyio.CancelScope() as self._only_listening:
                while not (self._closed or self._reader_waits):
                    await self._only_listen()
        finally:
            self._only_listening = None
            self._leave()

    async def close(self) -> None:
        self._closed = True
        listening, self._listening = self._listening, None
        self.look()
        self._make_way()
        if self._connecting is not None:  # what makes connections is closed next
            scope, connected = self._connecting
            scope.cancel()
            await connected.wait()
        if listening is not None:
            await listening.close()

    async def _watch(self) -> bool:
        """Wait for a hint, or look after a while; false if the server is to be read, or is gone."""
        before = self._listening
        listening = await self._listen()
        idle = monotonic() - self._stirred
        pause = _SOON if idle < _AWAKE else min(idle, self._poll_every)
        if listening is not before:
            pause = 0.0  # what came before it listened has to be looked for
        stirred = self._stirred
        with anyio.move_on_after(pause) as self._watching:
            if listening is None:
                await anyio.sleep_forever()
            else:
                await self._heard(listening)
                self._stirred = monotonic()
        self._watching = None
        if self._closed:
            return True
        if self._stirred != stirred:
            return False  # whoever reads asks the server in the same round trip
        try:
            await self._ask(listening or self._pool)
        except DriverError:
            self._drop()
            return False
        return True

    async def _heard(self, listening: Connection) -> bool:
        """True once an append was announced; False if the connection is gone."""
        while said := await listening.heard():
            for message in said:
                if message:
                    self.hints.pass_on(message)
            if "" in said:
                return True
        return False

    def _make_way(self) -> None:
        """Have whoever only listens leave it to a reader."""
        self._reader_waits = True
        if self._only_listening is not None and self._connecting is None:
            self._only_listening.cancel()

    async def _only_listen(self) -> None:
        listening = await self._listen()
        if listening is None:
            await anyio.sleep(max(self._retry_at - monotonic(), _BACK_SOON))
        elif not self._reader_waits:
            announced = False
            with anyio.move_on_after(_LONGEST_RETRY):
                announced = await self._heard(listening)
                self._stirred = monotonic()
            if not announced:  # for so long that the connection may be dead
                try:
                    await self._ask(listening)
                except DriverError:
                    self._drop()

    async def _ask(self, connection: Connection | Pool) -> int:
        known = self._signal.position
        ((position,),) = await connection.fetch(self._statements.safe_position, known)
        self._found(position, known)
        return self._signal.position

    def _found(self, position: int, known: int) -> None:
        if position > known:
            self._signal.advance(position)
            self.look()  # whoever watches waits for more than that

    async def _listen(self) -> Connection | None:
        """The connection that listens; None as long as there cannot be one."""
        if self._listening is not None:
            if self._listening.usable:
                return self._listening
            self._drop()
        if monotonic() < self._retry_at:
            return None
        connected = anyio.Event()
        try:
            with anyio.CancelScope() as scope:
                self._connecting = scope, connected
                await self._connect()
        finally:
            self._connecting = None
            connected.set()
        return self._listening

    async def _connect(self) -> None:
        connection: Connection | None = None
        try:
            connection = await self._driver.connect()
            await connection.listen(self._channel)
        except DriverError:
            self._retry_at = monotonic() + self._retry_after
            self._retry_after = min(2 * self._retry_after, _LONGEST_RETRY)
            if connection is not None:
                connection.abandon()
        except BaseException:
            if connection is not None:
                connection.abandon()
            raise
        else:
            if self._closed:  # meanwhile
                await connection.close()
            else:
                self._listening = connection
                self.hints.pass_on("")
                self._retry_after = _FIRST_RETRY

    def _drop(self) -> None:
        if self._listening is not None:
            self._listening.abandon()
            self._listening = None


class _Messages(Hints):
    def __init__(self, tail: Tail) -> None:
        super().__init__(everywhere=True)
        self._tail = tail

    async def tell(self, message: str) -> None:
        await self._tail.tell(message)

    async def _listen(self) -> None:
        await self._tail.listen()
