"""python -m benchmarks.draw RESULTS.json: the plots beside it, and the tables of the page."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import page, plots
from .results import Results

DOCS = Path(__file__).parent.parent / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.draw", description=__doc__)
    default = DOCS / "benchmarks" / "results.json"
    parser.add_argument("results", type=Path, nargs="?", default=default)
    parser.add_argument("--page", type=Path, default=DOCS / "benchmarks.md")
    parser.add_argument("--to", type=Path, help="put the plots there, and leave the page alone")
    options = parser.parse_args()
    results = Results.load(options.results)
    if options.to:
        print(*plots.draw(results, options.to), sep="\n")
        return
    drawn = plots.draw(results, options.results.parent)
    text = options.page.read_text(encoding="utf-8")
    options.page.write_text(page.fill(text, page.tables(results, drawn)), encoding="utf-8")
    print(f"{len(drawn)} plots in {options.results.parent}, and the tables of {options.page}")


if __name__ == "__main__":
    main()
