"""The SQLite store: what it is (`store`), its file (`database`), and its thread (`worker`)."""

from .store import SQLiteEventStore

__all__ = ["SQLiteEventStore"]
