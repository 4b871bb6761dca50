"""What was measured: kept as JSON, from which tables, plots, claims and verdicts are made again.

- A figure is the median of its runs; its spread is the lowest and the highest of them.
- A ratio is the median of the rounds' ratios, never the ratio of two medians: what disturbed one
  round disturbed both of its runs.
- `times(figure, base)` is how many times better the figure is than the base: above 1 is better,
  whether the unit is a rate or a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import attrs

from .suite import NAME, Piece, Suite

BARE = "bare "
PEERS = ("eventsource-py", "eventsourcing")
FORMAT = 1
COUNTED = ("missed", "committed", "again")
"""Units that are added up over the rounds: a single event that was missed in one of them counts."""


@attrs.frozen
class Figure:
    piece: Piece
    unit: str
    runs: Sequence[float]

    @property
    def value(self) -> float:
        return sum(self.runs) if self.unit in COUNTED else median(self.runs)

    @property
    def lowest(self) -> float:
        return min(self.runs)

    @property
    def highest(self) -> float:
        return max(self.runs)

    @property
    def higher_is_better(self) -> bool:
        return self.unit.endswith("/s")


def ratio(figure: Figure, base: Figure) -> float:
    return median(one / other for one, other in zip(figure.runs, base.runs, strict=True))


def times(figure: Figure, base: Figure) -> float | None:
    """None where there is nothing to compare: an unlike unit, or a run that found nothing."""
    if figure.unit != base.unit or figure.unit in COUNTED or len(figure.runs) != len(base.runs):
        return None
    if 0 in (*figure.runs, *base.runs):
        return None
    return ratio(figure, base) if figure.higher_is_better else ratio(base, figure)


def loop_of(subject: str) -> str:
    """The event loop that a subject names, or nothing."""
    return next((loop for loop in ("uvloop", "Trio", "asyncio") if loop in subject), "")


class Results:
    """Figures in the order in which they were measured, and what is known about the run."""

    def __init__(
        self,
        about: Mapping[str, Any],
        figures: Iterable[Figure],
        failed: Mapping[Piece, str] | None = None,
    ) -> None:
        self.about = about
        self.failed = dict(failed or {})
        self._figures = {(figure.piece, figure.unit): figure for figure in figures}

    @classmethod
    def of(cls, suite: Suite, about: Mapping[str, Any]) -> Results:
        figures = (Figure(piece, unit, runs) for (piece, unit), runs in suite.runs.items())
        return cls(about, figures, suite.failed)

    @property
    def figures(self) -> list[Figure]:
        return list(self._figures.values())

    def find(self, work: str, store: str, case: str, subject: str, unit: str) -> Figure | None:
        return self._figures.get((Piece(work, store, case, subject), unit))

    def beside(self, figure: Figure) -> list[Figure]:
        """The others of the same work, store, case and unit."""
        one = figure.piece
        return [
            other
            for (piece, unit), other in self._figures.items()
            if (piece.work, piece.store, piece.case) == (one.work, one.store, one.case)
            and unit == figure.unit
            and piece != one
        ]

    def limit(self, figure: Figure) -> Figure | None:
        """The bare driver: on uvloop that on uvloop, else that on asyncio, or on no loop at all."""
        if figure.piece.subject.startswith(BARE):
            return None
        bare = [f for f in self.beside(figure) if f.piece.subject.startswith(BARE)]
        uvloop = [f for f in bare if loop_of(f.piece.subject) == "uvloop"]
        others = [f for f in bare if f not in uvloop]
        wanted = uvloop if loop_of(figure.piece.subject) == "uvloop" and uvloop else others
        return wanted[0] if wanted else None

    def peer(self, figure: Figure, name: str) -> Figure | None:
        """Its figure for ours; peers are not compared with each other."""
        if not figure.piece.subject.startswith(NAME):
            return None
        return next((f for f in self.beside(figure) if f.piece.subject == name), None)

    def missed(self, figure: Figure) -> tuple[float, float] | None:
        """Committed events that a subscriber missed while the subject appended; and of how many.

        In the figure's own runs, or in those where somebody followed the same load.
        """
        one = figure.piece
        for piece in (one, attrs.evolve(one, work="append, with a subscriber")):
            missed = self._figures.get((piece, "missed"))
            committed = self._figures.get((piece, "committed"))
            if missed and committed:
                return missed.value, committed.value
        return None

    def save(self, path: Path) -> None:
        """A figure a line, so that two runs can be compared line by line."""
        figures = [
            {**attrs.asdict(f.piece), "unit": f.unit, "runs": [*map(_short, f.runs)]}
            for f in self.figures
        ]
        failed = [{**attrs.asdict(piece), "why": why} for piece, why in self.failed.items()]
        parts = {"format": _json(FORMAT), "about": _json(self.about, indent=1)}
        parts |= {"figures": _lines(figures), "failed": _lines(failed)}
        text = ",\n".join(f'"{name}": {part}' for name, part in parts.items())
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Results:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.get("format") != FORMAT:
            raise ValueError(
                f"{path} is of format {found.get('format')}, and this reads {FORMAT}: "
                "measure again, or draw it with the version that measured it"
            )
        return cls(
            found["about"],
            (Figure(_piece(one), one["unit"], one["runs"]) for one in found["figures"]),
            {_piece(one): one["why"] for one in found["failed"]},
        )


def _piece(found: Mapping[str, Any]) -> Piece:
    return Piece(found["work"], found["store"], found["case"], found["subject"])


def _short(value: float) -> float:
    """Six digits: no clock of this kind knows more."""
    return float(f"{value:.6g}")


def _json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _lines(values: Sequence[object]) -> str:
    return "[\n" + ",\n".join(map(_json, values)) + "\n]"
