"""What was measured, as tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from .claims import Claim
from .results import COUNTED, PEERS, Figure, Results, times


def number(value: float) -> str:
    """Three digits, or all of them where there are more."""
    whole = abs(value) >= 100 or value % 1 == 0
    return f"{value:,.0f}" if whole else f"{value:.3g}"


def factor(results: Results, figure: Figure, base: Figure | None) -> str:
    found = times(figure, base) if base else None
    return "" if found is None else f"{found:.2f}" if found < 10 else f"{found:.0f}"


def missed(results: Results, figure: Figure) -> str:
    """Beside throughputs only."""
    found = results.missed(figure) if figure.higher_is_better else None
    return "" if found is None else f"{found[0]:,.0f} of {found[1]:,.0f}"


def print_results(console: Console, results: Results) -> None:
    groups: dict[tuple[str, str, str], list[Figure]] = {}
    for figure in results.figures:
        if figure.unit not in COUNTED:
            piece = figure.piece
            groups.setdefault((piece.work, piece.store, figure.unit), []).append(figure)
    for (work, store, unit), figures in groups.items():
        title = f"{work}, {store}: {unit}, median of {len(figures[0].runs)} runs"
        columns = ["case", "subject", unit, "lowest", "highest", "÷ bare"]
        table = Table(*columns, *(f"÷ {peer}" for peer in PEERS), "missed", title=title)
        last = ""
        for figure in figures:
            piece = figure.piece
            bases = (results.limit(figure), *(results.peer(figure, name) for name in PEERS))
            if last and piece.case != last:
                table.add_section()
            table.add_row(
                "" if piece.case == last else piece.case,
                piece.subject,
                *map(number, (figure.value, figure.lowest, figure.highest)),
                *(factor(results, figure, base) for base in bases),
                missed(results, figure),
            )
            last = piece.case
        console.print(table)
    console.print("÷: how many times better, in rates and in times.")
    for piece, why in results.failed.items():
        console.print(f"FAILED: {piece}: {why}", markup=False)


def print_claims(console: Console, claims: Sequence[Claim]) -> None:
    if not claims:
        return
    table = Table("claim", "measured", "bound", "", title="Claims")
    for claim in claims:
        bound = f"{claim.sign} {claim.bound:,g}"
        table.add_row(claim.what, number(claim.measured), bound, "held" if claim.held else "missed")
    console.print(table)
