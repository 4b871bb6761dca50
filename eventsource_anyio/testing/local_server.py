"""A throw-away server for tests: a child of this process, with a directory of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, ClassVar, Self

_MEMORY, _ROOM = "/dev/shm", 4 << 30  # used if that many bytes are free there
_PORTS = range(10_000, 32_000)  # below those that outgoing connections are given
_LONGEST = 30.0  # seconds that a server may take to start or to stop
_WATCH = 'read _ && exit; kill -KILL "$0"; sleep 1; rm -rf "$1"'


def memory() -> str | None:
    """A directory in memory, where nobody waits for a disk, if there is room.

    ext4 is slow in making files after it deleted many.
    """
    with suppress(OSError):
        there = os.statvfs(_MEMORY)
        fits = there.f_bavail * there.f_frsize >= _ROOM and not there.f_flag & os.ST_NOEXEC
        return _MEMORY if fits and os.access(_MEMORY, os.W_OK) else None
    return None


class LocalServer(ABC):
    """A new server from its binary, there for as long as it is entered; POSIX only.

    It listens on 127.0.0.1, at a port that it keeps, and does not outlive the process that started
    it. One that is not `durable` is in memory if there is room.
    """

    scheme: ClassVar[str]
    ready: ClassVar[str]
    """What is in its log once it listens: at a port of its own, not of another server."""

    def __init__(self, binary: Path | str, *, durable: bool) -> None:
        self.url = ""
        self._binary = Path(binary).absolute()
        self._parent = None if durable else memory()
        self._stack = ExitStack()
        self._process: subprocess.Popen[Any] | None = None
        self._watch: subprocess.Popen[Any]

    @abstractmethod
    def command(self) -> list[str]:
        """How it is started, at `port` and in `directory`."""

    @abstractmethod
    def answers(self, probe: socket.socket) -> bool:
        """Whether it is this kind of server that answers."""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.directory = Path(tempfile.mkdtemp(prefix="eventsource_", dir=self._parent))
            stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
            stack.callback(self._end, signal.SIGKILL)
            while self._process is None:
                self.port = secrets.choice(_PORTS)
                self.url = f"{self.scheme}://127.0.0.1:{self.port}"
                try:
                    self.start()
                except RuntimeError as error:
                    if "address already in use" not in str(error).lower():
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
        command = self.command()
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
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0) as probe:
            return self.answers(probe) and self._is_ours()
        return False

    def _is_ours(self) -> bool:
        """Not another server's port: then this one is about to end."""
        log = self.directory / "log"
        return self.ready in log.read_text(errors="replace")
