"""The event bus, as far as those who publish need it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from ..events import StoredEvent


class EventBus(ABC):
    """Live fan-out of stored events. It keeps nothing: the store is the truth."""

    @abstractmethod
    async def publish(self, events: Sequence[StoredEvent], background: bool = False) -> None:
        """Return when every handler has the events handled, or queued with `background`.

        A handler's failure is raised here, after the others have had the events.
        """
