"""Read models: what makes them, and what runs it."""

from .base import Projection, handles
from .coordinator import ProjectionCoordinator
from .parked import ParkedStream
from .progress import ProjectionStatistics

__all__ = [
    "ParkedStream",
    "Projection",
    "ProjectionCoordinator",
    "ProjectionStatistics",
    "handles",
]
