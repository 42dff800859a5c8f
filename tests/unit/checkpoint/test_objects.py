"""FORMAT.md §9.14 to §9.16: values come back exactly as they were, or are refused by key; and files hold one form of each."""

from __future__ import annotations

import collections
import enum
import json
import math
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stormjib_checkpoint.errors import FormatError
from stormjib_checkpoint.format import TrainFile
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.objects import from_json, to_json
from stormjib_checkpoint.records import canonical, decode, encode, parse

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
KEYS = TEXT | st.integers() | st.sampled_from(["$tuple", "$dict", "$", "$int"])
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(1 << 2040, 1 << 2060)
    | st.binary(max_size=9)
    | TEXT
    | st.builds(lambda bits: struct.unpack(">d", bits)[0], st.binary(min_size=8, max_size=8))
    | st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 1e308])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=8,
)


def exact(value: object) -> object:
    """Equal only for values that nothing can tell apart: 1, 1.0 and True differ, and so do two NaNs of other bits."""
    if isinstance(value, float):
        return ("float", struct.pack(">d", value))
    if isinstance(value, dict):
        return ("dict", {(type(key), key): exact(item) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return (type(value), [exact(item) for item in value])
    return (type(value), value)


def through_a_file(value: object) -> Any:
    data = encode(TrainFile(1, GenerationId(1, 1), {"value": to_json(value, "train.value")}))
    return from_json(decode(TrainFile, data, "file").train["value"], "train.value")


@settings(max_examples=300)
@given(VALUES)
def test_a_value_comes_back_exactly(value: object) -> None:
    """§9.14, §9.15"""
    assert exact(through_a_file(value)) == exact(value)


@given(VALUES, VALUES)
def test_two_values_never_have_one_form(one: object, other: object) -> None:
    same = canonical(to_json(one, "x")) == canonical(to_json(other, "x"))
    assert same == (exact(one) == exact(other))


@pytest.mark.parametrize(
    "plain", [None, True, 0, -(2**64), 1.5, -0.0, "ü", [1, [2]], {"a": {"$b": 1, "c": 2}}, {}]
)
def test_what_json_holds_stays_as_it_is(plain: object) -> None:
    """§9.14"""
    assert to_json(plain, "x") == plain
    assert json.loads(canonical(to_json(plain, "x"))) == plain


@pytest.mark.parametrize(
    ("value", "form"),
    [
        ((1, (2,)), {"$tuple": [1, {"$tuple": [2]}]}),
        (b"\0\xff", {"$bytes": "AP8="}),
        (math.inf, {"$float": "7ff0000000000000"}),
        (-math.inf, {"$float": "fff0000000000000"}),
        (math.nan, {"$float": "7ff8000000000000"}),
        (-(1 << 2048), {"$int": "-0x1" + "0" * 512}),
        (16**6000, {"$int": "0x1" + "0" * 6000}),
        ({"b": 1, 7: 2, -1: 3}, {"$dict": [[-1, 3], [7, 2], ["b", 1]]}),
        ({"$tuple": [1]}, {"$dict": [["$tuple", [1]]]}),
        ({"$x": 1}, {"$dict": [["$x", 1]]}),
    ],
    ids=range(10),
)
def test_what_json_cannot_hold_has_a_tag(value: object, form: object) -> None:
    """§9.15"""
    assert to_json(value, "x") == form
    assert exact(from_json(form, "x")) == exact(value)


class Number(int):
    pass


class Level(enum.IntEnum):
    LOW = 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {1, 2}}, r"x\.a is \{1, 2\}; kept are text"),
        ({"a": [1, {7: object()}]}, r"x\.a\[1\]\.7 is <object"),
        ({"a": {1.5: 2}}, r"x\.a has the key 1\.5"),
        ({"a": {True: 2}}, r"x\.a has the key True"),
        ({"a": {(1,): 2}}, r"x\.a has the key \(1,\)"),
        ({"a": Number(3)}, r"x\.a is 3; kept are"),
        ({"a": Level.LOW}, r"x\.a is <Level\.LOW: 1>"),
        (collections.OrderedDict(a=1), r"x is OrderedDict"),
        ({"a": 1j}, r"x\.a is 1j"),
        ({"a": int}, r"x\.a is <class 'int'>"),
        ({"a": "\udfff"}, r"x\.a holds text that is no Unicode"),
        ({"\udfff": 1}, r"a key of x holds text that is no Unicode"),
        ({"a": [10**5000, object()]}, r"x\.a\[1\] is <object"),
        ({"a": {10**5000: object()}}, r"x\.a\.<int of thousands of digits> is <object"),
    ],
)
def test_what_would_change_is_refused_by_key(value: object, message: str) -> None:
    """§9.16"""
    with pytest.raises(FormatError, match=message):
        to_json(value, "x")


def nested(levels: int, how: str) -> object:
    value: object = 1
    for _ in range(levels):
        value = {"list": [value], "tuple": (value,), "dict": {1: value}, "text": {"k": value}}[how]
    return value


@pytest.mark.parametrize("how", ["list", "tuple", "dict", "text"])
def test_depth_is_limited_both_ways(how: str) -> None:
    """§9.16"""
    assert through_a_file(nested(32, how)) == nested(32, how)
    with pytest.raises(FormatError, match="nested deeper than 32"):
        to_json(nested(33, how), "x")
    with pytest.raises(FormatError, match="nested deeper than 32"):
        from_json(json.loads("[" * 900 + "]" * 900), "x")
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(FormatError, match="nested deeper than 32"):
        to_json(endless, "x")


@pytest.mark.parametrize(
    "form",
    [
        '{"$tuple": 5}', '{"$tuple": {"a": 1}}', '{"$tuple": "ab"}', '{"$tuple": null}',
        '{"$bytes": "AP8"}', '{"$bytes": "A P8="}', '{"$bytes": 7}', '{"$bytes": "AP9="}',
        '{"$float": "3ff0000000000000"}', '{"$float": "7FF8000000000000"}', '{"$float": "7ff8"}', '{"$float": 1}',
        '{"$int": "0x1"}', '{"$int": 5}', '{"$int": "zz"}', '{"$int": "0x_1"}',
        '{"$dict": [["a", 1]]}', '{"$dict": [[1, 1], [1, 2]]}', '{"$dict": [[2, 1], [1, 1]]}', '{"$dict": [[1]]}',
        '{"$dict": [[true, 1]]}', '{"$dict": [[1.0, 1]]}', '{"$dict": [[[], 1]]}', '{"$dict": {"ab": 1}}',
        '{"$pickle": "gASV"}', '{"$torch.nn.Linear": []}', '{"$": 1}',
    ],
)  # fmt: skip
def test_other_forms_are_refused(form: str) -> None:
    """§9.15: unknown tags, and forms that no writer writes."""
    with pytest.raises(FormatError, match=r"^x "):
        from_json(json.loads(form), "x")


FORMS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["$tuple", "$dict", "$int", "$float", "$bytes", "$x", "a"]), inner, max_size=2
        )
    ),
    max_leaves=8,
)


@settings(max_examples=300)
@given(FORMS)
def test_any_json_is_read_as_the_one_value_that_it_is_written_for_or_refused(form: object) -> None:
    """§9.15: nothing but a FormatError comes of a hostile file."""
    try:
        value = from_json(form, "x")
    except FormatError:
        return
    assert exact(to_json(value, "x")) == exact(form)


@given(st.binary(max_size=60))
def test_noise_inside_a_record_is_refused_or_read(noise: bytes) -> None:
    try:
        plain = parse(b'{"a":' + noise + b"}", "file")
        value = from_json(plain["a"], "file: a")
    except FormatError:
        return
    assert canonical(to_json(value, "x"))
