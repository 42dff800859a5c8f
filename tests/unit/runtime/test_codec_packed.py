"""The packed form: as strict as the other one, and as small as samples have to be."""

from __future__ import annotations

import json
import tracemalloc
import zlib
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.runtime import running_world
from stormjib_health.wire import (
    Answer,
    Call,
    Check,
    CheckKind,
    Edge,
    Finding,
    Group,
    Pair,
    RankSample,
    Sample,
    Stack,
    Timing,
    Wish,
)
from stormjib_runtime.codec import MAX_BYTES, MAX_ITEMS, MAX_TEXT, DecodeError, pack, unpack

T = TypeVar("T")

FLOATS = st.floats(-1e300, 1e300).map(lambda value: float(f"{value:.4g}"))
WHOLE = st.integers(-(1 << 63) + 1, (1 << 63) - 1)
TEXT = st.text(max_size=12)


def records(kind: type, **given_: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Any record of `kind`, its strings, numbers and flags drawn freely."""
    plain = {"int": WHOLE, "float": FLOATS, "str": TEXT, "bool": st.booleans()}
    drawn = {name: plain[hint] for name, hint in kind.__annotations__.items() if name not in given_}
    return st.builds(kind, **drawn, **given_)


def lists(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner, max_size=3).map(tuple)


RANKS = records(
    RankSample,
    steps_s=lists(FLOATS),
    own_s=lists(FLOATS),
    calls=lists(records(Call, pairs=lists(records(Pair)))),
    timings=lists(records(Timing)),
)


@given(RANKS)
@settings(max_examples=30)
def test_a_rank_comes_back_as_it_was(rank: RankSample) -> None:
    assert unpack(RankSample, pack(rank)) == rank


@given(st.one_of(*map(records, (Edge, Stack, Finding, Answer))))
@settings(max_examples=50)
def test_what_else_a_sample_holds_comes_back_as_it_was(record: object) -> None:
    assert unpack(type(record), pack(record)) == record


def test_every_kind_of_field_comes_back() -> None:
    wish = Wish(0.5, True, (1, 2), (Check(7, CheckKind.TRANSFER, "10.0.0.1:99"), Check(8, CheckKind.COMPUTE)))
    assert unpack(Wish, pack(wish)) == wish
    world = running_world()
    for record in (
        world.agents[0].report(),
        world.job(),
        Sample(1, "j", 0, 1, "1.1", 5, 0.2, groups=(Group.of(7, "dp", (0, 1)),)),
    ):
        assert unpack(type(record), pack(record)) == record


def text(record: object) -> bytes:
    """What is inside."""
    return zlib.decompress(pack(record))


def read(kind: type[T], inside: object) -> T:
    """What is read of a message with this inside."""
    return unpack(kind, zlib.compress(inside if isinstance(inside, bytes) else json.dumps(inside).encode()))


def test_last_values_are_left_out_where_they_are_the_defaults() -> None:
    assert text(Wish()) == b"[]"
    assert read(Wish, []) == Wish()
    assert text(RankSample(3)) == b"[3]"
    assert text(RankSample(3, phase=2)) == b"[3,-1,0,[],[],-1,2]"


def test_floats_keep_four_digits_and_whole_ones_no_point() -> None:
    sizes = {
        0.123456: b"0.1235",
        1234567.0: b"1235000",
        2.0: b"2",
        1e-7 / 3: b"3.333e-08",
        1e300: b"1e+300",
        1.7976e308: b"1.7976e+308",
    }
    assert {value: text(Wish(value))[1:-1] for value in sizes} == sizes
    assert type(read(Wish, [2]).interval_s) is float


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_does_not_have_is_not_sent(value: float) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        pack(Wish(value))


SAMPLE = text(Sample(1, "job", 0, 1, "1.1", 5, 0.2, (RankSample(0, calls=(Call(1, 2),)),)))


@pytest.mark.parametrize(
    ("at", "value", "path"),
    [
        (0, "1", ".protocol"),
        (0, True, ".protocol"),
        (0, 1.0, ".protocol"),
        (0, 1 << 64, ".protocol"),
        (1, None, ".job_uid"),
        (1, "x" * (MAX_TEXT + 1), ".job_uid"),
        (6, "0.2", ".over_s"),
        (6, 10**400, ".over_s"),
        (7, {}, ".ranks"),
        (7, [None], ".ranks[0]"),
        (7, [{"rank": 0}], ".ranks[0]"),
        (7, [[]], ".ranks[0]"),
        (7, [[0]] * (MAX_ITEMS + 1), ".ranks"),
        (7, [[0], [1, 2, 3, [0.5, "x"]]], ".ranks[1].steps_s[1]"),
        (7, [[0, *[0] * 40]], ".ranks[0]"),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_path(at: int, value: object, path: str) -> None:
    row = json.loads(SAMPLE)
    row[at] = value
    with pytest.raises(DecodeError) as caught:
        read(Sample, row)
    assert str(caught.value).startswith(f"Sample{path} ")


def test_too_few_and_too_many_values_name_what_is_wanted() -> None:
    with pytest.raises(DecodeError, match="has 1 values; wanted 2 to 10: group, issued"):
        read(Call, [1])
    with pytest.raises(DecodeError, match="has 12 values; wanted 2 to 10"):
        read(Call, [0] * 12)


@pytest.mark.parametrize(
    "data",
    [b"", b"[", b"\xff\xfe", b"[" * 100_000, b"[]x", b"null", b"{}", b"3", b"[NaN]", b"[1e999]", b"1" * 5000],
)
def test_what_is_no_row_is_refused(data: bytes) -> None:
    with pytest.raises(DecodeError):
        read(Wish, data)


@pytest.mark.parametrize(
    "data", [b"", b"[]", pack(Wish())[:-1], pack(Wish()) + b"x", pack(Wish())[:-1] + b"x", pack(Wish())[1:]]
)
def test_what_is_not_deflated_whole_is_refused(data: bytes) -> None:
    with pytest.raises(DecodeError):
        unpack(Wish, data)


def test_a_message_beyond_the_limit_is_not_even_inflated() -> None:
    with pytest.raises(DecodeError, match=str(MAX_BYTES)):
        read(Wish, b" " * (MAX_BYTES + 1))
    with pytest.raises(DecodeError, match="more than 8 bytes"):
        unpack(Wish, zlib.compress(b"[        ]"), limit=8)
    bomb = zlib.compress(b"[" + b" " * (1 << 25))
    tracemalloc.start()
    with pytest.raises(DecodeError):
        unpack(Wish, bomb)
    assert tracemalloc.get_traced_memory()[1] < 4 * MAX_BYTES
    tracemalloc.stop()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)


@given(at=st.integers(0, 13), value=JSON)
def test_nothing_but_decode_error_comes_out_and_what_is_taken_can_be_sent(at: int, value: object) -> None:
    row = [*json.loads(SAMPLE), *([[]] * 6)]
    row[at] = value
    try:
        sample = read(Sample, row)
    except DecodeError:
        return
    assert unpack(Sample, pack(sample)).number == sample.number
