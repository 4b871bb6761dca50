"""Work queues in brokers: jobs are neither lost nor done by two at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast
from uuid import uuid4

import anyio
import pytest

from eventsource_anyio import StorageError, StoreClosedError
from eventsource_anyio.bus import nats_work_queue, redis_work_queue
from eventsource_anyio.bus.nats_connection import Answer
from eventsource_anyio.bus.nats_work_queue import NATSWorkQueue
from eventsource_anyio.bus.redis_work_queue import RedisWorkQueue
from eventsource_anyio.bus.work_queue import WorkQueue, WorkQueueStatistics
from eventsource_anyio.testing import cancel_at_every_checkpoint
from eventsource_anyio.testing.nats import NATSServer, nats_binary
from eventsource_anyio.testing.redis import RedisServer, redis_binary

SECONDS = 30.0
MakeQueue = Callable[..., WorkQueue]
QUEUES: dict[str, Any] = {"nats": NATSWorkQueue, "redis": RedisWorkQueue}


def queues(url: str) -> MakeQueue:
    prefix = uuid4().hex
    kind = QUEUES[url.partition(":")[0]]

    def make(**options: float) -> WorkQueue:
        given: dict[str, float] = {"retry_after": 0.0, **options}
        queue: WorkQueue = kind(url, "jobs", prefix=prefix, **given)
        return queue

    return make


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker looks more often than once a second for jobs that were given back."""
    for queue in (nats_work_queue, redis_work_queue):
        monkeypatch.setattr(queue, "_WAIT", 0.1)


@pytest.fixture(params=sorted(QUEUES))
def make_queue(request: pytest.FixtureRequest) -> MakeQueue:
    return queues(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture(params=sorted(QUEUES))
def own_server(request: pytest.FixtureRequest) -> Iterator[NATSServer | RedisServer]:
    server: NATSServer | RedisServer
    if request.param == "nats" and (binary := nats_binary()):
        server = NATSServer(binary)
    elif request.param == "redis" and (binary := redis_binary()):
        server = RedisServer(binary)
    else:
        pytest.skip(f"no {request.param}-server, to be killed")
    with server:
        yield server


async def test_each_job_is_done_by_one_worker(make_queue):
    done: list[bytes] = []
    async with make_queue() as queue, make_queue() as another:

        async def work(queue: WorkQueue) -> None:
            while len(done) < 100:
                with anyio.move_on_after(SECONDS if len(done) < 90 else 0.2):
                    async with queue.receive() as job:
                        done.append(job.payload)
                        assert job.attempt == 1

        async with anyio.create_task_group() as tasks:
            for one in (queue, queue, another, another):
                tasks.start_soon(work, one)
            for number in range(50):
                await queue.add(b"%d" % number, b"more %d" % number)
        assert await queue.statistics() == WorkQueueStatistics(0, 0, 0)
    assert len(set(done)) == len(done) == 100


async def test_jobs_wait_for_workers_and_are_counted(make_queue):
    async with make_queue() as queue:
        await queue.add(b"1", b"2", b"3")
        await queue.add()
        async with queue.receive() as job:
            assert job.payload == b"1"
            assert await queue.statistics() == WorkQueueStatistics(2, 1, 0)
        assert await queue.statistics() == WorkQueueStatistics(2, 0, 0)
        with pytest.raises(TypeError, match="bytes"):
            await queue.add("text")
    with pytest.raises(StoreClosedError, match="WorkQueue is not open"):
        await queue.add(b"4")


async def test_a_job_that_fails_is_tried_again_and_then_given_up(make_queue):
    attempts = []
    async with make_queue(attempts=3) as queue:
        await queue.add(b"bad", b"good")
        while (await queue.statistics()).dead == 0:
            with anyio.fail_after(SECONDS):
                try:
                    async with queue.receive() as job:
                        if job.payload == b"bad":
                            attempts.append(job.attempt)
                            raise KeyError("it cannot")
                except KeyError:
                    pass
        assert attempts == [1, 2, 3]
        (letter,) = await queue.dead_letters()
        assert (letter.payload, letter.attempts, letter.error) == (
            b"bad",
            3,
            "KeyError: 'it cannot'",
        )
        assert await queue.retry_dead_letters("1-1") == 0
        assert await queue.retry_dead_letters(letter.job_id) == 1
        assert await queue.dead_letters() == []
        with anyio.fail_after(SECONDS):
            while True:
                async with queue.receive() as job:
                    if job.payload == b"bad":
                        assert job.attempt == 1
                        break
        assert await queue.statistics() == WorkQueueStatistics(0, 0, 0)


async def test_dead_letters_are_retried_or_discarded(make_queue):
    async with make_queue(attempts=1) as queue:
        await queue.add(b"1", b"2", b"3")
        for _ in range(3):
            with pytest.raises(KeyError):
                async with queue.receive():
                    raise KeyError
        first, *_ = await queue.dead_letters()
        assert await queue.discard_dead_letters(first.job_id) == 1
        assert await queue.retry_dead_letters() == 2
        assert await queue.retry_dead_letters() == await queue.discard_dead_letters() == 0
        assert await queue.statistics() == WorkQueueStatistics(2, 0, 0)


async def test_a_pause_comes_before_the_next_attempt(make_queue):
    async with make_queue(retry_after=0.5) as queue:
        await queue.add(b"bad")
        with pytest.raises(KeyError):
            async with queue.receive():
                raise KeyError
        failed = anyio.current_time()
        with anyio.fail_after(SECONDS):
            async with queue.receive() as job:
                assert job.attempt == 2
                assert anyio.current_time() - failed >= 0.45


async def test_a_job_whose_worker_has_died_is_given_to_another(make_queue):
    async with (
        make_queue(lease=0.3, attempts=2) as dead,
        make_queue(lease=0.3, attempts=2) as queue,
    ):
        await queue.add(b"job")
        for attempt in (1, 2):
            with anyio.fail_after(SECONDS):
                abandoned = await dead.receive().__aenter__()
            assert abandoned.attempt == attempt
        with anyio.fail_after(SECONDS):
            while not await queue.dead_letters():
                with anyio.move_on_after(0.1):
                    async with queue.receive():
                        raise AssertionError("it has had all of its attempts")
        (letter,) = await queue.dead_letters()
        assert "within the lease" in letter.error


async def test_a_job_that_goes_on_keeps_its_lease(make_queue):
    async with make_queue(lease=0.4) as queue, make_queue(lease=0.4) as other:
        await queue.add(b"job")
        async with queue.receive() as job:
            for _ in range(8):
                with anyio.move_on_after(0.1):
                    async with other.receive():
                        raise AssertionError("it was taken from who extends it")
                await queue.extend(job)
                assert (await queue.statistics()).active == 1
        assert await queue.statistics() == WorkQueueStatistics(0, 0, 0)


async def test_who_was_too_slow_does_not_take_the_job_from_the_other(make_queue):
    async with make_queue(lease=0.5) as slow, make_queue(lease=0.5) as other:
        await slow.add(b"job")
        with pytest.raises(KeyError):
            async with slow.receive() as late:
                await anyio.sleep(0.55)
                with anyio.fail_after(SECONDS):
                    taken = await other.receive().__aenter__()
                assert taken.payload == late.payload
                raise KeyError  # it gives back what is not its own any more
        if isinstance(other, RedisWorkQueue):
            pending = ("XPENDING", other._jobs, "workers", "-", "+", 10)
            (reply,) = await other._connections.call(pending)
            assert [one[1].decode() for one in cast("list[list[bytes]]", reply)] == [other._worker]
        with anyio.move_on_after(0.1):
            async with slow.receive():
                raise AssertionError("somebody has it")
        assert await other.statistics() == WorkQueueStatistics(0, 1, 0)


async def test_cancelled_anywhere_a_job_is_neither_lost_nor_an_attempt(make_queue):
    done = 0
    async with make_queue(lease=0.2) as queue:

        async def work() -> None:
            nonlocal done
            await queue.add(b"job")
            async with queue.receive() as job:
                await anyio.lowlevel.checkpoint()
                assert job.attempt <= 2  # one that was on its way here is given out again
            done += 1

        async def check(_: None) -> None:
            with anyio.fail_after(SECONDS):
                while (await queue.statistics()) != WorkQueueStatistics(0, 0, 0):
                    async with queue.receive() as job:
                        assert job.payload == b"job"
            assert await queue.dead_letters() == []

        assert await cancel_at_every_checkpoint(work, check) >= 3
    assert done


async def test_a_cancelled_job_is_given_to_another_at_once(make_queue):
    async with make_queue(lease=60, attempts=1) as queue:
        await queue.add(b"job")
        with anyio.CancelScope() as scope:
            async with queue.receive():
                scope.cancel()
                await anyio.sleep_forever()
        with anyio.fail_after(10):
            async with queue.receive() as job:
                assert job.attempt == 1


async def test_a_server_that_fails_is_waited_for(own_server):
    make_queue = queues(own_server.url)
    async with make_queue(lease=0.5) as queue:
        await queue.add(b"1")
        own_server.kill()
        with pytest.raises(StorageError):
            await queue.add(b"2")
        payloads = []

        async def work() -> None:
            async with queue.receive() as job:
                payloads.append(job.payload)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(work)
            await anyio.sleep(0.1)
            own_server.start()
        assert payloads == [b"1"]
        own_server.kill()
        own_server.lose_everything()
        own_server.start()
        await queue.add(b"3")
        with anyio.fail_after(SECONDS):
            await work()
        assert payloads == [b"1", b"3"]


async def test_the_queue_may_be_gone(make_queue):
    async with make_queue() as queue, anyio.create_task_group() as tasks:
        received = []

        async def work() -> None:
            async with queue.receive() as job:
                received.append(job.payload)

        tasks.start_soon(work)
        await anyio.wait_all_tasks_blocked()
        if isinstance(queue, RedisWorkQueue):
            await queue._connections.call(("DEL", queue._jobs))
        else:
            delete = f"CONSUMER.DELETE.{queue._stream}.workers"
            await queue._session.run(queue._connection.api, delete, {}, Answer)
        await queue.add(b"job")
    assert received == [b"job"]


@pytest.mark.parametrize("option", ["lease", "attempts", "retry_after"])
def test_wrong_options_are_refused(option):
    for url in ("nats://localhost", "redis://localhost"):
        with pytest.raises(ValueError, match=option):
            queues(url)(**{option: -1})
