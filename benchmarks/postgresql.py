"""PostgreSQL: our store beside bare asyncpg, on one server and in the same rounds.

A piece is called `{what}: {who}, {loop}`; what is compared stands side by side.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import anyio
import attrs
from rich.console import Console

from eventsource_anyio import EventStore

from . import (
    bare_asyncpg,
    bare_latency,
    large,
    latency,
    peers,
    postgresql_claims,
    postgresql_work,
    projections,
)
from .latency import FIFTY, ONE, ONE_PACED
from .postgresql_claims import Followed
from .postgresql_work import OTHERS, OURS, Subject, opened
from .server import checkpoint, database, server, sql
from .suite import Claim, Measured, Suite, on

TASKS = (1, 64, 1000)
PLACES = {"two processes": latency.two_processes, "one process": latency.one_process}
READING = "reading"
ASYNCIO, UVLOOP, TRIO = OURS.values()


@attrs.frozen(kw_only=True)
class Plan:
    """How much of everything. A short run leaves out some of the latencies."""

    short: bool
    rounds: int
    data: Path | None
    large: bool
    peers: bool
    peers_python: Path | None

    @property
    def seconds(self) -> float:
        return 0.25 if self.short else 1.0

    @property
    def read(self) -> int:
        return 20_000 if self.short else 100_000


@attrs.frozen
class Pieces:
    """Adds pieces of work to a suite."""

    suite: Suite
    dsn: str
    how: Plan

    def appends(self) -> None:
        for tasks in TASKS:
            what = "1 task" if tasks == 1 else f"{tasks:,} tasks"
            ours = partial(postgresql_work.appends, tasks=tasks, seconds=self.how.seconds)
            self._side_by_side(what, partial(self._ways, what, tasks), ours)
        ours = partial(postgresql_work.batches, seconds=self.how.seconds)
        self._side_by_side("batches of 100", self._unnest, ours)

    def _side_by_side(
        self,
        what: str,
        bare: Callable[[str], None],
        ours: Callable[[EventStore], Awaitable[Measured]],
    ) -> None:
        bare("asyncio")
        for subject in (ASYNCIO, TRIO):
            self._ours(what, subject, ours)
        bare("uvloop")
        for subject in (UVLOOP, *OTHERS):
            self._ours(what, subject, ours)

    def _ours(
        self,
        what: str,
        subject: Subject,
        work: Callable[[EventStore], Awaitable[Measured]],
        schema: str = "",
    ) -> None:
        def run() -> Measured:
            if not schema:
                self._empty()
            return on(subject.loop, work, opened(self.dsn, schema, subject.driver))

        self.suite.add(f"{what}: ours, {subject}", run)

    def _bare(self, name: str, loop: str, work: Callable[[str], Awaitable[Measured]]) -> None:
        def run() -> Measured:
            self._empty()
            return on(loop, work, self.dsn)

        self.suite.add(f"{name}, {loop}", run)

    def _empty(self) -> None:
        sql(self.dsn, "TRUNCATE eventsource.events, bare.events")

    def _ways(self, what: str, tasks: int, loop: str) -> None:
        # On uvloop the baseline alone, which is the last of them.
        for way in list(bare_asyncpg.WAYS)[-1 if loop == "uvloop" else 0 :]:
            seconds = self.how.seconds
            if tasks == 1:
                work = partial(bare_asyncpg.one_by_one, seconds=seconds, way=way)
                self._bare(f"{what}: {way}", loop, work)
            else:
                queue = partial(bare_asyncpg.queue, tasks=tasks, seconds=seconds, way=way)
                self._bare(f"{what}: queue of 20, {way}", loop, queue)

    def _unnest(self, loop: str) -> None:
        for encoded, name in ((False, "statement only"), (True, "rows made in the loop")):
            work = partial(bare_asyncpg.unnest, seconds=self.how.seconds, encoded=encoded)
            self._bare(f"batches of 100: unnest, {name}", loop, work)

    def reads(self) -> None:
        anyio.run(postgresql_work.migrate, self.dsn, READING)
        anyio.run(postgresql_work.fill, opened(self.dsn, READING), self.how.read)
        sql(self.dsn, f"VACUUM ANALYZE {READING}.events")
        loads = partial(postgresql_work.loads, seconds=self.how.seconds)
        read_all = partial(postgresql_work.read_all, events=self.how.read)
        for what, work in (("load 1,000 events", loads), ("read everything", read_all)):
            for subject in (ASYNCIO, TRIO, UVLOOP, *OTHERS):
                self._ours(what, subject, work, READING)

    def projections(self) -> None:
        sql(self.dsn, projections.TABLES)
        for what, kind in projections.KINDS.items():
            for subject in (ASYNCIO, TRIO, UVLOOP):
                work = partial(projections.catch_up, projection=kind(), events=self.how.read)
                self._projecting(f"projection, {what}: ours, {subject}", subject, work, READING)
        self._bare_projection()
        for subject in (ASYNCIO, TRIO, UVLOOP):
            work = partial(projections.latency, seconds=self.how.seconds)
            self._projecting(f"append to read model: {subject}", subject, work, "")
        for subject in (ASYNCIO, TRIO, UVLOOP):
            work = partial(projections.beside_writers, seconds=self.how.seconds)
            self._projecting(f"50 writers and a projection: {subject}", subject, work, "")

    def _projecting(
        self,
        name: str,
        subject: Subject,
        work: Callable[[EventStore], Awaitable[Mapping[str, float]]],
        schema: str,
    ) -> None:
        def run() -> Mapping[str, float]:
            sql(self.dsn, projections.empty(schema or "eventsource"))
            if not schema:
                self._empty()
            return on(subject.loop, work, opened(self.dsn, schema, subject.driver))

        self.suite.add_figures(name, run)

    def _bare_projection(self) -> None:
        def run() -> Measured:
            sql(self.dsn, projections.empty(READING))
            return on("asyncio", projections.by_hand, self.dsn, READING)

        self.suite.add("projection, SQL read model: by hand, asyncio", run)

    def latencies(self) -> Sequence[Followed]:
        """What was added of ours: where, under which load, and by whom."""
        places, loads, subjects = list(PLACES), [ONE_PACED, ONE, FIFTY], [ASYNCIO, TRIO, UVLOOP]
        if self.how.short:
            places, loads, subjects = places[:1], [ONE_PACED, FIFTY], subjects[:2]
        for load in loads:
            # Long enough for a hundredth of the events to be some, also where they are few.
            seconds = self.how.seconds * (8 if load.pause else 2)
            if load.writers == 1:
                by_hand = partial(bare_latency.two_processes, self.dsn, load, seconds)
                self._followed(f"latency, {load}: INSERT with NOTIFY", by_hand)
            for place in places:
                for subject in subjects:
                    ours = partial(PLACES[place], self.dsn, subject, load, seconds)
                    self._followed(f"latency, {load}: {place}, {subject}", ours)
        return [(load, place, str(s)) for load in loads for place in places for s in subjects]

    def _followed(self, name: str, work: Callable[[], Mapping[str, float]]) -> None:
        def run() -> Mapping[str, float]:
            self._empty()
            return work()

        self.suite.add_figures(name, run)


def measure(how: Plan, console: Console) -> tuple[list[Suite], list[Claim], dict[str, object]]:
    others = peers.environments(how.peers_python, console) if how.peers else []
    with ExitStack() as stack:
        running = stack.enter_context(server(how.data))
        console.print(running.about)
        dsn = stack.enter_context(database(running.databases))
        anyio.run(postgresql_work.migrate, dsn)
        sql(dsn, bare_asyncpg.TABLE)
        suite = Suite("PostgreSQL")
        suite.add_step("checkpoint", partial(checkpoint, dsn))
        pieces = Pieces(suite, dsn, how)
        pieces.appends()
        pieces.reads()
        pieces.projections()
        followed = pieces.latencies()
        found = peers.Peers(running.databases, others)
        stack.enter_context(found.filled(how.read))
        found.add(suite, how.seconds)
        suite.run(how.rounds, console)
        suites, claims = [suite], postgresql_claims.claims(suite, followed, dsn)
        claims += found.claims(suite)
        if how.large:
            large_suite, its_claims = large.measure(dsn, how.seconds, how.rounds, console)
            suites.append(large_suite)
            claims += its_claims
        about: dict[str, object] = {"postgresql": running.about, "peers": found.versions}
        return suites, claims, about
