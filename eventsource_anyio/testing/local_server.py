"""A throw-away server for tests: a child of this process, with a directory of its own."""

from __future__ import annotations

import os
import secrets
import select
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
    longest: ClassVar[float] = 30.0
    """Seconds that it may take to start or to stop."""
    orderly, at_once = signal.SIGTERM, signal.SIGKILL
    """How it is asked to stop, and told to when it is not needed any more."""
    watch: ClassVar[str] = 'read _ && exit; kill -KILL "$0"; sleep 1; rm -rf "$1"'
    """What ends the process $0 and removes the directory $1 if a pipe is closed."""

    def __init__(self, binary: Path, *, durable: bool) -> None:
        self._binary = binary
        self._parent = None if durable else memory()
        self._stack = ExitStack()
        self._process: subprocess.Popen[Any] | None = None
        self._watch: subprocess.Popen[Any]

    @abstractmethod
    def command(self) -> list[str]:
        """How it is started, at `port` and in `directory`."""

    @abstractmethod
    def located(self, url: str) -> None:
        """It is going to be there."""

    @abstractmethod
    def is_ready(self) -> bool:
        """Whether it takes connections: this one, and not another server at its port."""

    def prepare(self) -> None:  # noqa: B027  (most need nothing)
        """Put into `directory` what it needs before it is started for the first time."""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.directory = Path(tempfile.mkdtemp(prefix="eventsource_", dir=self._parent))
            stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
            # In another session: Ctrl-C is for the tests, which then stop the server.
            self._child: dict[str, Any] = {"cwd": self.directory, "start_new_session": True}
            self._child |= {"stderr": subprocess.STDOUT}
            self.prepare()
            stack.callback(self._end, self.at_once)
            while self._process is None:
                self.port = secrets.choice(_PORTS)
                self.located(f"{self.scheme}://127.0.0.1:{self.port}")
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

    def said(self) -> str:
        """What is in its log since it was started."""
        return (self.directory / "log").read_text(errors="replace")

    def start(self) -> None:
        """Start again after `stop` or `kill`; returns when the server takes connections."""
        if self._process is not None:
            raise RuntimeError("the server was not stopped")
        command = self.command()
        # Every process of the server inherits this pipe: it ends when the last of them has ended.
        self._alive, inherited = os.pipe()
        with (self.directory / "log").open("wb") as out:
            process = subprocess.Popen(command, stdout=out, pass_fds=[inherited], **self._child)
        os.close(inherited)
        # If this process is killed it stops no server any more, but it closes a pipe.
        watch = ["/bin/sh", "-c", self.watch, str(process.pid), str(self.directory)]
        self._watch = subprocess.Popen(watch, stdin=subprocess.PIPE, **self._child)
        self._process = process
        deadline = time.monotonic() + self.longest
        while not self.is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                self._end(signal.SIGKILL)
                raise RuntimeError(f"{command[0]} did not start:\n{self.said()}")
            time.sleep(0.002)

    def stop(self) -> None:
        """Shut down in order."""
        self._end(self.orderly)

    def kill(self) -> None:
        """Crash; all of its processes are gone when this returns."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            ended = select.poll()
            ended.register(self._alive)
            if not ended.poll(self.longest * 1000):
                self._process.kill()
            self._process.wait()
            self._process = None
            os.close(self._alive)
            self._watch.communicate(b"\n")


class LocalBroker(LocalServer):
    """One that is known by its answer, and by what is in its log once it listens."""

    ready: ClassVar[str]
    url = ""

    @abstractmethod
    def answers(self, probe: socket.socket) -> bool:
        """Whether it is this kind of server that answers."""

    def located(self, url: str) -> None:
        self.url = url

    def is_ready(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0) as probe:
            # At a port of its own: another server's is where this one is about to end.
            return self.answers(probe) and self.ready in self.said()
        return False
