"""Relays: what takes events, and the messages of the outbox, out of the store to somewhere else."""

from .event_relay import EventRelay
from .outbox_relay import OutboxRelay
from .outbox_statistics import OutboxStatistics
from .parked_messages import ParkedKey

__all__ = ["EventRelay", "OutboxRelay", "OutboxStatistics", "ParkedKey"]
