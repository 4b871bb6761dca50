"""For tests: the contracts of stores and buses, given/when/then, cancellation, fixtures.

`EventStoreContract` is subclassed with a `store` fixture, `EventBusContract` with a `bus` fixture,
and run by pytest with anyio's plugin.
The fixtures `event_store` and `sqlite_event_store` are there wherever this package is installed.
"""

import pytest

pytest.register_assert_rewrite(
    *(f"eventsource_anyio.testing.{name}" for name in ("appending", "reading", "subscribing")),
    *(f"eventsource_anyio.testing.{name}" for name in ("repositories", "documents", "transacting")),
    *(
        f"eventsource_anyio.testing.{name}"
        for name in (
            "document_transacting",
            "sql_transacting",
            "cancelling",
            "buses",
            "brokers",
            "broker_failures",
        )
    ),
)

from .buses import EventBusContract  # noqa: E402
from .cancelling import cancel_at_every_checkpoint  # noqa: E402
from .clock import ManualClock  # noqa: E402
from .contract import EventStoreContract  # noqa: E402
from .scenario import given  # noqa: E402

__all__ = [
    "EventBusContract",
    "EventStoreContract",
    "ManualClock",
    "cancel_at_every_checkpoint",
    "given",
]
