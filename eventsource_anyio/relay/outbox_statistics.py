"""How a relay of the outbox is getting on."""

from __future__ import annotations

from typing import Literal, TypeAlias

from attrs import frozen

State: TypeAlias = Literal["stopped", "waiting", "running", "retrying"]


@frozen
class OutboxStatistics:
    """The relay, as it is known here without asking anybody.

    `state` is "waiting" while another relay has the lease, "retrying" while something keeps
    failing, "stopped" while it is not run. `delivered` and `rate`, which is messages a second of
    the last ten, are of this relay. `lag_seconds` is how old the oldest message is that it found
    undelivered when it looked last, those that are set aside not counted. `failing` and `parked`
    are how many keys are being tried again, and are set aside. `error` is what failed last, until
    nothing does.
    """

    state: State
    delivered: int
    rate: float
    lag_seconds: float
    failing: int
    parked: int
    error: str | None
