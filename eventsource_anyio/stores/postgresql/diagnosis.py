"""What the doctor says: findings, and a verdict."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable
from typing import Literal, Protocol, TypeAlias

from attrs import frozen

from ...errors import EventSourceError

Level: TypeAlias = Literal["ok", "warning", "problem"]


@frozen
class Finding:
    """One thing that was looked at, and what to do about it.

    With a problem the store does not work, or not as it promises; a warning is to be known.
    """

    check: str
    level: Level
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        lines = [*f"{self.check}: {self.text}".splitlines(), *self.remedy.splitlines()]
        return f"{self.level:8} " + "\n           ".join(line.strip() for line in lines)


@frozen
class Diagnosis:
    """What `PostgreSQLEventStore.doctor()` found; as a string, for people."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no problem; there may be warnings."""
        return not any(one.level == "problem" for one in self.findings)

    def __str__(self) -> str:
        counts = [
            f"{count} {level}{'s'[: count != 1]}"
            for level in ("problem", "warning")
            if (count := sum(one.level == level for one in self.findings))
        ]
        verdict = "The store can be used" if self.ok else "The store cannot be relied on"
        return "\n".join(
            [*map(str, self.findings), f"{verdict}: {', '.join(counts) or 'all is well'}."]
        )


Fault: TypeAlias = tuple[Level, str, str]


def concluded(check: str, fine: str, *faults: Fault) -> list[Finding]:
    """What is wrong, or else that it is fine."""
    return [Finding(check, *fault) for fault in faults] or [Finding(check, "ok", fine)]


class Verdict(Protocol):
    """What a gap stress test found; as a string, for people."""

    @property
    def ok(self) -> bool:
        """Whether nothing was wrong, and there were gaps to show it by."""
        ...

    @property
    def failed(self) -> bool:
        """Whether anything was wrong."""
        ...


class GapStress(Protocol):
    """`gap_stress` of `eventsource_anyio.testing.gap_stress`, or a `partial` of it."""

    def __call__(self, dsn: str, /, *, schema: str) -> Awaitable[Verdict]: ...


async def stressed(diagnosis: Diagnosis, gap_stress: GapStress, dsn: str) -> Diagnosis:
    """Add what the gap stress test finds, in a schema of its own, which it makes and drops."""
    try:
        verdict = await gap_stress(dsn, schema=f"eventsource_doctor_{secrets.token_hex(8)}")
    except (EventSourceError, RuntimeError) as error:
        remedy = "It needs a role that may create schemas: GRANT CREATE ON DATABASE … TO …;"
        finding = Finding("gap stress", "problem", f"it could not be run. {error}", remedy)
    else:
        level: Level = "problem" if verdict.failed else "ok" if verdict.ok else "warning"
        finding = Finding("gap stress", level, str(verdict))
    return Diagnosis((*diagnosis.findings, finding))
