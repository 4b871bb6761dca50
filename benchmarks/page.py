"""The tables of docs/benchmarks.md, made from results and put between its markers.

A marker is a pair of comments, `<!-- begin: NAME -->` and `<!-- end: NAME -->`, each on a line of
its own. What is between them belongs to this module; everything else is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from .claims import claims
from .report import factor, missed, number
from .results import BARE, COUNTED, PEERS, Figure, Results, times
from .suite import LOOPS, NAME, anyios, ours

SECTIONS: Mapping[str, tuple[str, ...]] = {
    "append": ("append", "append, with a projection"),
    "load": ("load",),
    "read": ("read", "fold"),
    "catch up": ("catch up", "append to read model"),
    "latency": ("append to subscriber",),
    "fan-out": ("fan-out",),
    "brokers": ("relay", "publish", "publish to handler"),
    "costs": (
        *("memory of an append", "memory of a long stream", "wake-up of a task", "import"),
        "installation",
    ),
    "large": ("append at 0 events", "append at 5 M events"),
}
"""What each section of the page is about: kinds of work."""
PLOTS: Mapping[str, tuple[str, ...]] = {
    "append": ("append-postgresql", "append-sqlite", "append-memory"),
    "load": ("load",),
    "read": ("read",),
    "catch up": ("catch-up",),
    "latency": ("latency",),
    "fan-out": ("fan-out",),
    "costs": ("costs",),
}
_STORES = ("PostgreSQL", "SQLite", "SQLite, NORMAL", "memory", "Redis", "NATS")
_MARKED = re.compile(
    r"^<!-- begin: (?P<name>[^>]+) -->$(?P<body>.*?)^<!-- end: (?P=name) -->$",
    re.MULTILINE | re.DOTALL,
)
_MARKER = re.compile(r"^<!-- (?:begin|end): .* -->$", re.MULTILINE)


def fill(text: str, tables: Mapping[str, str]) -> str:
    """The page with new tables. A marker that is not a pair, or names no table, is an error."""
    names = [found["name"] for found in _MARKED.finditer(text)]
    if len(_MARKER.findall(text)) != 2 * len(names):
        raise ValueError("a marker is not a pair: each `begin: NAME` needs its `end: NAME` below")
    if sorted(names) != sorted(tables):
        differ = ", ".join(sorted(set(names) ^ set(tables))) or "a name is there twice"
        raise ValueError(f"the page's markers and the tables are not the same: {differ}")

    def one(found: re.Match[str]) -> str:
        name = found["name"]
        body = f"\n{tables[name]}\n" if tables[name] else ""
        return f"<!-- begin: {name} -->\n{body}\n<!-- end: {name} -->"

    return _MARKED.sub(one, text)


def tables(results: Results, plots: Collection[str] = ()) -> dict[str, str]:
    """All of them, by the names of the page's markers; with those plots that were drawn."""
    found = {
        "machine": _machine(results),
        "overview": _images(("overview",), plots),
        "missed": _missed(results),
        "better": _better(results),
        "claims": _claims(results),
    }
    for section, works in SECTIONS.items():
        parts = [_images(PLOTS.get(section, ()), plots)]
        for figures in _groups(results, works):
            parts += [_by_case(results, figures), _details(results, figures)]
        found[section] = "\n\n".join(filter(None, parts)) or "*Not measured in this run.*"
    return found


def _images(names: Sequence[str], plots: Collection[str]) -> str:
    return "\n\n".join(
        f"![{name.replace('-', ' ')}](benchmarks/{name}.svg)" for name in names if name in plots
    )


def _groups(results: Results, works: Sequence[str]) -> Iterator[list[Figure]]:
    """The figures of each work and store: those of the database that most is about come first."""
    groups: dict[tuple[int, int], list[Figure]] = {}
    for figure in results.figures:
        piece = figure.piece
        if piece.work in works and figure.unit not in COUNTED:
            key = works.index(piece.work), _STORES.index(piece.store)
            groups.setdefault(key, []).append(figure)
    yield from (groups[key] for key in sorted(groups))


def _heading(figures: Sequence[Figure]) -> str:
    units = list(dict.fromkeys(figure.unit for figure in figures))
    first = figures[0].piece
    return ", ".join([first.work, first.store, *(units if len(units) == 1 else ())])


def _by_case(results: Results, figures: Sequence[Figure]) -> str:
    """A row a case: medians, and in brackets how many times better they are than the limit."""
    wanted = [*map(anyios, LOOPS), NAME, *map(ours, LOOPS)]
    wanted += (s for p in PEERS for s in (p, f"{p}, snapshot"))
    there = {figure.piece.subject for figure in figures}
    bare = sorted(s for s in there if s.startswith(BARE) and "uvloop" not in s)
    subjects = [*bare, *(s for s in wanted if s in there)]
    several = len({figure.unit for figure in figures}) > 1
    rows: dict[str, dict[str, str]] = {}
    for figure in figures:
        piece = figure.piece
        better = factor(results, figure, results.limit(figure))
        cell = number(figure.value) + (f" ({better})" if better else "")
        row = f"{piece.case}: {figure.unit}" if several else piece.case
        rows.setdefault(row, {})[piece.subject] = cell
    head = [f"**{_heading(figures)}**", *subjects]
    body = [[case, *(cells.get(s, "") for s in subjects)] for case, cells in rows.items()]
    return _table(head, body)


def _details(results: Results, figures: Sequence[Figure]) -> str:
    head = ["case", "subject", "unit", "median", "lowest", "highest", "÷ bare"]
    head += [*(f"÷ {name}" for name in PEERS), "missed"]
    body = []
    for figure in figures:
        bases = (results.limit(figure), *(results.peer(figure, name) for name in PEERS))
        shown = map(number, (figure.value, figure.lowest, figure.highest))
        ratios = (factor(results, figure, base) for base in bases)
        piece = figure.piece
        what = (piece.case, piece.subject, figure.unit)
        body.append([*what, *shown, *ratios, missed(results, figure)])
    inside = "\n".join(f"    {line}" for line in _table(head, body).splitlines())
    return f'??? note "Every subject: {_heading(figures)}"\n\n{inside}'


def _missed(results: Results) -> str:
    head = ["store", "load", "subject", "missed", "of committed", "delivered again", "events/s"]
    body = []
    for figure in results.figures:
        piece = figure.piece
        if figure.unit != "missed" or piece.work == "catch up":
            continue
        found = {
            unit: results.find(piece.work, piece.store, piece.case, piece.subject, unit)
            for unit in ("committed", "again", "events/s", "appends/s")
        }
        rate = found["events/s"] or found["appends/s"]
        shown = [f"{one.value:,.0f}" if one else "" for one in (found["committed"], found["again"])]
        count = f"{figure.value:,.0f}"
        count = f"**{count}**" if figure.value else count
        speed = number(rate.value) if rate else ""
        body.append([piece.store, piece.case, piece.subject, count, *shown, speed])
    return _table(head, body) if body else "*Not measured in this run.*"


def _better(results: Results) -> str:
    """Wherever a peer is faster than ours on asyncio, or needs less."""
    body = []
    for figure in results.figures:
        piece = figure.piece
        if not piece.subject.startswith(PEERS):
            continue
        mine = (f for f in results.beside(figure) if f.piece.subject in (NAME, ours("asyncio")))
        other = next(mine, None)
        better = times(figure, other) if other else None
        if other and better is not None and better > 1:
            what = f"{piece.work}, {piece.store}: {piece.case}"
            shown = (f"{number(one.value)} {one.unit}" for one in (figure, other))
            body.append([what, piece.subject, *shown, factor(results, figure, other)])
    head = ["work", "subject", "its figure", "ours, asyncio", "times better"]
    return _table(head, body) if body else "Nowhere in this run."


def _claims(results: Results) -> str:
    body = [
        [c.what, number(c.measured), f"{c.sign} {c.bound:,g}", "held" if c.held else "**missed**"]
        for c in claims(results)
    ]
    return _table(["claim", "measured", "bound", ""], body)


def _machine(results: Results) -> str:
    about = results.about
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    machine = f"{about['processor']}, {about['cores']} cores, {about['memory']}"
    lines = [
        f"- measured {about['measured']}, {about['mode']} run, {about['rounds']} rounds",
        f"- {machine}; {about['system']}; load before: {about['load before']}",
        f"- Python {about['python']}, SQLite {about['sqlite']}",
        f"- {versions}",
    ]
    lines += [f"- {name} {version}" for name, version in about.get("peers", {}).items()]
    if server := about.get("postgresql"):
        version = server["server_version"]
        settings = ", ".join(f"{k} = {v}" for k, v in server.items() if k != "server_version")
        lines.append(f"- PostgreSQL {version}: {settings}")
    if about["load before"] > about["cores"] / 2:
        lines.append("- **This machine had other work to do: believe no figure of this run.**")
    lines += [f"- **failed**: {piece}: {why}" for piece, why in results.failed.items()]
    return "\n".join(lines)


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"

    return "\n".join([line(head), f"|{'---|' * len(head)}", *map(line, body)])
