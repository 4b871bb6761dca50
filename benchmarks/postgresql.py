"""PostgreSQL: our store beside bare asyncpg and the peers, on one server and in the same rounds.

What is compared stands side by side: first the bare driver, then ours, then the peers.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import anyio
import attrs
from rich.console import Console

from eventsource_anyio import EventStore

from . import bare_asyncpg, bare_latency, latency, memory, projections, work
from .peers import Peer
from .plan import Case, Plan
from .server import Server, checkpoint, database, server, sql, truncate
from .subject import Subject, migrate, opened
from .suite import Found, Piece, Suite, on, ours

STORE = "PostgreSQL"
READING = "reading"
PLACES = {"two processes": latency.two_processes, "one process": latency.one_process}
TOLD: Mapping[str, str] = {
    "our function": "asyncpg, our append function",
    "our function, our encoding": "asyncpg, our append function, our encoding",
    "checked transaction": "asyncpg, BEGIN, version, INSERT, COMMIT",
    "gathered": "asyncpg, rows gathered, nothing checked",
    "gathered, our function": "asyncpg, rows gathered, our append function",
}
"""What is told beside the limit: what a check costs, and how far grouping can go."""
AGAIN: Mapping[str, tuple[str, ...]] = {
    "eventsource-py": ("TRUNCATE totals, projection_checkpoints",),
    "eventsourcing": ("TRUNCATE totals", "DROP TABLE IF EXISTS totals_tracking"),
}
"""Has a peer's projection begin again."""


def told(tasks: int, events: int, contended: bool) -> Sequence[str]:
    """Which of them are told of this case."""
    if contended or (events > 1 and tasks > 1):
        return ()
    if events > 1:
        return ("our function", "our function, our encoding")
    alone = ("our function", "checked transaction")
    return alone if tasks == 1 else (*alone, "gathered", "gathered, our function")


@attrs.frozen
class _Pieces:
    suite: Suite
    plan: Plan
    dsn: str
    theirs: Mapping[str, str]
    """Where each peer appends."""
    filled: Mapping[str, str]
    """Where each peer reads."""

    @property
    def subjects(self) -> list[Subject]:
        return [Subject(loop) for loop in self.plan.loops]

    @property
    def others(self) -> list[Subject]:
        """By the driver that is not the loop's default."""
        loops = self.plan.loops if self.plan.others else ()
        return [Subject(loop, "asyncpg" if loop == "Trio" else "psycopg") for loop in loops]

    @property
    def bare_loops(self) -> list[str]:
        return [loop for loop in self.plan.loops if loop != "Trio"]

    # -- appends ------------------------------------------------------------------------------

    def appends(self) -> None:
        for how in (*self.plan.appends, (1, self.plan.batches, False)):
            tasks, events, contended = how
            case = work.case(*how)
            bare = partial(
                bare_asyncpg.appends,
                self.dsn,
                tasks=tasks,
                events=events,
                contended=contended,
                seconds=self.plan.seconds,
            )
            for loop in self.bare_loops:
                self._bare("append", case, f"bare asyncpg, {loop}", loop, bare)
            plain = events == 1 and not contended
            for way in told(*how) if self.plan.others else ():
                self._bare("append", case, TOLD[way], "asyncio", partial(bare, way=way))
            our = partial(
                work.appends,
                tasks=tasks,
                events=events,
                contended=contended,
                seconds=self.plan.seconds,
            )
            for subject in (*self.subjects, *(self.others if plain else ())):
                self._ours("append", case, subject, our)
            self._theirs_append("append", case, "appends", how)

    def followed(self) -> None:
        what = "append, with a subscriber"
        for how in self.plan.followed:
            tasks, events, contended = how
            follow = partial(
                work.followed,
                tasks=tasks,
                events=events,
                contended=contended,
                seconds=self.plan.seconds,
            )
            for subject in self.subjects:
                self._ours(what, work.case(*how), subject, follow)
            self._theirs_append(what, work.case(*how), "followed", how)

    def _bare(
        self, what: str, case: str, name: str, loop: str, run: Callable[[], Awaitable[Found]]
    ) -> None:
        def empty_and_run() -> Found:
            self._empty()
            return on(loop, run)

        self.suite.add(Piece(what, STORE, case, name), empty_and_run)

    def _ours(
        self,
        what: str,
        case: str,
        subject: Subject,
        run: Callable[[EventStore], Awaitable[Found]],
        schema: str = "",
        before: Callable[[], None] = lambda: None,
    ) -> None:
        def open_and_run() -> Found:
            if not schema:
                self._empty()
            before()
            return on(subject.loop, run, opened(self.dsn, schema, subject.driver))

        self.suite.add(Piece(what, STORE, case, str(subject)), open_and_run)

    def _theirs_append(self, what: str, case: str, do: str, how: Case) -> None:
        tasks, events, contended = how
        for peer in self.plan.peers:

            def ask(peer: Peer = peer) -> Found:
                where = self.theirs[peer.name]
                truncate(where)
                return peer.ask(
                    do,
                    where=where,
                    tasks=tasks,
                    events=events,
                    contended=contended,
                    seconds=self.plan.seconds,
                )

            self.suite.add(Piece(what, STORE, case, peer.name), ask)

    def _empty(self) -> None:
        sql(self.dsn, "TRUNCATE eventsource.events, bare.events")

    # -- reads --------------------------------------------------------------------------------

    def reads(self) -> None:
        plan, seconds = self.plan, self.plan.seconds
        for size in plan.filled.sizes:
            case = f"{size:,} events"
            for loop in self.bare_loops:
                alone = partial(on, loop, bare_asyncpg.loads, self.dsn, READING, size, seconds)
                self.suite.add(Piece("load", STORE, case, f"bare asyncpg, {loop}"), alone)
            for subject in (*self.subjects, *self.others):
                load = partial(work.loads, size=size, seconds=seconds)
                self._ours("load", case, subject, load, READING)
            for peer in plan.peers:
                for snapshot, name in ((False, peer.name), (True, f"{peer.name}, snapshot")):
                    asked = partial(
                        peer.ask,
                        "loads",
                        where=self.filled[peer.name],
                        size=size,
                        snapshot=snapshot,
                        seconds=seconds,
                    )
                    self.suite.add(Piece("load", STORE, case, name), asked)
        events = plan.filled.events
        for loop in self.bare_loops:
            alone = partial(on, loop, bare_asyncpg.read_all, self.dsn, READING, events, seconds)
            self.suite.add(Piece("read", STORE, "everything", f"bare asyncpg, {loop}"), alone)
        for subject in (*self.subjects, *self.others):
            read = partial(work.read_all, events=events, seconds=seconds)
            self._ours("read", "everything", subject, read, READING)
        for peer in plan.peers:
            asked = partial(
                peer.ask,
                "read_all",
                where=self.filled[peer.name],
                streams=plan.filled.streams,
                sizes=plan.filled.sizes,
                seconds=seconds,
            )
            self.suite.add(Piece("read", STORE, "everything", peer.name), asked)

    # -- subscribers and projections ------------------------------------------------------------

    def projections(self) -> None:
        sql(self.dsn, projections.TABLES)
        events, what = self.plan.filled.events, "catch up"

        def empty(schema: str = READING) -> None:
            sql(self.dsn, projections.empty(schema))

        for case, kind in projections.KINDS.items():
            if case != projections.NOTHING:

                def by_hand(case: str = case) -> Found:
                    empty()
                    return on("asyncio", projections.by_hand, self.dsn, READING, case)

                self.suite.add(Piece(what, STORE, case, "bare asyncpg, asyncio"), by_hand)
            for subject in self.subjects:
                catch_up = partial(projections.catch_up, kind=kind, events=events)
                self._ours(what, case, subject, catch_up, READING, empty)
        for peer in self.plan.peers:

            def ask(peer: Peer = peer) -> Found:
                where = self.filled[peer.name]
                sql(where, *AGAIN[peer.name])
                return peer.ask("catch_up", where=where, seconds=self.plan.seconds)

            self.suite.add(Piece(what, STORE, projections.BY_EVENT, peer.name), ask)
        empty_both = partial(empty, "eventsource")
        for subject in self.subjects:
            waiting = partial(projections.latency, seconds=self.plan.seconds)
            self._ours("append to read model", "1 writer", subject, waiting, "", empty_both)
        for subject in self.subjects:
            one = partial(projections.in_one_process, seconds=self.plan.seconds)
            case = "50 writers, one process"
            self._ours("append, with a projection", case, subject, one, "", empty_both)
        for subject in self.subjects if self.plan.others else ():

            def two(subject: Subject = subject) -> Found:
                self._empty()
                empty_both()
                return projections.in_two_processes(self.dsn, subject, self.plan.seconds)

            case = "50 writers, two processes"
            self.suite.add(Piece("append, with a projection", STORE, case, str(subject)), two)

    def latencies(self) -> None:
        for load, seconds in self.plan.latencies:
            for place in self.plan.places:
                run = PLACES[place]
                case = f"{load}, {place}"
                if load.writers == 1 and place == "two processes":
                    by_hand = partial(bare_latency.two_processes, self.dsn, load, seconds)
                    self._followed(case, "bare asyncpg, NOTIFY", by_hand)
                for subject in self.subjects:
                    followed = partial(run, self.dsn, subject, load, seconds)
                    self._followed(case, str(subject), followed)
                if place == "one process":
                    self._peers_latency(case, load, seconds)

    def _followed(self, case: str, name: str, run: Callable[[], Found]) -> None:
        def empty_and_run() -> Found:
            self._empty()
            return run()

        self.suite.add(Piece("append to subscriber", STORE, case, name), empty_and_run)

    def _peers_latency(self, case: str, load: latency.Load, seconds: float) -> None:
        for peer in self.plan.peers:

            def ask(peer: Peer = peer) -> Found:
                where = self.theirs[peer.name]
                truncate(where)
                writers, pause = load.writers, load.pause
                return peer.ask(
                    "latency", where=where, writers=writers, pause=pause, seconds=seconds
                )

            self.suite.add(Piece("append to subscriber", STORE, case, peer.name), ask)

    # -- memory -------------------------------------------------------------------------------

    def memory(self) -> None:
        plan = self.plan

        def appended(loop: str, count: int) -> Found:
            self._empty()
            return memory.in_a_process("appends", loop, self.dsn, count)

        for count in sorted({plan.peers_tasks, plan.embedded_tasks}):
            case = f"{count:,} under way"
            for loop in ("asyncio", "Trio"):
                piece = Piece("memory of an append", STORE, case, ours(loop))
                self.suite.add(piece, partial(appended, loop, count))
            for peer in plan.peers if count == plan.peers_tasks else ():

                def their_appends(peer: Peer = peer, count: int = count) -> Found:
                    where = self.theirs[peer.name]
                    truncate(where)
                    return peer.once("memory_of_appends", where=where, count=count)

                piece = Piece("memory of an append", STORE, case, peer.name)
                self.suite.add(piece, their_appends)
        case = f"{plan.filled.events:,} events"
        for loop in ("asyncio", "Trio"):
            stream = partial(memory.in_a_process, "stream", loop, self.dsn, 0, READING)
            self.suite.add(Piece("memory of a long stream", STORE, case, ours(loop)), stream)
        for peer in plan.peers:
            asked = partial(peer.once, "memory_of_a_stream", where=self.filled[peer.name])
            self.suite.add(Piece("memory of a long stream", STORE, case, peer.name), asked)


@contextmanager
def adding(suite: Suite, plan: Plan, console: Console) -> Iterator[tuple[Server, str]]:
    """Adds its pieces, whose server and databases are there until the end."""
    with ExitStack() as stack:
        running = stack.enter_context(server(plan.data))
        dsn = stack.enter_context(database(running.databases))
        anyio.run(migrate, dsn)
        anyio.run(migrate, dsn, READING)
        sql(dsn, bare_asyncpg.TABLE)
        console.print(f"PostgreSQL: filling {plan.filled.events:,} events …")
        anyio.run(work.fill, opened(dsn, READING), plan.filled)
        sql(dsn, f"VACUUM ANALYZE {READING}.events")
        theirs, filled = {}, {}
        for peer in plan.peers:
            console.print(f"{peer.name}: filling …")
            theirs[peer.name] = stack.enter_context(database(running.databases))
            filled[peer.name] = stack.enter_context(database(running.databases))
            peer.ask("schema", where=theirs[peer.name])
            peer.ask("schema", where=filled[peer.name])
            streams, sizes = plan.filled.streams, plan.filled.sizes
            peer.ask("fill", where=filled[peer.name], streams=streams, sizes=sizes)
            sql(filled[peer.name], projections.TABLES, "VACUUM ANALYZE")
        suite.add_step(partial(checkpoint, dsn))
        pieces = _Pieces(suite, plan, dsn, theirs, filled)
        pieces.appends()
        pieces.followed()
        pieces.reads()
        pieces.projections()
        pieces.latencies()
        pieces.memory()
        yield running, dsn
