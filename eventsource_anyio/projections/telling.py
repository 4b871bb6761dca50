"""Telling each other that somebody waits for a position, and that it has been reached.

- Who waits for shards that others run says for which position. Who runs shards of the projection
  answers once all of its own are saved up to there. So where nobody waits, nothing is said.
- All of it is hints, and one projection may be taken for another: whoever waits looks for itself,
  and also looks without being told, after longer and longer pauses.
- Who begins to listen, for the first time or again, says so, and who waits says so once more.
- A coordinator says something every 10 ms at most, with all that there is to say then. It does so
  in a task of its own: no batch waits for it.
"""

from __future__ import annotations

from typing import Protocol
from uuid import uuid4
from zlib import crc32

import anyio
import msgspec

from ..stores.interface import EventStore

SAY_EVERY = 0.01
_AT_ONCE = 150  # of up to 34 bytes each; a notification of PostgreSQL has 8,000 at most


class Told(Protocol):
    """A version of a projection in a coordinator."""

    def wanted(self, position: int) -> None:
        """Somebody elsewhere waits until it has got there."""

    def reached(self) -> bool:
        """Whether it has got somewhere that somebody elsewhere has waited for, since it was asked
        this the last time."""
        ...

    def look_again(self) -> None:
        """It may have moved elsewhere."""


class _Message(msgspec.Struct, array_like=True):
    by: str
    waiting: list[tuple[int, int]]
    moved: list[int]
    begun: bool


class Telling:
    """What one coordinator says, and hears of others."""

    def __init__(self, store: EventStore) -> None:
        self._store = store
        self._me = uuid4().hex[:12]
        self._projections: dict[int, Told] = {}
        self._waits: list[tuple[int, int]] = []  # those of here, at the moment
        self._to_say: set[tuple[int, int]] = set()
        self._moved: set[int] = set()
        self._begun = False
        self._something: anyio.Event | None = None

    @property
    def everywhere(self) -> bool:
        """Whether all who run a projection hear it, as long as nothing is lost."""
        return self._store.hints.everywhere

    def add(self, key: str, projection: Told) -> None:
        """Tell it what it is to know."""
        self._projections[_number(key)] = projection

    def wait_begins(self, key: str, position: int) -> None:
        """Somebody here waits until a projection has got there elsewhere."""
        self._waits.append((_number(key), position))
        self.ask(key, position)

    def wait_ends(self, key: str, position: int) -> None:
        self._waits.remove((_number(key), position))

    def ask(self, key: str, position: int) -> None:
        """Say that it is waited for; it may have been missed."""
        self._to_say.add((_number(key), position))
        self.stir()

    def moved(self, key: str) -> None:
        """Others are to look at it, whether they have asked or not."""
        self._moved.add(_number(key))
        self.stir()

    def stir(self) -> None:
        """There may be something to say."""
        if self._something is not None:
            self._something.set()

    async def run(self, scope: anyio.CancelScope) -> None:
        """Say and hear, until the scope is cancelled."""
        self._begun = True
        with scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._store.hints.hear, self._heard)
                while True:
                    self._something = anyio.Event()
                    if message := self._message():
                        await self._store.hints.tell(message)
                        await anyio.sleep(SAY_EVERY)
                    else:
                        await self._something.wait()

    def _message(self) -> str:
        self._moved.update(number for number, one in self._projections.items() if one.reached())
        waiting = [self._to_say.pop() for _ in range(min(len(self._to_say), _AT_ONCE))]
        moved = [self._moved.pop() for _ in range(min(len(self._moved), _AT_ONCE - len(waiting)))]
        begun, self._begun = self._begun, False
        if not (waiting or moved or begun):
            return ""
        return msgspec.json.encode(_Message(self._me, waiting, moved, begun)).decode()

    def _heard(self, said: str) -> None:
        if not said:
            self._begun = True
            self.stir()
            for projection in self._projections.values():
                projection.look_again()
            return
        try:
            message = msgspec.json.decode(said, type=_Message)
        except msgspec.DecodeError:
            return  # of somebody else's
        if message.by == self._me:
            return
        for number, position in message.waiting:
            if number in self._projections:
                self._projections[number].wanted(position)
        for number in message.moved:
            if number in self._projections:
                self._projections[number].look_again()
        if message.begun and self._waits:
            self._to_say.update(self._waits)
            self.stir()


def _number(key: str) -> int:
    return crc32(key.encode())
