"""Pieces of work in interleaved rounds, and the claims that are held to what they measured."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from statistics import median
from typing import Literal, ParamSpec, TypeAlias, TypeVar

import anyio
import attrs
from rich.console import Console
from rich.progress import Progress

P = ParamSpec("P")
T = TypeVar("T")

Measured: TypeAlias = tuple[int, float]
"""How many, and in how many seconds."""

_LONGEST = 600.0  # seconds for one piece of work; what hangs is an error, and not the end

LOOPS: Mapping[str, tuple[str, dict[str, object]]] = {
    "asyncio": ("asyncio", {}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}


def on(loop: str, function: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
    backend, options = LOOPS[loop]

    async def call() -> T:
        with anyio.fail_after(_LONGEST):
            return await function(*args, **kwargs)

    found: T = anyio.run(call, backend=backend, backend_options=options)
    return found


@attrs.frozen
class Claim:
    """What is claimed, what was measured, and its bound; without one it is only told."""

    what: str
    measured: float
    sign: Literal["≥", "≤"] = "≥"
    bound: float | None = None

    @property
    def verdict(self) -> Literal["held", "missed", ""]:
        if self.bound is None:
            return ""
        held = self.measured >= self.bound if self.sign == "≥" else self.measured <= self.bound
        return "held" if held else "missed"


class Suite:
    """Named pieces of work, each run once a round, so that all of them see the same neighbours.

    What is compared should be added one after the other: then its runs are neighbours in time.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.rates: dict[str, list[float]] = {}
        self.figures: dict[str, list[float]] = {}
        self._work: dict[str, Callable[[], None]] = {}

    def add(self, name: str, work: Callable[[], Measured]) -> None:
        """Work whose figure is how many a second."""

        def run() -> None:
            done, seconds = work()
            self.rates.setdefault(name, []).append(done / seconds)

        self._work[name] = run

    def add_figures(self, name: str, work: Callable[[], Mapping[str, float]]) -> None:
        """Work that finds several figures: they are called `{name}, {figure}`."""

        def run() -> None:
            for figure, value in work().items():
                self.figures.setdefault(f"{name}, {figure}", []).append(value)

        self._work[name] = run

    def add_step(self, name: str, step: Callable[[], None]) -> None:
        """What has to be done in each round, and is not measured."""
        self._work[name] = step

    def run(self, rounds: int, console: Console) -> None:
        # Drawn between the pieces only: a thread that draws would take its share of them.
        with Progress(console=console, transient=True, auto_refresh=False) as progress:
            task = progress.add_task("", total=rounds * len(self._work))
            for _ in range(rounds):
                for name, work in self._work.items():
                    progress.update(task, description=f"{name:45.45}", refresh=True)
                    work()
                    progress.advance(task)

    def runs(self, name: str) -> list[float]:
        return self.rates[name] if name in self.rates else self.figures[name]

    def median(self, name: str) -> float:
        return median(self.runs(name))

    def ratio(self, name: str, *bases: str) -> float:
        """The median of the rounds' ratios, to the highest of the bases in each round."""
        best: list[float] = [max(runs) for runs in zip(*map(self.runs, bases), strict=True)]
        return median(one / other for one, other in zip(self.runs(name), best, strict=True))
