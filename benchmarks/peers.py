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

import attrs
from rich.console import Console

from eventsource_anyio.testing.postgresql import PostgreSQLDatabases

from .server import database, sql
from .suite import Claim, Suite

# psycopg's own wheel with libpq in it, and faster than the one in Python alone.
REQUIREMENTS: Mapping[str, tuple[str, ...]] = {
    "eventsource-py": ("eventsource-py[postgresql]",),
    "eventsourcing": ("eventsourcing[postgres]", "psycopg[binary]"),
}
_LONGEST = 900.0  # seconds for one peer's turn
_ASK = "import sys; print('%d.%d' % sys.version_info[:2])"


@attrs.frozen
class Peer:
    name: str
    python: Path
    script: Path

    def run(self, *args: str) -> str:
        # Its own package only, whatever this process was told about where to find modules.
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [str(self.python), str(self.script), *args]
        ran = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=env, timeout=_LONGEST
        )
        return ran.stdout


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
        if not (where / "bin" / "python").exists():
            subprocess.run([base, "-m", "venv", where], check=True)
        inside = where / "bin" / "python"
        install = [str(inside), "-m", "pip", "install", "--quiet", "--upgrade", *requirements]
        there = [str(inside), "-c", f"from importlib.metadata import version; version({name!r})"]
        if subprocess.run(install, check=False).returncode != 0:
            subprocess.run(there, check=True)
            console.print(f"{name}: not updated; what was installed before is measured")
        script = Path(__file__).with_name(f"peer_{name.replace('-', '_')}.py")
        found.append(Peer(name, inside, script))
    return found


@attrs.define
class Peers:
    """The peers' turns in a suite, and what they have to do with ours."""

    databases: PostgreSQLDatabases
    peers: Sequence[Peer]
    versions: dict[str, str] = attrs.field(factory=dict)
    _filled: dict[str, str] = attrs.field(factory=dict)

    @contextmanager
    def filled(self, events: int) -> Iterator[None]:
        """A database for each that is only read: an aggregate of 1,000 events among others."""
        with ExitStack() as stack:
            for peer in self.peers:
                self._filled[peer.name] = dsn = stack.enter_context(database(self.databases))
                peer.run("fill", dsn, str(events))
                sql(dsn, "VACUUM ANALYZE")
            yield

    def add(self, suite: Suite, seconds: float) -> None:
        for peer in self.peers:
            suite.add_figures(peer.name, partial(self._turn, peer, seconds))

    def _turn(self, peer: Peer, seconds: float) -> Mapping[str, float]:
        with database(self.databases) as dsn:
            said = json.loads(peer.run("measure", dsn, self._filled[peer.name], str(seconds)))
        self.versions[peer.name] = said.pop("version")
        figures: dict[str, float] = said
        return figures

    def claims(self, suite: Suite) -> list[Claim]:
        """Ours on asyncio beside the faster peer of each round."""
        if not self.peers:
            return []
        found: list[Claim] = []
        for what, figure, bound in (
            ("64 tasks", "appends/s", 20),
            ("1 task", "appends/s", None),
            ("read everything", "events/s", None),
        ):
            theirs = [f"{peer.name}, {what}, {figure}" for peer in self.peers]
            ratio = suite.ratio(f"{what}: ours, asyncio", *theirs)
            found.append(Claim(f"{what}, asyncio ÷ the faster peer", ratio, "≥", bound))
        for peer in self.peers:
            took = suite.median(f"{peer.name}, load 1,000 events, ms")
            ratio = took * suite.median("load 1,000 events: ours, asyncio") / 1000
            found.append(Claim(f"ms to load 1,000 events, {peer.name} ÷ asyncio", ratio))
            missed = sum(suite.runs(f"{peer.name}, missed by a reader that follows"))
            of = sum(suite.runs(f"{peer.name}, of events"))
            what = f"{peer.name}: missed by a reader that follows, of {of:,.0f} events"
            found.append(Claim(what, missed))
        return found
