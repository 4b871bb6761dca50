"""The store's tables as SQLAlchemy knows them, for Alembic and for the user's own queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .asyncpg_driver import missing
from .schema import Schema

if TYPE_CHECKING:
    from sqlalchemy import MetaData
