"""What the settings of a server mean for a store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from attrs import frozen

from .diagnosis import Fault, Finding, concluded

_VERSIONS = range(14, 19)
_LOCKS = 2 * 128  # of a process both of whose lanes send the largest batch
_PROCESSES = 4
_APART = 5.0  # seconds between two clocks
_NOT_DURABLE = {
    "fsync": "a crash of the machine may destroy the database",
    "full_page_writes": "a crash of the machine may destroy what is stored",
    "synchronous_commit": "a crash of the server may lose the latest appends",
}
_LIMITS = ("statement", "lock", "idle_in_transaction_session", "idle_session", "transaction")


@frozen
class Server:
    """A session with a server, as the server describes it; settings as in `pg_settings`.

    `apart` is how many seconds its clock is ahead of this machine's. `limits` are those of the role
    and the database, -1 for none.
    """

    role: str
    replica: bool
    settings: Mapping[str, str]
    used: int
    limits: Sequence[int]
    apart: float

    def number(self, name: str) -> int:
        return int(self.settings.get(name, "0"))

    @property
    def primary(self) -> bool:
        """Whether it can be written to."""
        return not self.replica and self.settings["default_transaction_read_only"] == "off"


def judged(server: Server, connections: int) -> Iterator[Finding]:
    """What there is to say about it, for a store with that many connections."""
    yield from _session(server)
    lost: list[Fault] = [
        ("warning", f"{name} is off: {what}.", f"Set {name} to on, unless that is meant.")
        for name, what in _NOT_DURABLE.items()
        if server.settings[name] == "off"
    ]
    yield from concluded("durability", "an append that returned is on disk", *lost)
    yield from _connections(server, connections)
    places = server.number("max_connections") + server.number("max_prepared_transactions")
    room = server.number("max_locks_per_transaction") * places // _LOCKS
    text = f"the lock table has room for {room} processes that send their largest batches"
    remedy = "Where it is full, batches get smaller. Raise max_locks_per_transaction."
    small: list[Fault] = [("warning", f"{text}.", remedy)] if room < _PROCESSES else []
    yield from concluded("locks", text, *small)
    limited = [
        f"{name}_timeout is {server.number(f'{name}_timeout') / 1000:g} s"
        for name in _LIMITS
        if server.number(f"{name}_timeout")
    ]
    yield Finding("time limits", "ok", ", ".join(limited) or "none")
    text = f"it is {abs(server.apart):.1f} s {'ahead of' if server.apart > 0 else 'behind'} ours"
    remedy = "`recorded_at` is the server's time. Have both clocks set by NTP."
    wrong: list[Fault] = [("warning", f"{text}.", remedy)] if abs(server.apart) > _APART else []
    yield from concluded("clock", text, *wrong)


def _session(server: Server) -> list[Finding]:
    settings, version = server.settings, server.settings["server_version"]
    faults: list[Fault] = []
    if server.number("server_version_num") // 10_000 not in _VERSIONS:
        faults.append(
            ("warning", f"PostgreSQL {version} is not one of 14 to 18, which are supported.", "")
        )
    if (encoding := settings["server_encoding"]) != "UTF8":
        remedy = "Create the database anew: CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0;"
        faults.append(("problem", f"Its encoding, {encoding}, cannot hold every text.", remedy))
    if server.replica:
        text = "It is a replica: appends fail, and reads of the whole store do."
        faults.append(("problem", text, "Give the store the primary's address."))
    elif not server.primary:
        text = "Appends fail: default_transaction_read_only is on."
        faults.append(("problem", text, "ALTER ROLE … SET default_transaction_read_only = off;"))
    isolation = settings["default_transaction_isolation"]
    if isolation != "read committed":
        text = f"Reads of the whole store fail: default_transaction_isolation is {isolation}."
        remedy = "ALTER ROLE … SET default_transaction_isolation = 'read committed';"
        faults.append(("problem", text, remedy))
    return concluded("server", f"PostgreSQL {version}, as role {server.role!r}", *faults)


def _connections(server: Server, connections: int) -> list[Finding]:
    needed = connections + 1  # one listens
    slots = server.number("max_connections") - server.number("superuser_reserved_connections")
    slots -= server.number("reserved_connections")  # since PostgreSQL 16
    allowed = min([slots, *(limit for limit in server.limits if limit >= 0)])
    text = f"a store opens {needed} at most; {server.used} of the server's {slots} are taken now"
    remedy = "Lower `connections` of the stores, or raise max_connections or the role's own limit."
    if needed > allowed:
        fault: Fault = ("problem", f"A store may open {needed}, and {allowed} are allowed.", remedy)
        return concluded("connections", text, fault)
    if needed > slots - server.used:
        return concluded("connections", text, ("warning", f"{text}.", remedy))
    return concluded("connections", text)
