"""Read models and reactions: what makes them, and what runs it."""

from .base import Projection, handles
from .coordinator import ProjectionCoordinator
from .inline import Inline
from .parked import ParkedStream
from .process_manager import ProcessManager, Reaction
from .progress import ProjectionStatistics
from .rebuilding import BuildProgress
from .timers import Clock, PendingTimer, SystemClock
from .view import SingleStreamView, evolves

__all__ = [
    "BuildProgress",
    "Clock",
    "Inline",
    "ParkedStream",
    "PendingTimer",
    "ProcessManager",
    "Projection",
    "ProjectionCoordinator",
    "ProjectionStatistics",
    "Reaction",
    "SingleStreamView",
    "SystemClock",
    "evolves",
    "handles",
]
