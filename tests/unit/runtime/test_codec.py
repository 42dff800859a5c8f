"""JSON from a side that may be hostile: taken exactly as its record says, or refused with the path and the value."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.runtime import FakeAgent, bounds, running_world
from stormjib_runtime.codec import MAX_BYTES, MAX_ITEMS, MAX_TEXT, DecodeError, decode, encode
from stormjib_runtime.orders import order_for
from stormjib_runtime.wire import Bounds, JobState, Order, RankState, Report


def plain() -> dict[str, Any]:
    report: dict[str, Any] = json.loads(encode(FakeAgent(0, ranks=(RankState(0),)).report()))
    return report


def test_what_is_encoded_is_decoded_to_the_same() -> None:
    world = running_world()
    report = world.agents[0].report()
    assert decode(Report, encode(report)) == report
    assert decode(JobState, encode(world.job())) == world.job()
    assert decode(Order, encode(order_for(world.state, 0))) == order_for(world.state, 0)
    assert decode(Bounds, encode(bounds())) == bounds()


def test_fields_with_a_default_may_be_absent_and_others_may_not() -> None:
    given = plain()
    assert "events" not in given, "what is as it is by default is not sent"
    del given["ranks"]
    assert decode(Report, json.dumps(given)).ranks == ()
    del given["slot"]
    with pytest.raises(DecodeError, match="slot"):
        decode(Report, json.dumps(given))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("slot", "0"),
        ("slot", True),
        ("slot", 1.0),
        ("slot", None),
        ("slot", 1 << 64),
        ("slot", -(1 << 64)),
        ("address", 7),
        ("address", "x" * (MAX_TEXT + 1)),
        ("phase", "running"),
        ("phase", []),
        ("leaving", 1),
        ("ranks", {}),
        ("ranks", [None]),
        ("ranks", [[]]),
        ("events", ["x"] * (MAX_ITEMS + 1)),
        ("generation", []),
        ("generation", {"id": "1.2"}),
        ("unknown", 1),
        ("__class__", 1),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_path(field: str, value: object) -> None:
    with pytest.raises(DecodeError, match="Report"):
        decode(Report, json.dumps({**plain(), field: value}))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400])
def test_a_number_that_json_or_a_float_cannot_hold_is_refused(number: str) -> None:
    given = plain()
    given["ranks"][0]["loss"] = "HERE"
    with pytest.raises(DecodeError, match="loss"):
        decode(Report, json.dumps(given).replace('"HERE"', number))


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff\xfe\xfa", b"[" * 100_000, b'{"a":1}x', b"null", b"[]", b'"report"', b"1" * 5000],
)
def test_what_is_no_object_is_refused(data: bytes) -> None:
    with pytest.raises(DecodeError):
        decode(Report, data)


def test_a_message_beyond_the_limit_is_not_even_read() -> None:
    with pytest.raises(DecodeError, match=str(MAX_BYTES)):
        decode(Report, b" " * (MAX_BYTES + 1))


def test_a_whole_number_is_a_float_where_one_is_wanted() -> None:
    assert decode(RankState, b'{"rank":1,"step_age_s":2}').step_age_s == 2.0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(field=st.sampled_from(sorted(plain())), value=JSON)
def test_nothing_but_decode_error_comes_out_and_what_is_taken_can_be_sent(field: str, value: object) -> None:
    try:
        report = decode(Report, json.dumps({**plain(), field: value}))
    except DecodeError:
        return
    assert decode(Report, encode(report)) == report
