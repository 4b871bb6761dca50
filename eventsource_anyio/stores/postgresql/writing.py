"""Steps that are written in one transaction: checkpoints and messages first, appends last.

The appends come last because from the first of them to the commit readers wait for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ...cleanup import shielded_cleanup
from ...errors import CheckpointConflictError
from ...repositories.checkpoint import SaveCheckpoint
from ...repositories.outbox import AddMessages, RemoveMessages
from ..records import Append, AppendResult, Step
from .driver import Connection, DriverError, Row
from .pool import Pool
from .statements import (
    APPENDED,
    BUSY,
    CONFLICT,
    KNOWN,
    Answer,
    Statements,
    appended,
    by_id,
    events_answers,
    events_values,
)
from .tail import Tail


class Fetch(Protocol):
    """Runs a statement in whatever transaction it belongs to."""

    async def __call__(self, statement: str, *values: object) -> Sequence[Row]: ...


async def write_steps(
    fetch: Fetch, statements: Statements, steps: Sequence[Step]
) -> Sequence[AppendResult]:
    """Write all of the steps, or raise; `fetch` belongs to an open transaction."""
    for step in steps:
        match step:
            case SaveCheckpoint(name, position, expected):
                ((saved, actual),) = await fetch(
                    statements.save_checkpoint, name, position, expected
                )
                if not saved:
                    assert expected is not None
                    raise CheckpointConflictError(name, expected, actual)
            case AddMessages(messages):
                await fetch(
                    statements.add_messages,
                    [message.message_id for message in messages],
                    [message.topic for message in messages],
                    [message.key for message in messages],
                    [message.metadata_json for message in messages],
                    [message.payload for message in messages],
                )
            case RemoveMessages(message_ids):
                await fetch(statements.remove_messages, list(message_ids))
            case Append():
                pass
    appends = [step for step in steps if isinstance(step, Append)]
    if not appends:
        return ()
    results = await append_together(fetch, statements, appends, wait=True)
    assert results is not None
    return results


async def append_together(
    fetch: Fetch, statements: Statements, appends: Sequence[Append], *, wait: bool
) -> Sequence[AppendResult] | None:
    """Append all or none; None if another transaction is appending to a stream of theirs."""
    values = events_values(appends, wait=wait, atomic=True)
    (row,) = await fetch(statements.append_events, *values)
    answers = events_answers(appends, row)
    if any(answer.status == BUSY for answer in answers):
        return None
    # Those that raise come first: then none was stored, and the others have no result.
    for append, answer in zip(appends, answers, strict=True):
        if answer.status == CONFLICT:
            await outcome(fetch, statements, append, answer)
    results: list[AppendResult] = []
    for append, answer in zip(appends, answers, strict=True):
        result = await outcome(fetch, statements, append, answer)
        assert result is not None  # what the function found can be read
        results.append(result)
    return results


async def outcome(
    fetch: Fetch, statements: Statements, append: Append, answer: Answer
) -> AppendResult | None:
    """The result of an append that was answered, or its error; None if it has to be asked again."""
    if answer.status == APPENDED:
        return appended(append, answer)
    if answer.status == KNOWN:
        ids = [event.event_id for event in append.events]
        stored = by_id(await fetch(statements.by_ids, ids))
        return append.repeated(stored) if stored else None
    versions = append.unexpected(answer.version)
    types: Sequence[Row] = ()
    if versions:
        types = await fetch(
            statements.types_between,
            str(append.aggregate_id),
            append.aggregate_type,
            versions.start,
            versions.stop - 1,
        )
    raise append.conflict(answer.version, [row[0] for row in types])


async def append_at_once(
    pool: Pool, tail: Tail, statements: Statements, appends: Sequence[Append]
) -> Sequence[AppendResult] | None:
    """All of them in one call, or none; None if a stream of theirs is busy."""
    connection = await pool.acquire()
    try:
        with shielded_cleanup() as scope:
            try:
                results = await append_together(connection.fetch, statements, appends, wait=False)
            except DriverError as error:
                if not error.lost:
                    raise
                connection = await pool.replace(connection)
                results = await append_together(connection.fetch, statements, appends, wait=False)
            if results is not None:
                await tail.hint(connection)
            return results
        assert scope.cancelled_caught
        connection.abandon()
        raise DriverError("there was no answer in time", lost=True)
    finally:
        pool.release(connection)


async def write_at_once(
    pool: Pool, tail: Tail, statements: Statements, steps: Sequence[Step]
) -> Sequence[AppendResult]:
    """A transaction of several calls; only its end is shielded."""
    connection = await pool.acquire()
    try:
        await connection.run("BEGIN ISOLATION LEVEL READ COMMITTED")
        results = await write_steps(connection.fetch, statements, steps)
        with shielded_cleanup() as scope:
            await connection.run("COMMIT")
            await tail.hint(connection)
        if scope.cancelled_caught:
            connection.abandon()
            raise DriverError("there was no answer to COMMIT in time", lost=True)
        return results
    except BaseException:
        with shielded_cleanup() as scope:
            await _roll_back(connection)
        raise
    finally:
        pool.release(connection)


async def _roll_back(connection: Connection) -> None:
    try:
        if connection.usable:
            await connection.run("ROLLBACK")
    except DriverError:
        connection.abandon()
