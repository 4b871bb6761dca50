"""The other Python libraries, each in an environment of its own, in the same rounds as ours.

Their newest releases are installed into environments that are kept in the user's cache directory.
They run on the newest Python that is found, as some of them need it; ours runs where it runs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from threading import Timer
from typing import Any, cast

import attrs
from rich.console import Console

from . import footprint
from .peer_serve import READY
from .suite import Found, Piece, Suite

# psycopg's own wheel with libpq in it, and faster than the one in Python alone.
REQUIREMENTS: Mapping[str, tuple[str, ...]] = {
    "eventsource-py": ("eventsource-py[postgresql,sqlite]",),
    "eventsourcing": ("eventsourcing[postgres]", "psycopg[binary]"),
}
IMPORTS: Mapping[str, str] = {
    "eventsource-py": (
        "from eventsource import AggregateRepository, DeciderAggregate, PostgreSQLEventStore"
    ),
    "eventsourcing": (
        "import eventsourcing.postgres; from eventsourcing.application import Application"
    ),
}
_LONGEST = 120.0  # seconds for one piece of work
_ASK = "import sys; print('%d.%d' % sys.version_info[:2])"
_ROOT = Path(__file__).parent.parent


class PeerError(Exception):
    """A peer could not do what it was asked to."""


@attrs.define
class Peer:
    name: str
    python: Path
    version: str
    python_version: str
    _process: subprocess.Popen[str] | None = None

    @property
    def _command(self) -> list[str]:
        return [str(self.python), "-m", f"benchmarks.peer_{self.name.replace('-', '_')}"]

    @property
    def _environment(self) -> dict[str, str]:
        # Its own packages only, whatever this process was told about where to find modules.
        return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    @contextmanager
    def running(self) -> Iterator[None]:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self._environment,
            cwd=_ROOT,
        )
        try:
            self._said(READY)
            yield
        finally:
            self._process.kill()
            self._process.communicate()

    def ask(self, do: str, **request: object) -> Found:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise PeerError(f"{self.name} has ended before {do}") from error
        answer: dict[str, Any] = json.loads(self._said(do))
        if "error" in answer:
            raise PeerError(f"{self.name}, {do}: {answer['error']}")
        return cast("Found", answer["found"])

    def _said(self, what: str) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        too_long = Timer(_LONGEST, self._process.kill)
        too_long.start()
        try:
            said = self._process.stdout.readline()
        finally:
            too_long.cancel()
        if not said:
            raise PeerError(f"{self.name} has ended, or took longer than {_LONGEST:.0f} s: {what}")
        return said

    def once(self, do: str, **request: object) -> Found:
        """In a process of its own."""
        found: Found = json.loads(
            subprocess.run(
                [*self._command, json.dumps({"do": do, **request})],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                env=self._environment,
                cwd=_ROOT,
                timeout=_LONGEST,
            ).stdout
        )
        return found


def newest_python() -> Path:
    """The newest interpreter on PATH or of pyenv, each asked what it is."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    found: dict[tuple[int, ...], Path] = {}
    for candidate in (Path(sys.executable), *_on_path(), *pyenv.glob("versions/3.*/bin/python")):
        try:
            said = subprocess.check_output(
                [candidate, "-c", _ASK], text=True, stderr=subprocess.DEVNULL, timeout=30
            )
        except (OSError, subprocess.SubprocessError):
            continue
        found.setdefault(tuple(map(int, said.split("."))), candidate)
    return found[max(found)]


def _on_path() -> Iterator[Path]:
    for directory in os.get_exec_path():
        if Path(directory).is_dir():
            for file in sorted(Path(directory).iterdir()):
                if re.fullmatch(r"python3\.\d+", file.name):
                    yield file


def environments(python: Path | None, console: Console) -> list[Peer]:
    """Each peer with its newest release; one that is there already serves without a network."""
    base = python or newest_python()
    version = subprocess.check_output([base, "-c", _ASK], text=True).strip()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    found: list[Peer] = []
    for name, requirements in REQUIREMENTS.items():
        where = cache / "eventsource-anyio" / "peers" / f"{name}-python{version}"
        inside = where / "bin" / "python"
        if not inside.exists():
            subprocess.run([base, "-m", "venv", where], check=True)
        console.print(f"{name}: looking for its newest release …")
        install = [str(inside), "-m", "pip", "install", "--quiet", "--upgrade", "psutil"]
        updated = subprocess.run([*install, *requirements], check=False).returncode == 0
        ask = f"from importlib.metadata import version; print(version({name!r}))"
        said = subprocess.run([inside, "-c", ask], check=True, stdout=subprocess.PIPE, text=True)
        console.print(
            f"{name} {said.stdout.strip()}{'' if updated else ', which was there before'}"
        )
        found.append(Peer(name, inside, said.stdout.strip(), version))
    return found


@contextmanager
def running(peers: Sequence[Peer]) -> Iterator[None]:
    with ExitStack() as stack:
        for peer in peers:
            stack.enter_context(peer.running())
        yield


def add_footprint(suite: Suite, peers: Sequence[Peer]) -> None:
    for peer in peers:
        piece = Piece("import", "PostgreSQL", "what a program needs", peer.name)
        suite.add(piece, partial(footprint.import_time, IMPORTS[peer.name], peer.python))
        piece = Piece("installation", "PostgreSQL", "with all that it needs", peer.name)
        suite.add(piece, partial(footprint.environment_size, peer.python))
