"""Use from code that is not async: Django views, Celery tasks, a REPL.

A script that is only about events needs none of this: `anyio.run(main)` is all.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import ParamSpec, Self, TypeVar, cast

from anyio import NoEventLoopError
from anyio.from_thread import BlockingPortal, start_blocking_portal
from anyio.lowlevel import current_token

from .stores.interface import EventStore, Subscription

P = ParamSpec("P")
T = TypeVar("T")

_AT_A_TIME = 256


class SyncRunner:
    """Runs an event loop in a thread of its own, with a store open in it, for synchronous callers.

    A context manager, usable from any number of threads at once. Its calls block the thread that
    makes them, so they are refused in a thread that runs an event loop: `await` there instead.
    What other threads are still doing in it when its block ends is cancelled.
    Make it after a fork (in Celery: `worker_process_init`), not before.
    """

    def __init__(self, store: EventStore, *, backend: str = "asyncio") -> None:
        self.store = store
        self._backend = backend
        self._stack = ExitStack()
        self._portal: BlockingPortal | None = None

    def __enter__(self) -> Self:
        _refuse_in_a_loop("SyncRunner")
        if self._portal is not None:
            raise RuntimeError("this SyncRunner is running already")
        with ExitStack() as stack:
            portal = stack.enter_context(start_blocking_portal(self._backend))
            # Otherwise a thread that is still inside a `context` would be waited for, for ever.
            stack.callback(portal.call, portal.stop, True)
            stack.enter_context(portal.wrap_async_context_manager(self.store))
            self._stack = stack.pop_all()
        self._portal = portal
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._portal = None
        self._stack.__exit__(exc_type, exc, traceback)

    def call(self, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `await function(*args, **kwargs)` would return or raise, in the runner's loop.

        The function sees the caller's context variables.
        """
        return self._running("call").call(partial(function, *args, **kwargs))

    @contextmanager
    def context(self, manager: AbstractAsyncContextManager[T]) -> Generator[T]:
        """What `async with` would do, as `with`: for `store.transaction()` and `subscribe()`."""
        portal = self._running("context")
        with ExitStack() as stack:
            entered = stack.enter_context(portal.wrap_async_context_manager(manager))
            try:
                yield entered
            except BaseException:
                if self._portal is not portal:
                    stack.pop_all()  # The runner has ended, and the manager with it.
                raise

    def iterate(self, events: AsyncIterator[T]) -> Iterator[T]:
        """What `async for` over the iterator would give.

        After an `EventDecodeError`, iterate over the same iterator again to go on. It may be left
        at any time, but then has taken some more events: only a subscription can be gone on with.
        """
        endless = isinstance(cast("object", events), Subscription)
        at_a_time = 1 if endless else _AT_A_TIME
        while True:
            taken, end = self._running("iterate").call(_take, events, at_a_time)
            yield from taken
            if isinstance(end, StopAsyncIteration):
                return
            if end is not None:
                raise end

    def _running(self, what: str) -> BlockingPortal:
        _refuse_in_a_loop(f"SyncRunner.{what}")
        if self._portal is None:
            raise RuntimeError(
                "the SyncRunner is not running. Write `with SyncRunner(store) as runner:` around "
                "everything that uses it."
            )
        return self._portal


async def _take(events: AsyncIterator[T], most: int) -> tuple[list[T], Exception | None]:
    """The next items, and what ended the taking of them: nothing of them is lost by an error."""
    taken: list[T] = []
    try:
        while len(taken) < most:
            taken.append(await anext(events))
    except Exception as end:  # noqa: BLE001  (it is raised in the caller's thread)
        return taken, end
    return taken, None


def _refuse_in_a_loop(what: str) -> None:
    try:
        current_token()
    except NoEventLoopError:
        return
    raise RuntimeError(
        f"{what} was called in a thread that runs an event loop, which it would block for ever. "
        "Await the store's own methods there; to call synchronous code from there, use "
        "`await anyio.to_thread.run_sync(…)`."
    )
