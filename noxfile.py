"""The project's checks, each in an environment of its own. `nox --list` names them.

`nox` runs them all; `nox -s "tests(3.12, trio)" -- -k append` runs some tests on one interpreter
and one event loop.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import nox

nox.needs_version = ">=2026.2.9"
nox.options.sessions = ["lint", "types", "docs", "tests"]
nox.options.reuse_venv = "yes"
nox.options.download_python = "never"

VERSIONS = ("3.11", "3.12", "3.13", "3.14")
LOOPS = ("asyncio", "uvloop", "trio")

# What a browser fetches by itself; a link to follow and a canonical address are no such thing.
LOADED = re.compile(
    r"""<(?:script|img|iframe|source|link(?![^>]*\bcanonical\b))\b[^>]*(?:src|href)=["']?"""
    r"""(?:https?:)?//[^>]*>"""
)


def candidates(version: str) -> Iterator[Path | str]:
    """Where an interpreter of this version may be: on PATH, or installed by pyenv or uv."""
    for name in (f"python{version}", "python3", "python"):
        for directory in os.get_exec_path():
            if found := shutil.which(name, path=directory):
                yield found
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    uv = Path(os.environ.get("UV_PYTHON_INSTALL_DIR") or Path.home() / ".local/share/uv/python")
    yield from pyenv.glob(f"versions/{version}.*/bin/python")
    yield from uv.glob(f"cpython-{version}.*/bin/python")


def interpreters() -> dict[str, str]:
    """The interpreters of this machine by version, each asked what it is.

    A name on PATH proves nothing: pyenv's `python3.12` is there, and fails, for a version that is
    installed but not selected.
    """
    ask = "import sys; print('%d.%d' % sys.version_info[:2], sys._base_executable)"
    found: dict[str, str] = {}
    for version in VERSIONS:
        for candidate in candidates(version):
            try:
                answer = subprocess.run(
                    [candidate, "-c", ask], capture_output=True, text=True, check=True, timeout=30
                ).stdout.split(maxsplit=1)
            except (OSError, subprocess.SubprocessError):
                continue
            if len(answer) == 2 and answer[0] == version:
                found[version] = answer[1].strip()
                break
    return found


@nox.session
@nox.parametrize("loop", LOOPS, ids=LOOPS)
@nox.parametrize("python", [nox.param(path, id=v) for v, path in interpreters().items()])
def tests(session: nox.Session, loop: str) -> None:
    """The tests against the built wheel, on every interpreter found and every event loop."""
    session.install(".[test]")
    # -P: the package is the one that was installed, not the one in this directory
    session.run("python", "-P", "-m", "pytest", "--loop", loop, *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style (ruff) and layers (import-linter)."""
    session.install(*extra("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """Types: mypy and pyright, both strict."""
    session.install("-e", ".[bench,demo,test,types]")
    session.run("mypy")
    session.run("pyright", env={"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"})


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, with warnings as errors and nothing loaded from third parties."""
    session.install(*extra("docs"))
    session.run("mkdocs", "build", "--strict", env={"NO_MKDOCS_2_WARNING": "1"})
    for page in Path("site").rglob("*.html"):
        if found := LOADED.search(page.read_text(encoding="utf-8")):
            session.error(f"{page} loads from elsewhere: {found[0]}")


@nox.session
def demo(session: nox.Session) -> None:
    """The demo."""
    session.install("-e", ".[demo]")
    session.run("python", "-m", "eventsource_anyio.demo", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks, short ones unless told otherwise."""
    session.install("-e", ".[bench]")
    session.run("python", "-m", "benchmarks", *(session.posargs or ["--short"]))


@nox.session
def draw(session: nox.Session) -> None:
    """The plots and the tables of docs/benchmarks.md, from what was measured."""
    session.install("-e", ".[bench]")
    session.run("python", "-m", "benchmarks.draw", *session.posargs)


@nox.session
def speed(session: nox.Session) -> None:
    """The regression gate: no ratio to the bare driver may fall below its floor."""
    session.install("-e", ".[bench]")
    drawn = session.create_tmp()  # so that it is known that what is stored can be drawn
    session.run("python", "-m", "benchmarks.draw", "--to", drawn, silent=True)
    session.run("python", "-m", "benchmarks.gate", *session.posargs)


def extra(name: str) -> list[str]:
    """The requirements of one of the project's extras, where the project itself is not needed."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    requirements: list[str] = project["optional-dependencies"][name]
    return requirements
