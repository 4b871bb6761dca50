"""Documents: what all the steps of a transaction do to them, written by one call.

The revisions are known beforehand, so what the server has to compare is only what the first change
of each document expects; what comes after it is settled here. The function takes its locks in the
order of the keys, whatever the order of the steps: so no two transactions wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import DocumentConflictError
from ...repositories.document import (
    DeleteDocument,
    DocumentChange,
    EncodedDocument,
    SaveDocuments,
    changes,
    revision_after,
)
from .driver import Fetch
from .statements import Statements


async def write_documents(
    fetch: Fetch, statements: Statements, steps: Sequence[SaveDocuments | DeleteDocument]
) -> None:
    """Write all of the steps, or raise."""
    first: dict[tuple[str, str], DocumentChange] = {}
    last: dict[tuple[str, str], DocumentChange] = {}
    among_them: DocumentConflictError | None = None
    for change in [change for step in steps for change in changes(step)]:
        name = (change.collection, change.key)
        if name in first:
            try:
                change.check(revision_after(last[name]))
            except DocumentConflictError as error:
                among_them = error
                break
        first.setdefault(name, change)
        last[name] = change
    writes = [
        (change.revision, change.value_json)
        if isinstance(change, EncodedDocument)
        else (None, None)
        for change in last.values()
    ]
    expecting = list(first.values())
    ((conflict, actual),) = await fetch(
        statements.write_documents,
        [change.collection for change in expecting],
        [change.key for change in expecting],
        [revision for revision, _ in writes],
        [value for _, value in writes],
        [change.expected for change in expecting],
        [isinstance(change, EncodedDocument) and change.absent for change in expecting],
    )
    if conflict is not None:
        refused = expecting[int(conflict) - 1]
        raise DocumentConflictError(refused.collection, refused.key, refused.expected, actual)
    if among_them is not None:
        raise among_them
