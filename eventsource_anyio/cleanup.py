"""The one place that shields clean-up from cancellation; bounded, so it cannot hang for ever."""

from __future__ import annotations

import anyio

_SECONDS = 30.0


def shielded_cleanup() -> anyio.CancelScope:
    """A scope for clean-up that awaits: not cancelled from outside, given up after 30 s."""
    return anyio.move_on_after(_SECONDS, shield=True)
