"""What a failed call of SQLite means to the caller."""

from __future__ import annotations

from ...errors import StorageError

_BUSY, _LOCKED = 5, 6


def is_locked(error: BaseException | None) -> bool:
    """Whether another process, or a checkpoint, was just using the database."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (_BUSY, _LOCKED)


def storage_error(error: BaseException) -> StorageError:
    failure = StorageError(
        f"SQLite failed: {error} ({type(error).__name__}).\n"
        "  Nothing of this call was stored.\n"
        "  Look at the disk (space, permissions, health); the same call, with the same event ids, "
        "can be made again."
    )
    failure.__cause__ = error
    return failure
