"""SQLite: our store beside the bare driver, aiosqlite and the peers.

All with `synchronous=FULL`, which is the default of each of them; ours also with `NORMAL`, beside
the drivers alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio
import attrs
from rich.console import Console

from eventsource_anyio import SQLiteEventStore

from . import bare_sqlite, memory, work
from .bare_sqlite import Synchronous
from .plan import Case, Plan
from .suite import Found, Piece, Suite, on, ours

STORE, NORMAL = "SQLite", "SQLite, NORMAL"
BARE, AIOSQLITE = "bare sqlite3", "aiosqlite, BEGIN … COMMIT"
_NORMAL_CASES: tuple[Case, ...] = ((1, 1, False), (1000, 1, False))


@attrs.frozen
class _Pieces:
    suite: Suite
    plan: Plan
    folder: Path
    numbers: Iterator[int] = attrs.field(factory=count)

    def path(self) -> Path:
        return self.folder / f"{next(self.numbers)}.db"

    def appends(self, store: str, synchronous: Synchronous, cases: tuple[Case, ...]) -> None:
        seconds = self.plan.embedded
        for tasks, events, contended in cases:
            case = work.case(tasks, events, contended)

            def bare(events: int = events) -> Found:
                return bare_sqlite.appends(self.path(), synchronous, events, seconds)

            self.suite.add(Piece("append", store, case, BARE), bare)
            if (tasks, events, contended) in _NORMAL_CASES:

                def driver(tasks: int = tasks) -> Found:
                    run = bare_sqlite.aiosqlite_appends
                    return on("asyncio", run, self.path(), synchronous, tasks, seconds)

                self.suite.add(Piece("append", store, case, AIOSQLITE), driver)
            for loop in self.plan.loops:

                def our(
                    loop: str = loop, how: tuple[int, int, bool] = (tasks, events, contended)
                ) -> Found:
                    opened = SQLiteEventStore(self.path(), synchronous=synchronous)
                    return on(loop, work.appends, opened, *how, seconds)

                self.suite.add(Piece("append", store, case, ours(loop)), our)
            for peer in self.plan.peers if synchronous == "FULL" else ():
                asked = partial(
                    peer.ask, "appends", tasks=tasks, events=events, contended=contended
                )

                def theirs(asked: partial[Found] = asked) -> Found:
                    return asked(where=str(self.path()), seconds=seconds)

                self.suite.add(Piece("append", store, case, peer.name), theirs)

    def reads(self) -> None:
        suite, plan, seconds = self.suite, self.plan, self.plan.embedded
        bare_path, our_path = self.path(), self.path()
        bare_sqlite.fill(bare_path, plan.filled)
        anyio.run(work.fill, SQLiteEventStore(our_path, synchronous="NORMAL"), plan.filled)
        theirs = {peer.name: str(self.path()) for peer in plan.peers}
        streams, sizes = plan.filled.streams, plan.filled.sizes
        for peer in plan.peers:
            peer.ask("fill", where=theirs[peer.name], streams=streams, sizes=sizes)
        for size in sizes:
            case = f"{size:,} events"
            alone = partial(bare_sqlite.loads, bare_path, size, seconds)
            suite.add(Piece("load", STORE, case, BARE), alone)
            for loop in plan.loops:

                def load(loop: str = loop, size: int = size) -> Found:
                    return on(loop, work.loads, SQLiteEventStore(our_path), size, seconds)

                suite.add(Piece("load", STORE, case, ours(loop)), load)
            for peer in plan.peers:
                for snapshot, name in ((False, peer.name), (True, f"{peer.name}, snapshot")):
                    asked = partial(
                        peer.ask,
                        "loads",
                        where=theirs[peer.name],
                        size=size,
                        snapshot=snapshot,
                        seconds=seconds,
                    )
                    suite.add(Piece("load", STORE, case, name), asked)
        events = plan.filled.events
        alone = partial(bare_sqlite.read_all, bare_path, events, seconds)
        suite.add(Piece("read", STORE, "everything", BARE), alone)
        for loop in plan.loops:

            def read(loop: str = loop) -> Found:
                return on(loop, work.read_all, SQLiteEventStore(our_path), events, seconds)

            suite.add(Piece("read", STORE, "everything", ours(loop)), read)
        for peer in plan.peers:
            where = theirs[peer.name]
            asked = partial(
                peer.ask, "read_all", where=where, streams=streams, sizes=sizes, seconds=seconds
            )
            suite.add(Piece("read", STORE, "everything", peer.name), asked)

    def followed(self) -> None:
        for tasks, events, contended in self.plan.followed:
            case = work.case(tasks, events, contended)
            for loop in self.plan.loops:

                def follow(
                    loop: str = loop, how: tuple[int, int, bool] = (tasks, events, contended)
                ) -> Found:
                    store = SQLiteEventStore(self.path())
                    return on(loop, work.followed, store, *how, self.plan.embedded)

                piece = Piece("append, with a subscriber", STORE, case, ours(loop))
                self.suite.add(piece, follow)

    def memory(self) -> None:
        plan = self.plan
        long = self.path()
        anyio.run(memory.fill, SQLiteEventStore(long, synchronous="NORMAL"), plan.long_stream)
        tasks = plan.embedded_tasks

        def appended(loop: str) -> Found:
            return memory.in_a_process("appends", loop, str(self.path()), tasks)

        for loop in ("asyncio", "Trio"):
            piece = Piece("memory of an append", STORE, f"{tasks:,} under way", ours(loop))
            self.suite.add(piece, partial(appended, loop))
            read = partial(memory.in_a_process, "stream", loop, str(long))
            case = f"{plan.long_stream:,} events"
            self.suite.add(Piece("memory of a long stream", STORE, case, ours(loop)), read)


@contextmanager
def adding(suite: Suite, plan: Plan, console: Console) -> Iterator[None]:
    """Adds its pieces, whose files are there until the end."""
    with TemporaryDirectory() as name:
        pieces = _Pieces(suite, plan, Path(name))
        console.print("SQLite: filling …")
        pieces.appends(STORE, "FULL", tuple(plan.embedded_appends))
        pieces.appends(NORMAL, "NORMAL", _NORMAL_CASES)
        pieces.reads()
        pieces.followed()
        pieces.memory()
        yield
