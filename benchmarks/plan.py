"""How much of everything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import attrs

from .latency import FIFTY, ONE, ONE_PACED, Load
from .peers import Peer
from .suite import LOOPS
from .work import LARGE, LOADED, Filled

Case: TypeAlias = tuple[int, int, bool]
"""Tasks, events an append, and whether all of them append to one stream."""

MUCH = Filled(streams=30, sizes=(10, LOADED, LARGE))
STORES = ("memory", "SQLite", "PostgreSQL", "brokers")


@attrs.frozen(kw_only=True)
class Plan:
    rounds: int = 5
    seconds: float = 0.35
    """For one piece on PostgreSQL."""
    embedded: float = 0.2
    """For one piece in memory or on SQLite."""
    loops: Sequence[str] = tuple(LOOPS)
    appends: Sequence[Case] = tuple(
        (tasks, events, contended)
        for contended in (False, True)
        for tasks in (1, 8, 64, 1000)
        for events in (1, 10)
        if tasks > 1 or not contended  # one task contends with nobody
    )
    embedded_appends: Sequence[Case] = appends
    batches: int = 100
    """Events of the largest append, by one task."""
    followed: Sequence[Case] = ((8, 1, False), (8, 10, False), (64, 1, False), (64, 10, False))
    filled: Filled = MUCH
    latencies: Sequence[tuple[Load, float]] = ((ONE_PACED, 1.5), (ONE, 0.6), (FIFTY, 0.8))
    """And for how many seconds."""
    places: Sequence[str] = ("two processes", "one process")
    others: bool = True
    """Also by the driver that is not the default, and more that is told beside the limit."""
    embedded_tasks: int = 10_000
    """Appends under way whose memory is measured: a claim of ours; peers make fewer of them."""
    peers_tasks: int = 1000
    long_stream: int = 200_000
    large: bool = False
    peers: Sequence[Peer] = ()
    data: Path | None = None


FULL = Plan()
SHORT = Plan(
    rounds=3,
    seconds=0.15,
    embedded=0.06,
    loops=("asyncio", "Trio"),
    appends=((1, 1, False), (64, 1, False), (1000, 1, False), (64, 10, False), (64, 1, True)),
    embedded_appends=((1, 1, False), (1000, 1, False)),
    followed=((8, 10, False),),
    filled=Filled(streams=5, sizes=(10, LOADED)),
    latencies=((ONE_PACED, 0.4), (FIFTY, 0.2)),
    places=("one process",),
    others=False,
    embedded_tasks=200,
    peers_tasks=200,
    long_stream=20_000,
)
