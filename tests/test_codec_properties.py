"""What comes back of what is stored, for classes and values made at random."""

from __future__ import annotations

import contextlib
import enum
import itertools
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal, NamedTuple, Optional, Union
from uuid import UUID

import attrs
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eventsource_anyio.codec import Codec, PayloadError

SLOW = settings(max_examples=250, suppress_health_check=list(HealthCheck))


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Size(enum.IntEnum):
    S = 1
    M = 2


class Kind(NamedTuple):
    """An annotation, and the values it promises; `json` is the JSON type, for unions."""

    annotation: Any
    values: st.SearchStrategy[Any]
    json: str
    hashable: bool = True


def whole_minutes(when: datetime) -> bool:
    offset = when.utcoffset()
    return offset is None or offset % timedelta(minutes=1) == timedelta(0)


# Not the first and last days, which UTC has no date for in some zones.
MOMENTS = st.datetimes(
    min_value=datetime(1, 1, 3),  # noqa: DTZ001
    max_value=datetime(9999, 12, 29),  # noqa: DTZ001
    timezones=st.one_of(st.none(), st.timezones()),
).filter(whole_minutes)
TEXTS = [
    Kind(str, st.text(max_size=5), "string"),
    Kind(bytes, st.binary(max_size=5), "string"),
    Kind(Decimal, st.decimals(allow_nan=False), "string"),
    Kind(UUID, st.uuids(), "string"),
    Kind(datetime, MOMENTS, "string"),
    Kind(Colour, st.sampled_from(Colour), "string"),
    Kind(Literal["a", "b"], st.sampled_from(["a", "b"]), "string"),
    Kind(timedelta, st.timedeltas(), "string"),
]
NUMBERS = [
    Kind(int, st.integers() | st.sampled_from([2**63, 2**64, -(2**63) - 1]), "integer"),
    Kind(Size, st.sampled_from(Size), "integer"),
    Kind(Annotated[int, msgspec.Meta(ge=3)], st.integers(min_value=3), "integer"),
]
FLOATS = Kind(float, st.floats(allow_nan=False, allow_infinity=False), "number")
BOOLEANS = Kind(bool, st.booleans(), "boolean")
KEYS = [*TEXTS, *NUMBERS, FLOATS]
LEAVES = [*KEYS, BOOLEANS]

_serial = itertools.count()


class Moulded(NamedTuple):
    """A generated class and its instances."""

    cls: Any
    instances: st.SearchStrategy[Any]
    values: dict[str, st.SearchStrategy[Any]]


@st.composite
def classes(draw: st.DrawFn, kinds: st.SearchStrategy[Kind], min_fields: int = 0) -> Moulded:
    """Classes of every sort, with fields of these kinds."""
    fields: dict[str, Any] = {}
    values: dict[str, st.SearchStrategy[Any]] = {}
    hashable = True
    for kind, name in zip(
        draw(st.lists(kinds, min_size=min_fields, max_size=4)), "abcd", strict=False
    ):
        options: dict[str, Any] = {"type": kind.annotation}
        argument = name
        sort = draw(
            st.sampled_from(["plain"] * 4 + ["private", "alias", "converter", "uncompared"])
        )
        if sort == "private":
            name = f"_{name}"
        elif sort == "alias":
            options["alias"] = argument = f"{name}_alias"
        elif sort == "converter":
            options["converter"] = lambda value: value
        elif sort == "uncompared":
            options["eq"] = False
        if draw(st.booleans()):
            default = draw(kind.values)
            options |= {"factory": lambda default=default: default, "kw_only": True}
        fields[name] = attrs.field(**options)
        values[argument] = kind.values
        hashable = hashable and kind.hashable
    eq = draw(st.sampled_from([True, True, True, False]))
    how: dict[str, Any] = {
        "bases": draw(st.sampled_from([(object,), (object,), (Prepared,)])),
        "slots": draw(st.sampled_from([True, True, False])),
        "frozen": draw(st.booleans()),
        "eq": eq,
        "unsafe_hash": True if eq and hashable else None,
        "cache_hash": eq and hashable and draw(st.booleans()),
    }
    cls = attrs.make_class(f"Generated{next(_serial)}", fields, **how)
    instances = st.fixed_dictionaries(values).map(lambda arguments: cls(**arguments))
    return Moulded(cls, instances, values)


class Prepared:
    """A base that makes msgspec read the class by its constructor."""

    __slots__ = ()

    def __attrs_pre_init__(self) -> None:
        pass


def compound(inner: st.SearchStrategy[Kind]) -> st.SearchStrategy[Kind]:
    @st.composite
    def collections(draw: st.DrawFn) -> Kind:
        item, other = draw(inner), draw(inner)
        one: Any = item.annotation
        some = st.lists(item.values, max_size=3)
        hashable = item.hashable
        sorts = ["list", "tuple", "pair", "dict", *(["set", "frozenset"] if hashable else [])]
        sort = draw(st.sampled_from(sorts))
        if sort == "list":
            return Kind(list[one], some, "array", False)
        if sort == "tuple":
            return Kind(tuple[one, ...], some.map(tuple), "array", hashable)
        if sort == "pair":
            two: Any = other.annotation
            pairs = st.tuples(item.values, other.values)
            return Kind(tuple[one, two], pairs, "array", hashable and other.hashable)
        if sort == "set":
            return Kind(set[one], some.map(set), "array", False)
        if sort == "frozenset":
            return Kind(frozenset[one], some.map(frozenset), "array")
        key = draw(st.sampled_from(KEYS))
        mapping: Any = draw(st.sampled_from([dict, Mapping]))
        values = st.dictionaries(key.values, item.values, max_size=3)
        return Kind(mapping[key.annotation, one], values, "object", False)

    @st.composite
    def unions(draw: st.DrawFn) -> Kind:
        members = {"null": Kind(None, st.none(), "null")}
        simple = inner.filter(lambda kind: kind.json != "union")
        for member in draw(st.lists(simple, min_size=1, max_size=3)):
            members.setdefault(member.json, member)
        return Kind(
            Union[tuple(member.annotation for member in members.values())],  # noqa: UP007
            st.one_of([member.values for member in members.values()]),
            "union",
            all(member.hashable for member in members.values()),
        )

    @st.composite
    def attrs_unions(draw: st.DrawFn) -> Kind:
        members = draw(st.lists(classes(inner), min_size=2, max_size=3))
        return Kind(
            Optional[Union[tuple(member.cls for member in members)]],  # noqa: UP007, UP045
            st.none() | st.one_of([member.instances for member in members]),
            "union",
            False,
        )

    nested = classes(inner).map(lambda made: Kind(made.cls, made.instances, "object", False))
    return st.one_of(collections(), nested, attrs_unions(), unions())


KINDS = st.recursive(st.sampled_from(LEAVES), compound, max_leaves=4)
CLASSES = classes(KINDS, min_fields=1)


def text(value: Any) -> str:
    """A value as text that is the same for the same value, found without the codec."""
    if attrs.has(type(value)):
        fields = [f for f in attrs.fields(type(value)) if f.init]
        return f"{type(value)}({[text(getattr(value, f.name)) for f in fields]})"
    if isinstance(value, datetime) and value.tzinfo is not None:
        return f"aware {value.astimezone(UTC).isoformat()}"
    if isinstance(value, datetime):
        return f"naive {value.isoformat()}"
    if isinstance(value, (list, tuple)):
        return f"{type(value)}{[text(item) for item in value]}"
    if isinstance(value, (set, frozenset)):
        return f"{type(value)}{sorted(text(item) for item in value)}"
    if isinstance(value, dict):
        return f"{type(value)}{sorted((text(key), text(item)) for key, item in value.items())}"
    return f"{type(value)} {value!r}"


@SLOW
@given(CLASSES, st.data())
def test_what_is_written_comes_back(made, data):
    codec = Codec(made.cls)
    for _ in range(4):
        event = data.draw(made.instances)
        written = codec.encode(event)
        assert text(codec.decode(written)) == text(event)
        assert text(codec.convert(json.loads(written))) == text(event)
        assert codec.encode(codec.decode(written)) == written or b"[" in written  # a set


@SLOW
@given(CLASSES, KINDS, st.data())
def test_wrong_value_is_refused_or_equal(made, kind, data):
    codec = Codec(made.cls)
    arguments = data.draw(st.fixed_dictionaries(made.values))
    arguments[data.draw(st.sampled_from(sorted(arguments)))] = data.draw(kind.values)
    event = made.cls(**arguments)
    try:
        written = codec.encode(event)
    except PayloadError:
        pass
    else:
        copy = codec.decode(written)
        for field in attrs.fields(made.cls):
            ours, theirs = getattr(event, field.name), getattr(copy, field.name)
            assert ours == theirs or text(ours) == text(theirs)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["2024-01-01", "2024-01-01T00:00:00Z", "1.5", "red", "P1D", "a"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b", "c", "$type", "a_alias"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@SLOW
@given(CLASSES, st.data())
def test_nothing_but_a_payload_error_comes_of_reading_anything(made, data):
    codec = Codec(made.cls)
    written = codec.encode(data.draw(made.instances))
    start = data.draw(st.integers(0, len(written)))
    end = data.draw(st.integers(start, len(written)))
    for payload in (
        data.draw(st.binary(max_size=20)),
        json.dumps(data.draw(JSON)).encode(),
        json.dumps({name: data.draw(JSON) for name in made.values}).encode(),
        written[:start] + data.draw(st.binary(max_size=3)) + written[end:],
    ):
        try:
            value = codec.decode(payload)
        except PayloadError:
            pass
        else:
            assert type(value) is made.cls
    with contextlib.suppress(PayloadError):
        codec.convert(data.draw(JSON))


@SLOW
@given(st.lists(KINDS, min_size=1, max_size=3), st.data())
def test_shadow_writes_what_msgspec_would(kinds, data):
    fields = {
        name: attrs.field(type=kind.annotation) for name, kind in zip("abc", kinds, strict=False)
    }
    plain = attrs.make_class("Event", dict(fields), slots=True)
    shadowed = attrs.make_class("Event", dict(fields), bases=(Prepared,), slots=True)
    values = [data.draw(kind.values) for kind in kinds]
    assert Codec(plain).encode(plain(*values)) == Codec(shadowed).encode(shadowed(*values))


@given(st.one_of(st.sampled_from([float("nan"), float("inf")]), st.just(Decimal("NaN"))), KINDS)
def test_no_number_that_is_none_is_ever_stored(number, kind):
    cls = attrs.make_class("Event", {"x": attrs.field(type=kind.annotation)})
    with pytest.raises(PayloadError):
        Codec(cls).encode(cls(number))
