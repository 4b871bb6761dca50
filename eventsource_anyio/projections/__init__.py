"""Read models and reactions: what makes them, and what runs it."""

from .base import Projection, handles
from .coordinator import ProjectionCoordinator
from .parked import ParkedStream
from .process_manager import ProcessManager, Reaction
from .progress import ProjectionStatistics
from .timers import Clock, SystemClock

__all__ = [
    "Clock",
    "ParkedStream",
    "ProcessManager",
    "Projection",
    "ProjectionCoordinator",
    "ProjectionStatistics",
    "Reaction",
    "SystemClock",
    "handles",
]
