"""The PostgreSQL server that everything is measured on, and what is known about it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import anyio
import asyncpg  # type: ignore[import-untyped]
import attrs
import psutil

from eventsource_anyio.testing.postgresql import (
    PostgreSQLDatabases,
    PostgreSQLServer,
    postgresql_server,
)

# As a server for production would have them; everything that has to do with durability is left as
# it comes. A server that was given by its DSN is taken as it is.
SETTINGS = {"shared_buffers": "1GB", "max_wal_size": "4GB", "checkpoint_timeout": "30min"}
_TOLD = ("server_version", "fsync", "synchronous_commit", "full_page_writes", *SETTINGS)
_IN_MEMORY = ("tmpfs", "ramfs")
_COMMITS = 300


@attrs.frozen
class Server:
    databases: PostgreSQLDatabases
    about: Mapping[str, object]


@contextmanager
def server(directory: Path | None) -> Iterator[Server]:
    """A durable server whose data is on a disk, or the one that EVENTSOURCE_POSTGRESQL_DSN names.

    `directory` is where the data is put, if not where temporary files are.
    """
    before = tempfile.tempdir
    tempfile.tempdir = str(directory or _on_a_disk())
    try:
        with postgresql_server(durable=True, settings=SETTINGS) as databases:
            tempfile.tempdir = before
            yield Server(databases, anyio.run(_about, databases))
    finally:
        tempfile.tempdir = before


@contextmanager
def database(databases: PostgreSQLDatabases) -> Iterator[str]:
    dsn = databases.create_database()
    try:
        yield dsn
    finally:
        databases.drop_database(dsn)


def sql(dsn: str, *statements: str) -> None:
    """Run them, one after another, each committed by itself."""

    async def run() -> None:
        connection = await asyncpg.connect(dsn)
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()

    anyio.run(run)


def truncate(dsn: str) -> None:
    """Empty all tables of the database."""

    async def run() -> None:
        connection = await asyncpg.connect(dsn)
        try:
            there = await connection.fetch(
                "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
            )
            names = ", ".join(name for (name,) in there)
            if names:
                await connection.execute(f"TRUNCATE {names}")
        finally:
            await connection.close()

    anyio.run(run)


def checkpoint(dsn: str) -> None:
    """Write out what the last round left, so that this round does not pay for it."""
    with suppress(asyncpg.InsufficientPrivilegeError):
        sql(dsn, "CHECKPOINT")


def _on_a_disk() -> Path:
    usual = [Path(tempfile.gettempdir()), Path("/var/tmp"), Path.cwd()]
    for directory in usual:
        if directory.is_dir() and os.access(directory, os.W_OK) and not _in_memory(directory):
            return directory
    raise RuntimeError(
        f"each of {', '.join(map(str, usual))} is in memory, where fsync costs nothing: "
        "give a directory on a disk by --data"
    )


def _in_memory(directory: Path) -> bool:
    mounted = {
        Path(partition.mountpoint): partition.fstype
        for partition in psutil.disk_partitions(all=True)
    }
    where = directory.resolve()
    nearest = next((one for one in (where, *where.parents) if one in mounted), None)
    return nearest is not None and mounted[nearest] in _IN_MEMORY


async def _about(databases: PostgreSQLDatabases) -> dict[str, object]:
    connection = await asyncpg.connect(databases.dsn())
    try:
        about: dict[str, object] = {
            name: await connection.fetchval(f"SHOW {name}") for name in _TOLD
        }
        about["µs that a commit waits for the disk"] = round(await _flush(connection) * 1e6)
    finally:
        await connection.close()
    own = isinstance(databases, PostgreSQLServer)
    about["started here"] = own
    if own and "off" in (about["fsync"], about["synchronous_commit"], about["full_page_writes"]):
        raise AssertionError(f"this server is not durable: {about}")
    return about


async def _flush(connection: Any) -> float:
    """What a commit costs more if it waits for the disk. It writes, but into no table."""
    write = "SELECT pg_logical_emit_message(true, 'benchmark', 'as many bytes as a row has')"
    seconds: dict[str, list[float]] = {"on": [], "off": []}
    for number in range(_COMMITS):
        mode = "off" if number % 2 else "on"
        await connection.execute(f"SET synchronous_commit = {mode}")
        begun = perf_counter()
        await connection.fetchval(write)
        seconds[mode].append(perf_counter() - begun)
    return median(seconds["on"]) - median(seconds["off"])
