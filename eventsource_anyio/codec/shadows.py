"""What stands in for an attrs class where msgspec alone would get it wrong.

msgspec reads and writes attrs classes by itself, and fast, but it sees only their attributes: it
calls no constructor. A *shadow* is a struct with a field for each argument of the constructor. A
value is *lowered* to its shadow to be written, and *lifted* out of it when it is read, by the
constructor.

- A field is named in JSON as the constructor names it (its `alias`), by shadow or not, so that
  adding a converter to a class changes nothing about what is stored.
- A field with `init=False` is not stored; its class makes it anew.
- Every failure of a conversion is a `PayloadError` whose path starts at the value converted. Only
  `RecursionError` passes through, because where it strikes says nothing.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple, cast

import attrs
import msgspec
from msgspec import UNSET, Struct

from .difference import show

Conversion = Callable[[object], object]

TAG_FIELD = "$type"  # no argument of a constructor can have this name


class PayloadError(Exception):
    """A value cannot be written, or JSON cannot be read; the events layer says of which event.

    `path` is `$` for the whole, `$.lines[2].price` for a part of it.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"

    def add(self, step: str) -> None:
        """Make the path start one level further out."""
        self.path = f"${step}{self.path[1:]}"


class Argument(NamedTuple):
    """An argument of the constructor of an attrs class."""

    name: str
    attribute: str
    optional: bool


def arguments_of(cls: type[attrs.AttrsInstance]) -> list[Argument]:
    """What the constructor takes, the arguments without a default first."""
    arguments = [
        Argument(cast("str", field.alias), field.name, field.default is not attrs.NOTHING)
        for field in attrs.fields(cls)
        if field.init
    ]
    return sorted(arguments, key=lambda argument: argument.optional)


def describe(error: BaseException) -> str:
    """What a foreign exception says, in bounded length."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply, or contains itself"
    # Validators of attrs pass the attribute and the value along as further arguments.
    text = str(error.args[0] if error.args else "")
    name = type(error).__name__
    return f"{name}: {text[:200]}" if text else name


def is_written_right(cls: type[attrs.AttrsInstance]) -> bool:
    """Whether msgspec writes exactly the arguments of the constructor, under their names.

    It writes what is in the `__dict__` and in all slots, without those that start with `_`.
    """
    slots = {
        name
        for base in cls.__mro__
        for name, member in vars(base).items()
        if isinstance(member, types.MemberDescriptorType) and not name.startswith("_")
    }
    return (
        cls.__dictoffset__ == 0
        and slots == {field.name for field in attrs.fields(cls)}
        and all(field.init and field.alias == field.name for field in attrs.fields(cls))
    )


def is_read_right(cls: type[attrs.AttrsInstance]) -> bool:
    """Whether setting attributes and running validators, as msgspec does, is all there is to do."""
    built = attrs.inspect(cls)
    return (
        built.added_init
        and built.hashability is not attrs.ClassProps.Hashability.HASHABLE_CACHED
        and cls.__new__ is object.__new__
        and not hasattr(cls, "__attrs_pre_init__")
        and all(
            field.init
            and field.alias == field.name
            and field.converter is None
            and not getattr(field.default, "takes_self", False)
            for field in attrs.fields(cls)
        )
    )


def equality_is_generated(cls: type[attrs.AttrsInstance]) -> bool:
    """Whether `==` of the class compares all that is stored."""
    return attrs.inspect(cls).added_eq and all(
        (field.eq or not field.init) and field.eq_key is None for field in attrs.fields(cls)
    )


def shadow_of(cls: type[attrs.AttrsInstance], *, tagged: bool) -> type[Struct]:
    """The shadow, the types of its fields still to be put into its `__annotations__`."""
    return msgspec.defstruct(
        cls.__name__,
        [
            (argument.name, object, UNSET) if argument.optional else (argument.name, object)
            for argument in arguments_of(cls)
        ],
        tag=cls.__name__ if tagged else None,
        tag_field=TAG_FIELD if tagged else None,
        gc=False,
    )


def lowering(
    cls: type[attrs.AttrsInstance], shadow: type[Struct], inner: Mapping[str, Conversion]
) -> Conversion:
    """Make the shadow of a value; `inner` converts some of the arguments on the way."""
    arguments = arguments_of(cls)
    get = _getter([argument.attribute for argument in arguments])
    names = [argument.name for argument in arguments]
    conversions = [(index, inner[name]) for index, name in enumerate(names) if name in inner]

    def lower(value: object) -> object:
        step = ""
        try:
            values = get(value)
            if conversions:
                converted = list(values)
                for index, convert in conversions:
                    step = f".{names[index]}"
                    converted[index] = convert(converted[index])
                return shadow(*converted)
            return shadow(*values)
        except PayloadError as error:
            error.add(step)
            raise
        except RecursionError:
            raise
        except Exception as error:
            if step or isinstance(value, cls):
                raise PayloadError(f"${step}", describe(error)) from error
            raise PayloadError("$", f"{show(value)} is not of class {cls.__qualname__}") from error

    return lower


def lifting(cls: type[attrs.AttrsInstance], inner: Mapping[str, Conversion]) -> Conversion:
    """Call the constructor with what the shadow holds; `inner` converts some of it first."""
    optional = [argument.name for argument in arguments_of(cls) if argument.optional]
    positional = not inner and not any(field.kw_only for field in attrs.fields(cls))
    asdict, astuple = msgspec.structs.asdict, msgspec.structs.astuple

    def lift(shadow: object) -> object:
        step = ""
        try:
            if positional:
                # The ordinary case, a quarter faster than the general one below.
                for value in (ordered := astuple(cast("Struct", shadow))):
                    if value is UNSET:
                        break
                else:
                    return cls(*ordered)
            values = asdict(cast("Struct", shadow))
            for name in optional:
                if values[name] is UNSET:
                    del values[name]
            for name, convert in inner.items():
                if name in values:
                    step = f".{name}"
                    values[name] = convert(values[name])
            step = ""
            return cls(**values)
        except PayloadError as error:
            error.add(step)
            raise
        except RecursionError:
            raise
        except Exception as error:
            raise PayloadError(f"${step}", describe(error)) from error

    return lift


def by_item(convert: Conversion, build: Callable[[list[object]], object]) -> Conversion:
    """Convert every item, and build the collection of them."""

    def convert_all(values: object) -> object:
        converted: list[object] = []
        try:
            for value in cast("Sequence[object]", values):
                converted.append(convert(value))  # noqa: PERF401
        except PayloadError as error:
            error.add(f"[{len(converted)}]")
            raise
        return build(converted)

    return convert_all


def by_position(conversions: Sequence[Conversion | None]) -> Conversion:
    """Convert the items of a tuple of fixed length, each in its own way."""

    def convert_all(values: object) -> object:
        converted = list(cast("Sequence[object]", values))
        if len(converted) != len(conversions):
            raise PayloadError("$", f"{show(values)} does not have {len(conversions)} items")
        index = 0
        try:
            for index, convert in enumerate(conversions):
                if convert is not None:
                    converted[index] = convert(converted[index])
        except PayloadError as error:
            error.add(f"[{index}]")
            raise
        return tuple(converted)

    return convert_all


def by_key(convert: Conversion) -> Conversion:
    """Convert every value of a mapping."""

    def convert_all(values: object) -> object:
        converted: dict[object, object] = {}
        key: object = None
        try:
            for key, value in cast("Mapping[object, object]", values).items():
                converted[key] = convert(value)
        except PayloadError as error:
            error.add(f"[{show(key)}]")
            raise
        return converted

    return convert_all


def by_class(conversions: Mapping[type, Conversion]) -> Conversion:
    """Convert a value as its class says; one of no such class stays as it is."""

    def convert_one(value: object) -> object:
        convert = conversions.get(type(value))
        if convert is None and value is not None:
            for cls, other in conversions.items():
                if isinstance(value, cls):
                    convert = other
                    break
        return value if convert is None else convert(value)

    return convert_one


def _getter(attributes: Sequence[str]) -> Callable[[object], tuple[object, ...]]:
    if len(attributes) > 1:
        return attrgetter(*attributes)
    # `attrgetter` makes a tuple of two or more only.
    return lambda value: tuple(getattr(value, attribute) for attribute in attributes)
