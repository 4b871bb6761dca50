"""For tests: the contracts of stores and buses, given/when/then, cancellation, fixtures.

`EventStoreContract` is subclassed with a `store` fixture, `EventBusContract` with a `bus` fixture,
and run by pytest with anyio's plugin.
The fixtures `event_store` and `sqlite_event_store` are there wherever this package is installed.
"""

import sys
from typing import TYPE_CHECKING

# Elsewhere, as in processes that tests start, nothing is to be explained.
if "pytest" in sys.modules:
    sys.modules["pytest"].register_assert_rewrite(
        *(f"{__name__}.{name}" for name in ("appending", "reading", "subscribing")),
        *(f"{__name__}.{name}" for name in ("repositories", "documents", "transacting")),
        *(f"{__name__}.{name}" for name in ("document_transacting", "sql_transacting")),
        *(f"{__name__}.{name}" for name in ("cancelling", "buses", "brokers", "broker_failures")),
    )

if TYPE_CHECKING:
    from .buses import EventBusContract
    from .cancelling import cancel_at_every_checkpoint
    from .clock import ManualClock
    from .contract import EventStoreContract
    from .scenario import given
else:
    from ..importing import imported_later as _imported_later

    # A process that needs one of them, or a module beside them, does not import pytest for it.
    __getattr__, __dir__ = _imported_later(
        globals(),
        {
            "EventBusContract": ".buses",
            "EventStoreContract": ".contract",
            "ManualClock": ".clock",
            "cancel_at_every_checkpoint": ".cancelling",
            "given": ".scenario",
        },
    )

__all__ = [
    "EventBusContract",
    "EventStoreContract",
    "ManualClock",
    "cancel_at_every_checkpoint",
    "given",
]
