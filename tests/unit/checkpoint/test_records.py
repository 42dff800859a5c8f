"""FORMAT.md §2: what is refused on the way in, and that equal records are equal bytes."""

from __future__ import annotations

import contextlib
import gc
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stormjib_checkpoint.errors import FormatError
from stormjib_checkpoint.format import (
    Atom,
    AtomRow,
    AtomsFile,
    DataFile,
    GenerationFile,
    LedgerRef,
    Manifest,
    RankFile,
    ResumePoint,
    StoredBox,
    TrainFile,
)
from stormjib_checkpoint.grids import Grid
from stormjib_checkpoint.layout import (
    GenerationId,
    parse_generation,
    parse_ledger,
    parse_rank,
    parse_step,
    step_folder,
)
from stormjib_checkpoint.records import decode, encode

G = GenerationId(2, 7)
ATOM = Atom("F32", (4, 2), (StoredBox(0, (0, 0), (3, 2), 100, 124),))
ATOM_V = (StoredBox(0, (0,), (4,), 100, 116),)
RANK = RankFile(
    5,
    G,
    0,
    2,
    "",
    DataFile(124, 64, ("a" * 16, "b" * 16)),
    {"w": ATOM},
    {"v": "w"},
    ("optim.u",),
    {"lr": 0.1},
    {4: (1, 2), 5: ()},
)
RECORDS = [
    RANK,
    AtomsFile(5, G, {"w": AtomRow("F32", (4, 2), ATOM.boxes)}, {}, (), {"lr": [1, None, {"k": "ü"}]}),
    AtomsFile(
        5,
        G,
        {
            "w": AtomRow("F32", (4, 2), None, 0, 1, "f" * 16),
            "v": AtomRow("F32", (4,), ATOM_V),
            "b": AtomRow("U8", (), None, 1, 2),
        },
        {},
        (),
        {},
        (Grid((((3, 1), (1, 1)),), ((0, 2, 1),)), Grid((), ((0, 1, 0),))),
        ((4096, 2), (8192, 1)),
    ),
    TrainFile(5, G, {"step": 5, "seed": 2**70, "nested": {"a": [1.5, True]}}),
    Manifest(
        5, G, "uid", 2, {"atoms.json": "0" * 64}, {"rank-00000.safetensors": 124}, LedgerRef(4, 5, "1" * 64)
    ),
    Manifest(5, G, "uid", 2, {}, {}, None),
    GenerationFile(G, GenerationId(2, 6), "uid", ResumePoint(4, "1.9", "2" * 64)),
    GenerationFile(GenerationId(0, 1), None, "", None),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_comes_back_as_it_was(record: object) -> None:
    """§2.2"""
    data = encode(record)
    assert decode(type(record), data, "file") == record
    assert encode(decode(type(record), data, "file")) == data
    assert data.endswith(b"}\n")
    assert b": " not in data


def test_unknown_keys_are_ignored_and_a_newer_minor_is_read() -> None:
    """§2.1"""
    plain = json.loads(encode(RANK)) | {"format": "1.9", "color": "red"}
    assert decode(RankFile, json.dumps(plain).encode(), "file") == RANK


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "2.0"}, r"format 2.0; this version reads 1.x. Use the version that wrote it"),
        ({"format": "0.1"}, r"0.x was never released: save to a new folder"),
        ({"format": "9" * 5000 + ".0"}, "no format"),
        ({"requires": [[1]]}, r"requires \[1\]"),
        ({"format": 1}, "no format"),
        ({"format": "0.x"}, "no format"),
        ({"requires": ["holograms"]}, "requires 'holograms'"),
        ({"requires": {"a": 1}}, "requires"),
        ({"step": -1}, r"step is -1; wanted 0 to 2\^63-1"),
        ({"step": 2**63}, "wanted 0 to"),
        ({"step": True}, "step is True; wanted int"),
        ({"step": 1.0}, "wanted int"),
        ({"generation": "2.07"}, "INCARNATION.NUMBER"),
        ({"generation": "../../etc"}, "INCARNATION.NUMBER"),
        ({"rank": 2}, "rank 2 of 2"),
        ({"atoms": []}, "wanted an object"),
        ({"samples": {"04": []}}, "key '04'; wanted a number"),
        ({"samples": {"4": [1, "2"]}}, "wanted int"),
        (
            {"data": {"bytes": 124, "piece_bytes": 64, "pieces": ["a"]}},
            "1 pieces of 64 bytes for a file of 124",
        ),
        ({"data": {"bytes": 124, "piece_bytes": 0, "pieces": []}}, "pieces of 0 bytes"),
        ({"atoms": {"w": {"dtype": "F31", "shape": [1], "boxes": []}}}, "unknown dtype 'F31'"),
        ({"attempt": None}, "wanted str"),
        ({"ties": {"v": "x"}}, r"'v' is tied to 'x', which is no atom here"),
        ({"ties": {"w": "w"}}, "a name comes twice"),
        ({"scalars": {"w": 1}}, "a name comes twice"),
        ({"absent": ["a", "a"]}, "a name comes twice"),
        ({"absent": ["w"]}, "'w' is absent and there"),
        ({"scalars": {"optim.u.step": 1}}, r"'optim\.u' is absent and there"),
        ({"attempt": "\ud800"}, "is no Unicode|surrogates"),
    ],
)
def test_a_hostile_record_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    """§2.1, §2.3, §4.2"""
    data = json.dumps(json.loads(encode(RANK)) | change).encode()
    with pytest.raises(FormatError, match=message):
        decode(RankFile, data, "file")


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ({"offset": [3, 0]}, "reaches outside"),
        ({"shape": [3, 0]}, "is empty"),
        ({"shape": [3]}, "1 dimensions in an atom of 2"),
        ({"end": 125}, "do not hold a box"),
        ({"start": 104, "end": 128}, "outside this rank's file"),
        ({"rank": 1}, "outside this rank's file"),
        ({"digest": "x" * 16}, "16 hexadecimal digits"),
    ],
)
def test_a_box_that_lies_is_refused(box: dict[str, Any], message: str) -> None:
    """§4.2"""
    plain = json.loads(encode(RANK))
    plain["atoms"]["w"]["boxes"][0] |= box
    with pytest.raises(FormatError, match=message):
        decode(RankFile, json.dumps(plain).encode(), "file")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff\xfe",
        b'{"format":"1.0","format":"1.0"}',
        b'{"format":"1.0","step":NaN}',
        b'{"format":"1.0","step":1e999}',
        b'{"\\ud800":1}',
        b'{"a":"\\ud800"}',
        b'{"a":"\xed\xa0\x80"}',
        '{"format":"1.0"}'.encode("utf-16"),
        b"[" * 100_000,
        b'{"step":' + b"9" * 10_000 + b"}",
    ],
)
def test_what_is_no_record_is_refused(data: bytes) -> None:
    """§2.3"""
    with pytest.raises(FormatError):
        decode(RankFile, data, "file")


def test_a_missing_key_is_named() -> None:
    plain = json.loads(encode(RANK))
    del plain["world"]
    with pytest.raises(FormatError, match="file lacks world"):
        decode(RankFile, json.dumps(plain).encode(), "file")


@given(st.binary(max_size=200))
def test_noise_is_refused_and_nothing_else_happens(data: bytes) -> None:
    with pytest.raises(FormatError):
        decode(RankFile, data, "file")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**65), 2**65)
    | st.floats(allow_nan=False)
    | st.text(max_size=4)
    | st.sampled_from(["F32", "w", "optim.u", "2.7", "0" * 64, "0" * 16]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in ((value, key), *places(item))]


@settings(max_examples=400)
@given(
    record=st.sampled_from(RECORDS),
    place=st.integers(0, 2**16),
    value=JSON,
    key=st.none() | st.just(b"k" * 16),
)
def test_any_value_in_any_place_is_refused_or_read(
    record: object, place: int, value: Any, key: bytes | None
) -> None:
    """§2.3: nothing but a FormatError comes of a hostile file, and what is read is written again as it is."""
    plain = json.loads(encode(record))
    every = places(plain)
    container, where = every[place % len(every)]
    container[where] = value
    try:
        found = decode(type(record), json.dumps(plain).encode(), "file", key)
    except FormatError:
        return
    assert key is None
    assert decode(type(record), encode(found), "file") == found


def test_names_have_one_form() -> None:
    """§1.4"""
    assert step_folder(1200) == "step-00001200"
    assert parse_step("step-00001200") == 1200
    assert parse_step("step-123456789") == 123456789
    for name in ("step-1200", "step-000001200", "step-00001200.tmp", "Step-00001200", "step-0000120٣"):
        assert parse_step(name) is None
    assert parse_generation("g2.7") == parse_generation("g2.7.json") == G
    for name in ("g02.7", "2.7", "g2.7.json.json", "g2", "g-1.2"):
        assert parse_generation(name) is None
    assert parse_rank("rank-00003.json") == 3
    assert parse_rank("rank-3.json") is None
    assert parse_ledger("00000001-00000010.jsonl") == (1, 10)
    assert parse_ledger("x.jsonl") is None
    assert sorted([GenerationId(2, 1), GenerationId(1, 10), GenerationId(1, 9)]) == [
        GenerationId(1, 9), GenerationId(1, 10), GenerationId(2, 1),
    ]  # fmt: skip


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("data", [encode(RANK), b"{}"])
def test_the_garbage_collector_is_left_as_it_was(data: bytes, enabled: bool) -> None:
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with contextlib.suppress(FormatError):
            decode(RankFile, data, "file")
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
