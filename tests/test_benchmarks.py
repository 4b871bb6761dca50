"""The benchmarks' own logic, where it could be wrong in silence; nothing is measured here."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree as ET

import attrs
import pytest
from rich.console import Console

ROOT = Path(__file__).parent.parent
# Behind everything else: the package that is tested stays the one that is installed.
sys.path.append(str(ROOT))

from benchmarks import claims, floors, page, report  # noqa: E402
from benchmarks.results import Figure, Results, ratio, times  # noqa: E402
from benchmarks.suite import Piece, Suite, ours  # noqa: E402

ABOUT = {
    "measured": "2026-01-02T03:04:05+00:00",
    "mode": "short",
    "rounds": 3,
    "processor": "a processor",
    "cores": 2,
    "memory": "4 GiB",
    "system": "Linux",
    "load before": 0.1,
    "python": "3.11.7",
    "sqlite": "3.40.1",
    "versions": {"eventsource-anyio": "0.1.0"},
    "peers": {"eventsource-py": "0.15.1, Python 3.13"},
    "postgresql": {"server_version": "18.4", "fsync": "on"},
}
CASE = "64 tasks, 1 event, own streams"
QUIET = Console(quiet=True)


def piece(subject, work="append", case=CASE, store="PostgreSQL"):
    return Piece(work, store, case, subject)


def figure(subject, *runs, unit="events/s", **where):
    return Figure(piece(subject, **where), unit, runs)


def results(*figures, failed=None):
    return Results(ABOUT, figures, failed)


MEASURED = [
    figure("bare asyncpg, asyncio", 100, 200, 400),
    figure("bare asyncpg, uvloop", 200, 300, 500),
    figure(ours("asyncio"), 210, 380, 1200),
    figure(ours("uvloop"), 400, 300, 500),
    figure(ours("Trio"), 90, 180, 360),
    figure("eventsource-py", 10, 40, 20),
    figure("eventsourcing", 21, 19, 24),
    figure("eventsource-py", 3, 0, 4, unit="missed", work="append, with a subscriber"),
    figure("eventsource-py", 50, 60, 70, unit="committed", work="append, with a subscriber"),
    figure(ours("asyncio"), 0, 0, 0, unit="missed", work="append, with a subscriber"),
    figure(ours("asyncio"), 500, 600, 700, unit="committed", work="append, with a subscriber"),
    figure("bare asyncpg, asyncio", 1, 2, 3, unit="ms", work="load", case="1,000 events"),
    figure(ours("asyncio"), 2, 8, 3, unit="ms", work="load", case="1,000 events"),
    figure("eventsource-py, snapshot", 0.5, 0.5, 1, unit="ms", work="load", case="1,000 events"),
]


# -- figures ----------------------------------------------------------------------------------


def test_a_figure_is_the_median_and_what_was_missed_is_added_up():
    assert (MEASURED[0].value, MEASURED[0].lowest, MEASURED[0].highest) == (200, 100, 400)
    assert figure("x", 3, 0, 4, unit="missed").value == 7


def test_a_ratio_is_that_of_the_rounds_and_not_of_the_medians():
    one, base = figure("one", 10, 30, 20), figure("base", 1, 10, 10)
    assert ratio(one, base) == 3  # of 10, 3 and 2; the medians would have it at 2


def test_times_is_above_one_for_what_is_better_in_rates_and_in_times():
    assert times(figure("a", 20), figure("b", 10)) == 2
    assert times(figure("a", 20, unit="ms"), figure("b", 10, unit="ms")) == 0.5
    assert times(figure("a", 5, unit="kB"), figure("b", 10, unit="kB")) == 2


@pytest.mark.parametrize(
    ("one", "base"),
    [
        (figure("a", 1, 2), figure("b", 1)),
        (figure("a", 1), figure("b", 1, unit="ms")),
        (figure("a", 1, 0), figure("b", 1, 1)),
        (figure("a", 1, 1), figure("b", 1, 0)),
        (figure("a", 1, unit="missed"), figure("b", 1, unit="missed")),
    ],
    ids=["rounds", "units", "nothing done", "nothing done beside it", "counted"],
)
def test_what_cannot_be_compared_has_no_ratio(one, base):
    assert times(one, base) is None


def test_the_limit_is_the_bare_driver_on_the_same_loop_and_asyncios_for_trio():
    found = results(*MEASURED)
    limits = {
        loop: found.limit(found.find("append", "PostgreSQL", CASE, ours(loop), "events/s"))
        for loop in ("asyncio", "uvloop", "Trio")
    }
    assert {loop: limit.piece.subject for loop, limit in limits.items() if limit} == {
        "asyncio": "bare asyncpg, asyncio",
        "uvloop": "bare asyncpg, uvloop",
        "Trio": "bare asyncpg, asyncio",
    }
    assert [found.limit(bare) for bare in MEASURED[:2]] == [None, None]
    assert found.limit(figure(ours("asyncio"), 1, work="nobody did it by hand")) is None


def test_a_limit_is_of_the_same_case_and_unit():
    here = figure(ours("asyncio"), 1, case="1 task, 1 event, own streams")
    assert results(*MEASURED, here).limit(here) is None
    other = figure(ours("asyncio"), 1, unit="ms")
    assert results(*MEASURED, other).limit(other) is None


def test_peers_are_compared_with_ours_and_not_with_each_other():
    found = results(*MEASURED)
    peer = found.peer(MEASURED[2], "eventsource-py")
    assert peer is not None
    assert peer.runs == (10, 40, 20)
    assert found.peer(MEASURED[6], "eventsource-py") is None
    assert found.peer(MEASURED[0], "eventsource-py") is None


def test_what_was_missed_is_told_beside_the_throughput_of_the_same_load():
    found = results(*MEASURED)
    assert found.missed(MEASURED[5]) == (7, 180)
    assert found.missed(MEASURED[2]) == (0, 1800)
    assert found.missed(MEASURED[6]) is None


def test_results_are_read_back_as_they_were_saved(tmp_path):
    found = results(*MEASURED, failed={piece("eventsourcing", work="read"): "PeerError: no"})
    found.save(tmp_path / "new" / "found.json")
    back = Results.load(tmp_path / "new" / "found.json")
    assert back.about == ABOUT
    assert back.failed == found.failed
    assert [(f.piece, f.unit, [*f.runs]) for f in back.figures] == [
        (f.piece, f.unit, [*f.runs]) for f in found.figures
    ]


def test_results_of_another_format_are_refused(tmp_path):
    (tmp_path / "old.json").write_text(json.dumps({"format": 0}))
    with pytest.raises(ValueError, match="format 0"):
        Results.load(tmp_path / "old.json")


# -- the suite --------------------------------------------------------------------------------


def test_pieces_take_turns():
    turns = []

    def work(name):
        def run():
            turns.append(name)
            return {"events/s": len(turns)}

        return run

    suite = Suite()
    suite.add_step(lambda: turns.append("-"))
    for name in ("a", "b"):
        suite.add(piece(name), work(name))
    suite.run(2, QUIET)
    assert turns == ["-", "a", "b", "-", "a", "b"]
    assert suite.runs == {(piece("a"), "events/s"): [2, 5], (piece("b"), "events/s"): [3, 6]}


def test_what_fails_once_has_no_figures_and_the_others_go_on():
    def fails_in_round_two():
        runs.append(1)
        if len(runs) == 2:
            raise OSError("no more")
        return {"events/s": 1.0}

    runs: list[int] = []
    suite = Suite()
    suite.add(piece("broken"), fails_in_round_two)
    suite.add(piece("whole"), lambda: {"events/s": 2.0})
    suite.run(3, QUIET)
    assert len(runs) == 2
    assert suite.runs == {(piece("whole"), "events/s"): [2.0, 2.0, 2.0]}
    assert suite.failed == {piece("broken"): "OSError: no more"}


def test_a_piece_has_one_name():
    suite = Suite()
    suite.add(piece("a"), dict)
    with pytest.raises(ValueError, match="is there already"):
        suite.add(piece("a"), dict)


def test_keeping_some_pieces_forgets_what_was_measured_before():
    suite = Suite()
    for name in ("a", "b"):
        suite.add(piece(name), lambda: {"events/s": 1.0})
    suite.run(1, QUIET)
    suite.keep(lambda one: one.subject == "b")
    assert suite.runs == {}
    suite.run(1, QUIET)
    assert suite.runs == {(piece("b"), "events/s"): [1.0]}


# -- claims -----------------------------------------------------------------------------------


def test_claims_are_held_to_their_bounds():
    assert claims.Claim("", 5, "≥", 5).held
    assert not claims.Claim("", 4.9, "≥", 5).held
    assert claims.Claim("", 5, "≤", 5).held
    assert not claims.Claim("", 5.1, "≤", 5).held


def test_claims_are_about_what_was_measured():
    judged = {claim.what: claim for claim in claims.claims(results(*MEASURED))}
    bare = judged[f"append, PostgreSQL: {CASE}: {ours('asyncio')}: ÷ bare asyncpg, asyncio"]
    assert (bare.measured, bare.bound, bare.held) == (2.1, 3.0, False)
    peer = judged[f"append, PostgreSQL: {CASE}: {ours('asyncio')}: ÷ the faster peer"]
    assert peer.measured == pytest.approx(10)  # of 10, 9.5 and 50: the faster one of each round
    trio = judged[f"append, PostgreSQL: {CASE}: {ours('Trio')}: ÷ {ours('asyncio')}"]
    assert trio.measured == pytest.approx(90 / 210)
    load = judged[f"load, PostgreSQL: 1,000 events: {ours('asyncio')}: ms"]
    assert (load.measured, load.sign, load.held) == (3, "≤", True)
    assert not any("memory" in what for what in judged)


def test_a_claim_beside_nothing_does_not_hold():
    case = "1,000 tasks, 1 event, own streams"
    none = figure("bare asyncpg, asyncio", 100, 0, 100, case=case)
    judged = claims.claims(results(none, figure(ours("asyncio"), 900, 900, 900, case=case)))
    (claim,) = (claim for claim in judged if "bare asyncpg" in claim.what)
    assert not claim.held
    assert report.number(claim.measured) == "nan"


def test_a_single_missed_event_is_a_missed_claim():
    lost = figure(ours("Trio"), 0, 1, 0, unit="missed", work="append, with a subscriber")
    (claim,) = (c for c in claims.claims(results(lost)) if "missed" in c.what)
    assert (claim.measured, claim.held) == (1, False)


def test_an_event_missed_by_a_peer_is_no_claim_of_ours():
    assert not any("eventsource-py:" in c.what for c in claims.claims(results(*MEASURED)))


# -- the gate ---------------------------------------------------------------------------------

FLOOR = floors.Floor("append", "PostgreSQL", CASE, "asyncio", typical=4.0)


def verdict(*runs, base=(100, 100, 100)):
    found = results(figure("bare asyncpg, asyncio", *base), figure(ours("asyncio"), *runs))
    (one,) = floors.judge(found, [FLOOR])
    return one


def test_a_ratio_above_its_floor_holds_whatever_one_round_was_like():
    assert verdict(400, 400, 20).held
    assert verdict(221, 221, 221).held


def test_a_ratio_below_its_floor_does_not():
    low = verdict(219, 219, 900)
    assert not low.held
    said = floors.message([low, verdict(400, 400, 400)], load=0.3, cores=2)
    assert f"{CASE}: {ours('asyncio')}: 2.19 times the bare driver, floor 2.20" in said
    assert "4.00 times" not in said
    assert "python -m benchmarks.gate --tell" in said
    assert "other work" not in said
    assert "load 3.0 on 2 cores" in floors.message([low], load=3.0, cores=2)


def test_times_are_judged_like_rates():
    floor = floors.Floor("load", "PostgreSQL", "1,000 events", "asyncio", 0.5, "ms")
    (slow,) = floors.judge(results(*MEASURED), [floor])
    assert slow.ratio == 0.5
    assert slow.held
    assert not floors.judge(results(*MEASURED), [attrs.evolve(floor, typical=1.0)])[0].held


def test_what_was_not_measured_does_not_hold_and_says_why():
    failed = {piece(ours("asyncio")): "OSError: no server", piece("x", work="y"): "other"}
    (missing,) = floors.judge(results(failed=failed), [FLOOR])
    assert not missing.held
    assert "no server" in str(missing)
    assert "other" not in str(missing)
    nothing = verdict(400, 0, 400)
    assert not nothing.held
    assert "did nothing" in str(nothing)


def test_the_gate_measures_what_its_floors_need():
    wanted = [one for one in (f.piece for f in MEASURED) if floors.wanted([FLOOR], one)]
    assert [one.subject for one in wanted] == [
        "bare asyncpg, asyncio",
        "bare asyncpg, uvloop",
        ours("asyncio"),
    ]


def test_each_floor_is_there_once_and_below_what_is_usual():
    pieces = [floor.piece for floor in floors.FLOORS]
    assert len(pieces) == len(set(pieces)) > 0
    assert all(0 < floor.least < floor.typical for floor in floors.FLOORS)


# -- tables and plots -------------------------------------------------------------------------


def test_the_table_in_the_terminal_has_ratios_and_what_was_missed():
    console = Console(width=200, record=True, file=StringIO())
    report.print_results(console, results(*MEASURED))
    said = console.export_text()
    (line,) = (text for text in said.splitlines() if "380" in text)
    cells = [cell.strip() for cell in line.strip("│ ").split("│")]
    assert cells[-7:] == ["380", "210", "1,200", "2.10", "21", "20", "0 of 1,800"]


@pytest.mark.parametrize(
    ("value", "said"),
    [(1234.5, "1,234"), (123.4, "123"), (12.34, "12.3"), (0.01234, "0.0123"), (7.0, "7")],
)
def test_numbers_have_three_digits(value, said):
    assert report.number(value) == said


def test_tables_are_put_between_the_markers_and_nothing_else_changes():
    text = "before\n<!-- begin: a -->\nold\n<!-- end: a -->\nbetween\n<!-- begin: b -->\n"
    text += "<!-- end: b -->\nafter\n"
    filled = page.fill(text, {"a": "new", "b": ""})
    assert filled == (
        "before\n<!-- begin: a -->\n\nnew\n\n<!-- end: a -->\nbetween\n<!-- begin: b -->\n\n"
        "<!-- end: b -->\nafter\n"
    )
    assert page.fill(filled, {"a": "new", "b": ""}) == filled


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<!-- begin: a -->\n", "not a pair"),
        ("<!-- end: a -->\n<!-- begin: a -->\n", "not a pair"),
        ("<!-- begin: b -->\n<!-- end: b -->\n", "not the same: a, b"),
        ("", "not the same: a"),
    ],
)
def test_a_page_whose_markers_do_not_fit_is_refused(text, why):
    with pytest.raises(ValueError, match=why):
        page.fill(text, {"a": "new"})


def test_tables_hold_medians_ratios_and_spreads():
    found = page.tables(results(*MEASURED), {"append-postgresql"})
    assert "![append postgresql](benchmarks/append-postgresql.svg)" in found["append"]
    assert "append-sqlite" not in found["append"]
    row = f"| {CASE} | 200 | 380 (2.10) | 400 (1.00) | 180 (0.90) | 20 (0.10) | 21 (0.10) |"
    assert row in found["append"]
    spread = "events/s | 380 | 210 | 1,200 | 2.10 | 21 | 20 | 0 of 1,800 |"
    assert f"    | {CASE} | {ours('asyncio')} | {spread}" in found["append"]
    assert f"| PostgreSQL | {CASE} | eventsource-py | **7** | 180 |  |  |" in found["missed"]
    assert found["fan-out"] == "*Not measured in this run.*"
    assert "PostgreSQL 18.4: fsync = on" in found["machine"]


def test_the_page_warns_of_a_machine_that_had_other_work_to_do():
    warning = "believe no figure of this run"
    assert warning not in page.tables(results())["machine"]
    busy = Results(ABOUT | {"load before": 1.1}, [])
    assert warning in page.tables(busy)["machine"]


def test_where_a_peer_is_faster_is_told_and_nothing_else():
    found = page.tables(results(*MEASURED))["better"]
    assert found.splitlines()[2:] == [
        "| load, PostgreSQL: 1,000 events | eventsource-py, snapshot | 0.5 ms | 3 ms | 4.00 |"
    ]
    assert page.tables(results(*MEASURED[:7]))["better"] == "Nowhere in this run."


def test_the_page_is_the_one_made_from_the_results_beside_it():
    folder = ROOT / "docs" / "benchmarks"
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    found = Results.load(folder / "results.json")
    drawn = {path.stem for path in folder.glob("*.svg")}
    assert page.fill(text, page.tables(found, drawn)) == text, (
        "run: python -m benchmarks.draw docs/benchmarks/results.json"
    )


@pytest.mark.skipif(
    find_spec("matplotlib") is None, reason="matplotlib is not installed; '.[bench]' brings it"
)
def test_plots_are_svg_with_text_and_for_dark_pages_too(tmp_path):
    from benchmarks import plots

    assert plots.draw(results(*MEASURED), tmp_path) == ["overview", "append-postgresql", "load"]
    svg = (tmp_path / "append-postgresql.svg").read_text(encoding="utf-8")
    ET.fromstring(svg)
    assert "prefers-color-scheme: dark" in svg
    for text in ("events per second", "tasks at the same time", ours("Trio"), "eventsourcing"):
        assert f">{text}<" in svg
    again = tmp_path / "again"
    plots.draw(results(*MEASURED), again)
    assert (again / "append-postgresql.svg").read_text(encoding="utf-8") == svg


@pytest.mark.skipif(
    find_spec("matplotlib") is None, reason="matplotlib is not installed; '.[bench]' brings it"
)
def test_a_plot_for_which_nothing_was_measured_is_taken_away(tmp_path):
    from benchmarks import plots

    (tmp_path / "load.svg").write_text("<svg/>")
    assert plots.draw(results(), tmp_path) == []
    assert list(tmp_path.iterdir()) == []
