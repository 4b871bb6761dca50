"""Pages of events: of a stream, or of the whole store as far as it is safe."""

from __future__ import annotations

from collections.abc import Sequence

from ..reading import Page, PageRequest
from .driver import Row
from .pool import Pool
from .statements import LARGEST, Statements, decode_rows
from .tail import Tail

_SEARCHED_AT_MOST = 50_000


async def read_page(pool: Pool, tail: Tail, statements: Statements, request: PageRequest) -> Page:
    if request.stream is not None:
        return await _stream_page(pool, statements, request)
    return await _page(pool, tail, statements, request)


async def _stream_page(pool: Pool, statements: Statements, request: PageRequest) -> Page:
    low, high = _bounds(request)
    # One more says whether there are more, or a full page would cost a look for another one.
    statement, values = statements.page(request, low, high, request.limit + 1)
    rows = await pool.fetch(statement, *values)
    if len(rows) <= request.limit:
        return Page(decode_rows(rows), 0, at_end=True)
    return Page(decode_rows(rows[: request.limit]), rows[-1][1], at_end=False)


async def _page(pool: Pool, tail: Tail, statements: Statements, request: PageRequest) -> Page:
    low, high = _bounds(request)
    safe = tail.position
    # What is known to be safe stays so: the server is asked only for what may be beyond.
    asked = low > safe or (request.backwards and high > safe)
    rows: Sequence[Row] | None = None
    if asked and _is_plain(request):
        safe, rows = await tail.read(low, high, request.limit)
    elif asked:
        safe = await tail.safe_position()
    known, high = high <= safe, min(high, safe)
    # Slices have no index: one statement for few of them might search the whole store.
    bounded = request.slices is not None and high - low >= _SEARCHED_AT_MOST
    if bounded and request.backwards:
        low = high - _SEARCHED_AT_MOST + 1
    elif bounded:
        high = low + _SEARCHED_AT_MOST - 1
    if rows is None:
        rows = list[Row]()
        if low <= high:
            statement, values = statements.page(request, low, high, request.limit)
            rows = await pool.fetch(statement, *values)
    if len(rows) == request.limit:
        resume = rows[-1][0] + (-1 if request.backwards else 1)
        return Page(decode_rows(rows), resume, at_end=False)
    if request.backwards:
        return Page(decode_rows(rows), low - 1, at_end=not bounded)
    at_end = (asked or known) and not bounded
    return Page(decode_rows(rows), max(low, high + 1), at_end)


def _is_plain(request: PageRequest) -> bool:
    filtered = request.event_types or request.aggregate_types or request.slices is not None
    return not (filtered or request.backwards)


def _bounds(request: PageRequest) -> tuple[int, int]:
    low, high = request.start, request.stop
    if request.backwards:
        low, high = high, low
    return min(low or 0, LARGEST), LARGEST if high is None else min(high, LARGEST)
