"""The PostgreSQL store.

What it is (`store`), what it says to the server (`sql/`, `schema`, `statements`, `writing`), how
concurrent appends share a commit (`group_commit`), how readers know how far to go (`tail`), the
user's SQL (`transaction`), connections (`driver` and what is behind it, `pool`), and what may be
wrong with the server (`doctor`, `catalog`, `settings`, `diagnosis`).
"""

from .diagnosis import Diagnosis, Finding
from .metadata import metadata
from .schema import migration_sql
from .store import PostgreSQLEventStore
from .transaction import PostgreSQLTransaction

__all__ = [
    "Diagnosis",
    "Finding",
    "PostgreSQLEventStore",
    "PostgreSQLTransaction",
    "metadata",
    "migration_sql",
]
