"""Several processes share a subscription over a broker; real ones, killed and paused."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
import pytest
from anyio.abc import Process

from eventsource_anyio import StoredEvent
from eventsource_anyio.bus.partitioned import BrokerEventBus
from eventsource_anyio.testing.buses import stored

from .bus_worker import bus_of

if sys.platform == "win32":
    pytest.skip("needs signals", allow_module_level=True)

SCRIPT = Path(__file__).with_name("bus_worker.py")
KILLED = int(os.environ.get("EVENTSOURCE_STRESS_SECONDS", "1"))  # so many times two processes
LEASE = 0.6


class Subscription:
    """The processes of one subscription, and what they say that they have handled."""

    def __init__(
        self, url: str, partitions: int, backend: tuple[str, dict[str, Any]], record: Path
    ) -> None:
        self.url, self.name, self.partitions = url, uuid4().hex, partitions
        self._backend = backend
        self._record = record / self.name
        self._record.touch()

    def bus(self) -> BrokerEventBus:
        return bus_of(self.url, self.name, self.partitions)

    @asynccontextmanager
    async def worker(self, pause: float = 0.0) -> AsyncIterator[Process]:
        backend, options = self._backend
        command = [sys.executable, str(SCRIPT), self.url, self.name, backend, json.dumps(options)]
        command += [*map(str, (self.partitions, LEASE, pause)), str(self._record)]
        async with await anyio.open_process(command, stderr=None) as process:
            try:
                assert process.stdout is not None
                with anyio.fail_after(30):
                    assert await process.stdout.receive() == b"started\n"
                yield process
            finally:
                if process.returncode is None:
                    process.kill()

    async def handled(self) -> list[tuple[int, str, int]]:
        """By which process, of which stream, which version; in order."""
        lines = [line.split() for line in self._record.read_text().splitlines()]
        return [(int(process), stream, int(version)) for process, stream, version in lines]

    async def until(self, enough: Callable[[list[tuple[int, str, int]]], object]) -> None:
        with anyio.fail_after(60):
            while not enough(await self.handled()):  # noqa: ASYNC110 - nobody tells of it
                await anyio.sleep(0.02)


@pytest.fixture(params=["nats", "redis"])
def subscribe(
    request: pytest.FixtureRequest, anyio_backend: tuple[str, dict[str, Any]], tmp_path: Path
) -> Callable[[int], Subscription]:
    url = request.getfixturevalue(f"{request.param}_url")
    return lambda partitions: Subscription(url, partitions, anyio_backend, tmp_path)


def first_times(handled: list[tuple[int, str, int]]) -> dict[str, list[int]]:
    """The versions of each stream in the order in which they were handled for the first time."""
    found: dict[str, dict[int, None]] = defaultdict(dict)
    for _, stream, version in handled:
        found[stream].setdefault(version)
    return {stream: list(versions) for stream, versions in found.items()}


async def test_processes_that_are_killed_at_random_miss_nothing_and_keep_the_order(
    subscribe, event_store
):
    subscription, published, over = subscribe(8), 0, False

    async def publish() -> None:
        nonlocal published
        async with subscription.bus() as bus:
            while not over:
                batch: list[StoredEvent] = []
                for stream in range(20):
                    batch += await stored(event_store, 1, str(stream))
                await bus.publish(batch)
                published += 1
                await anyio.sleep(0.01)

    async def work() -> None:
        for _ in range(KILLED):
            async with subscription.worker() as process:
                await subscription.until(lambda handled: process.pid in {one[0] for one in handled})
                process.kill()

    async with subscription.worker():  # this one is never killed
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(publish)
            async with anyio.create_task_group() as workers:
                workers.start_soon(work)
                workers.start_soon(work)
            over = True
        await subscription.until(lambda handled: len(set_of(handled)) == published * 20)
    handled = await subscription.handled()
    assert len({process for process, _, _ in handled}) > 2 * KILLED
    whole = list(range(1, published + 1))
    assert first_times(handled) == {f"Thing-{one}": whole for one in range(20)}


def set_of(handled: list[tuple[int, str, int]]) -> set[tuple[str, int]]:
    return {(stream, version) for _, stream, version in handled}


async def test_a_process_that_was_paused_and_taken_over_from_handles_no_more(
    subscribe, event_store
):
    subscription = subscribe(1)
    async with subscription.bus() as bus, subscription.worker(0.005) as paused:
        await bus.publish(await stored(event_store, 200))
        await subscription.until(lambda handled: len(handled) > 10)
        paused.send_signal(signal.SIGSTOP)
        async with subscription.worker() as other:
            await subscription.until(lambda handled: len(set_of(handled)) == 200)
            before = len(await subscription.handled())
            paused.send_signal(signal.SIGCONT)
            await bus.publish(await stored(event_store, 50))
            await subscription.until(lambda handled: len(set_of(handled)) == 250)
            await anyio.sleep(LEASE)  # what it would still handle it would have by now
            handled = await subscription.handled()
            # One it had begun with; from then on it belongs to the other one.
            late = [one for one in handled[before:] if one[0] == paused.pid]
            assert len(late) <= 1
            assert {one[0] for one in handled if one[2] > 200} == {other.pid}
    assert first_times(handled) == {"Thing-a": list(range(1, 251))}


async def test_a_process_that_comes_is_given_its_part_and_one_that_goes_leaves_it(
    subscribe, event_store
):
    subscription = subscribe(4)
    async with subscription.bus() as bus, subscription.worker() as first:

        async def publish(enough: Callable[[set[int]], object]) -> None:
            """Until the processes that handle it are enough."""
            with anyio.fail_after(30):
                while True:
                    count = len(await subscription.handled())
                    for stream in range(20):
                        await bus.publish(await stored(event_store, 1, str(stream)))
                    await subscription.until(lambda now, enough=count + 20: len(now) >= enough)
                    processes = {one[0] for one in (await subscription.handled())[count:]}
                    if enough(processes):
                        return

        await publish(lambda processes: processes == {first.pid})
        async with subscription.worker() as second:
            await publish(lambda processes: processes == {first.pid, second.pid})
            second.send_signal(signal.SIGINT)  # in order, so nobody waits for its lease
            await second.wait()
        await publish(lambda processes: processes == {first.pid})
        handled = await subscription.handled()
    for versions in first_times(handled).values():
        assert versions == list(range(1, len(versions) + 1))
