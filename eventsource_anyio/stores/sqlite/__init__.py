"""The SQLite store.

What it is (`store`), its file (`database`), its thread (`worker`), and the user's SQL
(`transaction`) on a connection of its own (`sql`).
"""

from .store import SQLiteEventStore
from .transaction import SQLiteTransaction

__all__ = ["SQLiteEventStore", "SQLiteTransaction"]
