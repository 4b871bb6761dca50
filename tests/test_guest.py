"""asyncio as a guest of Trio; and on asyncio, that the same calls mean the same."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import selectors
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.util import find_spec

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from eventsource_anyio import guest as guest_module
from eventsource_anyio.guest import Guest
from eventsource_anyio.testing import cancel_at_every_checkpoint

trio_only = pytest.mark.parametrize("anyio_backend", ["trio"])
needs_trio = pytest.mark.skipif(find_spec("trio") is None, reason="Trio is not installed")
variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")


@pytest.fixture
async def guest():
    async with Guest() as guest:
        yield guest


async def answer(value: object = 42) -> object:
    await asyncio.sleep(0)
    return value


async def for_ever() -> None:
    await asyncio.get_running_loop().create_future()


def library() -> str:
    return type(anyio.lowlevel.current_token().native_token).__name__


async def all_waiting() -> None:
    """Until every task waits, on either side: also what asyncio has at hand has been done."""
    for _ in range(3):
        await anyio.wait_all_tasks_blocked()


# -- results and errors -----------------------------------------------------------------------


async def test_a_result_comes_back(guest):
    async def at_once() -> str:
        return "at once"

    assert await guest.run(at_once()) == "at once"
    assert await guest.run(answer()) == 42
    assert await guest.run(answer(None)) is None


async def test_an_error_comes_as_it_is_and_shows_the_frames_of_both_sides(guest):
    error = KeyError("mine")

    async def the_users_function() -> None:
        await answer()
        raise error

    async def the_caller() -> None:
        await guest.run(the_users_function())

    with pytest.raises(KeyError) as caught:
        await the_caller()
    assert caught.value is error
    assert error.__context__ is None
    frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    assert frames[-1] == "the_users_function"
    assert "the_caller" in frames
    assert len(frames) <= 5


async def test_an_error_keeps_nothing_alive_in_a_cycle(guest):
    class Held:
        pass

    async def fails(held: Held) -> None:
        raise KeyError("mine")

    held = Held()
    gone = weakref.ref(held)
    gc.disable()
    try:
        with suppress(KeyError):
            await guest.run(fails(held))
        del held
        assert gone() is None
    finally:
        gc.enable()


async def test_a_group_of_the_users_own_is_left_as_it_is(guest):
    async def fails() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(answer())
            raise KeyError("inside")

    with pytest.raises(ExceptionGroup) as caught:
        await guest.run(fails())
    assert [type(error) for error in caught.value.exceptions] == [KeyError]


@trio_only
@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=["exit", "interrupt"])
@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
async def test_what_asyncio_lets_through_its_loop_reaches_the_call_that_raised_it(
    guest, error, later, caplog
):
    async def fails() -> None:
        if later:
            await asyncio.sleep(0.001)
        raise error

    outcomes: list[object] = []

    async def other() -> None:
        outcomes.append(await guest.run(asyncio.sleep(0.01, "undisturbed")))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(other)
        try:
            await guest.run(fails())
        except BaseException as raised:  # noqa: BLE001
            outcomes.append(raised)
    assert outcomes in ([error, "undisturbed"], ["undisturbed", error])
    assert caplog.records == []


@trio_only
async def test_what_nobody_waits_for_is_reported_and_the_loop_goes_on(guest):
    reported: list[object] = []
    guest.loop.set_exception_handler(lambda _, context: reported.append(context["exception"]))

    def fails(error: BaseException) -> None:
        raise error

    first, second = SystemExit(3), KeyError("mine")
    guest.loop.call_soon_threadsafe(fails, first)
    guest.loop.call_soon_threadsafe(fails, second)
    assert await guest.run(answer()) == 42
    assert reported == [first, second]


async def test_context_variables_go_in_and_come_out(guest):
    other: contextvars.ContextVar[str] = contextvars.ContextVar("other")

    async def sees(waits: bool) -> str:
        seen = variable.get()
        if waits:
            await answer()
        variable.set(f"set {waits}")
        other.set("new")
        return seen

    variable.set("from outside")
    assert await guest.run(sees(True)) == "from outside"
    assert (variable.get(), other.get()) == ("set True", "new")
    assert await guest.run(sees(False)) == "set True"
    assert variable.get() == "set False"


# -- which loop -------------------------------------------------------------------------------


async def test_inside_it_is_asyncio_and_outside_it_is_not(guest):
    outside = library()

    async def inside() -> tuple[object, str]:
        await asyncio.sleep(0)
        return asyncio.get_running_loop(), library()

    loop, name = await guest.run(inside())
    assert loop is guest.loop
    assert "Loop" in name
    assert library() == outside
    if outside == "TrioToken":
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()


async def test_anyio_works_inside(guest):
    async def inside() -> list[object]:
        found: list[object] = []
        async with anyio.create_task_group() as tasks:
            event = anyio.Event()
            tasks.start_soon(event.wait)
            await anyio.sleep(0)  # noqa: ASYNC115  (this very call is what is tested)
            event.set()
        found.append(await anyio.to_thread.run_sync(lambda: "from a thread"))
        with anyio.move_on_after(0.001) as scope:
            await anyio.sleep_forever()
        found.append(scope.cancelled_caught)
        try:
            async with asyncio.timeout(0.001):
                await for_ever()
        except TimeoutError:
            found.append("timeout")
        async with asyncio.TaskGroup() as group:
            one = group.create_task(answer(1))
        found.append(one.result())
        return found

    assert await guest.run(inside()) == ["from a thread", True, "timeout", 1]


async def test_a_call_inside_a_call_is_awaiting(guest):
    async def inside() -> tuple[object, bool]:
        before = asyncio.current_task()

        async def within() -> object:
            await asyncio.sleep(0)
            return asyncio.current_task()

        return await guest.run(answer()), await guest.run(within()) is before

    assert await guest.run(inside()) == (42, True)


async def test_callbacks_of_the_loop_may_use_what_belongs_to_the_host(guest):
    """As a listener for PostgreSQL's NOTIFY does."""
    event = anyio.Event()
    send, receive = anyio.create_memory_object_stream[str](1)

    async def listen() -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(event.set)
        loop.call_later(0.001, send.send_nowait, "hint")

    with send, receive:
        await guest.run(listen())
        await event.wait()
        assert await receive.receive() == "hint"


@trio_only
async def test_two_guests_know_nothing_of_each_other(guest):
    async with Guest() as other:
        assert other.loop is not guest.loop

        async def inside() -> str:
            coroutine = answer()
            with pytest.raises(RuntimeError, match="opened by another event loop"):
                await other.run(coroutine)
            return "refused"

        assert await guest.run(inside()) == "refused"
        assert await other.run(answer()) == await guest.run(answer())


@trio_only
async def test_another_thread_is_told_so(guest):
    def elsewhere() -> None:
        anyio.run(guest.run, answer(), backend="trio")

    with pytest.raises(RuntimeError, match="opened by another event loop"):
        await anyio.to_thread.run_sync(elsewhere)


# -- cancellation -----------------------------------------------------------------------------


async def test_a_deadline_cancels_the_coroutine_and_waits_for_its_cleanup(guest):
    seen: list[str] = []

    async def cleans_up() -> None:
        try:
            await for_ever()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            seen.append("cleaned up")
            raise

    with anyio.move_on_after(0.001) as scope:
        await guest.run(cleans_up())
    assert scope.cancelled_caught
    if library() == "TrioToken":  # anyio's cancellation on asyncio interrupts clean-up again
        assert seen == ["cleaned up"]


async def test_cancelled_before_it_starts_it_runs_to_where_it_first_waits(guest):
    """As it does on asyncio: `finally: await guest.run(connection.close())` begins."""
    seen: list[str] = []

    async def begins() -> None:
        seen.append("began")
        await asyncio.sleep(0)
        seen.append("went on")

    with anyio.CancelScope() as scope:
        scope.cancel()
        await guest.run(begins())
    assert scope.cancelled_caught
    assert seen == ["began"]


@trio_only
async def test_a_result_in_spite_of_the_cancellation_is_returned(guest):
    async def finishes() -> str:
        try:
            await for_ever()
        except asyncio.CancelledError:
            await asyncio.sleep(0.001)
        return "stored all the same"

    result = None
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_cancel_when_blocked, scope)
            result = await guest.run(finishes())
            assert scope.cancel_called
            await anyio.lowlevel.checkpoint()
    assert result == "stored all the same"
    assert scope.cancelled_caught


async def _cancel_when_blocked(scope: anyio.CancelScope) -> None:
    await anyio.wait_all_tasks_blocked()
    scope.cancel()


@trio_only
async def test_an_error_in_spite_of_the_cancellation_is_raised(guest):
    async def fails() -> None:
        try:
            await for_ever()
        except asyncio.CancelledError:
            raise KeyError("while cleaning up") from None

    with anyio.move_on_after(0.001) as scope:
        with pytest.raises(KeyError, match="while cleaning up"):
            await guest.run(fails())
    assert scope.cancel_called


@trio_only
async def test_the_outcome_arrives_with_the_cancellation(guest):
    """The task ends, and is cancelled by Trio in the same moment: it has ended."""
    future: asyncio.Future[str] = guest.loop.create_future()

    async def waits() -> str:
        return await future

    def both() -> None:
        future.set_result("there")
        scope.cancel()

    result = None
    with anyio.CancelScope() as scope:
        guest.loop.call_later(0.001, both)
        result = await guest.run(waits())
    assert result == "there"


@trio_only
async def test_a_cancellation_that_was_passed_on_is_not_taken_back_by_a_shield(guest):
    async def shields() -> None:
        try:
            await for_ever()
        finally:
            inner.shield = True

    with anyio.move_on_after(0.001) as outer:
        with anyio.CancelScope() as inner:
            await guest.run(shields())
    assert outer.cancelled_caught


@trio_only
async def test_asyncio_s_own_cancellation_is_an_error_that_shows_where(guest):
    async def the_library() -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_soon(task.cancel)
        await for_ever()

    with anyio.move_on_after(10) as scope:
        with pytest.raises(RuntimeError, match="not by its caller") as caught:
            await guest.run(the_library())
    assert not scope.cancelled_caught
    cause = caught.value.__cause__
    assert isinstance(cause, asyncio.CancelledError)
    assert "the_library" in "".join(traceback.format_exception(cause))


@trio_only
async def test_a_task_that_is_cancelled_before_its_first_step_does_not_hang(guest):
    def cancel_all() -> None:
        for task in asyncio.all_tasks():
            task.cancel()

    guest.loop.call_soon(cancel_all)  # runs in the tick that would start the task
    with pytest.raises(RuntimeError, match="not by its caller"):
        await guest.run(answer())


async def test_cancelled_at_every_checkpoint_the_work_is_whole(guest):
    begun = ended = 0

    @asynccontextmanager
    async def transaction() -> AsyncIterator[None]:
        nonlocal begun, ended
        begun += 1
        try:
            yield
        finally:
            ended += 1

    async def work() -> str:
        async with transaction():
            await asyncio.sleep(0)
            async with transaction():
                await asyncio.sleep(0.0001)
        return "done"

    async def operation() -> object:
        return await guest.run(work()) + await guest.run(work())

    async def afterwards(result: object) -> None:
        assert begun == ended
        assert result in (None, "donedone")
        assert await guest.run(answer()) == 42

    assert await cancel_at_every_checkpoint(operation, afterwards) >= 2


@trio_only
async def test_every_call_is_a_checkpoint_of_trio_s(guest):
    """Also one whose coroutine waits for nothing outside: a loop of them would never end."""
    calls = 0
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_cancel_soon, scope)
            while calls < 1000:
                calls += 1
                await guest.run(answer())
    assert scope.cancelled_caught
    assert calls < 10


async def _cancel_soon(scope: anyio.CancelScope) -> None:
    await anyio.lowlevel.checkpoint()
    scope.cancel()


async def test_many_in_flight_are_cancelled_together(guest):
    ended = 0

    async def work() -> None:
        nonlocal ended
        try:
            await for_ever()
        finally:
            ended += 1

    async with anyio.create_task_group() as tasks:
        for _ in range(100):
            tasks.start_soon(guest.run, work())
        await all_waiting()
        tasks.cancel_scope.cancel()
    assert ended == 100


# -- many, and time ---------------------------------------------------------------------------


async def test_a_thousand_at_once(guest):
    results: list[int] = []

    async def one(number: int) -> None:
        async def work() -> int:
            await asyncio.sleep(number % 10 / 10_000)
            return number

        results.append(await guest.run(work()))

    async with anyio.create_task_group() as tasks:
        for number in range(1000):
            tasks.start_soon(one, number)
    assert sorted(results) == list(range(1000))


@trio_only
async def test_asyncio_that_never_waits_leaves_trio_its_turns(guest):
    async def busy(until: anyio.Event) -> int:
        turns = 0
        while not until.is_set():
            await asyncio.sleep(0)
            turns += 1
        return turns

    until = anyio.Event()
    turns: list[int] = []

    async def run() -> None:
        turns.append(await guest.run(busy(until)))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        until.set()
    assert turns[0] > 20


@trio_only
async def test_a_loop_that_somebody_stops_goes_on(guest):
    async def stops() -> object:
        asyncio.get_running_loop().stop()
        return await answer()

    with anyio.fail_after(5):
        assert await guest.run(stops()) == 42


@needs_trio
def test_idle_is_idle_and_timers_are_exact(monkeypatch):
    """On Trio's mock clock, on which asyncio's timers then are."""
    import trio
    from trio.testing import MockClock

    selects = 0
    select = guest_module._Selector.select

    def counted(self, timeout=None):
        nonlocal selects
        selects += 1
        return select(self, timeout)

    monkeypatch.setattr(guest_module._Selector, "select", counted)

    async def main() -> None:
        nonlocal selects
        async with Guest() as guest:
            started = trio.current_time()
            selects = 0
            await guest.run(asyncio.sleep(1000))
            assert trio.current_time() - started == pytest.approx(1000, abs=0.001)
            assert selects <= 6

            async def gives_up() -> None:
                async with asyncio.timeout(10):
                    await for_ever()

            started = trio.current_time()
            with pytest.raises(TimeoutError):
                await guest.run(gives_up())
            assert trio.current_time() - started == pytest.approx(10, abs=0.001)
            # A timer that was called off, and then an earlier one, and then a later one.
            guest.loop.call_later(5, print).cancel()
            started = trio.current_time()
            async with trio.open_nursery() as nursery:
                for seconds in (30, 3, 20):
                    nursery.start_soon(guest.run, asyncio.sleep(seconds))
            assert trio.current_time() - started == pytest.approx(30, abs=0.001)
            selects = 0
            await trio.sleep(10_000)
            assert selects <= 3

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def test_timers_fire_in_real_time(guest):
    started = anyio.current_time()
    with anyio.fail_after(5):
        await guest.run(asyncio.sleep(0.02))
    assert anyio.current_time() - started >= 0.019


# -- threads, sockets, libraries --------------------------------------------------------------


async def test_threads_wake_the_loop(guest):
    loop = guest.loop

    async def waits() -> str:
        future: asyncio.Future[str] = loop.create_future()
        thread = threading.Thread(
            target=loop.call_soon_threadsafe, args=(future.set_result, "from a thread")
        )
        loop.call_later(0.001, thread.start)
        result = await future
        thread.join()
        more: str = await loop.run_in_executor(None, str, " and an executor")
        return result + more

    with anyio.fail_after(5):
        assert await guest.run(waits()) == "from a thread and an executor"


@trio_only
async def test_a_thread_wakes_an_idle_loop(guest):
    event = anyio.Event()
    await all_waiting()
    thread = threading.Thread(target=guest.loop.call_soon_threadsafe, args=(event.set,))
    thread.start()
    with anyio.fail_after(5):
        await event.wait()
    thread.join()


async def test_streams_over_sockets(guest):
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line.upper())
            await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await guest.run(asyncio.start_server(echo, "127.0.0.1", 0))
    host, port = server.sockets[0].getsockname()[:2]

    async def client(number: int) -> None:
        reader, writer = await guest.run(asyncio.open_connection(host, port))
        for line in range(5):
            writer.write(f"line {number} {line}\n".encode())
            await guest.run(writer.drain())
            assert await guest.run(reader.readline()) == f"LINE {number} {line}\n".encode()

        async def close() -> None:
            writer.close()
            await writer.wait_closed()

        await guest.run(close())

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            for number in range(10):
                tasks.start_soon(client, number)

    async def close() -> None:
        server.close()
        await server.wait_closed()

    await guest.run(close())


@pytest.mark.skipif(find_spec("aiosqlite") is None, reason="aiosqlite is not installed")
async def test_a_library_for_asyncio(guest, tmp_path):
    import aiosqlite

    async def counts(rows: int) -> int:
        async with aiosqlite.connect(tmp_path / "rows.db") as database:
            await database.execute("CREATE TABLE row (number)")
            await database.executemany("INSERT INTO row VALUES (?)", [(n,) for n in range(rows)])
            await database.commit()
            async with database.execute("SELECT count(*) FROM row") as cursor:
                found = await cursor.fetchone()
        assert found is not None
        return int(found[0])

    with anyio.fail_after(20):
        assert await guest.run(counts(1000)) == 1000


@trio_only
async def test_signals_stay_trio_s(guest):
    with pytest.raises(NotImplementedError, match="open_signal_receiver"):
        guest.loop.add_signal_handler(2, print)


# -- its block --------------------------------------------------------------------------------


async def test_outside_of_its_block_it_says_so():
    guest = Guest()
    for _ in range(2):
        for use in (lambda: guest.run(answer()), lambda: _loop_of(guest)):
            with pytest.raises(RuntimeError, match="async with Guest"):
                await use()
        async with guest:
            assert await guest.run(answer()) == 42
            with pytest.raises(RuntimeError, match="open already"):
                await guest.__aenter__()


async def _loop_of(guest: Guest) -> object:
    return guest.loop


@trio_only
async def test_the_end_cancels_what_is_pending_and_shuts_everything_down():
    seen: list[str] = []
    kept: list[object] = []

    async def background() -> None:
        try:
            await for_ever()
        finally:
            await asyncio.sleep(0.001)
            seen.append("task")

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            await asyncio.sleep(0)
            seen.append("generator")
            released.set()

    def job() -> None:
        released.wait()
        time.sleep(0.02)  # so that it is not done in time if nobody waits for it
        seen.append("thread")

    async def leaves_everything() -> None:
        iterator = numbers()
        await anext(iterator)
        kept.append(iterator)
        kept.append(asyncio.create_task(background()))
        kept.append(asyncio.get_running_loop().run_in_executor(None, job))

    released = threading.Event()
    threads = threading.active_count()
    async with Guest() as guest:
        loop = guest.loop
        await guest.run(leaves_everything())
        assert threading.active_count() > threads
    assert seen == ["task", "generator", "thread"]
    assert loop.is_closed()
    assert threading.active_count() == threads


@trio_only
async def test_the_end_is_not_cut_short_by_a_cancellation():
    seen: list[str] = []

    async def background() -> None:
        try:
            await for_ever()
        finally:
            await asyncio.sleep(0.001)
            seen.append("cleaned up")

    with anyio.CancelScope() as scope:
        async with Guest() as guest:
            loop = guest.loop
            pending = loop.create_task(background())
            await guest.run(answer())
            scope.cancel()
    assert seen == ["cleaned up"]
    assert pending.cancelled()
    assert loop.is_closed()


@trio_only
async def test_calls_in_flight_at_the_end_are_told(guest):
    outcomes: list[str] = []

    async def call(guest: Guest) -> None:
        try:
            await guest.run(for_ever())
        except RuntimeError as error:
            outcomes.append(str(error))

    async with anyio.create_task_group() as tasks:
        async with Guest() as other:
            tasks.start_soon(call, other)
            await all_waiting()
    assert len(outcomes) == 1
    assert "Guest was closed" in outcomes[0]


@trio_only
async def test_a_call_during_the_end_is_refused_on_trio_s_side_only():
    outcomes: list[object] = []
    closing, refused = anyio.Event(), asyncio.Event()

    async def background(guest: Guest) -> None:
        try:
            await for_ever()
        finally:
            outcomes.append(await guest.run(answer()))
            closing.set()
            await refused.wait()

    async def call(guest: Guest) -> None:
        await closing.wait()
        with pytest.raises(RuntimeError, match="not open"):
            await guest.run(answer())
        outcomes.append("refused")
        guest.loop.call_soon_threadsafe(refused.set)

    async with anyio.create_task_group() as tasks:
        async with Guest() as other:
            pending = other.loop.create_task(background(other))
            tasks.start_soon(call, other)
            await other.run(answer())
    assert outcomes == [42, "refused"]
    assert pending.cancelled()


@trio_only
async def test_the_body_s_error_comes_out_of_the_block_as_it_is():
    with pytest.raises(KeyError, match="mine"):
        async with Guest() as guest:
            await guest.run(answer())
            raise KeyError("mine")


@needs_trio
def test_a_task_that_will_not_end_is_named(caplog):
    import trio
    from trio.testing import MockClock

    async def stubborn() -> None:
        while not released.is_set():
            with suppress(asyncio.CancelledError):
                await for_ever()

    async def main() -> None:
        with pytest.raises(RuntimeError, match=r"could not be closed in time[\s\S]*stubborn"):
            async with Guest() as guest:
                loop = guest.loop
                pending.append(loop.create_task(stubborn()))
                await guest.run(answer())
        released.set()
        loop.call_soon_threadsafe(pending[0].cancel)
        with trio.move_on_after(1):
            await trio.sleep_forever()
        assert pending[0].done()
        loops.append(loop)

    released = threading.Event()
    pending: list[asyncio.Task[None]] = []
    loops: list[asyncio.AbstractEventLoop] = []
    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert loops[0].is_closed()
    assert caplog.records == []


@needs_trio
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="descriptors cannot be counted")
def test_one_trio_run_after_another_and_nothing_is_left():
    import trio

    shared = Guest()

    async def main() -> object:
        async with shared:
            return await shared.run(answer())

    trio.run(main)
    before = sorted(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        assert trio.run(main) == 42
    assert (sorted(os.listdir("/proc/self/fd")), threading.active_count()) == before


@needs_trio
@pytest.mark.parametrize(
    "interrupt",
    [
        "signal.raise_signal(signal.SIGINT)",
        "asyncio.get_running_loop().call_later(0.01, signal.raise_signal, signal.SIGINT)",
    ],
    ids=["at once", "later"],
)
def test_ctrl_c_ends_the_coroutine_and_then_the_program(interrupt):
    program = f"""if True:
        import asyncio, signal, trio
        from eventsource_anyio.guest import Guest

        # it is ignored where the tests run in the background of a shell
        signal.signal(signal.SIGINT, signal.default_int_handler)

        async def work():
            try:
                {interrupt}
                print("as it was")
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0)
                print("cleaned up")

        async def main():
            async with Guest() as guest:
                await guest.run(work())

        try:
            trio.run(main)
        except KeyboardInterrupt:
            print("interrupted")
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", "-c", program],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("as it was\ncleaned up\ninterrupted\n", "")


@trio_only
async def test_a_selector_that_cannot_be_waited_for_is_refused(monkeypatch):
    class Unpollable(selectors.SelectSelector):
        pass

    monkeypatch.setattr(guest_module, "_Selector", Unpollable)
    guest = Guest()
    with pytest.raises(RuntimeError, match="start_blocking_portal"):
        await guest.__aenter__()
    with pytest.raises(RuntimeError, match="not open"):
        await guest.run(answer())


def test_on_asyncio_it_does_not_import_trio():
    program = """if True:
        import asyncio, sys
        from eventsource_anyio.guest import Guest

        async def main():
            async with Guest() as guest:
                assert guest.loop is asyncio.get_running_loop()
                await guest.run(asyncio.sleep(0))

        asyncio.run(main())
        assert "trio" not in sys.modules
    """
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=30)
