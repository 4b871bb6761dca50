"""What a failed call of the database means to the caller: one clear error."""

from __future__ import annotations

from ...errors import StorageError
from .driver import DriverError

_ADMINISTRATOR = "Ask whoever runs the database; the log of the server says more."
_STALE = (
    "The message names it. Where it is the stream's version, a REPEATABLE READ or SERIALIZABLE "
    "transaction did not see what others appended meanwhile: roll back, and do it anew."
)
# By SQLSTATE, the longest beginning first: what is wrong, and what to do next.
_REMEDIES = {
    "08": ("the connection was lost", "Is the server running, and can it be reached from here?"),
    "22": ("the server cannot store a value", "The message names it."),
    "23": ("a constraint of the database forbids it", "The message names it."),
    "23505": ("a constraint of the database forbids it", _STALE),
    "25006": (
        "the server is read-only: a replica, or a read-only transaction",
        "Give the store the primary's address; a replica is for reading single streams.",
    ),
    "28": ("the server refused the login", "Check the user, the password and pg_hba.conf."),
    "3D000": ("the database does not exist", "Check the database's name in the DSN."),
    "3F000": ("the schema does not exist", "Run `await store.migrate()` once, as its owner."),
    "40": ("the transaction was given up in favour of another one", "Make the same call again."),
    "42501": (
        "the role may not do this",
        "`await store.migrate(role=…)`, as the owner, gives a role what it needs.",
    ),
    "42704": (
        "the server does not know what is named here",
        "If it is a setting: what in a DSN is no option of libpq is a setting of the server.",
    ),
    "42": (
        "the store's tables or functions are missing or others",
        "Run `await store.migrate()` once, as their owner; is `schema` the one that was migrated?",
    ),
    "53100": ("the disk of the server is full", "Make room on it."),
    "53200": (
        "the server's memory or lock table is full",
        "Raise max_locks_per_transaction, or have fewer processes append at once.",
    ),
    "53300": (
        "the server has no connection left",
        "Lower `connections` of the stores, or raise max_connections.",
    ),
    "53": ("the server is short of something", _ADMINISTRATOR),
    "54": ("something is larger than the server can store", "The message names it."),
    "55P03": ("a lock was not had within lock_timeout", "Make the same call again."),
    "57014": (
        "it took longer than statement_timeout allows, or was cancelled by an administrator",
        "Make the same call again; raise statement_timeout for this role if it stays so.",
    ),
    "57": ("the server was stopped, or is starting", "It may be made again when it is up."),
}
_UNREACHABLE = ("the server could not be reached, or the connection was lost", "Is it running?")
_REFUSED = ("the server refused it", "The message says why.")
_UNKNOWN = (
    "Whether it was stored is not known: the answer was lost. The same call, with the same event "
    "ids, finds out and stores nothing twice."
)


def storage_error(error: DriverError, *, unknown: bool = False) -> StorageError:
    """The error for the caller; `unknown` is whether the call may have been committed."""
    what, remedy = (
        _REMEDIES.get(error.sqlstate)
        or _REMEDIES.get(error.sqlstate[:2])
        or (_REFUSED if error.sqlstate else _UNREACHABLE)
    )
    code = f", SQLSTATE {error.sqlstate}" if error.sqlstate else ""
    stored = _UNKNOWN if unknown else "This call changed nothing."
    failure = StorageError(
        f"PostgreSQL failed: {what}{code}.\n  It said: {error}\n  {stored}\n  {remedy}"
    )
    failure.__cause__ = error
    return failure
