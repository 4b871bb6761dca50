"""The demo: the rules of a fine, the import of a log, the answers, and the program itself."""

from __future__ import annotations

import csv
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from statistics import median

import pytest

from eventsource_anyio import (
    AggregateRepository,
    EventStore,
    InMemoryEventStore,
    NewEvent,
    SQLiteEventStore,
)
from eventsource_anyio.demo import __main__ as program
from eventsource_anyio.demo.fines import (
    Appeal,
    AppealAdvanced,
    Fine,
    FineCreated,
    FineError,
    FineSent,
    GivenToCollection,
    OffenderNotified,
    PaymentReceived,
    PenaltyAdded,
    State,
)
from eventsource_anyio.demo.log import COMMANDS, InputError, Refused, made_up, read
from eventsource_anyio.demo.work import Course, courses, decide, import_cases

REAL = Path(__file__).parent.parent / "../shared/data/road_traffic_fines.csv"
LOOPS = [loop for loop in ("asyncio", "trio", "uvloop") if find_spec(loop)]
HEADER = (
    "amount,article,case:concept:name,concept:name,dismissal,expense,lastSent,"
    "lifecycle:transition,notificationType,org:resource,paymentAmount,points,time:timestamp,"
    "totalPaymentAmount,vehicleClass"
)
SMALL = f"""{HEADER}
36.0,157.0,A1,Create Fine,NIL,,,complete,,541,,0.0,2007-07-14 00:00:00+02:00,0.0,A
,,A1,Payment,,,,complete,,,36.0,,2007-07-16 00:00:00+02:00,36.0,
35.0,157.0,S1,Create Fine,NIL,,,complete,,52,,0.0,2006-07-12 00:00:00+02:00,0.0,A
,,S1,Send Fine,,11.0,,complete,,,,,2006-12-04 00:00:00+01:00,,
,,S1,Insert Fine Notification,,,P,complete,P,,,,2006-12-25 00:00:00+01:00,,
71.5,,S1,Add penalty,,,,complete,,,,,2007-02-23 00:00:00+01:00,,
,,S1,Payment,,,,complete,,,49.25,,2007-05-28 00:00:00+02:00,49.25,
"""


# -- the rules --------------------------------------------------------------------------------

CREATED = FineCreated(Decimal(36))
SENT = FineSent(Decimal(13))
NOTIFIED = OffenderNotified(date(2024, 1, 1))
IN_TIME = date(2024, 3, 1)
PENALTY = PenaltyAdded(Decimal(38))
PAID = PaymentReceived(Decimal(36))
COLLECTION = GivenToCollection(Decimal(87))
FILED, FORWARDED, ANSWERED, CLOSED = (AppealAdvanced(step) for step in list(Appeal)[1:])
DISMISSED = AppealAdvanced(Appeal.SENT, "#")


def given(*events):
    """A fine to which this has happened."""
    fine = Fine("N1")
    for event in events:
        fine.apply(event)
    fine.mark_committed(fine.uncommitted_events)
    return fine


@pytest.mark.parametrize(
    ("events", "command", "arguments", "expected"),
    [
        ([], Fine.create, [Decimal(36)], CREATED),
        ([], Fine.create, [Decimal(36), "A"], FineCreated(Decimal(36), "A")),
        ([CREATED], Fine.send, [Decimal(13)], SENT),
        ([CREATED], Fine.send, [Decimal(0)], FineSent(Decimal(0))),
        ([CREATED], Fine.pay, [Decimal(36)], PAID),
        ([CREATED, SENT], Fine.notify, [date(2024, 1, 1)], NOTIFIED),
        ([CREATED, SENT, NOTIFIED], Fine.add_penalty, [Decimal(74), IN_TIME], PENALTY),
        ([CREATED, SENT, NOTIFIED, FILED], Fine.add_penalty, [Decimal(74), IN_TIME], PENALTY),
        ([CREATED, SENT, NOTIFIED, PENALTY], Fine.give_to_collection, [], COLLECTION),
        ([CREATED, SENT, NOTIFIED], Fine.advance_appeal, [Appeal.FILED], FILED),
        ([CREATED, SENT, NOTIFIED, FILED], Fine.advance_appeal, [Appeal.SENT, "#"], DISMISSED),
        ([CREATED, SENT, NOTIFIED, FILED, FORWARDED, ANSWERED], Fine.advance_appeal,
         [Appeal.CLOSED], CLOSED),
    ],
)  # fmt: skip
def test_what_may_happen_does(events, command, arguments, expected):
    fine = given(*events)
    command(fine, *arguments)
    assert [new.event for new in fine.uncommitted_events] == [expected]


@pytest.mark.parametrize(
    ("events", "command", "arguments", "reason"),
    [
        ([CREATED], Fine.create, [Decimal(1)], "its state is open, not new"),
        ([], Fine.create, [Decimal(0)], "a fine cannot be 0"),
        ([], Fine.pay, [Decimal(1)], "its state is new, not open"),
        ([CREATED, SENT], Fine.send, [Decimal(1)], "it was sent before"),
        ([CREATED], Fine.send, [Decimal(-1)], "sending cannot cost -1"),
        ([CREATED], Fine.notify, [IN_TIME], "it was not sent, so nobody can have got it"),
        ([CREATED, SENT, NOTIFIED], Fine.notify, [IN_TIME], "the offender was notified before"),
        ([CREATED, SENT], Fine.add_penalty, [Decimal(74), IN_TIME],
         "the offender was not notified"),
        ([CREATED, SENT, NOTIFIED], Fine.add_penalty, [Decimal(74), IN_TIME - timedelta(days=1)],
         "the offender can pay until 2024-03-01"),
        ([CREATED, SENT, NOTIFIED], Fine.add_penalty, [Decimal(36), IN_TIME],
         "36 is not above 36"),
        ([CREATED, SENT, NOTIFIED, PENALTY], Fine.add_penalty, [Decimal(99), IN_TIME],
         "it has a penalty already"),
        ([CREATED], Fine.pay, [Decimal(0)], "36 is owed, so 0 cannot be paid"),
        ([CREATED], Fine.pay, [Decimal("36.01")], "36 is owed, so 36.01 cannot be paid"),
        ([CREATED, PAID], Fine.pay, [Decimal(1)], "its state is paid, not open"),
        ([CREATED, PAID], Fine.send, [Decimal(13)], "its state is paid, not open"),
        ([FineCreated(Decimal(36), "A")], Fine.send, [Decimal(13)],
         "its state is dismissed, not open"),
        ([CREATED, SENT, NOTIFIED], Fine.give_to_collection, [], "it has no penalty yet"),
        ([CREATED, SENT, NOTIFIED, FILED, PENALTY], Fine.give_to_collection, [],
         "an appeal is filed"),
        ([CREATED, SENT, NOTIFIED, PENALTY, COLLECTION], Fine.pay, [Decimal(1)],
         "its state is collection, not open"),
        ([CREATED, SENT], Fine.advance_appeal, [Appeal.FILED], "the offender was not notified"),
        ([CREATED, SENT, NOTIFIED], Fine.advance_appeal, [Appeal.SENT],
         "an appeal cannot be sent when none"),
        ([CREATED, SENT, NOTIFIED, FILED], Fine.advance_appeal, [Appeal.FILED],
         "an appeal cannot be filed when filed"),
        ([CREATED, SENT, NOTIFIED, FILED, DISMISSED], Fine.advance_appeal, [Appeal.ANSWERED],
         "its state is dismissed, not open"),
    ],
)  # fmt: skip
def test_what_may_not_happen_is_refused_and_changes_nothing(events, command, arguments, reason):
    fine = given(*events)
    before = repr(fine)
    with pytest.raises(FineError) as refusal:
        command(fine, *arguments)
    assert str(refusal.value) == f"N1: {reason}"
    assert (repr(fine), fine.uncommitted_events) == (before, ())


@pytest.mark.parametrize(
    ("events", "state", "owed"),
    [
        ([], State.NEW, "0"),
        ([CREATED, SENT], State.OPEN, "49"),
        ([CREATED, SENT, NOTIFIED, PENALTY], State.OPEN, "87"),
        ([CREATED, SENT, PAID], State.OPEN, "13"),
        ([CREATED, PAID], State.PAID, "0"),
        ([CREATED, SENT, NOTIFIED, PENALTY, COLLECTION], State.COLLECTION, "87"),
        ([CREATED, SENT, NOTIFIED, FILED, DISMISSED], State.DISMISSED, "0"),
    ],
)
def test_what_is_owed(events, state, owed):
    fine = given(*events)
    assert (fine.state, fine.owed) == (state, Decimal(owed))


# -- reading ----------------------------------------------------------------------------------


def rows_of(text):
    refused: Refused = []
    return read(StringIO(text), refused), refused


def test_rows_are_read_by_case_in_the_order_of_time():
    first, *rest = SMALL.splitlines(keepends=True)
    cases, refused = rows_of(first + "\n" + "".join(reversed(rest)))
    assert {case: [row.line for row in rows] for case, rows in cases.items()} == {
        "S1": [7, 6, 5, 4, 3],
        "A1": [9, 8],
    }
    assert refused == []


def test_row_keeps_its_id_wherever_it_stands():
    once, _ = rows_of(SMALL)
    again, _ = rows_of("\n\n".join(f"more,{line}" for line in SMALL.splitlines()))
    assert [row.id for row in again["S1"]] == [row.id for row in once["S1"]]
    assert len({row.id for rows in once.values() for row in rows}) == 7


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("36.0,157.0,A2", "it has 3 fields, but line 1 has 15"),
        ("36.0,,,Create Fine,,,,,,,,,2007-07-14 00:00:00+02:00,,", "aggregate_id must have"),
        ("36.0,,A2,Create Car,,,,,,,,,2007-07-14 00:00:00+02:00,,", "'Create Car' is no activity"),
        ("36.0,,A2,Create Fine,,,,,,,,,yesterday,,", "Invalid isoformat string: 'yesterday'"),
        ("36.0,,A2,Create Fine,,,,,,,,,2007-07-14,,", "should end in an offset such as +01:00"),
        ("36.0,,A2,Create Fine,,,,,,,,,0001-01-01 00:00:00+02:00,,", "date value out of range"),
        ("1,,A1,Payment,,,,,,,36.0,,2007-07-16 00:00:00+02:00,36.0,", "amount"),
    ],
)  # fmt: skip
def test_malformed_row_is_refused_with_its_line_and_the_others_are_read(row, reason):
    if "Payment" in row:  # the same as line 3
        row, reason = SMALL.splitlines()[2], "it repeats line 3"
    cases, refused = rows_of(f"{SMALL}{row}\n")
    assert [line for line, _ in refused] == [9]
    assert reason in refused[0][1]
    assert sum(map(len, cases.values())) == 7


@pytest.mark.parametrize("amount", ["", "abc", "-1", "1,5", "nan", "1e9", "0.001", "1234567890"])
def test_amount_that_is_none_is_refused(amount):
    header = "case:concept:name,concept:name,time:timestamp,dismissal,amount,expense"
    text = (
        f'{header},paymentAmount,totalPaymentAmount\nA2,Create Fine,2007-07-14+02:00,,"{amount}",,,'
    )
    cases, refused = rows_of(text.replace("14+02:00", "14 00:00:00+02:00"))
    assert decide("A2", cases["A2"], refused) == []
    assert refused == [(2, f"Create Fine: amount should be such as 36.0, not {amount!r}")]


@pytest.mark.parametrize("text", ["", "\n\n", "a,b,c\n1,2,3\n"])
def test_log_without_the_columns_is_refused(text):
    with pytest.raises(InputError, match="line 1 should name the columns, but lacks case:concept"):
        rows_of(text)


def test_unclosed_quote_spoils_its_own_line_only():
    cases, refused = rows_of(SMALL.replace(",,A1,Payment", ',"x,A1,Payment'))
    assert [line for line, _ in refused] == [3]
    assert sum(map(len, cases.values())) == 6


def test_made_up_log_is_the_same_every_time_and_longer_ones_begin_like_it():
    lines = list(made_up(300))
    assert list(made_up(300)) == lines
    assert list(made_up(400))[: len(lines)] == lines
    cases, refused = rows_of("\n".join(lines))
    assert (len(cases), refused) == (300, [])
    assert {line.split(",")[1] for line in lines[1:]} == set(COMMANDS)


# -- importing --------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "sqlite"])
def store(request, tmp_path) -> EventStore:
    if request.param == "memory":
        return InMemoryEventStore()
    return SQLiteEventStore(tmp_path / "fines.db", synchronous="NORMAL")


async def imported(store: EventStore, text: str) -> tuple[int, int, Refused]:
    cases, refused = rows_of(text)
    new, known = await import_cases(store, cases.items(), refused)
    return new, known, refused


async def test_events_have_the_ids_and_the_times_of_their_rows(store):
    cases, _ = rows_of(SMALL)
    async with store:
        assert await imported(store, SMALL) == (7, 0, [])
        stored = await store.get_events("S1")
    assert [event.event_id for event in stored] == [row.id for row in cases["S1"]]
    assert [event.occurred_at for event in stored] == [row.at for row in cases["S1"]]
    assert [event.event for event in stored] == [
        FineCreated(Decimal("35.0")),
        FineSent(Decimal("11.0")),
        OffenderNotified(date(2006, 12, 25)),
        PenaltyAdded(Decimal("36.5")),
        PaymentReceived(Decimal("49.25")),
    ]


async def test_importing_twice_stores_nothing_twice(store):
    text = "\n".join(made_up(300))
    async with store:
        new, known, refused = await imported(store, text)
        position = await store.last_position()
        assert (new, known) == (text.count("\n") - len(refused), 0)
        assert await imported(store, text) == (0, new, refused)
        assert await store.last_position() == position


async def test_log_that_has_grown_adds_what_is_new(store):
    lines = SMALL.splitlines()
    async with store:
        assert await imported(store, "\n".join(lines[:5])) == (4, 0, [])
        assert await imported(store, SMALL) == (3, 4, [])
        assert await imported(store, "\n".join(lines[:5])) == (0, 7, [])
        assert (await store.get_events("S1")).version == 5


async def test_case_that_is_stored_otherwise_is_refused(store):
    async with store:
        await imported(store, SMALL)
        refused = [(4, "S1: other events of it are stored already")]
        assert await imported(store, SMALL.replace(",11.0,", ",12.0,")) == (0, 7, refused)
        assert (await store.get_events("S1")).version == 5


async def test_rows_that_break_a_rule_are_counted_and_the_rest_is_stored(store):
    late = ",,A1,Send Fine,,11.0,,complete,,,,,2007-08-01 00:00:00+02:00,,\n"
    async with store:
        new, _, refused = await imported(store, SMALL + late)
    assert new == 7
    assert refused == [(9, "Send Fine: A1: its state is paid, not open")]


async def test_fine_can_be_loaded_as_it_was(store):
    async with store:
        await imported(store, SMALL)
        fines = AggregateRepository(store, Fine)
        before = await fines.load("S1", at=datetime(2007, 2, 22, 22, 59, tzinfo=UTC))
        after = await fines.load("S1", at=datetime(2007, 2, 22, 23, 0, tzinfo=UTC))
    assert (before.owed, after.owed) == (Decimal(46), Decimal("82.5"))


# -- the answers ------------------------------------------------------------------------------


def naively(text: str) -> dict[str, tuple[str, Decimal, int]]:
    """State, what is owed, and days of every case, straight from the rows."""
    found: dict[str, list[dict[str, str]]] = {}
    for row in csv.DictReader(StringIO(text)):
        found.setdefault(row["case:concept:name"], []).append(row)
    answers = {}
    for case, rows in found.items():
        fine, expense, paid, state, days = Decimal(0), Decimal(0), Decimal(0), "open", []
        for row in rows:
            activity = row["concept:name"]
            if activity == "Send Fine" and state != "open":
                continue
            if activity in ("Create Fine", "Add penalty"):
                fine = Decimal(row["amount"])
            elif activity == "Send Fine":
                expense = Decimal(row["expense"])
            elif activity == "Payment":
                paid += Decimal(row["paymentAmount"])
                assert paid == Decimal(row["totalPaymentAmount"])
                state = "paid" if paid == fine + expense else "open"
            elif activity == "Send for Credit Collection":
                state = "collection"
            if row["dismissal"] not in ("", "NIL"):
                state = "dismissed"
            days.append(datetime.fromisoformat(row["time:timestamp"]).replace(tzinfo=None))
        owed = Decimal(0) if state == "dismissed" else fine + expense - paid
        answers[case] = (state, owed, (days[-1] - days[0]).days)
    return answers


def plainly(found: dict[str, Course]) -> dict[str, tuple[str, Decimal, int]]:
    return {case: (str(one.state), one.owed, one.days) for case, one in found.items()}


async def test_answers_are_those_of_a_naive_computation(store):
    text = "\n".join(made_up(500))
    async with store:
        await imported(store, text)
        found = plainly(await courses(store))
    assert found == naively(text)
    assert {state for state, _, _ in found.values()} == {"open", "paid", "collection", "dismissed"}


async def test_answers_leave_other_aggregates_out(store):
    async with store:
        await imported(store, SMALL)
        await store.append_events("A1", "Parking", [NewEvent(CREATED)], 0)
        assert plainly(await courses(store)) == naively(SMALL)


@pytest.mark.skipif(not REAL.is_file(), reason="the real log is not on this machine")
async def test_real_log(store):
    text = REAL.read_text(encoding="utf-8")
    async with store:
        new, _, refused = await imported(store, text)
        found = await courses(store)
    assert (new, sorted(refused)) == (
        387,
        [
            (52, "Send Fine: S60775: its state is dismissed, not open"),
            (315, "Send Fine: N33329: its state is dismissed, not open"),
            (362, "Send Fine: N36957: its state is paid, not open"),
        ],
    )
    assert plainly(found) == naively(text)
    unpaid = [one.owed for one in found.values() if one.owed]
    assert (len(found), len(unpaid), sum(unpaid)) == (100, 58, Decimal("4679.74"))
    ended = [one.days for one in found.values() if one.state is not State.OPEN]
    assert (len(ended), median(ended), max(ended)) == (78, 443, 1010)


# -- the program ------------------------------------------------------------------------------

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def demo(tmp_path) -> Run:
    """Run the program as a process of its own, in an empty directory."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "error", "-m", "eventsource_anyio.demo", *arguments],
            cwd=tmp_path,
            env={
                name: v for name, v in os.environ.items() if name not in ("FORCE_COLOR", "COLUMNS")
            },
            capture_output=True,
            check=False,
            text=True,
            timeout=100,
        )

    return run


@pytest.mark.parametrize("loop", LOOPS)
def test_program_makes_its_own_input_and_leaves_nothing_behind(demo, tmp_path, loop):
    done = demo("--cases", "200", "--loop", loop)
    assert (done.returncode, done.stderr) == (0, "")
    assert "0 were there already.\nRows refused: 0.\n" in done.stdout
    assert " of 200 fines are unpaid, and " in done.stdout
    assert not set(done.stdout) & {"\x1b", "\r", "\b"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("loop", LOOPS)
def test_program_imports_a_file_into_a_store_that_is_kept(demo, tmp_path, loop):
    (tmp_path / "log.csv").write_text(SMALL, encoding="utf-8-sig")
    first = demo("log.csv", "--store", "fines.db", "--loop", loop)
    second = demo("log.csv", "--store", "fines.db", "--loop", loop)
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout.startswith("7 events stored in ")
    assert "1 of 2 fines are unpaid, and 33.25 is owed in all.\n" in first.stdout
    assert "S1 took longest. Half way, on 2006-12-18, 46.00 was owed.\n" in first.stdout
    assert second.stdout.startswith("0 events stored in ")
    assert ", 7 were there already.\n" in second.stdout
    assert second.stdout.splitlines()[1:] == first.stdout.splitlines()[1:]


def main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["demo", *map(str, arguments)])
    program.main()


@pytest.mark.parametrize("loop", LOOPS)
def test_malformed_and_refused_rows_are_shown_with_their_lines(monkeypatch, capsys, tmp_path, loop):
    bad = "\n".join(["36.0,,A2,Create Fine,,,,,,,,,yesterday,,"] * 12)
    (tmp_path / "log.csv").write_bytes(f"{SMALL}{bad}\n".encode() + b"\xff")
    main(monkeypatch, tmp_path / "log.csv", "--loop", loop)
    out, err = capsys.readouterr()
    assert "\nRows refused: 13.\n" in out
    assert "1 of 2 fines are unpaid" in out
    assert err.splitlines() == [
        f"Line {line} refused: Invalid isoformat string: 'yesterday'" for line in range(9, 19)
    ]


@pytest.mark.parametrize(
    ("arguments", "text", "message"),
    [
        (["missing.csv"], None, "No such file or directory"),
        (["log.csv"], "a,b\n1,2\n", "line 1 should name the columns, but lacks case:concept:name"),
        (["log.csv"], HEADER, "there is no row that can be used"),
        (["--cases", "many"], None, "argument --cases: invalid int value: 'many'"),
        (["--cases", "0"], None, "there is no row that can be used"),
        (["--loop", "gevent"], None, "argument --loop: invalid choice: 'gevent'"),
        (["--store", "log.csv"], "not a database\n" * 100, "log.csv"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_ends_the_program_with_a_message(
    monkeypatch, capsys, tmp_path, arguments, text, message
):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("log.csv").write_text(text)
    with pytest.raises(SystemExit) as end:
        main(monkeypatch, *arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_reader_that_goes_away_ends_the_program_without_a_word(monkeypatch, capsys):
    def closed(*args: object, **kwargs: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    with pytest.raises(SystemExit) as end:
        main(monkeypatch, "--cases", "1")
    assert end.value.code == 1
    assert capsys.readouterr() == ("", "")


def test_loop_that_is_not_installed_ends_the_program_with_a_message(monkeypatch, capsys):
    monkeypatch.setattr(program, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        main(monkeypatch, "--loop", "trio")
    assert end.value.code == 2
    assert "trio is not installed: pip install trio" in capsys.readouterr().err


def test_without_rich_the_program_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.box", None)
    monkeypatch.delitem(sys.modules, program.__name__)
    with pytest.raises(SystemExit, match=r"pip install 'eventsource-anyio\[demo\]'"):
        importlib.import_module(program.__name__)
