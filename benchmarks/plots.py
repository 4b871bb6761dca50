"""Plots of results, as SVG: one file each, which a browser shows in light or dark, as it is set.

The background is part of the picture, so that it can be read on any page. Colours belong to
subjects, the same in all plots; a line's bar, or the thin line of a bar, is the spread of the runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

from .results import BARE, PEERS, Figure, Results, times
from .suite import LOOPS, NAME, ours

_INK, _PAPER, _GRID = "#24292f", "#fffffe", "#d8dee4"
_DARK = {_INK: "#e6edf3", _PAPER: "#1b1f27", _GRID: "#3d444d"}
_COLOURS: Mapping[str, str] = {
    NAME: "#0a9d8d",
    ours("asyncio"): "#0a9d8d",
    ours("uvloop"): "#2f7de1",
    ours("Trio"): "#a05fe0",
    "eventsource-py": "#e07b13",
    "eventsourcing": "#d64562",
}
_BARE = "#84898f"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "benchmarks",  # the same figures make the same file
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 11,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "axes.titlesize": 10,  # the longest fits over its panel
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": _PAPER,
    "figure.facecolor": _PAPER,
    "savefig.facecolor": _PAPER,
    "legend.frameon": False,
}
_CASE = re.compile(r"(?P<tasks>[\d,]+) tasks?, (?P<events>\d+) events?, (?P<stream>.*)")


def draw(results: Results, folder: Path) -> list[str]:
    """All plots for which there are figures; their names."""
    plots: Mapping[str, Callable[[Results], Any]] = {
        "overview": _overview,
        "append-postgresql": lambda found: _append(found, "PostgreSQL"),
        "append-sqlite": lambda found: _append(found, "SQLite"),
        "append-memory": lambda found: _append(found, "memory"),
        "load": _load,
        "read": lambda found: _bars(found, ("read",), "events/s"),
        "catch-up": lambda found: _bars(found, ("catch up",), "events/s"),
        "fan-out": lambda found: _bars(found, ("fan-out",), "deliveries/s"),
        "latency": _latency,
        "costs": _costs,
    }
    folder.mkdir(parents=True, exist_ok=True)
    drawn: list[str] = []
    plt.switch_backend("svg")  # no window is opened, wherever this runs
    with mpl.rc_context(_STYLE):
        for name, plot in plots.items():
            path = folder / f"{name}.svg"
            path.unlink(missing_ok=True)
            picture = plot(results)
            if picture is None:
                continue
            picture.savefig(path, metadata={"Date": None, "Creator": None})
            plt.close(picture)
            path.write_text(_light_and_dark(path.read_text(encoding="utf-8")), encoding="utf-8")
            drawn.append(name)
    return drawn


def _light_and_dark(svg: str) -> str:
    rules = "".join(
        f'[style*="{what}: {light}"]{{{what}:{dark} !important}}'
        for light, dark in _DARK.items()
        for what in ("fill", "stroke")
    )
    style = f"<style>@media (prefers-color-scheme: dark){{{rules}}}</style>"
    return re.sub(r"(<svg\b[^>]*>)", lambda found: found[0] + style, svg, count=1)


def _colour(subject: str) -> str:
    if subject.startswith(BARE):
        return _BARE
    known = (name for name in (*PEERS, *map(ours, LOOPS), NAME) if subject.startswith(name))
    return _COLOURS[next(known)] if subject.startswith((NAME, *PEERS)) else _BARE


def _shown(figures: Iterable[Figure]) -> list[Figure]:
    """The bare driver on its first loop, ours by the default driver, and the peers."""
    wanted = (NAME, *map(ours, LOOPS), *(s for p in PEERS for s in (p, f"{p}, snapshot")))
    found = list(figures)
    bare = [f for f in found if f.piece.subject.startswith(BARE)]
    bare = [f for f in bare if "uvloop" not in f.piece.subject]
    return bare + [f for subject in wanted for f in found if f.piece.subject == subject]


def _of(results: Results, work: str, store: str, unit: str) -> dict[str, list[Figure]]:
    """The figures by case."""
    found: dict[str, list[Figure]] = {}
    for figure in results.figures:
        piece = figure.piece
        if (piece.work, piece.store, figure.unit) == (work, store, unit):
            found.setdefault(piece.case, []).append(figure)
    return found


def _panels(rows: int, columns: int, height: float, width: float = 4.6) -> tuple[Any, Any]:
    size = (width * columns, height * rows)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")


def _legend(picture: Any, panels: Any) -> None:
    handles: dict[str, Any] = {}
    for panel in panels.flat:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    picture.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=10
    )


def _line(panel: Any, places: Sequence[float], figures: Sequence[Figure]) -> None:
    subject = figures[0].piece.subject
    values = [figure.value for figure in figures]
    below = [figure.value - figure.lowest for figure in figures]
    above = [figure.highest - figure.value for figure in figures]
    dashed = subject.startswith(BARE) or "snapshot" in subject
    panel.errorbar(
        places,
        values,
        yerr=(below, above),
        label=subject,
        color=_colour(subject),
        linestyle="--" if dashed else "-",
        marker="o",
        markersize=4.5,
        capsize=2.5,
        linewidth=1.8,
        elinewidth=1,
    )


def _append(results: Results, store: str) -> Any:
    """Events a second by tasks: a panel for events an append, and for the streams."""
    panels_of: dict[tuple[int, str], dict[str, list[tuple[int, Figure]]]] = {}
    for case, figures in _of(results, "append", store, "events/s").items():
        match = _CASE.fullmatch(case)
        if match is None or int(match["events"]) > 10:
            continue
        lines = panels_of.setdefault((int(match["events"]), match["stream"]), {})
        for figure in _shown(figures):
            tasks = int(match["tasks"].replace(",", ""))
            lines.setdefault(figure.piece.subject, []).append((tasks, figure))
    if not panels_of:
        return None
    events = sorted({key[0] for key in panels_of})
    streams = sorted({key[1] for key in panels_of}, reverse=True)
    picture, panels = _panels(len(streams), len(events), 3.4)
    for row, stream in enumerate(streams):
        for column, count in enumerate(events):
            panel = panels[row][column]
            lines = panels_of.get((count, stream), {})
            panel.set_visible(bool(lines))
            for points in lines.values():
                _line(panel, [tasks for tasks, _ in points], [figure for _, figure in points])
            ticks = sorted({tasks for points in lines.values() for tasks, _ in points})
            _logarithmic(panel.set_xscale, panel.set_yscale)
            panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks], minor=False)
            panel.minorticks_off()
            panel.yaxis.set_major_formatter(_thousands)
            what = "1 event" if count == 1 else f"{count} events"
            panel.set_title(f"{store}, {what} an append, {stream}")
            panel.set_xlabel("tasks at the same time")
            panel.set_ylabel("events per second")
    _legend(picture, panels)
    return picture


def _logarithmic(*setters: Callable[[str], object]) -> None:
    for setter in setters:
        setter("log")


def _thousands(value: float, _: object = None) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def _load(results: Results) -> Any:
    stores = [s for s in ("PostgreSQL", "SQLite", "memory") if _of(results, "load", s, "ms")]
    if not stores:
        return None
    picture, panels = _panels(1, len(stores), 3.8, 4.2)
    for panel, store in zip(panels[0], stores, strict=True):
        lines: dict[str, list[tuple[int, Figure]]] = {}
        for case, figures in _of(results, "load", store, "ms").items():
            size = int(case.split()[0].replace(",", ""))
            for figure in _shown(figures):
                lines.setdefault(figure.piece.subject, []).append((size, figure))
        for points in lines.values():
            _line(panel, [size for size, _ in points], [figure for _, figure in points])
        ticks = sorted({size for points in lines.values() for size, _ in points})
        _logarithmic(panel.set_xscale, panel.set_yscale)
        panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks], minor=False)
        panel.minorticks_off()
        panel.yaxis.set_major_formatter(_thousands)
        panel.set_title(f"load an aggregate, {store}")
        panel.set_xlabel("events of the aggregate")
        panel.set_ylabel("milliseconds")
    _legend(picture, panels)
    return picture


def _bar(panel: Any, figures: Sequence[Figure], unit: str) -> None:
    for place, figure in enumerate(figures):
        panel.barh(
            place,
            figure.value,
            height=0.65,
            color=_colour(figure.piece.subject),
            xerr=([figure.value - figure.lowest], [figure.highest - figure.value]),
            error_kw={"ecolor": _INK, "elinewidth": 1, "capsize": 2.5},
        )
        text = f" {figure.value:,.0f}" if figure.value >= 100 else f" {figure.value:.3g}"
        panel.annotate(
            text, (figure.highest, place), va="center", xytext=(3, 0), textcoords="offset points"
        )
    panel.set_yticks(range(len(figures)), [figure.piece.subject for figure in figures])
    panel.invert_yaxis()
    panel.set_xlim(0, max(figure.highest for figure in figures) * 1.22)
    panel.grid(visible=False, axis="y")
    panel.xaxis.set_major_formatter(_thousands)
    panel.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4))
    panel.set_xlabel(unit)


def _bars(results: Results, works: Sequence[str], unit: str) -> Any:
    """A panel for each work, store and case."""
    groups: list[tuple[str, list[Figure]]] = []
    for work in works:
        for store in ("PostgreSQL", "SQLite", "memory"):
            for case, figures in _of(results, work, store, unit).items():
                groups.append((f"{work}, {store}: {case}", _shown(figures)))
    return _bar_panels(groups, unit.replace("/s", " per second"))


def _bar_panels(groups: Sequence[tuple[str, Sequence[Figure]]], unit: str = "") -> Any:
    groups = [(title, figures) for title, figures in groups if figures]
    if not groups:
        return None
    heights = [0.9 + 0.36 * len(figures) for _, figures in groups]
    picture, panels = plt.subplots(
        len(groups),
        1,
        figsize=(9.2, sum(heights)),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )
    for (title, figures), panel in zip(groups, panels.flat, strict=True):
        _bar(panel, figures, unit or figures[0].unit)
        panel.set_title(title, loc="left")
    return picture


def _costs(results: Results) -> Any:
    groups: list[tuple[str, list[Figure]]] = []
    for work, unit, what in (
        ("memory of an append", "kB", "kilobytes for each append under way"),
        ("memory of a long stream", "MB", "megabytes above the start, while it is read"),
        ("import", "ms", "milliseconds to import"),
        ("installation", "MB", "megabytes on the disk"),
    ):
        for case, figures in _of(results, work, "PostgreSQL", unit).items():
            if len(_shown(figures)) > 1:
                groups.append((f"{what}: {case}", _shown(figures)))
    return _bar_panels(groups)


def _latency(results: Results) -> Any:
    """From p50 to p99, by subject."""
    p50 = _of(results, "append to subscriber", "PostgreSQL", "p50 ms")
    p99 = _of(results, "append to subscriber", "PostgreSQL", "p99 ms")
    if not p50:
        return None
    heights = [0.9 + 0.36 * len(_shown(figures)) for figures in p50.values()]
    picture, panels = plt.subplots(
        len(p50),
        1,
        figsize=(9.2, sum(heights)),
        squeeze=False,
        sharex=True,
        layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )
    for (case, figures), panel in zip(p50.items(), panels.flat, strict=True):
        halves, slowest = _shown(figures), _shown(p99[case])
        for place, (half, slow) in enumerate(zip(halves, slowest, strict=True)):
            colour = _colour(half.piece.subject)
            panel.plot((half.value, slow.value), (place, place), color=colour, linewidth=2.5)
            panel.plot(half.value, place, "o", color=colour, markersize=8)
            panel.plot(slow.value, place, "|", color=colour, markersize=13, markeredgewidth=2.5)
            text = f"{half.value:.3g} to {slow.value:.3g}"
            panel.annotate(
                text, (slow.value, place), va="center", xytext=(9, 0), textcoords="offset points"
            )
        panel.set_yticks(range(len(halves)), [figure.piece.subject for figure in halves])
        panel.set_ylim(len(halves) - 0.5, -0.5)
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(_thousands)
        panel.grid(visible=False, axis="y")
        panel.set_title(f"append to subscriber, PostgreSQL: {case}", loc="left")
    panels.flat[-1].set_xlabel("milliseconds: the median (●) and the slowest hundredth (|)")
    low, high = panels.flat[-1].get_xlim()
    panels.flat[-1].set_xlim(low, high * 3)  # room for the figures
    panels.flat[-1].xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    return picture


def _overview(results: Results) -> Any:
    """How many times the bare driver, by work and loop."""
    rows: dict[str, dict[str, float]] = {}
    for figure in results.figures:
        piece, limit = figure.piece, results.limit(figure)
        if piece.store != "PostgreSQL" or piece.subject not in map(ours, LOOPS) or limit is None:
            continue
        better = times(figure, limit)
        if better is not None and figure.unit in ("events/s", "ms"):
            rows.setdefault(f"{piece.work}: {piece.case}", {})[piece.subject] = better
    if not rows:
        return None
    picture, panel = plt.subplots(figsize=(9.2, 1.4 + 0.3 * len(rows)), layout="constrained")
    for place, found in enumerate(rows.values()):
        for subject, better in found.items():
            label = subject if place == 0 else None
            panel.plot(better, place, "o", color=_colour(subject), markersize=7, label=label)
    panel.axvline(1, color=_INK, linewidth=1.2)
    panel.set_yticks(range(len(rows)), rows)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_xscale("log")
    ticks = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
    low, high = panel.get_xlim()
    shown = [tick for tick in ticks if low <= tick <= high]
    panel.set_xticks(shown, [f"{tick:g}" for tick in shown])
    panel.minorticks_off()
    panel.set_xlabel("times the bare driver (right of the line: better than it)")
    panel.set_title("PostgreSQL: beside bare asyncpg, which checks nothing", loc="left")
    picture.legend(loc="outside lower center", ncols=3, fontsize=10)
    return picture
