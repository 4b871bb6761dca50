"""What is published, on its way to the broker.

- One queue, sent from its head by whoever has the lock, so messages arrive in the order in which
  they were published, whoever publishes, and those who wait together are sent together.
- A batch leaves the queue once it is stored, or when the publisher who waits for it gives up. So
  what failed is sent again before what comes after it, and what is sent twice keeps its order: the
  receivers drop the repetition.
- What nobody waits for is bounded, and is for `run` to send.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import anyio

from ..errors import StorageError
from .broker import Broker, Message
from .waiting import Backoff

SENT_AT_ONCE = 1000


class _Batch:
    __slots__ = ("done", "messages", "waited_for")

    def __init__(self, messages: Sequence[Message], waited_for: bool) -> None:
        self.messages = messages
        self.waited_for = waited_for
        self.done = False


class Outgoing:
    """Everything that one bus sends."""

    def __init__(self, broker: Broker, room: int) -> None:
        self._broker = broker
        self._room = room
        self._batches: deque[_Batch] = deque()
        self._turn = anyio.Lock(fast_acquire=True)
        self._changed = anyio.Event()
        self.queued = 0  # messages that nobody waits for
        self.sent = 0
        self.running = False

    async def send(self, messages: Sequence[Message]) -> None:
        """Return when they are stored; `StorageError` if that failed."""
        batch = _Batch(messages, waited_for=True)
        self._batches.append(batch)
        try:
            while not batch.done:
                async with self._turn:
                    if not batch.done:
                        await self._send_some()
        finally:
            if not batch.done:
                self._batches.remove(batch)

    async def queue(self, messages: Sequence[Message]) -> None:
        """Leave them to `run`, once there is room; `RuntimeError` if nobody runs it."""
        # An empty queue takes more than it is to hold, else that could never be sent.
        while self.running and self.queued and self.queued + len(messages) > self._room:
            await self._changed.wait()
        self.check_running()
        self.queued += len(messages)
        self._batches.append(_Batch(messages, waited_for=False))
        self._change()

    def check_running(self) -> None:
        if not self.running:
            raise RuntimeError(
                "Nothing was published: in the background it is for run() to send the events, and "
                "nobody runs it.\n"
                "  Start it first: await tasks.start(bus.run)"
            )

    def stop(self) -> None:
        """Take no more for the background, and have `run` return when it has sent what it has."""
        self.running = False
        self._change()

    async def run(self) -> None:
        """Send what nobody waits for, until `stop`; again and again while the broker fails."""
        backoff = Backoff("what was published in the background is kept")
        while self.running or self.queued:
            if not self.queued:
                await self._changed.wait()
                continue
            try:
                async with self._turn:
                    if self.queued:
                        await self._send_some()
            except StorageError as error:
                await backoff.wait(error)
            else:
                backoff.reset()

    async def _send_some(self) -> None:
        taken: list[_Batch] = []
        messages: list[Message] = []
        for batch in self._batches:
            if taken and len(messages) + len(batch.messages) > SENT_AT_ONCE:
                break
            taken.append(batch)
            messages += batch.messages
        await self._broker.send(messages)
        self.sent += len(messages)
        for batch in taken:
            batch.done = True
            if not batch.waited_for:
                self.queued -= len(batch.messages)
        while self._batches and self._batches[0].done:  # others were given up meanwhile
            self._batches.popleft()
        self._change()

    def _change(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()
