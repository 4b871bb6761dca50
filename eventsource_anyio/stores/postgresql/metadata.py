"""The store's tables as SQLAlchemy knows them: for Alembic, and for queries of one's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .schema import Schema

if TYPE_CHECKING:
    from sqlalchemy import MetaData


def metadata(*, schema: str = "eventsource", prefix: str = "") -> MetaData:
    """What `migrate()` makes, as far as SQLAlchemy can say it: for Alembic's `target_metadata`.

    Alembic then finds no differences between a migrated database and the program. The functions,
    the trigger and the settings of the sequence are not in it: `migration_sql` makes them, and
    `store.doctor()` looks after them.
    """
    try:
        import sqlalchemy as sa
        from sqlalchemy.dialects import postgresql as pg
    except ImportError as error:
        raise ImportError(
            "sqlalchemy is not installed, which metadata() needs. It comes with an extra: "
            "pip install 'eventsource-anyio[postgresql]'"
        ) from error

    where = Schema(schema, prefix)
    made = sa.MetaData(schema=where.name)
    exact = sa.Text(collation="C")
    moment = sa.TIMESTAMP(timezone=True)

    def name(suffix: str) -> str:
        return where.prefix + suffix

    positions = sa.Sequence(
        name("positions"), schema=where.name, metadata=made, data_type=sa.BigInteger, cache=1
    )
    sa.Table(
        name("events"),
        made,
        # autoincrement: to Alembic a sequence that a column owns goes without saying
        sa.Column(
            "position",
            sa.BigInteger,
            positions,
            server_default=positions.next_value(),
            autoincrement=True,
        ),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("recorded_at", moment, nullable=False),
        sa.Column("occurred_at", moment),
        sa.Column("event_id", pg.UUID, nullable=False),
        sa.Column("schema_version", sa.Integer, nullable=False),
        sa.Column("event_type", exact, nullable=False),
        sa.Column("aggregate_type", exact, nullable=False),
        sa.Column("aggregate_id", exact, nullable=False),
        sa.Column("metadata", sa.Text),
        sa.Column("payload", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("position", name=name("events_position")),
        sa.UniqueConstraint("event_id", name=name("events_event_id")),
        sa.UniqueConstraint(
            "aggregate_id", "aggregate_type", "version", name=name("events_version")
        ),
        sa.Index(name("events_event_type"), "event_type", "position"),
        sa.Index(name("events_aggregate_type"), "aggregate_type", "position"),
    )
    sa.Table(
        name("checkpoints"),
        made,
        sa.Column("name", exact, nullable=False),
        sa.Column("position", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("name", name=name("checkpoints_name")),
        postgresql_with={"fillfactor": 50},
    )
    sa.Table(
        name("outbox"),
        made,
        sa.Column("position", sa.BigInteger, sa.Identity(always=True), nullable=False),
        sa.Column("recorded_at", moment, server_default=sa.func.clock_timestamp(), nullable=False),
        sa.Column("message_id", pg.UUID, nullable=False),
        sa.Column("topic", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("metadata", sa.Text),
        sa.Column("payload", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("position", name=name("outbox_position")),
        sa.UniqueConstraint("message_id", name=name("outbox_message_id")),
    )
    sa.Table(
        name("documents"),
        made,
        sa.Column("collection", exact, nullable=False),
        sa.Column("key", exact, nullable=False),
        sa.Column("revision", pg.UUID, nullable=False),
        sa.Column("value", pg.JSONB, nullable=False),
        sa.Column("updated_at", moment, nullable=False),
        sa.PrimaryKeyConstraint("collection", "key", name=name("documents_key")),
        postgresql_with={"fillfactor": 50},
    )
    sa.Table(
        name("migrations"),
        made,
        sa.Column("version", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("applied_at", moment, server_default=sa.func.now(), nullable=False),
        sa.PrimaryKeyConstraint("version", name=name("migrations_version")),
    )
    return made
