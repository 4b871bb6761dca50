"""What each annotation is in JSON, and which of its values come back the same.

- msgspec reads and writes directly whatever it gets right; the rest goes by shadow (shadows.py).
- A class that shares a union with another attrs class is stored with its name in `$type`.
- What can never come back the same is refused here, before there is a value of it. What depends on
  the value is left to the codec, which reads everything back.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections import abc
from collections.abc import Iterable, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Literal, TypeVar, Union, cast
from uuid import UUID

import attrs
from msgspec import Struct

from ..errors import EventDefinitionError
from . import shadows
from .annotations import (
    annotations_of,
    is_attrs,
    is_union,
    members_of_union,
    name_of,
    unwrapped,
)
from .difference import record_fields
from .shadows import Conversion

_OBJECT = frozenset({"object"})
_ARRAY = frozenset({"array"})

_SCALARS: dict[object, str] = {
    type(None): "null",
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    bytes: "string",
    bytearray: "string",
    Decimal: "string",
    UUID: "string",
    datetime: "string",
    date: "string",
    time: "string",
    timedelta: "string",
}

_ARRAYS: dict[object, type] = {
    list: list,
    abc.Sequence: list,
    abc.MutableSequence: list,
    abc.Collection: list,
    set: set,
    abc.Set: set,
    abc.MutableSet: set,
    frozenset: frozenset,
    tuple: tuple,
}

_MAPPINGS: tuple[object, ...] = (dict, abc.Mapping, abc.MutableMapping)


class RefusalError(Exception):
    """A type that could not come back the same; the field that has it is added further out."""

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(why, remedy)
        self.why = why
        self.remedy = remedy


@attrs.frozen
class Shape:
    """How the values of one annotation are written and read.

    `wire` is the type that msgspec reads. `lower` makes what msgspec writes of a value, and `lift`
    a value of what msgspec has read; None where they are the same thing. `kinds` are the JSON types
    that the values may have. `classes` are the classes that `lower` takes, `wire_class` is the one
    that `lift` takes.
    """

    wire: object
    kinds: frozenset[str]
    lower: Conversion | None = None
    lift: Conversion | None = None
    classes: tuple[type, ...] = ()
    wire_class: type = object


def shape_of(cls: type) -> tuple[Shape, bool]:
    """The shape of an attrs class, and whether `==` can tell if two of its values are the same.

    Raises EventDefinitionError for what could not come back the same.
    """
    shapes = _Shapes()
    try:
        if not attrs.has(cls):
            raise RefusalError("It is not an attrs class.", "Decorate it with @attrs.frozen.")
        return shapes.of(cls), shapes.exact
    except RecursionError:
        raise EventDefinitionError(
            f"{cls.__qualname__} could not be stored and come back the same.\n"
            "  One of its annotations is defined by itself.\n"
            "  Put an attrs class in between."
        ) from None
    except RefusalError as refusal:
        raise EventDefinitionError(
            f"{cls.__qualname__} could not be stored and come back the same.\n"
            f"  {refusal.why}\n  {refusal.remedy}"
        ) from None


class _Shapes:
    """The shapes of one class and of all it nests; needed only while a codec is made."""

    def __init__(self) -> None:
        self.exact = True
        self._classes: dict[tuple[type, bool], Shape] = {}
        self._begun: set[tuple[type, bool]] = set()
        self._shadows: dict[tuple[type, bool], type[Struct]] = {}
        self._records: set[type] = set()

    def of(self, annotation: object) -> Shape:
        """The shape of the values of an annotation whose names are resolved."""
        annotation = unwrapped(annotation)
        origin: object = typing.get_origin(annotation)
        arguments = typing.get_args(annotation)
        if origin is Annotated:
            shape = self.of(arguments[0])
            return attrs.evolve(shape, wire=Annotated[(shape.wire, *arguments[1:])])
        if is_union(annotation):
            return self._union(members_of_union(annotation))
        if origin is Literal:
            return _literal(annotation, arguments)
        if origin is tuple and arguments and arguments[-1] is not ...:
            return self._tuple(arguments)
        if origin in _ARRAYS and arguments:
            return self._array(cast("type", origin), arguments[0])
        if origin in _MAPPINGS and arguments:
            return self._mapping(cast("type", origin), *arguments)
        if isinstance(annotation, type):
            return self._class(annotation)
        raise _unknown(annotation)

    def _class(self, cls: type[object]) -> Shape:
        if cls in _SCALARS:
            self.exact = self.exact and cls is not time
            return Shape(cls, frozenset({_SCALARS[cls]}))
        if attrs.has(cls):
            return self._attrs(cls, tagged=False)
        if issubclass(cls, Enum):
            return _enum(cls)
        if typing.is_typeddict(cls):
            return self._record(cls, _OBJECT, annotations_of(cls)[0])
        fields = record_fields(cls)
        if fields is None:
            raise _unknown(cls)
        if issubclass(cls, Struct):
            config = cls.__struct_config__
            kind = "array" if config.array_like else "object"
            kinds = frozenset({kind if config.tag is None else f"{kind} tagged {config.tag!r}"})
            return self._record(cls, kinds, fields)
        return self._record(cls, _ARRAY if issubclass(cls, tuple) else _OBJECT, fields)

    def _union(self, members: Sequence[object]) -> Shape:
        classes = [member for member in members if is_attrs(member)]
        tagged = len(classes) > 1
        tags = [cls.__name__ for cls in classes]
        if len(set(tags)) < len(tags):
            raise RefusalError(
                "Two of its classes have the same name, by which they are told apart in JSON.",
                "Rename one of them.",
            )
        shapes: list[Shape] = []
        owners: dict[str, object] = {}
        for member in members:
            shape = self._attrs(member, tagged=tagged) if is_attrs(member) else self.of(member)
            for kind in shape.kinds:
                owner = owners.setdefault(kind, member)
                if owner is not member and not (is_attrs(owner) and is_attrs(member)):
                    raise RefusalError(
                        f"In JSON both {name_of(owner)} and {name_of(member)} are of type {kind}, "
                        "and cannot be told apart.",
                        "Use a field for each, or wrap each in an attrs class of its own.",
                    )
            shapes.append(shape)
        lowers = {cls: shape.lower for shape in shapes if shape.lower for cls in shape.classes}
        lifts = {shape.wire_class: shape.lift for shape in shapes if shape.lift}
        return Shape(
            wire=Union[tuple(shape.wire for shape in shapes)],  # noqa: UP007
            kinds=frozenset(owners),
            lower=shadows.by_class(lowers) if lowers else None,
            lift=shadows.by_class(lifts) if lifts else None,
        )

    def _tuple(self, arguments: Sequence[object]) -> Shape:
        shapes = [self.of(argument) for argument in arguments]
        lowers, lifts = [shape.lower for shape in shapes], [shape.lift for shape in shapes]
        return Shape(
            wire=types.GenericAlias(tuple, tuple(shape.wire for shape in shapes)),
            kinds=_ARRAY,
            lower=shadows.by_position(lowers) if any(lowers) else None,
            lift=shadows.by_position(lifts) if any(lifts) else None,
            classes=(tuple, list),
            wire_class=tuple,
        )

    def _array(self, origin: type, argument: object) -> Shape:
        shape = self.of(argument)
        # A list also where a set is built in the end: a shadow has no hash.
        return Shape(
            wire=types.GenericAlias(
                list if shape.lift else origin,
                (shape.wire, ...) if origin is tuple and not shape.lift else (shape.wire,),
            ),
            kinds=_ARRAY,
            lower=shadows.by_item(shape.lower, list) if shape.lower else None,
            lift=shadows.by_item(shape.lift, _ARRAYS[origin]) if shape.lift else None,
            classes=(list, tuple, set, frozenset),
            wire_class=list,
        )

    def _mapping(self, origin: type, key: object, value: object) -> Shape:
        keys, values = self.of(key), self.of(value)
        if is_union(unwrapped(key)) or not keys.kinds <= {"string", "integer", "number"}:
            raise RefusalError(
                f"Keys are strings in JSON, and {name_of(key)} cannot be made of one.",
                f"Use a list of pairs: list[tuple[{name_of(key)}, {name_of(value)}]].",
            )
        return Shape(
            wire=types.GenericAlias(origin, (keys.wire, values.wire)),
            kinds=_OBJECT,
            lower=shadows.by_key(values.lower) if values.lower else None,
            lift=shadows.by_key(values.lift) if values.lift else None,
            classes=(dict,),
            wire_class=dict,
        )

    def _record(self, cls: type, kinds: frozenset[str], names: Iterable[str]) -> Shape:
        """A dataclass, Struct, NamedTuple or TypedDict: as msgspec reads and writes it, or not."""
        # A TypedDict is a plain dict; what `==` of the others compares, nobody knows.
        self.exact = self.exact and typing.is_typeddict(cls)
        if cls not in self._records:
            self._records.add(cls)
            _check_record(cls)
            hints, _ = annotations_of(cls)
            for name in names:
                shape = self._field(cls, name, hints.get(name))
                if shape.lower or shape.lift:
                    raise RefusalError(
                        f"{cls.__qualname__}.{name} holds a class whose constructor must be "
                        f"called, and in {cls.__qualname__} nobody calls it.",
                        f"Make {cls.__qualname__} an attrs class.",
                    )
        return Shape(cls, kinds)

    def _attrs(self, cls: type[attrs.AttrsInstance], *, tagged: bool) -> Shape:
        key = (cls, tagged)
        if key in self._classes:
            return self._classes[key]
        if key in self._begun:
            return self._recursive(cls, tagged)
        self._begun.add(key)
        _check(cls)
        hints, resolvable = annotations_of(cls)
        shapes = {
            argument.name: self._field(cls, argument.attribute, hints.get(argument.attribute))
            for argument in shadows.arguments_of(cls)
        }
        lowers = {name: shape.lower for name, shape in shapes.items() if shape.lower}
        lifts = {name: shape.lift for name, shape in shapes.items() if shape.lift}
        self.exact = self.exact and shadows.equality_is_generated(cls)
        written = not tagged and not lowers and shadows.is_written_right(cls)
        read = not tagged and not lifts and resolvable and shadows.is_read_right(cls)
        if written and read:
            shape = Shape(cls, _OBJECT)
        else:
            shadow = self._shadows.setdefault(key, shadows.shadow_of(cls, tagged=tagged))
            shadow.__annotations__.update({name: shape.wire for name, shape in shapes.items()})
            shape = Shape(
                wire=cls if read else shadow,
                kinds=_OBJECT,
                lower=None if written else shadows.lowering(cls, shadow, lowers),
                lift=None if read else shadows.lifting(cls, lifts),
                classes=(cls,),
                wire_class=shadow,
            )
        self._classes[key] = shape
        return shape

    def _recursive(self, cls: type[attrs.AttrsInstance], tagged: bool) -> Shape:
        """The shape of a class inside itself, while it is not known yet: always by shadow."""

        def lower(value: object) -> object:
            conversion = self._classes[key].lower
            return value if conversion is None else conversion(value)

        def lift(value: object) -> object:
            conversion = self._classes[key].lift
            return value if conversion is None else conversion(value)

        key = (cls, tagged)
        shadow = self._shadows.setdefault(key, shadows.shadow_of(cls, tagged=tagged))
        return Shape(shadow, _OBJECT, lower, lift, (cls,), shadow)

    def _field(self, cls: type, name: str, annotation: object) -> Shape:
        try:
            if annotation is None:
                raise RefusalError(
                    "It has no annotation.", "Annotate it with the type of its values."
                )
            return self.of(annotation)
        except RefusalError as refusal:
            what = "its values" if annotation is None else name_of(annotation)
            raise EventDefinitionError(
                f"{cls.__qualname__}.{name}: {what} could not be stored and come back the same.\n"
                f"  {refusal.why}\n  {refusal.remedy}"
            ) from None


def _literal(annotation: object, values: Sequence[object]) -> Shape:
    unknown = [value for value in values if type(value) not in (str, int, bool, type(None))]
    if unknown:
        raise RefusalError(
            f"A Literal of {type(unknown[0]).__qualname__} has no JSON form.",
            "Use strings, integers, booleans and None, or annotate it with the enum.",
        )
    return Shape(annotation, frozenset(_SCALARS[type(value)] for value in values))


def _enum(cls: type[Enum]) -> Shape:
    values: list[object] = [member.value for member in cls]
    if values and all(isinstance(value, str) for value in values):
        return Shape(cls, frozenset({"string"}))
    if values and all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        return Shape(cls, frozenset({"integer"}))
    raise RefusalError(
        f"The values of {cls.__qualname__} are neither all str nor all int.",
        "Give its members such values, or store what they are made of.",
    )


def _check(cls: type[attrs.AttrsInstance]) -> None:
    if "__attrs_attrs__" not in vars(cls):
        raise _undecorated(cls, "an attrs class", "@attrs.frozen")
    if inspect.isabstract(cls):
        raise RefusalError(
            f"{cls.__qualname__} is abstract, so no value is of exactly this class.",
            "Write the union of its subclasses.",
        )


def _check_record(cls: type) -> None:
    if not dataclasses.is_dataclass(cls):
        return
    if "__dataclass_fields__" not in vars(cls):
        raise _undecorated(cls, "a dataclass", "@dataclass")
    if not vars(cls)["__dataclass_params__"].init:
        raise RefusalError(
            f"{cls.__qualname__} has a constructor of its own, which nobody would call.",
            "Make it an attrs class.",
        )


def _undecorated(cls: type, kind: str, decorator: str) -> RefusalError:
    return RefusalError(
        f"{cls.__qualname__} derives from {kind}, but is none itself: fields of its own are lost.",
        f"Decorate {cls.__qualname__} with {decorator}.",
    )


def _unknown(annotation: object) -> RefusalError:
    if annotation is Any or annotation is object:
        return RefusalError(
            f"{name_of(annotation)} does not say what its JSON is to become again.",
            "Write out the type, such as `str` or `list[Line]`.",
        )
    origin = typing.get_origin(annotation) or annotation
    if not typing.get_args(annotation) and origin in (*_ARRAYS, *_MAPPINGS):
        example = "list[str]" if origin in _ARRAYS else "dict[str, int]"
        return RefusalError(
            f"{name_of(annotation)} does not say what it holds.",
            f"Write it out, such as `{example}`.",
        )
    if isinstance(annotation, TypeVar) or is_attrs(origin) or record_fields(cast("type", origin)):
        return RefusalError(
            f"{name_of(annotation)} is generic, and JSON does not say which type it was made with.",
            "Derive a class that annotates its fields with concrete types, and use that.",
        )
    return RefusalError(
        f"There is no way to make {name_of(annotation)} out of JSON again.",
        "Make it an attrs class, or store what it is made of.",
    )
