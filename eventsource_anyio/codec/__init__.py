"""attrs classes to JSON bytes and back: the same, or not at all.

- What `Codec.encode` returns, `Codec.decode` turns into an equal value; it is read back before it
  is returned. Equal is what is equal by `==`, part by part (difference.py): `12` in a Decimal field
  is fine, for `Decimal(12)` comes back; `"12"` is not. So an aware datetime comes back as the same
  instant at a fixed offset, and the fold of a naive one is not kept.
- A type whose values could never come back is refused when the codec is made. Where it depends on
  the value, the value is refused: a tuple in a `Sequence` field, which comes back as a list, or an
  instance of a subclass of `Money` in a `Money` field.
- Fields in JSON that the class does not have are ignored, so that newer code may add some. A field
  that is missing has its default; if it has none, the JSON cannot be read.
- Constructors, converters and validators run on reading as they do anywhere else.

This knows nothing of events; it is for any attrs class.
"""

from __future__ import annotations

import re
from typing import Generic, TypeVar, cast

import msgspec

from ..errors import EventDefinitionError
from .difference import difference, members, show
from .shadows import PayloadError, describe
from .shapes import shape_of

__all__ = ["Codec", "PayloadError"]

T = TypeVar("T")

_write_json = msgspec.json.Encoder().encode


class Codec(Generic[T]):
    """Writes the values of one class and reads them; made once a class, used from any thread.

    Raises EventDefinitionError, which names the class and the field, for what could not come back.
    """

    __slots__ = ("_exact", "_lift", "_lower", "_read_json")

    def __init__(self, cls: type[T]) -> None:
        shape, self._exact = shape_of(cls)
        self._lower = shape.lower
        self._lift = shape.lift
        try:
            self._read_json = msgspec.json.Decoder(shape.wire).decode
        except Exception as error:
            raise EventDefinitionError(
                f"{cls.__qualname__} could not be stored and come back the same.\n"
                f"  msgspec says: {error}.\n"
                "  Change the annotation, or make an attrs class of what it is about."
            ) from error

    def encode(self, value: T) -> bytes:
        """The value as JSON of which `decode` makes an equal one; PayloadError if there is none."""
        lowered: object = value
        try:
            if self._lower is not None:
                lowered = self._lower(value)
            data = _write_json(lowered)
        except PayloadError:
            raise
        except Exception as error:
            raise _not_written(lowered, error) from error
        try:
            copy: object = self._read_json(data)
            if self._lift is not None:
                copy = self._lift(copy)
        except Exception as error:
            unread = error if isinstance(error, PayloadError) else _not_read(error)
            culprit = show(_part(value, unread.path))
            reason = f"{culprit} could not be read back: {unread.reason}"
            raise PayloadError(unread.path, reason) from error
        try:
            if self._exact and value == copy:
                return data
        except Exception:  # noqa: BLE001, S110
            pass  # Some values refuse to be compared; the slow way says which.
        try:
            found = difference(value, copy)
        except Exception as error:
            raise PayloadError("$", describe(error)) from error
        if found is None:
            return data
        path, reason = found
        raise PayloadError(f"${path}", reason)

    def decode(self, data: bytes | str) -> T:
        """The value that the JSON stands for; PayloadError, and nothing else, if there is none."""
        try:
            read: T = self._read_json(data)
            return read if self._lift is None else cast("T", self._lift(read))
        except PayloadError:
            raise
        except Exception as error:
            raise _not_read(error) from error

    def convert(self, payload: dict[str, object]) -> T:
        """The value that JSON taken apart stands for, such as what an upcaster has made of it."""
        try:
            data = _write_json(payload)
        except Exception as error:
            raise _not_written(payload, error) from error
        return self.decode(data)


def _not_written(value: object, error: Exception) -> PayloadError:
    """What of the value could not be written, found by writing its parts one by one."""
    path = "$"
    parts = [] if isinstance(error, RecursionError) else members(value)
    while parts:
        for step, part in parts:
            try:
                _write_json(part)
            except Exception as inner:  # noqa: BLE001
                path, value, error = path + step, part, inner
                break
        else:
            break
        parts = [] if isinstance(error, RecursionError) else members(value)
    if isinstance(error, UnicodeEncodeError):
        return PayloadError(path, f"{show(value)} holds half a surrogate pair, which is not text")
    if isinstance(error, TypeError) and members(value) is None:
        return PayloadError(path, f"{show(value)} of {type(value).__qualname__} has no JSON form")
    return PayloadError(path, describe(error))


def _not_read(error: Exception) -> PayloadError:
    """What msgspec or a constructor says, its path taken apart."""
    if not isinstance(error, msgspec.ValidationError):
        return PayloadError("$", describe(error))
    reason, found, place = str(error).rpartition(" - at ")
    match = re.fullmatch(r"(`key.*` in )?`(\$.*)`", place)
    if not found or match is None:
        reason, path = str(error), "$"
    else:
        path = match[2]
        if match[1]:
            reason = f"a key: {reason}"
    if error.__cause__ is not None:
        return PayloadError(path, describe(error.__cause__))
    missing = re.fullmatch("Object missing required field `(.*)`", reason)
    if missing is not None:
        return PayloadError(f"{path}.{missing[1]}", "it is missing, and has no default")
    return PayloadError(path, reason)


def _part(value: object, path: str) -> object:
    """The part of the value at the path, or what is nearest to it."""
    rest = path[1:]
    found = True
    while rest and found:
        found = False
        for step, part in members(value) or ():
            if rest == step or rest.startswith((f"{step}.", f"{step}[")):
                value, rest, found = part, rest[len(step) :], True
                break
    return value
