"""Whether what came back is what went in, and if not, where.

Two values are the same if they are equal by `==`, looked at part by part: a compound value is taken
apart, so that neither the `__eq__` of its class nor a field left out of it (`eq=False`) decides,
only its innermost values do. The class must be the same, but a subclass of a built-in collection
may come back as the plain one. Where `==` is no help:

- Two aware datetimes are the same if they are the same instant: `==` between time zones is never
  true for a time that a clock change repeats or leaves out.
- A time of day is compared with its time zone: `==` takes one with a `ZoneInfo` for a naive one.
- A field that is neither stored (`init=False`) nor part of equality (`eq=False`) is not compared.
- A value that is not equal to itself (a NaN) is not the same as anything.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import date, datetime, time
from decimal import Decimal
from itertools import chain
from typing import cast
from uuid import UUID

import attrs

_ABSENT: object = attrs.NOTHING
_ATOMS = frozenset({str, int, float, bool, bytes, type(None), Decimal, UUID, datetime, date})


def show(value: object) -> str:
    """The repr of a value, short enough for a message, and never raising."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001
        text = f"<{type(value).__qualname__}>"
    return text if len(text) <= 100 else f"{text[:97]}..."


def members(value: object) -> list[tuple[str, object]] | None:
    """The parts of a compound value, each with its step of the path; None if it is not compound."""
    cls = type(value)
    if cls in _ATOMS:
        return None
    fields = _attrs_fields(cls)
    if fields is not None:
        return [
            (f".{field.alias}", getattr(value, field.name, _ABSENT))
            for field in fields
            if field.init or field.eq
        ]
    names = record_fields(cls)
    if names is not None:
        return [(f".{name}", getattr(value, name, _ABSENT)) for name in names]
    if issubclass(cls, (list, tuple)):
        items = cast("Iterable[object]", value)
        return [(f"[{index}]", item) for index, item in enumerate(items)]
    if issubclass(cls, (set, frozenset)):
        return [("[...]", item) for item in cast("Iterable[object]", value)]
    if issubclass(cls, dict):
        mapping = cast("dict[object, object]", value)
        return [(f"[{show(key)}]", item) for key, item in mapping.items()]
    return None


def _attrs_fields(cls: type[object]) -> tuple[attrs.Attribute[object], ...] | None:
    # What `attrs.has` and `attrs.fields` do, without their search for generic bases.
    return getattr(cls, "__attrs_attrs__", None)


def record_fields(cls: type[object]) -> Iterable[str] | None:
    """The fields of a dataclass, Struct or NamedTuple; None for another class."""
    if dataclasses.is_dataclass(cls):
        return [field.name for field in dataclasses.fields(cls)]
    return getattr(cls, "__struct_fields__", getattr(cls, "_fields", None))


def difference(ours: object, theirs: object) -> tuple[str, str] | None:
    """None if they are the same, else the path from here to the first difference, and the reason.

    The path is relative, empty for the values themselves. `ours` went in, `theirs` came back.
    """
    cls, other_cls = type(ours), type(theirs)
    if cls in _ATOMS:
        return None if _same(ours, theirs) else _changed(ours, theirs)
    if issubclass(cls, dict) and issubclass(other_cls, dict):
        return _mapping_difference(
            cast("dict[object, object]", ours), cast("dict[object, object]", theirs)
        )
    if issubclass(cls, (set, frozenset)) and issubclass(other_cls, (set, frozenset)):
        pairs = _pairs(cast("Iterable[object]", ours), cast("Iterable[object]", theirs))
        alone = any(our is _ABSENT or their is _ABSENT for our, their in pairs)
        return _changed(ours, theirs) if alone else None
    parts, other_parts = members(ours), members(theirs)
    if parts is None or other_parts is None:
        return None if _same(ours, theirs) else _changed(ours, theirs)
    alike = cls is other_cls or (other_cls in (list, tuple) and issubclass(cls, other_cls))
    if not alike or len(parts) != len(other_parts):
        return _changed(ours, theirs)
    for (step, our), (_, their) in zip(parts, other_parts, strict=True):
        found = difference(our, their)
        if found is not None:
            path, reason = found
            if step in _made_anew(ours):
                reason = f"it is init=False, so its class makes it anew, and {reason}"
            return step + path, reason
    return None


def _made_anew(value: object) -> set[str]:
    return {f".{field.alias}" for field in _attrs_fields(type(value)) or () if not field.init}


def _mapping_difference(
    ours: dict[object, object], theirs: dict[object, object]
) -> tuple[str, str] | None:
    for key, other_key in _pairs(ours, theirs):
        if key is _ABSENT or other_key is _ABSENT:
            return _changed(ours, theirs)
        found = difference(ours[key], theirs[other_key])
        if found is not None:
            path, reason = found
            return f"[{show(key)}]{path}", reason
    return None


def _pairs(ours: Iterable[object], theirs: Iterable[object]) -> Iterator[tuple[object, object]]:
    """Each of ours with the same one of theirs; one that has none is paired with NOTHING."""
    rest: defaultdict[int, list[object]] = defaultdict(list)
    for their in theirs:
        rest[hash(their)].append(their)
    for our in ours:
        # The hash is only where to look first: the copy of an object that is hashed by identity, or
        # of a time in a repeated hour, has another one.
        likely = rest.get(hash(our), [])
        for bucket in chain([likely], rest.values()):
            index = next((i for i, it in enumerate(bucket) if difference(our, it) is None), -1)
            if index >= 0:
                yield our, bucket.pop(index)
                break
        else:
            yield our, _ABSENT
    for their in chain.from_iterable(rest.values()):
        yield _ABSENT, their


def _same(ours: object, theirs: object) -> bool:
    try:
        if isinstance(ours, datetime) and isinstance(theirs, datetime):
            offset, other_offset = ours.utcoffset(), theirs.utcoffset()
            if offset is not None and other_offset is not None:
                # Not through UTC, where the first and last hours of the calendar do not fit.
                apart = ours.replace(tzinfo=None) - theirs.replace(tzinfo=None)
                return apart == offset - other_offset
        elif isinstance(ours, time) and isinstance(theirs, time):
            return ours == theirs and (ours.tzinfo is None) == (theirs.tzinfo is None)
        return bool(ours == theirs)
    except Exception:  # noqa: BLE001
        return False


def _changed(ours: object, theirs: object) -> tuple[str, str]:
    before, after = show(ours), show(theirs)
    if before == after:
        return "", f"what would come back for {before} is not equal to it"
    return "", f"{before} would come back as {after}"
