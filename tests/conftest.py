"""Every async test runs on asyncio, on uvloop and on Trio; `--loop` selects among them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from eventsource_anyio.testing.local_server import memory

if TYPE_CHECKING:
    from eventsource_anyio.testing.postgresql import PostgreSQLDatabases

pytest_plugins = ["pytester"]

LOOPS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {"debug": False}),
    "trio": ("trio", {}),
}
if sys.platform != "win32":
    LOOPS["uvloop"] = ("asyncio", {"debug": False, "use_uvloop": True})

# The same examples every time, so that a failure is somebody's doing. To look for new ones:
# pytest --hypothesis-profile=explore
settings.register_profile(
    "ci", deadline=None, max_examples=50, derandomize=True, database=None, print_blob=True
)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    parser.addoption(
        "--loop",
        action="append",
        choices=sorted(LOOPS),
        help="run async tests on this event loop; may be repeated (default: on all of them)",
    )
    if not pluginmanager.hasplugin("xdist"):  # pytest -p no:xdist; the project's options stay
        for name in ("--numprocesses", "--maxprocesses", "--dist"):
            parser.addoption(name, help="of pytest-xdist, which is not there: has no effect")


def pytest_configure(config: pytest.Config) -> None:
    """Files of tests are in memory if there is room, as those of throw-away servers are.

    None of them has to outlast the machine, and a disk that is busy is waited for at each commit.
    """
    config.addinivalue_line("markers", "not_on_uvloop: is run on asyncio and on Trio")
    if directory := memory():
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", directory)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One process more than there are cores: a third of its time a test waits for others'."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the async tests of the event loops that were not chosen."""
    chosen = config.getoption("--loop") or [*LOOPS]
    others = [*LOOPS.keys() - set(chosen)]  # a list, since a test may name its loop by a dict
    deselected = [
        item
        for item in items
        if isinstance(item, pytest.Function)
        and hasattr(item, "callspec")
        and (
            (loop := item.callspec.params.get("anyio_backend")) in others
            or (loop == "uvloop" and item.get_closest_marker("not_on_uvloop"))
        )
    ]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]


@pytest.fixture(scope="module", params=sorted(LOOPS))
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """The event loop of an async test: a backend of anyio and its options."""
    loop: str = request.param
    if find_spec(loop) is None:
        reason = f"{loop} is not installed; pip install -e '.[test]' brings it"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return LOOPS[loop]


@pytest.fixture(scope="session")
def migrated_template(postgresql_server: PostgreSQLDatabases) -> Iterator[str]:
    """The name of a database that has the tables and to which nobody is connected."""
    import psycopg

    from eventsource_anyio.stores.postgresql import migration_sql

    dsn = postgresql_server.create_database()
    with psycopg.connect(dsn, autocommit=True) as session:
        session.execute(migration_sql().encode())
    yield dsn.partition("?")[0].rpartition("/")[2]
    postgresql_server.drop_database(dsn)


@pytest.fixture
def migrated_dsn(postgresql_server: PostgreSQLDatabases, migrated_template: str) -> Iterator[str]:
    """The DSN of a PostgreSQL database with the tables of a store, dropped after the test."""
    dsn = postgresql_server.create_database(migrated_template)
    yield dsn
    postgresql_server.drop_database(dsn)


@pytest.fixture
def saved_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a projection has passed over is saved, for others to see, at once, not each second."""
    monkeypatch.setattr("eventsource_anyio.projections.running._SKIPPED_FOR", 0.02)


@pytest.fixture
def again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was away is tried again almost at once: the pauses that double begin with less."""
    for where in ("projections.running._FIRST_PAUSE", "relay.delivering._FIRST_PAUSE"):
        monkeypatch.setattr(f"eventsource_anyio.{where}", 0.002)
    monkeypatch.setattr("eventsource_anyio.stores.postgresql.tail._FIRST_RETRY", 0.005)
