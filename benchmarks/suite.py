"""Pieces of work in interleaved rounds: each is run once a round, so that all see the same.

- What is compared is added one after the other: then its runs are neighbours in time.
- The suite draws between the pieces only; a thread that draws would take its share of them.
- A piece that fails once is run no more and has no figures: a median of the rounds that went well
  would be a nicer figure than what happened. Its error is kept.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from time import perf_counter
from typing import ParamSpec, TypeAlias, TypeVar

import anyio
import attrs
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

P = ParamSpec("P")
T = TypeVar("T")

Found: TypeAlias = Mapping[str, float]
"""What a run found, by unit: one that ends in `/s` is better the higher, another the lower."""

_LONGEST = 600.0  # seconds for one piece of work; what hangs is an error, and not the end

NAME = "eventsource-anyio"
LOOPS: Mapping[str, tuple[str, dict[str, object]]] = {
    "asyncio": ("asyncio", {}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "Trio": ("trio", {}),
}


def on(loop: str, function: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
    backend, options = LOOPS[loop]

    async def call() -> T:
        with anyio.fail_after(_LONGEST):
            return await function(*args, **kwargs)

    found: T = anyio.run(call, backend=backend, backend_options=options)
    return found


def ours(loop: str, driver: str = "") -> str:
    return ", ".join(filter(None, (NAME, loop, driver)))


def anyios(loop: str) -> str:
    return f"anyio, {loop}"


def per_second(events: int, seconds: float) -> Found:
    return {"events/s": events / seconds}


@attrs.frozen
class Piece:
    """What is done, on which store, in which case, and by whom."""

    work: str
    store: str
    case: str
    subject: str

    def __str__(self) -> str:
        return f"{self.work}, {self.store}: {self.case}: {self.subject}"


class Suite:
    def __init__(self) -> None:
        self.runs: dict[tuple[Piece, str], list[float]] = {}
        self.failed: dict[Piece, str] = {}
        self.spent: dict[tuple[str, str], float] = {}
        """Seconds by work and store, with all that belongs to a run."""
        self._work: dict[Piece, Callable[[], Found]] = {}
        self._steps: list[Callable[[], None]] = []

    @property
    def pieces(self) -> Collection[Piece]:
        return self._work.keys()

    def add(self, piece: Piece, work: Callable[[], Found]) -> None:
        if piece in self._work:
            raise ValueError(f"{piece} is there already")
        self._work[piece] = work

    def add_step(self, step: Callable[[], None]) -> None:
        """What has to be done before each round, and is not measured."""
        self._steps.append(step)

    def keep(self, wanted: Callable[[Piece], bool]) -> None:
        """Forget the pieces that are not wanted, and everything measured so far."""
        self._work = {piece: work for piece, work in self._work.items() if wanted(piece)}
        self.runs.clear()
        self.failed.clear()

    def run(self, rounds: int, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
            task = progress.add_task("", total=rounds * len(self._work))
            for number in range(1, rounds + 1):
                for step in self._steps:
                    step()
                for piece, work in self._work.items():
                    what = f"round {number} of {rounds}: {piece}"
                    progress.update(task, description=f"{what:75.75}", refresh=True)
                    self._run(piece, work)
                    progress.advance(task)

    def _run(self, piece: Piece, work: Callable[[], Found]) -> None:
        if piece in self.failed:
            return
        begun = perf_counter()
        try:
            found = work()
        except Exception as error:  # noqa: BLE001 - whatever it is, the others go on
            self.failed[piece] = f"{type(error).__name__}: {error}"
            self.runs = {key: runs for key, runs in self.runs.items() if key[0] != piece}
            return
        finally:
            key = (piece.work, piece.store)
            self.spent[key] = self.spent.get(key, 0.0) + perf_counter() - begun
        for unit, value in found.items():
            self.runs.setdefault((piece, unit), []).append(value)
