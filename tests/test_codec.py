"""What comes back of what is stored, by example; test_codec_properties.py does it at random."""

# ruff: noqa: DTZ001, DTZ901
# No `from __future__ import annotations`: most classes here are local, and must find their types.

import dataclasses
import enum
import functools
import itertools
import json
import sys
import threading
import types
import typing
from abc import ABC, abstractmethod
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from types import MappingProxyType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Final,
    Generic,
    Literal,
    NamedTuple,
    NewType,
    NotRequired,
    TypedDict,
    TypeVar,
)
from uuid import UUID
from zoneinfo import ZoneInfo

import attrs
import msgspec
import pytest

from eventsource_anyio.codec import Codec, PayloadError
from eventsource_anyio.codec.difference import difference
from eventsource_anyio.errors import EventDefinitionError

BERLIN = ZoneInfo("Europe/Berlin")
INF, NAN = float("inf"), float("nan")
WRONG_TYPE: Any = "1"
ID = UUID("6f1c7f9e-6a0b-4d8e-8f43-0f4f1f1f1f1f")

T = TypeVar("T")


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Size(enum.Enum):
    S = 1
    M = 2


class Level(enum.IntEnum):
    LOW = 1


class Unit(enum.StrEnum):
    KG = "kg"


class Right(enum.Flag):
    READ = 1
    WRITE = 2


class Mixed(enum.Enum):
    A = "a"
    B = 1


class Halves(enum.Enum):
    HALF = 0.5


class Truth(enum.Enum):
    YES = True


class Empty(enum.Enum):
    pass


@attrs.frozen
class Money:
    amount: Decimal
    currency: str = "EUR"


@attrs.frozen
class Private:
    _amount: Decimal
    currency: str = "EUR"


@attrs.frozen
class Circle:
    radius: float


@attrs.frozen
class Square:
    side: float


@attrs.frozen
class Nothing:
    pass


@attrs.define(slots=False)
class Unslotted:
    a: int


@attrs.frozen
class Node:
    value: int
    children: "list[Node]" = attrs.field(factory=list)


@attrs.frozen
class Chain:
    value: int
    next: "Link | None" = None


@attrs.frozen
class Link:
    chain: Chain


@attrs.frozen
class Num:
    value: int


@attrs.frozen
class Add:
    left: "Num | Add"
    right: "Num | Add"


@dataclasses.dataclass(frozen=True)
class Point:
    x: int
    y: int = 0


@dataclasses.dataclass
class Loop:
    inner: "Loop | None" = None


class Pair(NamedTuple):
    key: str
    value: int


class Movie(TypedDict):
    title: str
    year: NotRequired[int]


class Record(msgspec.Struct):
    a: int
    b: str = ""


class Array(msgspec.Struct, array_like=True):
    a: int


class Cat(msgspec.Struct, tag=True):
    lives: int


class Dog(msgspec.Struct, tag=True):
    name: str


Amount = NewType("Amount", Decimal)
Other = NewType("Other", Money)


def made(name: str, **fields: Any) -> Any:
    return attrs.make_class(name, fields, frozen=True, slots=True)


def holding(annotation: Any, **options: Any) -> Any:
    """A class with one field `x`."""
    return made("Holding", x=attrs.field(type=annotation, **options))


def shadowed(annotation: Any) -> Any:
    """The same, but of a kind that msgspec alone would get wrong."""
    return made("Shadowed", _x=attrs.field(type=annotation))


def back(value: Any) -> Any:
    """What comes back of a value; it must be of the same class, through a dict of JSON as well."""
    codec = Codec(type(value))
    data = codec.encode(value)
    copy = codec.decode(data)
    assert type(copy) is type(value)
    assert difference(copy, codec.convert(json.loads(data))) is None
    assert difference(copy, codec.decode(data.decode())) is None
    return copy


def refused(value: Any, cls: Any = None) -> PayloadError:
    """Why a value cannot be written."""
    with pytest.raises(PayloadError) as caught:
        Codec(type(value) if cls is None else cls).encode(value)
    return caught.value


def undefined(cls: type) -> str:
    """Why a class has no codec."""
    with pytest.raises(EventDefinitionError) as caught:
        Codec(cls)
    return str(caught.value)


def numbered(cases: Sequence[tuple[Any, ...]]) -> list[str]:
    """A unique id for every case, by its first item."""
    return [f"{number}: {case[0]}" for number, case in enumerate(cases)]


def defined(source: str, name: str = "made_up") -> types.ModuleType:
    """A module of this source, as importing it would make it."""
    module = sys.modules.setdefault(name, types.ModuleType(name))
    exec(source, vars(module))
    return module


# -- what comes back --------------------------------------------------------------------------


SAME: list[tuple[Any, Any, str]] = [
    (int, 3, "3"),
    (int, -(2**63) - 1, "-9223372036854775809"),
    (int, 2**64, "18446744073709551616"),
    (int, 10**400, "1" + "0" * 400),
    (float, 1.5, "1.5"),
    (float, 0.1 + 0.2, "0.30000000000000004"),
    (float, 5e-324, "5e-324"),
    (float, 2**60, "1152921504606846976"),
    (bool, True, "true"),
    (type(None), None, "null"),
    (str, "a\0\u2028€", '"a\\u0000\u2028€"'),
    (str, Unit.KG, '"kg"'),
    (bytes, b"\0\xff", '"AP8="'),
    (bytearray, bytearray(b"x"), '"eA=="'),
    (Decimal, Decimal("1.10"), '"1.10"'),
    (Decimal, Decimal("1E+1000"), '"1E+1000"'),
    (Decimal, Decimal("-0"), '"-0"'),
    (Decimal, Decimal("Infinity"), '"Infinity"'),
    (Decimal, 12, "12"),
    (UUID, ID, f'"{ID}"'),
    (datetime, datetime(2024, 2, 29, 1, 2, 3, 4), '"2024-02-29T01:02:03.000004"'),
    (datetime, datetime(2024, 2, 29, tzinfo=UTC), '"2024-02-29T00:00:00Z"'),
    (datetime, datetime.min, '"0001-01-01T00:00:00"'),
    (datetime, datetime.max, '"9999-12-31T23:59:59.999999"'),
    (date, date.min, '"0001-01-01"'),
    (time, time(1, 2, 3, 4), '"01:02:03.000004"'),
    (time, time(1, tzinfo=UTC), '"01:00:00Z"'),
    (timedelta, timedelta(days=-3, microseconds=1), '"-P2DT86399.999999S"'),
    (timedelta, timedelta.max, '"P999999999DT86399.999999S"'),
    (timedelta, timedelta.min, '"-P999999999D"'),
    (Colour, Colour.RED, '"red"'),
    (Size, Size.M, "2"),
    (Level, Level.LOW, "1"),
    (Right, Right.READ | Right.WRITE, "3"),
    (Literal["a", 1, True], "a", '"a"'),
    (Amount, Amount(Decimal(3)), '"3"'),
    (Final[int], 3, "3"),
    (Annotated[int, msgspec.Meta(gt=0)], 3, "3"),
    (Decimal | None, None, "null"),
    (int | float | str | None, 1.0, "1.0"),
    (list[int], [1, 2], "[1,2]"),
    (typing.List[int], [1], "[1]"),  # noqa: UP006
    (tuple[int, ...], (1, 2), "[1,2]"),
    (tuple[int, str], (1, "a"), '[1,"a"]'),
    (set[int], {1}, "[1]"),
    (set[int], frozenset({1}), "[1]"),
    (frozenset[str], frozenset("a"), '["a"]'),
    (Sequence[int], [1], "[1]"),
    (Collection[int], [1], "[1]"),
    (AbstractSet[int], {1}, "[1]"),
    (Mapping[str, int], {"a": 1}, '{"a":1}'),
    (MutableMapping[str, int], {"a": 1}, '{"a":1}'),
    (dict[str, int], {"": 1}, '{"":1}'),
    (dict[str, int], OrderedDict(a=1), '{"a":1}'),
    (dict[str, int], defaultdict(int, a=1), '{"a":1}'),
    (dict[int, str], {-1: "a"}, '{"-1":"a"}'),
    (dict[float, str], {1.5: "a"}, '{"1.5":"a"}'),
    (dict[Decimal, str], {Decimal("1E+3"): "a"}, '{"1E+3":"a"}'),
    (dict[UUID, str], {ID: "a"}, f'{{"{ID}":"a"}}'),
    (dict[Colour, int], {Colour.RED: 1}, '{"red":1}'),
    (dict[Size, int], {Size.S: 1}, '{"1":1}'),
    (dict[date, int], {date(2024, 1, 2): 1}, '{"2024-01-02":1}'),
    (dict[timedelta, int], {timedelta(1): 1}, '{"P1D":1}'),
    (dict[bytes, int], {b"a": 1}, '{"YQ==":1}'),
    (dict[Literal["a", "b"], int], {"a": 1}, '{"a":1}'),
    (dict[str, list[Money | None]], {"a": [None]}, '{"a":[null]}'),
    (Money, Money(Decimal(1)), '{"amount":"1","currency":"EUR"}'),
    (Private, Private(Decimal(1)), '{"amount":"1","currency":"EUR"}'),
    (Nothing, Nothing(), "{}"),
    (Unslotted, Unslotted(1), '{"a":1}'),
    (Point, Point(1), '{"x":1,"y":0}'),
    (Loop, Loop(Loop()), '{"inner":{"inner":null}}'),
    (Pair, Pair("a", 1), '["a",1]'),
    (Movie, {"title": "M"}, '{"title":"M"}'),
    (Record, Record(1), '{"a":1,"b":""}'),
    (Array, Array(1), "[1]"),
    (Cat | Dog | None, Dog("Rex"), '{"type":"Dog","name":"Rex"}'),
    (list[Private], [Private(Decimal(1))], '[{"amount":"1","currency":"EUR"}]'),
    (Sequence[Private], [Private(Decimal(1))], '[{"amount":"1","currency":"EUR"}]'),
    (set[Private], {Private(Decimal(1))}, '[{"amount":"1","currency":"EUR"}]'),
    (frozenset[Private], frozenset({Private(Decimal(1))}), '[{"amount":"1","currency":"EUR"}]'),
    (tuple[Private, ...], (Private(Decimal(1)),), '[{"amount":"1","currency":"EUR"}]'),
    (tuple[int, Private], (1, Private(Decimal(1))), '[1,{"amount":"1","currency":"EUR"}]'),
    (tuple[int, Unslotted], (1, Unslotted(1)), '[1,{"a":1}]'),
    (dict[int, Private], {1: Private(Decimal(1))}, '{"1":{"amount":"1","currency":"EUR"}}'),
    (Private | None, None, "null"),
    (tuple[Private, ...] | None, (Private(Decimal(1)),), '[{"amount":"1","currency":"EUR"}]'),
    (set[Private] | None, {Private(Decimal(1))}, '[{"amount":"1","currency":"EUR"}]'),
    (tuple[int, Private] | None, (1, Private(Decimal(1))), '[1,{"amount":"1","currency":"EUR"}]'),
    (dict[int, Private] | None, {1: Private(Decimal(1))}, '{"1":{"amount":"1","currency":"EUR"}}'),
    (Private | int | None, Private(Decimal(1)), '{"amount":"1","currency":"EUR"}'),
    (list[Private] | str | None, "a", '"a"'),
    (list[Private] | Private, [Private(Decimal(1))], '[{"amount":"1","currency":"EUR"}]'),
    (Annotated[list[Private], msgspec.Meta(min_length=1)] | None, None, "null"),
    (Circle | Square, Square(1.0), '{"$type":"Square","side":1.0}'),
    (list[Circle | Square | None], [None, Circle(1.0)], '[null,{"$type":"Circle","radius":1.0}]'),
    (
        Circle | Private | int,
        Private(Decimal(1)),
        '{"$type":"Private","amount":"1","currency":"EUR"}',
    ),
]


@pytest.mark.parametrize("make", [holding, shadowed], ids=["direct", "shadow"])
@pytest.mark.parametrize(("annotation", "value", "written"), SAME, ids=numbered(SAME))
def test_value_comes_back_and_is_written_the_same_by_shadow_or_not(
    make, annotation, value, written
):
    event = make(annotation)(value)
    assert back(event) == event
    assert Codec(type(event)).encode(event).decode() == f'{{"x":{written}}}'


@pytest.mark.parametrize(
    "value",
    [-0.0, Decimal("1.10"), Colour.RED, Size.S, (1, 2), frozenset({1}), Pair("a", 1)],
)
def test_value_comes_back_of_its_own_class(value):
    annotations: dict[Any, Any] = {tuple: tuple[int, ...], frozenset: frozenset[int]}
    annotation = annotations.get(type(value), type(value))
    copy = back(holding(annotation)(value)).x
    assert (type(copy), str(copy)) == (type(value), str(value))


def test_plain_class_goes_without_a_shadow():
    codec = Codec(holding(dict[str, list[Money | None]]))
    assert (codec._lower, codec._lift, codec._exact) == (None, None, True)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ('{"amount":"1","currency":"USD","more":[1]}', Money(Decimal(1), "USD")),
        ('{"amount":"1"}', Money(Decimal(1))),
        ('{"amount":1.5}', Money(Decimal("1.5"))),
        ('{"amount":"1","currency":"USD","more":[1]}', Private(Decimal(1), "USD")),
        ('{"amount":"1"}', Private(Decimal(1))),
    ],
)
def test_unknown_field_is_ignored_and_missing_one_has_its_default(written, value):
    assert Codec(type(value)).decode(written.encode()) == value


# -- where msgspec alone is wrong -------------------------------------------------------------


def test_private_field():
    assert back(Private(Decimal(1))) == Private(Decimal(1))


def test_alias_names_the_field_in_json():
    @attrs.frozen
    class Renamed:
        amount: int = attrs.field(alias="sum")

    assert back(Renamed(1)) == Renamed(1)
    assert Codec(Renamed).encode(Renamed(1)) == b'{"sum":1}'


def as_tuple(values: Sequence[str]) -> tuple[str, ...]:
    return tuple(values)


def test_converter_runs_on_reading():
    @attrs.frozen
    class Tagged:
        tags: Sequence[str] = attrs.field(converter=as_tuple)
        name: str = attrs.field(converter=lambda name: name.upper(), default="x")

    event = Tagged(["a", "b"])
    assert back(event).tags == ("a", "b")
    assert Codec(Tagged).decode(b'{"tags":["a"]}') == Tagged(["a"], "X")


def test_converter_that_changes_its_own_result_is_refused():
    @attrs.frozen
    class Doubled:
        amount: int = attrs.field(converter=lambda amount: amount * 2)

    error = refused(Doubled(1))
    assert (error.path, error.reason) == ("$.amount", "2 would come back as 4")


def test_cached_hash():
    @attrs.frozen(cache_hash=True)
    class Key:
        a: int

    @attrs.frozen(cache_hash=True, slots=False)
    class UnslottedKey:
        a: int

    assert hash(back(Key(1))) == hash(Key(1))
    assert hash(back(UnslottedKey(1))) == hash(UnslottedKey(1))


def test_factory_that_takes_the_instance():
    @attrs.frozen
    class Account:
        name: str
        label: str = attrs.field(default=attrs.Factory(lambda self: self.name, takes_self=True))

    assert back(Account("a", "b")) == Account("a", "b")
    assert Codec(Account).decode(b'{"name":"a"}') == Account("a", "a")


def test_constructor_of_its_own():
    calls = []

    @attrs.define
    class Own:
        a: int

        def __init__(self, a: int) -> None:
            calls.append(a)
            self.a = a

    assert back(Own(1)) == Own(1)
    assert len(calls) > 2


def test_new_of_its_own():
    @attrs.frozen
    class Counted:
        a: int
        made: ClassVar[int] = 0

        def __new__(cls, a: int) -> typing.Self:
            cls.made += a
            return super().__new__(cls)

    Codec(Counted).decode(b'{"a":5}')
    assert Counted.made == 5


def test_pre_init_is_given_the_arguments():
    seen = []

    @attrs.frozen
    class Prepared:
        a: int

        def __attrs_pre_init__(self, a: int) -> None:
            seen.append(a)

    Codec(Prepared).decode(b'{"a":5}')
    assert seen == [5]


def test_post_init_runs_once():
    seen = []

    @attrs.frozen
    class Direct:
        a: int

        def __attrs_post_init__(self) -> None:
            seen.append(self.a)

    @attrs.frozen
    class Shadowed:
        _a: int

        def __attrs_post_init__(self) -> None:
            seen.append(self._a)

    Codec(Direct).decode(b'{"a":1}')
    Codec(Shadowed).decode(b'{"a":2}')
    assert seen == [1, 2]


def test_keyword_only_fields_in_any_order():
    @attrs.frozen
    class Mixture:
        a: int = attrs.field(default=1, kw_only=True)
        _b: int
        c: int = attrs.field(kw_only=True)
        d: int = 4

    assert back(Mixture(2, 5, c=3, a=0)) == Mixture(2, 5, c=3, a=0)
    assert Codec(Mixture).decode(b'{"b":2,"c":3}') == Mixture(2, c=3)


def test_missing_argument_that_would_be_converted_has_its_default():
    @attrs.frozen
    class Order:
        name: str
        lines: list[Private] = attrs.field(factory=list)
        note: str = "none"

    assert Codec(Order).decode(b'{"name":"a","lines":[{"amount":"1"}]}') == Order(
        "a", [Private(Decimal(1))]
    )
    assert Codec(Order).decode(b'{"name":"a","note":"b"}') == Order("a", [], "b")


def test_stray_attributes_are_not_stored():
    event: Any = Unslotted(1)
    event.stray = object()
    assert Codec(Unslotted).encode(event) == b'{"a":1}'


@attrs.frozen
class Slotted:
    total: int

    @functools.cached_property
    def doubled(self) -> int:
        return self.total * 2


@attrs.frozen(slots=False)
class WithDict:
    total: int

    @functools.cached_property
    def doubled(self) -> int:
        return self.total * 2


@pytest.mark.parametrize("cls", [Slotted, WithDict])
def test_touched_cached_property_is_not_stored(cls):
    event = cls(1)
    assert event.doubled == 2
    assert Codec(cls).encode(event) == b'{"total":1}'
    assert back(event).doubled == 2


def test_class_over_one_without_slots():
    class Base:
        pass

    @attrs.frozen
    class Event(Base):
        a: int

    event = Event(1)
    object.__setattr__(event, "stray", 1)
    assert Codec(Event).encode(event) == b'{"a":1}'


def test_slot_of_a_base_that_is_no_field_is_not_stored():
    class Base:
        __slots__ = ("extra",)

    @attrs.frozen
    class Event(Base):
        a: int

    event = Event(1)
    object.__setattr__(event, "extra", 1)
    assert Codec(Event).encode(event) == b'{"a":1}'


def test_subclass_of_an_attrs_class_has_the_fields_of_both():
    @attrs.frozen
    class Base:
        a: int
        b: object

    @attrs.frozen
    class Event(Base):
        b: str
        c: int = 0

    assert back(Event(1, "b")) == Event(1, "b")


def test_validators_run_on_reading():
    for name in ("a", "_a"):
        field = attrs.field(type=int, validator=attrs.validators.gt(0))
        codec = Codec(made("Checked", **{name: field}))
        with pytest.raises(PayloadError, match=r"ValueError: '_?a' must be > 0: 0"):
            codec.decode(b'{"a":0}')


def test_field_of_a_class_msgspec_reads_but_does_not_write_right():
    holder = holding(list[Unslotted] | None)
    inner: Any = Unslotted(1)
    inner.stray = 1
    assert Codec(holder).encode(holder([inner])) == b'{"x":[{"a":1}]}'
    assert back(holder([inner])) == holder([inner])


def test_init_false_is_made_anew():
    @attrs.define
    class Total:
        lines: list[int]
        total: int = attrs.field(init=False)
        cache: dict[str, object] = attrs.field(init=False, eq=False, factory=dict)
        note: str = attrs.field(init=False, default="")

        def __attrs_post_init__(self) -> None:
            self.total = sum(self.lines)

    event = Total([1, 2])
    event.cache["a"] = object()
    assert Codec(Total).encode(event) == b'{"lines":[1,2]}'
    assert back(event).total == 3
    event.note = "changed"
    error = refused(event)
    assert error.path == "$.note"
    assert "init=False" in error.reason
    assert "'changed' would come back as ''" in error.reason
    event.note = ""
    del event.total
    assert refused(event).reason.endswith("NOTHING would come back as 3")


# -- classes in unions, in themselves, in others ----------------------------------------------


def test_union_of_classes_is_told_apart_by_name():
    holder = holding(list[Circle | Square])
    event = holder([Circle(1.0), Square(1.0), Circle(2.0)])
    assert back(event) == event
    error = refused(holder([Nothing()]))
    assert error.path == "$.x[0].$type"
    assert "Nothing()" in error.reason


def test_union_inside_a_new_type_an_annotated_or_another_union():
    cls = holding(Annotated[Circle | Annotated[Square, "shape"], "shape"] | Other | None)
    for value in (Circle(1.0), Square(1.0), Money(Decimal(1)), None):
        assert back(cls(value)) == cls(value)
    single = holding(Annotated[Private, "sum"] | None)
    assert back(single(Private(Decimal(1)))) == single(Private(Decimal(1)))


def test_union_prefers_the_exact_class():
    @attrs.frozen
    class Base:
        a: int

    @attrs.frozen
    class Derived(Base):
        pass

    @attrs.frozen
    class Further(Base):
        pass

    holder = holding(Base | Derived)
    for value in (Base(1), Derived(1)):
        assert type(back(holder(value)).x) is type(value)
    error = refused(holder(Further(1)))
    assert error.path == "$.x"
    assert "Further(a=1) would come back as" in error.reason


def test_field_may_be_named_type_in_a_union():
    @attrs.frozen
    class Typed:
        type: str

    event = holding(Typed | Circle)(Typed("a"))
    assert Codec(type(event)).encode(event) == b'{"x":{"$type":"Typed","type":"a"}}'
    assert back(event) == event


def test_class_that_holds_itself():
    tree = Node(1, [Node(2, [Node(3)]), Node(4)])
    assert back(tree) == tree
    wrong = Node(1, [Node(2), Node(3, [Node(WRONG_TYPE)])])
    assert refused(wrong).path == "$.children[1].children[0].value"
    with pytest.raises(PayloadError) as caught:
        Codec(Node).decode(b'{"value":1,"children":[{"value":"2"}]}')
    assert caught.value.path == "$.children[0].value"


def test_classes_that_hold_each_other():
    chain = Chain(1, Link(Chain(2, Link(Chain(3)))))
    assert back(chain) == chain
    assert back(Link(chain)) == Link(chain)


def test_class_that_holds_itself_in_a_union():
    sum_ = Add(Num(1), Add(Add(Num(2), Num(3)), Num(4)))
    assert back(sum_) == sum_


def test_class_that_names_itself_while_it_is_being_defined():
    source = """if True:
        import attrs
        from enum import Enum
        from typing import ClassVar
        from eventsource_anyio.codec import Codec

        class Base:
            __slots__ = ()

            @classmethod
            def __attrs_init_subclass__(cls):
                cls.codec = Codec(cls)

        @attrs.frozen
        class Tree(Base):
            class Kind(Enum):
                OAK = "oak"

            leaves: "list[Tree]"
            kind: "Kind | None" = None
            registry: "ClassVar[dict[str, Tree]]" = {}

        @attrs.frozen
        class Other(Base):
            a: int
            like: "ClassVar[Other | None]" = None
    """
    for _ in range(2):  # the second time, the names are bound to the classes of the first
        module = defined(source)
        tree = module.Tree([module.Tree([])], module.Tree.Kind.OAK)
        assert type(tree.codec.decode(tree.codec.encode(tree)).leaves[0]) is module.Tree
        other = module.Other(1)
        assert other.codec.decode(other.codec.encode(other)) == other


def test_local_class_does_not_hide_one_of_the_module_with_the_same_name():
    outer = Money

    def define() -> Any:
        @attrs.frozen
        class Money:
            of_the_module: "Money | None"

        return Money

    event = define()(outer(Decimal(1)))
    assert back(event) == event


def test_annotations_as_strings():
    source = """if True:
        from __future__ import annotations
        import attrs
        from datetime import date

        @attrs.frozen
        class Line:
            _price: int

        @attrs.frozen
        class Order:
            class Kind:
                pass

            date: date
            lines: list[Line] | None
            inner: Inner

            @attrs.frozen
            class Inner:
                a: int
    """.replace("if True:\n        from __future__", "from __future__")
    module = defined("\n".join(line.removeprefix(" " * 8) for line in source.splitlines()))
    order = module.Order(date(2024, 1, 1), [module.Line(1)], module.Order.Inner(1))
    assert back(order) == order


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the type statement is of Python 3.12")
def test_type_statement():
    module = defined(
        "import attrs\n"
        "from eventsource_anyio.codec import Codec\n"
        "type Ids = list[int]\n"
        "type Maybe = Ids | None\n"
        "type Json = int | list[Json]\n"
        "@attrs.frozen\n"
        "class Line:\n"
        "    _x: int\n"
        "type Lines = dict[str, Line]\n"
        "@attrs.frozen\n"
        "class Event:\n"
        "    x: Maybe\n"
        "    y: Lines | None\n"
        "@attrs.frozen\n"
        "class Endless:\n"
        "    x: Json\n"
    )
    event = module.Event([1], {"a": module.Line(1)})
    assert back(event) == event
    assert "defined by itself" in undefined(module.Endless)


# -- types that are refused -------------------------------------------------------------------


class Plain:
    pass


class Undecorated(Money):
    pass


@attrs.define
class Abstract(ABC):
    a: int

    @abstractmethod
    def area(self) -> float: ...


@attrs.frozen
class Box(Generic[T]):
    content: T


@attrs.frozen
class IntBox(Box[int]):
    content: int


Untyped = namedtuple("Untyped", "a b")  # noqa: PYI024
Homonym = made("Circle", r=attrs.field(type=int))


@dataclasses.dataclass
class Holder:
    private: Private


@dataclasses.dataclass(init=False)
class Initless:
    a: int


class DerivedPoint(Point):
    pass


@dataclasses.dataclass
class WithInitVar:
    a: int
    b: dataclasses.InitVar[int]


REFUSED: list[tuple[Any, str]] = [
    (Any, "Any does not say"),
    (object, "object does not say"),
    (list[Any], "Any does not say"),
    (dict[str, object] | None, "object does not say"),
    (list, "list does not say what it holds"),
    (tuple, "tuple does not say what it holds"),
    (dict, "dict does not say what it holds"),
    (typing.List, "List does not say what it holds"),  # noqa: UP006
    (Mapping, "Mapping does not say what it holds"),
    (Sequence, "Sequence does not say what it holds"),
    (complex, "no way to make complex"),
    (range, "no way to make range"),
    (memoryview, "no way to make memoryview"),
    (type[int], "no way to make"),
    (Iterable[int], "no way to make Iterable[int]"),
    (deque[int], "no way to make deque[int]"),
    (tzinfo, "no way to make tzinfo"),
    (Plain, "no way to make Plain"),
    (msgspec.Raw, "no way to make Raw"),
    (int | msgspec.UnsetType, "no way to make"),
    (T, "T is generic"),
    (Box[int], "Box[int] is generic"),
    (Box, "Box.content: ~T"),
    (datetime | str, "both datetime and str are of type string"),
    (Colour | UUID | None, "both Colour and UUID"),
    (Literal["a"] | date, "both Literal['a'] and date"),
    (Size | int, "both Size and int are of type integer"),
    (list[int] | tuple[int, ...], "of type array"),
    (Money | dict[str, int], "both Money and dict[str, int] are of type object"),
    (Money | Point, "both Money and Point"),
    (Array | list[int], "both Array and list[int]"),
    (Pair | list[int], "both Pair and list[int]"),
    (Money | Cat, "msgspec says"),
    (Circle | Homonym, "same name"),
    (Mixed, "neither all str nor all int"),
    (Halves, "neither all str nor all int"),
    (Truth, "neither all str nor all int"),
    (Empty, "neither all str nor all int"),
    (Literal[Colour.RED], "Literal of Colour"),
    (Literal[b"a"], "Literal of bytes"),
    (dict[tuple[int, int], int], "list[tuple[tuple[int, int], int]]"),
    (dict[bool, int], "Keys are strings in JSON, and bool"),
    (dict[str | None, int], "Keys are strings"),
    (dict[int | str, int], "Keys are strings"),
    (dict[Money, int], "Keys are strings"),
    (dict[Literal["a", True], int], "Keys are strings"),
    (Undecorated, "Undecorated derives from an attrs class"),
    (Abstract, "Abstract is abstract"),
    (Holder, "Make Holder an attrs class"),
    (Initless, "Initless has a constructor of its own"),
    (DerivedPoint, "DerivedPoint derives from a dataclass"),
    (WithInitVar, "InitVar"),
    (Untyped, "Untyped.a: its values could not"),
    (Annotated[str, msgspec.Meta(gt=1)], "msgspec says"),
    (typing.Self, "no way to make Self"),
]


@pytest.mark.parametrize(("annotation", "why"), REFUSED, ids=numbered(REFUSED))
def test_type_that_could_not_come_back_is_refused(annotation, why):
    message = undefined(holding(annotation))
    assert why in message
    assert message.count("\n") == 2


def test_refusal_names_class_field_annotation_and_remedy():
    @attrs.frozen
    class Line:
        price: "dict[str, Any] | None"

    @attrs.frozen
    class Order:
        lines: list[Line]

    assert undefined(Order) == (
        "test_refusal_names_class_field_annotation_and_remedy.<locals>.Line.price: "
        "dict[str, Any] | None could not be stored and come back the same.\n"
        "  Any does not say what its JSON is to become again.\n"
        "  Write out the type, such as `str` or `list[Line]`."
    )


def test_class_itself_is_refused():
    assert "not an attrs class" in undefined(Plain)
    assert "not an attrs class" in undefined(Point)
    assert "Decorate Undecorated" in undefined(Undecorated)
    assert "abstract" in undefined(Abstract)


def test_field_without_annotation_is_refused():
    cls = made("Bare", a=attrs.field())
    assert undefined(cls).startswith("Bare.a: its values could not be stored")
    assert "no annotation" in undefined(cls)


def test_generic_class_is_stored_by_a_subclass_with_concrete_annotations():
    assert back(IntBox(1)) == IntBox(1)


def test_name_that_is_not_defined_is_refused():
    @attrs.frozen
    class Line:
        a: int

    @attrs.frozen
    class Order:
        number: int
        lines: "list[Line]"
        other: "ClassVar[int]" = 1

    message = undefined(Order)
    assert ".Order.lines names Line, which is not defined in" in message
    assert "top level of the module" in message

    @attrs.frozen
    class Recursive:
        line: "Line"
        inner: "Recursive | None"

    assert ".Recursive.line names Line" in undefined(Recursive)


def test_annotation_that_cannot_be_evaluated_is_refused():
    @attrs.frozen
    class Broken:
        a: "int.nonsense"  # type: ignore[name-defined]

    assert "AttributeError" in undefined(Broken)


def test_no_code_of_the_class_is_run_when_a_codec_is_made():
    def run(*_: object) -> Any:
        raise AssertionError

    class Base:
        def __new__(cls) -> typing.Self:
            raise AssertionError

    @attrs.frozen
    class Event(Base):
        a: int = attrs.field(factory=run, validator=run)
        _b: int = attrs.field(converter=run, default=1)
        c: int = attrs.field(default=attrs.Factory(run, takes_self=True))

        def __attrs_pre_init__(self) -> None:
            raise AssertionError

        def __attrs_post_init__(self) -> None:
            raise AssertionError

    Codec(Event)


# -- values that are refused ------------------------------------------------------------------


class Text(str):
    __slots__ = ()


class Endless(list[Any]):
    pass


WRONG: list[tuple[Any, Any, str, str]] = [
    (Decimal, "12", "$.x", "'12' would come back as Decimal('12')"),
    (Decimal, 0.1, "$.x", "0.1 would come back as Decimal('0.1')"),
    (Decimal, Decimal("NaN"), "$.x", "what would come back for Decimal('NaN') is not equal to it"),
    (Decimal, Decimal("sNaN"), "$.x", "what would come back for Decimal('sNaN') is not equal"),
    (int, True, "$.x", "True could not be read back: Expected `int`, got `bool`"),
    (int, "1", "$.x", "'1' could not be read back: Expected `int`, got `str`"),
    (int, 1.0, "$.x", "1.0 could not be read back: Expected `int`, got `float`"),
    (int, None, "$.x", "None could not be read back: Expected `int`, got `null`"),
    (int, 10**5000, "$.x", "ValueError: Exceeds the limit"),
    (bool, 1, "$.x", "1 could not be read back"),
    (float, NAN, "$.x", "nan could not be read back: Expected `float`, got `null`"),
    (float, INF, "$.x", "inf could not be read back"),
    (float | None, NAN, "$.x", "nan would come back as None"),
    (list[float | None], [1.0, -INF], "$.x[1]", "-inf would come back as None"),
    (float, 2**53 + 1, "$.x", "9007199254740993 would come back as 9007199254740992.0"),
    (float, 10**400, "$.x", "out of range"),
    (float, Decimal(1), "$.x", "Decimal('1') could not be read back"),
    (str, ID, "$.x", f"UUID('{ID}') would come back as '{ID}'"),
    (str, b"abc", "$.x", "b'abc' would come back as 'YWJj'"),
    (str, "\ud800", "$.x", "half a surrogate pair"),
    (dict[str, int], {"\ud800": 1}, "$.x", "half a surrogate pair"),
    (str, Text("a"), "$.x", "'a' of Text has no JSON form"),
    (bytes, "abc", "$.x", "'abc' could not be read back"),
    (UUID, str(ID), "$.x", f"'{ID}' would come back as UUID('{ID}')"),
    (date, datetime(2024, 1, 1), "$.x", "could not be read back"),
    (datetime, date(2024, 1, 1), "$.x", "could not be read back"),
    (datetime, "2024-01-01T00:00:00", "$.x", "would come back as datetime.datetime(2024, 1, 1"),
    (Colour, "red", "$.x", "'red' would come back as <Colour.RED: 'red'>"),
    (Literal["a"], "b", "$.x", "'b' could not be read back: Invalid enum value 'b'"),
    (Annotated[int, msgspec.Meta(gt=0)], 0, "$.x", "Expected `int` >= 1"),
    (Annotated[int, msgspec.Meta(gt=0)] | None, 0, "$.x", "Expected `int` >= 1"),
    (list[int], (1, 2), "$.x", "(1, 2) would come back as [1, 2]"),
    (Sequence[int], (1, 2), "$.x", "(1, 2) would come back as [1, 2]"),
    (tuple[int, ...], [1], "$.x", "[1] would come back as (1,)"),
    (tuple[int, int], (1,), "$.x", "(1,) could not be read back"),
    (set[int], [1, 1], "$.x", "[1, 1] would come back as {1}"),
    (list[int], deque([1]), "$.x", "deque([1]) of deque has no JSON form"),
    (Mapping[str, int], MappingProxyType({"a": 1}), "$.x", "has no JSON form"),
    (dict[str, int], {1: 1}, "$.x", "{1: 1} would come back as {'1': 1}"),
    (dict[int, int], {"1": 1}, "$.x", "{'1': 1} would come back as {1: 1}"),
    (dict[int, int], {True: 1}, "$.x", "Only dicts with str-like or number-like keys"),
    (dict[str, Decimal], {"a": "1"}, "$.x['a']", "'1' would come back as Decimal('1')"),
    (Movie, {"title": "M", "more": 1}, "$.x", "would come back as {'title': 'M'}"),
    (Money, Money(WRONG_TYPE), "$.x.amount", "'1' would come back as Decimal('1')"),
    (Money, None, "$.x", "None could not be read back"),
    (Money, {"amount": "1", "currency": "EUR"}, "$.x", "would come back as Money("),
    (dict[str, int], Point(1), "$.x", "Point(x=1, y=0) would come back as {'x': 1, 'y': 0}"),
    (Private, Private(WRONG_TYPE), "$.x.amount", "'1' would come back as Decimal('1')"),
    (Private, Money(Decimal(1)), "$.x", "Money(amount=Decimal('1'), currency='EUR') is not of"),
    (Private, 1, "$.x", "1 is not of class Private"),
    (Private | None, 1, "$.x", "1 could not be read back"),
    (list[Private], 1, "$.x", "TypeError: 'int' object is not iterable"),
    (list[Private], [Private(Decimal(1)), 1], "$.x[1]", "1 is not of class Private"),
    (list[Private], (Private(Decimal(1)),), "$.x", "would come back as [Private("),
    (dict[str, Private], {"a": Private(WRONG_TYPE)}, "$.x['a'].amount", "'1' would come back"),
    (dict[str, Private], {"a": 1}, "$.x['a']", "1 is not of class Private"),
    (dict[str, Private], 1, "$.x", "AttributeError"),
    (tuple[int, Private], (1, 2), "$.x[1]", "2 is not of class Private"),
    (tuple[int, Private], (Private(Decimal(1)),), "$.x", "does not have 2 items"),
    (Circle | Square, Circle(WRONG_TYPE), "$.x.radius", "'1' could not be read back"),
    (Circle | Square, 1, "$.x", "1 could not be read back"),
    (Pair, Pair("a", WRONG_TYPE), "$.x[1]", "could not be read back"),
    (Pair, ("a", 1), "$.x", "('a', 1) would come back as Pair(key='a', value=1)"),
    (Point, Point(WRONG_TYPE), "$.x.x", "'1' could not be read back"),
]


@pytest.mark.parametrize("make", [holding, shadowed], ids=["direct", "shadow"])
@pytest.mark.parametrize(("annotation", "value", "path", "reason"), WRONG, ids=numbered(WRONG))
def test_value_that_would_not_come_back_is_refused(make, annotation, value, path, reason):
    error = refused(make(annotation)(value))
    assert (error.path, reason in error.reason) == (path, True), error


def test_instance_of_a_subclass_is_refused():
    @attrs.frozen
    class Special(Money):
        extra: int = 1

    @attrs.frozen
    class PrivateSpecial(Private):
        extra: int = 1

    event = holding(Money)(Special(Decimal(1)))
    error = refused(event)
    assert error.path == "$.x"
    assert "Special(amount=Decimal('1'), currency='EUR', extra=1) would come back as Money(" in (
        error.reason
    )
    assert "would come back" in refused(holding(Private)(PrivateSpecial(Decimal(1)))).reason
    assert "would come back" in refused(holding(list[Money])([Special(Decimal(1))])).reason
    assert refused(Special(Decimal(1)), Money).path == "$"
    assert refused(PrivateSpecial(Decimal(1)), Private).path == "$"


def test_instance_of_an_undecorated_subclass_is_refused():
    assert refused(holding(Money)(Undecorated(Decimal(1)))).path == "$.x"


def test_value_of_another_class_altogether_is_refused():
    for cls in (Money, Private):
        for value in (None, {"amount": "1"}, [1], object()):
            assert refused(value, cls).path.startswith("$")


def test_value_that_contains_itself_is_refused():
    items: list[Any] = []
    items.append(items)
    for make in (holding, shadowed):
        error = refused(make(list[list[int]])(items))
        assert (error.path, error.reason) == ("$", "it is nested too deeply, or contains itself")
    node = Node(1)
    node.children.append(node)
    error = refused(node)
    assert (error.path, error.reason) == ("$", "it is nested too deeply, or contains itself")


def test_very_deep_value_is_refused_or_comes_back():
    node = Node(0)
    for value in range(100_000):
        node = Node(value, [node])
    assert "nested too deeply" in refused(node).reason
    with pytest.raises(PayloadError):
        Codec(Node).decode(b'{"value":1,"children":[' * 100_000)


def test_reason_is_short_even_if_the_value_is_not():
    assert len(refused(holding(list[int])(tuple(range(10_000)))).reason) < 300
    assert len(refused(holding(int)("1" * 10_000)).reason) < 300


def test_reason_has_the_value_of_the_very_field():
    event = made("Event", a=attrs.field(type=int), ab=attrs.field(type=int))(1, WRONG_TYPE)
    assert refused(event).reason.startswith("'1' could not be read back")


def test_value_without_a_repr_is_refused_all_the_same():
    class Shy:
        def __repr__(self) -> str:
            raise RuntimeError

    assert "Shy" in refused(holding(int)(Shy())).reason


# -- time -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [holding, shadowed])
@pytest.mark.parametrize(
    "when",
    [
        datetime(2024, 7, 1, 12, tzinfo=BERLIN),
        datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN),  # the hour that comes twice
        datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=BERLIN),
        datetime(2024, 3, 31, 2, 30, tzinfo=BERLIN),  # the hour that is left out
        datetime(2024, 3, 31, 2, 30, fold=1, tzinfo=BERLIN),
        datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=14))),  # before the calendar, in UTC
        datetime(9999, 12, 31, 23, tzinfo=timezone(-timedelta(hours=12))),
        datetime(2024, 1, 1, tzinfo=timezone(timedelta(hours=23, minutes=59))),
    ],
    ids=str,
)
def test_aware_datetime_comes_back_as_the_same_instant(make, when):
    cls = make(datetime)
    codec = Codec(cls)
    (found,) = attrs.astuple(codec.decode(codec.encode(cls(when))))
    assert found.utcoffset() == when.utcoffset()
    assert found.replace(tzinfo=None) == when.replace(tzinfo=None)
    event = make(dict[datetime, set[datetime]])({when: {when}})
    Codec(type(event)).encode(event)


def test_offset_of_seconds_is_refused():
    when = datetime(1890, 1, 1, tzinfo=BERLIN)
    assert when.utcoffset() == timedelta(minutes=53, seconds=28)
    assert refused(holding(datetime)(when)).path == "$.x"
    assert refused(holding(set[datetime])({when})).path == "$.x"


def test_instants_of_a_repeated_hour_are_not_mistaken_for_each_other():
    first = datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN)
    second = first.replace(fold=1)
    assert first == second
    assert difference(first, first.astimezone(UTC)) is None
    assert difference(first, second.astimezone(UTC)) is not None
    assert difference(first, second) is not None
    assert difference({first}, {second.astimezone(UTC)}) is not None


def test_naive_and_aware_are_not_the_same():
    assert difference(datetime(2024, 1, 1), datetime(2024, 1, 1, tzinfo=UTC)) is not None


def test_fold_of_a_naive_datetime_is_not_kept():
    when = datetime(2024, 10, 27, 2, 30, fold=1)
    assert back(holding(datetime)(when)).x == when


def test_time_of_day_in_a_zone_without_offset_is_refused():
    error = refused(holding(time | None)(time(1, tzinfo=BERLIN)))
    assert error.path == "$.x"
    assert "would come back as datetime.time(1, 0)" in error.reason


def test_zone_that_fails_is_refused():
    class Broken(tzinfo):
        def utcoffset(self, when: datetime | None) -> timedelta:
            raise KeyError("zone")

        dst = tzname = utcoffset  # type: ignore[assignment]

    assert refused(holding(datetime)(datetime(2024, 1, 1, tzinfo=Broken()))).path == "$.x"


# -- equality that cannot be trusted ----------------------------------------------------------


def test_class_without_equality():
    @attrs.frozen(eq=False)
    class Plain:
        amount: Decimal
        inner: "list[Any]" = attrs.field(init=False, factory=list)

    codec = Codec(Plain)
    assert codec.decode(codec.encode(Plain(Decimal(1)))).amount == 1
    assert refused(Plain(WRONG_TYPE)).path == "$.amount"
    assert (
        refused(holding(list[Plain])([Plain(Decimal(1)), Plain(WRONG_TYPE)])).path
        == "$.x[1].amount"
    )
    both = holding(set[Plain] | None)({Plain(Decimal(1)), Plain(Decimal(2))})
    Codec(type(both)).encode(both)
    assert refused(holding(set[Plain])({Plain(Decimal(1)), Plain(WRONG_TYPE)})).path == "$.x"


def test_class_without_equality_and_without_fields():
    ping = attrs.make_class("Ping", [], eq=False)
    Codec(ping).encode(ping())


def test_value_whose_hash_fails_is_refused():
    calls = itertools.count()

    @attrs.frozen(eq=False)
    class Flaky:
        a: int

        def __hash__(self) -> int:
            if next(calls) > 1:  # not when the set is made, nor when it is read back
                raise RuntimeError("no hash")
            return 1

    assert refused(holding(frozenset[Flaky])(frozenset({Flaky(1)}))).reason.endswith("no hash")


def test_equality_of_its_own():
    @attrs.frozen
    class Sly:
        amount: Decimal

        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None  # type: ignore[assignment]

    assert refused(Sly(WRONG_TYPE)).path == "$.amount"
    assert refused(holding(Sly)(Sly(WRONG_TYPE))).path == "$.x.amount"
    assert refused(holding(dict[str, Sly])({"a": Sly(WRONG_TYPE)})).path == "$.x['a'].amount"


@pytest.mark.parametrize("options", [{"eq": False}, {"eq": str}])
def test_field_that_equality_overlooks(options):
    @attrs.frozen
    class Half:
        a: int
        amount: Decimal = attrs.field(**options)

    assert back(Half(1, Decimal("1.0"))).amount == Decimal("1.0")
    assert refused(Half(1, WRONG_TYPE)).path == "$.amount"
    assert refused(holding(Half)(Half(1, WRONG_TYPE))).path == "$.x.amount"


def test_dataclass_and_struct_that_overlook_a_field():
    @dataclasses.dataclass
    class Half:
        amount: Decimal = dataclasses.field(compare=False)

    class Unequal(msgspec.Struct, eq=False):
        amount: Decimal

    assert refused(holding(Half)(Half(WRONG_TYPE))).path == "$.x.amount"
    assert refused(holding(Unequal)(Unequal(WRONG_TYPE))).path == "$.x.amount"
    event = holding(Unequal)(Unequal(Decimal(1)))
    Codec(type(event)).encode(event)


def test_value_that_refuses_to_be_compared():
    @attrs.frozen
    class Angry:
        a: int

        def __eq__(self, other: object) -> bool:
            raise RuntimeError

        __hash__ = None  # type: ignore[assignment]

    class Odd(msgspec.Struct):
        a: int

        def __eq__(self, other: object) -> bool:
            raise RuntimeError

        __hash__ = None  # type: ignore[assignment]

    for cls in (Angry, Odd):
        event = holding(list[cls])([cls(1)])  # type: ignore[valid-type]
        Codec(type(event)).encode(event)


# -- difference -------------------------------------------------------------------------------


PAIRS: list[tuple[Any, Any, str | None]] = [
    (1, 1.0, None),
    (1, True, None),
    ([1], [1], None),
    ([1], (1,), ""),
    ([1], [1, 2], ""),
    ([1, 2], [1, 3], "[1]"),
    (Pair("a", 1), ("a", 1), None),
    (("a", 1), Pair("a", 1), ""),
    ({1, 2}, {2, 1}, None),
    ({1, 2}, {1, 3}, ""),
    ({1}, {1, 2}, ""),
    ({1, 2}, {1}, ""),
    ({1}, frozenset({1}), None),
    ({1}, [1], ""),
    ({"a": 1}, {"a": 1.0}, None),
    ({"a": [1]}, {"a": [2]}, "['a'][0]"),
    ({"a": 1}, {"a": 1, "b": 2}, ""),
    ({"a": 1, "b": 2}, {"a": 1}, ""),
    ({"a": 1}, [1], ""),
    (OrderedDict(a=1), {"a": 1}, None),
    (Money(Decimal(1)), Money(Decimal(2)), ".amount"),
    (Private(Decimal(1)), Private(Decimal(2)), ".amount"),
    (Money(Decimal(1)), Undecorated(Decimal(1)), ""),
    (Circle(1.0), Square(1.0), ""),
    (Nothing(), Nothing(), None),
    (Point(1), Point(2), ".x"),
    (Record(1), Record(2), ".a"),
    (Colour.RED, Colour.RED, None),
    (Colour.RED, Colour.BLUE, ""),
    (time(1), time(1), None),
    (time(1), time(1, tzinfo=BERLIN), ""),
    (NAN, NAN, ""),
    (None, None, None),
    (None, 0, ""),
    (object, object, None),
]


@pytest.mark.parametrize(("ours", "theirs", "found"), PAIRS, ids=numbered(PAIRS))
def test_difference(ours, theirs, found):
    result = difference(ours, theirs)
    assert (None if result is None else result[0]) == found


def test_large_sets_and_dicts_are_compared_in_reasonable_time():
    many = set(range(100_000))
    assert difference(many, set(many)) is None
    by_name = {str(number): number for number in many}
    assert difference(by_name, dict(by_name)) is None


# -- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "path", "reason"),
    [
        (b"", "$", "truncated"),
        (b"{", "$", "truncated"),
        (b"nonsense", "$", "malformed"),
        (b"\xff", "$", "malformed"),
        (b'{"number":1}x', "$", "trailing"),
        (b"null", "$", "Expected `object`, got `null`"),
        (b"[]", "$", "Expected `object`, got `array`"),
        (b"{}", "$.number", "missing"),
        (b'{"number":"1"}', "$.number", "Expected `int`, got `str`"),
        (b'{"number":1e999}', "$.number", "out of range"),
        (b'{"number":1,"lines":[{"price":"1"},{}]}', "$.lines[1].price", "missing"),
        (b'{"number":1,"lines":[{"price":"x"}]}', "$.lines[0].price", "Invalid decimal"),
        (b'{"number":1,"rates":{"x":"1"}}', "$.rates", "a key: Expected `int`, got `str`"),
        (b'{"number":1,"rates":{"1":"x"}}', "$.rates[...]", "Invalid decimal"),
        (b'{"number":1,"note":"' + b"\xff" * 3 + b'"}', "$", ""),
        (b"[" * 100_000, "$", ""),
        (b'{"number":1,"unknown":' + b"[" * 100_000, "$", ""),
    ],
    ids=str,
)
@pytest.mark.parametrize("price", ["price", "_price"])
def test_what_cannot_be_read(price, data, path, reason):
    line = made("Line", **{price: attrs.field(type=Decimal)})
    order = made(
        "Order",
        number=attrs.field(type=int),
        lines=attrs.field(type=list[line], factory=list),  # type: ignore[valid-type]
        rates=attrs.field(type=dict[int, Decimal], factory=dict),
        note=attrs.field(type=str, default=""),
    )
    codec = Codec(order)
    with pytest.raises(PayloadError) as caught:
        codec.decode(data)
    assert caught.value.path == path
    assert reason in caught.value.reason
    assert str(caught.value) == f"{path}: {caught.value.reason}"


@pytest.mark.parametrize("name", ["a", "_a"])
@pytest.mark.parametrize("failure", [ValueError, KeyError, RuntimeError, RecursionError])
def test_foreign_exceptions_of_validators_become_payload_errors(name, failure):
    def fail(*_: object) -> None:
        raise failure("no")

    codec = Codec(made("Failing", **{name: attrs.field(type=int, validator=fail)}))
    with pytest.raises(PayloadError) as caught:
        codec.decode(b'{"a":1}')
    assert caught.value.path == "$"
    assert failure is RecursionError or caught.value.reason == f"{failure.__name__}: no"
    assert caught.value.__cause__ is not None


def test_foreign_exceptions_have_the_path_of_their_object():
    @attrs.frozen
    class Line:
        price: int = attrs.field(converter=int)

        def __attrs_post_init__(self) -> None:
            if self.price < 0:
                raise LookupError("negative")

    @attrs.frozen
    class Order:
        lines: dict[str, tuple[int, Line]]
        pairs: list[list[Line]] = attrs.field(factory=list)

        def __attrs_post_init__(self) -> None:
            if not self.lines and not self.pairs:
                raise LookupError("negative")

    codec = Codec(Order)
    for data, path in [
        (b'{"lines":{"a":[1,{"price":-1}]}}', "$.lines['a'][1]"),
        (b'{"lines":{},"pairs":[[],[{"price":1},{"price":-1}]]}', "$.pairs[1][1]"),
        (b'{"lines":{},"pairs":[]}', "$"),
    ]:
        with pytest.raises(PayloadError) as caught:
            codec.decode(data)
        assert (caught.value.path, caught.value.reason) == (path, "LookupError: negative")


def test_unhashable_item_of_a_set_becomes_a_payload_error():
    @attrs.define
    class Unhashable:
        _a: int

    with pytest.raises(PayloadError) as caught:
        Codec(holding(frozenset[Unhashable])).decode(b'{"x":[{"a":1}]}')
    assert caught.value.path == "$.x"


def test_cancellation_and_exit_pass_through():
    def leave(*_: object) -> None:
        raise SystemExit

    codec = Codec(made("Leaving", a=attrs.field(type=int, converter=leave)))
    with pytest.raises(SystemExit):
        codec.decode(b'{"a":1}')


# -- converting -------------------------------------------------------------------------------


def test_convert_reads_what_an_upcaster_made():
    for cls in (Money, Private):
        codec: Codec[Any] = Codec(cls)
        assert codec.convert({"amount": "1", "more": None}) == cls(Decimal(1))
        assert codec.convert({"amount": Decimal(1), "currency": "USD"}) == cls(Decimal(1), "USD")
    assert Codec(holding(dict[int, Private])).convert({"x": {1: {"amount": "1"}}}).x == {
        1: Private(Decimal(1))
    }


@pytest.mark.parametrize(
    ("payload", "path"),
    [
        ({}, "$.amount"),
        ({"amount": []}, "$.amount"),
        ({"amount": "1", "currency": 1}, "$.currency"),
        ({"amount": object()}, "$['amount']"),
        ({"amount": {"a": [1, object()]}}, "$['amount']['a'][1]"),
        (None, "$"),
        ([], "$"),
        (object(), "$"),
    ],
)
@pytest.mark.parametrize("cls", [Money, Private])
def test_convert_refuses_what_it_cannot_read(cls, payload, path):
    with pytest.raises(PayloadError) as caught:
        Codec(cls).convert(payload)
    assert caught.value.path == path


# -- threads ----------------------------------------------------------------------------------


def test_one_codec_in_many_threads():
    @attrs.frozen
    class Order:
        number: int
        lines: list[Private]
        shape: Circle | Square

    codec = Codec(Order)
    wrong = []

    def work(number: int) -> None:
        for turn in range(200):
            order = Order(number, [Private(Decimal(turn))], Circle(float(turn)))
            if codec.decode(codec.encode(order)) != order:
                wrong.append(order)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
