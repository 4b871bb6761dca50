"""A DSN means the same to both drivers."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from getpass import getuser
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from psycopg.pq import Conninfo

from eventsource_anyio.guest import Guest
from eventsource_anyio.stores.postgresql import PostgreSQLEventStore
from eventsource_anyio.stores.postgresql.asyncpg_driver import (
    AsyncpgDriver,
    connect_by_dsn,
    engine_by_dsn,
)
from eventsource_anyio.stores.postgresql.driver import Driver, DriverError
from eventsource_anyio.stores.postgresql.dsn import parse_dsn
from eventsource_anyio.stores.postgresql.libpq_driver import LibpqDriver
from eventsource_anyio.testing.postgresql import PostgreSQLServer

MakeDriver = Callable[[str], Driver]


@pytest.fixture(autouse=True)
def nothing_in_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("PG")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # where passwords and services are looked for


@pytest.fixture(params=["asyncpg", "psycopg"])
async def make_driver(request: pytest.FixtureRequest) -> AsyncIterator[MakeDriver]:
    if request.param == "psycopg":
        yield LibpqDriver
        return
    async with Guest() as guest:
        yield lambda dsn: AsyncpgDriver(guest, connect_by_dsn(dsn))


@pytest.fixture
def where(postgresql_server: object, postgresql_dsn: str) -> dict[str, Any]:
    """The parts of the DSN of a database."""
    if not isinstance(postgresql_server, PostgreSQLServer):
        pytest.skip("what else the server's DSN may hold is not known")
    parts = urlsplit(postgresql_dsn)
    return {
        "user": parts.username,
        "host": parts.hostname,
        "port": parts.port,
        "db": parts.path[1:],
        "directory": str(postgresql_server.directory),
        "encoded": quote(str(postgresql_server.directory), safe=""),
    }


TCP = "postgresql://{user}@{host}:{port}/{db}"
UNICODE = "é 漢 \\ ' \" = & ? # % + , -c work_mem=1MB \t end"
SAME: dict[str, tuple[str, dict[str, str]]] = {
    "nothing": (TCP, {"application_name": "", "client_encoding": "UTF8"}),
    "a setting": (TCP + "?statement_timeout=10s", {"statement_timeout": "10s"}),
    "a known setting": (TCP + "?application_name=shop%20%26%201", {"application_name": "shop & 1"}),
    "a plus is a space": (TCP + "?application_name=a+b", {"application_name": "a b"}),
    "two settings": (
        TCP + "?lock_timeout=1s&work_mem=5MB",
        {"lock_timeout": "1s", "work_mem": "5MB"},
    ),
    "of the same the last": (TCP + "?work_mem=5MB&work_mem=6MB", {"work_mem": "6MB"}),
    "in any case": (TCP + "?TimeZone=Asia/Tokyo", {"timezone": "Asia/Tokyo"}),
    "of an extension": (TCP + "?shop.tenant=7", {"shop.tenant": "7"}),
    "what is special": (
        TCP + "?shop.text=" + quote(UNICODE),
        {"shop.text": UNICODE, "work_mem": "4MB"},
    ),
    "empty": (TCP + "?search_path=&shop.text=", {"search_path": "", "shop.text": ""}),
    "a list": (TCP + "?search_path=one,%20%22two%20three%22", {"search_path": 'one, "two three"'}),
    "options": (
        TCP + "?options=-c%20work_mem%3D5MB%20-c%20shop.text%3Da%5C%20b",
        {"work_mem": "5MB", "shop.text": "a b"},
    ),
    "options and settings": (
        TCP + "?options=-c%20work_mem%3D5MB%20-c%20lock_timeout=1s&work_mem=6MB",
        {"work_mem": "6MB", "lock_timeout": "1s"},
    ),
    "an encoding is ours": (TCP + "?client_encoding=LATIN1", {"client_encoding": "UTF8"}),
    "ssl": (TCP + "?ssl=disable", {"application_name": ""}),
    "ssl, as JDBC has it": (TCP + "?ssl=false", {"application_name": ""}),
    "sslmode": (TCP + "?sslmode=prefer", {"application_name": ""}),
    "asyncpg": (TCP.replace("postgresql", "postgresql+asyncpg"), {}),
    "psycopg": (TCP.replace("postgresql", "postgresql+psycopg"), {}),
    "postgres": (TCP.replace("postgresql", "postgres"), {}),
    "all after the ?": ("postgresql://?host={host}&port={port}&user={user}&dbname={db}", {}),
    "database": ("postgresql://{user}@{host}:{port}?database={db}", {}),
    "the port after the ?": ("postgresql://{user}@{host}/{db}?port={port}", {}),
    "a directory": ("postgresql://{user}@/{db}?host={directory}&port={port}", {}),
    "an encoded directory": ("postgresql://{user}@{encoded}:{port}/{db}", {}),
    "several hosts": ("postgresql://{user}@{host}:1,{host}:{port}/{db}", {}),
    "several after the ?": ("postgresql://{user}@/{db}?host={host},{host}&port=1,{port}", {}),
    "a host and a directory": ("postgresql://{user}@{host}:1,{encoded}:{port}/{db}", {}),
    "one that has no address": ("postgresql://{user}@host.invalid,{host}:{port}/{db}", {}),
    "only a primary": (TCP + "?target_session_attrs=read-write", {}),
    "encoded": ("postgresql://%70ostgres:%40%2F%3A@{host}:{port}/{db}", {}),
    "patience": (TCP + "?connect_timeout=10", {}),
}


@pytest.mark.parametrize("name", SAME)
async def test_what_it_sets(make_driver: MakeDriver, where: dict[str, Any], name: str) -> None:
    pattern, settings = SAME[name]
    connection = await make_driver(pattern.format(**where)).connect()
    try:
        said = "SELECT current_database(), session_user, inet_server_addr() IS NULL"
        ((database, user, local),) = await connection.fetch(said)
        assert (database, user, local) == (where["db"], where["user"], "directory" in name)
        for setting, expected in settings.items():
            ((found,),) = await connection.fetch(f"SHOW {setting}")
            assert found == expected
    finally:
        await connection.close()


REFUSED = {
    "unknown": ("no_such_setting=1", "42704"),
    "misspelt": ("ssl_mode=require", "42704"),
    "a bad value": ("statement_timeout=soon", "22023"),
    "not now": ("shared_buffers=1GB", "55P02"),
    "no TLS there": ("sslmode=require", ""),
    "ssl without TLS": ("ssl=true", ""),
    "no such mode": ("sslmode=perhaps", ""),
    "no such attribute": ("target_session_attrs=best", ""),
    "no standby": ("target_session_attrs=standby", ""),
    "no such service": ("service=nowhere&port=1", ""),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_the_server_or_the_driver_refuses(
    make_driver: MakeDriver, where: dict[str, Any], name: str
) -> None:
    query, sqlstate = REFUSED[name]
    with pytest.raises(DriverError) as raised:
        await make_driver(f"{TCP.format(**where)}?{query}").connect()
    assert (raised.value.sqlstate, raised.value.lost) == (sqlstate, True)


async def test_what_the_environment_adds(
    make_driver: MakeDriver, where: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "PGHOST": where["host"],
        "PGPORT": str(where["port"]),
        "PGUSER": where["user"],
        "PGDATABASE": where["db"],
        "PGAPPNAME": "from the environment",
        "PGOPTIONS": "-c work_mem=5MB -c lock_timeout=1s",
    }.items():
        monkeypatch.setenv(name, value)
    shown = "SELECT " + ", ".join(
        f"current_setting('{name}')" for name in ("application_name", "work_mem", "lock_timeout")
    )
    for dsn, expected in (
        ("postgresql://", ("from the environment", "5MB", "1s")),
        ("postgresql://?work_mem=6MB", ("from the environment", "6MB", "1s")),
        ("postgresql://?application_name=x&options=-c work_mem=6MB", ("x", "6MB", "0")),
    ):
        connection = await make_driver(dsn).connect()
        ((*found,),) = await connection.fetch(shown)
        assert tuple(found) == expected
        await connection.close()
    driver = make_driver("postgresql://")
    monkeypatch.setenv("PGAPPNAME", "changed")  # it is looked at for each connection
    connection = await driver.connect()
    assert (await connection.fetch("SHOW application_name"))[0][0] == "changed"
    await connection.close()


async def test_a_service(
    make_driver: MakeDriver, where: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    services = tmp_path / "services"
    services.write_text(
        "[shop]\nhost={host}\nport={port}\nuser={user}\ndbname={db}\n".format(**where)
    )
    monkeypatch.setenv("PGSERVICEFILE", str(services))
    for dsn, service in (("postgresql://?service=shop", ""), ("postgresql://", "shop")):
        if service:
            monkeypatch.setenv("PGSERVICE", service)
        connection = await make_driver(dsn).connect()
        assert (await connection.fetch("SELECT current_database()"))[0][0] == where["db"]
        await connection.close()


async def test_a_password_file(
    make_driver: MakeDriver, postgresql_server: object, where: dict[str, Any], tmp_path: Path
) -> None:
    assert isinstance(postgresql_server, PostgreSQLServer)
    passwords = tmp_path / "passwords"
    passwords.write_text("{host}:{port}:*:{user}:secret\n".format(**where))
    passwords.chmod(0o600)
    dsn = TCP.format(**where)
    assert Conninfo.parse(dsn.encode())
    connection = await make_driver(f"{dsn}?passfile={passwords}").connect()
    await connection.close()


async def test_who_one_is_without_a_name(
    make_driver: MakeDriver, where: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "nobody_of_that_name")
    assert getuser() == "nobody_of_that_name"
    with pytest.raises(DriverError, match="nobody_of_that_name") as raised:
        await make_driver("postgresql://{host}:{port}/{db}".format(**where)).connect()
    assert raised.value.sqlstate == "28000"


UNREADABLE = [
    "",
    "nonsense",
    "host=localhost dbname=shop",
    "mysql://localhost/shop",
    "postgresql:///shop#1",
    "postgresql://[/",
    "postgresql://::1/shop",
    "postgresql://localhost:port/shop",
    "postgresql://me:sec/ret@localhost/shop",
    "postgresql://me:sec#ret@localhost/shop",
    "postgresql://me@one,,two/shop",
    "postgresql://localhost/shop?port=five",
    "postgresql://localhost/shop?port=1,2",
    "postgresql://one,two,three/shop?port=1,2",
    "postgresql://localhost/shop?statement_timeout",
    "postgresql://localhost/shop?statement timeout=1",
    "postgresql://localhost/shop?statement-timeout=1",
    "postgresql://localhost/shop?connect_timeout=soon",
]


@pytest.mark.parametrize("dsn", UNREADABLE)
def test_what_is_none_is_said_at_once(dsn: str) -> None:
    for make in (PostgreSQLEventStore, LibpqDriver, connect_by_dsn):
        with pytest.raises(ValueError, match="DSN") as raised:
            make(dsn)
        assert "ret" not in str(raised.value).replace("secret", "")


@pytest.mark.parametrize("query", ["channel_binding=require", "sslrootcert=system", "keepalives=1"])
def test_what_only_libpq_can_do_needs_libpq(query: str) -> None:
    dsn = f"postgresql://localhost/shop?{query}"
    with pytest.raises(ValueError, match=rf"{query.split('=')[0]}.*asyncpg does not(.|\n)*psycopg"):
        PostgreSQLEventStore(dsn)  # on any loop
    for make in (
        lambda: PostgreSQLEventStore(dsn, driver="asyncpg"),
        lambda: engine_by_dsn(dsn, 5),
    ):
        with pytest.raises(ValueError, match="asyncpg"):
            make()
    PostgreSQLEventStore(dsn, driver="psycopg")
    name, value = query.split("=")
    assert parse_dsn(dsn).for_libpq()[name] == value


def test_every_parameter_of_libpq_is_known() -> None:
    """What libpq learns must not silently be a setting of the server."""
    handled = {"host", "port", "options", "application_name", "client_encoding", "connect_timeout"}
    for option in Conninfo.get_defaults():
        name = option.keyword.decode()
        if name not in handled | {"servicefile"}:
            assert name in parse_dsn(f"postgresql://?{name}=1").for_libpq()


def test_no_password_is_shown() -> None:
    assert "secret" not in repr(parse_dsn("postgresql://me:secret@localhost/shop"))
