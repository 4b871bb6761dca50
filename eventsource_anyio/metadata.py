"""Metadata that follows the caller's context: correlation id, causation id, and the user's own.

It lives in a context variable, so that it holds for every append made inside the `with` block, in
tasks started there too, and for nobody else.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import TypeAlias
from uuid import UUID

from msgspec import DecodeError
from msgspec.json import Decoder, Encoder

Metadata: TypeAlias = Mapping[str, object]

NO_METADATA: Metadata = MappingProxyType({})

_current: ContextVar[Metadata] = ContextVar("eventsource_anyio.metadata", default=NO_METADATA)
_encode = Encoder().encode
_decode = Decoder(dict[str, object]).decode


@contextmanager
def event_metadata(
    *,
    correlation_id: UUID | str | None = None,
    causation_id: UUID | str | None = None,
    **metadata: object,
) -> Generator[None]:
    """Give every event appended inside this metadata; inner blocks add to outer ones.

    What is given to `append_events` or `NewEvent` wins over it. Values are JSON: strings, numbers,
    booleans, None, lists and dicts of them.
    """
    given: dict[str, object] = {**metadata}
    if correlation_id is not None:
        given["correlation_id"] = str(correlation_id)
    if causation_id is not None:
        given["causation_id"] = str(causation_id)
    token = _current.set({**_current.get(), **given})
    try:
        yield
    finally:
        _current.reset(token)


def merge_metadata(*given: Metadata | None) -> Metadata:
    """What the context holds, overridden by what is given, later over earlier."""
    merged = _current.get()
    for one in given:
        if one:
            merged = {**merged, **one}
    return merged


def encode_metadata(metadata: Metadata) -> str | None:
    """JSON of the metadata, None for none; `ValueError` if it would not come back the same."""
    if not metadata:
        return None
    plain = {
        key: str(value) if key in _IDS and isinstance(value, UUID) else value
        for key, value in metadata.items()
    }
    try:
        data = _encode(plain)
        same = _decode(data) == plain
    except (TypeError, ValueError, RecursionError, DecodeError) as error:
        raise ValueError(f"metadata {dict(metadata)!r} is not JSON: {error}") from error
    if not same:
        raise ValueError(
            f"metadata {dict(metadata)!r} would come back as {_decode(data)!r}. "
            "Use strings, numbers, booleans, None, lists and dicts with string keys."
        )
    return data.decode()


_IDS = frozenset(("correlation_id", "causation_id"))


def decode_metadata(data: str | bytes | None) -> Metadata:
    """A plain dict in any case, so that what holds it can be pickled, copied and made JSON."""
    return _decode(data) if data else {}
