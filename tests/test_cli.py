"""The command `eventsource-anyio`, as it is run from a shell."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import psycopg
import pytest

from eventsource_anyio.cli import main
from eventsource_anyio.stores.postgresql import migration_sql
from eventsource_anyio.stores.postgresql.schema import migrations

ROOT = Path(__file__).parent.parent
NOBODY = "127.0.0.1:1"  # where nothing listens


def run(*arguments: str, dsn: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """The finished process; its password is shown nowhere, and no traceback."""
    env = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    env |= {"DATABASE_URL": dsn, "COLUMNS": "200", **variables}
    command = [sys.executable, "-m", "eventsource_anyio.cli", *arguments]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    for said in (ran.stdout, ran.stderr):
        assert "secret" not in said
        assert "Traceback" not in said
    return ran


def ask(dsn: str, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(dsn, autocommit=True) as session:
        answer = session.execute(statement.encode())
        return answer.fetchall() if answer.description else []


def test_it_is_installed_by_its_name():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["scripts"]["eventsource-anyio"].partition(":")
    assert callable(getattr(import_module(module), function))


@pytest.mark.parametrize("command", [(), ("migrate",), ("sql",), ("doctor",)])
def test_it_explains_itself(command):
    ran = run(*command, "--help")
    assert ran.returncode == 0
    assert ran.stdout.startswith(" ".join(("usage: eventsource-anyio", *command)))


# -- migrate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_migrate_makes_the_schema(postgresql_dsn, by):
    arguments, environment = ([postgresql_dsn], "") if by == "argument" else ([], postgresql_dsn)
    for _ in range(2):
        ran = run("migrate", *arguments, dsn=environment)
        assert (ran.returncode, ran.stderr) == (0, "")
        assert ran.stdout == "Schema 'eventsource' is up to date.\n"
    versions = ask(postgresql_dsn, "SELECT max(version) FROM eventsource.migrations")
    assert versions == [(migrations()[-1].version,)]


def test_an_argument_comes_before_the_environment(postgresql_dsn):
    ran = run("migrate", postgresql_dsn, dsn=f"postgresql://u:secret@{NOBODY}/d")
    assert ran.returncode == 0


def test_migrate_has_a_schema_a_prefix_and_a_role(postgresql_dsn):
    ran = run(
        "migrate", postgresql_dsn, *("--schema", "Other", "--prefix", "es_"), "--role=pg_monitor"
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    granted = "SELECT has_table_privilege('pg_monitor', '\"Other\".es_events', 'INSERT')"
    try:
        assert ask(postgresql_dsn, granted) == [(True,)]
    finally:
        ask(postgresql_dsn, 'DROP SCHEMA "Other" CASCADE')


def test_what_fails_is_said_plainly(postgresql_dsn):
    ran = run("migrate", postgresql_dsn, "--role", "nobody at all")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("PostgreSQL failed: ")
    assert 'role "nobody at all" does not exist' in ran.stderr
    assert ask(postgresql_dsn, "SELECT to_regnamespace('eventsource')") == [(None,)]


# -- sql ----------------------------------------------------------------------------------------


def test_sql_prints_what_migrate_runs():
    assert run("sql").stdout == migration_sql()
    arguments = ("--schema", "a", "--prefix", "b", "--after", "1", "--role", "c d")
    assert run("sql", *arguments).stdout == migration_sql(
        schema="a", prefix="b", after=1, role="c d"
    )


# -- doctor -------------------------------------------------------------------------------------


def test_doctor_exits_with_what_it_finds(postgresql_dsn):
    ran = run("doctor", postgresql_dsn)
    assert (ran.returncode, ran.stderr) == (1, "")
    assert "problem  schema: 'eventsource' holds no event store." in ran.stdout
    assert run("migrate", postgresql_dsn).returncode == 0
    ran = run("doctor", dsn=postgresql_dsn)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "ok       order: appends are announced" in ran.stdout
    assert ran.stdout.splitlines()[-1].startswith("The store can be used: ")
    ran = run("doctor", postgresql_dsn, "--prefix", "other_")
    assert ran.returncode == 1


def test_doctor_reports_that_there_is_no_server():
    ran = run("doctor", f"postgresql://u:secret@{NOBODY}/d")
    assert (ran.returncode, ran.stderr) == (1, "")
    assert "could not be reached" in ran.stdout


@pytest.mark.timeout(120)
def test_doctor_runs_the_gap_stress_test(postgresql_dsn):
    ran = run("doctor", postgresql_dsn, "--gap-stress", "0.5")
    assert ran.returncode == 1  # no store has been made there
    assert " gap stress: " in ran.stdout
    assert "events committed" in ran.stdout
    schemas = "SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'eventsource%'"
    assert ask(postgresql_dsn, schemas) == [(0,)]


def test_the_gap_stress_test_needs_no_pytest(tmp_path):
    (tmp_path / "pytest.py").write_text("raise ModuleNotFoundError(name='pytest')")
    path = os.pathsep.join((str(tmp_path), *sys.path[1:]))
    ran = run("doctor", f"postgresql://{NOBODY}/d", "--gap-stress", "1", PYTHONPATH=path)
    assert (ran.returncode, ran.stderr) == (1, "")
    assert " gap stress: it could not be run. PostgreSQL failed" in ran.stdout


def test_without_asyncpg_it_names_the_extra(tmp_path):
    (tmp_path / "asyncpg.py").write_text("raise ImportError")
    path = os.pathsep.join((str(tmp_path), *sys.path[1:]))
    for command in ("migrate", "doctor"):
        ran = run(command, f"postgresql://{NOBODY}/d", PYTHONPATH=path)
        assert (ran.returncode, ran.stdout) == (1, "")
        assert "pip install 'eventsource-anyio[postgresql]'" in ran.stderr


# -- what makes no sense ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("mend",),
        ("doctor",),
        ("migrate",),
        ("doctor", "mysql://u:secret@h/d"),
        ("doctor", "h"),
        ("doctor", "postgresql://u:se/cret@h/d"),
        ("doctor", "postgresql://u:sec?ret@h/d"),
        ("doctor", "postgresql://u:sec#ret@h/d"),
        ("doctor", "postgresql://h/d", "--gap-stress", "soon"),
        ("doctor", "postgresql://h/d", "--gap-stress", "postgresql://u:secret@h/d"),
        ("migrate", "postgresql://h/d", "--schema", "9"),
        ("migrate", "postgresql://h/d", "--prefix", "a b"),
        ("migrate", "postgresql://h/d", "--role", 'a"b'),
        ("sql", "postgresql://u:secret@h/d"),
        ("sql", "postgresql://h/d?user=u&password=secret"),
        ("postgresql://u:secret@h/d",),
        ("sql", "--after", "postgresql://u:se/secret@h/d"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, monkeypatch, capsys):
    monkeypatch.delenv("DATABASE_URL", raising=False)
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    said = capsys.readouterr()
    assert (exited.value.code, said.out) == (2, "")
    assert said.err.startswith("usage: eventsource-anyio")
    assert all(part not in said.err for part in ("secret", "se/", "cret", "sec#", "ret@"))


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://u:secret@{}/d",
        "postgresql+asyncpg://u:secret@{}/d",
        "postgres://u:a@secret@{}/d",
        "postgresql://{}/d?user=u&password=secret",
        "postgresql://u:secret@[::1]:1/d",
    ],
)
@pytest.mark.parametrize("command", ["migrate", "doctor"])
def test_a_password_is_not_shown(command, dsn, monkeypatch, capsys):
    monkeypatch.setenv("DATABASE_URL", dsn.format(NOBODY))
    assert main([command]) == 1
    said = "".join(capsys.readouterr())
    assert "could not be reached" in said
    assert "secret" not in said


@pytest.mark.skipif(not find_spec("trio"), reason="trio is not installed")
def test_it_imports_no_event_loop_that_it_does_not_run():
    program = (
        "import sys, eventsource_anyio.cli; print('trio' in sys.modules, 'pytest' in sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stdout == "False False\n"


# -- rebuild ------------------------------------------------------------------------------------

APPLICATION = """
from contextlib import asynccontextmanager
from eventsource_anyio import ANY, SQLiteEventStore
from eventsource_anyio.projections import Projection, ProjectionCoordinator
from eventsource_anyio.testing.samples import append_numbers

class Numbers(Projection):
    name = "numbers"
    attempts = 1
    broken = False

    async def handle(self, event, tx):
        if self.broken:
            raise KeyError("postgresql://u:secret@h/d")
        await tx.documents.add("numbers", str(event.position), None)

    async def reset(self, tx):
        for document in await tx.documents.list("numbers", limit=10_000):
            await tx.documents.delete("numbers", document.key)

@asynccontextmanager
async def coordinator():
    async with SQLiteEventStore("events.db") as store:
        if not await store.last_position():
            await append_numbers(store, 1200)
            await store.documents.add("numbers", "left over", None)
        yield ProjectionCoordinator(store, [Numbers()])
        assert len(await store.documents.list("numbers", limit=10_000)) == 1200

@asynccontextmanager
async def broken():
    async with coordinator() as one:
        Numbers.broken = True
        yield one

def one():
    return ProjectionCoordinator

number = 1
"""


@pytest.fixture
def application(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "shop.py").write_text(APPLICATION)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("application")
def test_rebuild_shows_how_far_it_has_got():
    for _ in range(2):
        ran = run("rebuild", "shop:coordinator", "numbers", PYTHONPATH=str(ROOT))
        assert ran.returncode == 0
        assert ran.stderr.splitlines()[-1].startswith("numbers: 1,200 of 1,200, 100 %, ")
        assert ran.stdout == "numbers, version 1, is rebuilt up to position 1200.\n"


@pytest.mark.skipif(sys.platform == "win32", reason="there is no pty")
@pytest.mark.usefixtures("application")
def test_rebuild_has_a_bar_on_a_terminal():
    import pty

    if not find_spec("rich"):
        pytest.skip("rich is not installed")
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "eventsource_anyio.cli", "rebuild", "shop:coordinator"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"}
    ran = subprocess.Popen(
        [*command, "numbers"], env=env, stdout=subprocess.PIPE, stderr=terminal, text=True
    )
    os.close(terminal)
    shown = b""
    try:
        while part := os.read(controller, 10_000):
            shown += part
    except OSError:  # the other end is closed
        pass
    os.close(controller)
    out, _ = ran.communicate(timeout=60)
    assert ran.returncode == 0
    assert out == "numbers, version 1, is rebuilt up to position 1200.\n"
    assert "━" in shown.decode()
    assert "1200/1200" in shown.decode()


@pytest.mark.usefixtures("application")
def test_a_rebuild_that_fails_says_why():
    ran = run("rebuild", "shop:broken", "numbers", PYTHONPATH=str(ROOT))
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "Projection 'numbers', version 1, is not running." in ran.stderr
    assert "KeyError: 'postgresql://u:***@h/d'" in ran.stderr
    ran = run("rebuild", "shop:coordinator", "other", PYTHONPATH=str(ROOT))
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "there is no projection 'other' here; there are: numbers" in ran.stderr


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("shop", "give module:function, such as shop.main:coordinator"),
        ("shop:", "give module:function"),
        ("nowhere.at_all:coordinator", "there is no module nowhere"),
        ("shop:nobody", "shop has no function nobody"),
        ("shop:number", "shop has no function number"),
        ("shop:one", "must be an async context manager"),
    ],
)
@pytest.mark.usefixtures("application")
def test_what_is_no_application_is_refused(path, why):
    ran = run("rebuild", path, "numbers", PYTHONPATH=str(ROOT))
    assert (ran.returncode, ran.stdout) == (2, "")
    assert why in ran.stderr
