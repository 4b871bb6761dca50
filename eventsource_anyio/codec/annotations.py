"""What the annotations of a class mean: names looked up, mere wrappers taken off."""

from __future__ import annotations

import re
import sys
import types
import typing
from typing import Annotated, Any, Final, NewType, Protocol, TypeGuard, Union, cast

import attrs

from ..errors import EventDefinitionError


class _Alias(Protocol):
    """What a `type` statement makes; its class is not in the `typing` of Python 3.11."""

    __value__: object


_UNBOUND: dict[str, Any] = {}
if sys.version_info >= (3, 14):
    import annotationlib

    # An annotation without quotes, too, may name what is not bound yet.
    _UNBOUND["format"] = annotationlib.Format.FORWARDREF

_QUALIFIERS = frozenset({"Required", "NotRequired", "ReadOnly"})


def name_of(annotation: object) -> str:
    """An annotation as it is written in source, without its modules."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return "None" if annotation is type(None) else annotation.__qualname__
    return re.sub(r"(?:[^\W\d]\w*\.|<locals>\.)+(?=\w)", "", str(annotation))


def annotations_of(cls: type) -> tuple[dict[str, object], bool]:
    """The annotations by name, and whether anybody else can look them up now, as msgspec would.

    Nobody can while a class that names itself is being defined: its name is not bound yet, or is
    still that of an earlier definition.
    """
    try:
        hints = typing.get_type_hints(cls, include_extras=True)
        if not _is_redefined(cls):
            return hints, True
    except NameError as error:
        if error.name != cls.__name__:
            raise _undefined(cls, str(error.name)) from None
        hints = {}
    except Exception as error:
        raise EventDefinitionError(
            f"The annotations of {cls.__qualname__} cannot be evaluated.\n"
            f"  {type(error).__name__}: {error}.\n"
            "  Correct them."
        ) from error
    names = {name: value for name, value in vars(cls).items() if isinstance(value, type)}
    names[cls.__name__] = cls
    try:
        own = typing.get_type_hints(cls, localns=names, include_extras=True, **_UNBOUND)
    except NameError as error:
        raise _undefined(cls, str(error.name)) from None
    return own, own == hints


def _is_redefined(cls: type) -> bool:
    """Whether its name in its module is that of an earlier definition: a reload, a notebook."""
    bound: object = getattr(sys.modules.get(cls.__module__), cls.__name__, cls)
    return bound is not cls and getattr(bound, "__qualname__", None) == cls.__qualname__


def _undefined(cls: type, name: str) -> EventDefinitionError:
    fields = attrs.fields(cls) if attrs.has(cls) else ()
    users = [f for f in fields if re.search(rf"\b{re.escape(name)}\b", str(f.type))]
    place = f"{cls.__qualname__}.{users[0].name}" if users else cls.__qualname__
    return EventDefinitionError(
        f"{place} names {name}, which is not defined in {cls.__module__}.\n"
        "  What is written in quotes, or under `from __future__ import annotations`, is looked up "
        "by name in the module of the class.\n"
        f"  Define or import {name} above {cls.__qualname__}, at the top level of the module: "
        "not in a function, nor under `if TYPE_CHECKING:`."
    )


def unwrapped(annotation: object) -> object:
    """The annotation without what only gives it a name or qualifies the field."""
    origin = typing.get_origin(annotation)
    if isinstance(annotation, NewType):
        return unwrapped(annotation.__supertype__)
    if type(annotation).__name__ == "TypeAliasType":  # of typing, or of typing_extensions
        return unwrapped(cast("_Alias", annotation).__value__)
    if origin is Final or getattr(origin, "_name", None) in _QUALIFIERS:
        return unwrapped(typing.get_args(annotation)[0])
    return annotation


def is_attrs(annotation: object) -> TypeGuard[type[attrs.AttrsInstance]]:
    return isinstance(annotation, type) and attrs.has(annotation)


def is_union(annotation: object) -> bool:
    return typing.get_origin(annotation) in (Union, types.UnionType)


def members_of_union(annotation: object) -> list[object]:
    """Its members, those of unions inside it included."""
    found: list[object] = []
    for argument in typing.get_args(annotation):
        member = unwrapped(argument)
        plain = member
        if typing.get_origin(member) is Annotated:
            plain = unwrapped(typing.get_args(member)[0])
        if is_union(plain):
            members = members_of_union(plain)
        else:
            members = [plain if is_attrs(plain) else member]
        found.extend(members)
    return found
