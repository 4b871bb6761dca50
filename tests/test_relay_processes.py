"""Relays in processes of their own, killed and paused: what they say is what was delivered."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

from eventsource_anyio import ANY, EventStore, OutboxMessage
from eventsource_anyio.relay import OutboxRelay
from eventsource_anyio.relay.lease import COLLECTION
from eventsource_anyio.repositories.outbox import StoredMessage
from eventsource_anyio.testing.samples import Happened
from tests.every_store import make_store, open_store
from tests.read_models import until
from tests.receiving import Receiver, add, pending, running

__all__ = ["make_store", "open_store"]

if sys.platform == "win32":
    pytest.skip("needs signals", allow_module_level=True)

SCRIPT = Path(__file__).with_name("relay_worker.py")
LEASE = 0.4


@pytest.fixture(params=["SQLite", "PostgreSQL"])
def which(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def database(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if which == "SQLite":
        return str(tmp_path / "events.db")
    return str(request.getfixturevalue("migrated_dsn"))


class Worker:
    """A process, running `relay_worker.py`."""

    def __init__(self, process: Process) -> None:
        assert process.stdout is not None
        self.process = process
        self._said = BufferedByteReceiveStream(process.stdout)

    async def said(self, begin: str) -> str:
        """The next line that begins so, without that; empty once it has ended."""
        try:
            while True:
                line = (await self._said.receive_until(b"\n", 65536)).decode()
                if line.startswith(begin):
                    return line.removeprefix(begin).strip()
        except (anyio.EndOfStream, anyio.IncompleteRead):
            return ""


Start = Callable[..., AbstractAsyncContextManager[Worker]]


@pytest.fixture
def start(anyio_backend: tuple[str, dict[str, Any]], database: str) -> Start:
    @asynccontextmanager
    async def started(mode: str, lease: float, nth: int = 0) -> AsyncIterator[Worker]:
        backend, options = anyio_backend
        command = [sys.executable, str(SCRIPT), mode, database, backend, json.dumps(options)]
        command += map(str, (lease, nth))
        async with await anyio.open_process(command, stderr=None) as process:
            try:
                yield Worker(process)
            finally:
                if process.returncode is None:
                    process.kill()

    return started


def deduplicated(lines: list[str]) -> dict[str, list[int]]:
    """What each key or stream has got, if the receiver knows the ids."""
    found: dict[str, list[int]] = {}
    known: set[str] = set()
    for line in lines:
        id_, key, number = line.split()
        if id_ not in known:
            known.add(id_)
            found.setdefault(key, []).append(int(number))
    return found


@pytest.mark.parametrize("mode", ["outbox", "events"])
async def test_killed_between_delivery_and_checkpoint_it_is_delivered_again(
    store: EventStore, start: Start, mode: str
):
    """Again and again, each time at another delivery; the next process has to take over."""
    for number in range(1, 13):
        for key in "abc":
            if mode == "outbox":
                await store.outbox.add(_message(key, number))
            else:
                await store.append_events(key, "Thing", [Happened(number)], ANY)
    keys = "abc" if mode == "outbox" else ("Thing-a", "Thing-b", "Thing-c")
    expected = {key: list(range(1, 13)) for key in keys}
    lines: list[str] = []
    with anyio.fail_after(100):
        for nth in (1, 3):
            async with start(mode, LEASE, nth) as worker:
                while line := await worker.said("got "):
                    lines.append(line)
                assert await worker.process.wait() == 9
        assert len(lines) > len(set(lines))  # some came twice
        assert deduplicated(lines) != expected
        async with start(mode, LEASE) as worker:
            while deduplicated(lines) != expected:
                line = await worker.said("got ")
                assert line, "it has ended"
                lines.append(line)


def _message(key: str, number: int) -> OutboxMessage:
    return OutboxMessage("t", str(number).encode(), key)


@pytest.mark.parametrize("kill", [True, False])
async def test_a_relay_that_is_silent_is_taken_over_from_and_removes_nothing(
    store: EventStore, start: Start, kill: bool
):
    """It is killed, or paused in the middle of a delivery. The one that takes over finds the
    receiver away, so the message has to stay, whatever the other one does when it wakes up."""
    away = True

    async def before(stored: StoredMessage) -> None:
        if away:
            raise ConnectionError

    receiver = Receiver(before)
    heir = OutboxRelay(store, receiver, lease=LEASE, poll_every=0.02)
    await add(store, "a", 1)
    with anyio.fail_after(60):
        # Its own lease is longer, so that it is not writing when it is paused.
        async with start("outbox", 60, -1) as worker:
            assert await worker.said("got ")
            owner = await _owner(store)
            async with running(heir):
                assert heir.statistics().state == "waiting"
                worker.process.send_signal(signal.SIGKILL if kill else signal.SIGSTOP)
                await until(lambda: receiver.calls)
                assert await _owner(store) not in (owner, None)
                if not kill:
                    assert worker.process.stdin is not None
                    worker.process.send_signal(signal.SIGCONT)
                    await worker.process.stdin.send(b"go on\n")
                    while "taken over" not in await worker.said("log "):
                        pass
                    assert worker.process.returncode is None
                assert await pending(store) == ["a:1"]
                away = False
                await receiver.has("a:1", *await add(store, "a", 2))
    assert receiver.of("a") == ["a:1", "a:2"]


async def _owner(store: EventStore) -> object:
    document = await store.documents.get(COLLECTION, "outbox")
    assert document is not None
    assert isinstance(document.value, dict)
    return document.value["owner"]
