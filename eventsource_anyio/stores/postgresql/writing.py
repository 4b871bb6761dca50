"""Steps that are written in one transaction: what is beside the events first, appends last.

The appends come last because from the first of them to the commit readers wait for them.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...cleanup import shielded_cleanup
from ...errors import CheckpointConflictError
from ...repositories.checkpoint import SaveCheckpoint
from ...repositories.document import DeleteDocument, DeleteDocuments, SaveDocuments
from ...repositories.outbox import AddMessages, RemoveMessages
from ..records import Append, AppendResult, Step
from .documents import write_documents
from .driver import Connection, DriverError, Fetch, Row
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

_BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED"


async def write_steps(
    fetch: Fetch, statements: Statements, steps: Sequence[Step], *, wait: bool, look: bool = False
) -> Sequence[AppendResult] | None:
    """Write all of the steps, or raise; `fetch` belongs to an open transaction.

    None if another transaction is appending to a stream of theirs, unless this is to `wait`. With
    `look`, the ids of each append are looked for first.
    """
    documents: list[SaveDocuments | DeleteDocument] = []
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
            case SaveDocuments() | DeleteDocument():
                documents.append(step)
            case DeleteDocuments(collection):
                if documents:
                    await write_documents(fetch, statements, documents)
                    documents = []
                await fetch(statements.delete_documents, collection)
            case Append():
                pass
    if documents:
        await write_documents(fetch, statements, documents)
    appends = [step for step in steps if isinstance(step, Append)]
    event_ids = [event.event_id for append in appends for event in append.events]
    if not look and len(set(event_ids)) == len(event_ids):
        return await append_together(fetch, statements, appends, wait=wait) if appends else ()
    results: list[AppendResult] = []
    for append in appends:  # one may repeat another, and has to see it
        result: Sequence[AppendResult] | None
        if repeated := await _repeated(fetch, statements, append):
            result = [repeated]
        else:
            result = await append_together(fetch, statements, [append], wait=wait)
        if result is None:
            return None
        results += result
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
        # It may have been this very call that stored them, before its connection was lost.
        with shielded_cleanup():
            return await _repeated(fetch, statements, append)
        raise DriverError("there was no answer in time", lost=True)
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


async def _repeated(fetch: Fetch, statements: Statements, append: Append) -> AppendResult | None:
    stored = by_id(await fetch(statements.by_ids, [event.event_id for event in append.events]))
    return append.repeated(stored) if stored else None


async def write_at_once(
    pool: Pool, tail: Tail, statements: Statements, steps: Sequence[Step], *, look: bool
) -> Sequence[AppendResult] | None:
    """All of them in a transaction of their own; None if a stream of theirs is busy.

    It does not wait for the stream: whoever holds it may do so for long, and this would hold a
    connection that others need. Only its end is shielded.
    """
    connection = await pool.acquire()
    committed = False
    try:
        try:
            await connection.run(_BEGIN)
        except DriverError as error:
            if not error.lost:
                raise
            connection = await pool.replace(connection)
            await connection.run(_BEGIN)
        results = await write_steps(connection.fetch, statements, steps, wait=False, look=look)
        if results is None:
            return None
        with shielded_cleanup() as scope:
            await connection.run("COMMIT")
            committed = True
            if results:
                await tail.hint(connection)
        if scope.cancelled_caught:
            connection.abandon()
        if not committed:
            raise DriverError("there was no answer to COMMIT in time", lost=True)
        return results
    finally:
        try:
            if not committed:
                await _roll_back(connection)
        finally:
            pool.release(connection)


async def _roll_back(connection: Connection) -> None:
    rolled_back = False
    try:
        with shielded_cleanup():
            if connection.usable:
                await connection.run("ROLLBACK")
                rolled_back = True
    except DriverError:
        pass  # and so it is abandoned
    finally:
        if not rolled_back:
            connection.abandon()
