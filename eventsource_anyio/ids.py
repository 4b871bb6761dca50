"""Identifiers: event ids, aggregate ids, and the stream id made of an aggregate's type and id.

- A stream id is `{aggregate_type}-{aggregate_id}`. A type holds no `-`, so that the id always
  begins after the first one and two streams never share a stream id.
- A string in the canonical form of a UUID *is* that UUID, whoever wrote it: both name the same
  stream, and it comes back as a `UUID`. Any other string comes back as it was.
- The slice of a stream never changes: readers that share the slices among them have stored how far
  each has read, and a database computes the same in SQL.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from hashlib import md5
from typing import Final, TypeAlias
from uuid import UUID

from msgspec import convert

AggregateId: TypeAlias = UUID | str

SLICES: Final = 1024
_LONGEST = 255

if sys.version_info >= (3, 14):
    from uuid import uuid7
else:
    import os
    from random import Random
    from time import time_ns

    # Seeded by the system, apart from the program's own random numbers, and anew after a fork: a
    # system call for every id would cost more than the rest of it.
    _random = Random()  # noqa: S311  (an id is no secret)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_random.seed)

    def uuid7() -> UUID:
        """A UUID of version 7 (RFC 9562, method 3): sorts by the time it was made at."""
        milliseconds, nanoseconds = divmod(time_ns(), 1_000_000)
        head = milliseconds << 16 | 0x7000 | nanoseconds * 4096 // 1_000_000
        tail = 0x8000_0000_0000_0000 | _random.getrandbits(62)
        return convert((head << 64 | tail).to_bytes(16, "big"), UUID)


def uuid_of(data: bytes) -> UUID:
    """The UUID of 16 bytes; four times as fast as its constructor."""
    return convert(data, UUID)


def check_name(what: str, value: object, longest: int = _LONGEST) -> str:
    """The value as a plain string, as which it will come back, if it was a member of an enum.

    `ValueError` or `TypeError` if it is not a text that every database stores, and finds again.
    """
    if not isinstance(value, str):
        raise TypeError(f"{what} must be a string, not {type(value).__name__}: {value!r}")
    if not value or len(value) > longest:
        raise ValueError(f"{what} must have 1 to {longest} characters, not {len(value)}")
    if "\0" in value or not (value.isascii() or _is_text(value)):
        raise ValueError(f"{what} holds a character that no database stores as text: {value!r}")
    return str.__str__(value)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def normalize_aggregate_id(aggregate_id: AggregateId) -> AggregateId:
    """The id as every store keeps it; `ValueError` or `TypeError` if it cannot be one."""
    if isinstance(aggregate_id, UUID):
        return aggregate_id
    if not isinstance(aggregate_id, str):
        raise TypeError(
            f"aggregate_id must be a UUID or a string, not {type(aggregate_id).__name__}: "
            f"{aggregate_id!r}. Convert it, such as str({aggregate_id!r})."
        )
    aggregate_id = check_name("aggregate_id", aggregate_id)
    if len(aggregate_id) == 36 and aggregate_id[8] == "-":
        try:
            parsed = UUID(aggregate_id)
        except ValueError:
            return aggregate_id
        if str(parsed) == aggregate_id:
            return parsed
    return aggregate_id


@lru_cache(maxsize=1024)
def check_aggregate_type(aggregate_type: str) -> str:
    """It as a plain string; `ValueError` or `TypeError` if it cannot be an aggregate type."""
    aggregate_type = check_name("aggregate_type", aggregate_type)
    if "-" in aggregate_type:
        raise ValueError(
            f"aggregate_type {aggregate_type!r} holds a '-', which ends the type in a stream id. "
            "Use '_' or '.' instead."
        )
    return aggregate_type


def stream_id_of(aggregate_type: str, aggregate_id: AggregateId) -> str:
    return f"{aggregate_type}-{aggregate_id}"


def slice_of(stream_id: str) -> int:
    """Which of the 1,024 slices a stream belongs to, by a hash of its id: from 0 to 1023.

    The last 10 bits of the first 32 of the MD5 of the id in UTF-8.
    """
    digest = md5(stream_id.encode(), usedforsecurity=False).digest()
    return int.from_bytes(digest[2:4], "big") & (SLICES - 1)


def parse_stream_id(stream_id: str) -> tuple[str, AggregateId]:
    """The aggregate type and id of a stream id; `ValueError` if it is none."""
    if not isinstance(stream_id, str):
        raise TypeError(f"stream_id must be a string, not {type(stream_id).__name__}")
    aggregate_type, dash, aggregate_id = stream_id.partition("-")
    if not (aggregate_type and dash and aggregate_id):
        raise ValueError(
            f"{stream_id!r} is not a stream id, which is the aggregate type, '-' and the aggregate "
            "id, such as 'Account-6f1c8a52-…'; StoredEvent.stream_id gives it."
        )
    return check_aggregate_type(aggregate_type), normalize_aggregate_id(aggregate_id)
