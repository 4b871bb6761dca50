"""Any asyncio library on Trio: a stock asyncio loop, pumped by Trio in the same thread.

- On asyncio there is no second loop: running a coroutine is awaiting it.
- On Trio, asyncio's loop never blocks. Where it would wait, its selector ends the iteration, and
  Trio waits in its place: for the selector's own descriptor, which an epoll or a kqueue has, and
  for asyncio's next timer. So one thread waits in one place, and idle means idle.
- A *tick* is one such run of the loop. It happens inside a Trio task and never yields to Trio, so
  at any time either Trio's code runs or asyncio's; `ticking` says which.
- A call ends when its asyncio task has ended, never before: cancelled means that the task was asked
  to stop and has. What it did in spite of that, a result or an error, is the outcome.
- asyncio's clock is Trio's clock.
- Public interfaces only, of asyncio, Trio and sniffio. Trio is imported where it runs already.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from contextvars import copy_context
from math import inf
from threading import get_ident
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVar

from anyio.lowlevel import checkpoint, current_token

from .cleanup import shielded_cleanup

if TYPE_CHECKING:
    import trio

_ITERATIONS = 100  # of asyncio's loop, if it has work for as many, before Trio has its turn
_MISSING = object()

T = TypeVar("T")


class Guest:
    """Runs asyncio's coroutines, on asyncio and on Trio: `async with Guest() as guest`.

    On asyncio (and uvloop), `await guest.run(coroutine)` awaits it, and that is all. On Trio it
    runs the coroutine as a task of an asyncio loop that lives in the same thread, from the start of
    the block to its end.

    It has a block of its own, and is not made in passing for each Trio run, because its end has
    work to do: pending asyncio tasks are cancelled and waited for, generators and threads shut
    down, the loop is closed. That belongs where the owner of the connections ends: a store enters
    a guest in its own `async with`. Guests beside each other know nothing of each other.

    It puts no task group around your code. What pumps the loop is one Trio *system* task, which
    lives as long as the block; errors of your coroutines reach you, never that task.

    A guest belongs to the thread and the event loop that opened it. On Trio it needs a selector
    that can itself be waited for, as on Linux, macOS and the BSDs; on Windows it is refused.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pump: _Pump | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The asyncio loop that coroutines run on; on asyncio, the running one.

        Its callbacks run in this thread, so they may use what belongs to Trio as long as they need
        not wait: set an `anyio.Event`, `send_nowait` into a stream. In the other direction, from
        Trio's code, use `run` or `call_soon_threadsafe`: a plain `call_soon` wakes nobody up.
        """
        if self._loop is None:
            raise _not_open()
        return self._loop

    @property
    def pumps(self) -> bool:
        """Whether its coroutines run on a loop of its own: on Trio, and outside of `run`."""
        return self._pump is not None and not self._pump.ticking

    @property
    def inside(self) -> bool:
        """Whether the caller is asyncio code that `run` runs on Trio: no place to wait for Trio."""
        return self._pump is not None and self._pump.ticking

    async def __aenter__(self) -> Self:
        await checkpoint()
        if self._loop is not None:
            raise RuntimeError("this Guest is open already. Share it, or make another one.")
        token = current_token().native_token
        if isinstance(token, asyncio.AbstractEventLoop):
            self._loop = token
        else:
            self._pump = _Pump()
            self._loop = self._pump.loop
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            if self._pump is not None:
                await self._pump.close()
        finally:
            self._loop = self._pump = None

    async def run(self, coroutine: Coroutine[object, object, T]) -> T:
        """What `await coroutine` would return or raise, if this were asyncio.

        Any number of calls may be in flight. The coroutine sees the caller's context variables,
        and the caller sees what it set. On asyncio it is a checkpoint if the coroutine is one.

        On Trio it always is, and each call is an asyncio task. If the caller is cancelled, that
        task is, once, as asyncio does it; the call returns when the task has ended. If it ended
        with a result or an error all the same, that is the outcome, and the cancellation is raised
        at the next checkpoint. A `CancelledError` that nobody on Trio asked for is raised as a
        `RuntimeError` with the `CancelledError` as its cause.

        Inside the coroutine everything is asyncio, also `anyio` and this method. Make asyncio's
        objects there: outside, no asyncio loop is running.
        """
        pump = self._pump
        if self._loop is not None and (pump is None or pump.ticking):
            return await coroutine
        refusal = _not_open() if pump is None else pump.refusal()
        if pump is None or refusal is not None:
            coroutine.close()  # or Python warns that it was never awaited
            raise refusal or _not_open()
        return await pump.run(coroutine)


class _Selector(selectors.DefaultSelector):
    """Never blocks: where asyncio would wait, it stops the loop and keeps until when."""

    loop: asyncio.AbstractEventLoop
    look = False
    left = 0
    wake_at = inf

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if self.look:
            self.look = False
            if events := super().select(0):
                return events
        if timeout is None or timeout > 0:
            self.wake_at = inf if timeout is None else self.loop.time() + timeout
        else:
            self.left -= 1
            if self.left > 0:
                return []
        self.loop.stop()
        return []


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self, selector: _Selector, clock: trio.abc.Clock) -> None:
        self._time = clock.current_time
        super().__init__(selector)

    def time(self) -> float:
        return self._time()

    def add_signal_handler(
        self, sig: int, callback: Callable[..., object], *args: object
    ) -> NoReturn:
        raise NotImplementedError("signals are Trio's here: use trio.open_signal_receiver()")


class _Pump:
    """The loop, and the Trio system task that gives it its turns."""

    def __init__(self) -> None:
        import sniffio
        import trio

        if not hasattr(_Selector, "fileno"):
            raise RuntimeError(
                "a Guest cannot run on Trio here: asyncio's selector on this platform, "
                f"{selectors.DefaultSelector.__name__}, has no descriptor to wait for.\n"
                "  Run the program on asyncio, or asyncio in a thread of its own: "
                "`with anyio.from_thread.start_blocking_portal() as portal`."
            )
        self._selector = selector = _Selector()
        self.loop = selector.loop = _Loop(selector, trio.lowlevel.current_clock())
        self.ticking = False
        self._descriptor = selector.fileno()
        self._thread = get_ident()
        self._library = sniffio.thread_local
        self._runs: set[asyncio.Task[Any]] = set()
        self._closing = False
        self._alarm = trio.CancelScope()  # never later than asyncio's next timer
        self._stop = trio.CancelScope()
        self._stopped = trio.Event()
        # Ctrl-C is for Trio's main task, and must not tear asyncio's loop apart.
        trio.lowlevel.enable_ki_protection(_Pump.run)
        trio.lowlevel.spawn_system_task(self._serve, name="eventsource_anyio.guest")

    def refusal(self) -> RuntimeError | None:
        if self._library.name != "trio" or self._thread != get_ident():
            return RuntimeError(
                "this Guest was opened by another event loop. Each event loop opens its own; from "
                "another thread, use `anyio.from_thread.run`."
            )
        return _not_open() if self._closing else None

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        import trio

        context = copy_context()
        task: asyncio.Task[T] = self.loop.create_task(coroutine, context=context)
        self._runs.add(task)
        raise_cancelled: Callable[[], NoReturn] | None = None
        try:
            if trio.current_effective_deadline() == -inf:
                self.loop.call_soon(task.cancel)  # after its first step, as asyncio has it
            self._tick(look=False)
            if task.done():
                await trio.lowlevel.cancel_shielded_checkpoint()
            else:
                raise_cancelled = await self._ended(task)
            for variable, value in context.items():  # as if it had been awaited
                if variable.get(_MISSING) is not value:
                    variable.set(value)
            if task.cancelled():
                await trio.lowlevel.checkpoint_if_cancelled()
                if raise_cancelled is not None:
                    raise_cancelled()
            try:
                return task.result()
            except asyncio.CancelledError as error:
                raise RuntimeError(
                    "the asyncio task of this call was cancelled, and not by its caller.\n"
                    "  asyncio code did it (the cause shows where), or the Guest was closed.\n"
                    "  Leave its block only after the tasks that use it have ended."
                ) from error
        finally:
            self._runs.discard(task)
            del task  # it has the error, whose traceback has this frame: a cycle

    async def _ended(self, task: asyncio.Task[T]) -> Callable[[], NoReturn] | None:
        """Wait until the task has ended; returns what raises the caller's cancellation, if any."""
        from trio import lowlevel

        raise_cancelled: Callable[[], NoReturn] | None = None

        def abort(raise_cancel: Callable[[], NoReturn]) -> trio.lowlevel.Abort:
            nonlocal raise_cancelled
            raise_cancelled = raise_cancel
            self.loop.call_soon_threadsafe(task.cancel)
            return lowlevel.Abort.FAILED

        caller = lowlevel.current_task()
        task.add_done_callback(lambda _: lowlevel.reschedule(caller))
        await lowlevel.wait_task_rescheduled(abort)
        return raise_cancelled

    def _tick(self, *, look: bool) -> None:
        """Run asyncio's loop until it would wait; `look` also looks at its descriptors."""
        selector = self._selector
        selector.look = look
        selector.left = _ITERATIONS
        selector.wake_at = -inf  # for a loop that is stopped by anybody else: at once again
        self.ticking = True
        self._library.name = "asyncio"
        try:
            while True:
                try:
                    self.loop.run_forever()
                    break
                except (SystemExit, KeyboardInterrupt) as error:
                    self._escaped(error)
        finally:
            self.ticking = False
            self._library.name = "trio"
        if selector.wake_at < self._alarm.deadline:
            self._alarm.deadline = selector.wake_at

    def _escaped(self, error: BaseException) -> None:
        """asyncio lets these two through its loop, into whichever Trio task has it run."""
        for run in self._runs:
            if run.done() and not run.cancelled() and run.exception() is error:
                return  # it is raised where that call was made
        self.loop.call_exception_handler(
            {"message": "raised by asyncio code that no call waits for", "exception": error}
        )

    async def _serve(self) -> None:
        import trio

        try:
            with self._stop:
                while True:
                    with trio.CancelScope(deadline=self._selector.wake_at) as self._alarm:
                        while True:
                            await trio.lowlevel.wait_readable(self._descriptor)
                            self._tick(look=True)
                    self._tick(look=True)
        finally:
            self.loop.close()
            self._stopped.set()

    async def close(self) -> None:
        self._closing = True
        with shielded_cleanup() as scope:
            await self.run(_finish())
        if scope.cancelled_caught:
            raise RuntimeError(
                "the Guest could not be closed in time: its loop runs on until Trio ends.\n"
                f"  Cancelled, and not ended: {asyncio.all_tasks(self.loop)}\n"
                "  Let them pass on the CancelledError that they are sent."
            )
        self._stop.cancel()
        with shielded_cleanup():
            await self._stopped.wait()


async def _finish() -> None:
    me = asyncio.current_task()
    while others := asyncio.all_tasks() - {me}:
        for task in others:
            task.cancel()
        await asyncio.wait(others)
    loop = asyncio.get_running_loop()
    await loop.shutdown_asyncgens()
    await loop.shutdown_default_executor()


def _not_open() -> RuntimeError:
    return RuntimeError(
        "the Guest is not open. Write `async with Guest() as guest:` around all that uses it."
    )
