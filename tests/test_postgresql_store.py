"""The PostgreSQL store, held to the contract, and what only it does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from itertools import product

import pytest
from msgspec.structs import replace

from eventsource_anyio import ANY, PostgreSQLEventStore, ReadOptions
from eventsource_anyio.stores.postgresql import paging
from eventsource_anyio.stores.reading import PageRequest
from eventsource_anyio.testing import EventStoreContract
from eventsource_anyio.testing.samples import Happened


class TestAsyncpg(EventStoreContract):
    @pytest.fixture
    async def store(self, migrated_dsn: str) -> AsyncIterator[PostgreSQLEventStore]:
        async with PostgreSQLEventStore(migrated_dsn, driver="asyncpg") as store:
            yield store


class TestLibpq(EventStoreContract):
    @pytest.fixture
    async def store(self, migrated_dsn: str) -> AsyncIterator[PostgreSQLEventStore]:
        async with PostgreSQLEventStore(migrated_dsn, driver="psycopg") as store:
            yield store


async def test_slices_are_searched_for_in_bounded_steps(
    postgresql_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paging, "_SEARCHED_AT_MOST", 5)
    store = PostgreSQLEventStore(postgresql_dsn)
    await store.migrate()
    async with store:
        for number in range(30):
            await store.append_events(str(number), "Thing", [Happened(number)], ANY)
        every = [stored async for stored in store.read_all()]
        for first, last, backwards in product((0, 9, 13), (None, 14, 17, 99), (False, True)):
            options = ReadOptions(
                slices=range(100, 200),
                from_position=first,
                to_position=last,
                backwards=backwards,
            )
            expected = [
                stored
                for stored in (reversed(every) if backwards else every)
                if stored.slice in range(100, 200) and first <= stored.position <= (last or 99)
            ]
            assert [stored async for stored in store.read_all(options)] == expected
        request = PageRequest(None, 1, None, False, 500, (), (), (1022, 1022))
        resumes: list[int] = []
        while not (page := await store._read(request)).at_end:
            resumes.append(page.resume)
            request = replace(request, start=page.resume)
        assert resumes == [6, 11, 16, 21, 26, 31]
        assert page.resume == 31
        request = replace(request, backwards=True, start=None, stop=1)
        resumes.clear()
        while not (page := await store._read(request)).at_end:
            resumes.append(page.resume)
            request = replace(request, start=page.resume)
        assert resumes == [25, 20, 15, 10, 5]


async def test_inside_the_guest_the_store_refuses_to_wait(
    postgresql_dsn: str, anyio_backend_name: str
) -> None:
    store = PostgreSQLEventStore(postgresql_dsn)
    await store.migrate()
    async with store:

        async def append() -> object:
            return await store.append_events("a", "Thing", [Happened(1)], ANY)

        async def get() -> object:
            return await store.get_events("a", "Thing")

        async def read() -> object:
            return await anext(store.read_all())

        async def look_up() -> object:
            return await store.checkpoints.get("reader")

        for call in (append, get, read, look_up, store.last_position):
            if anyio_backend_name == "trio":
                with pytest.raises(RuntimeError, match="outside"):
                    await store.guest.run(call())
            else:  # where there is no inside
                await store.guest.run(call())
        assert (await store.append_events("a", "Thing", [Happened(2)], ANY)).version >= 1


async def test_a_full_page_of_a_stream_says_whether_it_was_the_last(postgresql_dsn: str) -> None:
    store = PostgreSQLEventStore(postgresql_dsn)
    await store.migrate()
    async with store:
        await store.append_events("a", "Thing", [Happened(n) for n in range(4)], ANY)
        stream = ("Thing", "a")
        for start, backwards, limit, expected, resume in (
            (1, False, 4, [1, 2, 3, 4], None),
            (1, False, 3, [1, 2, 3], 4),
            (2, False, 3, [2, 3, 4], None),
            (4, True, 3, [4, 3, 2], 1),
            (4, True, 4, [4, 3, 2, 1], None),
        ):
            request = PageRequest(stream, start, None, backwards, limit, (), (), None)
            page = await store._read(request)
            assert [event.version for event in page.events] == expected
            assert page.at_end == (resume is None)
            if resume is not None:
                assert page.resume == resume
