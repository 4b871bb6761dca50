"""Promises that the project makes about itself."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import eventsource_anyio

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "eventsource_anyio"
DEMO = (
    "python3 -m venv .venv && .venv/bin/pip install -q -e '.[demo]' "
    "&& .venv/bin/python -m eventsource_anyio.demo"
)
TESTS = (
    "python3 -m venv .venv && .venv/bin/pip install -q -e '.[test]' && .venv/bin/python -m pytest"
)


def public() -> dict[str, object]:
    return {name: getattr(eventsource_anyio, name) for name in eventsource_anyio.__all__}


def sources(*directories: str) -> list[Path]:
    return [
        path
        for directory in directories
        for path in sorted((ROOT / directory).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    ]


# -- the two commands -------------------------------------------------------------------------


@pytest.mark.parametrize("command", [DEMO, TESTS], ids=["demo", "tests"])
def test_readme_gives_the_command_on_a_line_of_its_own(command):
    assert command in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not on this machine")
@pytest.mark.parametrize(
    ("words", "command"),
    [("eventsource_anyio.demo", DEMO), ("pytest", TESTS)],
    ids=["demo", "tests"],
)
def test_ci_runs_the_command_of_the_readme(words, command):
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    function = script[script.index("readme() {") :].partition("\n}\n")[0] + "\n}\n"
    assert f"$(readme {words})" in script
    found = subprocess.run(
        ["bash", "-c", f"{function} readme {words}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == command + "\n"


# -- what is public ---------------------------------------------------------------------------


def test_public_names_are_few_and_there():
    names = eventsource_anyio.__all__
    assert len(names) == len(set(names)) <= 45
    assert set(names) <= set(dir(eventsource_anyio))


def test_package_has_no_public_name_that_it_does_not_declare():
    public()  # what is imported when it is asked for, is
    found = {
        name
        for name, value in vars(eventsource_anyio).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    } - {"TYPE_CHECKING"}
    assert found == {name for name in eventsource_anyio.__all__ if not name.startswith("_")}


def test_a_name_is_listed_before_it_is_imported_and_an_unknown_one_is_refused():
    listed = "import eventsource_anyio; print('SyncRunner' in dir(eventsource_anyio), end='')"
    said = subprocess.run([sys.executable, "-c", listed], check=True, capture_output=True)
    assert said.stdout == b"True"
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = eventsource_anyio.Nothing  # type: ignore[attr-defined]


def test_what_is_not_asked_for_is_not_imported():
    asked = "import sys, eventsource_anyio; print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", asked], check=True, capture_output=True, text=True)
    packages = ("stores.postgresql", "stores.sqlite", "projections", "sync", "bus.in_memory")
    modules = said.stdout.split()
    assert [one for one in packages if f"eventsource_anyio.{one}" in modules] == []
    assert "eventsource_anyio.stores.interface" in modules


def test_exception_classes_are_few_and_of_one_family():
    errors = [
        value
        for value in public().values()
        if isinstance(value, type) and issubclass(value, BaseException)
    ]
    assert 0 < len(errors) <= 12
    assert [e for e in errors if not issubclass(e, eventsource_anyio.EventSourceError)] == []


def test_every_public_name_has_a_docstring():
    documented = {
        name: value
        for name, value in public().items()
        if inspect.isclass(value) or inspect.isroutine(value)
    }
    assert [name for name, value in documented.items() if not value.__doc__] == []


def test_every_public_method_has_a_docstring_of_its_own_or_of_its_contract():
    missing = [
        f"{name}.{attribute}"
        for name, value in public().items()
        if inspect.isclass(value)
        for attribute, member in inspect.getmembers(value)
        if not attribute.startswith("_")
        and (inspect.isroutine(member) or isinstance(member, property))
        and (getattr(member, "__module__", None) or "eventsource_anyio").startswith(
            "eventsource_anyio"
        )
        and not inspect.getdoc(member)
    ]
    assert missing == []


# -- the package ------------------------------------------------------------------------------


def test_version_is_that_of_the_installed_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert importlib.metadata.version(project["name"]) == project["version"]


def test_package_is_marked_as_typed():
    assert Path(inspect.getfile(eventsource_anyio)).with_name("py.typed").is_file()


def test_no_source_file_has_outgrown_its_room():
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in sources("eventsource_anyio")
        if path.suffix in {".py", ".sql"}
    }
    assert {path: count for path, count in lines.items() if count > 450} == {}


def test_no_file_names_a_path_of_somebodys_machine():
    homes = [f"/{directory}/" for directory in ("work", "home", "root", "Users")]
    files = [
        *sources("eventsource_anyio", "tests", "benchmarks", "docs", ".ci"),
        *(path for path in ROOT.iterdir() if path.suffix in {".md", ".py", ".toml", ".yml"}),
    ]
    found = [
        f"{path.relative_to(ROOT)}: {home}"
        for path in files
        for home in homes
        if home in path.read_text(encoding="utf-8", errors="replace")
    ]
    assert found == []


def test_import_brings_no_driver_and_no_event_loop():
    """What is imported beyond what the dependencies themselves import, in a fresh interpreter."""
    program = """if True:
        import sys
        import anyio, attrs, msgspec
        before = set(sys.modules)
        import eventsource_anyio
        import json
        print(json.dumps(sorted(set(sys.modules) - before)))
    """
    unwanted = {
        *("asyncio", "trio", "uvloop"),
        *("aiosqlite", "asyncpg", "coredis", "nats", "psycopg", "redis", "sqlalchemy", "sqlite3"),
        *("hypothesis", "pytest", "rich"),
    }
    # coverage, where it measures the tests, would import things of its own
    env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    result = subprocess.run(
        [sys.executable, "-I", "-c", program], env=env, capture_output=True, text=True, check=True
    )
    imported = set(json.loads(result.stdout))
    assert "eventsource_anyio" in imported
    assert imported & unwanted == set()
